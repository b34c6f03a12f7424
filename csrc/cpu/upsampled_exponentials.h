// The exponentials of the patches of a strip, their sums and their part of the gradient, in two
// ways: from those at the ends of rows, which is fast, and from each pixel's largest logit. What is
// not inlined is compiled once for forward and backward.
#pragma once

#include "upsampled_patches.h"

namespace oe_ext::cpu {
namespace {

// ---- Exponentials of pixels from those of the ends: one for up to four pixels.

template <typename Patch, typename acc_t>
struct FromEnds {
  using Powers = typename Patch::template Powers<acc_t>;
  static constexpr int kPixels = Patch::kPixels;
  static constexpr int kEnds = Patch::kEnds;
  static constexpr int64_t kLanes = Patch::kLanes;

  // Sets the exponentials of ends, and adds to the sums of pixels. A loop of its own adds up: to
  // load what has just been stored, at other boundaries, takes long. The sums of a row stay in
  // registers for all classes.
  __attribute__((noinline)) static void sum(const StripRow<Patch, acc_t>& strip,
                                            int64_t num_classes, const BandMemory<acc_t>& memory,
                                            acc_t* sums) {
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      set_ends<true>(strip, cls, memory.exps);
    }
    for (int j = 0; j < kPixels; ++j) {
      alignas(64) acc_t of_row[kPixels][kLanes];
      std::copy_n(sums + j * kPixels * kLanes, kPixels * kLanes, of_row[0]);
      const acc_t* exps = memory.exps + j * kLanes;
      for (int64_t cls = 0; cls < num_classes; ++cls) {
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
          Powers(exps[i], exps[i + 1]).add_to(&of_row[0][i], kLanes);
        }
        exps += kPixels * kLanes;
      }
      std::copy_n(of_row[0], kPixels * kLanes, sums + j * kPixels * kLanes);
    }
  }

  // Of each pixel, weighed by the ends of its row.
  using Factors = acc_t[kEnds][kPixels][kPixels][kLanes];

  // Adds the gradients of some classes: exponentials times each pixel's factor, minus what stands
  // at labels, which is cleared.
  __attribute__((noinline)) static void add_gradients(const StripRow<Patch, acc_t>& strip,
                                                      int64_t begin, int64_t end,
                                                      const acc_t* factors,
                                                      const BandMemory<acc_t>& memory) {
    alignas(64) Factors weighed;
    for (int side = 0; side < kEnds; ++side) {
      for (int j = 0; j < kPixels; ++j) {
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
          for (int k = 0; k < kPixels; ++k) {
            weighed[side][j][k][i] =
                Patch::template weight<acc_t>(side, k) * factors[(j * kPixels + k) * kLanes + i];
          }
        }
      }
    }
    for (int64_t cls = begin; cls < end; ++cls) {
      if (memory.has_label[cls] != acc_t(0)) {
        add_gradient<true>(strip, cls, weighed, memory);
        memory.has_label[cls] = 0;
      } else {
        add_gradient<false>(strip, cls, weighed, memory);
      }
    }
  }

  template <bool kLabels>
  OE_EXT_INLINE static void add_gradient(const StripRow<Patch, acc_t>& strip, int64_t cls,
                                         const Factors& factors, const BandMemory<acc_t>& memory) {
    const PatchRow<Patch, acc_t> row = strip.row;
    const int64_t stride = strip.stride;
    const acc_t* exps = memory.exps + cls * kPixels * kLanes;
    acc_t* at_labels = memory.at_labels + cls * kLanes * Patch::kCorners;
    acc_t* top = strip.top_gradient + cls * kEnds * stride;
    acc_t* bottom = strip.bottom_gradient + cls * kEnds * stride;
    // Not added to the gradient at once: clang would not vectorise so many accesses of memory.
    alignas(64) acc_t sums[Patch::kCorners][kLanes];
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      acc_t of_top[kEnds] = {};
      acc_t of_bottom[kEnds] = {};
#pragma GCC unroll 4
      for (int j = 0; j < kPixels; ++j) {
        const Powers powers(exps[j * kLanes + i], exps[j * kLanes + i + 1]);
#pragma GCC unroll 2
        for (int side = 0; side < kEnds; ++side) {
          const acc_t part = powers.times(&factors[side][j][0][i], kLanes);
          of_top[side] = multiply_add(row.top_weight[j], part, of_top[side]);
          of_bottom[side] = multiply_add(row.bottom_weight[j], part, of_bottom[side]);
        }
      }
#pragma GCC unroll 2
      for (int side = 0; side < kEnds; ++side) {
        if constexpr (kLabels) {
          of_top[side] -= at_labels[i * Patch::kCorners + side];
          of_bottom[side] -= at_labels[i * Patch::kCorners + kEnds + side];
          at_labels[i * Patch::kCorners + side] = 0;
          at_labels[i * Patch::kCorners + kEnds + side] = 0;
        }
        sums[side][i] = of_top[side];
        sums[kEnds + side][i] = of_bottom[side];
      }
    }
    for (int side = 0; side < kEnds; ++side) {
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) {
        top[side * stride + i] += sums[side][i];
        bottom[side * stride + i] += sums[kEnds + side][i];
      }
    }
  }
};

