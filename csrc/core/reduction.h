// The reductions: the one place that knows their names and divisors. Kernels only see a
// DivisorRule.
#pragma once

#include <c10/macros/Macros.h>

#include <limits>
#include <string_view>

namespace oe_ext {

// The sum of the inliers' class weights (without any, their number), and the number of outliers.
// Ignored positions do not count.
struct GroupCounts {
  double inliers = 0;
  double outliers = 0;

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

// A sum of losses is divided by the counts of these groups; without groups it stays a sum. Counts
// of 0 make it 0: nothing is there, or all of it has a class weight of 0.
struct Divisor {
  bool by_inliers = false;
  bool by_outliers = false;

  constexpr C10_HOST_DEVICE bool counts() const { return by_inliers || by_outliers; }

  C10_HOST_DEVICE double operator()(const GroupCounts& group) const {
    if (!counts()) {
      return 1;
    }
    const double members = (by_inliers ? group.inliers : 0) + (by_outliers ? group.outliers : 0);
    return members != 0 ? members : std::numeric_limits<double>::infinity();
  }
};

struct DivisorRule {
  Divisor inliers;
  Divisor outliers;
  bool empty_is_nan = false;  // if there are no positions at all, like torch's mean()

  constexpr C10_HOST_DEVICE bool counts() const { return inliers.counts() || outliers.counts(); }

  // Is the divisor of both groups that of all their members?
  constexpr C10_HOST_DEVICE bool counts_all() const {
    return inliers.by_inliers && inliers.by_outliers && outliers.by_inliers && outliers.by_outliers;
  }

  // The counts may be fractions: sums of weights, averages over processes.
  C10_HOST_DEVICE GroupDivisors operator()(const GroupCounts& counts) const {
    return {inliers(counts), outliers(counts)};
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
