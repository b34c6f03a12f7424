// Loops over the patches of a strip, for one row of them: each step of the loss and of its
// gradient. A patch is kPixels x kPixels neighbouring pixels of a cell; each of its rows lies
// between two ends, which are logits between those of the source. The logits of pixels are nowhere
// in memory. The pixels are rows of TileRows: pixel = index in its patch * kLanes + lane.
//
// All logits are shifted: at each element of the source by its largest logit, and so between the
// elements by what is interpolated between these maxima. Interpolated shifted logits are at most 0,
// and the shift cancels in the loss and in its gradient.
#pragma once

#include "finish_rows.h"
#include "tile_rows.h"
#include "upsampling.h"

namespace oe_ext::cpu {
namespace {

// Where the pixels of a patch lie along an axis: at k / kPixels, or centered at (k + 0.5) /
// kPixels.
template <int kCount, bool kCentered>
struct Patch {
  static constexpr int kPixels = kCount;  // of a side
  static constexpr int kEnds = ends_of(kPixels);
  static constexpr int64_t kLanes = lanes_of(kPixels);
  static constexpr int kArea = kPixels * kPixels;
  static constexpr int kCorners = 2 * kEnds;  // above left, above right, and below
  // May the first row of pixels be that of the elements above?
  static constexpr bool kMayTouch = !kCentered;
  // The exponential of pixel k of a row is p^(kPower - e) q^e, with e = kPower * right_weight(k),
  // and p and q the exponentials of the logits at the ends, divided by kPower.
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
               : multiply_add(weight<acc_t>(1, k), right, weight<acc_t>(0, k) * left);
  }

  // The exponentials of a row of pixels, as products: pixel k's is half[k / 2] * end[k % 2].
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

// A row of patches, between two rows of elements. Passed by value: what is read through
// a reference might be changed by the stores of a loop, which then is not made of vectors.
template <typename Patch, typename acc_t>
struct PatchRow {
  static constexpr int kPixels = Patch::kPixels;

  // Its rows of pixels in the map: those from `begin` to before `end` of kPixels, and the first
  // one if all were there.
  int64_t first;
  int begin;
  int end;
  acc_t top_weight[kPixels];
  acc_t bottom_weight[kPixels];

  PatchRow(const PatchAxis<acc_t>& axis, const ResizeAxis& resize, int64_t patch)
      : first(axis.pixel(patch)) {
    begin = static_cast<int>(std::max<int64_t>(0, -first));
    end = static_cast<int>(std::min<int64_t>(kPixels, axis.out - first));
    for (int j = 0; j < kPixels; ++j) {
      const bool is_there = j >= begin && j < end;
      bottom_weight[j] = is_there ? resize.place(first + j).template fraction<acc_t>() : acc_t(0.5);
      top_weight[j] = acc_t(1) - bottom_weight[j];
    }
  }

  // `part` of the logit of an end in row j, from those in the rows of elements. A row that has no
  // weight may be infinite or NaN.
  OE_EXT_INLINE acc_t between(int j, acc_t top, acc_t bottom, acc_t part = 1) const {
    const acc_t x = multiply_add(bottom_weight[j] * part, bottom, top_weight[j] * part * top);
    return Patch::kMayTouch && j == 0 ? select(bottom_weight[j] == acc_t(0), part * top, x) : x;
  }
};

// The patches of a strip, between two rows of elements: the ends of its first patch in the class 0,
// and the row of patches.
template <typename Patch, typename acc_t>
struct StripRow {
  PatchRow<Patch, acc_t> row;
  int64_t num_patches;
  int64_t stride;  // from a class to the next
  const acc_t* top;
  const acc_t* bottom;
  acc_t* top_gradient;
  acc_t* bottom_gradient;

