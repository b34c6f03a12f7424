// How the CPU kernels cut an upsampled map into work. A band is a range of cells of the vertical
// axis, in one image; a thread works on one band at a time. The shapes alone decide all cuts, so
// the bits of a result do not depend on the number of threads.
//
// Each cell is cut into patches of 4 x 4 or 2 x 2 pixels, or each pixel is a patch. Loops run over
// lanes, one for each patch in a row of patches of a strip, from the left. In patches of more than
// one pixel, a lane's second ends are the first ends of the next lane: the lane after the last
// patch has its second ends alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/resize.h"
#include "tiling.h"

namespace oe_ext::cpu {

// The lanes of a strip: their number is known to the compiler, and what they need fits in cache.
constexpr int64_t lanes_of(int patch_pixels) { return patch_pixels == 4 ? 16 : 48; }
// The ends that the pixels of a patch's row lie between.
constexpr int ends_of(int patch_pixels) { return patch_pixels == 1 ? 1 : 2; }

// Classes whose gradients are summed at columns at once: sums of one class wait for each other.
constexpr int64_t kColumnsAtOnce = 4;

// One axis, cut into patches, from first_patch to before end_patch.
template <typename acc_t>
struct PatchAxis {
  PatchAxis(const ResizeAxis& axis, int patch_pixels)
      : pixels(patch_pixels),
        out(axis.out),
        first_cell(axis.place(0).cell),
        end_cell(axis.place(axis.out - 1).cell + 1),
        phases(pixels == 1 ? 0 : axis.scale() / pixels) {
    if (pixels > 1 && !axis.align_corners) {
      missing = axis.scale() - axis.begin(first_cell + 1);
    }
    first_patch = missing / pixels;
    end_patch = (missing + out + pixels - 1) / pixels;
    for (int64_t cell = first_cell; cell <= end_cell; ++cell) {
      begins.push_back(std::max(first_patch, (missing + axis.begin(cell)) / pixels));
    }
    begins.back() = end_patch;
    const int64_t num_ends = end_patch + ends_of(pixels) - 1;
    for (int64_t end = 0; end < num_ends; ++end) {
      positions.push_back(pixels == 1
                              ? axis.place(end).template fraction<acc_t>()
                              : static_cast<acc_t>(end % phases) / static_cast<acc_t>(phases));
    }
    for (int64_t cell = first_cell; cell <= end_cell; ++cell) {
      first_ends.push_back(pixels == 1 ? begin(cell) : (cell - first_cell) * phases);
    }
    first_ends.back() = std::min(first_ends.back(), num_ends);
    first_ends.push_back(num_ends);
    positions.resize(num_ends + kTileRowsStep);  // whole vectors may be read
  }

  int64_t num_cells() const { return end_cell - first_cell; }
  int64_t num_columns() const { return num_cells() + 1; }
  // The patches of a cell: from begin(cell) to before begin(cell + 1).
  int64_t begin(int64_t cell) const { return begins[cell - first_cell]; }
  // The first pixel of a patch, if it were whole.
  int64_t pixel(int64_t patch) const { return patch * pixels - missing; }

  int pixels;  // of a patch
  int64_t out;
  int64_t first_cell;  // cells that have pixels: from first_cell to before end_cell
  int64_t end_cell;
  int64_t phases;       // the patches of a cell, if all have as many; else 0
  int64_t missing = 0;  // pixels that the first cell lacks
  int64_t first_patch = 0;
  int64_t end_patch = 0;
  std::vector<int64_t> begins;
  // Where patches are not the same in all cells, or there are other than 2, 4 or 8 in each: the
  // first end of each cell, and ends' positions in their cells.
  std::vector<int64_t> first_ends;
  std::vector<acc_t> positions;
};

// Neighbouring patches of a row.
struct Strip {
  int64_t first_patch;
  int64_t num_patches;
};

template <typename acc_t>
class Upsampling {
 public:
  Upsampling(const ResizeAxis& vertical, const ResizeAxis& horizontal, int64_t num_classes)
      : patch_pixels_(patch_pixels_of(vertical, horizontal)),
        centered_(patch_pixels_ > 1 && !horizontal.align_corners),
        rows_(vertical, patch_pixels_),
        columns_(horizontal, patch_pixels_) {
    cut_rows(horizontal.out * num_classes * vertical.out / rows_.num_cells());
    cut_columns();
  }

  int patch_pixels() const { return patch_pixels_; }
  // Do pixels lie in the middle of what is theirs of a cell?
  bool centered() const { return centered_; }
  const PatchAxis<acc_t>& rows() const { return rows_; }
  const PatchAxis<acc_t>& columns() const { return columns_; }
  int64_t num_bands() const { return (rows_.num_cells() + band_cells_ - 1) / band_cells_; }
  // The cells of a band: from begin_cell(band) to before begin_cell(band + 1).
  int64_t begin_cell(int64_t band) const {
    return std::min(rows_.first_cell + band * band_cells_, rows_.end_cell);
  }
  const std::vector<Strip>& strips() const { return strips_; }

