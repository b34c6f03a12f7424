// The kernels of logits that are upsampled to the size of the target.
#pragma once

#include "reduce.cuh"
#include "upsampled_patches.cuh"

namespace oe_ext::cuda {

// The largest block, and how many of them fit the registers of a multiprocessor at least: the
// launch bounds. One block more than these would spill.
constexpr int kMaxUpsampledThreads = 128;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kMinUpsampledBlocks = 2;
#else
constexpr int kMinUpsampledBlocks = 3;
#endif

// A pixel of the target whose logits have been summed up.
template <typename acc_t>
struct SummedPixel {
  int64_t row = 0;
  int64_t label = 0;
  RowKind kind = RowKind::kIgnored;
  bool is_own = false;  // not only there for the neighbours' gradient
  acc_t sum_exp = 1;
  acc_t max = 0;   // of the shifted logits
  int argmax = 0;  // its first class
  acc_t shift = 0;
  acc_t label_shifted = 0;  // minus the maximum
  acc_t mean_shifted = 0;
};

// Writes the outputs of a pixel, and returns what its gradient consists of.
template <typename scalar_t, typename acc_t>
__device__ GradientCoefficients<acc_t> finish_pixel(
    const UpsampledForwardArgs<scalar_t, acc_t>& args, const Divisors<acc_t>& divisors,
    const SummedPixel<acc_t>& pixel, ThreadSums& sums) {
  const auto& rows = args.rows;
  const auto coefficients = rows.coefficients(pixel.row, pixel.label, pixel.kind);
  if (pixel.is_own) {
    const acc_t loss = rows.write_row(
        pixel.row, coefficients, pixel.kind, rows.is_active(coefficients, pixel.kind),
        pixel.max + pixel.shift, pixel.sum_exp, pixel.label_shifted, pixel.mean_shifted);
    sums.add(pixel.kind, static_cast<double>(loss));
    if (args.row_argmax != nullptr) {
      args.row_argmax[pixel.row] = pixel.argmax;
    }
  }
  return rows.gradient_coefficients(coefficients, pixel.sum_exp, acc_t(1), divisors.of(pixel.kind));
}

template <typename scalar_t, typename acc_t>
__device__ GradientCoefficients<acc_t> finish_pixel(
    const UpsampledBackwardArgs<scalar_t, acc_t>& args, const Divisors<acc_t>& divisors,
    const SummedPixel<acc_t>& pixel, ThreadSums&) {
  const auto& rows = args.rows;
  return rows.gradient_coefficients(rows.coefficients(pixel.row, pixel.label, pixel.kind),
                                    pixel.sum_exp, rows.grad[pixel.row], divisors.of(pixel.kind));
}

// The column of a lane: which it is, and its cells along a row.
template <typename acc_t>
struct Column {
  template <typename Args>
  __device__ Column(const Args& args, const UpsampledPlan& plan, int64_t strip, int lane)
      : Column(args, plan, strip * kOwnColumns + lane, plan.num_columns - 1, lane) {}

  template <typename Args>
  __device__ Column(const Args& args, const UpsampledPlan& plan, int64_t index, int64_t last,
                    int lane)
      : exists(index <= last),
        is_own(exists && lane < kOwnColumns),
        cell(static_cast<int>((exists ? index : last) % plan.num_cells)),
        band(static_cast<int>((exists ? index : last) / plan.num_cells % plan.num_bands)),
        image((exists ? index : last) / plan.num_cells / plan.num_bands),
        cells(args.horizontal, cell) {}

