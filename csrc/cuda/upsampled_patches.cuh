// The loops over the classes of a patch of pixels: sums of exponentials, and gradients. The logits
// of pixels are nowhere in memory: they are interpolated between the four elements of their cell,
// less the largest logit of all four, which cancels.
#pragma once

#include "upsampled_cells.cuh"

namespace oe_ext::cuda {

// Not inlined for doubles: sm_75 has no registers for several at once.
__device__ inline float careful_exponential(float x) { return exponential(x); }
__attribute__((noinline)) __device__ inline double careful_exponential(double x) {
  return exponential(x);
}

// ---- The pixels of a class, in two ways. A class has four numbers, from which its pixels follow
// by operations that are linear in them.

// By steps from the element above left: infinite logits give NaN. The values are times kLogOfE.
template <typename acc_t>
struct QuickPixels {
  static constexpr acc_t kUnit = kLogOfE<acc_t>;
  static constexpr bool kHasMax = false;  // of each pixel

  // That element, the steps to the right and downwards, and what both are more than their sum. The
  // rounding of max * kUnit is the same for all classes, so it cancels like the maximum itself.
  __device__ QuickPixels(const acc_t (&x)[kCorners], acc_t max) {
    terms[0] = std::fma(x[0], kUnit, -(max * kUnit));
    terms[1] = (x[1] - x[0]) * kUnit;
    terms[2] = (x[2] - x[0]) * kUnit;
    terms[3] = std::fma(x[3] - x[2], kUnit, -terms[1]);
  }

  __device__ static acc_t at(acc_t below, acc_t right, const acc_t (&terms)[kCorners]) {
    return std::fma(below, step(right, terms), above(right, terms));
  }
  __device__ static acc_t above(acc_t right, const acc_t (&terms)[kCorners]) {
    return std::fma(right, terms[1], terms[0]);
  }
  __device__ static acc_t step(acc_t right, const acc_t (&terms)[kCorners]) {
    return std::fma(right, terms[3], terms[2]);
  }

  // Of a pixel with this maximum and this factor of its gradient: neither matters.
  __device__ acc_t exponential(acc_t below, acc_t right, acc_t, acc_t) const {
    return power(at(below, right, terms));
  }

  acc_t terms[kCorners];
};

// From weights, where an element without weight may be infinite or NaN.
template <typename acc_t>
struct CarefulPixels {
  static constexpr acc_t kUnit = 1;
  static constexpr bool kHasMax = true;

  __device__ CarefulPixels(const acc_t (&x)[kCorners], acc_t max) {
    for (int i = 0; i < kCorners; ++i) {
      terms[i] = x[i] - max;
    }
  }

  __device__ static acc_t at(acc_t below, acc_t right, const acc_t (&terms)[kCorners]) {
    return between(below, between(right, terms[0], terms[1]), between(right, terms[2], terms[3]));
  }
  __device__ static acc_t between(acc_t weight, acc_t first, acc_t second) {
    const acc_t both = (acc_t(1) - weight) * first + weight * second;
    return weight == acc_t(0) ? first : weight == acc_t(1) ? second : both;
  }

  // A pixel whose factor is 0 adds nothing, even if its exponential is NaN.
  __device__ acc_t exponential(acc_t below, acc_t right, acc_t max, acc_t factor) const {
    const acc_t exp = careful_exponential(at(below, right, terms) - max);
    return factor != acc_t(0) ? exp : acc_t(0);
  }

