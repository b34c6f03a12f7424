// How the CPU kernels cut an upsampled map into work. A band is a range of cells of the vertical
// axis, in one image; a thread works on one band at a time, strip by strip. The shapes alone decide
// all cuts, so the bits of a result do not depend on the number of threads.
//
// Along a row, every cell is `phases` segments of 1, 2 or 4 neighbouring pixels. Loops run over
// lanes, one for each segment of a strip: lane = phase * num_cells + cell.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../core/resize.h"
#include "tiling.h"

namespace oe_ext::cpu {

// Neighbouring cells, from the left; or, if a cell has more than kRowCapacity pixels, a part of it.
template <typename acc_t>
struct Strip {
  int64_t first_cell;
  int64_t num_cells;
  int64_t num_lanes;
  int64_t first_pixel;
  int64_t num_pixels;
  const acc_t* position;  // [num_lanes]: of a segment's first end within its cell
  const int32_t* place;   // [num_pixels]: index in its segment * padded_lanes + lane

  int64_t padded_lanes() const { return padded_to_step(num_lanes); }
};

// The cells of one axis that have pixels: from `first` to before `end`.
template <typename acc_t>
struct Cells {
  explicit Cells(const ResizeAxis& axis)
      : first(axis.place(0).cell), end(axis.place(axis.out - 1).cell + 1) {
    position.resize(axis.out);
    for (int64_t pixel = 0; pixel < axis.out; ++pixel) {
      position[pixel] = axis.place(pixel).template fraction<acc_t>();
    }
    begins.resize(size() + 1);
    for (int64_t cell = first; cell <= end; ++cell) {
      begins[cell - first] = axis.begin(cell);
    }
  }

  int64_t size() const { return end - first; }
  // The pixels of a cell: from begin(cell) to before begin(cell + 1).
  int64_t begin(int64_t cell) const { return begins[cell - first]; }
  int64_t num_pixels(int64_t cell) const { return begin(cell + 1) - begin(cell); }

  int64_t first;
  int64_t end;
  std::vector<acc_t> position;  // of each pixel, within its cell
  std::vector<int64_t> begins;
};

template <typename acc_t>
class Upsampling {
 public:
  Upsampling(const ResizeAxis& vertical, const ResizeAxis& horizontal, int64_t num_classes)
      : rows_(vertical), columns_(horizontal) {
    cut_rows(horizontal.out * num_classes * vertical.out / rows_.size());
    cut_columns(horizontal, num_classes);
  }

  const Cells<acc_t>& rows() const { return rows_; }
  int64_t num_bands() const { return (rows_.size() + band_cells_ - 1) / band_cells_; }
  // The cells of a band: from begin_cell(band) to before begin_cell(band + 1).
  int64_t begin_cell(int64_t band) const {
    return std::min(rows_.first + band * band_cells_, rows_.end);
  }

  const std::vector<Strip<acc_t>>& strips() const { return strips_; }
  int segment_pixels() const { return segment_pixels_; }
  bool centered() const { return centered_; }
  int64_t phases() const { return phases_; }
  int64_t padded_lanes() const { return padded_lanes_; }  // of the widest strip
  int64_t padded_cells() const { return padded_cells_; }

 private:
  // The bands of an image: enough for many threads, but every band costs a row of partial
  // gradients. Logits of the full size in one band: not too few for a thread, nor needlessly many.
  static constexpr int64_t kBands = 16;
  static constexpr int64_t kFewLogits = int64_t(1) << 16;
  static constexpr int64_t kManyLogits = int64_t(1) << 21;
  static constexpr int64_t kMinLanes = 16;
  // Numbers in scratch memory for each class and lane.
  static constexpr int64_t kNumbersPerLogit = 10;

  // `logits`: of the full size, in a row of cells.
  void cut_rows(int64_t logits) {
    const int64_t at_least_one = std::max<int64_t>(1, logits);
    const int64_t cells = std::min(kManyLogits / at_least_one, rows_.size() / kBands);
    band_cells_ = std::clamp(std::max(cells, kFewLogits / at_least_one), int64_t(1), rows_.size());
  }

  void cut_columns(const ResizeAxis& axis, int64_t num_classes) {
    const int64_t scale = axis.scale();
    const bool has_segments = scale > 0 && scale % 2 == 0 && scale <= kRowCapacity;
    segment_pixels_ = !has_segments ? 1 : scale % 4 == 0 ? 4 : 2;
    centered_ = has_segments && !axis.align_corners;
    int64_t cell_pixels = has_segments ? scale : 1;
    for (int64_t cell = columns_.first; cell < columns_.end; ++cell) {
      cell_pixels = std::max(cell_pixels, columns_.num_pixels(cell));
    }
    phases_ = cell_pixels / segment_pixels_;
    // As many lanes as scratch memory and the arrays of TileRows hold.
    const int64_t in_scratch =
        2 * kScratchBytes / static_cast<int64_t>(sizeof(acc_t)) / (kNumbersPerLogit * num_classes);
    const int64_t most = std::min(std::max(kMinLanes, in_scratch), kRowCapacity / segment_pixels_);
    const int64_t strip_cells = cells_of_strip(std::max<int64_t>(1, most / phases_));
    const int64_t strip_lanes =
        has_segments ? strip_cells * phases_ : std::min(strip_cells * phases_, most);
    padded_cells_ = padded_to_step(strip_cells + 1);
    padded_lanes_ = padded_to_step(strip_lanes);

    place_.resize(axis.out);
    positions_.reserve(axis.out + columns_.size() * phases_);
    for (int64_t cell = columns_.first; cell < columns_.end; cell += strip_cells) {
      const int64_t num_cells = std::min(strip_cells, columns_.end - cell);
      const int64_t end = columns_.begin(cell + num_cells);
      const int64_t size = strip_lanes * segment_pixels_;
      for (int64_t pixel = columns_.begin(cell); pixel < end; pixel += size) {
        const int64_t lanes = std::min(num_cells * phases_, strip_lanes);
        add_strip({cell, num_cells, lanes, pixel, std::min(size, end - pixel), nullptr, nullptr},
                  has_segments);
      }
    }
  }

