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

template <typename acc_t>
void begin_tile(const Tiling& tiling, int64_t tile, TileRows<acc_t>& rows) {
  rows.first = tiling.begin(tile);
  rows.size = tiling.size(tile);
  rows.padded = round_up<acc_t>(rows.size);
}

template <typename acc_t>
void clear_maxima(TileRows<acc_t>& rows) {
  for (int64_t i = 0; i < rows.padded; ++i) {
    rows.max[i] = std::numeric_limits<acc_t>::lowest();
    rows.at_label[i] = 0;
  }
}

template <typename acc_t>
void clear_sums(TileRows<acc_t>& rows) {
  for (int64_t i = 0; i < rows.padded; ++i) {
    rows.sum_exp[i] = 0;
    rows.sum_shifted[i] = 0;
  }
}

// Are the logits of a row to be looked at? Those of others may hold anything.
template <typename scalar_t, typename acc_t>
bool reads_row(const ForwardArgs<scalar_t, acc_t>& args, const TileRows<acc_t>& rows, int64_t i) {
  return rows.label[i] >= 0 ||
         (rows.label[i] == kOutlierLane && args.is_active(rows.first + i, RowKind::kOutlier));
}

// Of a group of long rows that stays in the nearest cache.
constexpr int64_t kLogitsOfGroup = 4096;

template <bool kKeepExp, typename scalar_t, typename acc_t>
void add_row(const scalar_t* logits, int64_t num_classes, acc_t* exps, Ahead<scalar_t, acc_t> ahead,
             int64_t i, TileRows<acc_t>& rows) {
  RowSums<kKeepExp, scalar_t, acc_t> sums(logits, num_classes, rows.max[i], exps, ahead);
  sums.add_all();
  rows.sum_exp[i] = sums.sum_exp();
  rows.sum_shifted[i] = sums.sum_shifted();
}

// The gradient of a long row's logit at its label.
template <typename acc_t>
acc_t gradient_at_label(acc_t logit, int64_t i, const TileRows<acc_t>& rows) {
  const Vec<acc_t> exp_shifted = exp(Vec<acc_t>(logit - rows.max[i]));
  return logit_gradient(exp_shifted.raw[0], rows.inverse_sum[i], acc_t(1), rows.scale[i]);
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
  // The maximum of a row, which its exponentials wait for, is found while others are worked on.
  const int64_t group = std::max<int64_t>(1, kLogitsOfGroup / num_classes);
  for (int64_t begin = 0; begin < rows.size; begin += group) {
    const int64_t end = std::min(begin + group, rows.size);
    for (int64_t i = begin; i < end; ++i) {
      if (reads_row(args, rows, i)) {
        rows.max[i] = max_of_row<scalar_t, acc_t>(logits.data + i * logits.row_stride, num_classes);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      if (!reads_row(args, rows, i)) {
        continue;
      }
      const scalar_t* row = logits.data + i * logits.row_stride;
      // The next group's maxima wait for logits, the next row's exponentials for a place.
      const int64_t in_next_group = std::min(i + group, rows.size - 1);
      Ahead<scalar_t, acc_t> ahead{logits.data + in_next_group * logits.row_stride, nullptr};
      if (exps != nullptr) {
        ahead.exps = exps + std::min(i + 1, rows.size - 1) * exps_stride;
        add_row<true>(row, num_classes, exps + i * exps_stride, ahead, i, rows);
      } else {
        add_row<false>(row, num_classes, exps, ahead, i, rows);
      }
      if (rows.label[i] >= 0) {
        rows.at_label[i] = static_cast<acc_t>(row[args.labels[rows.first + i]]);
      }
    }
  }
  finish_rows(args, counts, rows, sums);
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
      row[args.labels[rows.first + i]] =
          static_cast<scalar_t>(gradient_at_label(rows.at_label[i], i, rows));
    }
  }
}

// More classes than this are read from memory for as many rows as a tile has, one class after
// another, before a block of rows goes through all of them in cache.
constexpr int64_t kMaxClassesOfBlock = 32;

