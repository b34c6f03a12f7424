// The launchers: they choose kernel, grid, block and vector width. No ATen, so that nvcc reads them
// in seconds and the CPU harness can run them too.
#pragma once

#include "../kernel_args.h"

#ifndef SIMT_CPU
#include <cuda_runtime_api.h>
#endif

namespace oe_ext::cuda {

#ifdef SIMT_CPU
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

template <typename scalar_t, typename acc_t>
void forward(const ForwardArgs<scalar_t, acc_t>& args, Stream stream);

template <typename scalar_t, typename acc_t>
void backward(const BackwardArgs<scalar_t, acc_t>& args, Stream stream);

// How many partial sums reduce() needs room for.
int num_partials(int64_t num_rows);

template <typename acc_t>
void reduce(const ReduceArgs<acc_t>& args, GroupSums* partials, Stream stream);

}  // namespace oe_ext::cuda
