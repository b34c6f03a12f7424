// The nodes of the autograd graph: the tensors they save, and the gradients they compute.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <array>
#include <string>

#include "outlier_exposure_derivatives.h"

namespace oe_ext {

// Saves the inputs of the loss; the base of both nodes.
struct LossNode : torch::autograd::Node {
  void save_inputs(const LossInputs& inputs, const at::Tensor& counts);

  void release_variables() override;

  // For compiled autograd, in outlier_exposure_compiled.cpp.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  torch::autograd::variable_list apply_with_saved(
      const torch::autograd::variable_list& inputs,
      torch::dynamo::autograd::SwapSavedVariables& saved) override;

 protected:
  // All saved tensors are in one array, so that loops over it miss none.
  enum Slot { kLogits, kTarget, kCounts, kAlpha, kWeight, kFirstOwn, kNumSlots = kFirstOwn + 3 };
  std::array<torch::autograd::SavedVariable, kNumSlots> saved_;
  LossOptions options_;

  // What save_inputs() saved. Keeps the tensors alive.
  struct Unpacked {
    explicit Unpacked(const LossNode& node);
    LossInputs inputs() const { return {logits, target, alpha, weight, options}; }

    at::Tensor logits;
    at::Tensor target;
    at::Tensor counts;
    OptionalTensor alpha;
    OptionalTensor weight;
    const LossOptions& options;
  };
};

// The base of the backwards of both losses. Next edges: logits, alpha.
struct FirstLossNode : LossNode {
  void release_variables() override;

 protected:
  enum FirstSlot { kRowCrossEntropy = kFirstOwn, kNextOwn };

  void save_unit_gradient(const at::Tensor& unit_gradient, const LossInputs& inputs);

  // Only if this is the last backward, nobody records it, and nobody else holds the tensor.
  bool may_finish_in_place(const at::Tensor& grad) const;

  // `logits`: of the rows, for a gradient that has derivatives of its own; else undefined.
  at::Tensor alpha_gradient(const at::Tensor& grad, const Unpacked& saved,
                            const at::Tensor& logits) const;

  // The gradient for an upstream gradient of 1 that the forward wrote, or undefined. Not a saved
  // variable: nobody else holds it, so the last backward may finish it in place and return it.
  at::Tensor unit_gradient_;
};

// The backward of the loss.
struct OutlierExposureLossBackward0 : FirstLossNode {
  std::string name() const override { return "OutlierExposureLossBackward0"; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void save_result(const ForwardResult& result, const LossInputs& inputs);

 private:
  enum OwnSlot { kRowMax = kNextOwn, kRowSumExp };

  at::Tensor logits_gradient(const at::Tensor& grad, const LossInputs& inputs,
                             const at::Tensor& counts);
};

// The backward of the backward operator. Next edges: grad, logits, alpha.
struct OutlierExposureLossBackwardBackward0 : LossNode {
  std::string name() const override { return "OutlierExposureLossBackwardBackward0"; }
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) override;
  void save_grad(const at::Tensor& grad);

 private:
  enum OwnSlot { kGrad = kFirstOwn };
};

}  // namespace oe_ext
