// The operators of the loss of upsampled logits, as outlier_exposure.h has those of the loss:
// arguments as structs, how registered kernels receive these, and functions that call the
// operators. The schemas are in upsampled_outlier_exposure.cpp.
#pragma once

#include "outlier_exposure.h"

namespace oe_ext {

// Logits [N, C, h, w] and a target [N, H, W].
struct UpsampledInputs {
  LossInputs loss;
  bool align_corners = false;

  bool has_equal_sizes() const {
    const auto& [logits, target, alpha, weight, options] = loss;
    return logits.dim() == 4 && target.dim() == 3 &&
           TORCH_GUARD_OR_FALSE(logits.sym_size(2).sym_eq(target.sym_size(1))) &&
           TORCH_GUARD_OR_FALSE(logits.sym_size(3).sym_eq(target.sym_size(2)));
  }
};

// What a forward is asked for beside the loss.
struct UpsampledOutputs {
  bool statistics = false;  // of each pixel: row_cross_entropy, row_max, row_sum_exp, row_argmax
  // The gradient for an upstream gradient of 1. None: if a backward will want it.
  std::optional<bool> unit_gradient = std::nullopt;
};

struct UpsampledResult {
  at::Tensor loss;
  at::Tensor row_cross_entropy;
  at::Tensor row_max;
  at::Tensor row_sum_exp;
  at::Tensor row_argmax;
  at::Tensor counts;
  at::Tensor unit_gradient;

  using Tuple = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                           at::Tensor>;
  Tuple tuple() const {
    return {loss, row_cross_entropy, row_max, row_sum_exp, row_argmax, counts, unit_gradient};
  }
  static UpsampledResult of(Tuple tuple) {
    auto& [loss, row_cross_entropy, row_max, row_sum_exp, row_argmax, counts, unit_gradient] =
        tuple;
    return {loss, row_cross_entropy, row_max, row_sum_exp, row_argmax, counts, unit_gradient};
  }
};

// Registers those of Kernels::loss, forward and backward that there are.
template <typename Kernels>
struct UpsampledKernels {
  static at::Tensor loss(const at::Tensor& logits, const at::Tensor& target, double alpha,
                         std::string_view reduction, OptionalSymInt ignore_index,
                         OptionalSymInt ood_index, bool align_corners, const OptionalTensor& weight,
                         double label_smoothing) {
    return Kernels::loss({{logits, target, std::nullopt, weight,
                           LossOptions::of(alpha, reduction, std::move(ignore_index),
                                           std::move(ood_index), label_smoothing)},
                          align_corners});
  }

  static at::Tensor loss_tensor_alpha(const at::Tensor& logits, const at::Tensor& target,
                                      const at::Tensor& alpha, std::string_view reduction,
                                      OptionalSymInt ignore_index, OptionalSymInt ood_index,
                                      bool align_corners, const OptionalTensor& weight,
                                      double label_smoothing) {
    return Kernels::loss({{logits, target, alpha, weight,
                           LossOptions::of(0.0, reduction, std::move(ignore_index),
                                           std::move(ood_index), label_smoothing)},
                          align_corners});
  }

  static UpsampledResult::Tuple forward(const at::Tensor& logits, const at::Tensor& target,
                                        double alpha, const OptionalTensor& alpha_tensor,
                                        std::string_view reduction, OptionalSymInt ignore_index,
                                        OptionalSymInt ood_index, bool align_corners,
                                        bool statistics, std::optional<bool> unit_gradient,
                                        const OptionalTensor& counts, const OptionalTensor& weight,
                                        double label_smoothing) {
    return Kernels::forward({{logits, target, alpha_tensor, weight,
                              LossOptions::of(alpha, reduction, std::move(ignore_index),
                                              std::move(ood_index), label_smoothing)},
                             align_corners},
                            counts, {statistics, unit_gradient})
        .tuple();
  }

  static at::Tensor backward(const at::Tensor& grad, const at::Tensor& logits,
                             const at::Tensor& target, const at::Tensor& counts, double alpha,
                             const OptionalTensor& alpha_tensor, std::string_view reduction,
                             OptionalSymInt ignore_index, OptionalSymInt ood_index,
                             bool align_corners, const OptionalTensor& weight,
                             double label_smoothing) {
    return Kernels::backward(grad,
                             {{logits, target, alpha_tensor, weight,
                               LossOptions::of(alpha, reduction, std::move(ignore_index),
                                               std::move(ood_index), label_smoothing)},
                              align_corners},
                             counts);
  }

  static void register_for(torch::Library& m) {
    m.impl("upsampled_outlier_exposure_loss", TORCH_FN(loss));
    m.impl("upsampled_outlier_exposure_loss.tensor_alpha", TORCH_FN(loss_tensor_alpha));
    if constexpr (requires { &Kernels::forward; }) {
      m.impl("_upsampled_outlier_exposure_loss_forward", TORCH_FN(forward));
    }
    if constexpr (requires { &Kernels::backward; }) {
      m.impl("_upsampled_outlier_exposure_loss_backward", TORCH_FN(backward));
    }
  }
};

// Call the operators through the dispatcher.
at::Tensor call_upsampled_loss(const UpsampledInputs& inputs);
UpsampledResult call_upsampled_forward(const UpsampledInputs& inputs, const OptionalTensor& counts,
                                       const UpsampledOutputs& outputs);
at::Tensor call_upsampled_backward(const at::Tensor& grad, const UpsampledInputs& inputs,
                                   const at::Tensor& counts);

}  // namespace oe_ext
