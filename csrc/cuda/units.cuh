// The loops over the logits of one thread, for both kinds of kernels. A thread moves a unit at
// once: kSize neighbouring elements, which are classes of one row (kRows = 1), or one class each of
// neighbouring rows (kRows = kSize). Element k belongs to the thread's row k % kRows.
#pragma once

#include <algorithm>

#include "device.cuh"

namespace oe_ext::cuda {

// sm_75 would spill what more than a part of the others' loops take at once.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kLoopShare = 4;
#else
constexpr int kLoopShare = 1;
#endif

// How many units a thread loads at once: up to 128 bytes are on their way.
template <typename acc_t, int kSize>
constexpr int kLoadsAtOnce = (kSize > 1 ? 8 : 128 / sizeof(acc_t)) / kLoopShare;

// How many units the other loops take at once. Exponentials of doubles take many registers.
template <typename acc_t, int kSize, int kRows>
constexpr int kUnitsAtOnce = std::max<int>((kSize == 1  ? 16
                                            : kRows > 1 ? 8
                                                        : 4) /
                                               kLoopShare / (sizeof(acc_t) > sizeof(float) ? 4 : 1),
                                           1);

// A thread's units of the logits or of their gradient.
template <typename scalar_t>
struct Units {
  scalar_t* data = nullptr;  // the first one
  int64_t stride = 0;        // from unit to unit, in elements

  __device__ scalar_t* at(int64_t unit) const { return data + unit * stride; }
};

// A thread's part of the dynamic shared memory: what it reads there only it has written, so no
// barrier is needed. Holds the logits of up to `capacity` units, then their exponentials, as acc_t.
template <typename acc_t, int kSize>
class Stage {
 public:
  using Unit = Vector<acc_t, kSize>;

  __device__ Stage(unsigned char* shared, int capacity)
      : Stage(shared, capacity, static_cast<int>(threadIdx.x) / kWarpSize) {}

  // That of the same lane of another warp.
  __device__ Stage(unsigned char* shared, int capacity, int warp) {
    const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
    mine_ = reinterpret_cast<Piece*>(shared) + warp * capacity * kPieces * kWarpSize + lane;
  }

  __device__ Unit get(int slot) const {
    Unit unit;
    for (int piece = 0; piece < kPieces; ++piece) {
      const Piece values = mine_[(slot * kPieces + piece) * kWarpSize];
      for (int k = 0; k < kPieceSize; ++k) {
        unit.values[piece * kPieceSize + k] = values.values[k];
      }
    }
    return unit;
  }

  __device__ void put(int slot, const Unit& unit) const {
    for (int piece = 0; piece < kPieces; ++piece) {
      Piece values;
      for (int k = 0; k < kPieceSize; ++k) {
        values.values[k] = unit.values[piece * kPieceSize + k];
      }
      mine_[(slot * kPieces + piece) * kWarpSize] = values;
    }
  }

  // One element of a unit.
  __device__ acc_t& at(int slot, int k) const {
    return mine_[(slot * kPieces + k / kPieceSize) * kWarpSize].values[k % kPieceSize];
  }

 private:
  // The lanes of a warp are neighbours, 16 bytes each: no bank conflicts.
  static constexpr int kPieceSize = kSize < kVectorSize<acc_t> ? kSize : kVectorSize<acc_t>;
  static constexpr int kPieces = kSize / kPieceSize;
  using Piece = Vector<acc_t, kPieceSize>;

  Piece* mine_;
};

// Calls body(i, n) for parts of what is left from `first` on: n = kSize, kSize / 2, ..., 1.
template <int kSize, typename index_t, typename Body>
__device__ void in_halves(index_t first, index_t count, const Body& body) {
  if (first + kSize <= count) {
    body(first, std::integral_constant<int, kSize>());
    first += kSize;
  }
  if constexpr (kSize > 1) {
    in_halves<kSize / 2>(first, count, body);
  }
}

// Calls body(i, n) for i = 0, n, 2 n, ... with the constant n = kAtOnce, and then for what is left.
template <int kAtOnce, typename index_t, typename Body>
__device__ void in_groups(index_t count, const Body& body) {
  index_t first = 0;
#pragma unroll 1
  for (; first + kAtOnce <= count; first += kAtOnce) {
    body(first, std::integral_constant<int, kAtOnce>());
  }
  if constexpr (kAtOnce > 1) {
    in_halves<kAtOnce / 2>(first, count, body);
  }
}

// Moves `count` units to the stage and raises the maximum of each row to theirs. fmax(NaN, x) is x:
// a NaN reaches the sums instead.
template <int kRows, typename scalar_t, typename acc_t, int kSize>
__device__ void load_units(const Units<const scalar_t>& from, int count,
                           const Stage<acc_t, kSize>& stage, acc_t (&max)[kRows]) {
  constexpr int kAtOnce = kLoadsAtOnce<acc_t, kSize>;
  in_groups<kAtOnce>(count, [&](int first, auto n) {
    Vector<scalar_t, kSize> units[n];
    for (int i = 0; i < n; ++i) {
      units[i] = load_vector<kSize>(from.at(first + i));
    }
    for (int i = 0; i < n; ++i) {
      Vector<acc_t, kSize> unit;
      for (int k = 0; k < kSize; ++k) {
        unit.values[k] = static_cast<acc_t>(units[i].values[k]);
        max[k % kRows] = std::fmax(max[k % kRows], unit.values[k]);
      }
      stage.put(first + i, unit);
    }
  });
}

// The sums of a thread over its part of a row. A group's terms are added in acc_t, groups in
// double: a long row loses no digits, and the sum of shifted logits does not overflow.
//
// The maximum starts at the lowest finite number, not at -inf, so a -inf logit is no special case:
// it adds exp(-inf) = 0 and -inf. A row with a +inf or NaN logit, or with only -inf logits, becomes
// NaN: its softmax does not exist.
template <typename acc_t>
struct RowSums {
  acc_t max = std::numeric_limits<acc_t>::lowest();
  double sum_exp = 0;      // of exp(x - max)
  double sum_shifted = 0;  // of x - max
  acc_t label_logit = 0;   // if the label is in this part

