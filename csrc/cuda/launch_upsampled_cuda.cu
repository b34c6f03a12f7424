#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "launch_kernel.cuh"
#include "upsampled.cuh"

namespace oe_ext::cuda {
namespace {

// A warp has so many classes, unless there are more than for the largest block. Blocks that keep
// exponentials take much shared memory, so they are made larger.
constexpr int64_t kClassesPerWarp = 8;
constexpr int64_t kKeptClassesPerWarp = 4;

// So many blocks that keep exponentials must fit a multiprocessor, or its schedulers run dry.
constexpr int64_t kMinKeepingBlocks = 2;

// Shared memory that a block takes beside the dynamic one: its own, and 1 KB of the system's.
constexpr int64_t kOtherSharedBytes = kStaticSharedBytes + 1024;

// Bands of more cells leave fewer rows of elements to be added up, but fewer columns to run at
// once.
constexpr int64_t kMinBandCells = 4;
constexpr int64_t kMaxBandCells = 16;
constexpr int64_t kManyColumns = 1 << 15;

// The larger patch. Doubles would take more registers than there are.
template <typename acc_t>
constexpr int kLargePatch = sizeof(acc_t) == 4 ? 4 : 2;
constexpr int kSmallPatch = 2;

// How a call is cut into work: by its shapes, and by the shared memory of a block.
template <typename Args>
struct UpsampledLaunch {
  using acc_t = std::remove_pointer_t<decltype(Args::grad.data)>;

  explicit UpsampledLaunch(const Args& args)
      : has_large_cells(args.vertical.max_pixels() > kSmallPatch &&
                        args.horizontal.max_pixels() > kSmallPatch) {
    const int64_t cell_rows = args.vertical.in + 1;
    plan.num_cells = args.horizontal.in + 1;
    const int64_t cells = args.num_images * plan.num_cells * cell_rows;
    plan.band_cells =
        std::min(std::clamp(cells / kManyColumns, kMinBandCells, kMaxBandCells), cell_rows);
    plan.num_bands = (cell_rows + plan.band_cells - 1) / plan.band_cells;
    plan.num_columns = args.num_images * plan.num_bands * plan.num_cells;
    blocks = blocks_for(plan.num_strips(), 1, max_blocks());
    const bool has_gradient = args.rows.grad_logits != nullptr && args.rows.layout.num_rows() > 0;
    if (has_gradient && plan.num_bands > 1) {
      first_rows = args.num_images * plan.num_bands * args.num_classes() * args.horizontal.in;
    }
    const int64_t num_classes = args.num_classes();
    const int64_t many_warps = num_warps(num_classes / kKeptClassesPerWarp);
    // Doubles take the careful way, which keeps none.
    const int64_t kept_bytes = block_bytes(many_warps, num_classes, true) + kOtherSharedBytes;
    const bool may_keep = std::is_same_v<acc_t, float> &&
                          kMinKeepingBlocks * kept_bytes <= max_stage_bytes() + kOtherSharedBytes;
    // The same number with and without a gradient: the losses then have the same bits.
    const int64_t warps = may_keep ? many_warps : num_warps(num_classes / kClassesPerWarp);
    plan.keeps_exps = may_keep && has_gradient;
    threads = static_cast<int>(warps) * kWarpSize;
    shared_bytes = block_bytes(warps, num_classes, plan.keeps_exps);
  }

  static int64_t num_warps(int64_t wanted) {
    return std::clamp<int64_t>(wanted, 1, kMaxUpsampledThreads / kWarpSize);
  }

  int64_t block_bytes(int64_t warps, int64_t num_classes, bool keeps_exps) const {
    return has_large_cells
               ? PatchMemory<acc_t, kLargePatch<acc_t>>::bytes(warps, num_classes, keeps_exps)
               : PatchMemory<acc_t, kSmallPatch>::bytes(warps, num_classes, keeps_exps);
  }

  // Where the bands leave their first rows, behind the partial sums; null without any.
  acc_t* first_rows_in(void* scratch) const {
    return first_rows > 0 ? reinterpret_cast<acc_t*>(static_cast<char*>(scratch) + kScratchBytes)
                          : nullptr;
  }

