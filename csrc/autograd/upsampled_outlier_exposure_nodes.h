// The node of the autograd graph for the loss of upsampled logits.
#pragma once

#include "../ops/upsampled_outlier_exposure.h"
#include "outlier_exposure_nodes.h"

namespace oe_ext {

// Its unit_gradient_ is in the dtype of the loss.
struct UpsampledOutlierExposureLossBackward0 : FirstLossNode {
  std::string name() const override { return "UpsampledOutlierExposureLossBackward0"; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void save(const UpsampledInputs& inputs, const UpsampledResult& result);
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;

 private:
  at::Tensor logits_gradient(const at::Tensor& grad, const UpsampledInputs& inputs,
                             const at::Tensor& counts);

  bool align_corners_ = false;
};

}  // namespace oe_ext