  // Moves the sums of `count` logits to a maximum that is not below the old one.
  __device__ void raise_to(acc_t new_max, int64_t count) {
    sum_exp *= static_cast<double>(exponential(max - new_max));
    sum_shifted += static_cast<double>(count) * static_cast<double>(max - new_max);
    max = new_max;
  }

  // Adds a logit that is not above the maximum.
  __device__ void add(acc_t logit) {
    sum_exp += static_cast<double>(exponential(logit - max));
    sum_shifted += static_cast<double>(logit - max);
  }
};

// Adds the units of the stage to the sums of their rows, relative to each row's maximum, and
// replaces them by their exponentials.
template <int kRows, typename acc_t, int kSize>
__device__ void add_units(const Stage<acc_t, kSize>& stage, int count,
                          RowSums<acc_t> (&rows)[kRows]) {
  constexpr int kAtOnce = kUnitsAtOnce<acc_t, kSize, kRows>;
  constexpr int kChains = kRows > 1 || kSize == 1 ? kRows : 2;
  in_groups<kAtOnce>(count, [&](int first, auto n) {
    acc_t sum_exp[kChains] = {};
    acc_t sum_shifted[kChains] = {};
    for (int i = 0; i < n; ++i) {
      auto unit = stage.get(first + i);
      for (int k = 0; k < kSize; ++k) {
        const acc_t shifted = unit.values[k] - rows[k % kRows].max;
        unit.values[k] = exponential(shifted);
        sum_exp[k % kChains] += unit.values[k];
        sum_shifted[k % kChains] += shifted;
      }
      stage.put(first + i, unit);
    }
    for (int chain = 0; chain < kChains; ++chain) {
      rows[chain % kRows].sum_exp += static_cast<double>(sum_exp[chain]);
      rows[chain % kRows].sum_shifted += static_cast<double>(sum_shifted[chain]);
    }
  });
}

// Where the label of a row is among the units of a thread.
struct LabelPlace {
  int64_t unit = -1;  // or none
  int element = 0;
};

// The sums over `count` units, which pass through the stage `capacity` at a time; over none if not
// `reads`. If they all fit, it holds their exponentials afterwards. raise(max) may raise the maxima
// that these are relative to.
template <int kRows, typename scalar_t, typename acc_t, int kSize, typename Raise>
__device__ void sum_units(const Units<const scalar_t>& from, int64_t count, bool reads,
                          const Stage<acc_t, kSize>& stage, int capacity,
                          const LabelPlace (&labels)[kRows], const Raise& raise,
                          RowSums<acc_t> (&rows)[kRows]) {
  int64_t first = 0;
  do {
    const int64_t left = reads ? count - first : 0;
    const int n = left < capacity ? static_cast<int>(left) : capacity;
    acc_t max[kRows];
    for (int r = 0; r < kRows; ++r) {
      max[r] = rows[r].max;
    }
    load_units<kRows>(Units<const scalar_t>{from.at(first), from.stride}, n, stage, max);
    raise(max);
    for (int r = 0; r < kRows; ++r) {
      if (first > 0) {
        rows[r].raise_to(max[r], first * (kSize / kRows));
      }
      rows[r].max = max[r];
      const int64_t slot = labels[r].unit - first;
      if (slot >= 0 && slot < n) {
        rows[r].label_logit = stage.at(static_cast<int>(slot), labels[r].element);
      }
    }
    add_units<kRows>(stage, n, rows);
    first += capacity;
  } while (reads && first < count);
}

// The gradient of a row. That of a row that does not count is 0, whatever its logits are.
template <typename acc_t>
struct RowGradient {
  __device__ static RowGradient of_row(acc_t max, const GradientCoefficients<acc_t>& coefficients,
                                       bool counts) {
    return {max, coefficients, counts ? std::numeric_limits<acc_t>::infinity() : acc_t(0)};
  }

