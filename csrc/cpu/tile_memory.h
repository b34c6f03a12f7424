// Moves tiles between a tensor and scratch memory, which holds logits as [class][row].
#pragma once

#include "labels.h"
#include "transpose.h"

namespace oe_ext::cpu {
namespace {

// The logits or the gradients of a tile, in a tensor.
template <typename T>
struct TileView {
  TileView(T* data, int64_t row_stride, int64_t class_stride)
      : data(data), row_stride(row_stride), class_stride(class_stride) {}
  TileView(T* tensor, const RowLayout& layout, int64_t first_row)
      : data(tensor + layout.row_offset(first_row)),
        row_stride(layout.inner_stride),
        class_stride(layout.class_stride) {}

  TileView from_class(int64_t cls) const {
    TileView view = *this;
    view.data += cls * class_stride;
    return view;
  }

  T* data;
  int64_t row_stride;
  int64_t class_stride;
};

// A tile as [class][row], `stride` elements per class. In scratch memory, a spare class follows the
// last.
template <typename T>
struct Tile {
  T* of_class(int64_t cls) const { return data + cls * stride; }
  Tile<const T> as_source() const { return {data, stride, num_classes}; }

  T* data;
  int64_t stride;
  int64_t num_classes;
};

// Classes that are transposed at once, in squares, between [row][class] and [class][row].
constexpr int64_t kMovedClasses = 64;

template <typename scalar_t, typename acc_t>
void load_rows(const TileView<const scalar_t>& logits, int64_t num_rows, const Tile<acc_t>& tile) {
  constexpr int64_t kSize = Square<acc_t>::kSize;
  alignas(64) acc_t buffer[kSize * kMovedClasses + kSize] = {};
  for (int64_t begin = 0; begin < tile.num_classes; begin += kMovedClasses) {
    const int64_t width = std::min(kMovedClasses, tile.num_classes - begin);
    for (int64_t row = 0; row < num_rows; row += kSize) {
      const int64_t count = std::min(kSize, num_rows - row);
      const scalar_t* from = logits.data + row * logits.row_stride + begin;
      const acc_t* source = buffer;
      int64_t stride = width;
      if (std::is_same_v<scalar_t, acc_t> && row + 2 * kSize <= num_rows &&
          logits.row_stride >= width) {
        source = reinterpret_cast<const acc_t*>(from);
        stride = logits.row_stride;
      } else if (width == logits.row_stride) {
        widen(from, count * width, buffer);
      } else {
        for (int64_t j = 0; j < count; ++j) {
          widen(from + j * logits.row_stride, width, buffer + j * width);
        }
      }
      // The last square reads into the next row and writes past the last class.
      for (int64_t cls = 0; cls < width; cls += kSize) {
        transpose(source + cls, stride, tile.of_class(begin + cls) + row, tile.stride);
      }
    }
  }
}

template <typename scalar_t, typename acc_t>
void store_rows(const Tile<acc_t>& tile, int64_t num_rows, const TileView<scalar_t>& grad) {
  constexpr int64_t kSize = Square<acc_t>::kSize;
  alignas(64) acc_t buffer[kSize * kMovedClasses + kSize];
  for (int64_t begin = 0; begin < tile.num_classes; begin += kMovedClasses) {
    const int64_t width = std::min(kMovedClasses, tile.num_classes - begin);
    const bool dense = width == grad.row_stride;
    for (int64_t row = 0; row < num_rows; row += kSize) {
      scalar_t* to = grad.data + row * grad.row_stride + begin;
      const bool in_place = std::is_same_v<scalar_t, acc_t> && row + 2 * kSize <= num_rows && dense;
      acc_t* rows = in_place ? reinterpret_cast<acc_t*>(to) : buffer;
      // The last square comes first, because later ones overwrite what it writes into the next row.
      for (int64_t cls = (width - 1) / kSize * kSize; cls >= 0; cls -= kSize) {
        transpose(tile.of_class(begin + cls) + row, tile.stride, rows + cls, width);
      }
      const int64_t count = std::min(kSize, num_rows - row);
      if (in_place) {
        continue;
      }
      if (dense) {
        narrow(buffer, count * width, to);
      } else {
        for (int64_t j = 0; j < count; ++j) {
          narrow(buffer + j * width, width, to + j * grad.row_stride);
        }
      }
    }
  }
}

// Loads rows of logits of any strides, as acc_t.
template <typename scalar_t, typename acc_t>
void load_any_rows(const TileView<const scalar_t>& logits, int64_t num_rows,
                   const Tile<acc_t>& tile) {
  if (logits.class_stride == 1 && logits.row_stride != 1) {
    load_rows(logits, num_rows, tile);
    return;
  }
  for (int64_t cls = 0; cls < tile.num_classes; ++cls) {
    const scalar_t* from = logits.data + cls * logits.class_stride;
    acc_t* to = tile.of_class(cls);
    if (logits.row_stride == 1) {
      widen(from, num_rows, to);
    } else {
      for (int64_t i = 0; i < num_rows; ++i) {
        to[i] = to_float(from[i * logits.row_stride]);
      }
    }
  }
}

// Loads the logits of a tile. Padding rows may hold any value.
template <typename scalar_t, typename acc_t>
void load_tile(const TileView<const scalar_t>& logits, const TileRows<acc_t>& rows,
               const Tile<acc_t>& tile) {
  load_any_rows(logits, rows.size, tile);
  for (int64_t cls = 0; cls < tile.num_classes && rows.size < rows.padded; ++cls) {
    std::fill(tile.of_class(cls) + rows.size, tile.of_class(cls) + rows.padded, acc_t(0));
  }
}

// Turns exponentials into gradients, in the tensor.
template <typename scalar_t, typename acc_t>
void store_gradients(const Tile<acc_t>& tile, const TileRows<acc_t>& rows,
                     const TileView<scalar_t>& grad) {
  for (int64_t cls = 0; cls < tile.num_classes; ++cls) {
    acc_t* exps = tile.of_class(cls);
    scalar_t* to = grad.data + cls * grad.class_stride;
    acc_t* gradients = exps;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      gradients = grad.row_stride == 1 ? to : exps;
    }
    // Padding rows must not reach the tensor.
    const int64_t size = gradients == exps ? rows.padded : rows.size;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      gradients[i] = multiply_add(exps[i], rows.factor[i], -rows.offset[i]);
    }
    if (grad.row_stride == 1) {
      if constexpr (!std::is_same_v<scalar_t, acc_t>) {
        narrow(gradients, rows.size, to);
      }
    } else if (grad.class_stride != 1) {
      for (int64_t i = 0; i < rows.size; ++i) {
        store_as(gradients[i], to[i * grad.row_stride]);
      }
    }
  }
  if (grad.row_stride != 1 && grad.class_stride == 1) {
    store_rows(tile, rows.size, grad);
  }
}

}  // namespace
}  // namespace oe_ext::cpu
