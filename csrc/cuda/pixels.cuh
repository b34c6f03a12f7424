// The kernels for logits whose neighbours in memory are rows: the pixels of a contiguous
// [N, C, H, W], or a transposed [N, C].
#pragma once

#include "units.cuh"

namespace oe_ext::cuda {

// The largest block, and how many of them fit the registers of a multiprocessor at least: the
// launch bounds.
constexpr int kMaxPixelsThreads = 128;
constexpr int kMinPixelsBlocks = 2;

// Clears what a NaN has left in the stage of rows that do not count, beside others that do.
template <int kSize, typename acc_t>
__device__ void clear_nan(const Stage<acc_t, kSize>& stage, int num_classes,
                          const RowSums<acc_t> (&rows)[kSize],
                          const RowGradient<acc_t> (&gradients)[kSize]) {
  for (int k = 0; k < kSize; ++k) {
    const bool clears = !gradients[k].counts() && std::isnan(rows[k].sum_exp);
    for (int cls = 0; clears && cls < num_classes; ++cls) {
      stage.at(cls, k) = 0;
    }
  }
}

// The loss and the statistics of every row and, on request, the gradient for an upstream gradient
// of 1.
// Work split:  one thread per kSize neighbouring rows, neighbouring threads on neighbouring rows; a
//              thread reads the classes in order. Threads stride over the rows
// Reads:       logits, 1 pass, coalesced if the row stride is 1; a second one for the gradient if
//              the stage has no room; labels, twice, and alpha [num_rows];
//              class_weights [num_classes]; partials.counts, or all labels
// Writes:      on request row_loss, row_cross_entropy, row_max, row_sum_exp, [num_rows], and
//              grad_logits, 1 pass, zeros for rows that do not count;
//              partials.sums [gridDim.x]
// Shared mem:  merge_block's; dynamic: the stage, `capacity` units per thread
// Sync:        merge_block's, before and after the loop over rows; none within the loop
// Numerics:    acc_t; sums relative to a maximum, over groups and rows in double. -inf and NaN: see
//              RowSums
// Assumes:     blockDim.x is a multiple of 32, at most kMaxPixelsThreads (launch_cuda.cu)
// Used when:   the row stride is below the class stride; kSize > 1 if num_inner is a multiple of
//              kSize, every class of the logits and of the gradient is aligned, and the stage holds
//              all classes or no gradient is written
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxPixelsThreads, kMinPixelsBlocks)
    outlier_exposure_forward_pixels_kernel(ForwardArgs<scalar_t, acc_t> args, Partials partials,
                                           int capacity) {
  OE_EXT_DYNAMIC_SHARED(slots);
  const Stage<acc_t, kSize> stage(slots, capacity);
  const Divisors<acc_t> divisors(forward_divisors(args, partials));
  const RowLayout& layout = args.layout;
  const int64_t num_rows = layout.num_rows();
  const int64_t num_classes = layout.num_classes;
  const bool keeps = args.grad_logits != nullptr && num_classes <= capacity;
  const double share = 1.0 / static_cast<double>(args.num_classes());
  ThreadSums sums;
  for (int64_t first = grid_thread() * kSize; first < num_rows; first += grid_threads() * kSize) {
    int64_t row_labels[kSize];
    args.labels.read(first, row_labels);
    LabelPlace places[kSize];
    bool any_read = false;
    for (int k = 0; k < kSize; ++k) {
      const RowKind kind = args.labels.rule.kind(row_labels[k]);
      CUDA_KERNEL_ASSERT(kind != RowKind::kInvalid && "target must be a class or a special label");
      places[k] = {args.class_here(row_labels[k], kind), k};
      any_read |= kind == RowKind::kInlier || kind == RowKind::kOutlier;
    }
    const Units<const scalar_t> units = {args.logits + layout.row_offset(first),
                                         layout.class_stride};
    RowSums<acc_t> rows[kSize];
    sum_units(units, num_classes, any_read, stage, capacity, places, [](const auto&) {}, rows);
    args.labels.read(first, row_labels);  // again: to keep them takes registers
    RowGradient<acc_t> gradients[kSize];
    bool any_counts = false;
    for (int k = 0; k < kSize; ++k) {
      const RowKind kind = args.labels.rule.kind(row_labels[k]);
      const auto coefficients = args.coefficients(first + k, row_labels[k], kind);
      const auto sum_exp = static_cast<acc_t>(rows[k].sum_exp);
      const acc_t label_shifted =
          places[k].unit >= 0 ? rows[k].label_logit - rows[k].max : acc_t(0);
      const acc_t loss = args.write_row(
          first + k, coefficients, kind, args.is_active(coefficients, kind), rows[k].max, sum_exp,
          label_shifted, static_cast<acc_t>(rows[k].sum_shifted * share));
      sums.add(kind, static_cast<double>(loss));
      any_counts |= coefficients.counts;
      gradients[k] = RowGradient<acc_t>::of_row(
          rows[k].max,
          args.gradient_coefficients(coefficients, sum_exp, acc_t(1), divisors.of(kind)),
          coefficients.counts);
    }
    if (args.grad_logits == nullptr) {
      continue;
    }
    const Units<scalar_t> grad_units = {args.grad_logits + args.grad_layout.row_offset(first),
                                        args.grad_layout.class_stride};
    if (!any_counts) {
      write_zeros<kSize>(num_classes, grad_units);
    } else if (keeps || kSize > 1) {  // a wide kernel that writes a gradient keeps all
      if constexpr (kSize > 1) {
        clear_nan(stage, static_cast<int>(num_classes), rows, gradients);
      }
      subtract_labels(stage, gradients, places);
      write_from_stage(stage, static_cast<int>(num_classes), gradients, grad_units);
    } else {
      write_from_logits<kSize, kSize>(units, num_classes, gradients, places, grad_units);
    }
  }
  sums.leave(partials);
}

// The gradient of every row.
// Work split:  as the forward kernel's
// Reads:       logits, 1 pass; the statistics, labels, alpha, class weight and upstream gradient of
//              each row. Only the upstream gradient, if it is 1 and the forward wrote the gradient
// Writes:      grad_logits, 1 pass; zeros for rows that do not count
// Shared mem:  none     Sync: none
// Numerics:    acc_t until the store: the upstream gradient multiplies before the cast
// Assumes:     blockDim.x is at most kMaxPixelsThreads
// Used when:   as the forward kernel
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxPixelsThreads, kMinPixelsBlocks)
    outlier_exposure_backward_pixels_kernel(BackwardArgs<scalar_t, acc_t> args) {
  if (args.is_done()) {
    return;
  }
  const int64_t num_rows = args.layout.num_rows();
  for (int64_t first = grid_thread() * kSize; first < num_rows; first += grid_threads() * kSize) {
    RowGradient<acc_t> gradients[kSize];
    LabelPlace places[kSize];
    bool any_counts = false;
    for (int k = 0; k < kSize; ++k) {
      gradients[k] = backward_gradient(args, first + k, places[k].unit);
      places[k].element = k;
      any_counts |= gradients[k].counts();
    }
    const Units<scalar_t> grad_units = {args.grad_logits + args.grad_layout.row_offset(first),
                                        args.grad_layout.class_stride};
    if (any_counts) {
      const Units<const scalar_t> units = {args.logits + args.layout.row_offset(first),
                                           args.layout.class_stride};
      write_from_logits<kSize, kSize>(units, args.layout.num_classes, gradients, places,
                                      grad_units);
    } else {
      write_zeros<kSize>(args.layout.num_classes, grad_units);
    }
  }
}

}  // namespace oe_ext::cuda
