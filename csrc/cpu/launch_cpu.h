// The kernels of the CPU, over all threads. forward and backward return the first row whose label
// is not legal, or -1.
#pragma once

#include "../core/kernel_args.h"

namespace oe_ext::cpu {

// The instruction set of the kernels that run: "AVX512", "AVX2", or "DEFAULT".
const char* capability();

template <typename scalar_t, typename acc_t>
int64_t forward(const ForwardArgs<scalar_t, acc_t>& args);

template <typename scalar_t, typename acc_t>
int64_t backward(const BackwardArgs<scalar_t, acc_t>& args);

}  // namespace oe_ext::cpu