  bool exists;
  bool is_own;
  int cell;
  int band;
  int64_t image;
  AxisCell<acc_t> cells;
};

// Finishes the rows of a patch, each by one warp, and leaves to all warps what the gradient needs,
// in the places of the sums.
template <typename Pixels, typename Args, typename scalar_t, typename acc_t, int kSize>
__device__ void finish_patch(const Args& args, const CellCorners<scalar_t, acc_t>& corners,
                             const Column<acc_t>& column, const AxisCell<acc_t>& vertical,
                             int first_row, int first_column, const acc_t (&sum_terms)[kCorners],
                             const PatchMemory<acc_t, kSize>& memory,
                             const Divisors<acc_t>& divisors, ThreadSums& sums) {
  const acc_t share = acc_t(1) / (args.rows.num_classes() * Pixels::kUnit);
#pragma unroll 1
  for (int i = 0; i < kSize * kSize; ++i) {
    const int r = i / kSize;
    const int k = i % kSize;
    if (!memory.has_row(r)) {
      continue;
    }
    GradientCoefficients<acc_t> gradient;
    int cls = -1;
    if (column.exists && first_row + r < vertical.size && first_column + k < column.cells.size) {
      const acc_t below = vertical.weight(first_row + r);
      const acc_t right = column.cells.weight(first_column + k);
      const int64_t y = column.image * args.vertical.out + (vertical.begin + first_row + r);
      SummedPixel<acc_t> pixel;
      pixel.row = y * args.horizontal.out + (column.cells.begin + first_column + k);
      pixel.label = args.rows.labels[pixel.row];
      pixel.kind = args.rows.labels.rule.kind(pixel.label);
      CUDA_KERNEL_ASSERT(pixel.kind != RowKind::kInvalid &&
                         "target must be a class or a special label");
      pixel.is_own = column.is_own;
      pixel.sum_exp = memory.factor.at(r, k);
      if constexpr (Pixels::kHasMax) {
        pixel.max = memory.max.at(r, k);
        pixel.argmax = memory.label.at(r, k);
        pixel.shift = corners.max;
      }
      pixel.mean_shifted = Pixels::at(below, right, sum_terms) * share - pixel.max;
      cls = static_cast<int>(args.rows.class_here(pixel.label, pixel.kind));
      if (cls >= 0) {
        const auto pixels = pixels_of<Pixels>(corners, cls * corners.class_stride);
        pixel.label_shifted = Pixels::at(below, right, pixels.terms) / Pixels::kUnit - pixel.max;
      }
      gradient = finish_pixel(args, divisors, pixel, sums);
      if (Pixels::kHasMax && args.num_classes() == 1) {
        gradient = {gradient.factor * acc_t(0), 0, 0};  // exactly 0, or NaN
      }
    }
    if constexpr (!Pixels::kHasMax) {
      if (memory.keeps_exps && cls >= 0) {
        memory.exps.at(cls * kSize + r, k) -= gradient.at_label;
      }
    }
    memory.factor.at(r, k) = gradient.factor;
    memory.offset.at(r, k) = gradient.offset;
    memory.label_part.at(r, k) = cls >= 0 ? gradient.factor * gradient.at_label : acc_t(0);
    memory.label.at(r, k) = cls;
  }
  __syncthreads();
}

// One patch of the column's cell: sums, outputs, and the gradient of its elements.
template <typename Args, typename scalar_t, typename acc_t, int kSize>
__device__ void process_patch(const Args& args, const CellCorners<scalar_t, acc_t>& corners,
                              const Column<acc_t>& column, const AxisCell<acc_t>& vertical,
                              int first_row, int first_column, bool wants_max, int side,
                              const PatchMemory<acc_t, kSize>& memory,
                              UniformGradient<acc_t>& uniform, const Divisors<acc_t>& divisors,
                              ThreadSums& sums) {
  const auto num_classes = static_cast<int>(args.num_classes());
  const bool writes_gradient = args.rows.grad_logits != nullptr;
  const PatchWeights<acc_t, kSize> weights(vertical, first_row, column.cells, first_column);
  acc_t sum_terms[kCorners] = {};
  // Doubles take the careful way alone: both would take more registers than sm_75 has.
  if constexpr (std::is_same_v<acc_t, float>) {
    // A single class has a loss of exactly 0 if its logits are relative to the maximum.
    const bool is_careful = wants_max || num_classes == 1;
    if (!is_careful && sum_quickly(corners, weights, memory, num_classes, sum_terms)) {
      finish_patch<QuickPixels<acc_t>>(args, corners, column, vertical, first_row, first_column,
                                       sum_terms, memory, divisors, sums);
      if (writes_gradient) {
        add_gradients<QuickPixels<acc_t>>(corners, weights, memory, num_classes, side, uniform);
      }
      return;
    }
  }
  sum_carefully(corners, vertical, first_row, weights, memory, num_classes, sum_terms);
  finish_patch<CarefulPixels<acc_t>>(args, corners, column, vertical, first_row, first_column,
                                     sum_terms, memory, divisors, sums);
  if (writes_gradient) {
    add_gradients<CarefulPixels<acc_t>>(corners, weights, memory, num_classes, side, uniform);
  }
}

// Walks the columns of this block. The elements of their rows get their gradient when the cells
// above and below are done; only the first ones of a band, which the band before has too, are left
// in `first_rows`, [image, band, class, column].
template <int kSize, typename scalar_t, typename acc_t, typename Rows>
__device__ void process_columns(const UpsampledArgs<scalar_t, Rows>& args,
                                const UpsampledPlan& plan, acc_t* first_rows, bool wants_max,
                                unsigned char* shared, const Divisors<acc_t>& divisors,
                                ThreadSums& sums) {
  const auto num_classes = static_cast<int>(args.num_classes());
  const PatchMemory<acc_t, kSize> memory(shared, num_classes, plan.keeps_exps);
  const bool writes_gradient = args.rows.grad_logits != nullptr;
  const auto max_rows = static_cast<int>(args.vertical.max_pixels());
  const auto max_columns = static_cast<int>(args.horizontal.max_pixels());
  const auto band_cells = static_cast<int>(plan.band_cells);
  for (int64_t strip = blockIdx.x; strip < plan.num_strips(); strip += gridDim.x) {
    const Column<acc_t> column(args, plan, strip, memory.lane);
    int side = 0;
    UniformGradient<acc_t> uniform;
    for (int cls = memory.warp; cls < num_classes; cls += memory.num_warps) {
      memory.gradient(0, cls) = 0;
      memory.gradient(1, cls) = 0;
    }
    // Writes the gradient of the row of elements that lies above all that follows. `to`: where that
    // of the column's class 0 goes, or null.
    const auto write_row = [&](acc_t* to, int64_t class_stride) {
      for (int cls = memory.warp; cls < num_classes; cls += memory.num_warps) {
        acc_t& gradient = memory.gradient(side, cls);
        if (to != nullptr) {
          to[cls * class_stride] = gradient - uniform.above;
        }
        gradient = 0;
      }
      side = 1 - side;
      uniform = {uniform.below, 0};
    };
    const bool has_element = column.is_own && column.cell < args.horizontal.in;
    const auto element = [&](int row) {
      const bool exists = has_element && row >= 0 && row < args.vertical.in;
      return exists ? args.grad.at(column.image, row) + column.cell * args.grad.column_stride
                    : nullptr;
    };
    const int first_cell = column.band * band_cells;
    acc_t max_below = 0;
    for (int i = 0; i < band_cells; ++i) {
      const AxisCell<acc_t> vertical(args.vertical, first_cell + i);
      CellCorners<scalar_t, acc_t> corners(args.logits, column.image, vertical, column.cells);
      const acc_t max_above = i == 0 ? corners.max_of(0, memory, num_classes) : max_below;
      max_below = corners.max_of(2, memory, num_classes);
      corners.max = std::fmax(max_above, max_below);
      for (int row = 0; row < max_rows; row += kSize) {
        for (int first = 0; first < max_columns; first += kSize) {
          process_patch(args, corners, column, vertical, row, first, wants_max, side, memory,
                        uniform, divisors, sums);
        }
      }
      if (writes_gradient) {
        if (i == 0 && column.band > 0) {
          const int64_t band = column.image * plan.num_bands + column.band;
          acc_t* row = first_rows + band * num_classes * args.horizontal.in;
          write_row(has_element ? row + column.cell : nullptr, args.horizontal.in);
        } else {
          write_row(element(first_cell + i - 1), args.grad.class_stride);
        }
      }
    }
    if (writes_gradient) {
      write_row(element(first_cell + band_cells - 1), args.grad.class_stride);
    }
  }
}

// The loss and, on request, the statistics of every pixel and the gradient for an upstream gradient
// of 1.
// Work split:  a warp has 32 columns of cells, the last one its neighbour's, a lane each; the warps
//              of a block have the same ones and share the classes. Blocks stride over the columns
// Reads:       logits: each element from the four cells around it, for the maxima, the sums and,
//              unless exponentials are kept, the gradient (the caches have it after the first);
//              labels and alpha, once, by one warp; class_weights; partials.counts, or all labels
// Writes:      on request row_loss, row_cross_entropy, row_max, row_sum_exp, row_argmax, and the
//              gradient once, coalesced if the column stride is 1, but for first_rows, which
//              add_bands adds; partials.sums [gridDim.x]
// Shared mem:  merge_block's; dynamic: PatchMemory
// Sync:        merge_block's, before and after the columns; PatchMemory's and finish_patch's: all
//              warps of a block see the same sums, so they go the same way
// Numerics:    acc_t; see upsampled_patches.cuh. The sums over pixels are in double
// Assumes:     blockDim.x is a multiple of 32, at most kMaxUpsampledThreads, and the dynamic shared
//              memory PatchMemory::bytes() (launch_upsampled_cuda.cu)
// Used when:   kSize = 4 if a cell has more than two pixels in both axes and acc_t is float; else 2
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxUpsampledThreads, kMinUpsampledBlocks)
    outlier_exposure_forward_upsampled_kernel(UpsampledForwardArgs<scalar_t, acc_t> args,
                                              Partials partials, UpsampledPlan plan,
                                              acc_t* first_rows) {
  OE_EXT_DYNAMIC_SHARED(shared);
  const Divisors<acc_t> divisors(forward_divisors(args.rows, partials));
  ThreadSums sums;
  process_columns<kSize>(args, plan, first_rows, args.rows.row_max != nullptr, shared, divisors,
                         sums);
  sums.leave(partials);
}

