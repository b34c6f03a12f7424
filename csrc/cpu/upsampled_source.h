// Moves rows of elements between the source of an upsampled map and the ends of patches in scratch
// memory: logits in, gradients out.
#pragma once

#include "upsampled_patches.h"

namespace oe_ext::cpu {
namespace {

// ---- Rows of the source

// The corners of a row of cells, as columns: the elements of the source, of which those at the
// edges stand twice where there are cells beyond them.
struct Columns {
  template <typename acc_t>
  Columns(const PatchAxis<acc_t>& axis, const ResizeAxis& resize)
      : size(resize.in), offset(axis.first_cell == 0 ? 1 : 0), count(axis.num_columns()) {}

  int64_t size;    // elements
  int64_t offset;  // the column of the first element
  int64_t count;   // columns
};

// Loads a row of elements as [class][column], as acc_t. Padding repeats the last element.
template <typename scalar_t, typename acc_t>
void load_columns(const TileView<const scalar_t>& logits, int64_t num_classes,
                  const Columns& columns, int64_t stride, acc_t* to) {
  load_any_rows(logits, columns.size, Tile<acc_t>{to + columns.offset, stride, num_classes});
  for (int64_t cls = 0; cls < num_classes; ++cls) {
    acc_t* first = to + cls * stride;
    acc_t* end = first + columns.offset + columns.size;
    *first = first[columns.offset];
    std::fill(end, first + stride, end[-1]);
  }
}

// The logits of a map, of whatever type: what uses them is compiled once for all.
template <typename acc_t>
class SourceRows {
 public:
  template <typename scalar_t>
  explicit SourceRows(const ImageView<const scalar_t>& logits)
      : logits_(&logits),
        load_([](const void* logits, int64_t image, int64_t element, int64_t num_classes,
                 const Columns& columns, int64_t stride, acc_t* to) noexcept {
          const auto& view = *static_cast<const ImageView<const scalar_t>*>(logits);
          const TileView<const scalar_t> row(view.at(image, element), view.column_stride,
                                             view.class_stride);
          load_columns(row, num_classes, columns, stride, to);
        }) {}

  // See load_columns().
  void load(int64_t image, int64_t element, int64_t num_classes, const Columns& columns,
            int64_t stride, acc_t* to) const {
    load_(logits_, image, element, num_classes, columns, stride, to);
  }

 private:
  const void* logits_;
  void (*load_)(const void* logits, int64_t image, int64_t element, int64_t num_classes,
                const Columns& columns, int64_t stride, acc_t* to) noexcept;
};

// Subtracts each column's largest logit; that and the sum of the differences become two more rows.
template <typename acc_t>
void shift_columns(int64_t num_classes, int64_t stride, acc_t* columns) {
  constexpr int64_t kBlock = 64;
  for (int64_t first = 0; first < stride; first += kBlock) {
    const int64_t size = std::min(kBlock, stride - first);
    alignas(64) acc_t part[kBlock];
    alignas(64) double sums[kBlock];
    acc_t* sum = columns + first + num_classes * stride;
    acc_t* max = sum + stride;
    std::fill_n(sums, size, 0);
    std::fill_n(max, size, std::numeric_limits<acc_t>::lowest());
    for (int64_t cls = 0; cls < num_classes; ++cls) {
      const acc_t* x = columns + first + cls * stride;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        max[i] = x[i] > max[i] ? x[i] : max[i];
      }
    }
    for (int64_t begin = 0; begin < num_classes; begin += kSumClasses) {
      std::fill_n(part, size, acc_t(0));
      for (int64_t cls = begin; cls < std::min(begin + kSumClasses, num_classes); ++cls) {
        acc_t* x = columns + first + cls * stride;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          x[i] -= max[i];
          part[i] += x[i];
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        sums[i] += static_cast<double>(part[i]);
      }
    }
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      sum[i] = static_cast<acc_t>(sums[i]);
    }
  }
}

// Calls use(phases) with the patches of a cell as a constant, if they are 2, 4 or 8; else use(0).
template <typename Use>
void with_phases(int64_t phases, const Use& use) {
  switch (phases) {
    case 2:
      return use(std::integral_constant<int, 2>());
    case 4:
      return use(std::integral_constant<int, 4>());
    case 8:
      return use(std::integral_constant<int, 8>());
    default:
      return use(std::integral_constant<int, 0>());
  }
}

// Interpolates a row of columns at the ends of patches.
template <int kPhases, typename acc_t>
void interpolate_columns(const PatchAxis<acc_t>& axis, const acc_t* columns, acc_t* ends) {
  const int64_t num_cells = axis.num_cells();
  if constexpr (kPhases != 0) {
#pragma omp simd
    for (int64_t cell = 0; cell < num_cells; ++cell) {
      ends[cell * kPhases] = columns[cell];
#pragma GCC unroll 8
      for (int phase = 1; phase < kPhases; ++phase) {
        const acc_t position = acc_t(phase) / acc_t(kPhases);
        ends[cell * kPhases + phase] =
            multiply_add(position, columns[cell + 1], (acc_t(1) - position) * columns[cell]);
      }
    }
    ends[num_cells * kPhases] = columns[num_cells];
  } else {
    // Vectors of ends; what one writes beyond its cell, the next cell writes again.
    constexpr int64_t kStep = 4;
    for (int64_t cell = 0; cell <= num_cells; ++cell) {
      const acc_t left = columns[cell];
      const acc_t right = columns[cell < num_cells ? cell + 1 : cell];
      for (int64_t first = axis.first_ends[cell]; first < axis.first_ends[cell + 1];
           first += kStep) {
        const acc_t* position = axis.positions.data() + first;
#pragma omp simd
        for (int64_t i = 0; i < kStep; ++i) {
          const acc_t x = multiply_add(position[i], right, (acc_t(1) - position[i]) * left);
          ends[first + i] = select(position[i] == acc_t(0), left, x);
        }
      }
    }
    std::fill_n(ends + axis.first_ends[num_cells + 1], kStep, acc_t(0));
  }
}

