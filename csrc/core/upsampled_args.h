// The arguments of the kernels of the loss of upsampled logits. No ATen here.
#pragma once

#include "kernel_args.h"
#include "resize.h"

namespace oe_ext {

// The exponentials of a pixel are relative to what is interpolated between the largest logits of
// its corners. Sums of them that are smaller would have lost terms to underflow.
template <typename acc_t>
constexpr acc_t kMinSum = sizeof(acc_t) == 4 ? acc_t(0x1p-84) : acc_t(0x1p-900);

// A map [N, C, h, w] with its strides in elements.
template <typename T>
struct ImageView {
  T* data = nullptr;
  int64_t image_stride = 0;
  int64_t class_stride = 0;
  int64_t row_stride = 0;
  int64_t column_stride = 0;

  C10_HOST_DEVICE T* at(int64_t image, int64_t row) const {
    return data + image * image_stride + row * row_stride;
  }
};

// What does not depend on the type of the logits. `Rows` is the ForwardArgs or BackwardArgs of the
// pixels: their labels, options and outputs. The logits of a pixel are nowhere in memory, so its
// layout has sizes alone, and grad_logits only says whether there is a gradient to write.
template <typename Rows>
struct UpsampledMap {
  ResizeAxis vertical;
  ResizeAxis horizontal;
  int64_t num_images = 0;
  Rows rows;
  // The gradient of the logits, in the type of the arithmetic.
  ImageView<std::remove_pointer_t<decltype(Rows::grad_logits)>> grad;
  // Of each pixel, the class of the first of its largest logits; or null.
  int32_t* row_argmax = nullptr;

  C10_HOST_DEVICE int64_t num_classes() const { return rows.layout.num_classes; }
};

template <typename scalar_t, typename Rows>
struct UpsampledArgs : UpsampledMap<Rows> {
  ImageView<const scalar_t> logits;
};

template <typename scalar_t, typename acc_t>
using UpsampledForwardArgs = UpsampledArgs<scalar_t, ForwardArgs<acc_t, acc_t>>;
template <typename scalar_t, typename acc_t>
using UpsampledBackwardArgs = UpsampledArgs<scalar_t, BackwardArgs<acc_t, acc_t>>;

}  // namespace oe_ext
