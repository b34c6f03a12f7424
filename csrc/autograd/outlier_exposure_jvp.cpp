#include "outlier_exposure_jvp.h"

#include <ATen/TensorOperators.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace oe_ext {
namespace {

at::Tensor primal_of(const at::Tensor& tensor) { return tensor._fw_primal(/*level=*/0); }

OptionalTensor primal_of(const OptionalTensor& tensor) {
  return tensor.has_value() ? OptionalTensor(primal_of(*tensor)) : std::nullopt;
}

// The inputs without their tangents; a weight has none.
struct Primals {
  explicit Primals(const LossInputs& from)
      : logits(primal_of(from.logits)),
        alpha(primal_of(from.alpha_tensor)),
        target(from.target),
        weight(from.weight),
        options(from.options) {}

  LossInputs inputs() const { return {logits, target, alpha, weight, options}; }

  at::Tensor logits;
  OptionalTensor alpha;
  const at::Tensor& target;
  const OptionalTensor& weight;
  const LossOptions& options;
};

at::Tensor add_defined(const at::Tensor& a, const at::Tensor& b) { return a.defined() ? a + b : b; }

}  // namespace

at::Tensor tangent_of(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined() ? tensor->_fw_grad(/*level=*/0) : at::Tensor();
}

void check_no_gradient(const OptionalTensor& tensor, const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      !torch::autograd::compute_requires_grad(tensor) && !any_tangent(tensor),
      "outlier_exposure_loss: the loss has no derivative with respect to ", name,
      ", which must not require a gradient; ", name, ".detach() does not");
}

at::Tensor loss_jvp(const LossInputs& inputs, const at::Tensor& counts) {
  const at::Tensor logits_tangent = tangent_of(inputs.logits);
  const at::Tensor alpha_tangent = tangent_of(inputs.alpha_tensor);
  const Primals primals(inputs);
  const RowDerivatives rows(primals.inputs(), counts);
  at::Tensor per_row;
  if (logits_tangent.defined()) {
    per_row = rows.scale * rows.cross_entropy_along(logits_tangent);
  }
  if (alpha_tangent.defined()) {
    const at::Tensor of_alpha = rows.of_outliers(alpha_tangent.to(rows.scale.scalar_type()));
    per_row = add_defined(per_row,
                          rows.alpha_scale * of_alpha * rows.outlier_cross_entropy(primals.logits));
  }
  return rows.reduce(per_row);
}

at::Tensor backward_jvp(const at::Tensor& grad, const LossInputs& inputs,
                        const at::Tensor& counts) {
  const at::Tensor grad_tangent = tangent_of(grad);
  const at::Tensor logits_tangent = tangent_of(inputs.logits);
  const at::Tensor alpha_tangent = tangent_of(inputs.alpha_tensor);
  const at::Tensor upstream = primal_of(grad);
  const Primals primals(inputs);
  const RowDerivatives rows(primals.inputs(), counts);
  at::Tensor tangent;
  if (logits_tangent.defined()) {
    tangent = rows.times_softmax_along(rows.scale * rows.of_rows(upstream), logits_tangent);
  }
  if (grad_tangent.defined()) {
    tangent = add_defined(tangent, rows.times_residual(rows.scale * rows.of_rows(grad_tangent)));
  }
  if (alpha_tangent.defined()) {
    const at::Tensor of_alpha = rows.of_outliers(alpha_tangent.to(rows.scale.scalar_type()));
    tangent = add_defined(
        tangent, rows.times_outlier_residual(rows.alpha_scale * rows.of_rows(upstream) * of_alpha));
  }
  return tangent.to(inputs.logits.scalar_type());
}

}  // namespace oe_ext
