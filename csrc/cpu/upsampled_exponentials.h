// The exponentials of an upsampled row of pixels, their sums and their part of the gradient, in two
// ways: from those at the ends of segments, which is fast, and from each pixel's largest logit.
#pragma once

#include "upsampled_segments.h"

namespace oe_ext::cpu {
namespace {

// ---- Exponentials of pixels from those of the ends: one for up to four pixels.

template <typename Segment, typename acc_t>
struct FromEnds {
  using Powers = typename Segment::template Powers<acc_t>;

  // Adds the exponentials of kCount classes to the sums of pixels.
  template <int kCount>
  OE_EXT_INLINE static void add_classes(Line<acc_t> line, const acc_t* exps, int64_t stride,
                                        acc_t* sums) {
    const acc_t* second = exps + line.second_end;
#pragma omp simd
    for (int64_t i = 0; i < line.padded; ++i) {
#pragma GCC unroll 2
      for (int cls = 0; cls < kCount; ++cls) {
        const Powers powers(exps[cls * stride + i], second[cls * stride + i]);
        powers.add_to(sums + i, line.padded);
      }
    }
  }

  // Sets the ends of segments, but for the last ones, and the sums of pixels. The exponentials of
  // two classes are computed before those of the two before are used: to load what has just been
  // stored, at other boundaries, takes long.
  static void sum(Line<acc_t> line, int64_t num_classes, const StripMemory<acc_t>& memory,
                  acc_t* sums) {
    std::fill_n(sums, Segment::kPixels * line.padded, acc_t(0));
    int64_t cls = 0;
    for (int64_t next = 0; cls + 2 <= num_classes; cls += 2) {
      for (; next < std::min(cls + 4, num_classes); ++next) {
        set_exponentials<Segment>(line, next, memory);
      }
      add_classes<2>(line, memory.end_exps(cls), memory.ends, sums);
    }
    if (cls < num_classes) {
      if (cls == 0) {
        set_exponentials<Segment>(line, cls, memory);
      }
      add_classes<1>(line, memory.end_exps(cls), memory.ends, sums);
    }
  }

  // Adds the gradient of one class: exponentials times factors, minus what stands at labels.
  OE_EXT_INLINE static void add_gradient(Line<acc_t> line, int64_t cls, const acc_t* factors,
                                         const TileRows<acc_t>&, const StripMemory<acc_t>& memory) {
    const acc_t* exps = memory.end_exps(cls);
    const acc_t* second = exps + line.second_end;
    const int64_t stride = memory.lanes;
    acc_t* top = memory.top_gradient + memory.of_end(cls, 0);
    acc_t* bottom = memory.bottom_gradient + memory.of_end(cls, 0);
    acc_t* at_labels = memory.at_labels + memory.of_end(cls, 0);
#pragma omp simd
    for (int64_t i = 0; i < line.padded; ++i) {
      const Powers powers(exps[i], second[i]);
#pragma GCC unroll 2
      for (int end = 0; end < Segment::kEnds; ++end) {
        const acc_t* of_end = factors + end * Segment::kPixels * line.padded + i;
        const int64_t at = end * stride + i;
        add_to_rows(line, powers.times(of_end, line.padded) - at_labels[at], top + at, bottom + at);
        at_labels[at] = 0;
      }
    }
  }
};

// ---- Exponentials of pixels minus each pixel's largest logit: where those from the ends are too
// small, where the maximum is wanted, and where NaN stands beside pixels that do not count.

template <typename Segment, typename acc_t>
struct FromMaxima {
  static void raise_maxima(Line<acc_t> line, int64_t num_classes, const StripMemory<acc_t>& memory,
                           acc_t* maxima) {
    std::fill_n(maxima, Segment::kPixels * line.padded, std::numeric_limits<acc_t>::lowest());
    std::fill_n(memory.argmax, Segment::kPixels * line.padded, acc_t(0));
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      const acc_t* x = memory.end_x(cls);
      const acc_t* second = x + line.second_end;
      for (int k = 0; k < Segment::kPixels; ++k) {
        acc_t* max = maxima + k * line.padded;
        acc_t* argmax = memory.argmax + k * line.padded;
#pragma omp simd
        for (int64_t i = 0; i < line.padded; ++i) {
          const acc_t logit = Segment::interpolate(k, x[i], second[i]);
          // A NaN is a maximum, as in torch, and stays it.
          const bool is_larger = !(logit <= max[i]) & (max[i] == max[i]);
          argmax[i] = select(is_larger, static_cast<acc_t>(cls), argmax[i]);
          max[i] = select(is_larger, logit, max[i]);
        }
      }
    }
  }

  static void sum(Line<acc_t> line, int64_t num_classes, const StripMemory<acc_t>& memory,
                  const acc_t* maxima, acc_t* sums) {
    std::fill_n(sums, Segment::kPixels * line.padded, acc_t(0));
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      const acc_t* x = memory.end_x(cls);
      const acc_t* second = x + line.second_end;
      for (int k = 0; k < Segment::kPixels; ++k) {
        acc_t* sum = sums + k * line.padded;
        const acc_t* max = maxima + k * line.padded;
#pragma omp simd
        for (int64_t i = 0; i < line.padded; ++i) {
          sum[i] += exp_of(Segment::interpolate(k, x[i], second[i]) - max[i]);
        }
      }
    }
  }

  OE_EXT_INLINE static void add_gradient(Line<acc_t> line, int64_t cls, const acc_t* factors,
                                         const TileRows<acc_t>& rows,
                                         const StripMemory<acc_t>& memory) {
    const acc_t* x = memory.end_x(cls);
    const acc_t* second = x + line.second_end;
    for (int end = 0; end < Segment::kEnds; ++end) {
      acc_t* top = memory.top_gradient + memory.of_end(cls, end);
      acc_t* bottom = memory.bottom_gradient + memory.of_end(cls, end);
      acc_t* at_label = memory.at_labels + memory.of_end(cls, end);
      for (int k = 0; k < Segment::kPixels; ++k) {
        const acc_t* max = rows.max + k * line.padded;
        const acc_t* factor = factors + (end * Segment::kPixels + k) * line.padded;
#pragma omp simd
        for (int64_t i = 0; i < line.padded; ++i) {
          const acc_t exp = exp_of(Segment::interpolate(k, x[i], second[i]) - max[i]);
          const acc_t part = select(factor[i] != acc_t(0), exp * factor[i], acc_t(0));
          add_to_rows(line, part, top + i, bottom + i);
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < line.padded; ++i) {
        add_to_rows(line, -at_label[i], top + i, bottom + i);
        at_label[i] = 0;
      }
    }
  }
};

}  // namespace
}  // namespace oe_ext::cpu
