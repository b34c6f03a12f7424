// The kernels on raw memory, in each dtype, reduction and layout, compared with the definition.
// They must touch nothing but their arguments. Compiled for each backend (kernels.h).
#include "kernels.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include "kernel_problem.h"

namespace oe_ext::testing {
namespace {

// Fibers are slow: they run only one of this many problems. And the kernels of csrc/cuda do not
// spread smoothing by class weight.
#ifdef SIMT_CPU
constexpr size_t kEvery = 17;
constexpr bool kSpreadsSmoothing = false;
#else
constexpr size_t kEvery = 1;
constexpr bool kSpreadsSmoothing = true;
#endif

constexpr LabelType kLabelTypes[] = {LabelType::kInt64, LabelType::kInt32, LabelType::kInt16,
                                     LabelType::kInt8,  LabelType::kUInt8, LabelType::kUInt16,
                                     LabelType::kUInt32};

// The layouts of the logits and of the gradient.
constexpr std::pair<Layout, Layout> kLayouts[] = {
    {Layout::kRows, Layout::kRows},        {Layout::kPixels, Layout::kPixels},
    {Layout::kSliced, Layout::kRows},      {Layout::kImages, Layout::kImages},
    {Layout::kEverySecond, Layout::kRows}, {Layout::kEverySecond, Layout::kEverySecond},
    {Layout::kRows, Layout::kPixels},      {Layout::kPixels, Layout::kRows},
    {Layout::kSliced, Layout::kSliced},    {Layout::kOneRow, Layout::kRows},
};

// One class; around a vector of each width; the last class count for loops along rows, and the
// first for loops along classes; around a tile of rows; rows of several tiles.
constexpr Shape kShapes[] = {
    {1, 1, 1},   {1, 1, 2},   {2, 5, 1},    {3, 7, 3},    {1, 15, 8},
    {2, 33, 16}, {1, 17, 17}, {1, 257, 10}, {2, 40, 63},  {2, 40, 64},
    {1, 40, 65}, {2, 9, 129}, {1, 31, 31},  {1, 5, 1031}, {0, 1, 4},
};

// Rows longer than the scratch memory of a CPU tile and the shared memory of a GPU block; pixels
// whose classes fit neither.
constexpr Shape kLargeShapes[] = {{1, 2, 33000}, {1, 2, 70001}, {1, 19, 4999}};

// Every reduction is tried with the first two, and with one of the others.
constexpr Options kPlainOptions[] = {{}, {.alpha_of_each_row = true}};
constexpr Options kMoreOptions[] = {
    {.class_weights = true},
    {.alpha_of_each_row = true, .label_smoothing = 0.1},
    {.alpha_of_each_row = true, .class_weights = true, .label_smoothing = 1},
    {.class_weights = true, .label_smoothing = 0.1, .spreads_smoothing = kSpreadsSmoothing},
};

double unit_in_last_place(double x, double epsilon) { return epsilon * std::max(1.0, std::abs(x)); }

template <typename T>
class Kernels : public ::testing::Test {
 protected:
  using scalar_t = T;
  using acc_t = typename Problem<T>::acc_t;

  static constexpr double kEpsilon = std::numeric_limits<acc_t>::epsilon();
  const scalar_t kUntouched = scalar_t(-77.0F);

  // One problem through the forward and every way to its gradient.
  void check(Shape shape, std::pair<Layout, Layout> layouts, LabelType label_type) {
    Problem<T> problem(shape, layouts.first, label_type);
    std::vector<Expected> expected;
    for (int64_t row = 0; row < shape.rows(); ++row) {
      const bool ignored = problem.labels.kind(row) == RowKind::kIgnored;
      expected.push_back(ignored ? Expected() : problem.expected(row));
    }
    for (const Reduction& reduction : kReductions) {
      std::vector<Options> all_options(std::begin(kPlainOptions), std::end(kPlainOptions));
      all_options.push_back(kMoreOptions[random_() % std::size(kMoreOptions)]);
      for (const Options& options : all_options) {
        SCOPED_TRACE(::testing::Message()
                     << shape.images << "x" << shape.pixels << " rows of " << shape.classes
                     << ", layouts " << int(layouts.first) << " and " << int(layouts.second)
                     << ", labels " << int(label_type) << ", reduction " << reduction.name
                     << (options.alpha_of_each_row ? ", an alpha for each row" : "")
                     << (options.class_weights ? ", class weights" : "") << ", label smoothing "
                     << options.label_smoothing
                     << (options.spreads_smoothing ? " by class weight" : ""));
        problem.options = options;
        check(problem, expected, layouts.second, reduction);
      }
    }
  }