// ---- Exponentials of pixels minus each pixel's largest logit: where those from the ends are too
// small, where the maximum is wanted, and where NaN stands beside pixels that do not count.

template <typename Patch, typename acc_t>
struct FromMaxima {
  static constexpr int kPixels = Patch::kPixels;
  static constexpr int64_t kLanes = Patch::kLanes;

  // Sets the maxima and the sums of pixels.
  __attribute__((noinline)) static void sum(const StripRow<Patch, acc_t>& strip,
                                            int64_t num_classes, const BandMemory<acc_t>& memory,
                                            TileRows<acc_t>& rows) {
    std::fill_n(rows.max, rows.size, std::numeric_limits<acc_t>::lowest());
    std::fill_n(rows.sum_exp, rows.size, acc_t(0));
    std::fill_n(memory.argmax, rows.size, acc_t(0));
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      set_ends<false>(strip, cls, memory.x);
      for_each_pixel(cls, memory, [&](int64_t pixel, int k, const acc_t* x) {
        acc_t* max = rows.max + pixel;
        acc_t* argmax = memory.argmax + pixel;
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
          const acc_t logit = Patch::interpolate(k, x[i], x[i + 1]);
          // A NaN is a maximum, as in torch, and stays it.
          const bool is_larger = !(logit <= max[i]) & (max[i] == max[i]);
          argmax[i] = select(is_larger, static_cast<acc_t>(cls), argmax[i]);
          max[i] = select(is_larger, logit, max[i]);
        }
      });
    }
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      for_each_pixel(cls, memory, [&](int64_t pixel, int k, const acc_t* x) {
        acc_t* sum = rows.sum_exp + pixel;
        const acc_t* max = rows.max + pixel;
#pragma omp simd
        for (int64_t i = 0; i < kLanes; ++i) {
          sum[i] += exp_of(Patch::interpolate(k, x[i], x[i + 1]) - max[i]);
        }
      });
    }
  }

  __attribute__((noinline)) static void add_gradients(const StripRow<Patch, acc_t>& strip,
                                                      int64_t num_classes,
                                                      const BandMemory<acc_t>& memory,
                                                      const TileRows<acc_t>& rows) {
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      for (int side = 0; side < Patch::kEnds; ++side) {
        add_gradient(strip, cls, side, memory, rows);
      }
      memory.has_label[cls] = 0;
    }
  }

 private:
  // Calls use(pixel, k, ends) for the pixels of a class's patches: their first index in arrays of
  // pixels, and the ends of their row, in which they are pixel k.
  template <typename Use>
  OE_EXT_INLINE static void for_each_pixel(int64_t cls, const BandMemory<acc_t>& memory,
                                           const Use& use) {
    for (int j = 0; j < kPixels; ++j) {
      for (int k = 0; k < kPixels; ++k) {
        use((j * kPixels + k) * kLanes, k, memory.x + (cls * kPixels + j) * kLanes);
      }
    }
  }

  __attribute__((noinline)) static void add_gradient(const StripRow<Patch, acc_t>& strip,
                                                     int64_t cls, int side,
                                                     const BandMemory<acc_t>& memory,
                                                     const TileRows<acc_t>& rows) {
    acc_t* top = strip.top_gradient + (cls * Patch::kEnds + side) * strip.stride;
    acc_t* bottom = strip.bottom_gradient + (cls * Patch::kEnds + side) * strip.stride;
    for_each_pixel(cls, memory, [&](int64_t pixel, int k, const acc_t* x) {
      const acc_t* max = rows.max + pixel;
      const acc_t* factor = rows.factor + pixel;
      const int64_t j = pixel / (kPixels * kLanes);
      const acc_t weight = Patch::template weight<acc_t>(side, k);
      const acc_t top_weight = strip.row.top_weight[j] * weight;
      const acc_t bottom_weight = strip.row.bottom_weight[j] * weight;
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) {
        const acc_t exp = exp_of(Patch::interpolate(k, x[i], x[i + 1]) - max[i]);
        const acc_t part = select(factor[i] != acc_t(0), exp * factor[i], acc_t(0));
        top[i] = multiply_add(top_weight, part, top[i]);
        bottom[i] = multiply_add(bottom_weight, part, bottom[i]);
      }
    });
    if (memory.has_label[cls] != acc_t(0)) {
      acc_t* at_labels = memory.at_labels + cls * kLanes * Patch::kCorners + side;
      for (int64_t i = 0; i < kLanes; ++i) {
        acc_t& at_top = at_labels[i * Patch::kCorners];
        acc_t& at_bottom = at_labels[i * Patch::kCorners + Patch::kEnds];
        top[i] -= at_top;
        bottom[i] -= at_bottom;
        at_top = at_bottom = 0;
      }
    }
  }
};

}  // namespace
}  // namespace oe_ext::cpu
