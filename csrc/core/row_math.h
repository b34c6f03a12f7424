// The maths of one row of logits, once, for host and device.
//
// A row x of C logits with label y is cross-entropy against a distribution q:
//     loss = w * (logsumexp(x) - <q, x>),      d loss / d x = w * (softmax(x) - q)
// For an outlier, q is uniform and w is alpha (Hendrycks et al., "Deep Anomaly Detection with
// Outlier Exposure", ICLR 2019, arXiv 1812.04606). For an inlier, w is the weight of its class, and
// q is one-hot at y, or with a label smoothing e a mixture: 1 - e of that and e of the uniform one
// (Szegedy et al., CVPR 2016, arXiv 1512.00567). This is k logsumexp(x) - h x_y - u sum(x) with
// k = w, h = w * label and u = w * uniform / C of RowCoefficients, which keep k apart because the
// unweighted loss is needed too.
//
// All formulas use logits shifted by the row's maximum, and add the logarithm of the sum last: with
// an offset of 1e4 in float32, logsumexp(x) - mean(x) is off by 1e-3.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__FAST_MATH__) || defined(__ASSOCIATIVE_MATH__) || \
    (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__)
#error "oe_ext computes with NaN and infinities: compile it with -fno-fast-math after other flags"
#endif

namespace oe_ext {

// Returns a or b; both are evaluated. The host selects by bits: compilers turn a ?: into a branch
// if only one side needs an operand, and then cannot vectorise the loop around it.
template <typename T>
C10_HOST_DEVICE T select(bool condition, T a, T b) {
#if defined(__CUDA_ARCH__)
  return condition ? a : b;
#else
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  const Bits mask = condition ? ~Bits(0) : Bits(0);
  return __builtin_bit_cast(
      T, (__builtin_bit_cast(Bits, a) & mask) | (__builtin_bit_cast(Bits, b) & ~mask));
#endif
}

// The distribution q of an inlier: what of it lies on the label, and on all classes alike.
template <typename acc_t>
struct Smoothed {
  acc_t label = 1;
  acc_t uniform = 0;

  C10_HOST_DEVICE static Smoothed by(acc_t label_smoothing) {
    return {acc_t(1) - label_smoothing, label_smoothing};
  }
};

// A row's loss in three coefficients: weight * (logsumexp(x) - <q, x>), where q gives
// `label` to the class of the label and spreads `uniform` over all classes:
//     <q, x> = label * x_y + uniform * mean(x),      label + uniform = 1
// A label or uniform of 0 removes what it multiplies, even if that is infinite or NaN. So does a
// weight of 0, but not that of a class: as in torch, its inliers are NaN if their logits are.
template <typename acc_t>
struct RowCoefficients {
  acc_t weight = 0;
  acc_t label = 0;
  acc_t uniform = 0;
  bool counts = false;

  C10_HOST_DEVICE static RowCoefficients of_row(bool inlier, bool outlier, acc_t weight,
                                                Smoothed<acc_t> smoothed) {
    const bool counts = inlier | (weight != acc_t(0));
    return {weight, select(inlier, smoothed.label, acc_t(0)),
            select(inlier, smoothed.uniform, select(outlier, acc_t(1), acc_t(0))), counts};
  }

  C10_HOST_DEVICE static acc_t weight_of(bool inlier, bool outlier, acc_t class_weight,
                                         acc_t alpha) {
    return select(inlier, class_weight, select(outlier, alpha, acc_t(0)));
  }
};

// Label smoothing together with class weights, as in torch: (1 - e) w_y (lse - x_y) plus
// e / C sum_c w_c (lse - x_c). With m the mean weight this is a row as above, of the weight
// k = (1 - e) w_y + e m, if mean(x) weighs each class by w_c / m.
template <typename acc_t>
struct SpreadSmoothing {
  acc_t to_label = 1;    // 1 - e
  acc_t to_classes = 0;  // e m

  C10_HOST_DEVICE acc_t weight(acc_t class_weight) const {
    return to_label * class_weight + to_classes;
  }
  C10_HOST_DEVICE Smoothed<acc_t> of_inlier(acc_t class_weight, acc_t weight) const {
    return {to_label * class_weight / weight, to_classes / weight};
  }
};

// A row's outputs, computed from its statistics. For loops over rows: without branches, and with
// the logarithm as an argument. The cross-entropy of an inactive row is arbitrary.
template <typename acc_t>
struct RowLoss {
  acc_t cross_entropy;
  acc_t loss;  // weighted

  // label_shifted and mean_shifted: the logit at the label and the mean logit, minus the maximum.
  C10_HOST_DEVICE static RowLoss of_row(RowCoefficients<acc_t> row, acc_t log_sum,
                                        acc_t label_shifted, acc_t mean_shifted) {
    const acc_t of_label = select(row.label != acc_t(0), row.label * label_shifted, acc_t(0));
    const acc_t of_mean = select(row.uniform != acc_t(0), row.uniform * mean_shifted, acc_t(0));
    const acc_t cross_entropy = log_sum - (of_label + of_mean);
    return {cross_entropy, select(row.counts, row.weight * cross_entropy, acc_t(0))};
  }
};

// The gradient of a row, scale * (softmax(x) - q), as exp(x - max) * factor - offset; the
// exponential at the label is first reduced by `at_label`. Factor and offset are 0 in a row that
// does not count. Both are quotients, so they cancel where all logits of an outlier are equal. The
// softmax is a quotient and not the exponential of a log-softmax: near the maximum, x - max is
// small and exact. A logarithm of 5 would be rounded twice, to 2.4e-7 in float32, and the
// exponential would make that a relative error.
template <typename acc_t>
struct GradientCoefficients {
  acc_t factor = 0;
  acc_t offset = 0;
  acc_t at_label = 0;

  // `scale`: weight * upstream gradient / divisor of the reduction. `uniform`: what of that each
  // class gets of the uniform part of q, see uniform_of().
  C10_HOST_DEVICE static GradientCoefficients of_row(RowCoefficients<acc_t> row, acc_t sum_exp,
                                                     acc_t scale, acc_t uniform) {
    const bool has_uniform = row.counts & (row.uniform != acc_t(0));
    return {select(row.counts, scale / sum_exp, acc_t(0)), select(has_uniform, uniform, acc_t(0)),
            row.label * sum_exp};
  }

  C10_HOST_DEVICE static acc_t uniform_of(acc_t uniform, acc_t scale, acc_t num_classes) {
    return scale * uniform / num_classes;
  }

  C10_HOST_DEVICE acc_t operator()(acc_t exp_shifted, bool is_label) const {
    return (is_label ? exp_shifted - at_label : exp_shifted) * factor - offset;
  }
};

}  // namespace oe_ext
