// The entry points of every backend that computes: tensors in, raw pointers to the kernels,
// tensors out. A backend supplies two static function templates:
//     forward(ForwardArgs)    whatever the arguments have room for: the loss, the statistics of
//                             every row, the gradient for an upstream gradient of 1
//     backward(BackwardArgs)  the gradient of every row
// Both return the first row whose label is not legal, or -1. A device that cannot tell without a
// synchronisation asserts in its kernel and returns -1.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../core/kernel_args.h"
#include "checks.h"
#include "row_view.h"

namespace oe_ext {

inline Labels make_labels(const at::Tensor& contiguous_target, int64_t num_classes,
                          OptionalInt ignore_index, OptionalInt ood_index) {
  Labels labels;
  labels.data = contiguous_target.const_data_ptr();
  switch (contiguous_target.scalar_type()) {
    case at::kInt:
      labels.type = LabelType::kInt32;
      break;
    case at::kShort:
      labels.type = LabelType::kInt16;
      break;
    case at::kChar:
      labels.type = LabelType::kInt8;
      break;
    case at::kByte:
      labels.type = LabelType::kUInt8;
      break;
    case at::kUInt16:
      labels.type = LabelType::kUInt16;
      break;
    case at::kUInt32:
      labels.type = LabelType::kUInt32;
      break;
    default:
      labels.type = LabelType::kInt64;
  }
  labels.rule.num_classes = num_classes;
  labels.rule.ignore_index = ignore_index.value_or(0);
  labels.rule.ood_index = ood_index.value_or(0);
  labels.rule.has_ignore_index = ignore_index.has_value();
  labels.rule.has_ood_index = ood_index.has_value();
  return labels;
}

// A tensor that broadcasts against `target`, in the dtype of the arithmetic. One value stays one
// value (an expanded gradient, a scalar alpha); anything else is laid out row by row.
class RowVector {
 public:
  RowVector(const at::Tensor& values, const at::Tensor& target, at::ScalarType dtype)
      : tensor_(values), stride_(is_one_value(values) ? 0 : 1) {
    if (stride_ != 0) {
      tensor_ = tensor_.expand(target.sizes()).contiguous();
    }
    if (tensor_.scalar_type() != dtype) {
      tensor_ = tensor_.to(dtype);
    }
  }

  template <typename acc_t>
  PerRow<acc_t> per_row() const {
    return {tensor_.const_data_ptr<acc_t>(), stride_};
  }

 private:
  static bool is_one_value(const at::Tensor& values) {
    const auto strides = values.strides();
    return values.numel() == 1 ||
           (values.numel() > 0 && std::all_of(strides.begin(), strides.end(),
                                              [](int64_t stride) { return stride == 0; }));
  }

  at::Tensor tensor_;
  int64_t stride_;
};

// The inputs of the loss as the kernels read them, for both directions. The tensors live as long as
// this does.
class LossInputs {
 public:
  LossInputs(const at::Tensor& logits, const at::Tensor& target, double alpha,
             const OptionalTensor& alpha_tensor, Reduction reduction, OptionalInt ignore_index,
             OptionalInt ood_index)
      : logits_(rows_to_read(logits)),
        target_(target.contiguous()),
        labels_(make_labels(target_, logits.size(1), ignore_index, ood_index)),
        alpha_(alpha),
        reduction_(reduction) {
    if (alpha_tensor.has_value()) {
      alphas_.emplace(*alpha_tensor, target, loss_dtype(logits));
    }
  }

  const Labels& labels() const { return labels_; }

  template <template <typename, typename> class Args, typename scalar_t, typename acc_t>
  void fill(Args<scalar_t, acc_t>& args) const {
    args.layout = logits_.layout;
    args.logits = logits_.tensor.template const_data_ptr<scalar_t>();
    args.labels = labels_;
    args.alpha.value = static_cast<acc_t>(alpha_);
    if (alphas_.has_value()) {
      args.alpha.values = alphas_->template per_row<acc_t>();
    }
    args.reduction = reduction_;
  }

 private:
  RowView logits_;
  at::Tensor target_;
  Labels labels_;
  double alpha_;
  std::optional<RowVector> alphas_;
  Reduction reduction_;
};

template <typename Backend>
struct Operator {
  static at::Tensor loss(const at::Tensor& logits, const at::Tensor& target, double alpha,
                         std::string_view reduction, OptionalInt ignore_index,
                         OptionalInt ood_index) {
    return std::get<0>(run_forward(logits, target, alpha, std::nullopt, reduction, ignore_index,
                                   ood_index, /*save_for_backward=*/false,
                                   /*unit_gradient=*/false));
  }

