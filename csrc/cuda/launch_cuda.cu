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

// Of a block on the current device: 60 KB on sm_75, 95 KB to 223 KB on newer ones.
int64_t max_stage_bytes() {
  int device = 0;
  int bytes = 0;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes - kStaticSharedBytes;
}
#endif

constexpr int64_t kLabelBytesPerThread = 4 * kVectorBytes;  // that count_rows loads at once
constexpr int64_t kMaxRowsToCountTwice = 2048;  // up to this, every block counts all labels itself

constexpr int kWarpTeamThreads = 128;
constexpr int64_t kMaxWarpClasses = 1024;  // above, the whole block processes a row
constexpr int64_t kMaxUnitsPerLane = 8;
constexpr int kLogBlockTeam = 8;
constexpr int64_t kMaxBlockClasses = 16384;  // above, it is one of kMaxRowsThreads

// What a thread takes of the stage where it need not, or cannot, hold a whole row.
constexpr int64_t kPartOfRowBytes = 256;

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

int64_t blocks_for(int64_t num_items, int64_t items_per_block, int64_t limit) {
  return std::clamp<int64_t>((num_items + items_per_block - 1) / items_per_block, 1, limit);
}

// Are rows contiguous, and does each row of the gradient begin as far from a 16-byte boundary as
// that of the logits? Then both can be walked in 16-byte steps.
template <typename Args>
bool rows_are_aligned_alike(const Args& args) {
  constexpr int64_t kSize = kVectorBytes / sizeof(*args.logits);
  const RowLayout& x = args.layout;
  const RowLayout& grad = args.grad_layout;
  if (x.class_stride != 1 || args.grad_logits == nullptr) {
    return x.class_stride == 1;
  }
  const auto differ = [](int64_t size, int64_t stride, int64_t other) {
    return size > 1 && (stride - other) % kSize != 0;
  };
  const auto distance = reinterpret_cast<std::uintptr_t>(args.logits) -
                        reinterpret_cast<std::uintptr_t>(args.grad_logits);
  return grad.class_stride == 1 && distance % kVectorBytes == 0 &&
         !differ(x.num_outer, x.outer_stride, grad.outer_stride) &&
         !differ(x.num_inner, x.inner_stride, grad.inner_stride);
}

// Few classes fill too few units to be worth it.
template <typename Args>
bool rows_are_wide(const Args& args) {
  constexpr int64_t kMinUnits = 8;
  constexpr int64_t kSize = kVectorBytes / sizeof(*args.logits);
  return rows_are_aligned_alike(args) && args.layout.num_classes >= kMinUnits * kSize;
}

// Can every class be read in 16-byte steps along the rows?
template <typename scalar_t>
bool pixels_are_aligned(const scalar_t* data, const RowLayout& layout) {
  constexpr int64_t kSize = kVectorSize<scalar_t>;
  const bool outer = layout.num_outer == 1 || layout.outer_stride % kSize == 0;
  return layout.inner_stride == 1 && layout.num_inner % kSize == 0 && outer &&
         layout.class_stride % kSize == 0 &&
         reinterpret_cast<std::uintptr_t>(data) % kVectorBytes == 0;
}

template <typename Args>
bool pixels_are_aligned(const Args& args) {
  return pixels_are_aligned(args.logits, args.layout) &&
         (args.grad_logits == nullptr || pixels_are_aligned(args.grad_logits, args.grad_layout));
}

// How many units of a row a thread keeps in the stage: all, if it `wants` that and they fit.
int stage_capacity(bool wants, int64_t units_per_thread, int64_t threads, int64_t unit_bytes,
                   int64_t stage_bytes) {
  const int64_t room = stage_bytes / (threads * unit_bytes);
  const int64_t part = std::min(room, kPartOfRowBytes / unit_bytes);
  const int64_t units =
      wants && units_per_thread <= room ? units_per_thread : std::min(part, units_per_thread);
  return static_cast<int>(std::max<int64_t>(units, 1));
}

// The launch configuration of the rows kernels. A unit is what a thread moves at once.
struct RowsPlan {
  RowsPlan(const RowLayout& layout, int unit_size) {
    const int64_t num_units = layout.num_classes / unit_size;
    if (layout.num_classes <= kMaxWarpClasses) {
      // In a team of few lanes, less is done once for a row; they are enough for the classes that
      // fill no unit.
      while (lanes() < kWarpSize &&
             (lanes() < 2 * (unit_size - 1) || lanes() * kMaxUnitsPerLane < num_units)) {
        ++log_lanes;
      }
    } else {
      log_lanes = layout.num_classes <= kMaxBlockClasses ? kLogBlockTeam : kLogMaxRowsThreads;
      threads = lanes();
    }
    blocks = blocks_for(layout.num_rows(), threads / lanes(), max_blocks());
    units_per_thread = (num_units + lanes() - 1) / lanes();
  }

  int lanes() const { return 1 << log_lanes; }

