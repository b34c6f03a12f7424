#include "launch_cpu.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <c10/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdint>
#include <limits>

#include "tasks.h"

namespace oe_ext::cpu {
namespace {

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

template <typename scalar_t, typename acc_t>
int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
  TORCH_CHECK(args.class_weights.data == nullptr ||
                  args.layout.num_classes <= std::numeric_limits<int32_t>::max(),
              "outlier_exposure_loss: on the CPU, weight may be of at most 2^31 - 1 classes, got ",
              args.layout.num_classes);
  return run_forward(args, [&](const GroupDivisors& divisors) {
    if (args.grad_logits != nullptr) {
      populate_gradient(args.grad_logits, args.layout.num_rows() * args.layout.num_classes);
    }
    const auto run_tile = chosen_kernels().template of<scalar_t>().forward;
    return for_each_tile<scalar_t, acc_t>(args.layout,
                                          args.grad_logits != nullptr ? &args.grad_layout : nullptr,
                                          [&](const Tiling& tiling, int64_t tile, acc_t* scratch) {
                                            return run_tile(args, tiling, tile, divisors, scratch);
                                          });
  });
}

template <typename scalar_t, typename acc_t>
int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
  if (args.is_done()) {
    return -1;
  }
  if (!args.has_unit_gradient) {
    populate_gradient(args.grad_logits, args.layout.num_rows() * args.layout.num_classes);
  }
  const auto run_tile = chosen_kernels().template of<scalar_t>().backward;
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