// The gradient of every element.
// Work split:  as the forward kernel's, and so are its reads, writes, shared memory, barriers,
//              numerics and assumptions; it reads the upstream gradient of each pixel, too
template <typename scalar_t, typename acc_t, int kSize>
__global__ void __launch_bounds__(kMaxUpsampledThreads, kMinUpsampledBlocks)
    outlier_exposure_backward_upsampled_kernel(UpsampledBackwardArgs<scalar_t, acc_t> args,
                                               UpsampledPlan plan, acc_t* first_rows) {
  OE_EXT_DYNAMIC_SHARED(shared);
  const Divisors<acc_t> divisors(args.rows.divisors());
  ThreadSums no_sums;
  process_columns<kSize>(args, plan, first_rows, /*wants_max=*/false, shared, divisors, no_sums);
}

// Adds what the bands have left of the rows that they share, and writes the loss of a forward.
// Work split:  threads stride over the elements of these rows; the first block has the loss
// Reads:       first_rows [image, band, class, column], grad; partials
// Writes:      grad; loss, counts
// Shared mem:  merge_block's     Sync: merge_block's
// Numerics:    acc_t; the loss in double, cast once
// Assumes:     blockDim.x is a multiple of 32 (launch_upsampled_cuda.cu)
// Used when:   there are several bands, or a loss; after the columns
template <typename acc_t>
__global__ void __launch_bounds__(kReduceThreads, kMinBlocks)
    outlier_exposure_add_bands_kernel(ImageView<acc_t> grad, int64_t num_images,
                                      int64_t num_classes, int64_t num_columns, UpsampledPlan plan,
                                      const acc_t* first_rows, LossOutput<acc_t> output,
                                      DivisorRule rule, const double* counts, int64_t num_pixels,
                                      Partials partials) {
  const int64_t band_size = num_classes * num_columns;
  const int64_t shared_bands = plan.num_bands - 1;
  const int64_t size = grad.data != nullptr ? num_images * shared_bands * band_size : 0;
  for (int64_t i = grid_thread(); i < size; i += grid_threads()) {
    const int64_t image = i / (shared_bands * band_size);
    const int64_t band = i / band_size % shared_bands + 1;
    const int64_t cls = i / num_columns % num_classes;
    const int64_t column = i % num_columns;
    grad.at(image,
            band * plan.band_cells - 1)[cls * grad.class_stride + column * grad.column_stride] +=
        first_rows[((image * plan.num_bands + band) * num_classes + cls) * num_columns + column];
  }
  if (blockIdx.x == 0 && output.loss != nullptr) {
    write_loss(output, rule, counts, num_pixels, partials);
  }
}

}  // namespace oe_ext::cuda