  static at::Tensor loss_tensor_alpha(const at::Tensor& logits, const at::Tensor& target,
                                      const at::Tensor& alpha, std::string_view reduction,
                                      OptionalInt ignore_index, OptionalInt ood_index) {
    return std::get<0>(run_forward(logits, target, 0.0, alpha, reduction, ignore_index, ood_index,
                                   /*save_for_backward=*/false, /*unit_gradient=*/false));
  }

  static ForwardResult forward(const at::Tensor& logits, const at::Tensor& target, double alpha,
                               const OptionalTensor& alpha_tensor, std::string_view reduction,
                               OptionalInt ignore_index, OptionalInt ood_index,
                               bool unit_gradient) {
    return run_forward(logits, target, alpha, alpha_tensor, reduction, ignore_index, ood_index,
                       /*save_for_backward=*/true, unit_gradient);
  }

  static at::Tensor backward(const at::Tensor& grad, const at::Tensor& logits,
                             const at::Tensor& target, const at::Tensor& row_max,
                             const at::Tensor& row_sum_exp, const at::Tensor& counts, double alpha,
                             const OptionalTensor& alpha_tensor, std::string_view reduction,
                             OptionalInt ignore_index, OptionalInt ood_index) {
    check_inputs(logits, target);
    at::Tensor grad_logits = at::empty_like(logits);
    run_backward(grad_logits, /*has_unit_gradient=*/false, grad, logits, target, row_max,
                 row_sum_exp, counts, alpha, alpha_tensor, reduction, ignore_index, ood_index);
    return grad_logits;
  }

  static void backward_from_unit(at::Tensor& unit_gradient, const at::Tensor& grad,
                                 const at::Tensor& logits, const at::Tensor& target,
                                 const at::Tensor& row_max, const at::Tensor& row_sum_exp,
                                 const at::Tensor& counts, double alpha,
                                 const OptionalTensor& alpha_tensor, std::string_view reduction,
                                 OptionalInt ignore_index, OptionalInt ood_index) {
    check_inputs(logits, target);
    check_unit_gradient(unit_gradient, logits, parse_reduction(reduction));
    run_backward(unit_gradient, /*has_unit_gradient=*/true, grad, logits, target, row_max,
                 row_sum_exp, counts, alpha, alpha_tensor, reduction, ignore_index, ood_index);
  }

  // Registers every operator for the dispatch key of this backend.
  static void register_for(torch::Library& m) {
    m.impl("outlier_exposure_loss", TORCH_FN(loss));
    m.impl("outlier_exposure_loss.tensor_alpha", TORCH_FN(loss_tensor_alpha));
    m.impl("_outlier_exposure_loss_forward", TORCH_FN(forward));
    m.impl("_outlier_exposure_loss_backward", TORCH_FN(backward));
    m.impl("_outlier_exposure_loss_backward_from_unit", TORCH_FN(backward_from_unit));
  }