  int threads = kWarpTeamThreads;
  int log_lanes = 0;
  int64_t blocks;
  int64_t units_per_thread;
};

// The threads of a block, so that the stages of three fit a multiprocessor. 0: not even one of the
// smallest block does.
int pixel_threads(int64_t thread_bytes, int64_t stage_bytes) {
  int threads = kMaxPixelsThreads;
  while (threads > kWarpSize && 3 * threads * thread_bytes > stage_bytes) {
    threads /= 2;
  }
  return threads * thread_bytes <= stage_bytes ? threads : 0;
}

#define OE_EXT_LAUNCH(kernel, ...) launch(#kernel, kernel, __VA_ARGS__)

template <int kSize, typename scalar_t, typename acc_t>
int64_t forward_rows(const ForwardArgs<scalar_t, acc_t>& args, const Partials& partials,
                     int64_t stage_bytes, Stream stream) {
  constexpr int64_t kUnitBytes = kSize * sizeof(acc_t);
  const RowsPlan plan(args.layout, kSize);
  const int capacity = stage_capacity(args.grad_logits != nullptr, plan.units_per_thread,
                                      plan.threads, kUnitBytes, stage_bytes);
  OE_EXT_LAUNCH((outlier_exposure_forward_rows_kernel<scalar_t, acc_t, kSize>), kMaxRowsThreads,
                plan.blocks, plan.threads, capacity * plan.threads * kUnitBytes, stream, args,
                partials, plan.log_lanes, capacity);
  return plan.blocks;
}

template <int kSize, typename scalar_t, typename acc_t>
void backward_rows(const BackwardArgs<scalar_t, acc_t>& args, Stream stream) {
  const RowsPlan plan(args.layout, kSize);
  OE_EXT_LAUNCH((outlier_exposure_backward_rows_kernel<scalar_t, acc_t, kSize>), kMaxRowsThreads,
                plan.blocks, plan.threads, 0, stream, args, plan.log_lanes);
}

template <int kSize, typename scalar_t, typename acc_t>
int64_t forward_pixels(const ForwardArgs<scalar_t, acc_t>& args, const Partials& partials,
                       int64_t stage_bytes, Stream stream) {
  constexpr int64_t kUnitBytes = kSize * sizeof(acc_t);
  const int64_t num_classes = args.layout.num_classes;
  const int staged_threads = pixel_threads(num_classes * kUnitBytes, stage_bytes);
  const bool keeps = args.grad_logits != nullptr && staged_threads > 0;
  const int threads = keeps ? staged_threads : kMaxPixelsThreads;
  const int capacity = stage_capacity(keeps, num_classes, threads, kUnitBytes, stage_bytes);
  const int64_t blocks = blocks_for(args.layout.num_rows(), threads * kSize, max_blocks());
  OE_EXT_LAUNCH((outlier_exposure_forward_pixels_kernel<scalar_t, acc_t, kSize>), kMaxPixelsThreads,
                blocks, threads, capacity * threads * kUnitBytes, stream, args, partials, capacity);
  return blocks;
}

template <int kSize, typename scalar_t, typename acc_t>
void backward_pixels(const BackwardArgs<scalar_t, acc_t>& args, Stream stream) {
  const int64_t blocks =
      blocks_for(args.layout.num_rows(), kMaxPixelsThreads * kSize, max_blocks());
  OE_EXT_LAUNCH((outlier_exposure_backward_pixels_kernel<scalar_t, acc_t, kSize>),
                kMaxPixelsThreads, blocks, kMaxPixelsThreads, 0, stream, args);
}

// Chooses the kernel and its width; returns how many blocks left a sum.
template <typename scalar_t, typename acc_t>
int64_t forward_all_rows(const ForwardArgs<scalar_t, acc_t>& args, const Partials& partials,
                         Stream stream) {
  constexpr int kSize = kVectorSize<scalar_t>;
  const int64_t stage_bytes = max_stage_bytes();
  if (!args.layout.is_class_major()) {
    return rows_are_wide(args) ? forward_rows<kSize>(args, partials, stage_bytes, stream)
                               : forward_rows<1>(args, partials, stage_bytes, stream);
  }
  // With many classes, the stage of wide loads would leave too few threads on a multiprocessor.
  const int64_t wide_bytes =
      kMaxPixelsThreads * args.layout.num_classes * int64_t(kSize * sizeof(acc_t));
  const bool wide =
      pixels_are_aligned(args) && (args.grad_logits == nullptr || 2 * wide_bytes <= stage_bytes);
  return wide ? forward_pixels<kSize>(args, partials, stage_bytes, stream)
              : forward_pixels<1>(args, partials, stage_bytes, stream);
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
    pixels_are_aligned(args) ? backward_pixels<kSize>(args, stream)
                             : backward_pixels<1>(args, stream);
  } else {
    rows_are_wide(args) ? backward_rows<kSize>(args, stream) : backward_rows<1>(args, stream);
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
