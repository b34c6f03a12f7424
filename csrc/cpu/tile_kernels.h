// The kernels of one tile, for the instruction set of the file that includes this.
//
// Contiguous rows of many classes are walked one by one, along the classes ("long rows"). All
// others are walked along the rows. The forward reads pixels where they stand; whatever else comes
// (channels_last, few classes, any strides), and all that the backward reads, is laid out in
// scratch memory as [class][row] first, in the type of the arithmetic. Either way a tile is read
// from memory once, and its exponentials are computed once: they wait in cache for the sum that
// they are divided by. Only classes that do not fit (chunk_classes) are read again.
#pragma once

#include "along_classes.h"
#include "along_rows.h"

namespace oe_ext::cpu {
namespace {

// ---- The rows of a tile, once their sums are known

// Sums of lanes, in double.
template <typename acc_t>
struct LaneSums {
  static constexpr int kParts = sizeof(double) / sizeof(acc_t);
  typedef acc_t Part __attribute__((vector_size(kVectorBytes / kParts)));
  Vec<double> parts[kParts];

  LaneSums() {
    for (Vec<double>& part : parts) {
      part = Vec<double>(0.0);
    }
  }
  OE_EXT_INLINE void add(Vec<acc_t> x) {
    Part halves[kParts];
    __builtin_memcpy(halves, &x, sizeof(x));
    for (int i = 0; i < kParts; ++i) {
      parts[i] += Vec<double>(__builtin_convertvector(halves[i], Vec<double>::Raw));
    }
  }
  double sum() const {
    double total = 0;
    for (const Vec<double>& part : parts) {
      total += sum_of_lanes(part);
    }
    return total;
  }
};

// Stores the lanes of rows that exist; nothing where `values` is null.
template <typename acc_t>
OE_EXT_INLINE void store_rows(acc_t* values, const TileRows<acc_t>& rows, int64_t i, Vec<acc_t> x) {
  if (values == nullptr) {
    return;
  }
  if (i + Vec<acc_t>::kSize <= rows.size) {
    x.store(values + rows.first + i);
  } else {
    store_part(values + rows.first + i, x, rows.size - i);
  }
}

// Writes the outputs of the rows, adds their losses, and readies what their gradients need. As
// ForwardArgs::write_row and row_gradient, for many rows at once.
template <typename scalar_t, typename acc_t>
void finish_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling, GroupCounts counts,
                 TileRows<acc_t>& rows, GroupSums& sums) {
  using V = Vec<acc_t>;
  using IntV = IntVec<acc_t>;
  const V zero = acc_t(0);
  const V num_classes = static_cast<acc_t>(args.layout.num_classes);
  const V inlier_divisor =
      static_cast<acc_t>(reduction_divisor(args.reduction, RowKind::kInlier, counts));
  const V outlier_divisor =
      static_cast<acc_t>(reduction_divisor(args.reduction, RowKind::kOutlier, counts));
  const bool one_alpha = args.alpha.values.data == nullptr;
  const V one_alpha_scale = V(args.alpha.value) / outlier_divisor;
  const V inlier_scale = V(acc_t(1)) / inlier_divisor;
  LaneSums<acc_t> inliers;
  LaneSums<acc_t> outliers;
  for (int64_t i = 0; i < rows.padded; i += V::kSize) {
    const IntV label = IntV::load(rows.label + i);
    const Mask<acc_t> is_inlier = label >= IntV::broadcast(0);
    const Mask<acc_t> is_outlier = label == IntV::broadcast(kOutlierLane);
    V alpha = args.alpha.value;
    if (!one_alpha) {
      acc_t lanes[V::kSize];
      for (int64_t j = 0; j < V::kSize; ++j) {
        lanes[j] = args.alpha.values[rows.first + std::min(i + j, rows.size - 1)];
      }
      alpha = V::load(lanes);
    }
    const V weight = select(is_inlier, V(acc_t(1)), select(is_outlier, alpha, zero));
    const Mask<acc_t> counts_for_loss = weight != zero;
    const Mask<acc_t> is_active =
        args.row_cross_entropy != nullptr ? counts_for_loss | is_outlier : counts_for_loss;

    RowStats<V> stats;
    stats.max = V::load(rows.max + i);
    stats.sum_exp = V::load(rows.sum_exp + i);
    stats.sum_shifted = V::load(rows.sum_shifted + i);
    stats.count = num_classes;
    const V at_label = V::load(rows.at_label + i);
    const V cross_entropy = select(
        is_active,
        select(is_inlier, inlier_cross_entropy(stats, at_label), outlier_cross_entropy(stats)),
        zero);
    const V loss = select(counts_for_loss, weight * cross_entropy, zero);
    inliers.add(select(is_inlier, loss, zero));
    outliers.add(select(is_inlier, zero, loss));
    store_rows(args.row_loss, rows, i, loss);
    store_rows(args.row_cross_entropy, rows, i, cross_entropy);
    store_rows(args.row_max, rows, i, select(is_active, stats.max, zero));
    store_rows(args.row_sum_exp, rows, i, select(is_active, stats.sum_exp, zero));

    if (args.grad_logits != nullptr) {
      select(counts_for_loss, label, IntV::broadcast(kInactiveLane)).store(rows.label + i);
      if (tiling.long_rows) {
        exp(at_label - stats.max).store(rows.exp_at_label + i);
      }
      (V(acc_t(1)) / stats.sum_exp).store(rows.inverse_sum + i);
      const V outlier_scale = one_alpha ? one_alpha_scale : alpha / outlier_divisor;
      select(is_outlier, outlier_scale, inlier_scale).store(rows.scale + i);
      select(is_outlier, V(acc_t(1)) / num_classes, zero).store(rows.uniform + i);
    }
  }
  sums.inliers = inliers.sum();
  sums.outliers = outliers.sum();
}

// ---- Tiles

template <typename acc_t>
void begin_tile(const Tiling& tiling, int64_t tile, TileRows<acc_t>& rows) {
  constexpr int64_t kSize = Vec<acc_t>::kSize;
  rows.first = tiling.begin(tile);
  rows.size = tiling.size(tile);
  rows.padded = (rows.size + kSize - 1) / kSize * kSize;
}

template <typename acc_t>
void clear_sums(TileRows<acc_t>& rows) {
  for (int64_t i = 0; i < rows.padded; ++i) {
    rows.max[i] = std::numeric_limits<acc_t>::lowest();
    rows.sum_exp[i] = 0;
    rows.sum_shifted[i] = 0;
    rows.at_label[i] = 0;
  }
}

// A row whose logits may not be looked at, or need not be.
template <typename scalar_t, typename acc_t>
bool reads_row(const ForwardArgs<scalar_t, acc_t>& args, const TileRows<acc_t>& rows, int64_t i) {
  return rows.label[i] >= 0 ||
         (rows.label[i] == kOutlierLane && args.is_active(rows.first + i, RowKind::kOutlier));
}

template <typename scalar_t, typename acc_t>
void forward_long_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                       GroupCounts counts, acc_t* scratch, TileRows<acc_t>& rows, GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  // The exponentials wait where the gradients will be, if that has their type, or in scratch.
  acc_t* exps = nullptr;
  int64_t exps_stride = num_classes;
  if (args.grad_logits != nullptr) {
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      exps = args.grad_logits + args.grad_layout.row_offset(rows.first);
      exps_stride = args.grad_layout.inner_stride;
    } else if (tiling.chunk_classes > 0) {
      exps = scratch;
    }
  }
  for (int64_t i = 0; i < rows.size; ++i) {
    if (!reads_row(args, rows, i)) {
      continue;
    }
    const scalar_t* row = logits.data + i * logits.row_stride;
    rows.max[i] = max_of_row<scalar_t, acc_t>(row, num_classes);
    if (exps != nullptr) {
      add_row<true>(row, num_classes, exps + i * exps_stride, i, rows);
    } else {
      add_row<false>(row, num_classes, exps, i, rows);
    }
    if (rows.label[i] >= 0) {
      rows.at_label[i] = static_cast<acc_t>(row[args.labels[rows.first + i]]);
    }
  }
  finish_rows(args, tiling, counts, rows, sums);
  if (args.grad_logits == nullptr) {
    return;
  }
  const TileView<scalar_t> grad(args.grad_logits, args.grad_layout, rows.first);
  for (int64_t i = 0; i < rows.size; ++i) {
    scalar_t* row = grad.data + i * grad.row_stride;
    if (exps != nullptr) {
      write_row_gradient<true>(exps + i * exps_stride, row, num_classes, i, rows);
    } else {
      write_row_gradient<false>(logits.data + i * logits.row_stride, row, num_classes, i, rows);
    }
    if (rows.label[i] >= 0) {
      row[args.labels[rows.first + i]] = static_cast<scalar_t>(
          logit_gradient(rows.exp_at_label[i], rows.inverse_sum[i], acc_t(1), rows.scale[i]));
    }
  }
}

