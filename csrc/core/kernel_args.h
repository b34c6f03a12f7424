// The arguments of the kernels of every backend: raw pointers, sizes and strides, and the few
// per-row steps that do not depend on how a backend walks memory. No ATen here.
#pragma once

#include "labels.h"
#include "reduction.h"
#include "row_math.h"

namespace oe_ext {

// Logits as rows: row = outer * num_inner + inner, in the order of the target's elements.
// Strides count elements; every offset is 64 bits wide.
struct RowLayout {
  int64_t num_outer = 0;
  int64_t num_inner = 0;
  int64_t num_classes = 0;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
  int64_t class_stride = 0;

  C10_HOST_DEVICE int64_t num_rows() const { return num_outer * num_inner; }

  C10_HOST_DEVICE int64_t row_offset(int64_t row) const {
    if (num_outer == 1) {
      return row * inner_stride;
    }
    const int64_t outer = row / num_inner;
    return outer * outer_stride + (row - outer * num_inner) * inner_stride;
  }

  C10_HOST_DEVICE int64_t class_offset(int64_t cls) const { return cls * class_stride; }

  // Do neighbouring rows lie closer together than neighbouring classes (pixels of a contiguous
  // segmentation map, or a transposed matrix)? Then loops walk the rows first.
  C10_HOST_DEVICE bool is_class_major() const {
    return num_inner > 1 && num_classes > 1 && inner_stride < class_stride;
  }
};

// One value per row, or one for all rows (stride 0).
template <typename T>
struct PerRow {
  const T* data = nullptr;
  int64_t stride = 0;

  C10_HOST_DEVICE T operator[](int64_t row) const { return data[row * stride]; }
};

// The weight of an outlier: a number, or a value in memory.
template <typename acc_t>
struct Alpha {
  acc_t value = 0;
  PerRow<acc_t> values;

  C10_HOST_DEVICE acc_t operator[](int64_t row) const {
    return values.data != nullptr ? values[row] : value;
  }
};

// The weights of the classes, for inliers; 1 without any.
template <typename acc_t>
struct ClassWeights {
  const acc_t* data = nullptr;  // [num_classes]

  C10_HOST_DEVICE acc_t operator[](int64_t cls) const { return data != nullptr ? data[cls] : 1; }
};

// Where the kernels write a reduced loss; null without a reduction.
template <typename acc_t>
struct LossOutput {
  acc_t* loss = nullptr;     // one element
  double* counts = nullptr;  // of GroupCounts: what a mean divides by

  // `given`: the counts to divide by; null for the counts of the num_rows rows in `sums`.
  C10_HOST_DEVICE void write(const GroupSums& sums, const DivisorRule& rule, const double* given,
                             int64_t num_rows) const {
    const GroupCounts used = given != nullptr ? GroupCounts{given[0], given[1]} : sums.counts;
    counts[0] = used.inliers;
    counts[1] = used.outliers;
    const bool is_nan = given == nullptr && num_rows == 0 && rule.empty_is_nan;
    *loss = is_nan ? std::numeric_limits<acc_t>::quiet_NaN()
                   : static_cast<acc_t>(sums.divided_by(rule(used)));
  }
};

// The arguments of both the forward and the backward.
template <typename scalar_t, typename acc_t>
struct RowArgs {
  RowLayout layout;
  const scalar_t* logits = nullptr;
  Labels labels;
  Alpha<acc_t> alpha;
  ClassWeights<acc_t> class_weights;
  acc_t label_smoothing = 0;
  // Only on the CPU: what the classes get of an inlier's smoothing, [num_classes] with a mean of 1.
  // Null: all the same.
  const acc_t* class_spread = nullptr;
  SpreadSmoothing<acc_t> spread_smoothing;
  DivisorRule divisor_rule;
  // Of GroupCounts: what a mean divides by. Null: no division, or (forward) the counts of the rows
  // here.
  const double* counts = nullptr;
  // The gradient to write, or null. The forward writes it for an upstream gradient of 1.
  RowLayout grad_layout;  // same num_outer and num_inner as layout
  scalar_t* grad_logits = nullptr;

  // The number of all classes, also where the logits hold only a part of them.
  C10_HOST_DEVICE acc_t num_classes() const { return static_cast<acc_t>(labels.rule.num_classes); }

  C10_HOST_DEVICE GroupDivisors divisors() const {
    return counts != nullptr ? divisor_rule({counts[0], counts[1]}) : GroupDivisors{1, 1};
  }

