// The public C++ interface, with autograd, against libtorch's own cross-entropy.
#include <gtest/gtest.h>
#include <oe_ext/oe_ext.h>
#include <torch/torch.h>

namespace {

namespace F = torch::nn::functional;

torch::Tensor expected_loss(const torch::Tensor& logits, const torch::Tensor& target,
                            double alpha) {
  const auto outlier = target < 0;
  const auto options = F::CrossEntropyFuncOptions().reduction(torch::kNone);
  const auto inlier_loss = F::cross_entropy(logits, target.masked_fill(outlier, 0), options);
  const auto outlier_loss = F::cross_entropy(
      logits, torch::zeros_like(target), F::CrossEntropyFuncOptions(options).label_smoothing(1));
  return torch::where(outlier, alpha * outlier_loss, inlier_loss).mean();
}

TEST(OutlierExposureLoss, ValueAndGradient) {
  torch::manual_seed(0);
  for (const auto& shape : {std::vector<int64_t>{17, 10}, {3, 5, 4, 6}}) {
    auto logits = torch::randn(shape, torch::dtype(torch::kDouble).requires_grad(true));
    auto label_shape = shape;
    label_shape.erase(label_shape.begin() + 1);
    const auto target = torch::randint(-2, shape[1], label_shape, torch::kLong);
    const auto ours = oe_ext::outlier_exposure_loss(logits, target, 0.3);
    const auto theirs = expected_loss(logits, target, 0.3);
    EXPECT_NEAR(ours.item<double>(), theirs.item<double>(), 1e-12);
    const auto our_grad = torch::autograd::grad({ours}, {logits})[0];
    const auto their_grad = torch::autograd::grad({theirs}, {logits})[0];
    EXPECT_LT((our_grad - their_grad).abs().max().item<double>(), 1e-14);
  }
}

TEST(OutlierExposureLoss, TensorAlphaHasAGradient) {
  const auto logits = torch::randn({4, 3}, torch::kDouble);
  const auto target = torch::tensor({int64_t(0), int64_t(-1), int64_t(2), int64_t(-1)});
  const auto alpha = torch::tensor(0.7, torch::dtype(torch::kDouble).requires_grad(true));
  oe_ext::outlier_exposure_loss(logits, target, alpha, "sum").backward();
  const auto outliers =
      oe_ext::outlier_exposure_loss(logits, target, 1.0, "none").index({target < 0});
  EXPECT_NEAR(alpha.grad().item<double>(), outliers.sum().item<double>(), 1e-12);
}

TEST(OutlierExposureLoss, Errors) {
  const auto logits = torch::randn({4, 3});
  const auto target = torch::zeros({4}, torch::kLong);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target.slice(0, 0, 3)), c10::ValueError);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target, 0.5, "average"), c10::ValueError);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target.to(torch::kFloat)), c10::TypeError);
  EXPECT_THROW(oe_ext::outlier_exposure_loss(logits, target + 3), c10::IndexError);
}

}  // namespace