  // NaN and infinities in every fourth row.
  void check_special_numbers(Shape shape, Layout layout, bool weightless) {
    const double specials[] = {std::numeric_limits<double>::infinity(),
                               std::numeric_limits<double>::quiet_NaN()};
    Problem<T> problem(shape, layout, LabelType::kInt64);
    for (int64_t row = 0; row < shape.rows(); row += 4) {
      problem.at(row, row % shape.classes) = static_cast<scalar_t>(specials[row / 4 % 2]);
    }
    const Buffer<acc_t> zeros(std::max(shape.rows(), shape.classes), 0);
    const auto inputs = [&](auto args) {
      args = problem.template inputs<decltype(args)>(*find_reduction("none"));
      if (weightless) {
        args.alpha.values = {zeros.data(), 1};
        args.class_weights.data = zeros.data();
      }
      return args;
    };
    Buffer<acc_t> loss(shape.rows());
    Buffer<acc_t> cross_entropy(shape.rows());
    Buffer<acc_t> max(shape.rows());
    Buffer<acc_t> sum_exp(shape.rows());
    Buffer<scalar_t> unit_gradient(problem.logits.size());
    Buffer<scalar_t> gradient(problem.logits.size());
    auto forward = inputs(ForwardArgs<scalar_t, acc_t>());
    forward.row_loss = loss.data();
    forward.row_cross_entropy = cross_entropy.data();
    forward.row_max = max.data();
    forward.row_sum_exp = sum_exp.data();
    forward.grad_layout = problem.layout;
    forward.grad_logits = unit_gradient.data();
    ASSERT_EQ(run(forward), -1);
    auto backward = inputs(BackwardArgs<scalar_t, acc_t>());
    backward.grad = {problem.upstream.data(), 1};
    backward.row_max = max.data();
    backward.row_sum_exp = sum_exp.data();
    backward.grad_layout = problem.layout;
    backward.grad_logits = gradient.data();
    ASSERT_EQ(run(backward), -1);
    for (int64_t row = 0; row < shape.rows(); ++row) {
      const RowKind kind = problem.labels.kind(row);
      const bool is_special = row % 4 == 0 && kind != RowKind::kIgnored;
      const bool is_lost = is_special && (kind == RowKind::kInlier || !weightless);
      EXPECT_EQ(is_nan(cross_entropy[row]), is_special) << row;
      EXPECT_EQ(is_nan(loss[row]), is_lost) << row;
      for (int64_t cls = 0; cls < shape.classes; ++cls) {
        const auto at = problem.layout.row_offset(row) + problem.layout.class_offset(cls);
        ASSERT_EQ(is_nan(unit_gradient[at]), is_lost) << row << ", " << cls;
        ASSERT_EQ(is_nan(gradient[at]), is_lost) << row << ", " << cls;
      }
    }
  }