  acc_t terms[kCorners];
};

// Those of a class.
template <typename Pixels, typename scalar_t, typename acc_t>
__device__ Pixels pixels_of(const CellCorners<scalar_t, acc_t>& corners, int64_t offset) {
  acc_t x[kCorners];
  for (int i = 0; i < kCorners; ++i) {
    x[i] = static_cast<acc_t>(corners.at[i][offset]);
  }
  return Pixels(x, corners.max);
}

// Calls body(cls, pixels) for every class of this warp.
template <typename Pixels, typename scalar_t, typename acc_t, int kSize, typename Body>
__device__ void for_each_class(const CellCorners<scalar_t, acc_t>& corners,
                               const PatchMemory<acc_t, kSize>& memory, int num_classes,
                               const Body& body) {
  const int64_t step = memory.num_warps * corners.class_stride;
  const scalar_t* at[kCorners];
  for (int i = 0; i < kCorners; ++i) {
    at[i] = corners.at[i] + memory.warp * corners.class_stride;
  }
#pragma unroll 1
  for (int cls = memory.warp; cls < num_classes; cls += memory.num_warps) {
    acc_t x[kCorners];
    for (int i = 0; i < kCorners; ++i) {
      x[i] = static_cast<acc_t>(*at[i]);
      at[i] += step;
    }
    body(cls, Pixels(x, corners.max));
  }
}

struct AnyOf {
  __device__ void merge(const AnyOf& other) { any |= other.any; }

