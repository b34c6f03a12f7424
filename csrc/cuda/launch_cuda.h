// The launchers: they choose kernel, grid, block and vector width. No ATen, so that nvcc reads them
// in seconds and the CPU harness can run them too. Which runs:
//
//   logits and gradient                    | kernel              | threads of a row
//   neighbours in memory are classes       | *_rows_kernel       | up to 1024 classes: lanes of a
//     ([N, C], channels_last)              |                     | warp; more: a block of 256
//   neighbours are rows (contiguous        | *_pixels_kernel     | one, for one row or, with wide
//     [N, C, H, W], transposed [N, C])     |                     | loads, for several
//
// A thread moves 16 bytes at once if rows or pixels are aligned for it, else one element at a time;
// also pixels whose classes fit a block's shared memory only then. count_rows runs before the
// forward's kernel if a gradient, or a mean with class weights, needs counts that nobody gave, and
// write_loss after it if the loss is a scalar. Every dtype runs the same kernels: double in double,
// float, Half and BFloat16 in float.
#pragma once

#include "../core/kernel_args.h"

#ifndef SIMT_CPU
#include <cuda_runtime_api.h>
#endif

namespace oe_ext::cuda {

#ifdef SIMT_CPU
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

// Blocks of a grid, whose kernels stride over what is left; also the number of partial sums.
constexpr int64_t kMaxBlocks = 4096;
constexpr int64_t kMaxCountPartials = 128;
// Every GPU gives a block this much dynamic shared memory without being asked in advance.
constexpr int64_t kMaxStageBytes = 48 * 1024 - 4 * 1024;  // the rest is for merge_block

// What forward() needs for its partial sums, aligned to 16 bytes.
constexpr int64_t kScratchBytes =
    kMaxBlocks * sizeof(GroupSums) + kMaxCountPartials * sizeof(GroupCounts);

template <typename scalar_t, typename acc_t>
void forward(const ForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream);

template <typename scalar_t, typename acc_t>
void backward(const BackwardArgs<scalar_t, acc_t>& args, Stream stream);

}  // namespace oe_ext::cuda
