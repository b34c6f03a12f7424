// Tiles in scratch memory: [class][row], rows.padded elements a class. There and back.
#pragma once

#include "tile_rows.h"

namespace oe_ext::cpu {
namespace {

// Contiguous rows to [class][row].
template <typename scalar_t, typename acc_t>
void gather_rows(TileView<const scalar_t> logits, int64_t num_classes, const TileRows<acc_t>& rows,
                 acc_t* scratch) {
  using V = Vec<acc_t>;
  const int64_t end_of_tile = (rows.size - 1) * logits.row_stride + num_classes;
  for (int64_t row = 0; row < rows.padded; row += V::kSize) {
    for (int64_t begin = 0; begin < num_classes; begin += V::kSize) {
      // The last square of a row overlaps the one before.
      const int64_t cls = std::max<int64_t>(0, std::min(begin, num_classes - V::kSize));
      V square[V::kSize];
      for (int64_t j = 0; j < V::kSize; ++j) {
        const int64_t offset = std::min(row + j, rows.size - 1) * logits.row_stride + cls;
        square[j] = offset + V::kSize <= end_of_tile
                        ? Packed<scalar_t, acc_t>::load(logits.data + offset)
                        : load_part<acc_t>(logits.data + offset, num_classes - cls);
      }
      transpose(square);
      const int64_t width = std::min<int64_t>(V::kSize, num_classes - cls);
      acc_t* column = scratch + cls * rows.padded + row;
      for (int64_t k = 0; k < width; ++k) {
        square[k].store(column + k * rows.padded);
      }
    }
  }
}

// The way back.
template <typename scalar_t, typename acc_t>
void scatter_rows(TileView<scalar_t> grad, int64_t num_classes, const TileRows<acc_t>& rows,
                  const acc_t* scratch) {
  using V = Vec<acc_t>;
  // A row that is narrower than a vector is written over into the next, which comes later.
  const bool dense = grad.row_stride == num_classes;
  const int64_t end_of_tile = rows.size * grad.row_stride;
  for (int64_t row = 0; row < rows.padded; row += V::kSize) {
    for (int64_t begin = 0; begin < num_classes; begin += V::kSize) {
      const int64_t cls = std::max<int64_t>(0, std::min(begin, num_classes - V::kSize));
      const int64_t width = std::min<int64_t>(V::kSize, num_classes - cls);
      const acc_t* column = scratch + cls * rows.padded + row;
      V square[V::kSize];
      for (int64_t k = 0; k < V::kSize; ++k) {
        square[k] = V::load(column + std::min(k, width - 1) * rows.padded);
      }
      transpose(square);
      for (int64_t j = 0; j < V::kSize && row + j < rows.size; ++j) {
        const int64_t offset = (row + j) * grad.row_stride + cls;
        if (width == V::kSize || (dense && offset + V::kSize <= end_of_tile)) {
          Packed<scalar_t, acc_t>::store(grad.data + offset, square[j]);
        } else {
          store_part(grad.data + offset, square[j], width);
        }
      }
    }
  }
}

template <typename scalar_t, typename acc_t>
void gather(TileView<const scalar_t> logits, int64_t num_classes, const TileRows<acc_t>& rows,
            acc_t* scratch) {
  using V = Vec<acc_t>;
  if (logits.class_stride == 1 && logits.row_stride != 1) {
    gather_rows(logits, num_classes, rows, scratch);
    return;
  }
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    const scalar_t* plane = logits.data + cls * logits.class_stride;
    acc_t* column = scratch + cls * rows.padded;
    int64_t i = 0;
    if (logits.row_stride == 1) {
      for (; i + V::kSize <= rows.size; i += V::kSize) {
        Packed<scalar_t, acc_t>::load(plane + i).store(column + i);
      }
    }
    for (; i < rows.size; ++i) {
      column[i] = static_cast<acc_t>(plane[i * logits.row_stride]);
    }
    for (; i < rows.padded; ++i) {
      column[i] = 0;
    }
  }
}

// The rows from first_row on.
template <typename scalar_t, typename acc_t>
void scatter_by_element(TileView<scalar_t> grad, int64_t first_row, int64_t num_classes,
                        const TileRows<acc_t>& rows, const acc_t* scratch) {
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    for (int64_t i = first_row; i < rows.size; ++i) {
      grad.data[cls * grad.class_stride + i * grad.row_stride] =
          static_cast<scalar_t>(scratch[cls * rows.padded + i]);
    }
  }
}

}  // namespace
}  // namespace oe_ext::cpu
