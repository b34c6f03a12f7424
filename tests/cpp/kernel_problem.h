// The inputs of a kernel, and the loss by its definition, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "kernel_memory.h"

namespace oe_ext::testing {

// The options of a call, beside its reduction.
struct Options {
  bool alpha_of_each_row = false;
  bool class_weights = false;
  double label_smoothing = 0;
  bool spreads_smoothing = false;  // by class weight, as in torch
};

// What a row's loss and gradient are made of, by definition.
struct Expected {
  double max = 0;
  double sum_exp = 0;
  double mean = 0;
  double weighted_mean = 0;  // by class weight
};

template <typename scalar_t>
class Problem {
 public:
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;

  Problem(Shape shape, Layout layout, LabelType label_type, unsigned seed = 1)
      : random_(seed),
        shape(shape),
        layout(make_layout(layout, shape)),
        logits(extent(this->layout)),
        labels(label_type, shape, random_),
        alphas(shape.rows()),
        class_weights(shape.classes),
        class_spread(shape.classes),
        upstream(shape.rows()) {
    // So far apart that the bits of their sum depend on its order, and so many that no vector or
    // tile begins with the same one as the last.
    constexpr double kClassWeights[] = {0, 3e-7, 1000.7, 1.1, 20.3};
    long double sum = 0;
    for (int64_t cls = 0; cls < shape.classes; ++cls) {
      class_weights[cls] = static_cast<acc_t>(kClassWeights[cls % 5]);
      sum += class_weights[cls];
    }
    mean_class_weight_ = static_cast<double>(sum / shape.classes);
    for (int64_t cls = 0; cls < shape.classes; ++cls) {
      class_spread[cls] = static_cast<acc_t>(share(cls));
    }
    std::normal_distribution<double> normal(0, 3);
    for (int64_t row = 0; row < shape.rows(); ++row) {
      alphas[row] = static_cast<acc_t>(0.25 + 0.5 * (row % 3));
      upstream[row] = static_cast<acc_t>(1 + row % 5);
      // An ignored row must not be read.
      if (layout != Layout::kOneRow && labels.kind(row) == RowKind::kIgnored) {
        continue;
      }
      for (int64_t cls = 0; cls < shape.classes; ++cls) {
        at(row, cls) = static_cast<scalar_t>(normal(random_));
      }
    }
  }

  scalar_t& at(int64_t row, int64_t cls) {
    return logits[layout.row_offset(row) + layout.class_offset(cls)];
  }

  Expected expected(int64_t row) {
    Expected result;
    result.max = -std::numeric_limits<double>::infinity();
    long double sum = 0;
    long double weighted_sum = 0;
    for (int64_t cls = 0; cls < shape.classes; ++cls) {
      const auto x = static_cast<double>(at(row, cls));
      result.max = std::max(result.max, x);
      sum += x;
      weighted_sum += x * share(cls);
    }
    result.mean = static_cast<double>(sum / shape.classes);
    result.weighted_mean = static_cast<double>(weighted_sum / shape.classes);
    for (int64_t cls = 0; cls < shape.classes; ++cls) {
      result.sum_exp += std::exp(static_cast<double>(at(row, cls)) - result.max);
    }
    return result;
  }

  // By what logsumexp(x) - <q, x> is multiplied: alpha, or the weight of the class. Where the
  // smoothing is spread by class weight, these are (1 - e) w_y [c = y] + e / C w_c in all.
  double weight(int64_t row) const {
    const RowKind kind = labels.kind(row);
    if (spreads(row)) {
      return (1 - options.label_smoothing) * class_weight(row) +
             options.label_smoothing * mean_class_weight_;
    }
    const acc_t alpha = options.alpha_of_each_row ? alphas[row] : kAlpha;
    const double of_outlier = kind == RowKind::kOutlier ? static_cast<double>(alpha) : 0;
    return kind == RowKind::kInlier ? class_weight(row) : of_outlier;
  }

  // logsumexp(x) - <q, x>
  double cross_entropy(int64_t row, const Expected& of_row) {
    const double uniform = uniform_part(row);
    double q_x = uniform * (spreads(row) ? of_row.weighted_mean : of_row.mean);
    if (uniform != 1) {
      q_x += (1 - uniform) * static_cast<double>(at(row, labels.labels[row]));
    }
    return std::log(of_row.sum_exp) + of_row.max - q_x;
  }

  // softmax - q
  double expected_gradient(int64_t row, int64_t cls, const Expected& of_row) {
    const double softmax =
        std::exp(static_cast<double>(at(row, cls)) - of_row.max) / of_row.sum_exp;
    const double uniform = uniform_part(row);
    const double at_label = cls == labels.labels[row] ? 1 - uniform : 0;
    const double at_class = uniform / static_cast<double>(shape.classes);
    return softmax - at_label - (spreads(row) ? share(cls) * at_class : at_class);
  }

  GroupCounts counts() const {
    GroupCounts result;
    for (int64_t row = 0; row < shape.rows(); ++row) {
      result.inliers += labels.kind(row) == RowKind::kInlier ? class_weight(row) : 0;
      result.outliers += labels.kind(row) == RowKind::kOutlier ? 1 : 0;
    }
    return result;
  }

  // The arguments common to forward and backward.
  template <typename Args>
  Args inputs(const Reduction& reduction) const {
    Args args;
    args.layout = layout;
    args.logits = logits.data();
    args.labels = labels.labels;
    args.divisor_rule = reduction.divisors;
    args.alpha.value = kAlpha;
    if (options.alpha_of_each_row) {
      args.alpha.values = {alphas.data(), 1};
    }
    if (options.class_weights) {
      args.class_weights.data = class_weights.data();
    }
    args.label_smoothing = static_cast<acc_t>(options.label_smoothing);
    if (options.spreads_smoothing && mean_class_weight_ != 0) {
      args.class_spread = class_spread.data();
      args.spread_smoothing = {static_cast<acc_t>(1 - options.label_smoothing),
                               static_cast<acc_t>(options.label_smoothing * mean_class_weight_)};
    }
    return args;
  }

 private:
  static constexpr acc_t kAlpha = acc_t(0.5);

  bool spreads(int64_t row) const {
    return options.spreads_smoothing && mean_class_weight_ != 0 &&
           labels.kind(row) == RowKind::kInlier;
  }

  double class_weight(int64_t row) const {
    return options.class_weights ? static_cast<double>(class_weights[labels.labels[row]]) : 1;
  }

  double share(int64_t cls) const {
    return static_cast<double>(class_weights[cls]) / mean_class_weight_;
  }

  // How much of q is spread over all classes; the rest is at the label.
  double uniform_part(int64_t row) const {
    const double smoothing = options.label_smoothing;
    const double of_inlier =
        spreads(row) ? smoothing * mean_class_weight_ / weight(row) : smoothing;
    return labels.kind(row) == RowKind::kInlier ? of_inlier : 1;
  }

  std::mt19937 random_;
  double mean_class_weight_ = 0;

 public:
  Shape shape;
  RowLayout layout;
  Options options;
  Buffer<scalar_t> logits;
  LabelBuffer labels;
  Buffer<acc_t> alphas;
  Buffer<acc_t> class_weights;
  Buffer<acc_t> class_spread;  // over their mean
  Buffer<acc_t> upstream;
};

}  // namespace oe_ext::testing
