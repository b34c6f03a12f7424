// Typed handles of the operators in outlier_exposure.cpp, to call them through the dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>

#include <optional>
#include <string_view>
#include <tuple>

namespace oe_ext {

// Symbolic down to the kernels: a mark may be a size, or a number that torch.compile does not know.
// The kernels of a backend are registered with OptionalInt, for which the dispatcher asks its
// value.
using OptionalInt = std::optional<int64_t>;
using OptionalSymInt = std::optional<c10::SymInt>;
using OptionalTensor = std::optional<at::Tensor>;

using LossSignature = at::Tensor(const at::Tensor& logits, const at::Tensor& target, double alpha,
                                 std::string_view reduction, OptionalSymInt ignore_index,
                                 OptionalSymInt ood_index);

using LossTensorAlphaSignature = at::Tensor(const at::Tensor& logits, const at::Tensor& target,
                                            const at::Tensor& alpha, std::string_view reduction,
                                            OptionalSymInt ignore_index, OptionalSymInt ood_index);

// loss, row_cross_entropy, row_max, row_sum_exp, counts, unit_gradient
using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using ForwardSignature = ForwardResult(const at::Tensor& logits, const at::Tensor& target,
                                       double alpha, const OptionalTensor& alpha_tensor,
                                       std::string_view reduction, OptionalSymInt ignore_index,
                                       OptionalSymInt ood_index, bool unit_gradient);

using BackwardSignature = at::Tensor(const at::Tensor& grad, const at::Tensor& logits,
                                     const at::Tensor& target, const at::Tensor& row_max,
                                     const at::Tensor& row_sum_exp, const at::Tensor& counts,
                                     double alpha, const OptionalTensor& alpha_tensor,
                                     std::string_view reduction, OptionalSymInt ignore_index,
                                     OptionalSymInt ood_index);

using BackwardFromUnitSignature = void(at::Tensor& unit_gradient, const at::Tensor& grad,
                                       const at::Tensor& logits, const at::Tensor& target,
                                       const at::Tensor& row_max, const at::Tensor& row_sum_exp,
                                       const at::Tensor& counts, double alpha,
                                       const OptionalTensor& alpha_tensor,
                                       std::string_view reduction, OptionalSymInt ignore_index,
                                       OptionalSymInt ood_index);

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

inline const c10::TypedOperatorHandle<LossSignature>& loss_operator() {
  static const auto op = find_operator<LossSignature>("oe_ext::outlier_exposure_loss");
  return op;
}

inline const c10::TypedOperatorHandle<LossTensorAlphaSignature>& loss_tensor_alpha_operator() {
  static const auto op =
      find_operator<LossTensorAlphaSignature>("oe_ext::outlier_exposure_loss", "tensor_alpha");
  return op;
}

inline const c10::TypedOperatorHandle<ForwardSignature>& forward_operator() {
  static const auto op = find_operator<ForwardSignature>("oe_ext::_outlier_exposure_loss_forward");
  return op;
}

inline const c10::TypedOperatorHandle<BackwardSignature>& backward_operator() {
  static const auto op =
      find_operator<BackwardSignature>("oe_ext::_outlier_exposure_loss_backward");
  return op;
}

inline const c10::TypedOperatorHandle<BackwardFromUnitSignature>& backward_from_unit_operator() {
  static const auto op =
      find_operator<BackwardFromUnitSignature>("oe_ext::_outlier_exposure_loss_backward_from_unit");
  return op;
}

}  // namespace oe_ext
