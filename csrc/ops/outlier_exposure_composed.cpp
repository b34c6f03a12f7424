#include "outlier_exposure_composed.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/ones_like.h>

#include "../autograd/outlier_exposure_derivatives.h"

namespace oe_ext {

ForwardResult with_weighted_smoothing(const LossInputs& inputs, ForwardResult of_weights,
                                      bool writes_gradient) {
  auto& [loss, row_cross_entropy, row_max, row_sum_exp, counts, unit_gradient] = of_weights;
  const RowDerivatives rows(inputs, counts);
  loss = rows.reduce(rows.loss().to(at::kDouble)).to(loss.scalar_type());
  row_cross_entropy = inputs.alpha_tensor.has_value()
                          ? rows.inlier_cross_entropy_or(row_cross_entropy)
                          : at::empty({0}, loss.options());
  if (writes_gradient) {
    unit_gradient = at::empty_like(inputs.logits);
    unit_gradient.copy_(composed_gradient(at::ones_like(loss), inputs, counts));
  }
  return of_weights;
}

at::Tensor composed_gradient(const at::Tensor& grad, const LossInputs& inputs,
                             const at::Tensor& counts) {
  const RowDerivatives rows(inputs, counts);
  return rows.times_residual(rows.scale.mul(rows.of_rows(grad)));
}

}  // namespace oe_ext