// The maxima and the sums of a tile whose logits planes(first class, number of classes) brings.
// Where all fit in scratch, their exponentials are left there, if a gradient needs them.
template <typename scalar_t, typename acc_t, typename MakePlanes>
void add_tile(const ForwardArgs<scalar_t, acc_t>& args, int64_t chunk, const MakePlanes& planes,
              acc_t* scratch, TileRows<acc_t>& rows) {
  using source_t = typename MakePlanes::Source;
  const int64_t num_classes = args.layout.num_classes;
  for (int64_t cls = 0; cls < num_classes; cls += chunk) {
    const int64_t size = std::min(chunk, num_classes - cls);
    for_each_block<acc_t>(rows.padded,
                          RaiseMaxima<source_t, acc_t>{rows, planes(cls, size), cls, size});
  }
  const bool keep_exp = chunk == num_classes && args.grad_logits != nullptr;
  for (int64_t cls = 0; cls < num_classes; cls += chunk) {
    const int64_t size = std::min(chunk, num_classes - cls);
    const Planes<source_t> source = chunk == num_classes ? planes.again() : planes(cls, size);
    if (keep_exp) {
      for_each_block<acc_t>(rows.padded,
                            AddClasses<source_t, acc_t, true>{rows, source, scratch, size});
    } else {
      for_each_block<acc_t>(rows.padded,
                            AddClasses<source_t, acc_t, false>{rows, source, scratch, size});
    }
  }
}

