// The kernels for logits whose neighbours in memory are classes: [N, C], channels_last.
#pragma once

#include "units.cuh"

namespace oe_ext::cuda {

// The largest block, and the launch bound.
constexpr int kLogMaxRowsThreads = 9;
constexpr int kMaxRowsThreads = 1 << kLogMaxRowsThreads;

// The threads that process a row together: some lanes of a warp, or the whole block; 2^log_lanes. A
// block processes several rows at once if its teams are smaller.
struct Team {
  __device__ explicit Team(int log_lanes)
      : log_lanes(log_lanes),
        lanes(1 << log_lanes),
        lane(static_cast<int>(threadIdx.x) & (lanes - 1)),
        index(static_cast<int>(threadIdx.x) >> log_lanes),
        teams(static_cast<int>(blockDim.x) >> log_lanes) {}

  // The first row of the team, and the step to its next row.
  __device__ int64_t first_row() const { return static_cast<int64_t>(blockIdx.x) * teams + index; }
  __device__ int64_t row_step() const { return static_cast<int64_t>(gridDim.x) * teams; }

  template <typename T>
  __device__ T merge(const T& value) const {
    return lanes <= kWarpSize ? merge_lanes(value, lanes) : merge_block(value);
  }

  int log_lanes;
  int lanes;
  int lane;   // of this thread in its team
  int index;  // of the team in its block
  int teams;
};

// How a team walks a row of the logits or of their gradient. Lane i takes the units i, i + lanes,
// ..., of kSize classes each, and at most one class of those before and after all units. If
// kSize > 1, the classes are contiguous, and units begin where the address is a multiple of their
// size; there are lanes enough for the classes that fill no unit, at most 2 (kSize - 1).
template <int kSize>
struct RowWalk {
  template <typename scalar_t>
  __device__ RowWalk(const scalar_t* row, int64_t num_classes, const Team& team)
      : team(team),
        head(elements_to_boundary(row)),
        num_units(num_classes > head ? (num_classes - head) / kSize : 0),
        count(static_cast<int>((num_units - team.lane + team.lanes - 1) >> team.log_lanes)),
        rest(team.lane < head ? team.lane : num_units * kSize + team.lane),
        has_rest(kSize > 1 && rest < num_classes) {}

  template <typename scalar_t>
  __device__ static int elements_to_boundary(const scalar_t* row) {
    const uintptr_t elements = reinterpret_cast<uintptr_t>(row) / sizeof(scalar_t);
    return static_cast<int>(-elements & (kSize - 1));
  }

  // The units of this lane.
  template <typename scalar_t>
  __device__ Units<scalar_t> units(scalar_t* row, const RowLayout& layout) const {
    return {row + layout.class_offset(head + static_cast<int64_t>(team.lane) * kSize),
            layout.class_offset(static_cast<int64_t>(team.lanes) * kSize)};
  }

  // Is a class in one of the units?
  __device__ bool in_units(int64_t cls) const {
    return cls >= head && cls < head + num_units * kSize;
  }

  // The lane that has a class.
  __device__ int owner(int64_t cls) const {
    const int64_t in_turn = ((cls - head) / kSize) & (team.lanes - 1);
    const int64_t at_end = cls < head ? cls : cls - num_units * kSize;
    return static_cast<int>(in_units(cls) ? in_turn : at_end);
  }

  // Where the owner has a class that is in its units.
  __device__ LabelPlace place(int64_t cls) const {
    return {((cls - head) / kSize) >> team.log_lanes, static_cast<int>(cls - head) & (kSize - 1)};
  }

  // Loads the logit of the class that fills no unit, and raises the maximum to it.
  template <typename scalar_t, typename acc_t>
  __device__ acc_t load_rest(const scalar_t* row, acc_t& max) const {
    const acc_t logit = has_rest ? static_cast<acc_t>(row[rest]) : acc_t(0);
    max = has_rest ? std::fmax(max, logit) : max;
    return logit;
  }

  template <typename acc_t>
  __device__ void add_rest(acc_t logit, int64_t label, RowSums<acc_t>& sums) const {
    if (has_rest) {
      sums.add(logit);
      sums.label_logit = rest == label ? logit : sums.label_logit;
    }
  }