 private:
  void check(Problem<T>& problem, const std::vector<Expected>& expected, Layout grad_layout,
             const Reduction& reduction) {
    const int64_t num_rows = problem.shape.rows();
    const bool reduces = reduction.is_scalar;
    const GroupCounts counts = problem.counts();
    const GroupDivisors divisors = reduction.divisors(counts);
    const RowLayout gradients = make_layout(grad_layout, problem.shape);

    // Derived from the definition, for each row: its part of the loss, its weight and its divisor.
    std::vector<double> weights;
    std::vector<double> cross_entropies;
    for (int64_t row = 0; row < num_rows; ++row) {
      const RowKind kind = problem.labels.kind(row);
      weights.push_back(problem.weight(row) /
                        (kind == RowKind::kOutlier ? divisors.outliers : divisors.inliers));
      cross_entropies.push_back(
          kind == RowKind::kIgnored ? 0 : problem.cross_entropy(row, expected[row]));
    }

    // Inference: the loss alone. Then with everything that the backward needs.
    for (const bool keeps : {false, true}) {
      auto args = problem.template inputs<ForwardArgs<scalar_t, acc_t>>(reduction);
      Buffer<acc_t> loss(reduces ? 1 : num_rows);
      Buffer<double> loss_counts(2, -1);
      Buffer<acc_t> max(num_rows);
      Buffer<acc_t> sum_exp(num_rows);
      Buffer<acc_t> cross_entropy(num_rows);
      Buffer<scalar_t> unit_gradient(extent(gradients), kUntouched);
      if (reduces) {
        args.output = {loss.data(), loss_counts.data()};
      } else {
        args.row_loss = loss.data();
      }
      if (keeps) {
        args.row_max = max.data();
        args.row_sum_exp = sum_exp.data();
        args.row_cross_entropy = problem.options.alpha_of_each_row ? cross_entropy.data() : nullptr;
        args.grad_logits = reduces ? unit_gradient.data() : nullptr;
        args.grad_layout = gradients;
      }
      ASSERT_EQ(run(args), -1);
      check_loss(loss, cross_entropies, weights, reduction);
      if (reduces) {
        if (reduction.divisors.counts()) {
          EXPECT_NEAR(loss_counts[0], counts.inliers, 1e-12 * counts.inliers);
        }
        EXPECT_EQ(loss_counts[1], counts.outliers);
      }
      if (!keeps || num_rows == 0) {
        continue;
      }
      check_cross_entropies(problem, cross_entropy, cross_entropies);
      if (reduces) {
        check_gradient(problem, expected, weights, unit_gradient, gradients, 1);
      }
      auto backward = problem.template inputs<BackwardArgs<scalar_t, acc_t>>(reduction);
      backward.row_max = max.data();
      backward.row_sum_exp = sum_exp.data();
      backward.counts = reduces ? loss_counts.data() : nullptr;
      check_backward(problem, expected, weights, backward, unit_gradient, gradients);
    }
  }

  // From the logits; and, if there is one, in place of the gradient for 1.
  void check_backward(Problem<T>& problem, const std::vector<Expected>& expected,
                      const std::vector<double>& weights, BackwardArgs<scalar_t, acc_t>& args,
                      Buffer<scalar_t>& unit_gradient, const RowLayout& gradients) {
    const Buffer<acc_t> one_upstream(1, acc_t(3));
    Buffer<scalar_t> gradient(extent(gradients), kUntouched);
    const bool reduces = args.counts != nullptr;
    args.grad =
        reduces ? PerRow<acc_t>{one_upstream.data(), 0} : PerRow<acc_t>{problem.upstream.data(), 1};
    args.grad_layout = gradients;
    args.grad_logits = gradient.data();
    ASSERT_EQ(run(args), -1);
    check_gradient(problem, expected, weights, gradient, gradients, reduces ? 3 : 0);
    if (reduces) {
      args.grad_logits = unit_gradient.data();
      args.has_unit_gradient = true;
      ASSERT_EQ(run(args), -1);
      EXPECT_TRUE(unit_gradient.has_bits_of(gradient));
    }
  }

  void check_loss(const Buffer<acc_t>& loss, const std::vector<double>& cross_entropies,
                  const std::vector<double>& weights, const Reduction& reduction) {
    double sum = 0;
    double tolerance = 0;
    for (size_t row = 0; row < weights.size(); ++row) {
      const double value = weights[row] * cross_entropies[row];
      const double allowed = 16 * weights[row] * unit_in_last_place(cross_entropies[row], kEpsilon);
      if (!reduction.is_scalar) {
        ASSERT_NEAR(loss[row], value, allowed);
      }
      sum += value;
      tolerance += allowed;
    }
    if (reduction.is_scalar && weights.empty() && reduction.divisors.empty_is_nan) {
      EXPECT_TRUE(is_nan(loss[0]));
    } else if (reduction.is_scalar) {
      EXPECT_NEAR(loss[0], sum, tolerance);
    }
  }

  // The losses for an alpha of 1.
  void check_cross_entropies(const Problem<T>& problem, const Buffer<acc_t>& actual,
                             const std::vector<double>& cross_entropies) {
    for (int64_t row = 0; row < actual.size(); ++row) {
      const RowKind kind = problem.labels.kind(row);
      const double weight = kind == RowKind::kOutlier ? 1 : problem.weight(row);
      const double cross_entropy = cross_entropies[row];
      if (problem.options.alpha_of_each_row) {
        ASSERT_NEAR(actual[row], weight * cross_entropy,
                    16 * weight * unit_in_last_place(cross_entropy, kEpsilon));
      } else {
        ASSERT_TRUE(is_nan(actual[row]));
      }
    }
  }

