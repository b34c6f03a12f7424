// The kernels for logits whose neighbours in memory are classes: [N, C], channels_last.
#pragma once

#include "device.cuh"

namespace oe_ext::cuda {

// The largest block, and the launch bound. 512 threads would leave each 128 registers, and double
// takes up to 204.
constexpr int kMaxRowsThreads = 256;

// The threads that process a row together: some lanes of a warp, a power of two, or the whole
// block. A block processes blockDim.x / lanes rows at once.
struct Team {
  __device__ explicit Team(int lanes)
      : lanes(lanes),
        lane(static_cast<int>(threadIdx.x) % lanes),
        index(static_cast<int>(threadIdx.x) / lanes),
        teams(static_cast<int>(blockDim.x) / lanes) {}

  // The first row of the block, and the step to its next row.
  __device__ int64_t first_row() const { return static_cast<int64_t>(blockIdx.x) * teams; }
  __device__ int64_t row_step() const { return static_cast<int64_t>(gridDim.x) * teams; }

  template <typename T>
  __device__ T merge(T value) const {
    return lanes <= kWarpSize ? merge_lanes(value, lanes) : merge_block(value);
  }

  int lanes;
  int lane;   // of this thread in its team
  int index;  // of the team in its block
  int teams;
};

// How a team walks a row of the logits or of their gradient: lane i takes the units i, i + lanes,
// ..., of kSize classes each, then at most one of the classes that fill no unit. If kSize > 1, the
// classes are contiguous, the row is aligned to kSize elements, and there are at least kSize lanes.
template <int kSize>
struct RowWalk {
  __device__ RowWalk(int64_t num_classes, const Team& team)
      : num_units(num_classes / kSize),
        lane(team.lane),
        lanes(team.lanes),
        rest(num_units * kSize + team.lane),
        has_rest(rest < num_classes) {}

  // The unit that the lane takes in this step.
  __device__ int64_t unit(int64_t step) const { return lane + step * lanes; }

