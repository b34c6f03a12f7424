// Every kernel in every dtype, and no launcher: what ptxas and the disassembler look at. Needs
// c10's headers from any build of torch, and no CUDA build of it.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "../../csrc/cuda/pixels.cuh"
#include "../../csrc/cuda/reduce.cuh"
#include "../../csrc/cuda/rows.cuh"
#include "../../csrc/cuda/upsampled.cuh"

namespace oe_ext::cuda {

#define OE_EXT_INSTANTIATE(scalar_t, acc_t, kSize)                                          \
  template __global__ void outlier_exposure_forward_rows_kernel<scalar_t, acc_t, kSize>(    \
      ForwardArgs<scalar_t, acc_t>, Partials, int, int);                                    \
  template __global__ void outlier_exposure_backward_rows_kernel<scalar_t, acc_t, kSize>(   \
      BackwardArgs<scalar_t, acc_t>, int);                                                  \
  template __global__ void outlier_exposure_forward_pixels_kernel<scalar_t, acc_t, kSize>(  \
      ForwardArgs<scalar_t, acc_t>, Partials, int);                                         \
  template __global__ void outlier_exposure_backward_pixels_kernel<scalar_t, acc_t, kSize>( \
      BackwardArgs<scalar_t, acc_t>)
#define OE_EXT_INSTANTIATE_UPSAMPLED(scalar_t, acc_t, kSize)                                   \
  template __global__ void outlier_exposure_forward_upsampled_kernel<scalar_t, acc_t, kSize>(  \
      UpsampledForwardArgs<scalar_t, acc_t>, Partials, UpsampledPlan, acc_t*);                 \
  template __global__ void outlier_exposure_backward_upsampled_kernel<scalar_t, acc_t, kSize>( \
      UpsampledBackwardArgs<scalar_t, acc_t>, UpsampledPlan, acc_t*)
#define OE_EXT_INSTANTIATE_DTYPE(scalar_t, acc_t)             \
  OE_EXT_INSTANTIATE(scalar_t, acc_t, 1);                     \
  OE_EXT_INSTANTIATE(scalar_t, acc_t, kVectorSize<scalar_t>); \
  OE_EXT_INSTANTIATE_UPSAMPLED(scalar_t, acc_t, 2)
OE_EXT_INSTANTIATE_DTYPE(double, double);
OE_EXT_INSTANTIATE_DTYPE(float, float);
OE_EXT_INSTANTIATE_UPSAMPLED(float, float, 4);
OE_EXT_INSTANTIATE_DTYPE(c10::Half, float);
OE_EXT_INSTANTIATE_UPSAMPLED(c10::Half, float, 4);
OE_EXT_INSTANTIATE_DTYPE(c10::BFloat16, float);
OE_EXT_INSTANTIATE_UPSAMPLED(c10::BFloat16, float, 4);

#define OE_EXT_INSTANTIATE_ACC(acc_t)                                                              \
  template __global__ void outlier_exposure_count_rows_kernel<acc_t>(Labels, ClassWeights<acc_t>,  \
                                                                     int64_t, GroupCounts*);       \
  template __global__ void outlier_exposure_write_loss_kernel<acc_t>(                              \
      LossOutput<acc_t>, DivisorRule, const double*, int64_t, Partials);                           \
  template __global__ void outlier_exposure_add_bands_kernel<acc_t>(                               \
      ImageView<acc_t>, int64_t, int64_t, int64_t, UpsampledPlan, const acc_t*, LossOutput<acc_t>, \
      DivisorRule, const double*, int64_t, Partials)
OE_EXT_INSTANTIATE_ACC(double);
OE_EXT_INSTANTIATE_ACC(float);

}  // namespace oe_ext::cuda