  StripRow(const PatchRow<Patch, acc_t>& row, const Strip& strip, const BandMemory<acc_t>& memory)
      : row(row),
        num_patches(strip.num_patches),
        stride(memory.end_stride),
        top(memory.top + strip.first_patch),
        bottom(memory.bottom + strip.first_patch),
        top_gradient(memory.top_gradient + strip.first_patch),
        bottom_gradient(memory.bottom_gradient + strip.first_patch) {}
};

// Sets the ends of patches in their rows of pixels: of one class, or another row of BandMemory.
// With kExps, the exponentials of kPart times each. Functions that are called for every class are
// inlined.
template <bool kExps, typename Patch, typename acc_t>
OE_EXT_INLINE void set_ends(const StripRow<Patch, acc_t>& strip, int64_t index, acc_t* ends) {
  constexpr acc_t kPart = acc_t(1) / Patch::kPower;
  const PatchRow<Patch, acc_t> row = strip.row;
  const acc_t* top = strip.top + index * strip.stride;
  const acc_t* bottom = strip.bottom + index * strip.stride;
  ends += index * Patch::kPixels * Patch::kLanes;
#pragma omp simd
  for (int64_t i = 0; i < Patch::kLanes; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < Patch::kPixels; ++j) {
      ends[j * Patch::kLanes + i] = kExps ? exp_of(row.between(j, top[i], bottom[i], kPart))
                                          : row.between(j, top[i], bottom[i]);
    }
  }
}

// Calls use(pixel, value) for the pixels of a patch, with what is interpolated between its corners:
// `pixel` is the index in its patch, times kLanes.
template <typename Patch, typename acc_t, typename Use>
OE_EXT_INLINE void interpolate(const PatchRow<Patch, acc_t>& row, acc_t top_left, acc_t bottom_left,
                               acc_t top_right, acc_t bottom_right, const Use& use) {
#pragma GCC unroll 4
  for (int j = 0; j < Patch::kPixels; ++j) {
    const acc_t left = row.between(j, top_left, bottom_left);
    const acc_t right = row.between(j, top_right, bottom_right);
#pragma GCC unroll 4
    for (int k = 0; k < Patch::kPixels; ++k) {
      use((j * Patch::kPixels + k) * Patch::kLanes, Patch::interpolate(k, left, right));
    }
  }
}

// Interpolates one value a pixel, from a row of BandMemory.
template <typename Patch, typename acc_t>
void interpolate_pixels(const StripRow<Patch, acc_t>& strip, int64_t index, acc_t* pixels) {
  const PatchRow<Patch, acc_t> row = strip.row;
  const acc_t* top = strip.top + index * strip.stride;
  const acc_t* bottom = strip.bottom + index * strip.stride;
#pragma omp simd
  for (int64_t i = 0; i < Patch::kLanes; ++i) {
    interpolate(row, top[i], bottom[i], top[i + 1], bottom[i + 1],
                [=](int64_t pixel, acc_t value) { pixels[pixel + i] = value; });
  }
}

// ---- Labels

// With so few classes, to compare each class with every label takes less time than to look up
// memory by labels.
constexpr int64_t kFewClasses = 8;
constexpr int kDiffer = kIgnored - 1;

// The label that all pixels of a patch have, or kDiffer, as for a patch of a single pixel, too.
template <typename Patch, typename acc_t>
struct CommonLabels {
  explicit CommonLabels(const TileRows<acc_t>& rows) {
    if constexpr (Patch::kArea == 1) {
      std::fill_n(of_lane, Patch::kLanes, kDiffer);
      return;
    }
    std::copy_n(rows.label, Patch::kLanes, of_lane);
    for (int k = 1; k < Patch::kArea; ++k) {
      const IntOf<acc_t>* label = rows.label + k * Patch::kLanes;
#pragma omp simd
      for (int64_t i = 0; i < Patch::kLanes; ++i) {
        of_lane[i] = label[i] == of_lane[i] ? label[i] : kDiffer;
      }
    }
  }