  C10_HOST_DEVICE RowCoefficients<acc_t> coefficients(int64_t row, int64_t label,
                                                      RowKind kind) const {
    const bool inlier = kind == RowKind::kInlier;
    const bool outlier = kind == RowKind::kOutlier;
    const acc_t weight = RowCoefficients<acc_t>::weight_of(
        inlier, outlier, inlier ? class_weights[label] : acc_t(0), outlier ? alpha[row] : acc_t(0));
    return RowCoefficients<acc_t>::of_row(inlier, outlier, weight,
                                          Smoothed<acc_t>::by(label_smoothing));
  }

  // The class of a row's label, counted among those here, or -1.
  C10_HOST_DEVICE int64_t class_here(int64_t label, RowKind kind) const {
    const int64_t cls = kind == RowKind::kInlier ? labels.rule.class_here(label) : int64_t(-1);
    return cls < layout.num_classes ? cls : int64_t(-1);
  }

  // `divisor`: of the row's group.
  C10_HOST_DEVICE GradientCoefficients<acc_t> gradient_coefficients(
      const RowCoefficients<acc_t>& row, acc_t sum_exp, acc_t upstream, acc_t divisor) const {
    using Coefficients = GradientCoefficients<acc_t>;
    const acc_t scale = row.weight * upstream / divisor;
    return Coefficients::of_row(row, sum_exp, scale,
                                Coefficients::uniform_of(row.uniform, scale, num_classes()));
  }
};

template <typename scalar_t, typename acc_t>
struct ForwardArgs : RowArgs<scalar_t, acc_t> {
  // Outputs per row, [num_rows] each.
  acc_t* row_loss = nullptr;           // the weighted loss, if it is not reduced; else null
  acc_t* row_cross_entropy = nullptr;  // the loss for an alpha of 1; or null
  acc_t* row_max = nullptr;            // for the backward; or null
  acc_t* row_sum_exp = nullptr;        // for the backward; or null
  LossOutput<acc_t> output;

  // Must the rows be counted before the first gradient can be written? With class weights also
  // without a gradient: the bits of their sum depend on its order.
  C10_HOST_DEVICE bool needs_counts_first() const {
    return (this->grad_logits != nullptr || this->class_weights.data != nullptr) &&
           this->counts == nullptr && this->divisor_rule.counts();
  }

  // Does any output depend on the logits of this row?
  C10_HOST_DEVICE bool is_active(const RowCoefficients<acc_t>& row, RowKind kind) const {
    return row.counts || (row_cross_entropy != nullptr && kind == RowKind::kOutlier);
  }

  // Writes the outputs of one row and returns its weighted loss, which is 0 if the row does not
  // count. The statistics of an inactive row are arbitrary. label_shifted and mean_shifted: the
  // logit at the label (0 if it is not here) and the mean logit, minus the maximum.
  C10_HOST_DEVICE acc_t write_row(int64_t row, const RowCoefficients<acc_t>& coefficients,
                                  RowKind kind, bool active, acc_t max, acc_t sum_exp,
                                  acc_t label_shifted, acc_t mean_shifted) const {
    using std::log;
    const auto [cross_entropy, loss] =
        RowLoss<acc_t>::of_row(coefficients, log(sum_exp), label_shifted, mean_shifted);
    if (row_loss != nullptr) {
      row_loss[row] = loss;
    }
    if (row_cross_entropy != nullptr) {
      row_cross_entropy[row] = kind == RowKind::kOutlier ? cross_entropy : loss;
    }
    if (row_max != nullptr) {
      row_max[row] = active ? max : acc_t(0);
      row_sum_exp[row] = active ? sum_exp : acc_t(0);
    }
    return loss;
  }
};

template <typename scalar_t, typename acc_t>
struct BackwardArgs : RowArgs<scalar_t, acc_t> {
  PerRow<acc_t> grad;                  // the upstream gradient
  const acc_t* row_max = nullptr;      // [num_rows]
  const acc_t* row_sum_exp = nullptr;  // [num_rows]
  // grad_logits already holds the gradient for an upstream gradient of 1. Needs a scalar loss.
  bool has_unit_gradient = false;

  // Is there nothing left to do? Reads device memory.
  C10_HOST_DEVICE bool is_done() const { return has_unit_gradient && grad[0] == acc_t(1); }
};

}  // namespace oe_ext