// Logits where they stand.
template <typename scalar_t>
struct PlanesOfTensor {
  using Source = scalar_t;
  TileView<const scalar_t> logits;

  Planes<Source> operator()(int64_t first_class, int64_t) const {
    return {logits.from_class(first_class).data, logits.class_stride};
  }
  Planes<Source> again() const { return (*this)(0, 0); }
};

// Logits that are brought to scratch.
template <typename scalar_t, typename acc_t>
struct PlanesInScratch {
  using Source = acc_t;
  TileView<const scalar_t> logits;
  const TileRows<acc_t>& rows;
  acc_t* scratch;

  Planes<Source> operator()(int64_t first_class, int64_t num_classes) const {
    gather(logits.from_class(first_class), num_classes, rows, scratch);
    return again();
  }
  Planes<Source> again() const { return {scratch, rows.padded}; }
};

template <typename scalar_t, typename acc_t>
void forward_along_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        GroupCounts counts, acc_t* scratch, TileRows<acc_t>& rows,
                        GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  const int64_t chunk = tiling.chunk_classes;
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  if (logits.row_stride == 1 && rows.size == rows.padded) {
    add_tile(args, chunk, PlanesOfTensor<scalar_t>{logits}, scratch, rows);
  } else {
    add_tile(args, chunk, PlanesInScratch<scalar_t, acc_t>{logits, rows, scratch}, scratch, rows);
  }
  finish_rows(args, tiling, counts, rows, sums);
  if (args.grad_logits == nullptr) {
    return;
  }
  const TileView<scalar_t> grad(args.grad_logits, args.grad_layout, rows.first);
  for (int64_t cls = 0; cls < num_classes; cls += chunk) {
    const int64_t size = std::min(chunk, num_classes - cls);
    if (chunk == num_classes) {
      write_gradients<true>(rows, scratch, cls, size, grad);
    } else {
      gather(logits.from_class(cls), size, rows, scratch);
      write_gradients<false>(rows, scratch, cls, size, grad);
    }
  }
}

