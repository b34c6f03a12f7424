// The reductions: the one place that knows their names and divisors. Kernels only see a
// DivisorRule.
#pragma once

#include <limits>
#include <string_view>

#include "labels.h"

namespace oe_ext {

// The number of inliers and of outliers. Ignored positions do not count.
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

// The divisor of each group's losses.
struct GroupDivisors {
  double inliers = 1;
  double outliers = 1;
};

// A sum of losses is divided by the members of these groups. Without groups, or without members, it
// stays a sum.
struct Divisor {
  bool by_inliers = false;
  bool by_outliers = false;

  constexpr C10_HOST_DEVICE bool counts() const { return by_inliers || by_outliers; }

  C10_HOST_DEVICE double operator()(double num_inliers, double num_outliers) const {
    const double members = (by_inliers ? num_inliers : 0) + (by_outliers ? num_outliers : 0);
    return members != 0 ? members : 1;
  }
};

struct DivisorRule {
  Divisor inliers;
  Divisor outliers;
  bool empty_is_nan = false;  // if there are no positions at all, like torch's mean()

  constexpr C10_HOST_DEVICE bool counts() const { return inliers.counts() || outliers.counts(); }

  // The counts may be fractions: averages over processes.
  C10_HOST_DEVICE GroupDivisors operator()(double num_inliers, double num_outliers) const {
    return {inliers(num_inliers, num_outliers), outliers(num_inliers, num_outliers)};
  }
};

struct Reduction {
  std::string_view name;
  bool is_scalar;  // else one loss per position
  DivisorRule divisors;
};

inline constexpr Divisor kByInliers = {true, false};
inline constexpr Divisor kByOutliers = {false, true};
inline constexpr Divisor kByAll = {true, true};

inline constexpr Reduction kReductions[] = {
    {"none", /*is_scalar=*/false, {}},
    {"sum", true, {}},
    {"mean", true, {kByAll, kByAll, /*empty_is_nan=*/true}},
    {"group_mean", true, {kByInliers, kByOutliers}},
};

// Null for an unknown name.
constexpr const Reduction* find_reduction(std::string_view name) {
  for (const Reduction& reduction : kReductions) {
    if (reduction.name == name) {
      return &reduction;
    }
  }
  return nullptr;
}

// Sums of the weighted losses by group, in double for every dtype: 10^7 positions would cost
// float32 half of its digits.
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

  C10_HOST_DEVICE double divided_by(const GroupDivisors& divisors) const {
    return divisors.inliers == divisors.outliers
               ? (inliers + outliers) / divisors.inliers
               : inliers / divisors.inliers + outliers / divisors.outliers;
  }
};

}  // namespace oe_ext
