// Loops over the segments of a strip, for one row of pixels: each step of the loss and of its
// gradient. A segment is kPixels neighbouring pixels between two ends, which are logits between
// those of the source. The logits of pixels are nowhere in memory. The pixels are rows of TileRows
// in the order of lanes: pixel = index in its segment * padded + lane.
//
// All logits are shifted: at each element of the source by its largest logit, and so between the
// elements by what is interpolated between these maxima. Interpolated shifted logits are at most 0,
// and the shift cancels in the loss and in its gradient.
#pragma once

#include "finish_rows.h"
#include "upsampling.h"

namespace oe_ext::cpu {
namespace {

// Where the pixels of a segment lie: at k / kPixels, or centered at (k + 0.5) / kPixels.
template <int kCount, bool kCentered>
struct Segment {
  static constexpr int kPixels = kCount;
  static constexpr int kEnds = kPixels == 1 ? 1 : 2;  // that pixels depend on
  // The exponential of pixel k is p^(kPower - e) q^e, with e = kPower * right_weight(k), and p and
  // q the exponentials of the logits at the ends, divided by kPower.
  static constexpr int kPower = kCentered ? 2 * kPixels : kPixels;

  template <typename acc_t>
  static constexpr acc_t right_weight(int k) {
    return acc_t(kCentered ? 2 * k + 1 : k) / acc_t(kPower);
  }
  template <typename acc_t>
  static constexpr acc_t weight(int end, int k) {
    return end == 0 ? acc_t(1) - right_weight<acc_t>(k) : right_weight<acc_t>(k);
  }

  // The value of pixel k. An end that has no weight may be infinite or NaN.
  template <typename acc_t>
  OE_EXT_INLINE static acc_t interpolate(int k, acc_t left, acc_t right) {
    return right_weight<acc_t>(k) == acc_t(0)
               ? left
               : weight<acc_t>(0, k) * left + weight<acc_t>(1, k) * right;
  }

  // The exponentials of a segment's pixels, as products: pixel k's is half[k / 2] * end[k % 2].
  template <typename acc_t>
  struct Powers {
    acc_t half[2];
    acc_t end[2];

    OE_EXT_INLINE Powers(acc_t p, acc_t q) {
      if constexpr (kPixels == 1) {
        half[0] = p;
        end[0] = 1;
      } else {
        // From one pixel to the next, a factor p * p (or p) is exchanged for one q * q (or q).
        const acc_t common = kCentered ? p * q : p;
        end[0] = kCentered ? p * p : p;
        end[1] = kCentered ? q * q : q;
        half[0] = kPixels == 2 ? common : common * (end[0] * end[0]);
        half[1] = kPixels == 2 ? common : common * (end[1] * end[1]);
      }
    }

    // sums[k * stride] += the exponential of pixel k.
    OE_EXT_INLINE void add_to(acc_t* sums, int64_t stride) const {
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k) {
        sums[k * stride] = multiply_add(half[k / 2], end[k % 2], sums[k * stride]);
      }
    }

    // The sum of the exponentials times factors[k * stride].
    OE_EXT_INLINE acc_t times(const acc_t* factors, int64_t stride) const {
      if constexpr (kPixels == 1) {
        return half[0] * factors[0];
      } else {
        acc_t sum = half[0] * multiply_add(end[0], factors[0], end[1] * factors[stride]);
        if constexpr (kPixels == 4) {
          const acc_t second = end[1] * factors[3 * stride];
          sum = multiply_add(half[1], multiply_add(end[0], factors[2 * stride], second), sum);
        }
        return sum;
      }
    }
  };
};

// One row of pixels in a strip. Passed by value: what is read through a reference might be changed
// by the stores of a loop, which then is not made of vectors. Functions that are called for every
// class are inlined, since such a value goes by way of memory, which takes longer than some loops.
template <typename acc_t>
struct Line {
  int64_t lanes;
  int64_t padded;      // lanes, with padding
  int64_t cells;       // lanes of a phase
  int64_t second_end;  // from a lane's first end to its second one: that of the next phase, or cell
  acc_t top_weight;
  acc_t bottom_weight;
};

// The logit of an end in the row of pixels, from those above and below.
template <typename acc_t>
struct BetweenRows {
  explicit BetweenRows(Line<acc_t> line)
      : only_top(line.bottom_weight == acc_t(0)),
        top(only_top ? acc_t(0.5) : line.top_weight),
        bottom(only_top ? acc_t(0.5) : line.bottom_weight) {}

