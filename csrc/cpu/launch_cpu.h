// Runs the CPU kernels over all threads. forward and backward return the first row with an illegal
// label, or -1.
#pragma once

#include "../core/upsampled_args.h"

namespace oe_ext::cpu {

// The instruction set of the kernels in use: "AVX512", "AVX2", or "DEFAULT".
const char* capability();

template <typename scalar_t, typename acc_t>
int64_t forward(const ForwardArgs<scalar_t, acc_t>& args);

template <typename scalar_t, typename acc_t>
int64_t backward(const BackwardArgs<scalar_t, acc_t>& args);

// The same for upsampled logits.
template <typename scalar_t, typename acc_t>
int64_t forward(const UpsampledForwardArgs<scalar_t, acc_t>& args);

template <typename scalar_t, typename acc_t>
int64_t backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args);

}  // namespace oe_ext::cpu
