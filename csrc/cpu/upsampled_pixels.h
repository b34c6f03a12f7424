// What tensors hold of each pixel of an upsampled map: labels, options, outputs.
#pragma once

#include "upsampled_patches.h"

namespace oe_ext::cpu {
namespace {

// Rows of pixels in the order of lanes: their labels, options and outputs, and buffers for what a
// tensor has of each pixel.
template <typename Patch, typename Rows, typename acc_t>
class LaneRows {
 public:
  static constexpr bool kForward = requires(Rows rows) { rows.row_loss; };
  static constexpr int kPixels = Patch::kPixels;
  static constexpr int64_t kLanes = Patch::kLanes;

  LaneRows(const Rows& tensors, const PatchAxis<acc_t>& axis)
      : in_lanes(tensors),
        tensors_(tensors),
        missing_(axis.missing),
        width_(axis.out),
        row_size_((axis.end_patch + kLanes) * kPixels),
        labels_(kPixels * row_size_, kIgnored) {
    point_to_buffer(in_lanes.alpha.values, alphas_);
    if constexpr (kForward) {
      for (int i = 0; i < kNumOutputs; ++i) {
        acc_t*& output = in_lanes.*output_of(i);
        output = output != nullptr ? outputs_[i] : nullptr;
      }
    } else {
      point_to_buffer(in_lanes.grad, outputs_[0]);
    }
  }

  // Reads the labels of a row of patches, whole rows of pixels; returns their counts, or the first
  // illegal label. `first`: the index of the image's first pixel.
  TaskResult read_labels(const PatchRow<Patch, acc_t>& row, int64_t first) {
    TaskResult result;
    for (int j = 0; j < kPixels; ++j) {
      IntOf<acc_t>* to = labels_.data() + j * row_size_ + missing_;
      if (j < row.begin || j >= row.end) {
        std::fill_n(to, width_, kIgnored);
        continue;
      }
      const TaskResult of_row =
          read_classes(in_lanes.labels, first + (row.first + j) * width_, width_, to);
      if (of_row.bad_row >= 0) {
        return of_row;
      }
      result.sums.merge(of_row.sums);
    }
    return result;
  }

  // Loads what belongs to the pixels of one strip.
  void load(const Strip& strip, const PatchRow<Patch, acc_t>& row, int64_t first,
            bool wants_cross_entropy, TileRows<acc_t>& rows) {
    for (int j = 0; j < kPixels; ++j) {
      const IntOf<acc_t>* from = labels_.data() + j * row_size_ + strip.first_patch * kPixels;
      to_lanes(from, rows.label + j * kPixels * kLanes);
    }
    for (int64_t k = 0; k < Patch::kArea; ++k) {
      IntOf<acc_t>* label = rows.label + k * kLanes;
      std::fill(label + strip.num_patches, label + kLanes, kIgnored);
    }
    load_values(strip, row, first, tensors_.alpha.values, alphas_);
    if constexpr (!kForward) {
      load_values(strip, row, first, tensors_.grad, outputs_[0]);
    }
    weigh_rows(in_lanes, wants_cross_entropy, rows);
  }

  // Writes the outputs of a strip to the tensors.
  void write(const Strip& strip, const PatchRow<Patch, acc_t>& row, int64_t first) const {
    for (int i = 0; i < kNumOutputs; ++i) {
      if (acc_t* tensor = tensors_.*output_of(i); tensor != nullptr) {
        for_each_pixel(strip, row, first, [&](int64_t in_lanes, int64_t pixel) {
          tensor[pixel] = outputs_[i][in_lanes];
        });
      }
    }
  }

  // Calls use(in_lanes, pixel) with the indices of a strip's pixels, in the order of lanes and in
  // tensors.
  template <typename Use>
  void for_each_pixel(const Strip& strip, const PatchRow<Patch, acc_t>& row, int64_t first,
                      const Use& use) const {
    const int64_t begin = strip.first_patch * kPixels - missing_;
    for (int j = row.begin; j < row.end; ++j) {
      for (int64_t i = 0; i < strip.num_patches * kPixels; ++i) {
        if (const int64_t x = begin + i; x >= 0 && x < width_) {
          use((j * kPixels + i % kPixels) * kLanes + i / kPixels,
              first + (row.first + j) * width_ + x);
        }
      }
    }
  }

  Rows in_lanes;

 private:
  static constexpr int kNumOutputs = 4;  // of a forward, of each pixel

  static constexpr auto output_of(int i) {
    constexpr acc_t* Rows::* kOutputs[kNumOutputs] = {&Rows::row_loss, &Rows::row_cross_entropy,
                                                      &Rows::row_max, &Rows::row_sum_exp};
    return kOutputs[i];
  }

  static bool has_pixels(const PerRow<acc_t>& values) {
    return values.data != nullptr && values.stride != 0;
  }
  static void point_to_buffer(PerRow<acc_t>& values, acc_t* buffer) {
    if (has_pixels(values)) {
      std::fill_n(buffer, kMaxTileRows, acc_t(0));
      values.data = buffer;
    }
  }
  void load_values(const Strip& strip, const PatchRow<Patch, acc_t>& row, int64_t first,
                   const PerRow<acc_t>& values, acc_t* buffer) const {
    if (has_pixels(values)) {
      for_each_pixel(strip, row, first, [&](int64_t in_lanes, int64_t pixel) {
        buffer[in_lanes] = values.data[pixel];
      });
    }
  }
  // Moves a row of pixels from their order in the map to that of lanes.
  template <typename T>
  static void to_lanes(const T* pixels, T* lanes) {
#pragma omp simd
    for (int64_t i = 0; i < kLanes; ++i) {
#pragma GCC unroll 4
      for (int k = 0; k < kPixels; ++k) {
        lanes[k * kLanes + i] = pixels[i * kPixels + k];
      }
    }
  }

  const Rows& tensors_;
  int64_t missing_;   // pixels that the first cell of a row lacks
  int64_t width_;     // pixels of a row
  int64_t row_size_;  // and of its patches, if they were whole, and of a strip's lanes more
  std::vector<IntOf<acc_t>> labels_;  // [pixel of a column][pixel of patches]: of a row of patches
  alignas(64) acc_t alphas_[kMaxTileRows];
  // Or, of a backward, the upstream gradient.
  alignas(64) acc_t outputs_[kNumOutputs][kMaxTileRows];
};

}  // namespace
}  // namespace oe_ext::cpu