// Of several rows.
template <typename acc_t>
void interpolate_rows(const PatchAxis<acc_t>& axis, int64_t num_rows, const acc_t* columns,
                      int64_t column_stride, acc_t* ends, int64_t end_stride) {
  with_phases(axis.phases, [&](auto phases) {
    for (int64_t row = 0; row < num_rows; ++row) {
      interpolate_columns<phases()>(axis, columns + row * column_stride, ends + row * end_stride);
    }
  });
}

// ---- Gradients of the source

// Sets the gradient with respect to columns from that with respect to the ends of patches, of
// kColumnsAtOnce classes.
template <int kPhases, typename acc_t>
void sum_at_columns(const PatchAxis<acc_t>& axis, const acc_t* ends, int64_t end_stride,
                    acc_t* columns, int64_t column_stride) {
  const int64_t num_columns = axis.num_columns();
  if constexpr (kPhases != 0) {
    acc_t* of_right = columns + kColumnsAtOnce * column_stride;
    for (int64_t k = 0; k < kColumnsAtOnce; ++k) {
      const acc_t* from = ends + k * end_stride;
      acc_t* to = columns + k * column_stride;
#pragma omp simd
      for (int64_t cell = 0; cell < num_columns; ++cell) {
        acc_t at_left = 0;
        acc_t at_right = 0;
#pragma GCC unroll 8
        for (int phase = 0; phase < kPhases; ++phase) {
          const acc_t position = acc_t(phase) / acc_t(kPhases);
          at_left = multiply_add(acc_t(1) - position, from[cell * kPhases + phase], at_left);
          at_right = multiply_add(position, from[cell * kPhases + phase], at_right);
        }
        to[cell] = at_left;
        of_right[cell] = at_right;
      }
#pragma omp simd
      for (int64_t cell = 1; cell < num_columns; ++cell) {
        to[cell] += of_right[cell - 1];
      }
    }
  } else {
    acc_t of_left[kColumnsAtOnce];
    acc_t of_right[kColumnsAtOnce] = {};
    for (int64_t cell = 0; cell < num_columns; ++cell) {
      std::copy_n(of_right, kColumnsAtOnce, of_left);
      std::fill_n(of_right, kColumnsAtOnce, acc_t(0));
      for (int64_t i = axis.first_ends[cell]; i < axis.first_ends[cell + 1]; ++i) {
        const acc_t position = axis.positions[i];
#pragma GCC unroll 4
        for (int64_t k = 0; k < kColumnsAtOnce; ++k) {
          const acc_t end = ends[k * end_stride + i];
          of_left[k] = multiply_add(acc_t(1) - position, end, of_left[k]);
          of_right[k] = multiply_add(position, end, of_right[k]);
        }
      }
      for (int64_t k = 0; k < kColumnsAtOnce; ++k) {
        columns[k * column_stride + cell] = of_left[k];
      }
    }
  }
}

template <typename acc_t>
void sum_at_columns(const PatchAxis<acc_t>& axis, const acc_t* ends, int64_t end_stride,
                    acc_t* columns, int64_t column_stride) {
  with_phases(axis.phases, [&](auto phases) {
    sum_at_columns<phases()>(axis, ends, end_stride, columns, column_stride);
  });
}

// The gradient of one class with respect to the ends of patches, [end][patch], as that of `size`
// ends in a row, less that of the uniform distribution, if any.
template <int kEnds, typename acc_t>
void join_ends(const acc_t* gradient, const acc_t* uniform, int64_t size, acc_t* ends) {
  const acc_t* of_right = gradient + size;
#pragma omp simd
  for (int64_t i = 1; i < size; ++i) {
    ends[i] = kEnds == 2 ? gradient[i] + of_right[i - 1] : gradient[i];
  }
  ends[0] = gradient[0];
  for (int64_t i = 0; uniform != nullptr && i < size; ++i) {
    ends[i] -= uniform[i];
  }
}

// Writes the gradient with respect to the columns of a class as that of a row of elements.
template <typename acc_t>
void store_columns(const Columns& columns, acc_t* of_columns, int64_t stride, acc_t* row) {
  acc_t* values = of_columns + columns.offset;
  if (columns.offset == 1) {
    values[0] += of_columns[0];
  }
  if (columns.offset + columns.size < columns.count) {
    values[columns.size - 1] += values[columns.size];
  }
  if (stride == 1) {
    std::copy_n(values, columns.size, row);
    return;
  }
  for (int64_t i = 0; i < columns.size; ++i) {
    row[i * stride] = values[i];
  }
}

}  // namespace
}  // namespace oe_ext::cpu
