// The kernels before and after the rows: the counts of both groups, by which the gradient of a mean
// is divided, and the loss from the sums of all blocks.
#pragma once

#include "device.cuh"

namespace oe_ext::cuda {

// The block size, and the launch bound.
constexpr int kReduceThreads = 256;

// The counts of each block's labels.
// Work split:  a thread of the grid takes 16 bytes in turn, four at once; a block merges its
// threads Reads:       labels [num_rows], 1 pass, 16 bytes at once; class_weights [num_classes]
// Writes:      partials [gridDim.x]
// Shared mem:  merge_block's     Sync: merge_block's; the loop before it has no barrier
// Numerics:    double
// Assumes:     blockDim.x is a multiple of 32 (launch_cuda.cu)
// Used when:   the forward writes the gradient of a mean, or there are class weights; many rows
template <typename acc_t>
__global__ void __launch_bounds__(kReduceThreads, kMinBlocks)
    outlier_exposure_count_rows_kernel(Labels labels, ClassWeights<acc_t> class_weights,
                                       int64_t num_rows, GroupCounts* partials) {
  const GroupCounts counts =
      count_labels(labels, class_weights, num_rows, grid_thread(), grid_threads());
  if (threadIdx.x == 0) {
    partials[blockIdx.x] = counts;
  }
}

// Writes the loss and the counts of all rows. All threads of a block must call it.
template <typename acc_t>
__device__ void write_loss(const LossOutput<acc_t>& output, const DivisorRule& rule,
                           const double* counts, int64_t num_rows, const Partials& partials) {
  GroupSums sums = merge_partials(partials.sums, partials.num_sums);
  if (partials.counts != nullptr) {
    sums.counts = merge_partials(partials.counts, partials.num_counts);
  }
  if (threadIdx.x == 0) {
    output.write(sums, rule, counts, num_rows);
  }
}

// The loss and the counts of all rows.
// Work split:  one block; thread i takes partials i, i + threads, ...
// Reads:       partials.sums [num_sums]; partials.counts [num_counts], if there; counts [2], if
// given Writes:      loss, counts Shared mem:  merge_block's     Sync: merge_block's Numerics:
// double; the loss is cast once Assumes:     gridDim.x is 1, blockDim.x a multiple of 32
// (launch_cuda.cu) Used when:   the reduction is not none; after the rows
template <typename acc_t>
__global__ void __launch_bounds__(kReduceThreads, kMinBlocks)
    outlier_exposure_write_loss_kernel(LossOutput<acc_t> output, DivisorRule rule,
                                       const double* counts, int64_t num_rows, Partials partials) {
  write_loss(output, rule, counts, num_rows, partials);
}

}  // namespace oe_ext::cuda
