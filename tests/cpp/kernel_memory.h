// What the kernels read and write, in raw memory: buffers, their layouts, and labels.
//
// Each buffer is its own allocation and ends with its last element, so AddressSanitizer sees the
// first byte after it. Outputs start as NaN; the gaps between the strides of a gradient start as a
// number that must survive.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "core/kernel_args.h"

namespace oe_ext::testing {

constexpr int64_t kIgnore = -100;
constexpr int64_t kOutlier = 101;  // if the labels are unsigned

template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size, T value = std::numeric_limits<T>::quiet_NaN())
      : size_(size), data_(std::make_unique<T[]>(size)) {
    std::fill_n(data(), size, value);
  }
  T* data() { return data_.get(); }
  const T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

  bool has_bits_of(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(data(), other.data(), size_ * sizeof(T)) == 0;
  }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

enum class Layout {
  kRows,         // [row][class]
  kSliced,       // the same, in wider rows
  kEverySecond,  // every second class of rows twice as wide
  kImages,       // rows, in images that are not adjacent
  kPixels,       // [image][class][pixel]
  kOneRow,       // one row for all: only to read
};

struct Shape {
  int64_t images;
  int64_t pixels;
  int64_t classes;

  int64_t rows() const { return images * pixels; }
};

inline RowLayout make_layout(Layout kind, Shape shape) {
  const int64_t classes = shape.classes;
  RowLayout layout;
  layout.num_outer = shape.images;
  layout.num_inner = shape.pixels;
  layout.num_classes = classes;
  layout.inner_stride = classes;
  layout.class_stride = 1;
  if (kind == Layout::kSliced) {
    layout.inner_stride = classes + 3;
  } else if (kind == Layout::kEverySecond) {
    layout.inner_stride = 2 * classes;
    layout.class_stride = 2;
  } else if (kind == Layout::kOneRow) {
    layout.inner_stride = 0;
  }
  layout.outer_stride = shape.pixels * layout.inner_stride + (kind == Layout::kImages ? 5 : 0);
  if (kind == Layout::kPixels) {
    layout.outer_stride = shape.pixels * classes;
    layout.inner_stride = 1;
    layout.class_stride = shape.pixels;
  }
  return layout;
}

// The number of elements from the first to the last.
inline int64_t extent(const RowLayout& layout) {
  if (layout.num_rows() == 0) {
    return 0;
  }
  return (layout.num_outer - 1) * layout.outer_stride +
         (layout.num_inner - 1) * layout.inner_stride +
         (layout.num_classes - 1) * layout.class_stride + 1;
}

inline std::vector<bool> elements_of(const RowLayout& layout) {
  std::vector<bool> is_element(extent(layout));
  for (int64_t row = 0; row < layout.num_rows(); ++row) {
    for (int64_t cls = 0; cls < layout.num_classes; ++cls) {
      is_element[layout.row_offset(row) + layout.class_offset(cls)] = true;
    }
  }
  return is_element;
}

template <typename T>
bool is_nan(T x) {
  return std::isnan(static_cast<double>(x));
}

// Labels in their own type, of every kind.
class LabelBuffer {
 public:
  LabelBuffer(LabelType type, Shape shape, std::mt19937& random)
      : is_unsigned_(type == LabelType::kUInt8 || type == LabelType::kUInt16 ||
                     type == LabelType::kUInt32) {
    labels.type = type;
    labels.rule.num_classes = shape.classes;
    labels.rule.has_ignore_index = true;
    labels.rule.ignore_index = is_unsigned_ ? 255 : kIgnore;
    labels.rule.has_ood_index = is_unsigned_;
    labels.rule.ood_index = kOutlier;
    size_t size = sizeof(int64_t);
    const auto is_one_of = [type](LabelType a, LabelType b) { return type == a || type == b; };
    size = is_one_of(LabelType::kInt32, LabelType::kUInt32) ? sizeof(int32_t) : size;
    size = is_one_of(LabelType::kInt16, LabelType::kUInt16) ? sizeof(int16_t) : size;
    size = is_one_of(LabelType::kInt8, LabelType::kUInt8) ? sizeof(int8_t) : size;
    memory_ = std::make_unique<char[]>(shape.rows() * size);
    labels.data = memory_.get();
    // The labels that the type can hold, beside the special labels.
    const int64_t highest = std::min<int64_t>(shape.classes - 1, size == 1 ? 100 : 30000);
    for (int64_t row = 0; row < shape.rows(); ++row) {
      const auto kind = random() % 8;
      const int64_t outlier = is_unsigned_ ? kOutlier : -1 - static_cast<int64_t>(random() % 90);
      const int64_t inlier = static_cast<int64_t>(random() % (highest + 1));
      const int64_t label = kind == 0 ? labels.rule.ignore_index : (kind < 4 ? outlier : inlier);
      std::memcpy(memory_.get() + row * size, &label, size);  // little-endian
    }
  }

  RowKind kind(int64_t row) const { return labels.rule.kind(labels[row]); }

  Labels labels;

 private:
  bool is_unsigned_;
  std::unique_ptr<char[]> memory_;
};

}  // namespace oe_ext::testing