  // A row without weight may be infinite or NaN: the other one then takes its place.
  const acc_t* below(const acc_t* above, const acc_t* below) const {
    return only_top ? above : below;
  }
  OE_EXT_INLINE acc_t operator()(acc_t above, acc_t below) const {
    return multiply_add(bottom, below, top * above);
  }

  bool only_top;
  acc_t top;
  acc_t bottom;
};

// Completes the second ends of segments, which are the first ends of the next phase; those of the
// last phase are the first ends of the next cells, and follow. With a single phase, only the second
// end of the last cell is missing.
template <typename acc_t>
OE_EXT_INLINE void append_second_ends(Line<acc_t> line, acc_t last, acc_t* ends) {
  acc_t* second = ends + line.lanes;
  if (line.second_end == 1) {
    *second = last;
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < line.cells - 1; ++i) {
    second[i] = ends[i + 1];
  }
  second[line.cells - 1] = last;
}

// Sets the ends of segments in this row of pixels: of one class, or another row of StripMemory.
// With kExps, also their exponentials.
template <typename Segment, bool kExps, typename acc_t>
OE_EXT_INLINE void set_ends(Line<acc_t> line, int64_t row, const StripMemory<acc_t>& memory) {
  constexpr acc_t kPart = acc_t(1) / Segment::kPower;
  const BetweenRows<acc_t> between(line);
  const acc_t* top = memory.top + row * memory.lanes;
  const acc_t* bottom = between.below(top, memory.bottom + row * memory.lanes);
  acc_t* x = memory.end_x(row);
  acc_t* exps = kExps ? memory.end_exps(row) : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < line.padded; ++i) {
    x[i] = between(top[i], bottom[i]);
    if constexpr (kExps) {
      exps[i] = exp_of(x[i] * kPart);
    }
  }
  if constexpr (Segment::kEnds == 2) {
    append_second_ends(line, memory.last[row], x);
    if constexpr (kExps) {
      append_second_ends(line, memory.last_exps[row], exps);
    }
  }
}

// Sets the second ends of the last cell, if segments have any, and their exponentials.
template <typename Segment, typename acc_t>
void set_last_ends(Line<acc_t> line, int64_t num_classes, const StripMemory<acc_t>& memory) {
  if constexpr (Segment::kEnds == 1) {
    return;
  }
  constexpr acc_t kPart = acc_t(1) / Segment::kPower;
  const BetweenRows<acc_t> between(line);
  const acc_t* top = memory.top_last;
  const acc_t* bottom = between.below(top, memory.bottom_last);
  acc_t* last = memory.last;
  acc_t* last_exps = memory.last_exps;
#pragma omp simd
  for (int64_t row = 0; row < num_classes + 2; ++row) {
    last[row] = between(top[row], bottom[row]);
    last_exps[row] = exp_of(last[row] * kPart);
  }
}

// Interpolates one value a pixel between the ends of its segment.
template <typename Segment, typename acc_t>
void interpolate_pixels(Line<acc_t> line, const acc_t* ends, acc_t* pixels) {
  const acc_t* second = ends + line.second_end;
  for (int k = 0; k < Segment::kPixels; ++k) {
    acc_t* to = pixels + k * line.padded;
#pragma omp simd
    for (int64_t i = 0; i < line.padded; ++i) {
      to[i] = Segment::interpolate(k, ends[i], second[i]);
    }
  }
}

// Adds the gradient with respect to one end of a segment to those of the elements above and below.
template <typename acc_t>
OE_EXT_INLINE void add_to_rows(Line<acc_t> line, acc_t gradient, acc_t* top, acc_t* bottom) {
  *top = multiply_add(line.top_weight, gradient, *top);
  *bottom = multiply_add(line.bottom_weight, gradient, *bottom);
}

// ---- Labels and factors

// With so few classes, to compare each class with every label takes less time than to look up
// memory by labels.
constexpr int64_t kFewClasses = 8;