 private:
  // The bands of an image: enough for many threads, but every band costs a row of partial
  // gradients. Logits of the full size in one band: not too few for a thread, nor needlessly many.
  static constexpr int64_t kBands = 16;
  static constexpr int64_t kFewLogits = int64_t(1) << 16;
  static constexpr int64_t kManyLogits = int64_t(1) << 21;

  static int patch_pixels_of(const ResizeAxis& vertical, const ResizeAxis& horizontal) {
    const int64_t scale = vertical.scale() | horizontal.scale();
    const bool whole = vertical.scale() > 0 && horizontal.scale() > 0;
    return !whole || scale % 2 != 0 ? 1 : scale % 4 != 0 ? 2 : 4;
  }

  // `logits`: of the full size, in a row of cells.
  void cut_rows(int64_t logits) {
    const int64_t at_least_one = std::max<int64_t>(1, logits);
    const int64_t num_cells = rows_.num_cells();
    const int64_t cells = std::min(kManyLogits / at_least_one, num_cells / kBands);
    band_cells_ = std::clamp(std::max(cells, kFewLogits / at_least_one), int64_t(1), num_cells);
  }

  // Strips of about the same size.
  void cut_columns() {
    const int64_t most = lanes_of(patch_pixels_) - (ends_of(patch_pixels_) - 1);
    const int64_t num_patches = columns_.end_patch - columns_.first_patch;
    const int64_t num_strips = (num_patches + most - 1) / most;
    const int64_t size = (num_patches + num_strips - 1) / num_strips;
    for (int64_t patch = columns_.first_patch; patch < columns_.end_patch; patch += size) {
      strips_.push_back({patch, std::min(size, columns_.end_patch - patch)});
    }
  }

  int patch_pixels_;
  bool centered_;
  PatchAxis<acc_t> rows_;
  PatchAxis<acc_t> columns_;
  int64_t band_cells_ = 1;
  std::vector<Strip> strips_;
};

namespace {

// Arrays of a band in scratch memory. "Of rows" means: of each class, then of the sum of all
// classes, then of the shift. An end is that of a patch: on its left side, or, in patches of more
// than one pixel, on its right side, which is the left one of the next patch.
template <typename acc_t>
struct BandMemory {
  int64_t size = 0;
  int64_t column_stride;
  int64_t end_stride;
  acc_t* columns;  // of rows [column]: a row of the source, whose first and last may stand twice
  acc_t* top;      // of rows [patch]: the ends in the row of elements above
  acc_t* bottom;   // and below
  // [class, uniform][end][patch]: the gradient of the ends in the row of elements above; that of
  // the uniform distribution is the same for all classes.
  acc_t* top_gradient;
  acc_t* bottom_gradient;  // and below
  acc_t* uniform;          // [patch]: the gradient of ends of the uniform distribution
  acc_t* ends;             // and of kColumnsAtOnce classes
  // Of one strip:
  acc_t* x;          // of rows [pixel of a column][lane]: the ends in the rows of pixels
  acc_t* exps;       // [class][pixel of a column][lane]: exponentials of x / kPower; then ones
  acc_t* has_label;  // [class]: not 0 if at_labels is not 0 in that class
  acc_t* at_labels;  // [class][lane][corner]: what a row of patches subtracts at its labels
  acc_t* argmax;     // [pixel of a patch][lane]: the class of the largest logit

  // `scratch` may be null: then only `size` is set.
  BandMemory(const Upsampling<acc_t>& cuts, int64_t num_classes, acc_t* scratch) {
    const auto take = [&](int64_t numbers) {
      acc_t* array = scratch == nullptr ? nullptr : scratch + size;
      size += padded_to_step(numbers + 1);  // the last lane has a next one
      return array;
    };
    const int64_t pixels = cuts.patch_pixels();
    const int64_t lanes = lanes_of(cuts.patch_pixels());
    const int64_t sides = ends_of(cuts.patch_pixels());
    // The last strip's lanes may lie beyond the row's patches.
    end_stride = padded_to_step(cuts.columns().end_patch + lanes);
    column_stride =
        cuts.columns().phases == 1 ? end_stride : padded_to_step(cuts.columns().num_columns());
    // Squares are transposed whole, so up to eight classes more.
    columns = take((num_classes + 8) * column_stride);
    top = take((num_classes + 8) * end_stride);
    bottom = take((num_classes + 8) * end_stride);
    top_gradient = take((num_classes + 1) * sides * end_stride);
    bottom_gradient = take((num_classes + 1) * sides * end_stride);
    uniform = take(end_stride);
    ends = take(kColumnsAtOnce * end_stride);
    x = take((num_classes + 2) * pixels * lanes);
    exps = take((num_classes + 1) * pixels * lanes);
    has_label = take(num_classes + 1);
    at_labels = take(num_classes * lanes * 2 * sides);
    argmax = take(pixels * pixels * lanes);
  }
};

}  // namespace
}  // namespace oe_ext::cpu
