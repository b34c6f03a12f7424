// The labels and weights of a tile's rows.
#pragma once

#include "elementwise.h"

namespace oe_ext::cpu {
namespace {

// A row's label where it is not a class.
constexpr int kOutlier = -1;
constexpr int kIgnored = -2;  // or a padding row

// The data of each row of a tile, in arrays for loops over rows. Padding rows follow the last row,
// up to a multiple of kTileRowsStep; their results are not written to any tensor.
template <typename acc_t>
struct TileRows {
  TileRows(int64_t first, int64_t size) : first(first), size(size), padded(padded_to_step(size)) {}

  int64_t first;                                 // index of the first row
  int64_t size;                                  // rows
  int64_t padded;                                // with padding rows
  alignas(64) IntOf<acc_t> label[kMaxTileRows];  // a class, kOutlier or kIgnored
  alignas(64) IntOf<acc_t> place[kMaxTileRows];  // index of the label among a tile's classes
  alignas(64) acc_t weight[kMaxTileRows];
  // Not 0: the logits are needed; from finish_rows() on, for the gradient.
  alignas(64) acc_t active[kMaxTileRows];
  alignas(64) acc_t max[kMaxTileRows];
  alignas(64) acc_t sum_exp[kMaxTileRows];
  alignas(64) acc_t sum_shifted[kMaxTileRows];
  // The logit at the label; from finish_rows() on, what the gradient subtracts there.
  alignas(64) acc_t at_label[kMaxTileRows];
  alignas(64) acc_t factor[kMaxTileRows];  // of the gradient
  alignas(64) acc_t offset[kMaxTileRows];
  // With a class_spread: the weight of the label's class; from finish_rows() on, what the gradient
  // subtracts from each exponential, times the spread.
  alignas(64) acc_t at_classes[kMaxTileRows];
  bool all_active;

  OE_EXT_INLINE RowCoefficients<acc_t> coefficients(int64_t i, Smoothed<acc_t> smoothed) const {
    return RowCoefficients<acc_t>::of_row(label[i] >= 0, label[i] == kOutlier, weight[i], smoothed);
  }
};

// Converts the rule to integers of type Int; false if its numbers do not fit.
template <typename Int>
bool rule_in(const LabelRule& rule, LabelRuleOf<Int>& narrow) {
  const auto fits = [](int64_t x) { return x == static_cast<Int>(x); };
  narrow.num_classes = static_cast<Int>(rule.num_classes);
  narrow.first_class = static_cast<Int>(rule.first_class);
  narrow.ignore_index = static_cast<Int>(rule.ignore_index);
  narrow.ood_index = static_cast<Int>(rule.ood_index);
  narrow.has_ignore_index = rule.has_ignore_index;
  narrow.has_ood_index = rule.has_ood_index;
  return fits(rule.num_classes) && fits(rule.ignore_index) && fits(rule.ood_index);
}

// Copies labels; false if one does not fit Int.
template <typename Label, typename Int>
bool copy_labels(const Label* labels, int64_t size, Int* copies) {
  constexpr bool kFit = sizeof(Label) < sizeof(Int) || std::is_same_v<Label, Int>;
  uint64_t beyond = 0;
#pragma omp simd reduction(| : beyond)
  for (int64_t i = 0; i < size; ++i) {
    copies[i] = static_cast<Int>(labels[i]);
    if constexpr (!kFit) {
      beyond |= (static_cast<uint64_t>(labels[i]) + 0x80000000U) >> 32;
    }
  }
  return beyond == 0;
}

// Writes a class, kOutlier or kIgnored for each of `size` labels, and counts them. bad_row is the
// index of the first illegal label among these.
template <typename Label, typename Int>
TaskResult classify(const Label* labels, const LabelRule& rule, int64_t size, Int* classes) {
  Int inliers = 0;
  Int outliers = 0;
  Int ignored = 0;
  LabelRuleOf<Int> narrow;
  if (rule_in(rule, narrow) && copy_labels(labels, size, classes)) {
#pragma omp simd reduction(+ : inliers, outliers, ignored)
    for (int64_t i = 0; i < size; ++i) {
      const Int label = classes[i];
      const Int is_inlier = narrow.is_inlier(label);
      const Int is_outlier = narrow.is_outlier(label);
      inliers += is_inlier;
      outliers += is_outlier;
      ignored += narrow.is_ignored(label);
      const Int other = is_outlier ? kOutlier : kIgnored;
      classes[i] = is_inlier ? label : other;
    }
    if (rule.first_class != 0) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        classes[i] = classes[i] >= 0 ? narrow.class_here(classes[i]) : classes[i];
      }
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      const int64_t label = labels[i];
      const RowKind kind = rule.kind(label);
      inliers += kind == RowKind::kInlier;
      outliers += kind == RowKind::kOutlier;
      ignored += kind == RowKind::kIgnored;
      // Only long rows have classes that do not fit; they read such a label again (class_of).
      constexpr int64_t kHighest = std::numeric_limits<Int>::max();
      classes[i] = kind == RowKind::kInlier
                       ? static_cast<Int>(std::min(rule.class_here(label), kHighest))
                   : kind == RowKind::kOutlier ? kOutlier
                                               : kIgnored;
    }
  }
  TaskResult result;
  result.sums.counts = {static_cast<double>(inliers), static_cast<double>(outliers)};
  if (int64_t(inliers) + outliers + ignored != size) {
    result.bad_row = 0;
    while (rule.kind(labels[result.bad_row]) != RowKind::kInvalid) {
      ++result.bad_row;
    }
  }
  return result;
}

