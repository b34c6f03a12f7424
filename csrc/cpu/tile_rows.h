// Loops over the rows of a tile in scratch memory: each step of the loss and of its gradient. One
// loop handles one class, or a few, of all rows.
#pragma once

#include "tile_memory.h"

namespace oe_ext::cpu {
namespace {

template <int kCount, typename acc_t>
OE_EXT_INLINE void raise_maxima(const acc_t* x, int64_t stride, TileRows<acc_t>& rows) {
#pragma omp simd
  for (int64_t i = 0; i < rows.padded; ++i) {
    acc_t max = rows.max[i];
#pragma GCC unroll 4
    for (int k = 0; k < kCount; ++k) {
      max = x[k * stride + i] > max ? x[k * stride + i] : max;
    }
    rows.max[i] = max;
  }
}

template <typename acc_t>
void raise_maxima(const Tile<const acc_t>& tile, TileRows<acc_t>& rows) {
  int64_t cls = 0;
  for (; cls + 4 <= tile.num_classes; cls += 4) {
    raise_maxima<4>(tile.of_class(cls), tile.stride, rows);
  }
  for (; cls < tile.num_classes; ++cls) {
    raise_maxima<1>(tile.of_class(cls), tile.stride, rows);
  }
}

// Zeroes the values of rows where `counts` is 0: they may be infinite or NaN.
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

// Computes the exponentials of kCount classes, and their sums. The maxima must be known.
// `spread`: of these classes, or null.
template <int kCount, bool kSpread, typename acc_t>
OE_EXT_INLINE void add_classes(const acc_t* x, int64_t x_stride, acc_t* to, int64_t stride,
                               const acc_t* spread, TileRows<acc_t>& rows) {
#pragma omp simd
  for (int64_t i = 0; i < rows.padded; ++i) {
    acc_t shifted[kCount];
    acc_t exps[kCount];
#pragma GCC unroll 2
    for (int k = 0; k < kCount; ++k) {
      shifted[k] = x[k * x_stride + i] - rows.max[i];
      exps[k] = exp_of(shifted[k]);
      to[k * stride + i] = exps[k];
      if constexpr (kSpread) {
        shifted[k] *= select(rows.label[i] >= 0, spread[k], acc_t(1));
      }
    }
    rows.sum_exp[i] += kCount == 2 ? exps[0] + exps[kCount - 1] : exps[0];
    rows.sum_shifted[i] += kCount == 2 ? shifted[0] + shifted[kCount - 1] : shifted[0];
  }
}

// Rows with more classes than this are summed in parts of this many, which are added in double.
constexpr int64_t kSumClasses = 32;

// The sums over all classes of a row, if there are more than kSumClasses.
struct WideSums {
  double exp[kMaxTileRows] = {};
  double shifted[kMaxTileRows] = {};
};

// Computes the exponentials of the source, which may be the tile itself, and their sums.
template <bool kSpread, typename acc_t>
void add_exponentials(const Tile<const acc_t>& source, const Tile<acc_t>& tile, const acc_t* spread,
                      TileRows<acc_t>& rows, WideSums* wide) {
  for (int64_t begin = 0; begin < tile.num_classes; begin += kSumClasses) {
    const int64_t end = std::min(begin + kSumClasses, tile.num_classes);
    std::fill_n(rows.sum_exp, rows.padded, acc_t(0));
    std::fill_n(rows.sum_shifted, rows.padded, acc_t(0));
    const auto spread_of = [=](int64_t cls) { return kSpread ? spread + cls : nullptr; };
    int64_t cls = begin;
    for (; cls + 2 <= end; cls += 2) {
      add_classes<2, kSpread>(source.of_class(cls), source.stride, tile.of_class(cls), tile.stride,
                              spread_of(cls), rows);
    }
    if (cls < end) {
      add_classes<1, kSpread>(source.of_class(cls), source.stride, tile.of_class(cls), tile.stride,
                              spread_of(cls), rows);
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

// `spread`: of the tile's classes, or null.
template <typename acc_t>
void add_exponentials(const Tile<const acc_t>& source, const Tile<acc_t>& tile, const acc_t* spread,
                      TileRows<acc_t>& rows, WideSums* wide) {
  if (spread != nullptr) {
    add_exponentials<true>(source, tile, spread, rows, wide);
  } else {
    add_exponentials<false>(source, tile, spread, rows, wide);
  }
}

// Subtracts each class's part of the smoothing from the exponentials.
template <typename acc_t>
void subtract_at_classes(const Tile<acc_t>& tile, const acc_t* spread,
                         const TileRows<acc_t>& rows) {
  for (int64_t cls = 0; cls < tile.num_classes; ++cls) {
    acc_t* x = tile.of_class(cls);
#pragma omp simd
    for (int64_t i = 0; i < rows.padded; ++i) {
      x[i] -= spread[cls] * rows.at_classes[i];
    }
  }
}

// Finds the index of each row's label among a tile's classes; `none` if it is not there.
template <typename acc_t>
void find_labels(int64_t first_class, int64_t num_classes, int64_t none, TileRows<acc_t>& rows) {
  using Int = IntOf<acc_t>;
#pragma omp simd
  for (int64_t i = 0; i < rows.padded; ++i) {
    const Int cls = rows.label[i] - static_cast<Int>(first_class);
    const bool here = (cls >= 0) & (cls < static_cast<Int>(num_classes));
    rows.place[i] = here ? cls : static_cast<Int>(none);
  }
}

template <typename acc_t>
void find_logits_at_labels(const Tile<const acc_t>& tile, int64_t first_class,
                           TileRows<acc_t>& rows) {
  if (tile.num_classes == 2 && first_class == 0) {
    const acc_t* x = tile.data;
    const acc_t* y = tile.of_class(1);
#pragma omp simd
    for (int64_t i = 0; i < rows.padded; ++i) {
      rows.at_label[i] = select(rows.label[i] == 1, y[i], x[i]);
    }
    return;
  }
  find_labels(first_class, tile.num_classes, 0, rows);
  for (int64_t i = 0; i < rows.size; ++i) {
    const bool here = rows.label[i] == first_class + rows.place[i];
    rows.at_label[i] = select(here, tile.of_class(rows.place[i])[i], rows.at_label[i]);
  }
}

// Subtracts at_label from the exponential at each label. After that, the gradient treats all
// classes alike.
template <typename acc_t>
void subtract_at_labels(const Tile<acc_t>& tile, int64_t first_class, TileRows<acc_t>& rows) {
  if (tile.num_classes == 2 && first_class == 0) {
    acc_t* x = tile.data;
    acc_t* y = tile.of_class(1);
#pragma omp simd
    for (int64_t i = 0; i < rows.padded; ++i) {
      x[i] -= select(rows.label[i] == 0, rows.at_label[i], acc_t(0));
      y[i] -= select(rows.label[i] == 1, rows.at_label[i], acc_t(0));
    }
    return;
  }
  // Rows without a label here subtract from the spare class, which nobody reads.
  std::fill_n(tile.of_class(tile.num_classes), rows.padded, acc_t(0));
  find_labels(first_class, tile.num_classes, tile.num_classes, rows);
  for (int64_t i = 0; i < rows.size; ++i) {
    tile.of_class(rows.place[i])[i] -= rows.at_label[i];
  }
}

}  // namespace
}  // namespace oe_ext::cpu