  __device__ bool counts() const { return limit > 0; }

  // fmin replaces a NaN, too: by 0 in a row that does not count; else the factor is NaN as well.
  __device__ acc_t operator()(acc_t logit, bool is_label) const {
    return coefficients(std::fmin(exponential(logit - max), limit), is_label);
  }

  acc_t max = 0;
  GradientCoefficients<acc_t> coefficients;  // 0 if the row does not count
  // Exponentials above do not count: none, or all. A select for each logit takes more registers.
  acc_t limit = 0;
};

// The gradient of a row, from the statistics that the forward saved. Sets `cls` to the class of its
// label, or -1.
template <typename scalar_t, typename acc_t>
__device__ RowGradient<acc_t> backward_gradient(const BackwardArgs<scalar_t, acc_t>& args,
                                                int64_t row, int64_t& cls) {
  const int64_t label = args.labels[row];
  const RowKind kind = args.labels.rule.kind(label);
  const auto coefficients = args.coefficients(row, label, kind);
  cls = args.class_here(label, kind);
  if (!coefficients.counts) {
    return RowGradient<acc_t>();
  }
  const acc_t divisor = Divisors<acc_t>(args.divisors()).of(kind);
  return RowGradient<acc_t>::of_row(
      args.row_max[row],
      args.gradient_coefficients(coefficients, args.row_sum_exp[row], args.grad[row], divisor),
      true);
}

// Subtracts the labels' parts from the exponentials in the stage.
template <int kRows, typename acc_t, int kSize>
__device__ void subtract_labels(const Stage<acc_t, kSize>& stage,
                                const RowGradient<acc_t> (&gradients)[kRows],
                                const LabelPlace (&labels)[kRows]) {
  for (int r = 0; r < kRows; ++r) {
    if (gradients[r].counts() && labels[r].unit >= 0) {
      stage.at(static_cast<int>(labels[r].unit), labels[r].element) -=
          gradients[r].coefficients.at_label;
    }
  }
}

// Writes gradients from what the stage holds: exponentials, less the labels' parts.
template <int kRows, typename scalar_t, typename acc_t, int kSize>
__device__ void write_from_stage(const Stage<acc_t, kSize>& stage, int count,
                                 const RowGradient<acc_t> (&gradients)[kRows],
                                 const Units<scalar_t>& to) {
  constexpr int kAtOnce = kUnitsAtOnce<acc_t, kSize, kRows>;
  in_groups<kAtOnce>(count, [&](int first, auto n) {
    for (int i = 0; i < n; ++i) {
      const auto unit = stage.get(first + i);
      Vector<scalar_t, kSize> result;
      for (int k = 0; k < kSize; ++k) {
        result.values[k] = static_cast<scalar_t>(
            gradients[k % kRows].coefficients(unit.values[k], /*is_label=*/false));
      }
      store_vector(to.at(first + i), result);
    }
  });
}

// Writes gradients from the logits.
template <int kRows, int kSize, typename scalar_t, typename acc_t>
__device__ void write_from_logits(const Units<const scalar_t>& from, int64_t count,
                                  const RowGradient<acc_t> (&gradients)[kRows],
                                  const LabelPlace (&labels)[kRows], const Units<scalar_t>& to) {
  // Twice as many loads on their way as units in the other loops.
  constexpr int kAtOnce = (kSize > 1 && kRows == 1 ? 2 : 1) * kUnitsAtOnce<acc_t, kSize, kRows>;
  in_groups<kAtOnce>(count, [&](int64_t first, auto n) {
    Vector<scalar_t, kSize> units[n];
    for (int i = 0; i < n; ++i) {
      units[i] = load_vector<kSize>(from.at(first + i));
    }
    int label[kRows];  // the label's element among those of this group, or none
    for (int r = 0; r < kRows; ++r) {
      const int64_t unit = labels[r].unit - first;
      label[r] = unit >= 0 && unit < n ? static_cast<int>(unit) * kSize + labels[r].element : -1;
    }
    for (int i = 0; i < n; ++i) {
      for (int k = 0; k < kSize; ++k) {
        units[i].values[k] = static_cast<scalar_t>(gradients[k % kRows](
            static_cast<acc_t>(units[i].values[k]), label[k % kRows] == i * kSize + k));
      }
      store_vector(to.at(first + i), units[i]);
    }
  });
}

template <int kSize, typename scalar_t>
__device__ void write_zeros(int64_t count, const Units<scalar_t>& to) {
  for (int64_t unit = 0; unit < count; ++unit) {
    store_vector(to.at(unit), Vector<scalar_t, kSize>{});
  }
}

}  // namespace oe_ext::cuda
