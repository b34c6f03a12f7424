// The kernels of one tile, compiled for the instruction set of the including file. Which one runs:
//
//   logits and gradient                       | kernel             | memory is read
//   contiguous rows of kMinLongRow or more    | *_long_rows        | in place, row by row
//   any other, all classes fit in scratch     | *_in_scratch       | once, into scratch
//   any other, more classes                   | *_in_chunks        | three times, chunk by chunk
//
// Scratch holds [class][row]. Pixels are copied there (or read in place), contiguous rows (also of
// channels_last) are transposed in squares, and other strides are loaded one by one. All dtypes
// share the kernels: double computes in double; float, Half and BFloat16 compute in float, and the
// last two are widened when loaded.
#pragma once

#include "finish_rows.h"
#include "long_rows.h"
#include "tile_rows.h"
#include "upsampled_bands.h"

namespace oe_ext::cpu {
namespace {

// ---- Logits as [class][row] in scratch

// Loads a tile, and zeroes the rows whose logits are not needed.
template <typename scalar_t, typename acc_t>
void load_active(const TileView<const scalar_t>& logits, const TileRows<acc_t>& rows,
                 const Tile<acc_t>& tile) {
  load_tile(logits, rows, tile);
  if (!rows.all_active) {
    clear_rows(tile, rows.padded, rows.active);
  }
}

// Turns the exponentials of a tile, whose classes start at first_class, into gradients in the
// tensor.
template <typename scalar_t, typename acc_t>
void finish_gradients(const Tile<acc_t>& tile, int64_t first_class, const acc_t* spread,
                      TileRows<acc_t>& rows, bool may_be_inactive, const TileView<scalar_t>& grad) {
  subtract_at_labels(tile, first_class, rows);
  if (spread != nullptr) {
    subtract_at_classes(tile, spread + first_class, rows);
  }
  if (may_be_inactive) {
    clear_rows(tile, rows.padded, rows.active);
  }
  store_gradients(tile, rows, grad.from_class(first_class));
}

// Can the kernel read a tile in place, as [class][row]? That takes 0.86 to 0.97 of the time.
template <typename scalar_t, typename acc_t>
bool reads_in_place(const TileView<const scalar_t>& logits, const TileRows<acc_t>& rows) {
  return std::is_same_v<scalar_t, acc_t> && logits.row_stride == 1 && rows.size == rows.padded &&
         rows.all_active;
}

template <typename scalar_t, typename acc_t>
void forward_in_scratch(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        const GroupDivisors& divisors, acc_t* scratch, TileRows<acc_t>& rows,
                        GroupSums& sums) {
  const int64_t num_classes = args.layout.num_classes;
  const Tile<acc_t> tile{scratch, tiling.tile_rows, num_classes};
  const TileView<const scalar_t> logits(args.logits, args.layout, rows.first);
  Tile<const acc_t> source = tile.as_source();
  if (reads_in_place(logits, rows)) {
    source.data = reinterpret_cast<const acc_t*>(logits.data);
    source.stride = logits.class_stride;
  } else {
    load_active(logits, rows, tile);
  }
  raise_maxima(source, rows);
  find_logits_at_labels(source, 0, rows);
  if (num_classes <= kSumClasses) {
    add_exponentials(source, tile, args.class_spread, rows, nullptr);
  } else {
    WideSums wide;
    add_exponentials(source, tile, args.class_spread, rows, &wide);
  }
  finish_rows(args, divisors, rows, sums);
  if (args.grad_logits != nullptr) {
    finish_gradients(tile, 0, args.class_spread, rows, args.row_cross_entropy != nullptr,
                     TileView<scalar_t>(args.grad_logits, args.grad_layout, rows.first));
  }
}

// Calls use(tile, first_class) for each chunk of classes that fits in scratch.
template <typename scalar_t, typename acc_t, typename Use>
void for_each_chunk(const RowArgs<scalar_t, acc_t>& args, const Tiling& tiling, acc_t* scratch,
                    TileRows<acc_t>& rows, const Use& use) {
  const int64_t num_classes = args.layout.num_classes;
  const TileView<const scalar_t> view(args.logits, args.layout, rows.first);
  for (int64_t cls = 0; cls < num_classes; cls += tiling.chunk_classes) {
    const int64_t size = std::min(tiling.chunk_classes, num_classes - cls);
    const Tile<acc_t> tile{scratch, tiling.tile_rows, size};
    load_active(view.from_class(cls), rows, tile);
    use(tile, cls);
  }
}

// Writes the gradients of a tile from its statistics.
template <typename scalar_t, typename acc_t>
void write_gradients_in_chunks(const RowArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                               bool may_be_inactive, acc_t* scratch, TileRows<acc_t>& rows) {
  const TileView<scalar_t> to(args.grad_logits, args.grad_layout, rows.first);
  for_each_chunk(args, tiling, scratch, rows, [&](const auto& tile, int64_t cls) {
    add_exponentials<false>(tile.as_source(), tile, args.class_spread, rows, nullptr);
    finish_gradients(tile, cls, args.class_spread, rows, may_be_inactive, to);
  });
}

template <typename scalar_t, typename acc_t>
void forward_in_chunks(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                       const GroupDivisors& divisors, acc_t* scratch, TileRows<acc_t>& rows,
                       GroupSums& sums) {
  for_each_chunk(args, tiling, scratch, rows, [&](const auto& tile, int64_t cls) {
    raise_maxima(tile.as_source(), rows);
    find_logits_at_labels(tile.as_source(), cls, rows);
  });
  WideSums wide;
  const bool spreads = args.class_spread != nullptr;
  for_each_chunk(args, tiling, scratch, rows, [&](const auto& tile, int64_t cls) {
    const acc_t* spread = spreads ? args.class_spread + cls : nullptr;
    add_exponentials(tile.as_source(), tile, spread, rows, &wide);
  });
  finish_rows(args, divisors, rows, sums);
  if (args.grad_logits != nullptr) {
    write_gradients_in_chunks(args, tiling, args.row_cross_entropy != nullptr, scratch, rows);
  }
}

// ---- Forward and backward

template <typename scalar_t, typename acc_t>
TaskResult forward_tile(const ForwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                        int64_t tile, const GroupDivisors& divisors, acc_t* scratch) {
  TileRows<acc_t> rows(tiling.begin(tile), tiling.size(tile));
  TaskResult result = read_labels(args, args.row_cross_entropy != nullptr, rows);
  if (result.bad_row >= 0) {
    return result;
  }
  clear_statistics(rows);
  if (tiling.long_rows) {
    forward_long_rows(args, tiling, divisors, scratch, rows, result.sums);
  } else if (tiling.chunk_classes < args.layout.num_classes) {
    forward_in_chunks(args, tiling, divisors, scratch, rows, result.sums);
  } else {
    forward_in_scratch(args, tiling, divisors, scratch, rows, result.sums);
  }
  return result;
}

// Writes the gradient from the statistics that the forward saved.
template <typename scalar_t, typename acc_t>
TaskResult backward_tile(const BackwardArgs<scalar_t, acc_t>& args, const Tiling& tiling,
                         int64_t tile, acc_t* scratch) {
  TileRows<acc_t> rows(tiling.begin(tile), tiling.size(tile));
  const TaskResult result = read_labels(args, false, rows);
  if (result.bad_row >= 0) {
    return result;
  }
  restore_rows(args, rows);
  if (tiling.long_rows) {
    write_gradients_from_logits(args, rows, scratch);
  } else {
    write_gradients_in_chunks(args, tiling, /*may_be_inactive=*/false, scratch, rows);
  }
  return result;
}

template <typename scalar_t, typename acc_t>
constexpr TileKernels<scalar_t, acc_t> tile_kernels() {
  return {&count_rows<acc_t>, &forward_tile<scalar_t, acc_t>, &backward_tile<scalar_t, acc_t>,
          &upsampled_band<scalar_t, acc_t, ForwardArgs<acc_t, acc_t>>,
          &upsampled_band<scalar_t, acc_t, BackwardArgs<acc_t, acc_t>>};
}

constexpr Kernels make_kernels() {
  return {tile_kernels<float, float>(), tile_kernels<double, double>(),
          tile_kernels<c10::Half, float>(), tile_kernels<c10::BFloat16, float>()};
}

}  // namespace
}  // namespace oe_ext::cpu
