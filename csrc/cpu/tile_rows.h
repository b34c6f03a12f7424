// The rows of a tile: their labels in lanes, and what becomes known of them.
#pragma once

#include "kernels.h"
#include "packed.h"
#include "vec_math.h"

namespace oe_ext::cpu {
namespace {

// Labels in lanes: a class, or one of these.
constexpr int kOutlierLane = -1;
constexpr int kInactiveLane = -2;  // ignored, or of no weight, or no row at all

// What is known of each row of a tile. Beyond its rows, up to a whole vector, stand inactive ones.
template <typename acc_t>
struct TileRows {
  using Lane = typename IntegerOf<acc_t>::type;

  int64_t first = 0;   // index of the first row
  int64_t size = 0;    // rows
  int64_t padded = 0;  // rows and inactive ones
  alignas(64) Lane label[kMaxTileRows];
  alignas(64) acc_t max[kMaxTileRows];
  alignas(64) acc_t sum_exp[kMaxTileRows];
  alignas(64) acc_t sum_shifted[kMaxTileRows];
  alignas(64) acc_t at_label[kMaxTileRows];      // the logit
  alignas(64) acc_t exp_at_label[kMaxTileRows];  // exp(logit - max)
  alignas(64) acc_t inverse_sum[kMaxTileRows];
  alignas(64) acc_t scale[kMaxTileRows];
  alignas(64) acc_t uniform[kMaxTileRows];
};

// The logits of a tile, or their gradients.
template <typename T>
struct TileView {
  T* data;
  int64_t row_stride;
  int64_t class_stride;

  TileView(T* tensor, const RowLayout& layout, int64_t first_row)
      : data(tensor + layout.row_offset(first_row)),
        row_stride(layout.inner_stride),
        class_stride(layout.class_stride) {}

  TileView from_class(int64_t cls) const {
    TileView view = *this;
    view.data += cls * class_stride;
    return view;
  }
};

// Calls f(labels) with a pointer of the labels' type.
#define OE_EXT_WITH_LABELS(labels, f, ...)                               \
  switch ((labels).type) {                                               \
    case LabelType::kInt32:                                              \
      return f(static_cast<const int32_t*>((labels).data), __VA_ARGS__); \
    case LabelType::kInt16:                                              \
      return f(static_cast<const int16_t*>((labels).data), __VA_ARGS__); \
    case LabelType::kInt8:                                               \
      return f(static_cast<const int8_t*>((labels).data), __VA_ARGS__);  \
    case LabelType::kUInt8:                                              \
      return f(static_cast<const uint8_t*>((labels).data), __VA_ARGS__); \
    default:                                                             \
      return f(static_cast<const int64_t*>((labels).data), __VA_ARGS__); \
  }

template <typename Label>
int64_t first_bad_row(const Label* labels, const LabelRule& rule, int64_t begin, int64_t end) {
  while (begin < end && rule.kind(labels[begin]) != RowKind::kInvalid) {
    ++begin;
  }
  return begin < end ? begin : -1;
}

// What was counted in the rows [begin, end), and the first illegal label where the kinds do not add
// up.
template <typename Label>
TaskResult counted(const Label* labels, const LabelRule& rule, int64_t begin, int64_t end,
                   int64_t inliers, int64_t outliers, int64_t ignored) {
  TaskResult result;
  result.sums.counts.inliers = inliers;
  result.sums.counts.outliers = outliers;
  const bool all_legal = inliers + outliers + ignored == end - begin;
  result.bad_row = all_legal ? -1 : first_bad_row(labels, rule, begin, end);
  return result;
}

// Fills the lanes of the labels. Returns how many rows count, or the first with an illegal label.
template <typename Label, typename acc_t>
TaskResult read_labels_of(const Label* labels, const LabelRule& rule_of_labels,
                          TileRows<acc_t>& rows) {
  using Lane = typename TileRows<acc_t>::Lane;
  const LabelRule rule = rule_of_labels;
  const int64_t size = rows.size;
  // Two simple loops, in integers: GCC vectorises either, but neither both in one nor a choice.
  int64_t wide[kMaxTileRows];
  int64_t inliers = 0;
  int64_t outliers = 0;
  int64_t num_ignored = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t label = labels[rows.first + i];
    const int64_t inlier = rule.is_inlier(label);
    const int64_t outlier = rule.is_outlier(label);
    const int64_t ignored = rule.is_ignored(label);
    static_assert(kOutlierLane == kInactiveLane + 1);
    wide[i] = (label & -inlier) | ((kInactiveLane + outlier) & (inlier - 1));
    inliers += inlier;
    outliers += outlier;
    num_ignored += ignored;
  }
  constexpr int64_t kLargest = std::numeric_limits<Lane>::max();
  for (int64_t i = 0; i < size; ++i) {
    rows.label[i] = static_cast<Lane>(wide[i] < kLargest ? wide[i] : kLargest);
  }
  for (int64_t i = rows.size; i < rows.padded; ++i) {
    rows.label[i] = kInactiveLane;
  }
  return counted(labels, rule, rows.first, rows.first + size, inliers, outliers, num_ignored);
}

template <typename acc_t>
TaskResult read_labels(const Labels& labels, TileRows<acc_t>& rows) {
  OE_EXT_WITH_LABELS(labels, read_labels_of, labels.rule, rows);
}

template <typename Label>
TaskResult count_rows_of(const Label* labels, const LabelRule& rule_of_labels, int64_t begin,
                         int64_t end) {
  const LabelRule rule = rule_of_labels;
  int64_t inliers = 0;
  int64_t outliers = 0;
  int64_t ignored = 0;
  for (int64_t row = begin; row < end; ++row) {
    inliers += rule.is_inlier(labels[row]);
    outliers += rule.is_outlier(labels[row]);
    ignored += rule.is_ignored(labels[row]);
  }
  return counted(labels, rule, begin, end, inliers, outliers, ignored);
}

TaskResult count_rows(const Labels& labels, int64_t begin, int64_t end) {
  OE_EXT_WITH_LABELS(labels, count_rows_of, labels.rule, begin, end);
}
#undef OE_EXT_WITH_LABELS

}  // namespace
}  // namespace oe_ext::cpu
