// All validation of a caller's arguments. Every backend calls it, also Meta: inference mode skips
// the autograd layer. check_inputs() reads no tensor's elements, so it never synchronises; the
// kernels check the labels.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include "../core/labels.h"
#include "upsampled_outlier_exposure.h"

namespace oe_ext {

// The dtype of the loss, and of all arithmetic: float32, or float64 for float64 logits.
inline at::ScalarType loss_dtype(const at::Tensor& logits) {
  return at::toOpMathType(logits.scalar_type());
}

// How labels of this dtype are read; none if the dtype holds no labels.
inline std::optional<LabelType> label_type(at::ScalarType dtype) {
  switch (dtype) {
    case at::kLong:
      return LabelType::kInt64;
    case at::kInt:
      return LabelType::kInt32;
    case at::kShort:
      return LabelType::kInt16;
    case at::kChar:
      return LabelType::kInt8;
    case at::kByte:
      return LabelType::kUInt8;
    case at::kUInt16:
      return LabelType::kUInt16;
    case at::kUInt32:
      return LabelType::kUInt32;
    default:
      return std::nullopt;
  }
}

// Advice for a target whose dtype holds no labels.
inline std::string_view label_advice(at::ScalarType dtype) {
  if (at::isFloatingType(dtype)) {
    return "; soft labels are not supported by this loss, and class numbers that are stored as "
           "floats become labels by target.long()";
  }
  return dtype == at::kBool || at::isIntegralType(dtype, /*includeBool=*/false)
             ? "; target.long() makes labels of it"
             : "";
}

inline void check_dtypes(const at::Tensor& logits, const at::Tensor& target) {
  TORCH_CHECK_TYPE(logits.defined(), "outlier_exposure_loss: logits must be a tensor, got None");
  TORCH_CHECK_TYPE(target.defined(), "outlier_exposure_loss: target must be a tensor, got None");
  const auto is_logits_dtype = [](at::ScalarType dtype) {
    return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kHalf ||
           dtype == at::kBFloat16;
  };
  TORCH_CHECK_TYPE(is_logits_dtype(logits.scalar_type()),
                   "outlier_exposure_loss: logits must be float16, bfloat16, float32 or float64, "
                   "got ",
                   logits.scalar_type());
  const at::ScalarType label = target.scalar_type();
  TORCH_CHECK_TYPE(label_type(label).has_value(),
                   "outlier_exposure_loss: target must hold class labels of dtype int64, int32, "
                   "int16, int8 or uint8 (or uint16, uint32), got ",
                   label, label_advice(label));
}

inline void check_has_classes(const at::Tensor& logits, const at::Tensor& target) {
  TORCH_CHECK_VALUE(logits.sym_size(1).sym_ne(0).expect_true(__FILE__, __LINE__),
                    "outlier_exposure_loss: logits must have at least one class (axis 1), got "
                    "logits of shape ",
                    logits.sym_sizes(), " and target of shape ", target.sym_sizes());
}

inline void check_shapes(const at::Tensor& logits, const at::Tensor& target) {
  TORCH_CHECK_VALUE(logits.dim() >= 2,
                    "outlier_exposure_loss: logits must have shape [N, C] or [N, C, d1, ..., dk], "
                    "got logits of shape ",
                    logits.sym_sizes(), " and target of shape ", target.sym_sizes());
  const c10::SymIntArrayRef sizes = logits.sym_sizes();
  bool matches = target.dim() == logits.dim() - 1;
  for (int64_t dim = 0; matches && dim < target.dim(); ++dim) {
    matches =
        target.sym_size(dim).sym_eq(sizes[dim == 0 ? 0 : dim + 1]).expect_true(__FILE__, __LINE__);
  }
  if (!matches) {
    c10::SymDimVector expected(sizes.begin(), sizes.end());
    expected.erase(expected.begin() + 1);
    TORCH_CHECK_VALUE(false, "outlier_exposure_loss: target must have shape ",
                      c10::SymIntArrayRef(expected), " for logits of shape ", sizes,
                      " (the class axis is 1), got ", target.sym_sizes(),
                      logits.dim() == 4 && target.dim() == 3
                          ? "; with upsample='bilinear', logits are first resized to the target"
                          : "");
  }
  check_has_classes(logits, target);
}

// Logits [N, C, h, w] and a target [N, H, W].
inline void check_upsampled_shapes(const at::Tensor& logits, const at::Tensor& target) {
  TORCH_CHECK_VALUE(
      logits.dim() == 4 && target.dim() == 3 &&
          logits.sym_size(0).sym_eq(target.sym_size(0)).expect_true(__FILE__, __LINE__),
      "outlier_exposure_loss: upsample='bilinear' needs logits of shape [N, C, h, w] and a target "
      "of shape [N, H, W], got logits of shape ",
      logits.sym_sizes(), " and target of shape ", target.sym_sizes());
  check_has_classes(logits, target);
  TORCH_CHECK_VALUE(logits.sym_size(2).sym_ne(0).expect_true(__FILE__, __LINE__) &&
                        logits.sym_size(3).sym_ne(0).expect_true(__FILE__, __LINE__),
                    "outlier_exposure_loss: upsample='bilinear' needs logits of at least one row "
                    "and column, got logits of shape ",
                    logits.sym_sizes(), " and target of shape ", target.sym_sizes());
}

inline void check_same_device(const at::Tensor& logits, const at::Tensor& other,
                              std::string_view name) {
  TORCH_CHECK(logits.device() == other.device(), "outlier_exposure_loss: logits and ", name,
              " must be on the same device, got ", logits.device(), " and ", other.device());
}

// alpha is a number, or a tensor with one weight per position; the tensor takes precedence.
inline void check_alpha(const LossInputs& inputs) {
  const auto& [logits, target, alpha_tensor, weight, options] = inputs;
  const double alpha = options.alpha;
  if (!alpha_tensor.has_value()) {
    TORCH_CHECK_VALUE(std::isfinite(alpha),
                      "outlier_exposure_loss: alpha must be a finite number, got ", alpha);
    return;
  }
  TORCH_CHECK_TYPE(at::isFloatingType(alpha_tensor->scalar_type()),
                   "outlier_exposure_loss: a tensor alpha must have a floating-point dtype, got ",
                   alpha_tensor->scalar_type());
  check_same_device(logits, *alpha_tensor, "alpha");
  const c10::SymIntArrayRef from = alpha_tensor->sym_sizes();
  const c10::SymIntArrayRef to = target.sym_sizes();
  bool broadcasts = from.size() <= to.size();
  for (size_t back = 1; broadcasts && back <= from.size(); ++back) {
    // A size that torch.compile does not know is assumed to be that of the target, and checked at
    // run time.
    const c10::SymInt& size = from[from.size() - back];
    broadcasts = TORCH_GUARD_OR_FALSE(size.sym_eq(1)) ||
                 size.sym_eq(to[to.size() - back]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK_VALUE(broadcasts, "outlier_exposure_loss: alpha of shape ", from,
                    " does not broadcast against target of shape ", to);
}

inline void check_weight(const LossInputs& inputs) {
  if (!inputs.weight.has_value()) {
    return;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      !inputs.options.is_part(),
      "_outlier_exposure_loss: a part of the classes takes no weight; it can multiply the rows");
  const at::Tensor& weight = *inputs.weight;
  TORCH_CHECK_TYPE(at::isFloatingType(weight.scalar_type()),
                   "outlier_exposure_loss: weight must have a floating-point dtype, such as ",
                   loss_dtype(inputs.logits), " of the loss, got ", weight.scalar_type());
  check_same_device(inputs.logits, weight, "weight");
  TORCH_CHECK_VALUE(
      weight.dim() == 1 &&
          weight.sym_size(0).sym_eq(inputs.logits.sym_size(1)).expect_true(__FILE__, __LINE__),
      "outlier_exposure_loss: weight must have one element per class, so shape [",
      inputs.logits.sym_size(1), "], got ", weight.sym_sizes());
}

inline void check_label_smoothing(const LossInputs& inputs) {
  const double smoothing = inputs.options.label_smoothing;
  TORCH_CHECK_VALUE(smoothing >= 0 && smoothing <= 1,  // false for NaN
                    "outlier_exposure_loss: label_smoothing must be in [0, 1], got ", smoothing);
}

// Checks that the logits fit num_classes and first_class.
inline void check_classes(const LossInputs& inputs) {
  const LossOptions& options = inputs.options;
  if (!options.is_part()) {
    TORCH_CHECK_VALUE(options.first_class == 0,
                      "_outlier_exposure_loss: first_class needs num_classes, got ",
                      options.first_class);
    return;
  }
  const c10::SymInt& here = inputs.logits.sym_size(1);
  TORCH_CHECK_VALUE(options.first_class >= 0 && options.first_class + here <= *options.num_classes,
                    "_outlier_exposure_loss: logits of ", here,
                    " classes from first_class = ", options.first_class,
                    " on must be among num_classes, got ", *options.num_classes);
}

template <typename CheckShapes>
void check_inputs(const LossInputs& inputs, const CheckShapes& check_shapes) {
  check_dtypes(inputs.logits, inputs.target);
  check_shapes(inputs.logits, inputs.target);
  check_same_device(inputs.logits, inputs.target, "target");
  check_alpha(inputs);
  check_weight(inputs);
  check_label_smoothing(inputs);
  check_classes(inputs);
}

inline void check_inputs(const LossInputs& inputs) { check_inputs(inputs, check_shapes); }

inline void check_upsampled_inputs(const UpsampledInputs& inputs) {
  check_inputs(inputs.loss, check_upsampled_shapes);
}

// For weights on the CPU, float32 or float64.
inline void check_weight_values(const at::Tensor& weight) {
  const auto check = [&](const auto* values) {
    for (int64_t cls = 0; cls < weight.numel(); ++cls) {
      TORCH_CHECK_VALUE(values[cls] >= 0 && std::isfinite(values[cls]),
                        "outlier_exposure_loss: weight must be finite and not negative, got ",
                        values[cls], " for class ", cls);
    }
  };
  weight.scalar_type() == at::kDouble ? check(weight.const_data_ptr<double>())
                                      : check(weight.const_data_ptr<float>());
}

// Reports the row in which a kernel found an illegal label; -1 is none.
inline void check_labels(int64_t bad_row, const Labels& labels, const at::Tensor& target) {
  if (bad_row < 0) {
    return;
  }
  at::DimVector position(target.dim());
  for (int64_t dim = target.dim() - 1, rest = bad_row; dim >= 0; --dim) {
    position[dim] = rest % target.size(dim);
    rest /= target.size(dim);
  }
  const LabelRule& rule = labels.rule;
  std::string legal = c10::str("classes in [0, ", rule.num_classes, ")");
  if (rule.has_ood_index) {
    legal += c10::str(", ood_index = ", rule.ood_index);
  } else if (!labels.are_unsigned()) {
    legal += ", or a negative number for an outlier";
  }
  if (rule.has_ignore_index) {
    legal += c10::str(", or ignore_index = ", rule.ignore_index);
  }
  std::string advice;
  if (!rule.has_ignore_index) {
    advice += "; ignore_index names the label of positions that do not count";
  }
  if (!rule.has_ood_index) {
    advice += "; ood_index names the label of outliers";
  }
  TORCH_CHECK_INDEX(false, "outlier_exposure_loss: target must hold ", legal, "; got ",
                    labels[bad_row], " at position ", at::IntArrayRef(position),
                    " (C = ", rule.num_classes, ")", advice);
}

// counts: what a mean divides by.
inline void check_counts(const char* name, const at::Tensor& logits, const at::Tensor& counts,
                         int64_t size) {
  TORCH_CHECK(
      counts.scalar_type() == at::kDouble && counts.dim() == 1 && counts.sym_size(0) == size, name,
      ": counts must be float64 with ", size, " elements, got ", counts.scalar_type(), " of shape ",
      counts.sym_sizes());
  check_same_device(logits, counts, "counts");
}

// Checks the arguments that the forward operator has beside the inputs of the loss.
inline void check_forward(const LossInputs& inputs, const OptionalTensor& counts,
                          bool unit_gradient) {
  constexpr const char* kName = "outlier_exposure_loss";
  const Reduction& reduction = inputs.options.reduction;
  TORCH_CHECK_VALUE(!unit_gradient || reduction.is_scalar, "_", kName,
                    "_forward: unit_gradient needs a loss that is a scalar, got reduction '",
                    reduction.name, "'");
  if (counts.has_value()) {
    TORCH_CHECK_VALUE(reduction.divisors.counts(), kName,
                      ": counts need a reduction that divides by them, got '", reduction.name, "'");
    check_counts(kName, inputs.logits, *counts, 2);
  }
}

// Checks the upstream gradient, and what a mean divides by.
inline void check_upstream(const char* name, const at::Tensor& grad, const LossInputs& inputs,
                           const at::Tensor& counts) {
  const at::Tensor& target = inputs.target;
  const bool is_scalar = inputs.options.reduction.is_scalar;
  TORCH_CHECK(is_scalar ? grad.dim() == 0 : grad.sym_sizes().equals(target.sym_sizes()), name,
              ": grad must have the shape of the loss, got ", grad.sym_sizes(),
              " for target of shape ", target.sym_sizes());
  check_same_device(inputs.logits, grad, "grad");
  check_counts(name, inputs.logits, counts, is_scalar ? 2 : 0);
}

// Checks the arguments that the backward operator has beside the inputs of the loss.
inline void check_backward(const at::Tensor& grad, const LossInputs& inputs,
                           const RowStatistics& statistics) {
  constexpr const char* kName = "_outlier_exposure_loss_backward";
  const auto check_row_statistic = [&](const at::Tensor& values, std::string_view name) {
    TORCH_CHECK(values.scalar_type() == loss_dtype(inputs.logits) &&
                    values.sym_sizes().equals(inputs.target.sym_sizes()),
                kName, ": ", name, " must be ", loss_dtype(inputs.logits), " of shape ",
                inputs.target.sym_sizes(), ", got ", values.scalar_type(), " of shape ",
                values.sym_sizes());
    check_same_device(inputs.logits, values, name);
  };
  check_row_statistic(statistics.row_max, "row_max");
  check_row_statistic(statistics.row_sum_exp, "row_sum_exp");
  check_upstream(kName, grad, inputs, statistics.counts);
}

inline void check_unit_gradient(const at::Tensor& unit_gradient, const LossInputs& inputs) {
  constexpr const char* kName = "_outlier_exposure_loss_backward_from_unit";
  const at::Tensor& logits = inputs.logits;
  TORCH_CHECK_VALUE(inputs.options.reduction.is_scalar, kName,
                    ": the loss must be a scalar, got reduction '", inputs.options.reduction.name,
                    "'");
  TORCH_CHECK(unit_gradient.scalar_type() == logits.scalar_type() &&
                  unit_gradient.sym_sizes().equals(logits.sym_sizes()),
              kName, ": unit_gradient must be ", logits.scalar_type(), " of shape ",
              logits.sym_sizes(), ", got ", unit_gradient.scalar_type(), " of shape ",
              unit_gradient.sym_sizes());
  check_same_device(logits, unit_gradient, "unit_gradient");
}

}  // namespace oe_ext
