#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "launch.h"
#ifndef SIMT_CPU
#include <c10/cuda/CUDAException.h>
#endif

#include <algorithm>
#include <cstdint>

#include "pixels.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace oe_ext::cuda {
namespace {

constexpr int64_t kMaxBlocks = int64_t(1) << 20;  // the kernels stride over what is left
constexpr int kMaxPartials = 1024;
constexpr int kReduceThreads = 256;
constexpr int kReduceRowsPerThread = 4;
constexpr int kPixelThreads = 256;
constexpr int kWarpTeamThreads = 128;      // four rows a block
constexpr int64_t kMaxWarpClasses = 1024;  // a warp reads such a row in 32 steps at most
constexpr int64_t kLongRow = 16384;

// The one place that starts a kernel. Under the CPU harness, simt::launch does.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), int64_t num_blocks, int num_threads, Stream stream,
            const Args&... args) {
  const dim3 grid(static_cast<unsigned>(num_blocks));
  const dim3 block(static_cast<unsigned>(num_threads));
#ifdef SIMT_CPU
  (void)stream;
  simt::launch(grid, block, simt::next_seed(), kernel, args...);
#else
  // clang-format off: it tears the brackets of a launch apart
  kernel<<<grid, block, 0, stream>>>(args...);
  // clang-format on
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

int64_t num_blocks(int64_t num_items, int64_t items_per_block) {
  return std::clamp<int64_t>((num_items + items_per_block - 1) / items_per_block, 1, kMaxBlocks);
}

// Can every row be read in 16-byte steps?
template <typename scalar_t>
bool rows_are_aligned(const scalar_t* data, const RowLayout& layout) {
  constexpr int64_t kSize = kVectorSize<scalar_t>;
  const bool outer = layout.num_outer == 1 || layout.outer_stride % kSize == 0;
  const bool inner = layout.num_inner == 1 || layout.inner_stride % kSize == 0;
  return layout.class_stride == 1 && outer && inner &&
         reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0;
}

// Starts one of the two kernels, by who walks a row.
template <typename Kernel, typename Args>
void launch_rows(Kernel warp_kernel, Kernel block_kernel, const Args& args, Stream stream) {
  const int64_t num_rows = args.layout.num_rows();
  if (args.layout.num_classes <= kMaxWarpClasses) {
    launch(warp_kernel, num_blocks(num_rows, kWarpTeamThreads / kWarpSize), kWarpTeamThreads,
           stream, args);
  } else {
    launch(block_kernel, num_blocks(num_rows, 1), args.layout.num_classes < kLongRow ? 256 : 512,
           stream, args);
  }
}

}  // namespace

template <typename scalar_t, typename acc_t>
void forward(const ForwardArgs<scalar_t, acc_t>& args, Stream stream) {
  constexpr int kSize = kVectorSize<scalar_t>;
  if (args.layout.rows_are_closest()) {
    launch(outlier_exposure_forward_pixels_kernel<scalar_t, acc_t>,
           num_blocks(args.layout.num_rows(), kPixelThreads), kPixelThreads, stream, args);
  } else if (rows_are_aligned(args.logits, args.layout)) {
    launch_rows(outlier_exposure_forward_rows_kernel<scalar_t, acc_t, kSize, Team::kWarp>,
                outlier_exposure_forward_rows_kernel<scalar_t, acc_t, kSize, Team::kBlock>, args,
                stream);
  } else {
    launch_rows(outlier_exposure_forward_rows_kernel<scalar_t, acc_t, 1, Team::kWarp>,
                outlier_exposure_forward_rows_kernel<scalar_t, acc_t, 1, Team::kBlock>, args,
                stream);
  }
}

template <typename scalar_t, typename acc_t>
void backward(const BackwardArgs<scalar_t, acc_t>& args, Stream stream) {
  constexpr int kSize = kVectorSize<scalar_t>;
  if (args.layout.rows_are_closest()) {
    launch(outlier_exposure_backward_pixels_kernel<scalar_t, acc_t>,
           num_blocks(args.layout.num_rows(), kPixelThreads), kPixelThreads, stream, args);
  } else if (rows_are_aligned(args.logits, args.layout) &&
             rows_are_aligned<scalar_t>(args.grad_logits, args.grad_layout)) {
    launch_rows(outlier_exposure_backward_rows_kernel<scalar_t, acc_t, kSize, Team::kWarp>,
                outlier_exposure_backward_rows_kernel<scalar_t, acc_t, kSize, Team::kBlock>, args,
                stream);
  } else {
    launch_rows(outlier_exposure_backward_rows_kernel<scalar_t, acc_t, 1, Team::kWarp>,
                outlier_exposure_backward_rows_kernel<scalar_t, acc_t, 1, Team::kBlock>, args,
                stream);
  }
}

int num_partials(int64_t num_rows) {
  const int64_t rows_per_block = int64_t(kReduceThreads) * kReduceRowsPerThread;
  return static_cast<int>(std::min<int64_t>(num_blocks(num_rows, rows_per_block), kMaxPartials));
}

template <typename acc_t>
void reduce(const ReduceArgs<acc_t>& args, GroupSums* partials, Stream stream) {
  const int num_blocks = num_partials(args.num_rows);
  launch(outlier_exposure_reduce_rows_kernel<acc_t>, num_blocks, kReduceThreads, stream, args,
         partials);
  launch(outlier_exposure_reduce_partials_kernel<acc_t>, 1, kReduceThreads, stream, args,
         static_cast<const GroupSums*>(partials), num_blocks);
}

#define OE_EXT_INSTANTIATE(scalar_t, acc_t)                                \
  template void forward(const ForwardArgs<scalar_t, acc_t>& args, Stream); \
  template void backward(const BackwardArgs<scalar_t, acc_t>& args, Stream)
OE_EXT_INSTANTIATE(double, double);
OE_EXT_INSTANTIATE(float, float);
OE_EXT_INSTANTIATE(c10::Half, float);
OE_EXT_INSTANTIATE(c10::BFloat16, float);
#undef OE_EXT_INSTANTIATE

template void reduce(const ReduceArgs<double>& args, GroupSums* partials, Stream);
template void reduce(const ReduceArgs<float>& args, GroupSums* partials, Stream);

}  // namespace oe_ext::cuda
