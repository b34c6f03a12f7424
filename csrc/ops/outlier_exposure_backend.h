// The entry points of the CPU and CUDA backends. They take tensors, pass raw pointers to the
// kernels and return tensors. A backend supplies two static function templates:
//     forward(ForwardArgs)    the outputs whose pointers are set: the loss, the statistics of every
//                             row, the gradient for an upstream gradient of 1
//     backward(BackwardArgs)  the gradient of every row
// and kSpreadsSmoothing: whether they run on the host, where the values of class weights are
// checked and make RowArgs::class_spread. ATen operators do its work for other backends. Both
// return the first row with an illegal label, or -1. A device that would need a synchronisation for
// that asserts in its kernel and returns -1.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/ops/div.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mean.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../core/kernel_args.h"
#include "checks.h"
#include "outlier_exposure_composed.h"
#include "row_view.h"

namespace oe_ext {

inline Labels make_labels(const at::Tensor& contiguous_target, const LossInputs& inputs) {
  const auto value = [](const OptionalSymInt& number, int64_t other) {
    return number.has_value() ? number->guard_int(__FILE__, __LINE__) : other;
  };
  const LossOptions& options = inputs.options;
  Labels labels;
  labels.data = contiguous_target.const_data_ptr();
  labels.type = *label_type(contiguous_target.scalar_type());
  labels.rule.num_classes = value(options.num_classes, inputs.logits.size(1));
  labels.rule.first_class = options.first_class.guard_int(__FILE__, __LINE__);
  labels.rule.ignore_index = value(options.ignore_index, 0);
  labels.rule.ood_index = value(options.ood_index, 0);
  labels.rule.has_ignore_index = options.ignore_index.has_value();
  labels.rule.has_ood_index = options.ood_index.has_value();
  return labels;
}

// A tensor that broadcasts against `target`, in the dtype of the arithmetic. A single value (an
// expanded gradient, a scalar alpha) stays one value; anything else is laid out row by row.
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

// The inputs of the loss but the logits, as the kernels read them in both directions. Keeps the
// tensors alive.
class RowOptions {
 public:
  RowOptions(const LossInputs& inputs, const OptionalTensor& counts, bool spreads_smoothing)
      : target_(inputs.target.contiguous()),
        labels_(make_labels(target_, inputs)),
        alpha_(inputs.options.alpha),
        label_smoothing_(inputs.options.label_smoothing),
        divisor_rule_(inputs.options.reduction.divisors) {
    if (inputs.alpha_tensor.has_value()) {
      alphas_.emplace(*inputs.alpha_tensor, inputs.target, loss_dtype(inputs.logits));
    }
    if (inputs.weight.has_value()) {
      class_weights_ = inputs.weight->to(loss_dtype(inputs.logits)).contiguous();
      if (spreads_smoothing) {
        spread_smoothing();
      }
    }
    if (counts.has_value() && counts->numel() > 0) {
      counts_ = counts->contiguous();
    }
  }

  const Labels& labels() const { return labels_; }

  template <typename scalar_t, typename acc_t>
  void fill(RowArgs<scalar_t, acc_t>& args) const {
    args.labels = labels_;
    args.alpha.value = static_cast<acc_t>(alpha_);
    if (alphas_.has_value()) {
      args.alpha.values = alphas_->template per_row<acc_t>();
    }
    if (class_weights_.defined()) {
      args.class_weights.data = class_weights_.template const_data_ptr<acc_t>();
    }
    if (class_spread_.defined()) {
      args.class_spread = class_spread_.template const_data_ptr<acc_t>();
      args.spread_smoothing = {static_cast<acc_t>(1 - label_smoothing_),
                               static_cast<acc_t>(label_smoothing_ * mean_class_weight_)};
    }
    args.label_smoothing = static_cast<acc_t>(label_smoothing_);
    args.divisor_rule = divisor_rule_;
    if (counts_.defined()) {
      args.counts = counts_.const_data_ptr<double>();
    }
  }

 private:
  void spread_smoothing() {
    check_weight_values(class_weights_);
    if (label_smoothing_ != 0) {
      mean_class_weight_ = class_weights_.mean(at::kDouble).item<double>();
    }
    if (mean_class_weight_ != 0) {
      class_spread_ = class_weights_.div(mean_class_weight_);
    }
  }

