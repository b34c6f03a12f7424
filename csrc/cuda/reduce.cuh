// The sum of the row losses and the counts of both groups, in two steps and without atomics: the
// same bits every time. The grid depends on the number of rows alone.
#pragma once

#include "device.cuh"

namespace oe_ext::cuda {

// Step 1: the sums of each block.
// Work split:  thread i of all takes rows i, i + threads, ...; a block merges its threads
// Reads:       row_loss and labels [num_rows]
// Writes:      partials [gridDim.x]
// Shared mem:  merge_block's     Sync: merge_block's; the loop before it has no barrier
// Numerics:    double, for every dtype
// Assumes:     blockDim.x is a multiple of 32 (launch.cu)
// Used when:   the reduction is not none
template <typename acc_t>
__global__ void outlier_exposure_reduce_rows_kernel(ReduceArgs<acc_t> args, GroupSums* partials) {
  GroupSums sums;
  const int64_t num_threads = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < args.num_rows;
       row += num_threads) {
    args.add_row(sums, row);
  }
  sums = merge_block(sums);
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = sums;
  }
}

// Step 2: the sums of all blocks, and the loss.
// Work split:  one block; thread i takes partials i, i + threads, ...
// Reads:       partials [num_partials]
// Writes:      loss, counts
// Shared mem:  merge_block's     Sync: merge_block's
// Numerics:    double; the loss is cast once
// Assumes:     gridDim.x is 1, blockDim.x a multiple of 32 (launch.cu)
// Used when:   after step 1
template <typename acc_t>
__global__ void outlier_exposure_reduce_partials_kernel(ReduceArgs<acc_t> args,
                                                        const GroupSums* partials,
                                                        int num_partials) {
  GroupSums sums;
  for (int i = static_cast<int>(threadIdx.x); i < num_partials; i += static_cast<int>(blockDim.x)) {
    sums.merge(partials[i]);
  }
  sums = merge_block(sums);
  if (threadIdx.x == 0) {
    args.write(sums);
  }
}

}  // namespace oe_ext::cuda
