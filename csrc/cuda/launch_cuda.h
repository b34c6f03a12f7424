// The launchers: they choose kernel, grid, block and vector width. No ATen, so that nvcc reads them
// in seconds and the CPU harness can run them too. Which runs:
//
//   logits and gradient                    | kernel              | threads of a row
//   neighbours in memory are classes       | *_rows_kernel       | up to 1024 classes: lanes of a
//     ([N, C], channels_last)              |                     | warp; more: a block
//   neighbours are rows (contiguous        | *_pixels_kernel     | one, for one row or, with wide
//     [N, C, H, W], transposed [N, C])     |                     | loads, for several
//
// A thread moves 16 bytes at once along contiguous classes or pixels: rows from any address, if
// they are not short and the gradient is aligned alike; pixels if all classes are aligned, and the
// shared memory holds enough of them. Else it moves one element at a time. count_rows runs before
// the forward's kernel if a gradient, or a mean with class weights, needs counts that nobody gave
// and there are many rows, and write_loss after it if the loss is a scalar. Every dtype runs the
// same kernels: double in double, float, Half and BFloat16 in float.
//
// Upsampled logits have the *_upsampled_kernel in any layout, for patches of pixels of two sizes,
// and add_bands after it.
#pragma once

#include "../core/upsampled_args.h"

#ifndef SIMT_CPU
#include <cuda_runtime_api.h>
#endif

namespace oe_ext::cuda {

#ifdef SIMT_CPU
using Stream = void*;
#else
using Stream = cudaStream_t;
#endif

// Blocks of a grid, whose kernels stride over what is left; also the number of partial sums. More
// than fit a GPU at once would pay again for what a block does before its first row.
constexpr int64_t kMaxBlocks = 1024;
constexpr int64_t kMaxCountPartials = 512;
// Shared memory of a block: for merge_block, and what every GPU gives to the stage without being
// asked in advance.
constexpr int64_t kStaticSharedBytes = 4 * 1024;
constexpr int64_t kDefaultStageBytes = 48 * 1024 - kStaticSharedBytes;

// What forward() needs for its partial sums, aligned to 16 bytes.
constexpr int64_t kScratchBytes =
    kMaxBlocks * sizeof(GroupSums) + kMaxCountPartials * sizeof(GroupCounts);

template <typename scalar_t, typename acc_t>
void forward(const ForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream);

template <typename scalar_t, typename acc_t>
void backward(const BackwardArgs<scalar_t, acc_t>& args, Stream stream);

// Those of upsampled logits. A scratch of scratch_bytes(), aligned to 16 bytes.
template <typename scalar_t, typename acc_t>
void forward(const UpsampledForwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream);

template <typename scalar_t, typename acc_t>
void backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args, void* scratch, Stream stream);

template <typename Args>
int64_t scratch_bytes(const Args& args);

// Do the kernels take a target of this size? The gradients of all classes must fit the shared
// memory of the current device.
bool fits_upsampled(int64_t num_classes, int64_t height, int64_t width, bool is_double);

}  // namespace oe_ext::cuda
