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

// The rows of whole vectors that hold so many.
template <typename acc_t>
int64_t round_up(int64_t num_rows) {
  constexpr int64_t kSize = Vec<acc_t>::kSize;
  return (num_rows + kSize - 1) / kSize * kSize;
}

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
  alignas(64) acc_t at_label[kMaxTileRows];  // the logit
  alignas(64) acc_t inverse_sum[kMaxTileRows];
  alignas(64) acc_t scale[kMaxTileRows];
  alignas(64) acc_t uniform[kMaxTileRows];
};

// The logits of a tile, or their gradients.
template <typename T>
struct TileView {
  T* data = nullptr;
  int64_t row_stride = 0;
  int64_t class_stride = 0;

  TileView() = default;
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
int64_t first_bad_row(const Label* labels, const LabelRule& rule, int64_t size) {
  int64_t row = 0;
  while (row < size && rule.kind(labels[row]) != RowKind::kInvalid) {
    ++row;
  }
  return row < size ? row : -1;
}

// A LabelRule in lanes. Labels are drawn in from the ends of the lanes' range first, so that its
// ends are no label's: the lowest stands for a mark that is not set, the largest for no row.
template <typename acc_t>
struct LanesOfRule {
  using IntV = IntVec<acc_t>;
  using Lane = typename IntV::Lane;
  static constexpr Lane kUnset = std::numeric_limits<Lane>::min();
  static constexpr Lane kNoRow = std::numeric_limits<Lane>::max();

  explicit LanesOfRule(const LabelRule& rule)
      : ignore_index(IntV::broadcast(mark(rule.has_ignore_index, rule.ignore_index))),
        ood_index(IntV::broadcast(mark(rule.has_ood_index, rule.ood_index))),
        end_of_negative_outliers(IntV::broadcast(rule.has_ood_index ? kUnset : Lane(0))),
        num_classes(
            IntV::broadcast(static_cast<Lane>(std::min<int64_t>(rule.num_classes, kNoRow)))) {}

  // Does the rule mean the same in lanes? Not with a mark outside of their range.
  static bool can_hold(const LabelRule& rule) {
    const auto fits = [](int64_t x) { return x > kUnset + 1 && x < kNoRow; };
    return (!rule.has_ignore_index || fits(rule.ignore_index)) &&
           (!rule.has_ood_index || fits(rule.ood_index));
  }
  static Lane lane(int64_t label) {
    constexpr int64_t kLow = kUnset + Lane(1);
    constexpr int64_t kHigh = kNoRow;
    return static_cast<Lane>(label < kLow ? kLow : (label > kHigh ? kHigh : label));
  }

  IntV ignore_index;
  IntV ood_index;
  IntV end_of_negative_outliers;
  IntV num_classes;

