// What the labels of a target mean, and how they are stored.
#pragma once

#include <c10/macros/Macros.h>

#include <cstdint>

namespace oe_ext {

enum class RowKind : int8_t { kInlier, kOutlier, kIgnored, kInvalid };

// The rule that maps a label to its kind. ignore_index is tested first. ood_index, if given, is the
// label of outliers instead of the negative numbers.
template <typename label_t>
struct LabelRuleOf {
  label_t num_classes = 0;
  // The first class here, where the logits hold only a part of all classes.
  label_t first_class = 0;
  label_t ignore_index = 0;
  label_t ood_index = 0;
  bool has_ignore_index = false;
  bool has_ood_index = false;

  // Without branches, so that loops over labels vectorise.
  C10_HOST_DEVICE bool is_ignored(label_t label) const {
    return has_ignore_index & (label == ignore_index);
  }
  C10_HOST_DEVICE bool is_outlier(label_t label) const {
    const bool special = (has_ood_index & (label == ood_index)) | (!has_ood_index & (label < 0));
    const bool ignored = is_ignored(label);
    return special & !ignored;
  }
  C10_HOST_DEVICE bool is_inlier(label_t label) const {
    const bool is_class = (label >= 0) & (label < num_classes);
    const bool outlier = is_outlier(label);
    const bool ignored = is_ignored(label);
    return is_class & !outlier & !ignored;
  }

  C10_HOST_DEVICE RowKind kind(label_t label) const {
    if (is_ignored(label)) {
      return RowKind::kIgnored;
    }
    if (is_outlier(label)) {
      return RowKind::kOutlier;
    }
    return is_inlier(label) ? RowKind::kInlier : RowKind::kInvalid;
  }

  // The class of an inlier, counted from first_class. The classes before first_class follow after
  // the last one, so a result of at least the number of logits here means: not here.
  C10_HOST_DEVICE label_t class_here(label_t label) const {
    return label - first_class + (label < first_class ? num_classes : label_t(0));
  }
};
using LabelRule = LabelRuleOf<int64_t>;

enum class LabelType : int8_t { kInt64, kInt32, kInt16, kInt8, kUInt8, kUInt16, kUInt32 };

// Calls f with a pointer to labels of this type.
template <typename F>
C10_HOST_DEVICE auto with_label_type(LabelType type, const void* data, const F& f) {
  switch (type) {
    case LabelType::kInt32:
      return f(static_cast<const int32_t*>(data));
    case LabelType::kInt16:
      return f(static_cast<const int16_t*>(data));
    case LabelType::kInt8:
      return f(static_cast<const int8_t*>(data));
    case LabelType::kUInt8:
      return f(static_cast<const uint8_t*>(data));
    case LabelType::kUInt16:
      return f(static_cast<const uint16_t*>(data));
    case LabelType::kUInt32:
      return f(static_cast<const uint32_t*>(data));
    default:
      return f(static_cast<const int64_t*>(data));
  }
}

// Reads kSize labels in a row.
template <int kSize>
struct ReadLabels {
  int64_t first;
  int64_t* labels;

  template <typename label_t>
  C10_HOST_DEVICE void operator()(const label_t* data) const {
    for (int k = 0; k < kSize; ++k) {
      labels[k] = data[first + k];
    }
  }
};

struct Labels {
  const void* data = nullptr;  // [num_rows], contiguous
  LabelType type = LabelType::kInt64;
  LabelRule rule;

  C10_HOST_DEVICE bool are_unsigned() const {
    return type == LabelType::kUInt8 || type == LabelType::kUInt16 || type == LabelType::kUInt32;
  }

  // In bytes.
  C10_HOST_DEVICE int element_size() const {
    switch (type) {
      case LabelType::kInt8:
      case LabelType::kUInt8:
        return 1;
      case LabelType::kInt16:
      case LabelType::kUInt16:
        return 2;
      case LabelType::kInt32:
      case LabelType::kUInt32:
        return 4;
      default:
        return 8;
    }
  }

  C10_HOST_DEVICE int64_t operator[](int64_t row) const {
    int64_t label[1];
    read(row, label);
    return label[0];
  }

  // The labels of rows first, first + 1, ...
  template <int kSize>
  C10_HOST_DEVICE void read(int64_t first, int64_t (&labels)[kSize]) const {
    with_label_type(type, data, ReadLabels<kSize>{first, labels});
  }
};

}  // namespace oe_ext
