// What the launchers share: how a kernel starts, the limits of a launch, and the counts that
// precede a forward.
#pragma once

#ifndef SIMT_CPU
#include <c10/cuda/CUDAException.h>
#endif

#include <algorithm>
#include <cstdint>

#include "launch_cuda.h"
#include "reduce.cuh"

namespace oe_ext::cuda {

// The CPU harness lowers both limits, to test inputs beyond them.
#ifdef SIMT_CPU
inline int64_t max_blocks() { return simt::max_blocks; }
inline int64_t max_stage_bytes() { return simt::max_stage_bytes; }
#else
constexpr int64_t max_blocks() { return kMaxBlocks; }

// Of a block on the current device: 60 KB on sm_75, 95 KB to 223 KB on newer ones.
inline int64_t max_stage_bytes() {
  int device = 0;
  int bytes = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - kStaticSharedBytes;
}
#endif

// The only place that starts a kernel; max_threads is its launch bound. In the CPU harness
// simt::launch starts it, and refuses a larger block, as a GPU would.
template <typename... Params, typename... Args>
void launch(const char* name, void (*kernel)(Params...), int max_threads, int64_t num_blocks,
            int num_threads, int64_t shared_bytes, Stream stream, const Args&... args) {
  const dim3 grid(static_cast<unsigned>(num_blocks));
  const dim3 block(static_cast<unsigned>(num_threads));
#ifdef SIMT_CPU
  (void)stream;
  simt::launch(name, max_threads, grid, block, static_cast<size_t>(shared_bytes), kernel, args...);
#else
  (void)name, (void)max_threads;
  if (shared_bytes > kDefaultStageBytes) {
    C10_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        static_cast<int>(shared_bytes)));
  }
  // clang-format off: it tears the brackets of a launch apart
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(args...);
  // clang-format on
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

#define OE_EXT_LAUNCH(kernel, ...) launch(#kernel, kernel, __VA_ARGS__)

inline int64_t blocks_for(int64_t num_items, int64_t items_per_block, int64_t limit) {
  return std::clamp<int64_t>((num_items + items_per_block - 1) / items_per_block, 1, limit);
}

constexpr int64_t kLabelBytesPerThread = 4 * kVectorBytes;  // that count_rows loads at once
constexpr int64_t kMaxRowsToCountTwice = 2048;  // up to this, every block counts all labels itself

// Where a forward leaves its partial sums; counts the rows first, if it must and they are many.
template <typename scalar_t, typename acc_t>
Partials count_first(const ForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream) {
  const int64_t num_rows = args.layout.num_rows();
  Partials partials;
  if (args.output.loss != nullptr) {
    partials.sums = static_cast<GroupSums*>(scratch);
  }
  if (args.needs_counts_first() && num_rows > 0) {
    partials.counts = reinterpret_cast<GroupCounts*>(static_cast<GroupSums*>(scratch) + kMaxBlocks);
    partials.num_counts = 1;
    partials.counted = num_rows > kMaxRowsToCountTwice;
    if (partials.counted) {
      partials.num_counts = static_cast<int>(blocks_for(num_rows * args.labels.element_size(),
                                                        kReduceThreads * kLabelBytesPerThread,
                                                        std::min(kMaxCountPartials, max_blocks())));
      OE_EXT_LAUNCH(outlier_exposure_count_rows_kernel<acc_t>, kReduceThreads, partials.num_counts,
                    kReduceThreads, 0, stream, args.labels, args.class_weights, num_rows,
                    partials.counts);
    }
  }
  return partials;
}

}  // namespace oe_ext::cuda