  template <typename scalar_t, typename acc_t>
  __device__ void write_rest(const RowGradient<acc_t>& gradient, acc_t logit, int64_t label,
                             scalar_t* grad) const {
    if (has_rest) {
      grad[rest] = static_cast<scalar_t>(gradient(logit, rest == label));
    }
  }

  const Team& team;
  int head;  // the number of classes before all units
  int64_t num_units;
  int count;     // of this lane's units
  int64_t rest;  // this lane's class that fills no unit, if has_rest
  bool has_rest;
};

template <typename acc_t>
struct RowMax {
  acc_t value = std::numeric_limits<acc_t>::lowest();

  __device__ void merge(const RowMax& other) { value = std::fmax(value, other.value); }
};

// Sums relative to the maximum of the row.
template <typename acc_t>
struct RowStats {
  acc_t sum_exp = 0;
  acc_t mean_shifted = 0;

  __device__ void merge(const RowStats& other) {
    sum_exp += other.sum_exp;
    mean_shifted += other.mean_shifted;
  }
};

// The loss and the statistics of every row and, on request, the gradient for an upstream gradient
// of 1.
// Work split:  one team of 2^log_lanes threads per row; blocks stride over the rows
// Reads:       logits [num_rows, num_classes], 1 pass, and for the gradient a second one if a row
//              does not fit the stage (from L2: the block has just read them); labels and alpha
//              [num_rows]; class_weights [num_classes]; partials.counts, or all labels
// Writes:      on request row_loss, row_cross_entropy, row_max, row_sum_exp, [num_rows], and
//              grad_logits, 1 pass, zeros for rows that do not count;
//              partials.sums [gridDim.x]
// Shared mem:  merge_block's; dynamic: the stage, `capacity` units per thread
// Sync:        shuffles within a warp and the barriers of merge_block. All threads reach them: the
//              trip count of the loop over rows depends on the block alone
// Numerics:    acc_t; each lane keeps a maximum and sums relative to it, which merge in a fixed
//              order. -inf and NaN: see RowSums. The sums over rows are in double
// Assumes:     blockDim.x is a multiple of 32, at most kMaxRowsThreads; 2^log_lanes is up to 32, or
//              blockDim.x (launch_cuda.cu)
// Used when:   the class stride is not above the row stride; kSize > 1 if the classes of a row are
//              contiguous, and each row of the gradient is aligned like that of the logits
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxRowsThreads, kMinBlocks)
    outlier_exposure_forward_rows_kernel(ForwardArgs<scalar_t, acc_t> args, Partials partials,
                                         int log_lanes, int capacity) {
  OE_EXT_DYNAMIC_SHARED(slots);
  const Stage<acc_t, kSize> stage(slots, capacity);
  const Divisors<acc_t> divisors(forward_divisors(args, partials));
  const Team team(log_lanes);
  const int64_t num_rows = args.layout.num_rows();
  // Does the stage hold a whole row?
  const bool fits = args.layout.num_classes / kSize <= static_cast<int64_t>(capacity) * team.lanes;
  const double share = 1.0 / static_cast<double>(args.num_classes());
  ThreadSums sums;
  int64_t next_label = team.first_row() < num_rows ? args.labels[team.first_row()] : 0;
  // Depends on the block alone: teams without a row of their own go on with the others.
  for (int64_t row = team.first_row(); (row - team.index) < num_rows; row += team.row_step()) {
    const bool exists = row < num_rows;
    const int64_t label = next_label;  // loaded while the row before was processed
    if (row + team.row_step() < num_rows) {
      next_label = args.labels[row + team.row_step()];
    }
    const RowKind kind = exists ? args.labels.rule.kind(label) : RowKind::kIgnored;
    CUDA_KERNEL_ASSERT(kind != RowKind::kInvalid && "target must be a class or a special label");
    const scalar_t* x = args.logits + (exists ? args.layout.row_offset(row) : 0);
    const RowWalk<kSize> walk(x, args.layout.num_classes, team);
    const int64_t cls = args.class_here(label, kind);
    const int owner = cls >= 0 ? walk.owner(cls) : 0;
    const LabelPlace place[1] = {team.lane == owner && walk.in_units(cls) ? walk.place(cls)
                                                                          : LabelPlace()};
    const bool active = args.is_active(args.coefficients(row, label, kind), kind);

    const auto units = walk.units(x, args.layout);
    RowSums<acc_t> part[1];  // of this lane
    acc_t rest_logit = 0;
    if constexpr (kSize > 1) {
      if (active) {
        rest_logit = walk.load_rest(x, part[0].max);
      }
    }
    // Over the whole row, if it is there: the backward's exponentials will have the same bits.
    const auto merge_max = [&](acc_t& max) { max = team.merge(RowMax<acc_t>{max}).value; };
    sum_units(
        units, walk.count, active, stage, capacity, place,
        [&](acc_t(&max)[1]) {
          if (fits) {
            merge_max(max[0]);
          }
        },
        part);
    acc_t max = part[0].max;
    if (!fits) {  // every lane has units
      merge_max(max);
      part[0].raise_to(max, static_cast<int64_t>(walk.count) * kSize);
    }
    if constexpr (kSize > 1) {
      if (active) {
        walk.add_rest(rest_logit, cls, part[0]);
      }
    }
    const RowStats<acc_t> mine = {static_cast<acc_t>(part[0].sum_exp),
                                  static_cast<acc_t>(part[0].sum_shifted * share)};
    const RowStats<acc_t> stats = team.merge(mine);
    const auto coefficients = args.coefficients(row, label, kind);
    if (exists && team.lane == owner) {
      const acc_t label_shifted = cls >= 0 ? part[0].label_logit - max : acc_t(0);
      const acc_t loss = args.write_row(row, coefficients, kind, active, max, stats.sum_exp,
                                        label_shifted, stats.mean_shifted);
      sums.add(kind, static_cast<double>(loss));
    }
    if (exists && args.grad_logits != nullptr) {
      RowGradient<acc_t> gradient[1];
      if (coefficients.counts) {
        gradient[0] = RowGradient<acc_t>::of_row(
            max,
            args.gradient_coefficients(coefficients, stats.sum_exp, acc_t(1), divisors.of(kind)),
            true);
      }
      scalar_t* grad = args.grad_logits + args.grad_layout.row_offset(row);
      const auto grad_units = walk.units(grad, args.grad_layout);
      if (!coefficients.counts) {
        write_zeros<kSize>(walk.count, grad_units);
      } else if (fits) {
        subtract_labels(stage, gradient, place);
        write_from_stage(stage, walk.count, gradient, grad_units);
      } else {
        write_from_logits<1, kSize>(units, walk.count, gradient, place, grad_units);
      }
      if constexpr (kSize > 1) {
        walk.write_rest(gradient[0], rest_logit, cls, grad);
      }
    }
  }
  sums.leave(partials);
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
    outlier_exposure_backward_rows_kernel(BackwardArgs<scalar_t, acc_t> args, int log_lanes) {
  if (args.is_done()) {
    return;
  }
  const Team team(log_lanes);
  const int64_t num_rows = args.layout.num_rows();
  for (int64_t row = team.first_row(); row < num_rows; row += team.row_step()) {
    int64_t cls;
    const RowGradient<acc_t> gradient[1] = {backward_gradient(args, row, cls)};
    const scalar_t* x = args.logits + args.layout.row_offset(row);
    const RowWalk<kSize> walk(x, args.layout.num_classes, team);
    const LabelPlace place[1] = {
        walk.in_units(cls) && team.lane == walk.owner(cls) ? walk.place(cls) : LabelPlace()};
    scalar_t* grad = args.grad_logits + args.grad_layout.row_offset(row);
    const auto grad_units = walk.units(grad, args.grad_layout);
    acc_t rest_logit = 0;
    if (gradient[0].counts()) {
      write_from_logits<1, kSize>(walk.units(x, args.layout), walk.count, gradient, place,
                                  grad_units);
      if constexpr (kSize > 1) {
        acc_t max = 0;
        rest_logit = walk.load_rest(x, max);
      }
    } else {
      write_zeros<kSize>(walk.count, grad_units);
    }
    if constexpr (kSize > 1) {
      walk.write_rest(gradient[0], rest_logit, cls, grad);
    }
  }
}

}  // namespace oe_ext::cuda