  // `upstream` is 0 if each row has its own.
  void check_gradient(Problem<T>& problem, const std::vector<Expected>& expected,
                      const std::vector<double>& weights, const Buffer<scalar_t>& actual,
                      const RowLayout& layout, double upstream) {
    const double stored_epsilon = std::numeric_limits<scalar_t>::epsilon();
    const auto least = static_cast<double>(std::numeric_limits<scalar_t>::denorm_min());
    for (int64_t row = 0; row < layout.num_rows(); ++row) {
      const bool ignored = problem.labels.kind(row) == RowKind::kIgnored;
      const double scale = upstream != 0 ? upstream : double(problem.upstream[row]);
      for (int64_t cls = 0; cls < layout.num_classes; ++cls) {
        const auto at = layout.row_offset(row) + layout.class_offset(cls);
        const double value =
            ignored ? 0 : scale * weights[row] * problem.expected_gradient(row, cls, expected[row]);
        const double tolerance = ignored ? 0
                                         : 16 * kEpsilon * scale * weights[row] +
                                               stored_epsilon * std::abs(value) + least;
        ASSERT_NEAR(static_cast<double>(actual[at]), value, tolerance) << row << ", " << cls;
      }
    }
    const std::vector<bool> is_element = elements_of(layout);
    for (int64_t i = 0; i < actual.size(); ++i) {
      if (!is_element[i]) {
        ASSERT_EQ(actual[i], kUntouched) << "written between the rows, at " << i;
      }
    }
  }

  std::mt19937 random_;
};

using Dtypes = ::testing::Types<double, float, c10::Half, c10::BFloat16>;
TYPED_TEST_SUITE(Kernels, Dtypes);

TYPED_TEST(Kernels, ShapesAndLayouts) {
  size_t number = 0;
  for (const Shape shape : kShapes) {
    for (const auto& layouts : kLayouts) {
      if (shape.rows() == 0 && layouts.first != Layout::kRows) {
        continue;
      }
      if (number++ % kEvery == 0) {
        this->check(shape, layouts, kLabelTypes[number % std::size(kLabelTypes)]);
      }
    }
  }
}

TYPED_TEST(Kernels, RowsAndPixelsThatFitNoTile) {
  if (kEvery > 1) {
    GTEST_SKIP() << "minutes; tests/support/simt_cases.py has such rows";
  }
  for (const Shape shape : kLargeShapes) {
    this->check(shape, {Layout::kRows, Layout::kRows}, LabelType::kInt64);
    this->check(shape, {Layout::kPixels, Layout::kPixels}, LabelType::kInt32);
  }
}

// Only rows with an infinity or a NaN become NaN. Inliers do whatever the weight of their class,
// outliers only if alpha is not 0; but their cross-entropy, the derivative along alpha, always.
TYPED_TEST(Kernels, SpecialNumbersStayInTheirRow) {
  for (const Shape shape : {Shape{1, 37, 19}, Shape{1, 9, 131}}) {
    for (const Layout layout : {Layout::kRows, Layout::kPixels}) {
      for (const bool weightless : {false, true}) {
        this->check_special_numbers(shape, layout, weightless);
      }
    }
  }
}

// Errors that the sanitizers must find (CMakeLists.txt): one logit less than the layout says, and
// strides whose product overflows.
template <typename Change>
void run_wrongly(const Change& change) {
  const Problem<float> problem({1, 600, 5}, Layout::kRows, LabelType::kInt64);
  auto args = problem.inputs<ForwardArgs<float, float>>(*find_reduction("sum"));
  Buffer<float> loss(1);
  Buffer<double> counts(2, -1);
  args.output = {loss.data(), counts.data()};
  change(args);
  run(args);
}

TEST(Planted, DISABLED_Overread) {
  const Buffer<float> shorter(600 * 5 - 1, 0.0F);
  run_wrongly([&](auto& args) { args.logits = shorter.data(); });
}

TEST(Planted, DISABLED_Overflow) {
  // 2^64 bytes: one step leads back to the first row, two overflow.
  run_wrongly([](auto& args) { args.layout.inner_stride = int64_t(1) << 62; });
}

}  // namespace
}  // namespace oe_ext::testing