  int64_t num_units;
  int lane;
  int lanes;
  int64_t rest;  // the class that fills no unit, if has_rest
  bool has_rest;
};

template <int kSize, typename scalar_t>
__device__ Vector<scalar_t, kSize> load_unit(const scalar_t* row, const RowLayout& layout,
                                             int64_t unit) {
  return load_vector<kSize>(row + layout.class_offset(unit * kSize));
}

// How many units a thread loads at once.
template <int kSize>
constexpr int kUnitsAtOnce = static_cast<int>(kClassBlock) / kSize;

// The statistics of one lane's share of a row. `stage` keeps its units.
template <int kSize, typename acc_t, typename scalar_t>
__device__ RowStats<acc_t> lane_stats(const scalar_t* row, const RowLayout& layout,
                                      const RowWalk<kSize>& walk,
                                      const Stage<Vector<scalar_t, kSize>>& stage) {
  constexpr int kAtOnce = kUnitsAtOnce<kSize>;
  RowStats<acc_t> stats;
  for (int64_t step = 0; walk.unit(step) < walk.num_units; step += kAtOnce) {
    Vector<scalar_t, kSize> units[kAtOnce];
    acc_t max = stats.max;
    for (int i = 0; i < kAtOnce; ++i) {
      if (walk.unit(step + i) < walk.num_units) {
        units[i] = load_unit<kSize>(row, layout, walk.unit(step + i));
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      if (walk.unit(step + i) < walk.num_units) {
        if (stage.keeps()) {
          stage.put(step + i, units[i]);
        }
        for (int k = 0; k < kSize; ++k) {
          const auto x = static_cast<acc_t>(units[i].values[k]);
          max = x > max ? x : max;
        }
      }
    }
    auto block = RowStats<acc_t>::with_max(max);
    for (int i = 0; i < kAtOnce; ++i) {
      if (walk.unit(step + i) < walk.num_units) {
        for (int k = 0; k < kSize; ++k) {
          block.add(static_cast<acc_t>(units[i].values[k]));
        }
      }
    }
    stats.merge(block);
  }
  if constexpr (kSize > 1) {
    if (walk.has_rest) {
      stats.push(static_cast<acc_t>(row[layout.class_offset(walk.rest)]));
    }
  }
  return stats;
}

// Writes the gradients of one lane's share of a row: zeros if the row does not count, without
// reading its logits. The logits come from `stage`, if it keeps them.
template <int kSize, typename scalar_t, typename acc_t>
__device__ void write_lane_gradients(const RowGradient<acc_t>& gradient, const scalar_t* row,
                                     const RowLayout& layout, scalar_t* grad_row,
                                     const RowLayout& grad_layout, const RowWalk<kSize>& walk,
                                     const Stage<Vector<scalar_t, kSize>>& stage) {
  constexpr int kAtOnce = kUnitsAtOnce<kSize>;
  for (int64_t step = 0; walk.unit(step) < walk.num_units; step += kAtOnce) {
    Vector<scalar_t, kSize> units[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      if (gradient.active && walk.unit(step + i) < walk.num_units) {
        units[i] = stage.keeps() ? stage.get(step + i)
                                 : load_unit<kSize>(row, layout, walk.unit(step + i));
      }
    }
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t unit = walk.unit(step + i);
      if (unit < walk.num_units) {
        Vector<scalar_t, kSize> result;
        for (int k = 0; k < kSize; ++k) {
          const auto x = gradient.active ? static_cast<acc_t>(units[i].values[k]) : acc_t(0);
          result.values[k] = static_cast<scalar_t>(gradient(x, unit * kSize + k));
        }
        store_vector(grad_row + grad_layout.class_offset(unit * kSize), result);
      }
    }
  }
  if constexpr (kSize > 1) {
    if (walk.has_rest) {
      const auto x =
          gradient.active ? static_cast<acc_t>(row[layout.class_offset(walk.rest)]) : acc_t(0);
      grad_row[grad_layout.class_offset(walk.rest)] = static_cast<scalar_t>(gradient(x, walk.rest));
    }
  }
}

// The loss and the statistics of every row and, on request, the gradient for an upstream gradient
// of 1.
// Work split:  one team of `lanes` threads per row; blocks stride over the rows
// Reads:       logits [num_rows, num_classes], 1 pass, plus the logit at the label; for the
//              gradient again those that fill no vector, and all if a row does not fit the stage
//              (from L2: the block has just read them); labels and alpha [num_rows];
//              class_weights [num_classes]; partials.counts
// Writes:      on request row_loss, row_cross_entropy, row_max, row_sum_exp, [num_rows], and
//              grad_logits, 1 pass, zeros for rows that do not count;
//              partials.sums [gridDim.x]
// Shared mem:  merge_block's; dynamic: the stage, for the units of blockDim.x / lanes rows, or none
// Sync:        shuffles within a warp and the barriers of merge_block. All threads reach them: the
//              trip count of the loop over rows depends on the block alone
// Numerics:    acc_t; each lane keeps a running maximum and sums relative to it, which merge in a
//              fixed order. -inf and NaN: see RowStats. The sums over rows are in double
// Assumes:     blockDim.x is a multiple of 32 and of lanes, at most kMaxRowsThreads; lanes is a
//              power of two up to 32, or blockDim.x (launch_cuda.cu)
// Used when:   the class stride is not above the row stride; kSize > 1 if every row of the logits
//              and of the gradient is aligned
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxRowsThreads, kMinBlocks)
    outlier_exposure_forward_rows_kernel(ForwardArgs<scalar_t, acc_t> args, Partials partials,
                                         int lanes, bool staged) {
  OE_EXT_DYNAMIC_SHARED(slots);
  const Stage<Vector<scalar_t, kSize>> stage(staged ? slots : nullptr);
  const GroupDivisors divisors = forward_divisors(args, partials);
  const Team team(lanes);
  const RowWalk<kSize> walk(args.layout.num_classes, team);
  const int64_t num_rows = args.layout.num_rows();
  GroupSums sums;
  for (int64_t first = team.first_row(); first < num_rows; first += team.row_step()) {
    const int64_t row = first + team.index;
    const bool exists = row < num_rows;
    const int64_t label = exists ? args.labels[row] : 0;
    const RowKind kind = exists ? args.labels.rule.kind(label) : RowKind::kIgnored;
    CUDA_KERNEL_ASSERT(kind != RowKind::kInvalid && "target must be a class or a special label");
    const scalar_t* x = args.logits + (exists ? args.layout.row_offset(row) : 0);
    const int64_t cls = args.class_here(label, kind);
    const auto coefficients = args.coefficients(row, label, kind);
    const bool active = args.is_active(coefficients, kind);
    RowStats<acc_t> stats;
    if (active) {
      stats = lane_stats<kSize, acc_t>(x, args.layout, walk, stage);
    }
    stats = team.merge(stats);
    if (exists && team.lane == 0) {
      const acc_t label_shifted = cls >= 0 ? logit_at(x, args.layout, cls) - stats.max : acc_t(0);
      const acc_t loss = args.write_row(row, coefficients, kind, active, stats, label_shifted);
      sums.add(kind, static_cast<double>(loss));
    }
    if (exists && args.grad_logits != nullptr) {
      write_lane_gradients<kSize>(
          args.row_gradient(coefficients, cls, kind, stats.max, stats.sum_exp, acc_t(1), divisors),
          x, args.layout, args.grad_logits + args.grad_layout.row_offset(row), args.grad_layout,
          walk, stage);
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
// Reads:       logits [num_rows, num_classes], 1 pass; the statistics, labels, alpha, class weight
//              and upstream gradient of each row. Only the upstream gradient, if it is 1 and the
//              forward wrote the gradient
// Writes:      grad_logits, 1 pass; zeros for rows that do not count
// Shared mem:  none     Sync: none
// Numerics:    acc_t until the store: the upstream gradient multiplies before the cast
// Assumes:     as the forward kernel
// Used when:   as the forward kernel
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxRowsThreads, kMinBlocks)
    outlier_exposure_backward_rows_kernel(BackwardArgs<scalar_t, acc_t> args, int lanes) {
  if (args.is_done()) {
    return;
  }
  const Stage<Vector<scalar_t, kSize>> no_stage(nullptr);
  const Team team(lanes);
  const RowWalk<kSize> walk(args.layout.num_classes, team);
  const int64_t num_rows = args.layout.num_rows();
  for (int64_t row = team.first_row() + team.index; row < num_rows; row += team.row_step()) {
    write_lane_gradients<kSize>(
        backward_gradient(args, row), args.logits + args.layout.row_offset(row), args.layout,
        args.grad_logits + args.grad_layout.row_offset(row), args.grad_layout, walk, no_stage);
  }
}

}  // namespace oe_ext::cuda
