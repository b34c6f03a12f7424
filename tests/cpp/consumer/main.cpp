// The smallest program of a libtorch user.
#include <oe_ext/oe_ext.h>
#include <torch/torch.h>

#include <cmath>
#include <iostream>

int main() {
  const auto logits = torch::zeros({2, 4}, torch::requires_grad());
  const auto target = torch::tensor({int64_t(1), int64_t(-1)});
  const auto loss = oe_ext::outlier_exposure_loss(logits, target, /*alpha=*/0.5);
  loss.backward();
  const double expected = (1.0 + 0.5) * std::log(4.0) / 2;
  std::cout << "loss " << loss.item<double>() << ", expected " << expected << '\n';
  const double of_label = logits.grad()[0][1].item<double>();
  return std::abs(loss.item<double>() - expected) < 1e-6 && std::abs(of_label + 0.375) < 1e-6 ? 0
                                                                                              : 1;
}
