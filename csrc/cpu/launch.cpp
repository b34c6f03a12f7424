#include "launch.h"

#include <ATen/Parallel.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <vector>

#include "tiles.h"

namespace oe_ext::cpu {
namespace {

// Below this many logits, or labels, a second thread costs more than it brings.
constexpr int64_t kGrainElements = 32768;

// What one task finds out; tasks are cut by the shape alone and merged in their order.
struct TaskResult {
  int64_t bad_row = -1;  // the first row with an illegal label
  GroupSums sums;
};

// Runs body(task) for every task and merges what they return.
template <typename Body>
TaskResult for_each_task(int64_t num_tasks, int64_t elements_per_task, const Body& body) {
  std::vector<TaskResult> results(num_tasks);
  at::parallel_for(0, num_tasks, std::max<int64_t>(1, kGrainElements / elements_per_task),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t task = begin; task < end; ++task) {
                       results[task] = body(task);
                     }
                   });
  TaskResult total;
  for (const TaskResult& result : results) {
    if (result.bad_row >= 0) {
      total.bad_row = result.bad_row;
      break;
    }
    total.sums.merge(result.sums);
  }
  return total;
}

template <typename Args, typename Body>
TaskResult for_each_tile(const Args& args, const Body& body) {
  const Tiling tiling(args.layout);
  return for_each_task(tiling.num_tiles, tiling.tile_rows * args.layout.num_classes,
                       [&](int64_t index) {
                         Tile tile(args, tiling, index);
                         TaskResult result;
                         result.bad_row = tile.bad_row;
                         if (tile.bad_row < 0) {
                           body(tile, result.sums);
                         }
                         return result;
                       });
}

TaskResult count_rows(const Labels& labels, int64_t num_rows) {
  const int64_t num_tasks = (num_rows + kGrainElements - 1) / kGrainElements;
  return for_each_task(num_tasks, kGrainElements, [&](int64_t task) {
    const int64_t begin = task * kGrainElements;
    const int64_t end = std::min(begin + kGrainElements, num_rows);
    TaskResult result;
    for (int64_t row = begin; row < end; ++row) {
      const RowKind kind = labels.rule.kind(labels[row]);
      if (kind == RowKind::kInvalid) {
        result.bad_row = row;
        break;
      }
      result.sums.counts.add(kind);
    }
    return result;
  });
}

}  // namespace

template <typename scalar_t, typename acc_t>
int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
  GroupCounts counts;
  if (args.needs_counts_first()) {
    const TaskResult counted = count_rows(args.labels, args.layout.num_rows());
    if (counted.bad_row >= 0) {
      return counted.bad_row;
    }
    counts = counted.sums.counts;
  }
  const TaskResult result = for_each_tile(
      args, [&](Tile& tile, GroupSums& sums) { forward_tile(args, tile, counts, sums); });
  if (result.bad_row < 0 && args.output.loss != nullptr) {
    args.output.write(result.sums, args.reduction, args.layout.num_rows());
  }
  return result.bad_row;
}

template <typename scalar_t, typename acc_t>
int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
  if (args.is_done()) {
    return -1;
  }
  return for_each_tile(args, [&](Tile& tile, GroupSums&) { backward_tile(args, tile); }).bad_row;
}

#define OE_EXT_INSTANTIATE(scalar_t, acc_t)                           \
  template int64_t forward(const ForwardArgs<scalar_t, acc_t>& args); \
  template int64_t backward(const BackwardArgs<scalar_t, acc_t>& args)
OE_EXT_INSTANTIATE(double, double);
OE_EXT_INSTANTIATE(float, float);
OE_EXT_INSTANTIATE(c10::Half, float);
OE_EXT_INSTANTIATE(c10::BFloat16, float);
#undef OE_EXT_INSTANTIATE

}  // namespace oe_ext::cpu
