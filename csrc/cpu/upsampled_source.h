// Moves rows of elements between the source of an upsampled map and the ends of segments in scratch
// memory: logits in, gradients out.
#pragma once

#include "upsampled_segments.h"

namespace oe_ext::cpu {
namespace {

// ---- Rows of the source

// The elements at the first ends of a strip's cells, and at the second end of the last one: the
// source's elements from `begin` to before `end`, as columns `offset`, `offset` + 1, ... The edges'
// elements appear twice.
struct StripElements {
  template <typename acc_t>
  StripElements(const Strip<acc_t>& strip, const ResizeAxis& axis)
      : num_columns(strip.num_cells + 1),
        begin(axis.first_element(strip.first_cell)),
        end(axis.second_element(strip.first_cell + strip.num_cells - 1) + 1),
        offset(strip.first_cell == 0 ? 1 : 0) {}

  int64_t num_columns;
  int64_t begin;
  int64_t end;
  int64_t offset;
};

// Loads a row of elements as [class][column], as acc_t.
template <typename scalar_t, typename acc_t>
void load_columns(const ImageView<const scalar_t>& logits, const scalar_t* row, int64_t num_classes,
                  const StripElements& elements, int64_t stride, acc_t* columns) {
  const int64_t size = elements.end - elements.begin;
  const scalar_t* from = row + elements.begin * logits.column_stride;
  load_any_rows(TileView<const scalar_t>(from, logits.column_stride, logits.class_stride), size,
                Tile<acc_t>{columns + elements.offset, stride, num_classes});
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    acc_t* column = columns + cls * stride;
    column[0] = column[elements.offset];
    std::fill(column + elements.offset + size, column + elements.num_columns,
              column[elements.offset + size - 1]);
  }
}

// Subtracts each column's largest logit; that and the sum of the differences become two more rows.
template <typename acc_t>
void shift_columns(int64_t num_classes, int64_t num_columns, int64_t stride, acc_t* columns) {
  double sums[kRowCapacity + 1] = {};
  acc_t* sum = columns + num_classes * stride;
  acc_t* max = sum + stride;
  std::fill_n(max, num_columns, std::numeric_limits<acc_t>::lowest());
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    const acc_t* x = columns + cls * stride;
#pragma omp simd
    for (int64_t i = 0; i < num_columns; ++i) {
      max[i] = x[i] > max[i] ? x[i] : max[i];
    }
  }
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    acc_t* x = columns + cls * stride;
#pragma omp simd
    for (int64_t i = 0; i < num_columns; ++i) {
      x[i] -= max[i];
      sums[i] += static_cast<double>(x[i]);
    }
  }
  for (int64_t i = 0; i < num_columns; ++i) {
    sum[i] = static_cast<acc_t>(sums[i]);
  }
}

// Interpolates a row of elements at the first ends of a strip's segments.
template <typename acc_t>
void set_ends_of_source(const Strip<acc_t>& strip, int64_t num_rows, const acc_t* columns,
                        int64_t stride, acc_t* ends, int64_t ends_stride, acc_t* last) {
  for (int64_t row = 0; row < num_rows; ++row) {
    const acc_t* from = columns + row * stride;
    last[row] = from[strip.num_cells];
    for (int64_t first = 0; first < strip.num_lanes; first += strip.num_cells) {
      const acc_t* position = strip.position + first;
      acc_t* to = ends + row * ends_stride + first;
      const int64_t size = std::min(strip.num_cells, strip.num_lanes - first);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const acc_t right = position[i];
        const acc_t between = multiply_add(right, from[i + 1], (acc_t(1) - right) * from[i]);
        to[i] = select(right == acc_t(0), from[i], between);
      }
    }
  }
}

// ---- Gradients of the source

// The gradient with respect to the first and the second ends of a strip's cells, from that of the
// ends of their segments.
template <int kEnds, typename acc_t>
void sum_ends(const Strip<acc_t>& strip, acc_t phase, const acc_t* left, const acc_t* right,
              acc_t* first_ends, acc_t* second_ends) {
  std::fill_n(first_ends, strip.num_cells, acc_t(0));
  std::fill_n(second_ends, strip.num_cells, acc_t(0));
  for (int64_t first = 0; first < strip.num_lanes; first += strip.num_cells) {
    const int64_t size = std::min(strip.num_cells, strip.num_lanes - first);
    const acc_t* position = strip.position + first;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      acc_t at_first = (acc_t(1) - position[i]) * left[first + i];
      acc_t at_second = position[i] * left[first + i];
      if constexpr (kEnds == 2) {
        const acc_t second = position[i] + phase;
        at_first = multiply_add(acc_t(1) - second, right[first + i], at_first);
        at_second = multiply_add(second, right[first + i], at_second);
      }
      first_ends[i] += at_first;
      second_ends[i] += at_second;
    }
  }
}

// Adds the gradient with respect to one row of elements, less that of the uniform distribution.
template <typename Segment, typename acc_t>
void add_to_source(const Strip<acc_t>& strip, acc_t phase, const StripElements& elements,
                   int64_t num_classes, const StripMemory<acc_t>& memory, const acc_t* gradient,
                   const ImageView<acc_t>& grad, acc_t* row) {
  alignas(64) acc_t ends[Segment::kEnds][kRowCapacity];
  alignas(64) acc_t columns[kRowCapacity + 1];
  alignas(64) acc_t second_ends[kRowCapacity];
  const int64_t size = elements.end - elements.begin;
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    for (int end = 0; end < Segment::kEnds; ++end) {
      acc_t* to = ends[end];
      const acc_t* from = gradient + memory.of_end(cls, end);
      const acc_t* less = gradient + memory.of_end(num_classes, end);
#pragma omp simd
      for (int64_t i = 0; i < strip.num_lanes; ++i) {
        to[i] = from[i] - less[i];
      }
    }
    sum_ends<Segment::kEnds>(strip, phase, ends[0], ends[Segment::kEnds - 1], columns, second_ends);
    columns[strip.num_cells] = 0;
#pragma omp simd
    for (int64_t i = 0; i < strip.num_cells; ++i) {
      columns[i + 1] += second_ends[i];
    }
    // The elements at the edges have two columns.
    acc_t* values = columns + elements.offset;
    if (elements.offset == 1) {
      values[0] += columns[0];
    }
    if (elements.offset + size < elements.num_columns) {
      values[size - 1] += values[size];
    }
    acc_t* to = row + cls * grad.class_stride + elements.begin * grad.column_stride;
    if (grad.column_stride == 1) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        to[i] += values[i];
      }
    } else {
      for (int64_t i = 0; i < size; ++i) {
        to[i * grad.column_stride] += values[i];
      }
    }
  }
}

}  // namespace
}  // namespace oe_ext::cpu
