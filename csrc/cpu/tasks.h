// Runs the tasks of the CPU kernels on torch's threads. For the launchers, which include it once.
#pragma once

#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <vector>

#include "kernels.h"

namespace oe_ext::cpu {

// The kernels for the instruction set in use.
const Kernels& chosen_kernels();

// Below this many logits, or labels, a second thread costs more than it saves.
constexpr int64_t kGrainLogits = 32768;
constexpr int64_t kGrainLabels = 262144;

// Uninitialised memory of one thread.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}

  T* data() const { return data_.get(); }

 private:
  struct Delete {
    void operator()(T* data) const { ::operator delete(data, std::align_val_t(64)); }
  };
  std::unique_ptr<T, Delete> data_;
};

// at::parallel_for on torch's own threads. The version in torch's header runs on one thread in a
// file compiled without OpenMP, and on the threads of a second OpenMP in a file linked with another
// OpenMP than torch's.
//
// torch_parallel_for turns any exception into an error code, so the first exception is kept here
// and rethrown.
template <typename Body>
void parallel_for(int64_t num_tasks, int64_t grain, const Body& body) {
  if (num_tasks <= grain) {
    body(int64_t(0), num_tasks);
    return;
  }
  struct Context {
    const Body& body;
    std::mutex mutex;
    std::exception_ptr error;
  } context{body, {}, nullptr};
  const auto run = [](int64_t begin, int64_t end, void* data) {
    auto& context = *static_cast<Context*>(data);
    try {
      context.body(begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(context.mutex);
      if (!context.error) {
        context.error = std::current_exception();
      }
    }
  };
  const AOTITorchError failed = torch_parallel_for(0, num_tasks, grain, run, &context);
  if (context.error) {
    std::rethrow_exception(context.error);
  }
  TORCH_CHECK(failed == 0, "outlier_exposure_loss: torch could not run the CPU kernels' threads");
}

// Runs body(begin, end, results) over ranges of tasks and merges the results of all.
template <typename Body>
TaskResult for_each_task(int64_t num_tasks, int64_t grain, const Body& body) {
  std::vector<TaskResult> results(num_tasks);
  parallel_for(num_tasks, std::max<int64_t>(1, grain),
               [&](int64_t begin, int64_t end) { body(begin, end, results.data()); });
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

template <typename scalar_t, typename acc_t>
TaskResult count_all_rows(const RowArgs<scalar_t, acc_t>& args) {
  const int64_t num_rows = args.layout.num_rows();
  const int64_t num_tasks = (num_rows + kGrainLabels - 1) / kGrainLabels;
  const auto run = chosen_kernels().template of<scalar_t>().count_rows;
  return for_each_task(num_tasks, 1, [&](int64_t begin, int64_t end, TaskResult* results) {
    for (int64_t task = begin; task < end; ++task) {
      results[task] = run(args.labels, args.class_weights, task * kGrainLabels,
                          std::min((task + 1) * kGrainLabels, num_rows));
    }
  });
}

// What the gradient of a forward divides by.
struct ForwardDivisors {
  GroupDivisors divisors;
  int64_t bad_row = -1;               // the first row with an illegal label, if rows were counted
  std::optional<GroupCounts> counts;  // of all rows, if they were counted

  template <typename scalar_t, typename acc_t>
  explicit ForwardDivisors(const ForwardArgs<scalar_t, acc_t>& args) : divisors(args.divisors()) {
    if (!args.needs_counts_first()) {
      return;
    }
    const int64_t num_rows = args.layout.num_rows();
    if (args.divisor_rule.counts_all() && !args.labels.rule.has_ignore_index &&
        args.class_weights.data == nullptr) {
      divisors = args.divisor_rule({static_cast<double>(num_rows), 0});  // every legal row counts
      return;
    }
    const TaskResult counted = count_all_rows(args);
    bad_row = counted.bad_row;
    counts = counted.sums.counts;
    divisors = args.divisor_rule(*counts);
  }
};

// Runs a forward: run(divisors) gives the result of all rows, whose loss and counts are written.
// Returns the first row with an illegal label, or -1.
template <typename scalar_t, typename acc_t, typename Run>
int64_t run_forward(const ForwardArgs<scalar_t, acc_t>& args, const Run& run) {
  const ForwardDivisors first(args);
  if (first.bad_row >= 0) {
    return first.bad_row;
  }
  TaskResult result = run(first.divisors);
  if (result.bad_row < 0 && args.output.loss != nullptr) {
    result.sums.counts = first.counts.value_or(result.sums.counts);
    args.output.write(result.sums, args.divisor_rule, args.counts, args.layout.num_rows());
  }
  return result.bad_row;
}

}  // namespace oe_ext::cpu