  unsigned any = 0;
};

// ---- Sums over classes: of the exponentials of pixels, left to the warps that finish them, and of
// the terms of pixels, from which follow those of the logits.

struct Add {
  template <typename T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// Adds up what this warp has of both sums.
template <bool kKeeps, typename scalar_t, typename acc_t, int kSize>
__device__ void sum_classes(const CellCorners<scalar_t, acc_t>& corners,
                            const PatchWeights<acc_t, kSize>& weights,
                            const PatchMemory<acc_t, kSize>& memory, int num_classes,
                            acc_t (&sum_exp)[kSize * kSize], acc_t (&sum_terms)[kCorners]) {
  using Pixels = QuickPixels<acc_t>;
  for_each_class<Pixels>(corners, memory, num_classes, [&](int cls, const Pixels& pixels) {
    Vector<acc_t, kSize> exps[kSize];
    for (int k = 0; k < kSize; ++k) {
      const acc_t above = Pixels::above(weights.right[k], pixels.terms);
      const acc_t step = Pixels::step(weights.right[k], pixels.terms);
      for (int r = 0; r < kSize; ++r) {
        exps[r].values[k] = power(std::fma(weights.below[r], step, above));
        sum_exp[r * kSize + k] += exps[r].values[k];
      }
    }
    for (int r = 0; kKeeps && r < kSize; ++r) {
      memory.exps.put(cls * kSize + r, exps[r]);
    }
    for (int i = 0; i < kCorners; ++i) {
      sum_terms[i] += pixels.terms[i];
    }
  });
}

// Are the sums large enough? Only then are they left.
template <typename scalar_t, typename acc_t, int kSize>
__device__ bool sum_quickly(const CellCorners<scalar_t, acc_t>& corners,
                            const PatchWeights<acc_t, kSize>& weights,
                            const PatchMemory<acc_t, kSize>& memory, int num_classes,
                            acc_t (&sum_terms)[kCorners]) {
  acc_t sum_exp[kSize * kSize] = {};
  if (memory.keeps_exps) {
    sum_classes<true>(corners, weights, memory, num_classes, sum_exp, sum_terms);
  } else {
    sum_classes<false>(corners, weights, memory, num_classes, sum_exp, sum_terms);
  }
  memory.merge_warps(sum_exp, Add());
  memory.merge_warps(sum_terms, Add());
  AnyOf is_small;
  for (int i = 0; i < kSize * kSize; ++i) {
    is_small.any |= sum_exp[i] >= kMinSum<acc_t> ? 0u : 1u;
  }
  // The same for all warps, which have the same sums.
  if (merge_lanes(is_small, kWarpSize).any != 0) {
    return false;
  }
  for (int r = 0; r < kSize; ++r) {
    Vector<acc_t, kSize> unit;
    for (int k = 0; k < kSize; ++k) {
      unit.values[k] = sum_exp[r * kSize + k];
    }
    if (memory.has_row(r)) {
      memory.factor.put(r, unit);
    }
  }
  return true;
}

// One row of pixels after the other. Leaves the maxima, too, and in the place of the labels the
// first class that has the maximum.
template <typename scalar_t, typename acc_t, int kSize>
__device__ void sum_carefully(const CellCorners<scalar_t, acc_t>& corners,
                              const AxisCell<acc_t>& vertical, int first_row,
                              const PatchWeights<acc_t, kSize>& weights,
                              const PatchMemory<acc_t, kSize>& memory, int num_classes,
                              acc_t (&sum_terms)[kCorners]) {
  using Pixels = CarefulPixels<acc_t>;
  // A NaN is a maximum, as in torch, and stays it.
  const auto larger = [](acc_t max, acc_t x) { return !(x <= max) && max == max ? x : max; };
  for (acc_t& sum : sum_terms) {
    sum = 0;
  }
  for_each_class<Pixels>(corners, memory, num_classes, [&](int, const Pixels& pixels) {
    for (int i = 0; i < kCorners; ++i) {
      sum_terms[i] += pixels.terms[i];
    }
  });
  memory.merge_warps(sum_terms, Add());
#pragma unroll 1
  for (int r = 0; r < kSize; ++r) {
    const acc_t below = vertical.weight(first_row + r);
    Vector<acc_t, kSize> max;
    Vector<acc_t, kSize> sum = {};
    Vector<acc_t, kSize> argmax;
    for (int k = 0; k < kSize; ++k) {
      max.values[k] = std::numeric_limits<acc_t>::lowest();
      argmax.values[k] = static_cast<acc_t>(num_classes);
    }
    for_each_class<Pixels>(corners, memory, num_classes, [&](int, const Pixels& pixels) {
      for (int k = 0; k < kSize; ++k) {
        const acc_t logit = Pixels::at(below, weights.right[k], pixels.terms);
        max.values[k] = larger(max.values[k], logit);
      }
    });
    memory.merge_warps(max.values, larger);
    for_each_class<Pixels>(corners, memory, num_classes, [&](int cls, const Pixels& pixels) {
      for (int k = 0; k < kSize; ++k) {
        const acc_t logit = Pixels::at(below, weights.right[k], pixels.terms);
        sum.values[k] += careful_exponential(logit - max.values[k]);
        const auto number = static_cast<acc_t>(cls);
        argmax.values[k] =
            logit < max.values[k] ? argmax.values[k] : std::fmin(argmax.values[k], number);
      }
    });
    memory.merge_warps(sum.values, Add());
    memory.merge_warps(argmax.values, [](acc_t a, acc_t b) { return std::fmin(a, b); });
    if (memory.has_row(r)) {
      memory.max.put(r, max);
      memory.factor.put(r, sum);
      Vector<int, kSize> classes;
      for (int k = 0; k < kSize; ++k) {
        classes.values[k] = argmax.values[k] < static_cast<acc_t>(num_classes)
                                ? static_cast<int>(argmax.values[k])
                                : 0;
      }
      memory.label.put(r, classes);
    }
  }
}

// ---- Gradients

// The sums of a patch's gradients along each column of pixels, and the sums of these sums after
// each row but the last, from which follows what lies above and below: sum r x_r = (kSize - 1) sum
// x_r - sum (x_0 + ... + x_r).
template <typename acc_t, int kSize>
struct ColumnSums {
  __device__ void add(int r, int k, acc_t value, acc_t factor) {
    sum[k] = r == 0 ? value * factor : sum[k] + value * factor;
    if (r + 1 < kSize) {
      before[k] = r == 0 ? sum[k] : before[k] + sum[k];
    }
  }
  // Takes something away after all rows were added.
  __device__ void subtract(int r, int k, acc_t value) {
    sum[k] -= value;
    before[k] -= static_cast<acc_t>(kSize - 1 - r) * value;
  }

  acc_t sum[kSize];
  acc_t before[kSize];
};

// The gradient of the elements to the right of a column's cell: of those above and below, from its
// own pixels and from those of the next column, whose rows of pixels weigh the same. All lanes of
// the warp must call it.
template <typename acc_t>
struct ElementGradients {
  template <int kSize>
  __device__ ElementGradients(const ColumnSums<acc_t, kSize>& columns,
                              const PatchWeights<acc_t, kSize>& weights) {
    const acc_t all = to_right(columns.sum, weights);
    const acc_t before = to_right(columns.before, weights);
    below = weights.last_row * all - weights.row_step * before;
    above = all - below;
  }

