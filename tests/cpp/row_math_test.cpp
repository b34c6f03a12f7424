// The maths of one row on the host, compared with sums in long double.
#include "core/row_math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <tuple>
#include <vector>

#include "core/kernel_args.h"

namespace oe_ext {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// What the kernels know of a row: terms in acc_t, long sums in double. The maximum starts at the
// lowest finite number, as theirs does, so that -inf is no special case.
template <typename acc_t>
struct RowStats {
  explicit RowStats(const std::vector<acc_t>& x) : size(static_cast<acc_t>(x.size())) {
    for (const acc_t value : x) {
      max = std::fmax(max, value);
    }
    double exponentials = 0;
    double shifted = 0;
    for (const acc_t value : x) {
      exponentials += std::exp(value - max);
      shifted += value - max;
    }
    sum_exp = static_cast<acc_t>(exponentials);
    sum_shifted = static_cast<acc_t>(shifted);
  }

  acc_t size;
  acc_t max = std::numeric_limits<acc_t>::lowest();
  acc_t sum_exp = 0;
  acc_t sum_shifted = 0;
};

template <typename acc_t>
std::vector<acc_t> random_row(int64_t size, acc_t offset) {
  std::mt19937 generator(42);
  std::normal_distribution<double> normal(0, 3);
  std::vector<acc_t> x(size);
  std::generate(x.begin(), x.end(), [&] { return static_cast<acc_t>(normal(generator)) + offset; });
  return x;
}

struct Expected {
  template <typename acc_t>
  explicit Expected(const std::vector<acc_t>& x) {
    const long double max = *std::max_element(x.begin(), x.end());
    long double sum_exp = 0;
    for (const acc_t value : x) {
      sum_exp += std::exp(static_cast<long double>(value) - max);
      mean += static_cast<long double>(value) / x.size();
    }
    logsumexp = max + std::log(sum_exp);
  }
  long double logsumexp = 0;
  long double mean = 0;
};

template <typename acc_t>
RowCoefficients<acc_t> inlier_of(acc_t weight, acc_t smoothing) {
  return RowCoefficients<acc_t>::of_row(true, false, weight, Smoothed<acc_t>::by(smoothing));
}

template <typename acc_t>
RowCoefficients<acc_t> outlier_of(acc_t weight, acc_t smoothing) {
  return RowCoefficients<acc_t>::of_row(false, true, weight, Smoothed<acc_t>::by(smoothing));
}

template <typename acc_t>
acc_t inlier_cross_entropy(const RowStats<acc_t>& stats, acc_t logit) {
  const auto inlier = inlier_of<acc_t>(1, 0);
  const acc_t nan = std::numeric_limits<acc_t>::quiet_NaN();  // an inlier ignores it
  return RowLoss<acc_t>::of_row(inlier, std::log(stats.sum_exp), logit - stats.max, nan).loss;
}

template <typename acc_t>
acc_t outlier_cross_entropy(const RowStats<acc_t>& stats) {
  const auto outlier = outlier_of<acc_t>(1, 0);
  const acc_t nan = std::numeric_limits<acc_t>::quiet_NaN();
  return RowLoss<acc_t>::of_row(outlier, std::log(stats.sum_exp), nan,
                                stats.sum_shifted / stats.size)
      .loss;
}

class RowLossOfSize : public testing::TestWithParam<int64_t> {};

TEST_P(RowLossOfSize, DoubleMatchesLongDouble) {
  for (const double offset : {0.0, 1e4, -1e4}) {
    const auto x = random_row<double>(GetParam(), offset);
    const RowStats stats(x);
    const Expected expected(x);
    EXPECT_NEAR(inlier_cross_entropy(stats, x[0]), double(expected.logsumexp - x[0]), 1e-12);
    EXPECT_NEAR(outlier_cross_entropy(stats), double(expected.logsumexp - expected.mean), 1e-12);
  }
}

// logsumexp(x) - mean(x) would be off by 1e-3 here.
TEST_P(RowLossOfSize, FloatKeepsItsDigitsUnderAnOffset) {
  for (const float offset : {0.0f, 1e4f, -1e4f}) {
    const auto x = random_row<float>(GetParam(), offset);
    const RowStats stats(x);
    const Expected expected(x);
    EXPECT_NEAR(outlier_cross_entropy(stats), double(expected.logsumexp - expected.mean), 5e-6);
    EXPECT_NEAR(inlier_cross_entropy(stats, x[0]), double(expected.logsumexp - x[0]), 5e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Sizes, RowLossOfSize, testing::Values(1, 2, 3, 7, 10, 100, 1000));

TEST(RowLoss, MinusInfinityAnywhere) {
  for (std::vector<double> x : {std::vector<double>{-kInf, 1, 2}, {1, -kInf, 2}, {1, 2, -kInf}}) {
    const RowStats stats(x);
    EXPECT_NEAR(inlier_cross_entropy(stats, 2.0), std::log1p(std::exp(-1.0)), 1e-15);
    EXPECT_EQ(inlier_cross_entropy(stats, -kInf), kInf);
    EXPECT_EQ(outlier_cross_entropy(stats), kInf);
  }
}

TEST(RowLoss, NoSoftmaxIsNaN) {
  const double nan = std::nan("");
  for (std::vector<double> x : {std::vector<double>{kInf, 1, 2},
                                {1, 2, kInf},
                                {kInf, kInf},
                                {nan, 1, 2},
                                {1, 2, nan},
                                {-kInf, -kInf}}) {
    const RowStats stats(x);
    EXPECT_TRUE(std::isnan(inlier_cross_entropy(stats, x[1])));
    EXPECT_TRUE(std::isnan(outlier_cross_entropy(stats)));
  }
}

TEST(RowLoss, ExtremeFiniteLogits) {
  const float huge = 3e38f;
  const auto stats = RowStats<float>({-huge, huge, 0});
  EXPECT_EQ(stats.sum_exp, 1.0f);
  EXPECT_EQ(inlier_cross_entropy(stats, huge), 0.0f);
  EXPECT_EQ(inlier_cross_entropy(RowStats<float>({-huge, -huge}), -huge), std::log(2.0f));
}

TEST(RowCoefficients, OfEachKind) {
  using Row = RowCoefficients<double>;
  const auto expect = [](const Row& row, double weight, double label, double uniform, bool counts) {
    EXPECT_EQ(std::tie(row.weight, row.label, row.uniform, row.counts),
              std::tie(weight, label, uniform, counts));
  };
  expect(inlier_of(3.0, 0.0), 3, 1, 0, true);
  expect(inlier_of(3.0, 0.25), 3, 0.75, 0.25, true);
  expect(inlier_of(3.0, 1.0), 3, 0, 1, true);
  expect(inlier_of(0.0, 0.25), 0, 0.75, 0.25, true);
  expect(outlier_of(3.0, 0.25), 3, 0, 1, true);
  expect(outlier_of(0.0, 0.25), 0, 0, 1, false);
  expect(Row::of_row(false, false, 0.0, Smoothed<double>::by(0.25)), 0, 0, 0, false);
  EXPECT_EQ(Row::weight_of(true, false, 3.0, 0.5), 3.0);
  EXPECT_EQ(Row::weight_of(false, true, 3.0, 0.5), 0.5);
  EXPECT_EQ(Row::weight_of(false, false, 3.0, 0.5), 0.0);
}

// Only the labels of inliers are smoothed.
TEST(RowLoss, WeightAndSmoothing) {
  const auto x = random_row<double>(10, 0);
  const RowStats stats(x);
  const Expected expected(x);
  for (const double smoothing : {0.0, 0.1, 1.0}) {
    for (const bool inlier : {true, false}) {
      const auto row = inlier ? inlier_of(2.5, smoothing) : outlier_of(2.5, smoothing);
      const auto [cross_entropy, loss] = RowLoss<double>::of_row(
          row, std::log(stats.sum_exp), x[3] - stats.max, stats.sum_shifted / stats.size);
      const long double uniform = inlier ? smoothing : 1;
      const auto value =
          double(expected.logsumexp - (1 - uniform) * x[3] - uniform * expected.mean);
      EXPECT_NEAR(cross_entropy, value, 1e-14);
      EXPECT_NEAR(loss, 2.5 * value, 1e-14);
    }
  }
}

// As in torch, a class weight of 0 does not hide a NaN, but an alpha of 0 does.
TEST(RowLoss, WithoutWeight) {
  const double nan = std::nan("");
  for (const double smoothing : {0.0, 0.1}) {
    const auto inlier = inlier_of(0.0, smoothing);
    const auto outlier = outlier_of(0.0, smoothing);
    EXPECT_EQ(RowLoss<double>::of_row(inlier, 2, -1, -3).loss, 0.0);
    EXPECT_TRUE(std::isnan(RowLoss<double>::of_row(inlier, nan, nan, nan).loss));
    EXPECT_EQ(RowLoss<double>::of_row(outlier, nan, nan, nan).loss, 0.0);
    const auto of_inlier = GradientCoefficients<double>::of_row(inlier, nan, 0, 0);
    const auto of_outlier = GradientCoefficients<double>::of_row(outlier, nan, 0, 0);
    EXPECT_TRUE(std::isnan(of_inlier.factor));
    EXPECT_EQ(of_outlier.factor, 0.0);
    EXPECT_EQ(of_outlier.offset, 0.0);
  }
}

TEST(GradientCoefficients, SoftmaxMinusQ) {
  const std::vector<double> x = {0.5, -1.0, 2.0};
  const RowStats stats(x);
  const Expected expected(x);
  // An inlier, an outlier, and inliers with smoothed labels.
  for (const RowCoefficients<double> row :
       {inlier_of(1.0, 0.0), outlier_of(0.5, 0.25), inlier_of(3.0, 0.25), inlier_of(3.0, 1.0)}) {
    using Coefficients = GradientCoefficients<double>;
    const double uniform = Coefficients::uniform_of(row.uniform, /*scale=*/2.0, /*num_classes=*/3);
    const auto gradient = Coefficients::of_row(row, stats.sum_exp, /*scale=*/2.0, uniform);
    for (int64_t cls = 0; cls < 3; ++cls) {
      const double softmax = std::exp(x[cls] - double(expected.logsumexp));
      const double q = (cls == 1 ? row.label : 0.0) + row.uniform / 3;
      EXPECT_NEAR(gradient(std::exp(x[cls] - stats.max), cls == 1), 2.0 * (softmax - q), 1e-15);
    }
  }
}

TEST(LabelRule, Kinds) {
  LabelRule rule;
  rule.num_classes = 4;
  EXPECT_EQ(rule.kind(0), RowKind::kInlier);
  EXPECT_EQ(rule.kind(3), RowKind::kInlier);
  EXPECT_EQ(rule.kind(4), RowKind::kInvalid);
  EXPECT_EQ(rule.kind(-1), RowKind::kOutlier);
  EXPECT_EQ(rule.kind(-100), RowKind::kOutlier);

  rule.has_ignore_index = true;
  rule.ignore_index = -100;
  EXPECT_EQ(rule.kind(-100), RowKind::kIgnored);
  EXPECT_EQ(rule.kind(-1), RowKind::kOutlier);

  rule.has_ood_index = true;
  rule.ood_index = 254;
  EXPECT_EQ(rule.kind(254), RowKind::kOutlier);
  EXPECT_EQ(rule.kind(-1), RowKind::kInvalid);

  rule.ood_index = 2;  // one of the classes
  EXPECT_EQ(rule.kind(2), RowKind::kOutlier);
  rule.ignore_index = 2;  // takes precedence
  EXPECT_EQ(rule.kind(2), RowKind::kIgnored);
}

TEST(LabelRule, ClassesOfAPart) {
  LabelRule rule;
  rule.num_classes = 10;
  rule.first_class = 4;  // three classes are here
  EXPECT_EQ(rule.class_here(4), 0);
  EXPECT_EQ(rule.class_here(6), 2);
  for (const int64_t elsewhere : {0, 3, 7, 9}) {
    EXPECT_GE(rule.class_here(elsewhere), 3);
    EXPECT_LT(rule.class_here(elsewhere), 10);
  }
}

// The loss of num_rows rows, divided by given counts, or by their own if null.
double reduced(const GroupSums& sums, std::string_view name, int64_t num_rows,
               const double* given = nullptr) {
  double loss = 0;
  double counts[2];
  LossOutput<double>{&loss, counts}.write(sums, find_reduction(name)->divisors, given, num_rows);
  EXPECT_EQ(counts[0], given != nullptr ? given[0] : sums.counts.inliers);
  EXPECT_EQ(counts[1], given != nullptr ? given[1] : sums.counts.outliers);
  return loss;
}

TEST(GroupSums, Reductions) {
  const GroupSums sums = {9, 10, {3, 1}};
  EXPECT_EQ(reduced(sums, "sum", 5), 19.0);
  EXPECT_EQ(reduced(sums, "mean", 5), 19.0 / 4);
  EXPECT_EQ(reduced(sums, "group_mean", 5), 3.0 + 10.0);
}

// A mean divides by the weights of the inliers, and by the number of the outliers.
TEST(GroupSums, ClassWeights) {
  const GroupSums sums = {9, 3, {2.25, 2}};
  EXPECT_EQ(reduced(sums, "sum", 5), 12.0);
  EXPECT_EQ(reduced(sums, "mean", 5), 12.0 / 4.25);
  EXPECT_EQ(reduced(sums, "group_mean", 5), 4.0 + 1.5);
  for (const char* name : {"sum", "mean", "group_mean"}) {
    EXPECT_EQ(reduced(GroupSums(), name, 1), 0.0) << name;
  }
}

TEST(GroupCounts, Merge) {
  GroupCounts counts = {0.25, 1};
  counts.merge({1e-9, 2});
  EXPECT_EQ(counts.inliers, 0.25 + 1e-9);
  EXPECT_EQ(counts.outliers, 3.0);
}

TEST(DivisorRule, OfEachReduction) {
  const auto expect = [](std::string_view name, const GroupCounts& counts, double inliers,
                         double outliers) {
    const GroupDivisors divisors = find_reduction(name)->divisors(counts);
    EXPECT_EQ(divisors.inliers, inliers) << name;
    EXPECT_EQ(divisors.outliers, outliers) << name;
  };
  expect("none", {2.5, 4}, 1, 1);
  expect("sum", {2.5, 4}, 1, 1);
  expect("mean", {2.5, 4}, 6.5, 6.5);
  expect("group_mean", {2.5, 4}, 2.5, 4);
  expect("mean", {0.25, 0}, 0.25, 0.25);  // below 1, and no count of rows
  expect("sum", {0, 0}, 1, 1);
  expect("mean", {0, 0}, kInf, kInf);
  expect("group_mean", {0, 4}, kInf, 4);
  expect("group_mean", {0.25, 0}, 0.25, kInf);
}

TEST(GroupSums, CountsFromOutside) {
  const GroupSums sums = {3, 10, {1, 1}};
  const double given[] = {1.5, 4};
  EXPECT_EQ(reduced(sums, "mean", 2, given), 13.0 / 5.5);
  EXPECT_EQ(reduced(sums, "group_mean", 2, given), 2.0 + 2.5);
  EXPECT_EQ(reduced(GroupSums(), "mean", 0, given), 0.0);
  const double none[] = {0, 0};
  EXPECT_EQ(reduced(sums, "mean", 2, none), 0.0);
  EXPECT_EQ(reduced(sums, "group_mean", 2, none), 0.0);
  EXPECT_EQ(reduced(sums, "sum", 2, none), 13.0);
}

TEST(GroupSums, EmptyGroups) {
  const GroupSums inliers_only = {4, 0, {1, 0}};
  EXPECT_EQ(reduced(inliers_only, "group_mean", 1), 4.0);
  for (const char* name : {"sum", "mean", "group_mean"}) {
    EXPECT_EQ(reduced(GroupSums(), name, 3), 0.0) << "all ignored";
  }
  EXPECT_TRUE(std::isnan(reduced(GroupSums(), "mean", 0)));
  EXPECT_EQ(reduced(GroupSums(), "sum", 0), 0.0);
  EXPECT_EQ(reduced(GroupSums(), "group_mean", 0), 0.0);
}

TEST(RowLayout, OffsetsBeyond32Bits) {
  RowLayout layout;
  layout.num_outer = 3;
  layout.num_inner = int64_t(1) << 20;
  layout.num_classes = int64_t(1) << 13;
  layout.inner_stride = 1;
  layout.class_stride = layout.num_inner;
  layout.outer_stride = layout.num_inner * layout.num_classes;  // 2^33
  EXPECT_EQ(layout.row_offset(2 * layout.num_inner + 5), (int64_t(1) << 34) + 5);
  EXPECT_EQ(layout.class_offset(8191), int64_t(8191) << 20);
  EXPECT_TRUE(layout.is_class_major());
}

}  // namespace
}  // namespace oe_ext