// Logits [class][row], of a tensor or in scratch, all classes at once.
template <typename source_t, typename scalar_t, typename acc_t>
void forward_all_classes(const ForwardArgs<scalar_t, acc_t>& args, GroupCounts counts,
                         Planes<source_t> logits, acc_t* scratch, TileRows<acc_t>& rows,
                         GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  const bool maxima_first = num_classes > kMaxClassesOfBlock;
  if (maxima_first) {
    clear_maxima(rows);
    RaiseMaxima<source_t, acc_t> raise{rows, logits, 0, num_classes};
    for_each_block<acc_t>(rows.padded, raise);
  }
  RowFinisher<scalar_t, acc_t> finisher(args, counts, rows);
  if (args.grad_logits == nullptr) {
    WalkAll<GradientTo::kNowhere, source_t, scalar_t, acc_t> walk{rows,         logits, num_classes,
                                                                  maxima_first, {},     finisher};
    for_each_block<acc_t>(rows.padded, walk);
  } else {
    const GradientPlanes<scalar_t, acc_t> gradients{
        scratch, rows.padded, TileView<scalar_t>(args.grad_logits, args.grad_layout, rows.first)};
    walk_to_tensor(rows, num_classes, gradients,
                   WalkAll<GradientTo::kPlanes, source_t, scalar_t, acc_t>{
                       rows, logits, num_classes, maxima_first, gradients, finisher},
                   WalkAll<GradientTo::kScratch, source_t, scalar_t, acc_t>{
                       rows, logits, num_classes, maxima_first, gradients, finisher});
  }
  finisher.write_sums(sums);
}

// Logits of more classes than fit in scratch: as many as do are brought there, three times.
template <typename scalar_t, typename acc_t>
void forward_in_chunks(const ForwardArgs<scalar_t, acc_t>& args, int64_t chunk, GroupCounts counts,
                       acc_t* scratch, TileRows<acc_t>& rows, GroupSums& sums) {
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  const Planes<acc_t> planes{scratch, rows.padded};
  const auto for_each_chunk = [&](const auto& use) {
    for (int64_t cls = 0; cls < args.layout.num_classes; cls += chunk) {
      const int64_t size = std::min(chunk, args.layout.num_classes - cls);
      gather(logits.from_class(cls), size, rows, scratch);
      use(cls, size);
    }
  };
  clear_maxima(rows);
  clear_sums(rows);
  for_each_chunk([&](int64_t cls, int64_t size) {
    RaiseMaxima<acc_t, acc_t> raise{rows, planes, cls, size};
    for_each_block<acc_t>(rows.padded, raise);
  });
  for_each_chunk([&](int64_t, int64_t size) {
    AddClasses<acc_t, acc_t> add{rows, planes, size};
    for_each_block<acc_t>(rows.padded, add);
  });
  finish_rows(args, counts, rows, sums);
  if (args.grad_logits == nullptr) {
    return;
  }
  const TileView<scalar_t> grad(args.grad_logits, args.grad_layout, rows.first);
  for_each_chunk(
      [&](int64_t cls, int64_t size) { write_gradients(rows, scratch, cls, size, grad); });
}

template <typename scalar_t, typename acc_t>
void forward_along_rows(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        GroupCounts counts, acc_t* scratch, TileRows<acc_t>& rows,
                        GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  if (tiling.chunk_classes < num_classes) {
    forward_in_chunks(args, tiling.chunk_classes, counts, scratch, rows, sums);
    return;
  }
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  if (logits.row_stride == 1 && rows.size == rows.padded) {
    forward_all_classes(args, counts, Planes<scalar_t>{logits.data, logits.class_stride}, scratch,
                        rows, sums);
  } else {
    gather(logits, num_classes, rows, scratch);
    forward_all_classes(args, counts, Planes<acc_t>{scratch, rows.padded}, scratch, rows, sums);
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
  if (tiling.long_rows) {
    clear_maxima(rows);
    clear_sums(rows);
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
      write_gradients(rows, scratch, cls, size, grad);
    }
    return result;
  }
  for (int64_t i = 0; i < rows.size; ++i) {
    const scalar_t* row = logits.data + i * logits.row_stride;
    scalar_t* grad_row = grad.data + i * grad.row_stride;
    write_row_gradient<false>(row, grad_row, num_classes, i, rows);
    if (rows.label[i] >= 0) {
      const int64_t label = args.labels[rows.first + i];
      grad_row[label] =
          static_cast<scalar_t>(gradient_at_label(static_cast<acc_t>(row[label]), i, rows));
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