  alignas(64) IntOf<acc_t> of_lane[Patch::kLanes];
};

// Sets at_label to the (shifted) logit of each pixel at its label.
template <typename Patch, typename acc_t>
void find_logits_at_labels(const StripRow<Patch, acc_t>& strip, int64_t num_classes,
                           const CommonLabels<Patch, acc_t>& common, TileRows<acc_t>& rows) {
  constexpr int64_t kLanes = Patch::kLanes;
  const PatchRow<Patch, acc_t> row = strip.row;
  if (num_classes <= kFewClasses) {
    std::fill_n(rows.at_label, rows.size, acc_t(0));
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      const acc_t* top = strip.top + cls * strip.stride;
      const acc_t* bottom = strip.bottom + cls * strip.stride;
#pragma omp simd
      for (int64_t i = 0; i < kLanes; ++i) {
        interpolate(
            row, top[i], bottom[i], top[i + 1], bottom[i + 1], [&](int64_t pixel, acc_t value) {
              acc_t& at_label = rows.at_label[pixel + i];
              at_label =
                  select(rows.label[pixel + i] == static_cast<IntOf<acc_t>>(cls), value, at_label);
            });
      }
    }
    return;
  }
  if constexpr (Patch::kArea > 1) {
    // The corners of each patch in the class of its labels, or in any where they differ.
    alignas(64) acc_t corners[Patch::kCorners][kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t place = std::max<int64_t>(0, common.of_lane[i]) * strip.stride + i;
      corners[0][i] = strip.top[place];
      corners[1][i] = strip.bottom[place];
      corners[2][i] = strip.top[place + 1];
      corners[3][i] = strip.bottom[place + 1];
    }
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
      interpolate(row, corners[0][i], corners[1][i], corners[2][i], corners[3][i],
                  [&](int64_t pixel, acc_t value) { rows.at_label[pixel + i] = value; });
    }
  }
  for (int64_t lane = 0; lane < strip.num_patches; ++lane) {
    if (Patch::kArea > 1 && common.of_lane[lane] != kDiffer) {
      continue;
    }
#pragma GCC unroll 16
    for (int k = 0; k < Patch::kArea; ++k) {
      const int64_t pixel = k * kLanes + lane;
      const int64_t place = std::max<int64_t>(0, rows.label[pixel]) * strip.stride + lane;
      const int j = k / Patch::kPixels;
      rows.at_label[pixel] = Patch::interpolate(
          k % Patch::kPixels, row.between(j, strip.top[place], strip.bottom[place]),
          row.between(j, strip.top[place + 1], strip.bottom[place + 1]));
    }
  }
}

// Calls use(label, lane, -1) for a patch whose pixels have one label, and else use(label, lane,
// pixel) for each of its pixels. Without a branch: a pixel that is no inlier has the label 0.
template <typename Patch, typename acc_t, typename Use>
OE_EXT_INLINE void for_each_label(const StripRow<Patch, acc_t>& strip,
                                  const CommonLabels<Patch, acc_t>& common,
                                  const TileRows<acc_t>& rows, const Use& use) {
  for (int64_t lane = 0; lane < strip.num_patches; ++lane) {
    if (Patch::kArea > 1 && common.of_lane[lane] >= 0) {
      use(int64_t(common.of_lane[lane]), lane, -1);
    } else if (Patch::kArea == 1 || common.of_lane[lane] == kDiffer) {
#pragma GCC unroll 16
      for (int k = 0; k < Patch::kArea; ++k) {
        use(std::max<int64_t>(0, rows.label[k * Patch::kLanes + lane]), lane, k);
      }
    }
  }
}

