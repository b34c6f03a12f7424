// How the CPU kernels cut rows of logits into tiles, and the sizes of tiles.
#pragma once

#include <cstdint>

#include "../core/kernel_args.h"

namespace oe_ext::cpu {

// Rows that the arrays of TileRows hold.
constexpr int64_t kMaxTileRows = 256;
// Padding rows fill a tile up to a multiple of this, the lanes of the widest vector.
constexpr int64_t kTileRowsStep = 16;
// Rounds up to whole steps of rows, or of other lanes.
constexpr int64_t padded_to_step(int64_t size) {
  return (size + kTileRowsStep - 1) / kTileRowsStep * kTileRowsStep;
}
// A few cache lines per class, and enough rows for unrolled vector loops.
constexpr int64_t kMinTileRows = 64;
// Scratch memory for a tile of few classes, or of pixels; it fits in cache.
constexpr int64_t kScratchBytes = 256 * 1024;
// Contiguous rows with at least this many classes are processed one by one.
constexpr int64_t kMinLongRow = 64;
// Logits in one tile of long rows; their gradients stay in cache between two passes.
constexpr int64_t kLongRowTile = 32768;
// A long row is summed in blocks of at most this many logits; the sums of blocks are added in
// double.
constexpr int64_t kRowBlock = 1024;

// How rows are split into tiles, and the classes of a tile into chunks that fit its scratch memory.
struct Tiling {
  // grad_layout: the layout of the gradients to write, or null.
  Tiling(const RowLayout& layout, const RowLayout* grad_layout, int64_t element_size)
      : num_inner(layout.num_inner), num_outer(layout.num_outer) {
    const int64_t num_classes = layout.num_classes > 0 ? layout.num_classes : 1;
    const int64_t scratch_elements = kScratchBytes / element_size;
    long_rows = num_classes >= kMinLongRow && layout.class_stride == 1 &&
                (grad_layout == nullptr || grad_layout->class_stride == 1);
    if (long_rows) {
      tile_rows = between(1, kLongRowTile / num_classes, kMaxTileRows);
      chunk_classes = tile_rows * num_classes <= scratch_elements ? num_classes : 0;
    } else {
      const int64_t rows = scratch_elements / num_classes / kTileRowsStep * kTileRowsStep;
      tile_rows = between(kMinTileRows, rows, kMaxTileRows);
      chunk_classes = between(1, scratch_elements / tile_rows, num_classes);
    }
    tiles_per_outer = (num_inner + tile_rows - 1) / tile_rows;
  }

  int64_t num_tiles() const { return num_outer * tiles_per_outer; }
  int64_t begin(int64_t tile) const {
    return tile / tiles_per_outer * num_inner + tile % tiles_per_outer * tile_rows;
  }
  int64_t size(int64_t tile) const {
    const int64_t rest = num_inner - tile % tiles_per_outer * tile_rows;
    return rest < tile_rows ? rest : tile_rows;
  }
  // Size of a tile's scratch memory, in elements of the type of the arithmetic: its classes, and
  // those that the last square of eight writes past them; for long rows, two blocks of a row.
  int64_t scratch_size() const {
    return long_rows ? tile_rows * chunk_classes + 2 * kRowBlock : tile_rows * (chunk_classes + 8);
  }

  int64_t num_inner;
  int64_t num_outer;
  bool long_rows = false;  // processed one by one, along the classes
  int64_t tile_rows = 1;
  int64_t tiles_per_outer = 0;
  int64_t chunk_classes = 0;  // 0: long rows that do not fit

 private:
  static int64_t between(int64_t low, int64_t x, int64_t high) {
    return x < low ? low : (x > high ? high : x);
  }
};

}  // namespace oe_ext::cpu