 private:
  static Lane mark(bool is_set, int64_t label) {
    return is_set ? static_cast<Lane>(label) : kUnset;
  }
};

// LanesOfRule::lane of whole vectors of labels; returns how many those are. Compilers do well with
// all but what most targets are: eight bytes in four-byte lanes, without AVX-512.
template <typename acc_t, typename Label>
int64_t draw_in(const Label* labels, int64_t size, typename IntegerOf<acc_t>::type* lanes) {
  if constexpr (sizeof(acc_t) != 4 || sizeof(Label) != 8 || kVectorBytes == 64) {
    return 0;
  } else {
    using IntV = IntVec<acc_t>;
    constexpr int64_t kSize = Vec<acc_t>::kSize;
    const auto* halves = reinterpret_cast<const int32_t*>(labels);
    int64_t i = 0;
    for (; i + kSize <= size; i += kSize) {
      const auto first = IntV::load(halves + 2 * i);
      const auto second = IntV::load(halves + 2 * i + kSize);
      const IntV low = even_lanes(first, second, std::make_integer_sequence<int, kSize>());
      const IntV high = odd_lanes(first, second, std::make_integer_sequence<int, kSize>());
      const Mask<acc_t> fits = high == IntV{low.raw >> 31};
      const IntV end = {(high.raw >> 31) ^ LanesOfRule<acc_t>::kNoRow};  // of the lanes' range
      const IntV lane = select(fits, low, end);
      const auto lowest = IntV::broadcast(LanesOfRule<acc_t>::kUnset + 1);
      select(lane < lowest, lowest, lane).store(lanes + i);
    }
    return i;
  }
}

// Writes a class or a kind into the lanes of `size` labels, and inactive rows behind them, and
// counts. bad_row is the first illegal label, counted from the first of these.
template <typename acc_t, typename Label>
TaskResult classify(const Label* labels, const LabelRule& label_rule, int64_t size, int64_t padded,
                    typename IntegerOf<acc_t>::type* lanes) {
  using IntV = IntVec<acc_t>;
  using Rule = LanesOfRule<acc_t>;
  int64_t inliers = 0;
  int64_t outliers = 0;
  int64_t ignored = 0;
  if (Rule::can_hold(label_rule)) {
    const Rule rule(label_rule);
    for (int64_t i = draw_in<acc_t>(labels, size, lanes); i < size; ++i) {
      lanes[i] = Rule::lane(labels[i]);
    }
    std::fill(lanes + size, lanes + padded, Rule::kNoRow);
    IntV minus_inliers = IntV::broadcast(0);  // a lane of a mask is -1
    IntV minus_outliers = IntV::broadcast(0);
    IntV minus_ignored = IntV::broadcast(0);
    for (int64_t i = 0; i < padded; i += Vec<acc_t>::kSize) {
      const IntV label = IntV::load(lanes + i);
      const Mask<acc_t> is_ignored = label == rule.ignore_index;
      const Mask<acc_t> marked =
          (label == rule.ood_index) | (label < rule.end_of_negative_outliers);
      const Mask<acc_t> is_outlier = marked & ~is_ignored;
      const Mask<acc_t> is_inlier =
          (label >= IntV::broadcast(0)) & (label < rule.num_classes) & ~marked & ~is_ignored;
      select(is_inlier, label,
             select(is_outlier, IntV::broadcast(kOutlierLane), IntV::broadcast(kInactiveLane)))
          .store(lanes + i);
      minus_inliers.raw += is_inlier.raw;
      minus_outliers.raw += is_outlier.raw;
      minus_ignored.raw += is_ignored.raw;
    }
    for (int j = 0; j < Vec<acc_t>::kSize; ++j) {
      inliers -= minus_inliers.raw[j];
      outliers -= minus_outliers.raw[j];
      ignored -= minus_ignored.raw[j];
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const RowKind kind = label_rule.kind(labels[i]);
      inliers += kind == RowKind::kInlier;
      outliers += kind == RowKind::kOutlier;
      ignored += kind == RowKind::kIgnored;
      lanes[i] = kind == RowKind::kInlier    ? Rule::lane(labels[i])
                 : kind == RowKind::kOutlier ? kOutlierLane
                                             : kInactiveLane;
    }
    std::fill(lanes + size, lanes + padded, kInactiveLane);
  }
  TaskResult result;
  result.sums.counts.inliers = inliers;
  result.sums.counts.outliers = outliers;
  const bool all_legal = inliers + outliers + ignored == size;
  result.bad_row = all_legal ? -1 : first_bad_row(labels, label_rule, size);
  return result;
}

// Fills the lanes of the labels. Returns how many rows count, or the first with an illegal label.
template <typename Label, typename acc_t>
TaskResult read_labels_of(const Label* labels, const LabelRule& rule, TileRows<acc_t>& rows) {
  TaskResult result =
      classify<acc_t>(labels + rows.first, rule, rows.size, rows.padded, rows.label);
  result.bad_row += result.bad_row >= 0 ? rows.first : 0;
  return result;
}

template <typename acc_t>
TaskResult read_labels(const Labels& labels, TileRows<acc_t>& rows) {
  OE_EXT_WITH_LABELS(labels, read_labels_of, labels.rule, rows);
}

template <typename Label>
TaskResult count_rows_of(const Label* labels, const LabelRule& rule, int64_t begin, int64_t end) {
  alignas(64) int32_t lanes[kMaxTileRows];
  TaskResult total;
  for (; begin < end; begin += kMaxTileRows) {
    const int64_t size = std::min(kMaxTileRows, end - begin);
    const int64_t padded = round_up<float>(size);
    const TaskResult part = classify<float>(labels + begin, rule, size, padded, lanes);
    if (part.bad_row >= 0) {
      total.bad_row = begin + part.bad_row;
      return total;
    }
    total.sums.counts.merge(part.sums.counts);
  }
  return total;
}

TaskResult count_rows(const Labels& labels, int64_t begin, int64_t end) {
  OE_EXT_WITH_LABELS(labels, count_rows_of, labels.rule, begin, end);
}
#undef OE_EXT_WITH_LABELS

}  // namespace
}  // namespace oe_ext::cpu