  at::Tensor target_;
  Labels labels_;
  double alpha_;
  std::optional<RowVector> alphas_;
  at::Tensor class_weights_;
  at::Tensor class_spread_;
  double mean_class_weight_ = 0;
  double label_smoothing_;
  DivisorRule divisor_rule_;
  at::Tensor counts_;
};

class KernelInputs {
 public:
  KernelInputs(const LossInputs& inputs, const OptionalTensor& counts, bool spreads_smoothing)
      : logits_(rows_to_read(inputs.logits)), options_(inputs, counts, spreads_smoothing) {}

  const Labels& labels() const { return options_.labels(); }

  template <typename scalar_t, typename acc_t>
  void fill(RowArgs<scalar_t, acc_t>& args) const {
    args.layout = logits_.layout;
    args.logits = logits_.tensor.template const_data_ptr<scalar_t>();
    options_.fill(args);
  }

 private:
  RowView logits_;
  RowOptions options_;
};

// A gradient of the logits that the kernels write, directly or through a buffer.
class KernelGradient {
 public:
  explicit KernelGradient(const at::Tensor& gradient)
      : gradient_(gradient), view_(rows_to_write(gradient)) {}

  bool is_in_place() const { return view_.tensor.is_same(gradient_); }

  template <typename scalar_t, typename acc_t>
  void fill(RowArgs<scalar_t, acc_t>& args) const {
    args.grad_layout = view_.layout;
    split_batch_alike(args.layout, args.grad_layout);
    args.grad_logits = view_.tensor.template mutable_data_ptr<scalar_t>();
  }

  // Call after the kernels.
  void finish() const {
    if (!is_in_place()) {
      gradient_.copy_(view_.tensor);
    }
  }

 private:
  const at::Tensor& gradient_;
  RowView view_;
};

template <typename Backend>
struct BackendKernels {
  static at::Tensor loss(const LossInputs& inputs) {
    return is_composed(inputs)
               ? std::get<0>(forward(inputs, std::nullopt, /*unit_gradient=*/false))
               : std::get<0>(run_forward(inputs, std::nullopt, /*for_backward=*/false, false,
                                         /*keeps_cross_entropy=*/false));
  }

  static ForwardResult forward(const LossInputs& inputs, const OptionalTensor& counts,
                               std::optional<bool> unit_gradient) {
    const bool writes_gradient = unit_gradient.value_or(false);
    if (!is_composed(inputs)) {
      return run_forward(inputs, counts, /*for_backward=*/true, writes_gradient,
                         /*keeps_cross_entropy=*/inputs.alpha_tensor.has_value());
    }
    check_inputs(inputs);
    LossInputs of_weights = inputs;
    of_weights.options.label_smoothing = 0;
    return with_weighted_smoothing(
        inputs, run_forward(of_weights, counts, /*for_backward=*/true, false, true),
        writes_gradient);
  }

  static at::Tensor backward(const at::Tensor& grad, const LossInputs& inputs,
                             const RowStatistics& statistics) {
    check_inputs(inputs);
    at::Tensor grad_logits = at::empty_like(inputs.logits);
    run_backward(grad_logits, /*has_unit_gradient=*/false, grad, inputs, statistics);
    return grad_logits;
  }

  static void backward_from_unit(at::Tensor& unit_gradient, const at::Tensor& grad,
                                 const LossInputs& inputs, const RowStatistics& statistics) {
    check_inputs(inputs);
    check_unit_gradient(unit_gradient, inputs);
    run_backward(unit_gradient, /*has_unit_gradient=*/true, grad, inputs, statistics);
  }

 private:
  static bool is_composed(const LossInputs& inputs) {
    return !Backend::kSpreadsSmoothing && inputs.weight.has_value() &&
           inputs.options.label_smoothing != 0;
  }

