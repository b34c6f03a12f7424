// The operators of the loss: their arguments as structs, how registered kernels receive these, and
// functions that call the operators. The schemas are in outlier_exposure.cpp.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/SymInt.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <string_view>
#include <tuple>

#include "../core/reduction.h"

namespace oe_ext {

// Symbolic as far as the kernels: a special label may be a size, or a number that torch.compile
// does not know.
using OptionalSymInt = std::optional<c10::SymInt>;
using OptionalTensor = std::optional<at::Tensor>;

// Finds a reduction by name. Throws c10::ValueError for an unknown name.
inline const Reduction& parse_reduction(std::string_view name) {
  if (const Reduction* found = find_reduction(name)) {
    return *found;
  }
  std::string known;
  for (const Reduction& reduction : kReductions) {
    known += c10::str(known.empty() ? "'" : ", '", reduction.name, "'");
  }
  TORCH_CHECK_VALUE(false, "outlier_exposure_loss: reduction must be one of ", known, ", got '",
                    name, "'");
}

// The arguments of the loss beside its tensors.
struct LossOptions {
  double alpha = 0;
  Reduction reduction = *find_reduction("none");
  OptionalSymInt ignore_index = std::nullopt;
  OptionalSymInt ood_index = std::nullopt;
  double label_smoothing = 0;
  // If the logits hold only a part of the classes: the number of all classes, and the first one
  // here.
  OptionalSymInt num_classes = std::nullopt;
  c10::SymInt first_class = 0;

  // With the alpha of a tensor, the number is of no account.
  static LossOptions of(double alpha, std::string_view reduction, OptionalSymInt ignore_index,
                        OptionalSymInt ood_index, double label_smoothing,
                        OptionalSymInt num_classes = std::nullopt, c10::SymInt first_class = 0) {
    return {
        alpha,           parse_reduction(reduction), std::move(ignore_index), std::move(ood_index),
        label_smoothing, std::move(num_classes),     std::move(first_class)};
  }

  bool is_part() const { return num_classes.has_value(); }
};

inline OptionalSymInt symbolic(const std::optional<int64_t>& label) {
  return label.has_value() ? OptionalSymInt(*label) : std::nullopt;
}

// The inputs of the loss, as references to the caller's tensors.
struct LossInputs {
  const at::Tensor& logits;
  const at::Tensor& target;
  const OptionalTensor& alpha_tensor;  // if given, replaces the alpha of the options
  const OptionalTensor& weight;        // of the classes
  LossOptions options;
};

// Values that a forward saves for the backward.
struct RowStatistics {
  const at::Tensor& row_max;
  const at::Tensor& row_sum_exp;
  const at::Tensor& counts;
};

// loss, row_cross_entropy, row_max, row_sum_exp, counts, unit_gradient
using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Registers those of Kernels::loss, forward, backward and backward_from_unit that there are. They
// take the structs above. Only this struct spells out the arguments as the dispatcher passes
// them.
template <typename Kernels>
struct OutlierExposureKernels {
  static at::Tensor loss(const at::Tensor& logits, const at::Tensor& target, double alpha,
                         std::string_view reduction, OptionalSymInt ignore_index,
                         OptionalSymInt ood_index, const OptionalTensor& weight,
                         double label_smoothing) {
    return Kernels::loss({logits, target, std::nullopt, weight,
                          LossOptions::of(alpha, reduction, std::move(ignore_index),
                                          std::move(ood_index), label_smoothing)});
  }

  static at::Tensor loss_tensor_alpha(const at::Tensor& logits, const at::Tensor& target,
                                      const at::Tensor& alpha, std::string_view reduction,
                                      OptionalSymInt ignore_index, OptionalSymInt ood_index,
                                      const OptionalTensor& weight, double label_smoothing) {
    return Kernels::loss({logits, target, alpha, weight,
                          LossOptions::of(0.0, reduction, std::move(ignore_index),
                                          std::move(ood_index), label_smoothing)});
  }

  static ForwardResult forward(const at::Tensor& logits, const at::Tensor& target, double alpha,
                               const OptionalTensor& alpha_tensor, std::string_view reduction,
                               OptionalSymInt ignore_index, OptionalSymInt ood_index,
                               std::optional<bool> unit_gradient, const OptionalTensor& counts,
                               OptionalSymInt num_classes, c10::SymInt first_class,
                               const OptionalTensor& weight, double label_smoothing) {
    return Kernels::forward(
        {logits, target, alpha_tensor, weight,
         LossOptions::of(alpha, reduction, std::move(ignore_index), std::move(ood_index),
                         label_smoothing, std::move(num_classes), std::move(first_class))},
        counts, unit_gradient);
  }

  static at::Tensor backward(const at::Tensor& grad, const at::Tensor& logits,
                             const at::Tensor& target, const at::Tensor& row_max,
                             const at::Tensor& row_sum_exp, const at::Tensor& counts, double alpha,
                             const OptionalTensor& alpha_tensor, std::string_view reduction,
                             OptionalSymInt ignore_index, OptionalSymInt ood_index,
                             OptionalSymInt num_classes, c10::SymInt first_class,
                             const OptionalTensor& weight, double label_smoothing) {
    return Kernels::backward(
        grad,
        {logits, target, alpha_tensor, weight,
         LossOptions::of(alpha, reduction, std::move(ignore_index), std::move(ood_index),
                         label_smoothing, std::move(num_classes), std::move(first_class))},
        {row_max, row_sum_exp, counts});
  }

  static void backward_from_unit(at::Tensor& unit_gradient, const at::Tensor& grad,
                                 const at::Tensor& logits, const at::Tensor& target,
                                 const at::Tensor& row_max, const at::Tensor& row_sum_exp,
                                 const at::Tensor& counts, double alpha,
                                 const OptionalTensor& alpha_tensor, std::string_view reduction,
                                 OptionalSymInt ignore_index, OptionalSymInt ood_index,
                                 const OptionalTensor& weight, double label_smoothing) {
    Kernels::backward_from_unit(unit_gradient, grad,
                                {logits, target, alpha_tensor, weight,
                                 LossOptions::of(alpha, reduction, std::move(ignore_index),
                                                 std::move(ood_index), label_smoothing)},
                                {row_max, row_sum_exp, counts});
  }

  static void register_for(torch::Library& m) {
    m.impl("outlier_exposure_loss", TORCH_FN(loss));
    m.impl("outlier_exposure_loss.tensor_alpha", TORCH_FN(loss_tensor_alpha));
    if constexpr (requires { &Kernels::forward; }) {
      m.impl("_outlier_exposure_loss_forward", TORCH_FN(forward));
      m.impl("_outlier_exposure_loss_backward", TORCH_FN(backward));
    }
    if constexpr (requires { &Kernels::backward_from_unit; }) {
      m.impl("_outlier_exposure_loss_backward_from_unit", TORCH_FN(backward_from_unit));
    }
  }
};

template <typename Signature>
c10::TypedOperatorHandle<Signature> find_operator(const char* name, const char* overload = "") {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload).typed<Signature>();
}

// Call the operators through the dispatcher.
at::Tensor call_loss(const LossInputs& inputs);
ForwardResult call_forward(const LossInputs& inputs, const OptionalTensor& counts,
                           std::optional<bool> unit_gradient);
at::Tensor call_backward(const at::Tensor& grad, const LossInputs& inputs,
                         const RowStatistics& statistics);
void call_backward_from_unit(at::Tensor& unit_gradient, const at::Tensor& grad,
                             const LossInputs& inputs, const RowStatistics& statistics);

}  // namespace oe_ext
