// The maths of one row of logits, once, for host and device.
//
// A row x of C logits with label y is cross-entropy against a distribution q:
//     loss = w * (logsumexp(x) - <q, x>),      d loss / d x = w * (softmax(x) - q)
// where q is one-hot at y for an inlier and uniform for an outlier (Hendrycks et al., "Deep Anomaly
// Detection with Outlier Exposure", ICLR 2019, arXiv 1812.04606), and w is 1 or alpha.
//
// Everything is written in logits that are shifted by the row's maximum, and the logarithm of the
// sum is added last: with an offset of 1e4 in float32, logsumexp(x) - mean(x) is off by 1e-3.
#pragma once

#include <c10/macros/Macros.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace oe_ext {

// a or b, both of which are evaluated. On the host by their bits: compilers move what only one side
// of a ?: needs into a branch, and then cannot vectorise the loop around it.
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

enum class Reduction : int8_t { kNone, kSum, kMean, kGroupMean };

enum class RowKind : int8_t { kInlier, kOutlier, kIgnored, kInvalid };

// What a label means. ignore_index is looked at first; ood_index replaces "negative" as the mark of
// an outlier.
template <typename label_t>
struct LabelRuleOf {
  label_t num_classes = 0;
  label_t ignore_index = 0;
  label_t ood_index = 0;
  bool has_ignore_index = false;
  bool has_ood_index = false;

  // Without branches, so that loops over labels can be vectorised.
  C10_HOST_DEVICE bool is_ignored(label_t label) const {
    return has_ignore_index & (label == ignore_index);
  }
  C10_HOST_DEVICE bool is_outlier(label_t label) const {
    const bool marked = (has_ood_index & (label == ood_index)) | (!has_ood_index & (label < 0));
    const bool ignored = is_ignored(label);
    return marked & !ignored;
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
};
using LabelRule = LabelRuleOf<int64_t>;

// Terms that are summed one after another before they join other such sums. The error of a sum
// grows with the length of its longest chain of additions.
constexpr int64_t kClassBlock = 16;

// The statistics of a row, or of any part of one; parts merge in any order.
//
// The maximum starts at the lowest finite number, not at -inf, so that a -inf logit needs no case
// of its own: it adds exp(-inf) = 0 to sum_exp and -inf to sum_shifted. A +inf or NaN logit, and a
// row of nothing but -inf, end as NaN: their softmax does not exist.
template <typename acc_t>
struct RowStats {
  acc_t max = std::numeric_limits<acc_t>::lowest();
  acc_t sum_exp = 0;      // sum of exp(x - max)
  acc_t sum_shifted = 0;  // sum of x - max
  acc_t count = 0;        // how many logits the sums hold

  // Not implicit: that one would be compiled for the file's least processor (see
  // cpu/kernels_avx2.cpp).
  C10_HOST_DEVICE RowStats() {}

  // Empty sums that start from a maximum that is known already.
  C10_HOST_DEVICE static RowStats below(acc_t max) {
    RowStats stats;
    stats.max = max;
    return stats;
  }

  // False for a NaN, which reaches the sums instead.
  C10_HOST_DEVICE bool raised_by(acc_t x) const { return x > max; }

  // Moves the sums to a new maximum, which must not be below the old one.
  C10_HOST_DEVICE void raise_max(acc_t new_max) {
    sum_exp *= std::exp(max - new_max);
    if (count > 0) {  // 0 * (lowest - new_max) may be 0 * -inf
      sum_shifted += count * (max - new_max);
    }
    max = new_max;
  }

  // Adds a logit that is not above max, and returns exp(x - max).
  C10_HOST_DEVICE acc_t add(acc_t x) {
    using std::exp;
    const acc_t shifted = x - max;
    const acc_t exp_shifted = exp(shifted);
    add_terms(shifted, exp_shifted);
    return exp_shifted;
  }

  // Adds a logit by what it adds to the sums: x - max and exp(x - max).
  C10_HOST_DEVICE void add_terms(acc_t shifted, acc_t exp_shifted) {
    sum_exp += exp_shifted;
    sum_shifted += shifted;
    count += acc_t(1);
  }

  // Adds any logit.
  C10_HOST_DEVICE void push(acc_t x) {
    if (raised_by(x)) {
      raise_max(x);
    }
    add(x);
  }

  C10_HOST_DEVICE void merge(RowStats other) {
    if (raised_by(other.max)) {
      raise_max(other.max);
    } else if (other.raised_by(max)) {
      other.raise_max(max);
    }
    sum_exp += other.sum_exp;
    sum_shifted += other.sum_shifted;
    count += other.count;
  }

  C10_HOST_DEVICE acc_t log_sum() const {
    using std::log;
    return log(sum_exp);
  }
};

// What a row's outputs are, from its statistics: for loops over rows, hence without branches and
// with the logarithm as an argument.
template <typename acc_t>
struct RowLoss {
  acc_t cross_entropy;  // 0 where the row is not active
  acc_t loss;           // weighted