// Sets at_label to the (shifted) logit of each pixel at its label.
template <typename Segment, typename acc_t>
void find_logits_at_labels(Line<acc_t> line, int64_t num_classes, const StripMemory<acc_t>& memory,
                           TileRows<acc_t>& rows) {
  if (num_classes <= kFewClasses) {
    std::fill_n(rows.at_label, rows.size, acc_t(0));
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      const acc_t* x = memory.end_x(cls);
      const acc_t* second = x + line.second_end;
      const auto label = static_cast<IntOf<acc_t>>(cls);
      for (int k = 0; k < Segment::kPixels; ++k) {
        const int64_t first = k * line.padded;
#pragma omp simd
        for (int64_t i = 0; i < line.padded; ++i) {
          rows.at_label[first + i] =
              select(rows.label[first + i] == label, Segment::interpolate(k, x[i], second[i]),
                     rows.at_label[first + i]);
        }
      }
    }
    return;
  }
  const acc_t* x = memory.x;
  const acc_t* second = x + line.second_end;
  const auto stride = static_cast<IntOf<acc_t>>(memory.ends);
  for (int k = 0; k < Segment::kPixels; ++k) {
    const IntOf<acc_t>* label = rows.label + k * line.padded;
    acc_t* at_label = rows.at_label + k * line.padded;
    const auto lanes = static_cast<IntOf<acc_t>>(line.padded);
#pragma omp simd
    for (IntOf<acc_t> i = 0; i < lanes; ++i) {
      const IntOf<acc_t> place = (label[i] > 0 ? label[i] : 0) * stride + i;
      at_label[i] = Segment::interpolate(k, x[place], second[place]);
    }
  }
}

// Weighs one value a pixel by the ends of its segment.
template <typename Segment, typename acc_t>
void set_factors(Line<acc_t> line, const acc_t* pixels, acc_t* factors) {
  for (int end = 0; end < Segment::kEnds; ++end) {
    for (int k = 0; k < Segment::kPixels; ++k) {
      const acc_t weight = Segment::template weight<acc_t>(end, k);
      const acc_t* values = pixels + k * line.padded;
      acc_t* to = factors + (end * Segment::kPixels + k) * line.padded;
#pragma omp simd
      for (int64_t i = 0; i < line.padded; ++i) {
        to[i] = weight * values[i];
      }
    }
  }
}

// Sets what the gradient subtracts at labels. Each row of pixels subtracts it from its exponentials
// before both are added to the gradient: where a label is certain, they cancel.
template <typename Segment, typename acc_t>
void set_label_parts(Line<acc_t> line, int64_t num_classes, TileRows<acc_t>& rows,
                     const StripMemory<acc_t>& memory) {
  constexpr int kPixels = Segment::kPixels;
  constexpr int kEnds = Segment::kEnds;
  const int64_t padded = line.padded;
  const int64_t stride = memory.lanes;
  const auto class_stride = static_cast<IntOf<acc_t>>(2 * stride);
  alignas(64) acc_t parts[kEnds][kRowCapacity];
  for (int k = 0; k < kPixels; ++k) {
    const int64_t first = k * padded;
#pragma omp simd
    for (int64_t i = first; i < first + padded; ++i) {
      const bool inlier = rows.label[i] >= 0;
      const acc_t part = select(inlier, rows.at_label[i] * rows.factor[i], acc_t(0));
      for (int end = 0; end < kEnds; ++end) {
        parts[end][i] = Segment::template weight<acc_t>(end, k) * part;
      }
      rows.place[i] = inlier ? rows.label[i] * class_stride : 0;
    }
  }
  if (num_classes <= kFewClasses) {
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      const auto label = static_cast<IntOf<acc_t>>(cls);
      for (int end = 0; end < kEnds; ++end) {
        acc_t* to = memory.at_labels + memory.of_end(cls, end);
        const acc_t* of_end = parts[end];
#pragma omp simd
        for (int64_t i = 0; i < padded; ++i) {
          acc_t sum = 0;
#pragma GCC unroll 4
          for (int k = 0; k < kPixels; ++k) {
            sum += select(rows.label[k * padded + i] == label, of_end[k * padded + i], acc_t(0));
          }
          to[i] = sum;
        }
      }
    }
    return;
  }
  for (int64_t lane = 0; lane < line.lanes; ++lane) {
    const auto* place = rows.place + lane;
    bool alike = kPixels > 1;
    for (int k = 1; k < kPixels; ++k) {
      alike &= place[0] == place[k * padded];
    }
    if (alike) {
      for (int end = 0; end < kEnds; ++end) {
        acc_t sum = parts[end][lane];
        for (int k = 1; k < kPixels; ++k) {
          sum += parts[end][k * padded + lane];
        }
        memory.at_labels[place[0] + end * stride + lane] += sum;
      }
      continue;
    }
    for (int k = 0; k < kPixels; ++k) {
      for (int end = 0; end < kEnds; ++end) {
        memory.at_labels[place[k * padded] + end * stride + lane] += parts[end][k * padded + lane];
      }
    }
  }
}

}  // namespace
}  // namespace oe_ext::cpu