// Writes the class weight of each inlier among at most kMaxTileRows classes from classify(), and 0
// for the others; returns their sum. The first loop loads from a table one by one and has no
// branch, which random labels would mispredict; the second is made of vectors.
template <typename Int, typename acc_t>
double weigh_inliers(const Int* classes, int64_t size, const acc_t* class_weights, acc_t* weights) {
  for (int64_t i = 0; i < size; ++i) {
    const Int is_class = classes[i] >= 0;
    weights[i] = class_weights[classes[i] & -is_class];
  }
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) {
    weights[i] = select(classes[i] >= 0, weights[i], acc_t(0));
    sum += static_cast<double>(weights[i]);
  }
  return sum;
}

// Reads the labels of `size` rows, as classify() writes them; returns their counts, or the first
// illegal label.
template <typename Int>
TaskResult read_classes(const Labels& labels, int64_t first, int64_t size, Int* classes) {
  TaskResult result = with_label_type(labels.type, labels.data, [&](const auto* stored) {
    return classify(stored + first, labels.rule, size, classes);
  });
  if (result.bad_row >= 0) {
    result.bad_row += first;
  }
  return result;
}

// Sets the weights of a tile's rows, whose labels are known.
template <typename Args, typename acc_t>
void weigh_rows(const Args& args, bool wants_cross_entropy, TileRows<acc_t>& rows) {
  std::fill(rows.label + rows.size, rows.label + rows.padded, kIgnored);
  std::fill_n(rows.weight, rows.padded, args.alpha.value);
  if (args.alpha.values.data != nullptr) {
    for (int64_t i = 0; i < rows.size; ++i) {
      rows.weight[i] = args.alpha.values[rows.first + i];
    }
  }
  IntOf<acc_t> num_active = 0;
#pragma omp simd reduction(+ : num_active)
  for (int64_t i = 0; i < rows.padded; ++i) {
    const bool outlier = rows.label[i] == kOutlier;
    const acc_t alpha = rows.weight[i];
    const acc_t weight =
        RowCoefficients<acc_t>::weight_of(rows.label[i] >= 0, outlier, acc_t(1), alpha);
    const bool active = (weight != acc_t(0)) | (outlier & wants_cross_entropy);
    rows.weight[i] = weight;
    rows.active[i] = select(active, acc_t(1), acc_t(0));
    num_active += active;
  }
  rows.all_active = num_active >= rows.size;
  if (args.class_weights.data != nullptr) {
    alignas(64) acc_t weights[kMaxTileRows];
    weigh_inliers(rows.label, rows.size, args.class_weights.data, weights);
    const bool spreads = args.class_spread != nullptr;
    const SpreadSmoothing<acc_t> spread = args.spread_smoothing;
#pragma omp simd
    for (int64_t i = 0; i < rows.size; ++i) {
      const acc_t of_inlier = select(spreads, spread.weight(weights[i]), weights[i]);
      rows.weight[i] = select(rows.label[i] >= 0, of_inlier, rows.weight[i]);
      rows.at_classes[i] = weights[i];
    }
  }
}

// Reads the labels and weights of a tile; returns its counts, or its first illegal label.
template <typename Args, typename acc_t>
TaskResult read_labels(const Args& args, bool wants_cross_entropy, TileRows<acc_t>& rows) {
  const TaskResult result = read_classes(args.labels, rows.first, rows.size, rows.label);
  if (result.bad_row < 0) {
    weigh_rows(args, wants_cross_entropy, rows);
  }
  return result;
}

template <typename acc_t>
TaskResult count_rows(const Labels& labels, const ClassWeights<acc_t>& class_weights, int64_t begin,
                      int64_t end) {
  return with_label_type(labels.type, labels.data, [&](const auto* stored) {
    int32_t classes[kMaxTileRows];
    TaskResult total;
    for (int64_t row = begin; row < end; row += kMaxTileRows) {
      const int64_t size = std::min(kMaxTileRows, end - row);
      TaskResult part = classify(stored + row, labels.rule, size, classes);
      if (part.bad_row >= 0) {
        total.bad_row = row + part.bad_row;
        return total;
      }
      if (class_weights.data != nullptr) {
        acc_t weights[kMaxTileRows];
        part.sums.counts.inliers = weigh_inliers(classes, size, class_weights.data, weights);
      }
      total.sums.counts.merge(part.sums.counts);
    }
    return total;
  });
}

}  // namespace
}  // namespace oe_ext::cpu
