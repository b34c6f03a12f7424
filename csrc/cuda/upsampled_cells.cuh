// How the kernels of upsampled logits cut a map into work, and what a block keeps of it in shared
// memory.
//
// A column is `band_cells` cells, one below the other. All columns of all images and bands stand in
// one row: those of a band are neighbours, from cell 0 to cell `in`. A lane has a column, and the
// warps of a block have the same columns and share the classes: warp w takes classes w, w + warps,
// ... Pixels are processed in patches of up to kSize x kSize of one cell.
#pragma once

#include "../core/upsampled_args.h"
#include "units.cuh"

namespace oe_ext::cuda {

// The columns of which a warp writes the gradient: the last one only adds to the one before it, and
// is the first of the next warp.
constexpr int kOwnColumns = kWarpSize - 1;

struct UpsampledPlan {
  int64_t band_cells = 1;
  int64_t num_bands = 1;
  int64_t num_cells = 1;  // of a row
  int64_t num_columns = 1;
  bool keeps_exps = false;  // of a patch, from the sums to the gradient, in shared memory

  C10_HOST_DEVICE int64_t num_strips() const {
    return (num_columns + kOwnColumns - 1) / kOwnColumns;
  }
};

// The kernels take axes of at most so many pixels: what they compute along one fits an int.
constexpr int64_t kMaxAxisPixels = int64_t(1) << 24;

// A cell along one axis: its elements, and its pixels `begin`, ..., `begin + size - 1`. Both
// elements of a cell at an edge are the same: one of them then has all the weight.
template <typename acc_t>
struct AxisCell {
  __device__ AxisCell(const ResizeAxis& axis, int cell)
      : is_first(cell <= 0),
        is_last(cell >= axis.in),
        first(static_cast<int>(axis.first_element(is_last ? axis.in : cell))),
        second(static_cast<int>(axis.second_element(cell))),
        begin(static_cast<int>(axis.begin(cell))),
        size(static_cast<int>(axis.begin(cell + 1)) - begin),
        position(static_cast<int>(axis.first() + begin * axis.step() - cell * axis.denominator())),
        step(static_cast<int>(axis.step())),
        denominator(static_cast<acc_t>(axis.denominator())) {}

  // What the second element weighs at pixel begin + i; any weight where there is none.
  __device__ acc_t weight(int i) const {
    const acc_t inner = static_cast<acc_t>(position + i * step) / denominator;
    return is_first ? acc_t(1) : is_last || i >= size ? acc_t(0) : inner;
  }
  __device__ acc_t weight_step() const {
    return is_first || is_last ? acc_t(0) : static_cast<acc_t>(step) / denominator;
  }

  bool is_first;
  bool is_last;
  int first;
  int second;
  int begin;
  int size;
  int position;  // of pixel `begin` in the cell, times the denominator
  int step;
  acc_t denominator;
};

// What the pixels of a patch weigh the elements of their cell by.
template <typename acc_t, int kSize>
struct PatchWeights {
  __device__ PatchWeights(const AxisCell<acc_t>& vertical, int first_row,
                          const AxisCell<acc_t>& horizontal, int first_column)
      : row_step(vertical.weight_step()),
        last_row(vertical.weight(first_row) + static_cast<acc_t>(kSize - 1) * row_step) {
    for (int i = 0; i < kSize; ++i) {
      below[i] = vertical.weight(first_row + i);
      right[i] = horizontal.weight(first_column + i);
    }
  }

  acc_t below[kSize];  // of a row of pixels
  acc_t right[kSize];  // of a column
  // The weights of rows that there are go up in equal steps; as if there were a last row.
  acc_t row_step;
  acc_t last_row;
};

// The shared memory of a block.
//
// Values of a patch's pixels are stages whose slots are its rows. Those of warps belong to a warp
// each, until they are merged; the others are written by the warp that finishes a row, for all.
template <typename acc_t, int kSize>
class PatchMemory {
 public:
  using Values = Stage<acc_t, kSize>;
  using Classes = Stage<int, kSize>;

  __device__ PatchMemory(unsigned char* shared, int num_classes, bool keeps_exps)
      : warp(static_cast<int>(threadIdx.x) / kWarpSize),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        num_warps(static_cast<int>(blockDim.x) / kWarpSize),
        max(shared + num_warps * kPatchBytes, kSize, 0),
        factor(shared + (num_warps + 1) * kPatchBytes, kSize, 0),
        offset(shared + (num_warps + 2) * kPatchBytes, kSize, 0),
        label_part(shared + (num_warps + 3) * kPatchBytes, kSize, 0),
        label(shared + (num_warps + 4) * kPatchBytes, kSize, 0),
        keeps_exps(keeps_exps),
        exps(shared + bytes(num_warps, num_classes, /*keeps_exps=*/false), kSize, 0),
        shared_(shared),
        gradient_(reinterpret_cast<acc_t*>(shared + (num_warps + 5) * kPatchBytes) + lane),
        side_size_(num_classes * kWarpSize) {}