  template <int kSize>
  __device__ static acc_t to_right(const acc_t (&columns)[kSize],
                                   const PatchWeights<acc_t, kSize>& weights) {
    acc_t all = columns[0];
    acc_t right = weights.right[0] * columns[0];
    for (int k = 1; k < kSize; ++k) {
      all += columns[k];
      right += weights.right[k] * columns[k];
    }
    return right + __shfl_down_sync(kFullMask, all - right, 1);
  }

  acc_t above;
  acc_t below;
};

// What a column has of the uniform distribution's gradient, the same for all classes: of the row of
// elements above all pixels that follow, and of the one below.
template <typename acc_t>
struct UniformGradient {
  acc_t above = 0;
  acc_t below = 0;
};

// Adds the gradient of a patch to what the elements have of its classes. `side`: the place of the
// elements above.
template <typename Pixels, typename scalar_t, typename acc_t, int kSize>
__device__ void add_gradients(const CellCorners<scalar_t, acc_t>& corners,
                              const PatchWeights<acc_t, kSize>& weights,
                              const PatchMemory<acc_t, kSize>& memory, int num_classes, int side,
                              UniformGradient<acc_t>& uniform) {
  Vector<acc_t, kSize> factor[kSize];
  // As of exponentials of 1: in the careful way, equal logits get a gradient of exactly 0.
  ColumnSums<acc_t, kSize> of_uniform;
  unsigned classes = 0;  // a bit for the label of each pixel
  for (int r = 0; r < kSize; ++r) {
    factor[r] = memory.factor.get(r);
    const auto offset = memory.offset.get(r);
    const auto labels = memory.label.get(r);
    for (int k = 0; k < kSize; ++k) {
      of_uniform.add(r, k, acc_t(1), offset.values[k]);
      classes |= labels.values[k] >= 0 ? 1u << (labels.values[k] % 32) : 0u;
    }
  }
  const ElementGradients<acc_t> more(of_uniform, weights);
  uniform.above += more.above;
  uniform.below += more.below;
  const auto add = [&](int cls, const ColumnSums<acc_t, kSize>& columns) {
    const ElementGradients<acc_t> gradients(columns, weights);
    memory.gradient(side, cls) += gradients.above;
    memory.gradient(1 - side, cls) += gradients.below;
  };
  if constexpr (!Pixels::kHasMax) {
    if (memory.keeps_exps) {  // from which the labels' part has been subtracted
#pragma unroll 1
      for (int cls = memory.warp; cls < num_classes; cls += memory.num_warps) {
        ColumnSums<acc_t, kSize> columns;
        for (int r = 0; r < kSize; ++r) {
          const auto exps = memory.exps.get(cls * kSize + r);
          for (int k = 0; k < kSize; ++k) {
            columns.add(r, k, exps.values[k], factor[r].values[k]);
          }
        }
        add(cls, columns);
      }
      return;
    }
  }
  for_each_class<Pixels>(corners, memory, num_classes, [&](int cls, const Pixels& pixels) {
    ColumnSums<acc_t, kSize> columns;
    for (int r = 0; r < kSize; ++r) {
      Vector<acc_t, kSize> max = {};
      if constexpr (Pixels::kHasMax) {
        max = memory.max.get(r);
      }
      for (int k = 0; k < kSize; ++k) {
        const acc_t exp = pixels.exponential(weights.below[r], weights.right[k], max.values[k],
                                             factor[r].values[k]);
        columns.add(r, k, exp, factor[r].values[k]);
      }
    }
    if ((classes >> (cls % 32) & 1) != 0) {
      for (int r = 0; r < kSize; ++r) {
        const auto labels = memory.label.get(r);
        const auto parts = memory.label_part.get(r);
        for (int k = 0; k < kSize; ++k) {
          columns.subtract(r, k, labels.values[k] == cls ? parts.values[k] : acc_t(0));
        }
      }
    }
    add(cls, columns);
  });
}

}  // namespace oe_ext::cuda
