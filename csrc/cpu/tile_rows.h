// Loops over the rows of a tile whose logits lie in scratch memory as [class][row]: each step of
// the loss and of its gradient, for one class (or two) of all rows after another.
#pragma once

#include "labels.h"
#include "transpose.h"

namespace oe_ext::cpu {
namespace {

// The logits of a tile, or its gradients, in a tensor.
template <typename T>
struct TileView {
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

// A tile in scratch memory: `stride` elements a class, and a spare class behind the last.
template <typename acc_t>
struct Tile {
  acc_t* of_class(int64_t cls) const { return data + cls * stride; }

  acc_t* data;
  int64_t stride;
  int64_t num_classes;
};

// Rows are moved between [row][class] and [class][row] in squares, so many classes at once.
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
      // The last square reads into the next row, and writes classes that are not there.
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
      // The last square comes first: what it writes into the next row is written again.
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

template <typename acc_t>
void raise_maxima(const Tile<acc_t>& tile, TileRows<acc_t>& rows) {
  for (int64_t cls = 0; cls < tile.num_classes; ++cls) {
    const acc_t* x = tile.of_class(cls);
#pragma omp simd
    for (int64_t i = 0; i < rows.padded; ++i) {
      rows.max[i] = x[i] > rows.max[i] ? x[i] : rows.max[i];
    }
  }
}

// Widens neighbouring logits and raises the maxima of their rows.
template <typename scalar_t, typename acc_t>
OE_EXT_INLINE void load_class(const scalar_t* from, int64_t size, acc_t* to, acc_t* max) {
  if constexpr (kWidensByHand<scalar_t>) {
    widen(from, size, to);
    load_class(to, size, to, max);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const acc_t x = to_float(from[i]);
      to[i] = x;
      max[i] = x > max[i] ? x : max[i];
    }
  }
}

// Loads a tile and raises the maxima of its rows.
template <typename scalar_t, typename acc_t>
void load_tile(const TileView<const scalar_t>& logits, const Tile<acc_t>& tile,
               TileRows<acc_t>& rows) {
  if (logits.class_stride == 1 && logits.row_stride != 1) {
    load_rows(logits, rows.size, tile);
    std::fill_n(tile.of_class(tile.num_classes), rows.padded, acc_t(0));
    raise_maxima(tile, rows);
    return;
  }
  std::fill_n(tile.of_class(tile.num_classes), rows.padded, acc_t(0));
  for (int64_t cls = 0; cls < tile.num_classes; ++cls) {
    const scalar_t* from = logits.data + cls * logits.class_stride;
    acc_t* to = tile.of_class(cls);
    std::fill(to + rows.size, to + rows.padded, acc_t(0));
    if (logits.row_stride == 1) {
      load_class(from, rows.size, to, rows.max);
      continue;
    }
    for (int64_t i = 0; i < rows.size; ++i) {
      to[i] = to_float(from[i * logits.row_stride]);
    }
    load_class(to, rows.size, to, rows.max);
  }
}

// From exponentials to gradients, in the tensor.
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
    // Those of rows that do not exist must not reach the tensor.
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

// Sets what rows have in the tile to 0 where `counts` is 0: it may be infinite, or NaN.
template <typename acc_t>
void clear_rows(const Tile<acc_t>& tile, int64_t num_rows, const acc_t* counts) {
  for (int64_t cls = 0; cls < tile.num_classes; ++cls) {
    acc_t* x = tile.of_class(cls);
#pragma omp simd
    for (int64_t i = 0; i < num_rows; ++i) {
      x[i] = select(counts[i] != acc_t(0), x[i], acc_t(0));
    }
  }
}

// Exponentials in place of the logits of kCount classes, whose maxima are known, and their sums.
template <int kCount, typename acc_t>
OE_EXT_INLINE void add_classes(acc_t* x, int64_t stride, TileRows<acc_t>& rows) {
#pragma omp simd
  for (int64_t i = 0; i < rows.padded; ++i) {
    acc_t shifted[kCount];
    acc_t exps[kCount];
#pragma GCC unroll 2
    for (int k = 0; k < kCount; ++k) {
      shifted[k] = x[k * stride + i] - rows.max[i];
      exps[k] = exp_of(shifted[k]);
      x[k * stride + i] = exps[k];
    }
    rows.sum_exp[i] += kCount == 2 ? exps[0] + exps[kCount - 1] : exps[0];
    rows.sum_shifted[i] += kCount == 2 ? shifted[0] + shifted[kCount - 1] : shifted[0];
  }
}

// Of many classes, so many are summed up before their sums join others in double.
constexpr int64_t kSumClasses = 64;

// Sums over all classes of a row, where those are more than kSumClasses.
struct WideSums {
  double exp[kMaxTileRows] = {};
  double shifted[kMaxTileRows] = {};
};

template <typename acc_t>
void add_exponentials(const Tile<acc_t>& tile, TileRows<acc_t>& rows, WideSums* wide) {
  for (int64_t begin = 0; begin < tile.num_classes; begin += kSumClasses) {
    const int64_t end = std::min(begin + kSumClasses, tile.num_classes);
    std::fill_n(rows.sum_exp, rows.padded, acc_t(0));
    std::fill_n(rows.sum_shifted, rows.padded, acc_t(0));
    int64_t cls = begin;
    for (; cls + 2 <= end; cls += 2) {
      add_classes<2>(tile.of_class(cls), tile.stride, rows);
    }
    if (cls < end) {
      add_classes<1>(tile.of_class(cls), tile.stride, rows);
    }
    for (int64_t i = 0; wide != nullptr && i < rows.padded; ++i) {
      wide->exp[i] += rows.sum_exp[i];
      wide->shifted[i] += rows.sum_shifted[i];
    }
  }
  for (int64_t i = 0; wide != nullptr && i < rows.padded; ++i) {
    rows.sum_exp[i] = static_cast<acc_t>(wide->exp[i]);
    rows.sum_shifted[i] = static_cast<acc_t>(wide->shifted[i]);
  }
}

// Finds the places of rows' labels in a tile whose classes start at first_class. A label that is
// none of them is found in the spare class.
template <typename acc_t>
void find_labels(const Tile<acc_t>& tile, int64_t first_class, TileRows<acc_t>& rows) {
  const auto first = static_cast<IntOf<acc_t>>(first_class);
  const auto size = static_cast<IntOf<acc_t>>(tile.num_classes);
  const auto stride = static_cast<IntOf<acc_t>>(tile.stride);
#pragma omp simd
  for (int64_t i = 0; i < rows.padded; ++i) {
    const IntOf<acc_t> cls = rows.label[i] - first;
    const bool here = (cls >= 0) & (cls < size);
    rows.place[i] = (here ? cls : size) * stride + static_cast<IntOf<acc_t>>(i);
  }
}

template <typename acc_t>
void find_logits_at_labels(const Tile<acc_t>& tile, int64_t first_class, TileRows<acc_t>& rows) {
  if (tile.num_classes == 2 && first_class == 0) {
    const acc_t* x = tile.data;
    const acc_t* y = tile.of_class(1);
#pragma omp simd
    for (int64_t i = 0; i < rows.padded; ++i) {
      rows.at_label[i] = select(rows.label[i] == 1, y[i], x[i]);
    }
    return;
  }
  find_labels(tile, first_class, rows);
  for (int64_t i = 0; i < rows.size; ++i) {
    rows.at_label[i] += tile.data[rows.place[i]];
  }
}

// (exp - sum) * factor is the gradient at the label, where exp * factor is that of other classes.
template <typename acc_t>
void subtract_sums_at_labels(const Tile<acc_t>& tile, int64_t first_class, TileRows<acc_t>& rows) {
  if (tile.num_classes == 2 && first_class == 0) {
    acc_t* x = tile.data;
    acc_t* y = tile.of_class(1);
#pragma omp simd
    for (int64_t i = 0; i < rows.padded; ++i) {
      x[i] -= select(rows.label[i] == 0, rows.sum_exp[i], acc_t(0));
      y[i] -= select(rows.label[i] == 1, rows.sum_exp[i], acc_t(0));
    }
    return;
  }
  find_labels(tile, first_class, rows);
  for (int64_t i = 0; i < rows.size; ++i) {
    tile.data[rows.place[i]] -= rows.sum_exp[i];
  }
}

}  // namespace
}  // namespace oe_ext::cpu
