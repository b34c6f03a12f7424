// The kernels for logits whose neighbours in memory are rows: the pixels of a contiguous
// [N, C, H, W], or a transposed [N, C].
#pragma once

#include "device.cuh"

namespace oe_ext::cuda {

// How many classes a thread loads at once.
template <int kSize>
constexpr int kClassesAtOnce = kSize > 1 ? 4 : static_cast<int>(kClassBlock);

// The largest block, and the launch bound. A thread that holds several rows takes up to 212
// registers: with larger blocks, fewer threads would fit a multiprocessor.
constexpr int kMaxPixelsThreads = 128;

// The statistics of kSize neighbouring rows, the first of them at `x`. `stage` keeps their logits
// by class.
template <int kSize, typename scalar_t, typename acc_t>
__device__ void pixel_stats(const scalar_t* x, const RowLayout& layout,
                            const Stage<Vector<scalar_t, kSize>>& stage,
                            RowStats<acc_t> (&stats)[kSize]) {
  constexpr int kAtOnce = kClassesAtOnce<kSize>;
  for (int64_t begin = 0; begin < layout.num_classes; begin += kAtOnce) {
    Vector<scalar_t, kSize> units[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      if (begin + i < layout.num_classes) {
        units[i] = load_vector<kSize>(x + layout.class_offset(begin + i));
      }
    }
    if (stage.keeps()) {
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i < layout.num_classes) {
          stage.put(begin + i, units[i]);
        }
      }
    }
    for (int k = 0; k < kSize; ++k) {
      acc_t max = stats[k].max;
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i < layout.num_classes) {
          const auto value = static_cast<acc_t>(units[i].values[k]);
          max = value > max ? value : max;
        }
      }
      auto block = RowStats<acc_t>::with_max(max);
      for (int i = 0; i < kAtOnce; ++i) {
        if (begin + i < layout.num_classes) {
          block.add(static_cast<acc_t>(units[i].values[k]));
        }
      }
      stats[k].merge(block);
    }
  }
}

