#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cstdint>

#include "launch_kernel.cuh"
#include "pixels.cuh"
#include "rows.cuh"

namespace oe_ext::cuda {
namespace {

constexpr int kWarpTeamThreads = 128;
constexpr int64_t kMaxWarpClasses = 1024;  // above, the whole block processes a row
constexpr int64_t kMaxUnitsPerLane = 8;
constexpr int kLogBlockTeam = 8;
constexpr int64_t kMaxBlockClasses = 16384;  // above, it is one of kMaxRowsThreads

// What a thread takes of the stage where it need not, or cannot, hold a whole row.
constexpr int64_t kPartOfRowBytes = 256;

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
  Partials partials = count_first(args, scratch, stream);
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
