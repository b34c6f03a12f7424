// Promises of the CPU kernels alone: the same bits for any number of threads, and the first illegal
// label. Under ThreadSanitizer also: no two threads touch the same memory.
#include <gtest/gtest.h>

#include <new>
#include <thread>

#include "cpu_kernels.h"
#include "kernel_problem.h"
#include "kernels.h"

namespace oe_ext::testing {
namespace {

// With class weights: the bits of their sum depend on its order, too.
Problem<float> make_problem(Shape shape, Layout layout, LabelType labels = LabelType::kInt64) {
  Problem<float> problem(shape, layout, labels);
  problem.options = {.class_weights = true, .label_smoothing = 0.1};
  return problem;
}

// The outputs of one forward and backward.
struct Outputs {
  explicit Outputs(const Problem<float>& problem)
      : loss(1),
        counts(2, -1),
        max(problem.shape.rows()),
        sum_exp(problem.shape.rows()),
        unit_gradient(problem.logits.size()),
        gradient(problem.logits.size()) {}

  void compute(const Problem<float>& problem) {
    auto forward = problem.inputs<ForwardArgs<float, float>>(*find_reduction("group_mean"));
    forward.output = {loss.data(), counts.data()};
    forward.row_max = max.data();
    forward.row_sum_exp = sum_exp.data();
    forward.grad_layout = problem.layout;
    forward.grad_logits = unit_gradient.data();
    ASSERT_EQ(run(forward), -1);
    const float upstream = 3;
    auto backward = problem.inputs<BackwardArgs<float, float>>(*find_reduction("group_mean"));
    backward.grad = {&upstream, 0};
    backward.row_max = max.data();
    backward.row_sum_exp = sum_exp.data();
    backward.counts = counts.data();
    backward.grad_layout = problem.layout;
    backward.grad_logits = gradient.data();
    ASSERT_EQ(run(backward), -1);
  }

  bool has_bits_of(const Outputs& other) const {
    return loss.has_bits_of(other.loss) && counts.has_bits_of(other.counts) &&
           max.has_bits_of(other.max) && sum_exp.has_bits_of(other.sum_exp) &&
           unit_gradient.has_bits_of(other.unit_gradient) && gradient.has_bits_of(other.gradient);
  }

  Buffer<float> loss;
  Buffer<double> counts;
  Buffer<float> max;
  Buffer<float> sum_exp;
  Buffer<float> unit_gradient;
  Buffer<float> gradient;
};

Outputs outputs_of(const Problem<float>& problem, int64_t threads) {
  num_threads = threads;
  Outputs outputs(problem);
  outputs.compute(problem);
  return outputs;
}

// Several tasks each: more logits than one thread handles alone and, in the last case, also more
// labels, which separate threads count.
const std::pair<Shape, Layout> kProblems[] = {
    {{1, 3001, 65}, Layout::kRows},   {{3, 3001, 19}, Layout::kPixels},
    {{3, 3001, 19}, Layout::kImages}, {{1, 7, 40009}, Layout::kRows},
    {{1, 600001, 3}, Layout::kRows},
};

TEST(Threads, AnyNumberGivesTheSameBits) {
  for (const auto& [shape, layout] : kProblems) {
    const Problem<float> problem = make_problem(shape, layout);
    const Outputs expected = outputs_of(problem, 1);
    for (const int64_t threads : {2, 3, 8}) {
      EXPECT_TRUE(outputs_of(problem, threads).has_bits_of(expected)) << threads << " threads";
    }
  }
}

// More than 32 MiB, so the pages of the gradient are populated first.
TEST(Threads, LargeGradient) {
  const Problem<float> problem = make_problem({1, 9001, 1031}, Layout::kRows, LabelType::kInt16);
  EXPECT_TRUE(outputs_of(problem, 4).has_bits_of(outputs_of(problem, 1)));
}

TEST(Threads, TwoCallersAtOnce) {
  const Problem<float> problem = make_problem({3, 3001, 19}, Layout::kPixels);
  const Outputs expected = outputs_of(problem, 2);
  Outputs first(problem);
  Outputs second(problem);
  std::thread other([&] { second.compute(problem); });
  first.compute(problem);
  other.join();
  EXPECT_TRUE(first.has_bits_of(expected));
  EXPECT_TRUE(second.has_bits_of(expected));
}

TEST(Threads, AnExceptionReachesTheCallerAsItIs) {
  const Problem<float> problem = make_problem({1, 3001, 65}, Layout::kRows);
  for (const int64_t threads : {1, 3}) {
    no_memory = true;
    EXPECT_THROW(outputs_of(problem, threads), std::bad_alloc) << threads << " threads";
    no_memory = false;
  }
}

TEST(Labels, TheFirstIllegalOneIsReported) {
  num_threads = 3;
  for (const bool counts_first : {false, true}) {
    Problem<float> problem = make_problem({1, 3001, 65}, Layout::kRows);
    auto* const labels = static_cast<int64_t*>(const_cast<void*>(problem.labels.labels.data));
    labels[1234] = 65;
    labels[1235] = std::numeric_limits<int64_t>::max();
    labels[2999] = 65;
    auto args = problem.inputs<ForwardArgs<float, float>>(*find_reduction("mean"));
    Buffer<float> loss(1);
    Buffer<double> counts(2, -1);
    Buffer<float> gradient(problem.logits.size());
    args.output = {loss.data(), counts.data()};
    args.grad_layout = problem.layout;
    args.grad_logits = counts_first ? gradient.data() : nullptr;
    EXPECT_EQ(run(args), 1234);
  }
}

// ThreadSanitizer must find this race (CMakeLists.txt).
TEST(Threads, DISABLED_PlantedRace) {
  threads_overlap = true;
  outputs_of(make_problem({1, 3001, 65}, Layout::kRows), 2);
}

}  // namespace
}  // namespace oe_ext::testing