// Writes the gradients of kSize neighbouring rows, zeros for rows that do not count. Reads the
// logits only if one of the rows counts: from `stage`, if it keeps them.
template <int kSize, typename scalar_t, typename acc_t>
__device__ void write_pixel_gradients(const RowGradient<acc_t> (&gradients)[kSize],
                                      const scalar_t* x, const RowLayout& layout, scalar_t* grad,
                                      const RowLayout& grad_layout,
                                      const Stage<Vector<scalar_t, kSize>>& stage) {
  constexpr int kAtOnce = kClassesAtOnce<kSize>;
  bool any_active = false;
  for (int k = 0; k < kSize; ++k) {
    any_active |= gradients[k].active;
  }
  for (int64_t begin = 0; begin < layout.num_classes; begin += kAtOnce) {
    Vector<scalar_t, kSize> units[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      if (any_active && begin + i < layout.num_classes) {
        units[i] = stage.keeps() ? stage.get(begin + i)
                                 : load_vector<kSize>(x + layout.class_offset(begin + i));
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t cls = begin + i;
      if (cls < layout.num_classes) {
        Vector<scalar_t, kSize> result;
        for (int k = 0; k < kSize; ++k) {
          const auto value =
              gradients[k].active ? static_cast<acc_t>(units[i].values[k]) : acc_t(0);
          result.values[k] = static_cast<scalar_t>(gradients[k](value, cls));
        }
        store_vector(grad + grad_layout.class_offset(cls), result);
      }
    }
  }
}

// The loss and the statistics of every row and, on request, the gradient for an upstream gradient
// of 1.
// Work split:  one thread per kSize neighbouring rows, neighbouring threads on neighbouring rows; a
//              thread reads the classes in order, kClassesAtOnce at a time. Threads stride over the
//              rows
// Reads:       logits, 1 pass, coalesced if the row stride is 1, plus the logit at the label; a
//              second pass for the gradient if the stage has no room; labels and alpha [num_rows];
//              class_weights [num_classes]; partials.counts
// Writes:      on request row_loss, row_cross_entropy, row_max, row_sum_exp, [num_rows], and
//              grad_logits, 1 pass, zeros for rows that do not count;
//              partials.sums [gridDim.x]
// Shared mem:  merge_block's; dynamic: the stage, num_classes units per thread, or none
// Sync:        merge_block's, before and after the loop over rows; none within the loop
// Numerics:    acc_t; a running maximum and sums relative to it. -inf and NaN: see RowStats. The
//              sums over rows are in double
// Assumes:     blockDim.x is a multiple of 32, at most kMaxPixelsThreads (launch_cuda.cu)
// Used when:   the row stride is below the class stride; kSize > 1 if num_inner is a multiple of
//              kSize, and every class of the logits and of the gradient is aligned
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxPixelsThreads, kMinBlocks)
    outlier_exposure_forward_pixels_kernel(ForwardArgs<scalar_t, acc_t> args, Partials partials,
                                           bool staged) {
  OE_EXT_DYNAMIC_SHARED(slots);
  const Stage<Vector<scalar_t, kSize>> stage(staged ? slots : nullptr);
  const GroupDivisors divisors = forward_divisors(args, partials);
  const RowLayout& layout = args.layout;
  const int64_t num_rows = layout.num_rows();
  GroupSums sums;
  for (int64_t first = grid_thread() * kSize; first < num_rows; first += grid_threads() * kSize) {
    int64_t cls[kSize];
    RowKind kind[kSize];
    RowCoefficients<acc_t> coefficients[kSize];
    bool any_active = false;
    for (int k = 0; k < kSize; ++k) {
      const int64_t label = args.labels[first + k];
      kind[k] = args.labels.rule.kind(label);
      CUDA_KERNEL_ASSERT(kind[k] != RowKind::kInvalid &&
                         "target must be a class or a special label");
      cls[k] = args.class_here(label, kind[k]);
      coefficients[k] = args.coefficients(first + k, label, kind[k]);
      any_active |= args.is_active(coefficients[k], kind[k]);
    }
    const scalar_t* x = args.logits + layout.row_offset(first);
    RowStats<acc_t> stats[kSize];
    if (any_active) {
      pixel_stats<kSize>(x, layout, stage, stats);
    }
    for (int k = 0; k < kSize; ++k) {
      acc_t label_shifted = 0;
      if (cls[k] >= 0) {
        label_shifted =
            logit_at(args.logits + layout.row_offset(first + k), layout, cls[k]) - stats[k].max;
      }
      const bool active = args.is_active(coefficients[k], kind[k]);
      const acc_t loss =
          args.write_row(first + k, coefficients[k], kind[k], active, stats[k], label_shifted);
      sums.add(kind[k], static_cast<double>(loss));
    }
    if (args.grad_logits != nullptr) {
      RowGradient<acc_t> gradients[kSize];
      for (int k = 0; k < kSize; ++k) {
        gradients[k] = args.row_gradient(coefficients[k], cls[k], kind[k], stats[k].max,
                                         stats[k].sum_exp, acc_t(1), divisors);
      }
      write_pixel_gradients<kSize>(gradients, x, layout,
                                   args.grad_logits + args.grad_layout.row_offset(first),
                                   args.grad_layout, stage);
    }
  }
  if (partials.sums != nullptr) {
    sums = merge_block(sums);
    if (threadIdx.x == 0) {
      partials.sums[blockIdx.x] = sums;
    }
  }
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
__global__ void __launch_bounds__(kMaxPixelsThreads, kMinBlocks)
    outlier_exposure_backward_pixels_kernel(BackwardArgs<scalar_t, acc_t> args) {
  if (args.is_done()) {
    return;
  }
  const Stage<Vector<scalar_t, kSize>> no_stage(nullptr);
  const int64_t num_rows = args.layout.num_rows();
  for (int64_t first = grid_thread() * kSize; first < num_rows; first += grid_threads() * kSize) {
    RowGradient<acc_t> gradients[kSize];
    for (int k = 0; k < kSize; ++k) {
      gradients[k] = backward_gradient(args, first + k);
    }
    write_pixel_gradients<kSize>(gradients, args.logits + args.layout.row_offset(first),
                                 args.layout, args.grad_logits + args.grad_layout.row_offset(first),
                                 args.grad_layout, no_stage);
  }
}

}  // namespace oe_ext::cuda