  // Strips of about the same size, with whole vectors of lanes.
  int64_t cells_of_strip(int64_t most) const {
    const int64_t num_strips = (columns_.size() + most - 1) / most;
    const int64_t lanes = (columns_.size() + num_strips - 1) / num_strips * phases_;
    return std::clamp<int64_t>(padded_to_step(lanes) / phases_, 1, most);
  }

  void add_strip(Strip<acc_t> strip, bool has_segments) {
    acc_t* position = positions_.data() + positions_.size();  // reserved: it stays where it is
    positions_.resize(positions_.size() + strip.num_lanes);
    for (int64_t lane = 0; has_segments && lane < strip.num_lanes; ++lane) {
      const int64_t phase = lane / strip.num_cells;
      position[lane] = static_cast<acc_t>(phase) / static_cast<acc_t>(phases_);
    }
    int64_t cell = strip.first_cell;
    for (int64_t pixel = strip.first_pixel; pixel < strip.first_pixel + strip.num_pixels; ++pixel) {
      while (pixel >= columns_.begin(cell + 1)) {
        ++cell;
      }
      // Of the pixel in its cell. A first cell at an edge lacks its first pixels, and a part of a
      // cell those of the parts before.
      int64_t index = pixel - std::max(columns_.begin(cell), strip.first_pixel);
      if (has_segments && cell == columns_.first) {
        index += phases_ * segment_pixels_ - columns_.num_pixels(cell);
      }
      const int64_t lane = index / segment_pixels_ * strip.num_cells + (cell - strip.first_cell);
      place_[pixel] = static_cast<int32_t>(index % segment_pixels_ * strip.padded_lanes() + lane);
      if (!has_segments) {
        position[lane] = columns_.position[pixel];
      }
    }
    strip.position = position;
    strip.place = place_.data() + strip.first_pixel;
    strips_.push_back(strip);
  }

  Cells<acc_t> rows_;
  Cells<acc_t> columns_;
  int64_t band_cells_ = 1;
  int segment_pixels_ = 1;
  bool centered_ = false;
  int64_t phases_ = 1;
  int64_t padded_lanes_ = 0;
  int64_t padded_cells_ = 0;
  std::vector<Strip<acc_t>> strips_;
  std::vector<acc_t> positions_;
  std::vector<int32_t> place_;
};

// Arrays of one strip, in scratch memory. The ends of segments are the first ends of all lanes, and
// then the second ends of the last phase. "Of rows" means: of each class, then of the sum of all
// classes, then of the shift.
template <typename acc_t>
struct StripMemory {
  int64_t size = 0;
  int64_t lanes;
  int64_t ends;
  acc_t* columns;      // [class][column]: a row of the source; and of rows
  acc_t* top;          // of rows [lane]: the first ends, in the row of elements above
  acc_t* bottom;       // and below
  acc_t* top_last;     // of rows: the second end of the last cell
  acc_t* bottom_last;  //
  acc_t* x;            // of rows [end]: in the row of pixels
  acc_t* last;         // of rows: the second end of the last cell
  acc_t* exps;         // [class][end]: exponentials of x / kPower; then ones
  acc_t* last_exps;    // of rows
  // [class][first, second end][lane]: what one row of pixels subtracts at its labels; zeros between
  // rows.
  acc_t* at_labels;
  // [class][first, second end][lane]: the gradient of the ends in the row of elements above; and of
  // the uniform distribution, which is the same for all classes.
  acc_t* top_gradient;
  acc_t* bottom_gradient;  // and below
  acc_t* argmax;           // [pixel of a segment][lane]: the class of the largest logit
  acc_t* factors;          // [exponentials, uniform][first, second end][pixel of a segment][lane]

  // `scratch` may be null: then only `size` is set.
  StripMemory(const Upsampling<acc_t>& cuts, int64_t num_classes, acc_t* scratch)
      : lanes(cuts.padded_lanes()), ends(cuts.padded_lanes() + cuts.padded_cells()) {
    const auto take = [&](int64_t numbers) {
      acc_t* array = scratch == nullptr ? nullptr : scratch + size;
      size += padded_to_step(numbers);
      return array;
    };
    const int64_t rows = num_classes + 2;
    // Squares are transposed whole, so up to eight classes more.
    columns = take((num_classes + 8) * cuts.padded_cells());
    top = take(rows * lanes);
    bottom = take(rows * lanes);
    top_last = take(rows);
    bottom_last = take(rows);
    x = take(rows * ends);
    last = take(rows);
    exps = take((num_classes + 1) * ends);
    last_exps = take(rows);
    at_labels = take((num_classes + 1) * 2 * lanes);
    top_gradient = take((num_classes + 1) * 2 * lanes);
    bottom_gradient = take((num_classes + 1) * 2 * lanes);
    argmax = take(cuts.segment_pixels() * lanes);
    factors = take(4 * cuts.segment_pixels() * lanes);
  }

  acc_t* end_x(int64_t cls) const { return x + cls * ends; }
  acc_t* end_exps(int64_t cls) const { return exps + cls * ends; }
  // Of a class and an end of segments, in arrays of that shape.
  int64_t of_end(int64_t cls, int64_t end) const { return (cls * 2 + end) * lanes; }
};

}  // namespace oe_ext::cpu
