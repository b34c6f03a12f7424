// Where the pixels of a bilinear resize lie between the source's elements, as torch defines it
// (area_pixel_compute_source_index of ATen/native/UpSample.h), but in exact fractions.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace oe_ext {

// One axis of a resize. Cell q lies between the elements q - 1 and q of the source, and both are
// the same at the edges, where torch holds the value: cell 0 has element 0 at both ends, and cell
// `in` element in - 1.
struct ResizeAxis {
  int64_t in = 1;
  int64_t out = 1;
  bool align_corners = false;

  // A position within a cell: between its first element (0) and its second (1), as a fraction.
  struct Place {
    int64_t cell;
    int64_t numerator;
    int64_t denominator;

    template <typename acc_t>
    C10_HOST_DEVICE acc_t fraction() const {
      return static_cast<acc_t>(numerator) / static_cast<acc_t>(denominator);
    }
  };

  // Pixel dst lies at the cell and place (first + dst * step) / denominator: at
  // dst * (in - 1) / (out - 1), or (dst + 0.5) * in / out - 0.5, plus 1 for the cell.
  C10_HOST_DEVICE bool has_one_place() const { return align_corners && (in == 1 || out == 1); }
  C10_HOST_DEVICE int64_t denominator() const {
    return has_one_place() ? 1 : align_corners ? out - 1 : 2 * out;
  }
  C10_HOST_DEVICE int64_t step() const {
    return has_one_place() ? 0 : align_corners ? in - 1 : 2 * in;
  }
  C10_HOST_DEVICE int64_t first() const { return align_corners ? denominator() : in + out; }

  C10_HOST_DEVICE Place place(int64_t dst) const {
    const int64_t position = first() + dst * step();
    return {position / denominator(), position % denominator(), denominator()};
  }

  // The first pixel that lies in a cell or after it; `out` if there is none.
  C10_HOST_DEVICE int64_t begin(int64_t cell) const {
    const int64_t distance = cell * denominator() - first();
    if (distance <= 0 || step() == 0) {
      return distance <= 0 ? 0 : out;
    }
    const int64_t pixel = (distance + step() - 1) / step();
    return pixel < out ? pixel : out;
  }

  // No cell has more pixels.
  C10_HOST_DEVICE int64_t max_pixels() const {
    return step() == 0 ? out : (denominator() + step() - 1) / step();
  }

  // The pixels of a cell if all cells have as many, at the same places; else 0. Cells at the edges
  // may lack some.
  C10_HOST_DEVICE int64_t scale() const {
    const int64_t cells = align_corners ? in - 1 : in;
    const int64_t pixels = align_corners ? out - 1 : out;
    return cells > 0 && pixels % cells == 0 ? pixels / cells : 0;
  }

  C10_HOST_DEVICE int64_t first_element(int64_t cell) const { return cell > 0 ? cell - 1 : 0; }
  C10_HOST_DEVICE int64_t second_element(int64_t cell) const { return cell < in ? cell : in - 1; }
};

}  // namespace oe_ext
