// The public C++ interface, with autograd, against libtorch's own cross-entropy.
#include <gtest/gtest.h>
#include <oe_ext/oe_ext.h>
#include <torch/torch.h>

namespace {

namespace F = torch::nn::functional;

struct Options {
  double alpha = 0.3;
  torch::Tensor weight = {};  // or none
  double label_smoothing = 0;
};

// The mean.
torch::Tensor expected_loss(const torch::Tensor& logits, const torch::Tensor& target,
                            const Options& options) {
  const auto outlier = target < 0;
  const auto label = target.masked_fill(outlier, 0);
  const auto none = F::CrossEntropyFuncOptions().reduction(torch::kNone);
  const auto inlier_loss = F::cross_entropy(logits, label,
                                            F::CrossEntropyFuncOptions(none)
                                                .weight(options.weight)
                                                .label_smoothing(options.label_smoothing));
  const auto outlier_loss = F::cross_entropy(logits, torch::zeros_like(target),
                                             F::CrossEntropyFuncOptions(none).label_smoothing(1));
  const auto counts = options.weight.defined()
                          ? options.weight.index({label}).masked_fill(outlier, 1)
                          : torch::ones_like(target);
  return torch::where(outlier, options.alpha * outlier_loss, inlier_loss).sum() / counts.sum();
}

torch::Tensor our_loss(const torch::Tensor& logits, const torch::Tensor& target,
                       const Options& options) {
  const auto weight =
      options.weight.defined() ? std::optional<at::Tensor>(options.weight) : std::nullopt;
  return oe_ext::outlier_exposure_loss(logits, target, options.alpha, "mean", std::nullopt,
                                       std::nullopt, weight, options.label_smoothing);
}

void expect_equal(const torch::Tensor& actual, const torch::Tensor& expected, double tolerance) {
  EXPECT_LT((actual - expected).abs().max().item<double>(), tolerance);
}

TEST(OutlierExposureLoss, ValueAndGradient) {
  torch::manual_seed(0);
  for (const auto& shape : {std::vector<int64_t>{17, 10}, {3, 5, 4, 6}}) {
    auto logits = torch::randn(shape, torch::dtype(torch::kDouble).requires_grad(true));
    auto label_shape = shape;
    label_shape.erase(label_shape.begin() + 1);
    const auto target = torch::randint(-2, shape[1], label_shape, torch::kLong);
    auto weight = torch::rand({shape[1]}, torch::kDouble) * 3;
    weight[0] = 0;
    for (const Options& options : {Options(),
                                   {.weight = weight},
                                   {.label_smoothing = 0.1},
                                   {.label_smoothing = 1},
                                   {.weight = weight, .label_smoothing = 0.1}}) {
      SCOPED_TRACE(testing::Message()
                   << logits.dim() << " dimensions, " << (options.weight.defined() ? "" : "no ")
                   << "weights, label smoothing " << options.label_smoothing);
      const auto ours = our_loss(logits, target, options);
      const auto theirs = expected_loss(logits, target, options);
      expect_equal(ours, theirs, 1e-12);
      const auto our_grad = torch::autograd::grad({ours}, {logits})[0];
      const auto their_grad = torch::autograd::grad({theirs}, {logits})[0];
      expect_equal(our_grad, their_grad, 1e-14);
    }
  }
}

TEST(OutlierExposureLoss, TensorAlphaHasAGradient) {
  const auto logits = torch::randn({4, 3}, torch::kDouble);
  const auto target = torch::tensor({int64_t(0), int64_t(-1), int64_t(2), int64_t(-1)});
  const auto alpha = torch::tensor(0.7, torch::dtype(torch::kDouble).requires_grad(true));
  const auto outliers =
      oe_ext::outlier_exposure_loss(logits, target, 1.0, "none").index({target < 0}).sum();
  const std::optional<at::Tensor> weights[] = {std::nullopt,
                                               torch::tensor({2.0, 0.0, 0.5}, torch::kDouble)};
  for (const auto& weight : weights) {
    const auto loss = oe_ext::outlier_exposure_loss(logits, target, alpha, "sum", std::nullopt,
                                                    std::nullopt, weight, 0.1);
    expect_equal(torch::autograd::grad({loss}, {alpha})[0], outliers, 1e-12);
  }
}

TEST(OutlierExposureLoss, UpsampledLogits) {
  auto logits = torch::randn({2, 5, 3, 4}, torch::dtype(torch::kDouble).requires_grad(true));
  const auto target = torch::randint(-2, 5, {2, 9, 16}, torch::kLong);
  const auto alpha = torch::tensor(0.3, torch::kDouble);
  for (const bool align_corners : {false, true}) {
    const auto full = F::interpolate(logits, F::InterpolateFuncOptions()
                                                 .size(std::vector<int64_t>{9, 16})
                                                 .mode(torch::kBilinear)
                                                 .align_corners(align_corners));
    const auto theirs = expected_loss(full, target, {});
    const auto their_grad = torch::autograd::grad({theirs}, {logits})[0];
    for (const auto& ours :
         {oe_ext::upsampled_outlier_exposure_loss(logits, target, 0.3, "mean", std::nullopt,
                                                  std::nullopt, align_corners),
          oe_ext::upsampled_outlier_exposure_loss(logits, target, alpha, "mean", std::nullopt,
                                                  std::nullopt, align_corners)}) {
      expect_equal(ours, theirs, 1e-12);
      expect_equal(torch::autograd::grad({ours}, {logits})[0], their_grad, 1e-14);
    }
  }
  EXPECT_THROW(oe_ext::upsampled_outlier_exposure_loss(logits[0], target), c10::ValueError);
}

TEST(OutlierExposureLoss, Errors) {
  const auto logits = torch::randn({4, 3});
  const auto target = torch::zeros({4}, torch::kLong);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target.slice(0, 0, 3)), c10::ValueError);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target, 0.5, "average"), c10::ValueError);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target.to(torch::kFloat)), c10::TypeError);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target + 3), c10::IndexError);
  const auto loss_with = [&](const at::Tensor& weight, double label_smoothing) {
    return our_loss(logits, target, {.weight = weight, .label_smoothing = label_smoothing});
  };
  EXPECT_NO_THROW(loss_with(torch::ones({3}), 1));
  EXPECT_THROW(loss_with(torch::ones({4}), 0), c10::ValueError);
  EXPECT_THROW(loss_with(torch::ones({3}, torch::kLong), 0), c10::TypeError);
  EXPECT_THROW(loss_with(-torch::ones({3}), 0), c10::ValueError);
  EXPECT_THROW(loss_with(torch::ones({3}), 1.5), c10::ValueError);
}

}  // namespace