  static ForwardResult run_forward(const LossInputs& inputs, const OptionalTensor& given_counts,
                                   bool for_backward, bool writes_gradient,
                                   bool keeps_cross_entropy) {
    const at::Tensor& logits = inputs.logits;
    const at::Tensor& target = inputs.target;
    check_inputs(inputs);
    check_forward(inputs, given_counts, writes_gradient);
    const c10::DeviceGuard guard(logits.device());

    const auto options = logits.options().dtype(loss_dtype(logits));
    const bool is_scalar = inputs.options.reduction.is_scalar;
    const auto per_row = [&](bool needed) {
      return needed ? at::empty(target.sizes(), options) : at::empty({0}, options);
    };
    at::Tensor loss = is_scalar ? at::empty({}, options) : per_row(true);
    at::Tensor row_cross_entropy = for_backward ? per_row(keeps_cross_entropy) : at::Tensor();
    at::Tensor row_max = for_backward ? per_row(true) : at::Tensor();
    at::Tensor row_sum_exp = for_backward ? per_row(true) : at::Tensor();
    at::Tensor counts = at::empty({is_scalar ? 2 : 0}, options.dtype(at::kDouble));
    at::Tensor unit_gradient;
    if (for_backward) {
      unit_gradient = writes_gradient ? at::empty_like(logits) : at::empty({0}, logits.options());
    }

    const KernelInputs kernel_inputs(inputs, given_counts, Backend::kSpreadsSmoothing);
    std::optional<KernelGradient> gradient;
    if (writes_gradient) {
      gradient.emplace(unit_gradient);
    }

    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, logits.scalar_type(), "outlier_exposure_loss", [&] {
          using acc_t = at::opmath_type<scalar_t>;
          ForwardArgs<scalar_t, acc_t> args;
          kernel_inputs.fill(args);
          if (keeps_cross_entropy) {
            args.row_cross_entropy = row_cross_entropy.template mutable_data_ptr<acc_t>();
          }
          if (for_backward) {
            args.row_max = row_max.template mutable_data_ptr<acc_t>();
            args.row_sum_exp = row_sum_exp.template mutable_data_ptr<acc_t>();
          }
          if (is_scalar) {
            args.output.loss = loss.template mutable_data_ptr<acc_t>();
            args.output.counts = counts.template mutable_data_ptr<double>();
          } else {
            args.row_loss = loss.template mutable_data_ptr<acc_t>();
          }
          if (gradient.has_value()) {
            gradient->fill(args);
          }
          check_labels(Backend::forward(args), kernel_inputs.labels(), target);
        });
    if (gradient.has_value()) {
      gradient->finish();
    }
    return {loss, row_cross_entropy, row_max, row_sum_exp, counts, unit_gradient};
  }

  static void run_backward(const at::Tensor& grad_logits, bool has_unit_gradient,
                           const at::Tensor& grad, const LossInputs& inputs,
                           const RowStatistics& statistics) {
    check_backward(grad, inputs, statistics);
    if (grad_logits.numel() == 0) {
      return;
    }
    const at::Tensor& logits = inputs.logits;
    const c10::DeviceGuard guard(logits.device());
    if (is_composed(inputs)) {
      grad_logits.copy_(composed_gradient(grad, inputs, statistics.counts));
      return;
    }

    const KernelInputs kernel_inputs(inputs, statistics.counts, Backend::kSpreadsSmoothing);
    const KernelGradient gradient(grad_logits);
    const at::Tensor row_max = statistics.row_max.contiguous();
    const at::Tensor row_sum_exp = statistics.row_sum_exp.contiguous();
    const RowVector upstream(grad, inputs.target, loss_dtype(logits));

    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, logits.scalar_type(), "outlier_exposure_loss_backward", [&] {
          using acc_t = at::opmath_type<scalar_t>;
          BackwardArgs<scalar_t, acc_t> args;
          kernel_inputs.fill(args);
          gradient.fill(args);
          args.grad = upstream.template per_row<acc_t>();
          args.row_max = row_max.template const_data_ptr<acc_t>();
          args.row_sum_exp = row_sum_exp.template const_data_ptr<acc_t>();
          args.has_unit_gradient = has_unit_gradient && gradient.is_in_place();
          check_labels(Backend::backward(args), kernel_inputs.labels(), inputs.target);
        });
    gradient.finish();
  }
};

// Registers every operator for the dispatch key of a backend.
template <typename Backend>
void register_backend(torch::Library& m) {
  OutlierExposureKernels<BackendKernels<Backend>>::register_for(m);
}

}  // namespace oe_ext
