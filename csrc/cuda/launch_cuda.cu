#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "launch_cuda.h"
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

// Limits of a launch. The CPU harness lowers both, to test inputs beyond them.
#ifdef SIMT_CPU
int64_t max_blocks() { return simt::max_blocks; }
int64_t max_stage_bytes() { return simt::max_stage_bytes; }
#else
constexpr int64_t max_blocks() { return kMaxBlocks; }
constexpr int64_t max_stage_bytes() { return kMaxStageBytes; }
#endif

constexpr int64_t kCountRowsPerThread = 16;
constexpr int64_t kMaxCountBlocks = kMaxCountPartials;
constexpr int kWarpTeamThreads = 128;
constexpr int64_t kMaxWarpClasses = 1024;  // above, the whole block processes a row

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
  // clang-format off: it tears the brackets of a launch apart
  kernel<<<grid, block, static_cast<size_t>(shared_bytes), stream>>>(args...);
  // clang-format on
  C10_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

int64_t blocks_for(int64_t num_items, int64_t items_per_block, int64_t limit) {
  return std::clamp<int64_t>((num_items + items_per_block - 1) / items_per_block, 1, limit);
}

template <typename scalar_t>
bool is_aligned(const scalar_t* data) {
  return reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0;
}

// Can every row be read in 16-byte steps along its classes?
template <typename scalar_t>
bool rows_are_aligned(const scalar_t* data, const RowLayout& layout) {
  constexpr int64_t kSize = kVectorSize<scalar_t>;
  const bool outer = layout.num_outer == 1 || layout.outer_stride % kSize == 0;
  const bool inner = layout.num_inner == 1 || layout.inner_stride % kSize == 0;
  return layout.class_stride == 1 && outer && inner && is_aligned(data);
}

// Can every class be read in 16-byte steps along the rows?
template <typename scalar_t>
bool pixels_are_aligned(const scalar_t* data, const RowLayout& layout) {
  constexpr int64_t kSize = kVectorSize<scalar_t>;
  const bool outer = layout.num_outer == 1 || layout.outer_stride % kSize == 0;
  return layout.inner_stride == 1 && layout.num_inner % kSize == 0 && outer &&
         layout.class_stride % kSize == 0 && is_aligned(data);
}

// Does it hold for the logits, and for the gradient if one is written?
template <typename Args>
bool both_are(auto aligned, const Args& args) {
  return aligned(args.logits, args.layout) &&
         (args.grad_logits == nullptr || aligned(args.grad_logits, args.grad_layout));
}

// The launch configuration of the rows kernels. A unit is what a thread moves at once.
struct RowsPlan {
  RowsPlan(const RowLayout& layout, int64_t unit_size, int64_t unit_bytes) {
    const int64_t num_units = layout.num_classes / unit_size;
    if (layout.num_classes <= kMaxWarpClasses) {
      threads = kWarpTeamThreads;
      lanes = static_cast<int>(unit_size);  // enough for the classes that fill no unit
      while (lanes < kWarpSize && lanes < num_units) {
        lanes *= 2;
      }
    } else {
      threads = lanes = kMaxRowsThreads;
    }
    blocks = blocks_for(layout.num_rows(), threads / lanes, max_blocks());
    const int64_t units_per_thread = (num_units + lanes - 1) / lanes;
    const int64_t bytes = units_per_thread * threads * unit_bytes;
    fits_stage = bytes <= max_stage_bytes();
    stage_bytes = fits_stage ? bytes : 0;
  }

  int threads;
  int lanes;
  int64_t blocks;
  bool fits_stage;
  int64_t stage_bytes;
};

// The launch configuration of the pixels kernels: as many threads as the stage has room for.
struct PixelsPlan {
  PixelsPlan(const RowLayout& layout, int64_t unit_size, int64_t unit_bytes, bool wants_stage) {
    const int64_t thread_bytes = layout.num_classes * unit_bytes;
    threads = kMaxPixelsThreads;
    while (wants_stage && threads > kWarpSize && threads * thread_bytes > max_stage_bytes()) {
      threads /= 2;
    }
    fits_stage = wants_stage && threads * thread_bytes <= max_stage_bytes();
    if (!fits_stage) {
      threads = kMaxPixelsThreads;
    }
    stage_bytes = fits_stage ? threads * thread_bytes : 0;
    blocks = blocks_for(layout.num_rows(), threads * unit_size, max_blocks());
  }

  int threads;
  int64_t blocks;
  bool fits_stage;
  int64_t stage_bytes;
};

#define OE_EXT_LAUNCH(kernel, ...) launch(#kernel, kernel, __VA_ARGS__)

template <int kSize, typename scalar_t, typename acc_t>
int64_t forward_rows(const ForwardArgs<scalar_t, acc_t>& args, const Partials& partials,
                     Stream stream) {
  const RowsPlan plan(args.layout, kSize, kSize * sizeof(scalar_t));
  const bool staged = args.grad_logits != nullptr && plan.fits_stage;
  OE_EXT_LAUNCH((outlier_exposure_forward_rows_kernel<scalar_t, acc_t, kSize>), kMaxRowsThreads,
                plan.blocks, plan.threads, staged ? plan.stage_bytes : 0, stream, args, partials,
                plan.lanes, staged);
  return plan.blocks;
}

