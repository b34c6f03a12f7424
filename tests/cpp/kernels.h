// The kernels under test: those of csrc/cpu (cpu_kernels.cpp), or those of csrc/cuda with one fiber
// per CUDA thread (simt_kernels.cpp). Both return the first row with an illegal label, or -1.
#pragma once

#include "core/kernel_args.h"

namespace oe_ext::testing {

template <typename scalar_t, typename acc_t>
int64_t run(const ForwardArgs<scalar_t, acc_t>& args);

template <typename scalar_t, typename acc_t>
int64_t run(const BackwardArgs<scalar_t, acc_t>& args);

// Follows their definitions.
#define OE_EXT_INSTANTIATE_RUN()               \
  OE_EXT_INSTANTIATE_RUN_OF(double, double);   \
  OE_EXT_INSTANTIATE_RUN_OF(float, float);     \
  OE_EXT_INSTANTIATE_RUN_OF(c10::Half, float); \
  OE_EXT_INSTANTIATE_RUN_OF(c10::BFloat16, float)
#define OE_EXT_INSTANTIATE_RUN_OF(scalar_t, acc_t)           \
  template int64_t run(const ForwardArgs<scalar_t, acc_t>&); \
  template int64_t run(const BackwardArgs<scalar_t, acc_t>&)

}  // namespace oe_ext::testing
