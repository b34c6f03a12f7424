// The entry points of a backend with kernels for upsampled logits, like those of
// outlier_exposure_backend.h. The backend supplies the same two function templates for
// UpsampledForwardArgs and UpsampledBackwardArgs, and fits_upsampled(num_classes, is_double): do
// its kernels take so many classes?
#pragma once

#include "../core/upsampled_args.h"
#include "outlier_exposure_backend.h"
#include "upsampled_outlier_exposure_composed.h"

namespace oe_ext {

template <typename Backend>
struct UpsampledBackendKernels {
  static at::Tensor loss(const UpsampledInputs& inputs) {
    return inputs.has_equal_sizes()
               ? call_loss(inputs.loss)
               : forward(inputs, std::nullopt, {false, /*unit_gradient=*/false}).loss;
  }

  static UpsampledResult forward(const UpsampledInputs& inputs, const OptionalTensor& given_counts,
                                 const UpsampledOutputs& outputs) {
    // No structured binding: clang 14 lets no lambda capture one.
    const at::Tensor& logits = inputs.loss.logits;
    const at::Tensor& target = inputs.loss.target;
    const bool writes_gradient = outputs.unit_gradient.value_or(false);
    check_upsampled_inputs(inputs);
    check_forward(inputs.loss, given_counts, writes_gradient);
    const c10::DeviceGuard guard(logits.device());
    if (is_composed(inputs)) {
      return ComposedUpsampling::forward(inputs, given_counts, outputs);
    }

    const auto of_loss = logits.options().dtype(loss_dtype(logits));
    const bool is_scalar = inputs.loss.options.reduction.is_scalar;
    const auto per_row = [&](bool needed, const at::TensorOptions& of) {
      return needed ? at::empty(target.sizes(), of) : at::empty({0}, of);
    };
    const bool has_alpha = inputs.loss.alpha_tensor.has_value();
    const UpsampledResult result = {
        is_scalar ? at::empty({}, of_loss) : per_row(true, of_loss),
        per_row(has_alpha, of_loss),
        per_row(outputs.statistics, of_loss),
        per_row(outputs.statistics, of_loss),
        per_row(outputs.statistics, of_loss.dtype(at::kInt)),
        at::empty({is_scalar ? 2 : 0}, of_loss.dtype(at::kDouble)),
        writes_gradient ? at::empty_like(logits, of_loss) : at::empty({0}, of_loss)};

    const RowOptions options_of_rows(inputs.loss, given_counts, /*spreads_smoothing=*/false);
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, logits.scalar_type(), "outlier_exposure_loss", [&] {
          using acc_t = at::opmath_type<scalar_t>;
          UpsampledForwardArgs<scalar_t, acc_t> args;
          options_of_rows.fill(args.rows);
          set_sizes(inputs, args);
          ForwardArgs<acc_t, acc_t>& rows = args.rows;
          if (has_alpha) {
            rows.row_cross_entropy = result.row_cross_entropy.template mutable_data_ptr<acc_t>();
          }
          if (outputs.statistics) {
            rows.row_max = result.row_max.template mutable_data_ptr<acc_t>();
            rows.row_sum_exp = result.row_sum_exp.template mutable_data_ptr<acc_t>();
            args.row_argmax = result.row_argmax.template mutable_data_ptr<int32_t>();
          }
          if (is_scalar) {
            rows.output.loss = result.loss.template mutable_data_ptr<acc_t>();
            rows.output.counts = result.counts.template mutable_data_ptr<double>();
          } else {
            rows.row_loss = result.loss.template mutable_data_ptr<acc_t>();
          }
          if (writes_gradient) {
            set_gradient(result.unit_gradient, args);
          }
          check_labels(Backend::forward(args), rows.labels, target);
        });
    return result;
  }

  static at::Tensor backward(const at::Tensor& grad, const UpsampledInputs& inputs,
                             const at::Tensor& counts) {
    const at::Tensor& logits = inputs.loss.logits;
    const at::Tensor& target = inputs.loss.target;
    check_upsampled_inputs(inputs);
    check_upstream("_upsampled_outlier_exposure_loss_backward", grad, inputs.loss, counts);
    const c10::DeviceGuard guard(logits.device());
    if (is_composed(inputs)) {
      return ComposedUpsampling::backward(grad, inputs, counts);
    }
    const at::Tensor gradient = at::empty_like(logits, logits.options().dtype(loss_dtype(logits)));
    const RowOptions options_of_rows(inputs.loss, counts, /*spreads_smoothing=*/false);
    const RowVector upstream(grad, target, loss_dtype(logits));
    AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, logits.scalar_type(), "outlier_exposure_loss_backward", [&] {
          using acc_t = at::opmath_type<scalar_t>;
          UpsampledBackwardArgs<scalar_t, acc_t> args;
          options_of_rows.fill(args.rows);
          set_sizes(inputs, args);
          args.rows.grad = upstream.template per_row<acc_t>();
          set_gradient(gradient, args);
          check_labels(Backend::backward(args), args.rows.labels, target);
        });
    return gradient.to(logits.scalar_type());
  }

 private:
  // What the kernels do not do: fewer pixels than logits, class weights with label smoothing, and
  // what does not fit them.
  static bool is_composed(const UpsampledInputs& inputs) {
    const auto& [logits, target, alpha_tensor, weight, options] = inputs.loss;
    const bool is_smaller = target.size(1) < logits.size(2) || target.size(2) < logits.size(3);
    return (target.numel() > 0 && is_smaller) ||
           (weight.has_value() && options.label_smoothing != 0) || !Backend::fits(inputs);
  }

  template <typename scalar_t, typename Rows>
  static void set_sizes(const UpsampledInputs& inputs, UpsampledArgs<scalar_t, Rows>& args) {
    const at::Tensor& logits = inputs.loss.logits;
    const at::Tensor& target = inputs.loss.target;
    args.logits = view(logits, logits.const_data_ptr<scalar_t>());
    args.num_images = logits.size(0);
    args.vertical = {logits.size(2), target.size(1), inputs.align_corners};
    args.horizontal = {logits.size(3), target.size(2), inputs.align_corners};
    args.rows.layout.num_outer = 1;
    args.rows.layout.num_inner = target.numel();
    args.rows.layout.num_classes = logits.size(1);
  }

  template <typename T>
  static ImageView<T> view(const at::Tensor& tensor, T* data) {
    return {data, tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
  }

  template <typename Args>
  static void set_gradient(const at::Tensor& gradient, Args& args) {
    using acc_t = std::remove_pointer_t<decltype(args.grad.data)>;
    acc_t* data = gradient.template mutable_data_ptr<acc_t>();
    args.grad = view(gradient, data);
    args.rows.grad_logits = data;
    if (args.rows.layout.num_inner == 0) {
      gradient.zero_();  // no pixel: nothing else writes it
    }
  }
};

template <typename Backend>
void register_upsampled_backend(torch::Library& m) {
  UpsampledKernels<UpsampledBackendKernels<Backend>>::register_for(m);
}

}  // namespace oe_ext