  // `active`: the cross-entropy is wanted, as a weight other than 0 always wants it. `at_label` is
  // read in an inlier row, sum_shifted in an outlier row.
  C10_HOST_DEVICE static RowLoss of_row(bool active, bool outlier, acc_t weight, acc_t log_sum,
                                        acc_t label_shifted, acc_t mean_shifted) {
    const acc_t cross_entropy =
        select(active, log_sum - select(outlier, mean_shifted, label_shifted), acc_t(0));
    return {cross_entropy, select(weight != acc_t(0), weight * cross_entropy, acc_t(0))};
  }
};

// The gradient of a row, scale * (softmax(x) - q), in two coefficients: exp(x - max) * factor -
// offset, and at the label of an inlier, whose q is 1, (exp(x - max) - sum_exp) * factor. Both are
// 0 in a row without a weight. Both are quotients: they cancel where all logits of an outlier are
// equal. The softmax is a quotient and not the exponential of a log-softmax: near the maximum x -
// max is small and exact, where a logarithm of 5 would be rounded twice, to 2.4e-7 in float32,
// before the exponential makes it a relative error.
template <typename acc_t>
struct GradientCoefficients {
  acc_t factor = 0;
  acc_t offset = 0;

  // `scale`: weight * upstream gradient / divisor of the reduction.
  C10_HOST_DEVICE static GradientCoefficients of_row(acc_t weight, bool outlier, acc_t sum_exp,
                                                     acc_t scale, acc_t num_classes) {
    return {select(weight != acc_t(0), scale / sum_exp, acc_t(0)),
            select(outlier & (weight != acc_t(0)), scale / num_classes, acc_t(0))};
  }
};

// The same for one logit after another. An inactive row has a weight of zero: its logits do not
// count, whatever they are.
template <typename acc_t>
struct RowGradient {
  acc_t max = 0;
  acc_t sum_exp = 0;
  GradientCoefficients<acc_t> coefficients;
  int64_t label = -1;  // -1 in an outlier row
  bool active = false;

  C10_HOST_DEVICE static RowGradient of_row(acc_t max, acc_t sum_exp, acc_t weight, acc_t scale,
                                            RowKind kind, int64_t label, int64_t num_classes) {
    const bool outlier = kind == RowKind::kOutlier;
    return {max, sum_exp,
            GradientCoefficients<acc_t>::of_row(weight, outlier, sum_exp, scale,
                                                static_cast<acc_t>(num_classes)),
            outlier ? int64_t(-1) : label, true};
  }

  C10_HOST_DEVICE acc_t operator()(acc_t x, int64_t cls) const {
    const acc_t exp_shifted = std::exp(x - max);
    const acc_t from_label = cls == label ? exp_shifted - sum_exp : exp_shifted;
    return active ? from_label * coefficients.factor - coefficients.offset : acc_t(0);
  }
};

// How many positions count, by group; what the means divide by.
struct GroupCounts {
  int64_t inliers = 0;
  int64_t outliers = 0;

  C10_HOST_DEVICE void add(RowKind kind) {
    inliers += kind == RowKind::kInlier;
    outliers += kind == RowKind::kOutlier;
  }

  C10_HOST_DEVICE void merge(const GroupCounts& other) {
    inliers += other.inliers;
    outliers += other.outliers;
  }
};

// What a reduction divides the loss of a position of this kind by. It is 0 only where no position
// would be divided, or where the mean of an empty batch is asked for (NaN, as torch's).
C10_HOST_DEVICE inline int64_t reduction_divisor(Reduction reduction, RowKind kind,
                                                 GroupCounts counts) {
  switch (reduction) {
    case Reduction::kMean:
      return counts.inliers + counts.outliers;
    case Reduction::kGroupMean:
      return kind == RowKind::kOutlier ? counts.outliers : counts.inliers;
    default:
      return 1;
  }
}

// Sums of the weighted losses by group. They are kept in double for every dtype: 10^7 positions
// would cost float32 half of its digits.
struct GroupSums {
  double inliers = 0;
  double outliers = 0;
  GroupCounts counts;

  C10_HOST_DEVICE void add(RowKind kind, double loss) {
    inliers += kind == RowKind::kInlier ? loss : 0.0;
    outliers += kind == RowKind::kOutlier ? loss : 0.0;
    counts.add(kind);
  }

  C10_HOST_DEVICE void merge(const GroupSums& other) {
    inliers += other.inliers;
    outliers += other.outliers;
    counts.merge(other.counts);
  }

  // The reduced loss of num_rows positions, ignored ones among them.
  C10_HOST_DEVICE double reduce(Reduction reduction, int64_t num_rows) const {
    if (num_rows == 0) {
      return reduction == Reduction::kMean ? std::numeric_limits<double>::quiet_NaN() : 0.0;
    }
    const int64_t inlier_divisor = reduction_divisor(reduction, RowKind::kInlier, counts);
    const int64_t outlier_divisor = reduction_divisor(reduction, RowKind::kOutlier, counts);
    if (inlier_divisor == outlier_divisor) {
      return inlier_divisor > 0 ? (inliers + outliers) / static_cast<double>(inlier_divisor) : 0.0;
    }
    return (inlier_divisor > 0 ? inliers / static_cast<double>(inlier_divisor) : 0.0) +
           (outlier_divisor > 0 ? outliers / static_cast<double>(outlier_divisor) : 0.0);
  }
};

}  // namespace oe_ext
