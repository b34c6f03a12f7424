// The schemas of the operators, and the C++ function that calls them.
#include "outlier_exposure.h"

#include <torch/library.h>

#include <vector>

#include "../include/oe_ext/oe_ext.h"

namespace oe_ext {

TORCH_LIBRARY_FRAGMENT(oe_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};

  // The overload with a tensor stands first: where an overload is chosen by its arguments, a
  // 0-dim alpha would otherwise turn into a number and lose its gradient.
  m.def(
      "outlier_exposure_loss.tensor_alpha(Tensor logits, Tensor target, Tensor alpha, "
      "str reduction=\"mean\", *, SymInt? ignore_index=None, SymInt? ood_index=None) -> Tensor",
      tags);
  m.def(
      "outlier_exposure_loss(Tensor logits, Tensor target, float alpha=0.5, "
      "str reduction=\"mean\", *, SymInt? ignore_index=None, SymInt? ood_index=None) -> Tensor",
      tags);

  // The loss with what its backward needs. Where alpha_tensor is given, it stands for alpha.
  //   row_cross_entropy  shape of target: the loss before its weight, for the gradient of
  //                      alpha_tensor; empty without one
  //   row_max, row_sum_exp  shape of target: the maximum, and the sum of exp(logit - maximum)
  //   counts             int64 [2]: positions of inliers and of outliers; empty for "none"
  //   unit_gradient      shape of logits: the gradient for an upstream gradient of 1, where it was
  //                      asked for (not for "none"); else empty
  m.def(
      "_outlier_exposure_loss_forward(Tensor logits, Tensor target, float alpha, "
      "Tensor? alpha_tensor, str reduction, SymInt? ignore_index, SymInt? ood_index, "
      "bool unit_gradient) -> (Tensor loss, Tensor row_cross_entropy, Tensor row_max, "
      "Tensor row_sum_exp, Tensor counts, Tensor unit_gradient)",
      tags);

  // The gradient with respect to the logits.
  m.def(
      "_outlier_exposure_loss_backward(Tensor grad, Tensor logits, Tensor target, Tensor row_max, "
      "Tensor row_sum_exp, Tensor counts, float alpha, Tensor? alpha_tensor, str reduction, "
      "SymInt? ignore_index, SymInt? ood_index) -> Tensor",
      tags);

  // The same, in place: from the gradient for an upstream gradient of 1. Nothing is read but grad
  // where that is what grad is, which no host needs to wait for.
  m.def(
      "_outlier_exposure_loss_backward_from_unit(Tensor(a!) unit_gradient, Tensor grad, "
      "Tensor logits, Tensor target, Tensor row_max, Tensor row_sum_exp, Tensor counts, "
      "float alpha, Tensor? alpha_tensor, str reduction, SymInt? ignore_index, SymInt? ood_index) "
      "-> ()",
      tags);
}

at::Tensor outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target, double alpha,
                                 std::string_view reduction, std::optional<int64_t> ignore_index,
                                 std::optional<int64_t> ood_index) {
  return loss_operator().call(logits, target, alpha, reduction, ignore_index, ood_index);
}

at::Tensor outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target,
                                 const at::Tensor& alpha, std::string_view reduction,
                                 std::optional<int64_t> ignore_index,
                                 std::optional<int64_t> ood_index) {
  return loss_tensor_alpha_operator().call(logits, target, alpha, reduction, ignore_index,
                                           ood_index);
}

}  // namespace oe_ext