  C10_HOST_DEVICE static int64_t bytes(int64_t num_warps, int64_t num_classes, bool keeps_exps) {
    const int64_t of_class = 2 * kRowBytes + (keeps_exps ? kPatchBytes : 0);
    return (num_warps + 5) * kPatchBytes + num_classes * of_class;
  }

  // What the columns' element of a class gets: of the row of elements above (0, 1: as they change
  // places) or below. Only the warp of the class touches it.
  __device__ acc_t& gradient(int side, int cls) const {
    return gradient_[side * side_size_ + cls * kWarpSize];
  }

  // Does this warp finish a row of pixels?
  __device__ bool has_row(int r) const { return r % num_warps == warp; }

  // Merges the values of all warps, in their order, and returns the results to all of them. All
  // threads of the block must call it.
  template <int kCount, typename Merge>
  __device__ void merge_warps(acc_t (&values)[kCount], const Merge& merge) const {
    static_assert(kCount % kSize == 0 && kCount <= kSize * kSize, "whole rows of a patch");
    if (num_warps == 1) {
      return;
    }
    for (int r = 0; r < kCount / kSize; ++r) {
      Vector<acc_t, kSize> unit;
      for (int k = 0; k < kSize; ++k) {
        unit.values[k] = values[r * kSize + k];
      }
      of_warp(warp).put(r, unit);
    }
    __syncthreads();
    for (int r = 0; r < kCount / kSize; ++r) {
      Vector<acc_t, kSize> merged = of_warp(0).get(r);
      for (int i = 1; i < num_warps; ++i) {
        const Vector<acc_t, kSize> other = of_warp(i).get(r);
        for (int k = 0; k < kSize; ++k) {
          merged.values[k] = merge(merged.values[k], other.values[k]);
        }
      }
      for (int k = 0; k < kSize; ++k) {
        values[r * kSize + k] = merged.values[k];
      }
    }
    __syncthreads();
  }

  int warp;
  int lane;
  int num_warps;
  Values max;  // of the shifted logits, in the careful way
  Values factor;
  Values offset;
  Values label_part;  // what the gradient has less of at the label
  Classes label;      // the class, or -1
  // Of all classes, if the plan keeps them: slots of a class are kSize * cls + row. The warp of the
  // class has them in the loops, and the warps that finish rows between these.
  bool keeps_exps;
  Values exps;

 private:
  static constexpr int64_t kRowBytes = kWarpSize * sizeof(acc_t);
  static constexpr int64_t kPatchBytes = kSize * kSize * kRowBytes;

  __device__ Values of_warp(int index) const { return Values(shared_, kSize, index); }

  unsigned char* shared_;
  acc_t* gradient_;
  int side_size_;
};

// The elements of a cell: above left, above right, below left, below right.
constexpr int kCorners = 4;

template <typename scalar_t, typename acc_t>
struct CellCorners {
  __device__ CellCorners(const ImageView<const scalar_t>& logits, int64_t image,
                         const AxisCell<acc_t>& vertical, const AxisCell<acc_t>& horizontal)
      : class_stride(logits.class_stride) {
    const int64_t left = horizontal.first * logits.column_stride;
    const int64_t right = horizontal.second * logits.column_stride;
    at[0] = logits.at(image, vertical.first) + left;
    at[1] = logits.at(image, vertical.first) + right;
    at[2] = logits.at(image, vertical.second) + left;
    at[3] = logits.at(image, vertical.second) + right;
  }

  // The largest logit of two of them, at[first] and at[first + 1]. All threads of the block must
  // call it.
  template <int kSize>
  __device__ acc_t max_of(int first, const PatchMemory<acc_t, kSize>& memory,
                          int num_classes) const {
    acc_t largest[kSize];
    for (acc_t& max : largest) {
      max = std::numeric_limits<acc_t>::lowest();
    }
    const scalar_t* left = at[first] + memory.warp * class_stride;
    const scalar_t* right = at[first + 1] + memory.warp * class_stride;
    for (int cls = memory.warp; cls < num_classes; cls += memory.num_warps) {
      largest[0] = std::fmax(largest[0], static_cast<acc_t>(*left));
      largest[1] = std::fmax(largest[1], static_cast<acc_t>(*right));
      left += memory.num_warps * class_stride;
      right += memory.num_warps * class_stride;
    }
    largest[0] = std::fmax(largest[0], largest[1]);
    memory.merge_warps(largest, [](acc_t a, acc_t b) { return std::fmax(a, b); });
    return largest[0];
  }

  const scalar_t* at[kCorners];  // of class 0
  int64_t class_stride;
  acc_t max = 0;
};

}  // namespace oe_ext::cuda
