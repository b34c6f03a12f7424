#include "launch_cpu.h"

#include <ATen/Version.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>
#include <torch/csrc/stable/c/shim.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <vector>

#include "kernels.h"

namespace oe_ext::cpu {
namespace {

// Below this many logits, or labels, a second thread costs more than it saves.
constexpr int64_t kGrainLogits = 32768;
constexpr int64_t kGrainLabels = 262144;

struct Choice {
  const char* name;
  const Kernels* kernels;
};

// Chooses like torch: the widest instruction set of the processor, unless ATEN_CPU_CAPABILITY names
// a lower one. A name that is not known here means more than AVX2.
Choice choose_kernels() {
#if defined(__x86_64__)
  const std::string capability = at::get_cpu_capability();
  // clang before 15 does not know the name of F16C.
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  const bool has_f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c;
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && capability != "AVX2" && capability != "DEFAULT") {
    return {"AVX512", &kKernelsAvx512};
  }
  if (has_avx2 && capability != "DEFAULT") {
    return {"AVX2", &kKernelsAvx2};
  }
#endif
  return {"DEFAULT", &kKernelsDefault};
}

const Choice& chosen() {
  static const Choice choice = choose_kernels();
  return choice;
}

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

// Asks the system for the pages of a large gradient in a few calls. Otherwise each page causes a
// page fault, which costs more than the arithmetic of its 4 KiB. glibc maps every allocation above
// kFreshBytes anew, so those pages are known to be missing.
constexpr int64_t kFreshBytes = int64_t(32) << 20;
constexpr int64_t kPopulateBytes = int64_t(1) << 20;  // per call: fits a cache

void populate([[maybe_unused]] void* data, [[maybe_unused]] int64_t num_bytes) {
#if defined(__linux__) && defined(MADV_POPULATE_WRITE)
  constexpr uintptr_t kPage = 4096;
  const auto first = reinterpret_cast<uintptr_t>(data) / kPage * kPage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + num_bytes) / kPage * kPage;
  if (first < end) {
    // Linux before 5.14 refuses; its pages then fault one by one.
    madvise(reinterpret_cast<void*>(first), end - first, MADV_POPULATE_WRITE);
  }
#endif
}

template <typename scalar_t>
void populate_gradient(scalar_t* grad, int64_t num_elements) {
  const int64_t num_bytes = num_elements * static_cast<int64_t>(sizeof(scalar_t));
  if (num_bytes <= kFreshBytes) {
    return;
  }
  parallel_for((num_bytes + kPopulateBytes - 1) / kPopulateBytes, 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t offset = i * kPopulateBytes;
                   populate(reinterpret_cast<char*>(grad) + offset,
                            std::min(kPopulateBytes, num_bytes - offset));
                 }
               });
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
TaskResult count_rows(const RowArgs<scalar_t, acc_t>& args) {
  const int64_t num_rows = args.layout.num_rows();
  const int64_t num_tasks = (num_rows + kGrainLabels - 1) / kGrainLabels;
  const auto run = chosen().kernels->template of<scalar_t>().count_rows;
  return for_each_task(num_tasks, 1, [&](int64_t begin, int64_t end, TaskResult* results) {
    for (int64_t task = begin; task < end; ++task) {
      results[task] = run(args.labels, args.class_weights, task * kGrainLabels,
                          std::min((task + 1) * kGrainLabels, num_rows));
    }
  });
}

// Runs run(tiling, tile, scratch) for every tile.
template <typename scalar_t, typename acc_t, typename Run>
TaskResult for_each_tile(const RowLayout& layout, const RowLayout* grad_layout, const Run& run) {
  const Tiling tiling(layout, grad_layout, sizeof(acc_t));
  // Labels are held in integers as wide as the type of the arithmetic.
  TORCH_CHECK(tiling.long_rows || sizeof(acc_t) == 8 ||
                  layout.num_classes <= std::numeric_limits<int32_t>::max(),
              "outlier_exposure_loss: on the CPU, more than 2^31 - 1 classes need logits that are "
              "contiguous along them, got ",
              layout.num_classes, " classes with a stride of ", layout.class_stride);
  const int64_t grain =
      kGrainLogits / (tiling.tile_rows * std::max<int64_t>(1, layout.num_classes));
  return for_each_task(tiling.num_tiles(), grain,
                       [&](int64_t begin, int64_t end, TaskResult* results) {
                         const Scratch<acc_t> scratch(tiling.scratch_size());
                         for (int64_t tile = begin; tile < end; ++tile) {
                           results[tile] = run(tiling, tile, scratch.data());
                         }
                       });
}

}  // namespace

const char* capability() { return chosen().name; }

template <typename scalar_t, typename acc_t>
int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
  TORCH_CHECK(args.class_weights.data == nullptr ||
                  args.layout.num_classes <= std::numeric_limits<int32_t>::max(),
              "outlier_exposure_loss: on the CPU, weight may be of at most 2^31 - 1 classes, got ",
              args.layout.num_classes);
  GroupDivisors divisors = args.divisors();
  GroupCounts counts;
  if (args.needs_counts_first()) {
    const TaskResult counted = count_rows(args);
    if (counted.bad_row >= 0) {
      return counted.bad_row;
    }
    counts = counted.sums.counts;
    divisors = args.divisor_rule(counts);
  }
  if (args.grad_logits != nullptr) {
    populate_gradient(args.grad_logits, args.layout.num_rows() * args.layout.num_classes);
  }
  const auto run_tile = chosen().kernels->template of<scalar_t>().forward;
  TaskResult result = for_each_tile<scalar_t, acc_t>(
      args.layout, args.grad_logits != nullptr ? &args.grad_layout : nullptr,
      [&](const Tiling& tiling, int64_t tile, acc_t* scratch) {
        return run_tile(args, tiling, tile, divisors, scratch);
      });
  if (args.needs_counts_first()) {
    result.sums.counts = counts;
  }
  if (result.bad_row < 0 && args.output.loss != nullptr) {
    args.output.write(result.sums, args.divisor_rule, args.counts, args.layout.num_rows());
  }
  return result.bad_row;
}

template <typename scalar_t, typename acc_t>
int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
  if (args.is_done()) {
    return -1;
  }
  if (!args.has_unit_gradient) {
    populate_gradient(args.grad_logits, args.layout.num_rows() * args.layout.num_classes);
  }
  const auto run_tile = chosen().kernels->template of<scalar_t>().backward;
  return for_each_tile<scalar_t, acc_t>(args.layout, &args.grad_layout,
                                        [&](const Tiling& tiling, int64_t tile, acc_t* scratch) {
                                          return run_tile(args, tiling, tile, scratch);
                                        })
      .bad_row;
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