  bool has_large_cells;
  int threads;
  int64_t blocks;
  UpsampledPlan plan;
  int64_t first_rows = 0;  // elements
  int64_t shared_bytes;
};

template <int kSize, typename scalar_t, typename acc_t>
void forward_columns(const UpsampledForwardArgs<scalar_t, acc_t>& args, const Partials& partials,
                     const UpsampledLaunch<UpsampledForwardArgs<scalar_t, acc_t>>& plan,
                     acc_t* first_rows, Stream stream) {
  OE_EXT_LAUNCH((outlier_exposure_forward_upsampled_kernel<scalar_t, acc_t, kSize>),
                kMaxUpsampledThreads, plan.blocks, plan.threads, plan.shared_bytes, stream, args,
                partials, plan.plan, first_rows);
}

template <int kSize, typename scalar_t, typename acc_t>
void backward_columns(const UpsampledBackwardArgs<scalar_t, acc_t>& args,
                      const UpsampledLaunch<UpsampledBackwardArgs<scalar_t, acc_t>>& plan,
                      acc_t* first_rows, Stream stream) {
  OE_EXT_LAUNCH((outlier_exposure_backward_upsampled_kernel<scalar_t, acc_t, kSize>),
                kMaxUpsampledThreads, plan.blocks, plan.threads, plan.shared_bytes, stream, args,
                plan.plan, first_rows);
}

template <typename Args, typename acc_t>
void add_bands(const Args& args, const UpsampledLaunch<Args>& plan, const acc_t* first_rows,
               const LossOutput<acc_t>& output, const Partials& partials, Stream stream) {
  if (plan.first_rows == 0 && output.loss == nullptr) {
    return;
  }
  const int64_t blocks = blocks_for(plan.first_rows, kReduceThreads, max_blocks());
  OE_EXT_LAUNCH(outlier_exposure_add_bands_kernel<acc_t>, kReduceThreads, blocks, kReduceThreads, 0,
                stream, plan.first_rows > 0 ? args.grad : ImageView<acc_t>(), args.num_images,
                args.num_classes(), args.horizontal.in, plan.plan, first_rows, output,
                args.rows.divisor_rule, args.rows.counts, args.rows.layout.num_rows(), partials);
}

}  // namespace

template <typename Args>
int64_t scratch_bytes(const Args& args) {
  using Launch = UpsampledLaunch<Args>;
  return kScratchBytes +
         Launch(args).first_rows * static_cast<int64_t>(sizeof(typename Launch::acc_t));
}

template <typename scalar_t, typename acc_t>
void forward(const UpsampledForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream) {
  Partials partials = count_first(args.rows, scratch, stream);
  const UpsampledLaunch<UpsampledForwardArgs<scalar_t, acc_t>> plan(args);
  acc_t* first_rows = plan.first_rows_in(scratch);
  if (args.rows.layout.num_rows() > 0) {
    plan.has_large_cells
        ? forward_columns<kLargePatch<acc_t>>(args, partials, plan, first_rows, stream)
        : forward_columns<kSmallPatch>(args, partials, plan, first_rows, stream);
    partials.num_sums = static_cast<int>(plan.blocks);
  }
  add_bands(args, plan, first_rows, args.rows.output, partials, stream);
}

template <typename scalar_t, typename acc_t>
void backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream) {
  const UpsampledLaunch<UpsampledBackwardArgs<scalar_t, acc_t>> plan(args);
  acc_t* first_rows = plan.first_rows_in(scratch);
  if (args.rows.layout.num_rows() > 0) {
    plan.has_large_cells ? backward_columns<kLargePatch<acc_t>>(args, plan, first_rows, stream)
                         : backward_columns<kSmallPatch>(args, plan, first_rows, stream);
  }
  add_bands(args, plan, first_rows, LossOutput<acc_t>(), Partials(), stream);
}

namespace {

template <typename acc_t>
int64_t max_classes() {
  const auto bytes = [](int64_t num_classes) {
    return PatchMemory<acc_t, kLargePatch<acc_t>>::bytes(kMaxUpsampledThreads / kWarpSize,
                                                         num_classes, /*keeps_exps=*/false);
  };
  return (max_stage_bytes() - bytes(0)) / (bytes(1) - bytes(0));
}

}  // namespace

bool fits_upsampled(int64_t num_classes, int64_t height, int64_t width, bool is_double) {
  return height <= kMaxAxisPixels && width <= kMaxAxisPixels &&
         num_classes <= (is_double ? max_classes<double>() : max_classes<float>());
}

#ifndef SIMT_CPU  // the harness instantiates what it uses
#define OE_EXT_INSTANTIATE(scalar_t, acc_t)                                                        \
  template int64_t scratch_bytes(const UpsampledForwardArgs<scalar_t, acc_t>&);                    \
  template int64_t scratch_bytes(const UpsampledBackwardArgs<scalar_t, acc_t>&);                   \
  template void forward(const UpsampledForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream); \
  template void backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args, void* scratch, Stream)
OE_EXT_INSTANTIATE(double, double);
OE_EXT_INSTANTIATE(float, float);
OE_EXT_INSTANTIATE(c10::Half, float);
OE_EXT_INSTANTIATE(c10::BFloat16, float);
#undef OE_EXT_INSTANTIATE
#endif

}  // namespace oe_ext::cuda