// Sums part(pixel + lane) over the pixels of each lane's patch, weighed by each corner:
// [lane][corner].
template <typename Patch, typename acc_t, typename Part>
OE_EXT_INLINE void sum_at_corners(const PatchRow<Patch, acc_t>& row, const Part& part,
                                  acc_t* sums) {
  constexpr int kEnds = Patch::kEnds;
  alignas(64) acc_t corners[Patch::kCorners][Patch::kLanes];
#pragma GCC unroll 4
  for (int j = 0; j < Patch::kPixels; ++j) {
    const acc_t top_weight = row.top_weight[j];
    const acc_t bottom_weight = row.bottom_weight[j];
#pragma omp simd
    for (int64_t i = 0; i < Patch::kLanes; ++i) {
      acc_t of_row[kEnds] = {};
#pragma GCC unroll 4
      for (int k = 0; k < Patch::kPixels; ++k) {
        const acc_t value = part((j * Patch::kPixels + k) * Patch::kLanes + i);
#pragma GCC unroll 2
        for (int end = 0; end < kEnds; ++end) {
          of_row[end] = multiply_add(Patch::template weight<acc_t>(end, k), value, of_row[end]);
        }
      }
#pragma GCC unroll 2
      for (int end = 0; end < kEnds; ++end) {
        acc_t& top = corners[end][i];
        acc_t& bottom = corners[kEnds + end][i];
        top = multiply_add(top_weight, of_row[end], j == 0 ? acc_t(0) : top);
        bottom = multiply_add(bottom_weight, of_row[end], j == 0 ? acc_t(0) : bottom);
      }
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < Patch::kLanes; ++i) {
#pragma GCC unroll 4
    for (int c = 0; c < Patch::kCorners; ++c) {
      sums[i * Patch::kCorners + c] = corners[c][i];
    }
  }
}

// Sets what the gradient subtracts at labels, from the corners of patches. A row of patches
// subtracts it from its exponentials before both are added to the gradient: where a label is
// certain, they cancel.
template <typename Patch, typename acc_t>
void set_label_parts(const StripRow<Patch, acc_t>& strip, int64_t num_classes,
                     const CommonLabels<Patch, acc_t>& common, const BandMemory<acc_t>& memory,
                     TileRows<acc_t>& rows) {
  constexpr int64_t kLanes = Patch::kLanes;
  constexpr int kCorners = Patch::kCorners;
  const PatchRow<Patch, acc_t> row = strip.row;
  acc_t* parts = rows.at_label;
#pragma omp simd
  for (int64_t i = 0; i < Patch::kArea * kLanes; ++i) {
    parts[i] = select(rows.label[i] >= 0, parts[i] * rows.factor[i], acc_t(0));
  }
  if (num_classes <= kFewClasses) {
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      const auto label = static_cast<IntOf<acc_t>>(cls);
      acc_t* to = memory.at_labels + cls * kLanes * kCorners;
      const IntOf<acc_t>* labels = rows.label;
      sum_at_corners(
          row,
          [=](int64_t pixel) { return select(labels[pixel] == label, parts[pixel], acc_t(0)); },
          to);
      memory.has_label[cls] = 1;
    }
    return;
  }
  alignas(64) acc_t sums[kLanes][kCorners];
  sum_at_corners(row, [=](int64_t pixel) { return parts[pixel]; }, sums[0]);
  acc_t weights[Patch::kArea][kCorners];
  for (int k = 0; k < Patch::kArea; ++k) {
    const int j = k / Patch::kPixels;
    for (int end = 0; end < Patch::kEnds; ++end) {
      const acc_t weight = Patch::template weight<acc_t>(end, k % Patch::kPixels);
      weights[k][end] = weight * row.top_weight[j];
      weights[k][Patch::kEnds + end] = weight * row.bottom_weight[j];
    }
  }
  for_each_label(strip, common, rows, [&](int64_t label, int64_t lane, int pixel) {
    memory.has_label[label] = 1;
    acc_t* to = memory.at_labels + (label * kLanes + lane) * kCorners;
    const acc_t* values = pixel < 0 ? sums[lane] : weights[pixel];
    const acc_t factor = pixel < 0 ? acc_t(1) : parts[pixel * kLanes + lane];
#pragma omp simd
    for (int c = 0; c < kCorners; ++c) {
      to[c] = multiply_add(factor, values[c], to[c]);
    }
  });
}

}  // namespace
}  // namespace oe_ext::cpu