template <int kSize, typename scalar_t, typename acc_t>
void backward_rows(const BackwardArgs<scalar_t, acc_t>& args, Stream stream) {
  const RowsPlan plan(args.layout, kSize, kSize * sizeof(scalar_t));
  OE_EXT_LAUNCH((outlier_exposure_backward_rows_kernel<scalar_t, acc_t, kSize>), kMaxRowsThreads,
                plan.blocks, plan.threads, 0, stream, args, plan.lanes);
}

template <int kSize, typename scalar_t, typename acc_t>
int64_t forward_pixels(const ForwardArgs<scalar_t, acc_t>& args, const PixelsPlan& plan,
                       const Partials& partials, Stream stream) {
  OE_EXT_LAUNCH((outlier_exposure_forward_pixels_kernel<scalar_t, acc_t, kSize>), kMaxPixelsThreads,
                plan.blocks, plan.threads, plan.stage_bytes, stream, args, partials,
                plan.fits_stage);
  return plan.blocks;
}

template <int kSize, typename scalar_t, typename acc_t>
void backward_pixels(const BackwardArgs<scalar_t, acc_t>& args, Stream stream) {
  const PixelsPlan plan(args.layout, kSize, kSize * sizeof(scalar_t), /*wants_stage=*/false);
  OE_EXT_LAUNCH((outlier_exposure_backward_pixels_kernel<scalar_t, acc_t, kSize>),
                kMaxPixelsThreads, plan.blocks, plan.threads, 0, stream, args);
}

// Chooses the kernel and its width; returns how many blocks left a sum.
template <typename scalar_t, typename acc_t>
int64_t forward_all_rows(const ForwardArgs<scalar_t, acc_t>& args, const Partials& partials,
                         Stream stream) {
  constexpr int kSize = kVectorSize<scalar_t>;
  if (!args.layout.is_class_major()) {
    return both_are(rows_are_aligned<scalar_t>, args) ? forward_rows<kSize>(args, partials, stream)
                                                      : forward_rows<1>(args, partials, stream);
  }
  const bool wants_gradient = args.grad_logits != nullptr;
  const PixelsPlan wide_plan(args.layout, kSize, kVectorBytes, wants_gradient);
  const PixelsPlan narrow_plan(args.layout, 1, sizeof(scalar_t), wants_gradient);
  const bool aligned = both_are(pixels_are_aligned<scalar_t>, args);
  // With many classes, the stage fits only one pixel per thread.
  const bool wide = aligned && (wide_plan.fits_stage || !narrow_plan.fits_stage);
  return wide ? forward_pixels<kSize>(args, wide_plan, partials, stream)
              : forward_pixels<1>(args, narrow_plan, partials, stream);
}

}  // namespace

template <typename scalar_t, typename acc_t>
void forward(const ForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream) {
  const int64_t num_rows = args.layout.num_rows();
  Partials partials;
  if (args.output.loss != nullptr) {
    partials.sums = static_cast<GroupSums*>(scratch);
  }
  if (args.needs_counts_first() && num_rows > 0) {
    partials.counts = reinterpret_cast<GroupCounts*>(static_cast<GroupSums*>(scratch) + kMaxBlocks);
    partials.num_counts = static_cast<int>(blocks_for(
        num_rows, kReduceThreads * kCountRowsPerThread, std::min(kMaxCountBlocks, max_blocks())));
    OE_EXT_LAUNCH(outlier_exposure_count_rows_kernel<acc_t>, kReduceThreads, partials.num_counts,
                  kReduceThreads, 0, stream, args.labels, args.class_weights, num_rows,
                  partials.counts);
  }
  if (num_rows > 0) {
    partials.num_sums = static_cast<int>(forward_all_rows(args, partials, stream));
  }
  if (args.output.loss != nullptr) {
    OE_EXT_LAUNCH(outlier_exposure_write_loss_kernel<acc_t>, kReduceThreads, 1, kReduceThreads, 0,
                  stream, args.output, args.divisor_rule, args.counts, num_rows, partials);
  }
}

template <typename scalar_t, typename acc_t>
void backward(const BackwardArgs<scalar_t, acc_t>& args, Stream stream) {
  constexpr int kSize = kVectorSize<scalar_t>;
  if (args.layout.is_class_major()) {
    both_are(pixels_are_aligned<scalar_t>, args) ? backward_pixels<kSize>(args, stream)
                                                 : backward_pixels<1>(args, stream);
  } else {
    both_are(rows_are_aligned<scalar_t>, args) ? backward_rows<kSize>(args, stream)
                                               : backward_rows<1>(args, stream);
  }
}

#ifndef SIMT_CPU  // the harness instantiates what it uses
#define OE_EXT_INSTANTIATE(scalar_t, acc_t)                                               \
  template void forward(const ForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream); \
  template void backward(const BackwardArgs<scalar_t, acc_t>& args, Stream)
OE_EXT_INSTANTIATE(double, double);
OE_EXT_INSTANTIATE(float, float);
OE_EXT_INSTANTIATE(c10::Half, float);
OE_EXT_INSTANTIATE(c10::BFloat16, float);
#undef OE_EXT_INSTANTIATE
#endif

}  // namespace oe_ext::cuda
