// Loops over the rows of a tile in scratch memory: each step of the loss and of its gradient, for
// one class (or two) of all rows after another.
#pragma once

#include "tile_memory.h"

namespace oe_ext::cpu {
namespace {

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
