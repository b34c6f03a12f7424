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

  // Sets the ends of segments, but for the last ones, and the sums of pixels. A loop of its own
  // adds up: to load what has just been stored, at other boundaries, takes long. The sums of a few
  // lanes stay in registers for all classes.
  static void sum(Line<acc_t> line, int64_t num_classes, const StripMemory<acc_t>& memory,
                  acc_t* sums) {
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      set_ends<Segment, true>(line, cls, memory);
    }
    for (int64_t first = 0; first < line.padded; first += kTileRowsStep) {
      alignas(64) acc_t of_lanes[Segment::kPixels][kTileRowsStep] = {};
      for (int64_t cls = 0; cls < num_classes; ++cls) {
        const acc_t* exps = memory.end_exps(cls) + first;
        const acc_t* second = exps + line.second_end;
#pragma omp simd
        for (int64_t i = 0; i < kTileRowsStep; ++i) {
          Powers(exps[i], second[i]).add_to(&of_lanes[0][i], kTileRowsStep);
        }
      }
      for (int k = 0; k < Segment::kPixels; ++k) {
        std::copy_n(of_lanes[k], kTileRowsStep, sums + k * line.padded + first);
      }
    }
  }

  // Adds the gradients of some classes: exponentials times factors, minus what stands at labels.
  // The factors of a few lanes stay in registers for all classes.
  static void add_gradients(Line<acc_t> line, int64_t begin, int64_t end, const acc_t* factors,
                            const TileRows<acc_t>&, const StripMemory<acc_t>& memory) {
    constexpr int kFactors = Segment::kEnds * Segment::kPixels;
    const int64_t stride = memory.lanes;
    for (int64_t first = 0; first < line.padded; first += kTileRowsStep) {
      alignas(64) acc_t of_lanes[kFactors][kTileRowsStep];
#pragma GCC unroll 8
      for (int i = 0; i < kFactors; ++i) {
#pragma omp simd
        for (int64_t lane = 0; lane < kTileRowsStep; ++lane) {
          of_lanes[i][lane] = factors[i * line.padded + first + lane];
        }
      }
      for (int64_t cls = begin; cls < end; ++cls) {
        const acc_t* exps = memory.end_exps(cls) + first;
        const acc_t* second = exps + line.second_end;
        acc_t* top = memory.top_gradient + memory.of_end(cls, 0) + first;
        acc_t* bottom = memory.bottom_gradient + memory.of_end(cls, 0) + first;
        acc_t* at_labels = memory.at_labels + memory.of_end(cls, 0) + first;
#pragma omp simd
        for (int64_t i = 0; i < kTileRowsStep; ++i) {
          const Powers powers(exps[i], second[i]);
#pragma GCC unroll 2
          for (int side = 0; side < Segment::kEnds; ++side) {
            const acc_t* of_side = &of_lanes[side * Segment::kPixels][i];
            const int64_t at = side * stride + i;
            add_to_rows(line, powers.times(of_side, kTileRowsStep) - at_labels[at], top + at,
                        bottom + at);
            at_labels[at] = 0;
          }
        }
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

  static void add_gradients(Line<acc_t> line, int64_t begin, int64_t end, const acc_t* factors,
                            const TileRows<acc_t>& rows, const StripMemory<acc_t>& memory) {
    for (int64_t cls = begin; cls < end; ++cls) {
      add_gradient(line, cls, factors, rows, memory);
    }
  }

  static void add_gradient(Line<acc_t> line, int64_t cls, const acc_t* factors,
                           const TileRows<acc_t>& rows, const StripMemory<acc_t>& memory) {
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