template <typename scalar_t, typename acc_t>
TaskResult forward_tile(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        int64_t tile, GroupCounts counts, acc_t* scratch) {
  TileRows<acc_t> rows;
  begin_tile(tiling, tile, rows);
  TaskResult result = read_labels(args.labels, rows);
  if (result.bad_row >= 0) {
    return result;
  }
  clear_sums(rows);
  if (tiling.long_rows) {
    forward_long_rows(args, tiling, counts, scratch, rows, result.sums);
  } else {
    forward_along_rows(args, tiling, counts, scratch, rows, result.sums);
  }
  return result;
}

template <typename scalar_t, typename acc_t>
TaskResult backward_tile(const BackwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                         int64_t tile, acc_t* scratch) {
  TileRows<acc_t> rows;
  begin_tile(tiling, tile, rows);
  TaskResult result = read_labels(args.labels, rows);
  if (result.bad_row >= 0) {
    return result;
  }
  for (int64_t i = 0; i < rows.padded; ++i) {
    RowGradient<acc_t> gradient;
    if (rows.label[i] != kInactiveLane) {
      const RowKind kind = rows.label[i] >= 0 ? RowKind::kInlier : RowKind::kOutlier;
      gradient = args.row_gradient(rows.first + i, rows.label[i], kind);
    }
    rows.max[i] = gradient.max;
    rows.inverse_sum[i] = gradient.inverse_sum;
    rows.scale[i] = gradient.scale;
    rows.uniform[i] = gradient.uniform;
    rows.label[i] = gradient.active ? rows.label[i] : kInactiveLane;
  }

  const int64_t num_classes = args.layout.num_classes;
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  const TileView<scalar_t> grad(args.grad_logits, args.grad_layout, rows.first);
  if (!tiling.long_rows) {
    for (int64_t cls = 0; cls < num_classes; cls += tiling.chunk_classes) {
      const int64_t size = std::min(tiling.chunk_classes, num_classes - cls);
      gather(logits.from_class(cls), size, rows, scratch);
      write_gradients<false>(rows, scratch, cls, size, grad);
    }
    return result;
  }
  for (int64_t i = 0; i < rows.size; ++i) {
    const scalar_t* row = logits.data + i * logits.row_stride;
    scalar_t* grad_row = grad.data + i * grad.row_stride;
    write_row_gradient<false>(row, grad_row, num_classes, i, rows);
    if (rows.label[i] >= 0) {
      const int64_t label = args.labels[rows.first + i];
      const Vec<acc_t> shifted = static_cast<acc_t>(row[label]) - rows.max[i];
      acc_t lanes[Vec<acc_t>::kSize];
      exp(shifted).store(lanes);
      grad_row[label] = static_cast<scalar_t>(
          logit_gradient(lanes[0], rows.inverse_sum[i], acc_t(1), rows.scale[i]));
    }
  }
  return result;
}

template <typename scalar_t, typename acc_t>
constexpr TileKernels<scalar_t, acc_t> tile_kernels() {
  return {&forward_tile<scalar_t, acc_t>, &backward_tile<scalar_t, acc_t>};
}

constexpr Kernels make_kernels() {
  return {&count_rows, tile_kernels<float, float>(), tile_kernels<double, double>(),
          tile_kernels<c10::Half, float>(), tile_kernels<c10::BFloat16, float>()};
}

}  // namespace
}  // namespace oe_ext::cpu
