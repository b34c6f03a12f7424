// The Outlier Exposure loss for libtorch users. Link with oe_ext::oe_ext; the operator works with
// autograd, on every device that the library was built for.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string_view>

namespace oe_ext {

// Cross-entropy on labelled positions plus alpha times cross-entropy to the uniform distribution on
// outliers (Hendrycks et al., ICLR 2019, arXiv 1812.04606).
//
//   logits        [N, C] or [N, C, d1, ..., dk]; float16, bfloat16, float32 or float64
//   target        [N] or [N, d1, ..., dk]; int64, int32, int16, int8, uint8, uint16 or uint32.
//                 A class, or a negative number for an outlier
//   alpha         weight of the outliers; finite
//   reduction     "none", "sum", "mean" or "group_mean"
//   ignore_index  positions with this label count for nothing
//   ood_index     the label of outliers, instead of the negative numbers
//   weight        [C], floating point: weights of the inliers by class; finite and not negative. A
//                 mean divides by their sum instead of the number of inliers
//   label_smoothing  in [0, 1]: the part of an inlier's distribution that is uniform
//
// Returns float32 (float64 for float64 logits): a scalar, or target's shape for "none".
// Throws c10::ValueError, c10::TypeError, c10::IndexError (CPU: a label that is none of the above).
__attribute__((visibility("default"))) at::Tensor outlier_exposure_loss(
    const at::Tensor& logits, const at::Tensor& target, double alpha = 0.5,
    std::string_view reduction = "mean", std::optional<int64_t> ignore_index = std::nullopt,
    std::optional<int64_t> ood_index = std::nullopt,
    const std::optional<at::Tensor>& weight = std::nullopt, double label_smoothing = 0.0);

// The same with a tensor alpha, which broadcasts against target and gets a gradient.
__attribute__((visibility("default"))) at::Tensor outlier_exposure_loss(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& alpha,
    std::string_view reduction = "mean", std::optional<int64_t> ignore_index = std::nullopt,
    std::optional<int64_t> ood_index = std::nullopt,
    const std::optional<at::Tensor>& weight = std::nullopt, double label_smoothing = 0.0);

// The loss of the logits [N, C, h, w] of a segmentation network, as if they were interpolated to
// the size of a target [N, H, W], bilinearly as torch.nn.functional.interpolate does; on the CPU
// without logits of that size. Also throws c10::ValueError for other ranks.
__attribute__((visibility("default"))) at::Tensor upsampled_outlier_exposure_loss(
    const at::Tensor& logits, const at::Tensor& target, double alpha = 0.5,
    std::string_view reduction = "mean", std::optional<int64_t> ignore_index = std::nullopt,
    std::optional<int64_t> ood_index = std::nullopt, bool align_corners = false,
    const std::optional<at::Tensor>& weight = std::nullopt, double label_smoothing = 0.0);

__attribute__((visibility("default"))) at::Tensor upsampled_outlier_exposure_loss(
    const at::Tensor& logits, const at::Tensor& target, const at::Tensor& alpha,
    std::string_view reduction = "mean", std::optional<int64_t> ignore_index = std::nullopt,
    std::optional<int64_t> ood_index = std::nullopt, bool align_corners = false,
    const std::optional<at::Tensor>& weight = std::nullopt, double label_smoothing = 0.0);

}  // namespace oe_ext
