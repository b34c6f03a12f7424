// The kernels for logits whose neighbours in memory are rows: the pixels of a contiguous
// [N, C, H, W], or a transposed [N, C].
#pragma once

#include "device.cuh"

namespace oe_ext::cuda {

// Classes whose loads are in flight at once in one thread.
constexpr int kClassesAtOnce = 4;

// The loss and the statistics of every row, each logit read once.
// Work split:  one thread per row, neighbouring threads on neighbouring rows; a thread reads its
//              classes in their order, kClassesAtOnce at a time. Threads stride over the rows.
// Reads:       logits, 1 pass, coalesced where the row stride is 1, and the one at the label again;
//              labels and alpha [num_rows]
// Writes:      row_loss; row_cross_entropy, row_max, row_sum_exp where asked for; [num_rows]
// Shared mem:  none     Sync: none
// Numerics:    acc_t; a running maximum and sums relative to it. -inf and NaN: see RowStats
// Assumes:     nothing
// Used when:   the row stride is below the class stride
template <typename scalar_t, typename acc_t>
__global__ void outlier_exposure_forward_pixels_kernel(ForwardArgs<scalar_t, acc_t> args) {
  const RowLayout& layout = args.layout;
  const int64_t num_rows = layout.num_rows();
  const int64_t num_threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < num_rows;
       row += num_threads) {
    const int64_t label = args.labels[row];
    const RowKind kind = args.labels.rule.kind(label);
    CUDA_KERNEL_ASSERT(kind != RowKind::kInvalid && "target must be a class or a mark");
    RowStats<acc_t> stats;
    if (args.is_active(row, kind)) {
      const scalar_t* x = args.logits + layout.row_offset(row);
      for (int64_t begin = 0; begin < layout.num_classes; begin += kClassBlock) {
        auto block = RowStats<acc_t>::below(stats.max);
        const int64_t rest = layout.num_classes - begin;
        const int64_t end = begin + (rest < kClassBlock ? rest : kClassBlock);
        int64_t cls = begin;
        for (; cls + kClassesAtOnce <= end; cls += kClassesAtOnce) {
          acc_t values[kClassesAtOnce];
          for (int i = 0; i < kClassesAtOnce; ++i) {
            values[i] = static_cast<acc_t>(x[layout.class_offset(cls + i)]);
          }
          block.push(values);
        }
        for (; cls < end; ++cls) {
          block.push(static_cast<acc_t>(x[layout.class_offset(cls)]));
        }
        stats.merge(block);
      }
    }
    args.write_row(row, label, kind, stats);
  }
}

// The gradient of every row, each logit read once and each gradient written once.
// Work split:  as the forward kernel's
// Reads:       logits, 1 pass; the statistics, labels, alpha and upstream gradient of each row
// Writes:      grad_logits, 1 pass; zeros where a row does not count
// Shared mem:  none     Sync: none
// Numerics:    acc_t until the store: the upstream gradient multiplies before the cast
// Assumes:     nothing
// Used when:   the row stride is below the class stride
template <typename scalar_t, typename acc_t>
__global__ void outlier_exposure_backward_pixels_kernel(BackwardArgs<scalar_t, acc_t> args) {
  const int64_t num_rows = args.layout.num_rows();
  const int64_t num_threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < num_rows;
       row += num_threads) {
    const int64_t label = args.labels[row];
    const RowGradient<acc_t> gradient = args.row_gradient(row, label, args.labels.rule.kind(label));
    const scalar_t* x = args.logits + args.layout.row_offset(row);
    scalar_t* grad = args.grad_logits + args.grad_layout.row_offset(row);
    for (int64_t cls = 0; cls < args.layout.num_classes; ++cls) {
      const auto logit = static_cast<acc_t>(x[args.layout.class_offset(cls)]);
      grad[args.grad_layout.class_offset(cls)] = static_cast<scalar_t>(gradient(logit, cls));
    }
  }
}

}  // namespace oe_ext::cuda