 private:
  static ForwardResult run_forward(const at::Tensor& logits, const at::Tensor& target, double alpha,
                                   const OptionalTensor& alpha_tensor,
                                   std::string_view reduction_name, OptionalInt ignore_index,
                                   OptionalInt ood_index, bool save_for_backward,
                                   bool unit_gradient) {
    const Reduction reduction = parse_reduction(reduction_name);
    check_inputs(logits, target);
    check_alpha(logits, target, alpha, alpha_tensor);
    check_has_unit_gradient(unit_gradient, reduction);
    const c10::DeviceGuard guard(logits.device());

    const at::ScalarType dtype = loss_dtype(logits);
    const auto options = logits.options().dtype(dtype);
    const bool reduces = reduction != Reduction::kNone;
    const bool save_cross_entropy = save_for_backward && alpha_tensor.has_value();
    const auto per_row = [&](bool needed) {
      return needed ? at::empty(target.sizes(), options) : at::empty({0}, options);
    };
    at::Tensor loss = reduces ? at::empty({}, options) : per_row(true);
    at::Tensor row_cross_entropy = save_for_backward ? per_row(save_cross_entropy) : at::Tensor();
    at::Tensor row_max = save_for_backward ? per_row(true) : at::Tensor();
    at::Tensor row_sum_exp = save_for_backward ? per_row(true) : at::Tensor();
    at::Tensor counts = at::empty({reduces ? 2 : 0}, options.dtype(at::kLong));
    at::Tensor grad_logits;
    if (save_for_backward) {
      grad_logits = unit_gradient ? at::empty_like(logits) : at::empty({0}, logits.options());
    }

    const LossInputs inputs(logits, target, alpha, alpha_tensor, reduction, ignore_index,
                            ood_index);
    std::optional<RowView> output;
    if (unit_gradient) {
      output.emplace(rows_to_write(grad_logits));
    }

    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, logits.scalar_type(), "outlier_exposure_loss", [&] {
          using acc_t = at::opmath_type<scalar_t>;
          ForwardArgs<scalar_t, acc_t> args;
          inputs.fill(args);
          if (save_cross_entropy) {
            args.row_cross_entropy = row_cross_entropy.template mutable_data_ptr<acc_t>();
          }
          if (save_for_backward) {
            args.row_max = row_max.template mutable_data_ptr<acc_t>();
            args.row_sum_exp = row_sum_exp.template mutable_data_ptr<acc_t>();
          }
          if (reduces) {
            args.output.loss = loss.template mutable_data_ptr<acc_t>();
            args.output.counts = counts.template mutable_data_ptr<int64_t>();
          } else {
            args.row_loss = loss.template mutable_data_ptr<acc_t>();
          }
          if (output.has_value()) {
            args.grad_layout = output->layout;
            cut_alike(args.layout, args.grad_layout);
            args.grad_logits = output->tensor.template mutable_data_ptr<scalar_t>();
          }
          check_labels(Backend::forward(args), inputs.labels(), target);
        });
    if (output.has_value() && !output->tensor.is_same(grad_logits)) {
      grad_logits.copy_(output->tensor);
    }
    return {loss, row_cross_entropy, row_max, row_sum_exp, counts, grad_logits};
  }

  static void run_backward(const at::Tensor& grad_logits, bool has_unit_gradient,
                           const at::Tensor& grad, const at::Tensor& logits,
                           const at::Tensor& target, const at::Tensor& row_max,
                           const at::Tensor& row_sum_exp, const at::Tensor& counts, double alpha,
                           const OptionalTensor& alpha_tensor, std::string_view reduction_name,
                           OptionalInt ignore_index, OptionalInt ood_index) {
    const Reduction reduction = parse_reduction(reduction_name);
    check_alpha(logits, target, alpha, alpha_tensor);
    check_backward(grad, logits, target, row_max, row_sum_exp, counts, reduction);
    if (grad_logits.numel() == 0) {
      return;
    }
    const c10::DeviceGuard guard(logits.device());

    const LossInputs inputs(logits, target, alpha, alpha_tensor, reduction, ignore_index,
                            ood_index);
    const RowView output = rows_to_write(grad_logits);
    const bool in_place = output.tensor.is_same(grad_logits);
    const at::Tensor maxima = row_max.contiguous();
    const at::Tensor sums_exp = row_sum_exp.contiguous();
    const at::Tensor group_counts = counts.contiguous();
    const RowVector upstream(grad, target, loss_dtype(logits));

    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, logits.scalar_type(), "outlier_exposure_loss_backward", [&] {
          using acc_t = at::opmath_type<scalar_t>;
          BackwardArgs<scalar_t, acc_t> args;
          inputs.fill(args);
          args.grad_layout = output.layout;
          cut_alike(args.layout, args.grad_layout);
          args.grad_logits = output.tensor.template mutable_data_ptr<scalar_t>();
          args.grad = upstream.template per_row<acc_t>();
          args.row_max = maxima.template const_data_ptr<acc_t>();
          args.row_sum_exp = sums_exp.template const_data_ptr<acc_t>();
          args.counts = reduction == Reduction::kNone
                            ? nullptr
                            : group_counts.template const_data_ptr<int64_t>();
          args.has_unit_gradient = has_unit_gradient && in_place;
          check_labels(Backend::backward(args), inputs.labels(), target);
        });
    if (!in_place) {
      grad_logits.copy_(output.tensor);
    }
  }
};

}  // namespace oe_ext
