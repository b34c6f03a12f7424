// The node of the autograd graph for the loss of upsampled logits.
#pragma once

#include "../ops/upsampled_outlier_exposure.h"
#include "outlier_exposure_nodes.h"

namespace oe_ext {

// Next edges: logits, alpha.
struct UpsampledOutlierExposureLossBackward0 : LossNode {
  std::string name() const override { return "UpsampledOutlierExposureLossBackward0"; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void save(const UpsampledInputs& inputs, const UpsampledResult& result);
  void release_variables() override;
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;

 private:
  enum OwnSlot { kRowCrossEntropy = kFirstOwn };

  at::Tensor logits_gradient(const at::Tensor& grad, const UpsampledInputs& inputs,
                             const at::Tensor& counts);

  bool align_corners_ = false;
  // As in OutlierExposureLossBackward0, but in the dtype of the loss.
  at::Tensor unit_gradient_;
};

}  // namespace oe_ext
