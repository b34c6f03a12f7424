// All validation of what a caller hands in. Every backend calls it, the Meta backend too: inference
// mode skips the autograd layer. Nothing here reads a tensor's elements, so nothing synchronises;
// labels are checked by the kernels.
#pragma once

#include <ATen/ExpandUtils.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <string_view>

#include "../core/kernel_args.h"
#include "outlier_exposure.h"

namespace oe_ext {

inline Reduction parse_reduction(std::string_view reduction) {
  if (reduction == "mean") return Reduction::kMean;
  if (reduction == "group_mean") return Reduction::kGroupMean;
  if (reduction == "sum") return Reduction::kSum;
  if (reduction == "none") return Reduction::kNone;
  TORCH_CHECK_VALUE(false,
                    "outlier_exposure_loss: reduction must be one of 'none', 'sum', 'mean', "
                    "'group_mean', got '",
                    reduction, "'");
}

// The dtype of the loss, and of all arithmetic: float32, or float64 for float64 logits.
inline at::ScalarType loss_dtype(const at::Tensor& logits) {
  return at::toOpMathType(logits.scalar_type());
}

// What to do with a target of a dtype that holds no labels.
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
  const bool is_label_dtype = label == at::kLong || label == at::kInt || label == at::kShort ||
                              label == at::kChar || label == at::kByte || label == at::kUInt16 ||
                              label == at::kUInt32;
  TORCH_CHECK_TYPE(is_label_dtype,
                   "outlier_exposure_loss: target must hold class labels of dtype int64, int32, "
                   "int16, int8 or uint8 (or uint16, uint32), got ",
                   label, label_advice(label));
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
                      " (the class axis is 1), got ", target.sym_sizes());
  }
  TORCH_CHECK_VALUE(sizes[1].sym_ne(0).expect_true(__FILE__, __LINE__),
                    "outlier_exposure_loss: logits must have at least one class (axis 1), got "
                    "logits of shape ",
                    sizes, " and target of shape ", target.sym_sizes());
}

inline void check_same_device(const at::Tensor& logits, const at::Tensor& other,
                              std::string_view name) {
  TORCH_CHECK(logits.device() == other.device(), "outlier_exposure_loss: logits and ", name,
              " must be on the same device, got ", logits.device(), " and ", other.device());
}

inline void check_inputs(const at::Tensor& logits, const at::Tensor& target) {
  check_dtypes(logits, target);
  check_shapes(logits, target);
  check_same_device(logits, target, "target");
}

// alpha is a number, or a tensor with one weight a position; the tensor wins.
inline void check_alpha(const at::Tensor& logits, const at::Tensor& target, double alpha,
                        const OptionalTensor& alpha_tensor) {
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
    // A size that torch.compile does not know is taken to be the target's, and looked at when run.
    const c10::SymInt& size = from[from.size() - back];
    broadcasts = TORCH_GUARD_OR_FALSE(size.sym_eq(1)) ||
                 size.sym_eq(to[to.size() - back]).expect_true(__FILE__, __LINE__);
  }
  TORCH_CHECK_VALUE(broadcasts, "outlier_exposure_loss: alpha of shape ", from,
                    " does not broadcast against target of shape ", to);
}

// Reports the row that a kernel found to have no legal label; -1 is none.
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
    advice += "; ood_index names a label that marks outliers";
  }
  TORCH_CHECK_INDEX(false, "outlier_exposure_loss: target must hold ", legal, "; got ",
                    labels[bad_row], " at position ", at::IntArrayRef(position),
                    " (C = ", rule.num_classes, ")", advice);
}

// What the backward operator is given beside the inputs of the loss.
inline void check_backward(const at::Tensor& grad, const at::Tensor& logits,
                           const at::Tensor& target, const at::Tensor& row_max,
                           const at::Tensor& row_sum_exp, const at::Tensor& counts,
                           Reduction reduction) {
  const auto check_stat = [&](const at::Tensor& stat, std::string_view name) {
    TORCH_CHECK(
        stat.scalar_type() == loss_dtype(logits) && stat.sym_sizes().equals(target.sym_sizes()),
        "_outlier_exposure_loss_backward: ", name, " must be ", loss_dtype(logits), " of shape ",
        target.sym_sizes(), ", got ", stat.scalar_type(), " of shape ", stat.sym_sizes());
    check_same_device(logits, stat, name);
  };
  check_stat(row_max, "row_max");
  check_stat(row_sum_exp, "row_sum_exp");
  TORCH_CHECK(
      reduction == Reduction::kNone ? grad.sym_sizes().equals(target.sym_sizes()) : grad.dim() == 0,
      "_outlier_exposure_loss_backward: grad must have the shape of the loss, got ",
      grad.sym_sizes(), " for target of shape ", target.sym_sizes());
  check_same_device(logits, grad, "grad");
  TORCH_CHECK(counts.scalar_type() == at::kLong && counts.dim() == 1 &&
                  counts.sym_size(0) == (reduction == Reduction::kNone ? 0 : 2),
              "_outlier_exposure_loss_backward: counts must be int64 with 2 elements (0 where "
              "reduction is 'none'), got ",
              counts.scalar_type(), " of shape ", counts.sym_sizes());
  check_same_device(logits, counts, "counts");
}

inline void check_has_unit_gradient(bool unit_gradient, Reduction reduction) {
  TORCH_CHECK_VALUE(!unit_gradient || reduction != Reduction::kNone,
                    "_outlier_exposure_loss_forward: unit_gradient needs a loss that is a scalar, "
                    "got reduction 'none'");
}

inline void check_unit_gradient(const at::Tensor& unit_gradient, const at::Tensor& logits,
                                Reduction reduction) {
  TORCH_CHECK_VALUE(reduction != Reduction::kNone,
                    "_outlier_exposure_loss_backward_from_unit: the loss must be a scalar, got "
                    "reduction 'none'");
  TORCH_CHECK(unit_gradient.scalar_type() == logits.scalar_type() &&
                  unit_gradient.sym_sizes().equals(logits.sym_sizes()),
              "_outlier_exposure_loss_backward_from_unit: unit_gradient must be ",
              logits.scalar_type(), " of shape ", logits.sym_sizes(), ", got ",
              unit_gradient.scalar_type(), " of shape ", unit_gradient.sym_sizes());
  check_same_device(logits, unit_gradient, "unit_gradient");
}

}  // namespace oe_ext
