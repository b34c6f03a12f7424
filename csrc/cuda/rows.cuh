// The kernels for logits whose neighbours in memory are classes: [N, C], channels_last.
#pragma once

#include "device.cuh"

namespace oe_ext::cuda {

// Who walks a row together.
enum class Team { kWarp, kBlock };

template <Team kTeam>
struct TeamPosition {
  int lane;            // of this thread in its team
  int lanes;           // of the team
  int64_t first_row;   // of the team
  int64_t row_stride;  // from the team's row to its next one

  __device__ TeamPosition() {
    const int thread = static_cast<int>(threadIdx.x);
    const int threads = static_cast<int>(blockDim.x);
    lanes = kTeam == Team::kWarp ? kWarpSize : threads;
    lane = thread % lanes;
    const int teams = threads / lanes;
    first_row = static_cast<int64_t>(blockIdx.x) * teams + thread / lanes;
    row_stride = static_cast<int64_t>(gridDim.x) * teams;
  }
};

// The statistics of those logits of a row that fall to one lane. With kSize > 1 the classes are
// contiguous and the row is aligned to kSize elements.
template <int kSize, typename scalar_t, typename acc_t>
__device__ RowStats<acc_t> lane_stats(const ForwardArgs<scalar_t, acc_t>& args, int64_t row,
                                      int lane, int lanes) {
  const RowLayout& layout = args.layout;
  const scalar_t* x = args.logits + layout.row_offset(row);
  const int64_t num_wide = kSize > 1 ? layout.num_classes / kSize * kSize : 0;
  RowStats<acc_t> stats;
  int64_t cls = int64_t(lane) * kSize;
  while (cls < num_wide) {
    auto block = RowStats<acc_t>::below(stats.max);
    for (int64_t i = 0; i < kClassBlock && cls < num_wide; i += kSize) {
      const auto wide = load_vector<kSize>(x + cls);
      acc_t values[kSize];
      for (int k = 0; k < kSize; ++k) {
        values[k] = static_cast<acc_t>(wide.values[k]);
      }
      block.push(values);
      cls += int64_t(lanes) * kSize;
    }
    stats.merge(block);
  }
  for (cls = num_wide + lane; cls < layout.num_classes;) {
    auto block = RowStats<acc_t>::below(stats.max);
    for (int64_t i = 0; i < kClassBlock && cls < layout.num_classes; ++i, cls += lanes) {
      block.push(static_cast<acc_t>(x[layout.class_offset(cls)]));
    }
    stats.merge(block);
  }
  return stats;
}

// The loss and the statistics of every row, each logit read once.
// Work split:  one team (a warp, or a block) per row; lane i reads vectors i, i + lanes, ..., then
//              the classes that fill no vector, one by one. Teams stride over the rows.
// Reads:       logits [num_rows, num_classes], 1 pass, and the one at the label again;
//              labels and alpha [num_rows]
// Writes:      row_loss; row_cross_entropy, row_max, row_sum_exp where asked for; [num_rows]
// Shared mem:  none for a warp; merge_block's for a block
// Sync:        shuffles within a warp; merge_block's two barriers, which the whole block reaches,
//              since all its threads hold the same row
// Numerics:    acc_t; each lane keeps a running maximum and sums relative to it, which merge in a
//              fixed order. -inf and NaN: see RowStats
// Assumes:     blockDim.x is a multiple of 32 (launch.cu)
// Used when:   the class stride is not above the row stride; a warp up to kMaxWarpClasses classes,
//              kSize > 1 where every row is aligned
template <typename scalar_t, typename acc_t, int kSize, Team kTeam>
__global__ void outlier_exposure_forward_rows_kernel(ForwardArgs<scalar_t, acc_t> args) {
  const TeamPosition<kTeam> team;
  const int64_t num_rows = args.layout.num_rows();
  for (int64_t row = team.first_row; row < num_rows; row += team.row_stride) {
    const int64_t label = args.labels[row];
    const RowKind kind = args.labels.rule.kind(label);
    CUDA_KERNEL_ASSERT(kind != RowKind::kInvalid && "target must be a class or a mark");
    RowStats<acc_t> stats;
    if (args.is_active(row, kind)) {
      stats = lane_stats<kSize>(args, row, team.lane, team.lanes);
      stats = kTeam == Team::kWarp ? merge_warp(stats) : merge_block(stats);
    }
    if (team.lane == 0) {
      args.write_row(row, label, kind, stats);
    }
  }
}

// The gradient of every row, each logit read once and each gradient written once.
// Work split:  as the forward kernel's
// Reads:       logits [num_rows, num_classes], 1 pass; the statistics, labels, alpha and upstream
//              gradient of each row
// Writes:      grad_logits, 1 pass; zeros where a row does not count
// Shared mem:  none     Sync: none
// Numerics:    acc_t until the store: the upstream gradient multiplies before the cast
// Assumes:     blockDim.x is a multiple of 32
// Used when:   as the forward kernel; kSize > 1 where the rows of both tensors are aligned
template <typename scalar_t, typename acc_t, int kSize, Team kTeam>
__global__ void outlier_exposure_backward_rows_kernel(BackwardArgs<scalar_t, acc_t> args) {
  const TeamPosition<kTeam> team;
  const int64_t num_rows = args.layout.num_rows();
  const int64_t num_classes = args.layout.num_classes;
  const int64_t num_wide = kSize > 1 ? num_classes / kSize * kSize : 0;
  for (int64_t row = team.first_row; row < num_rows; row += team.row_stride) {
    const int64_t label = args.labels[row];
    const RowGradient<acc_t> gradient = args.row_gradient(row, label, args.labels.rule.kind(label));
    const scalar_t* x = args.logits + args.layout.row_offset(row);
    scalar_t* grad = args.grad_logits + args.grad_layout.row_offset(row);
    for (int64_t cls = int64_t(team.lane) * kSize; cls < num_wide;
         cls += int64_t(team.lanes) * kSize) {
      const auto wide = load_vector<kSize>(x + cls);
      Vector<scalar_t, kSize> result;
      for (int i = 0; i < kSize; ++i) {
        result.values[i] =
            static_cast<scalar_t>(gradient(static_cast<acc_t>(wide.values[i]), cls + i));
      }
      store_vector(grad + cls, result);
    }
    for (int64_t cls = num_wide + team.lane; cls < num_classes; cls += team.lanes) {
      const auto logit = static_cast<acc_t>(x[args.layout.class_offset(cls)]);
      grad[args.grad_layout.class_offset(cls)] = static_cast<scalar_t>(gradient(logit, cls));
    }
  }
}

}  // namespace oe_ext::cuda
