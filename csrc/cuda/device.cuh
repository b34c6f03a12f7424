// What the kernels need from the device: wide loads, merges over a warp and a block, and a place
// for data that a thread reads twice.
#pragma once

#include <cstring>

#include "../core/kernel_args.h"

// Declares `name`, the dynamic shared memory of a launch.
#ifndef SIMT_CPU
#define OE_EXT_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif

namespace oe_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kVectorBytes = 16;

// The second launch bound: at least one block fits a multiprocessor. Without it nvcc spills
// registers to fit two, up to 288 bytes per thread.
constexpr int kMinBlocks = 1;

// Elements of one 16-byte load.
template <typename scalar_t>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(scalar_t));

// The index of this thread in its grid, and the number of threads. All offsets in a kernel start
// from these, or from blockIdx alone, in 64 bits.
__device__ inline int64_t grid_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ inline int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// kSize neighbouring elements, moved at once and aligned to their total size.
template <typename scalar_t, int kSize>
struct alignas(sizeof(scalar_t) * kSize) Vector {
  scalar_t values[kSize];
};

template <int kSize, typename scalar_t>
__device__ Vector<scalar_t, kSize> load_vector(const scalar_t* from) {
  return *reinterpret_cast<const Vector<scalar_t, kSize>*>(from);
}

template <int kSize, typename scalar_t>
__device__ void store_vector(scalar_t* to, const Vector<scalar_t, kSize>& vector) {
  *reinterpret_cast<Vector<scalar_t, kSize>*>(to) = vector;
}

// Dynamic shared memory for data that a thread reads twice. A thread reads back only what it wrote
// itself, so no barrier is needed.
template <typename Unit>
class Stage {
 public:
  // `slots` has room for some units per thread of the block. Null: nothing is kept, and the second
  // read comes from global memory.
  __device__ explicit Stage(unsigned char* slots) : slots_(reinterpret_cast<Unit*>(slots)) {}

  __device__ bool keeps() const { return slots_ != nullptr; }
  __device__ void put(int64_t slot, const Unit& unit) const { slots_[index(slot)] = unit; }
  __device__ Unit get(int64_t slot) const { return slots_[index(slot)]; }

 private:
  // Neighbouring threads use neighbouring slots: no bank conflicts.
  __device__ static int64_t index(int64_t slot) { return slot * blockDim.x + threadIdx.x; }

  Unit* slots_;
};

// The value of the lane whose index differs in the bits of `mask`.
template <typename T>
__device__ RowStats<T> shuffle_xor(const RowStats<T>& stats, int mask) {
  RowStats<T> other;
  other.max = __shfl_xor_sync(kFullMask, stats.max, mask);
  other.sum_exp = __shfl_xor_sync(kFullMask, stats.sum_exp, mask);
  other.sum_shifted = __shfl_xor_sync(kFullMask, stats.sum_shifted, mask);
  other.count = __shfl_xor_sync(kFullMask, stats.count, mask);
  return other;
}

__device__ inline GroupCounts shuffle_xor(const GroupCounts& counts, int mask) {
  GroupCounts other;
  other.inliers = __shfl_xor_sync(kFullMask, counts.inliers, mask);
  other.outliers = __shfl_xor_sync(kFullMask, counts.outliers, mask);
  return other;
}

__device__ inline GroupSums shuffle_xor(const GroupSums& sums, int mask) {
  GroupSums other;
  other.inliers = __shfl_xor_sync(kFullMask, sums.inliers, mask);
  other.outliers = __shfl_xor_sync(kFullMask, sums.outliers, mask);
  other.counts = shuffle_xor(sums.counts, mask);
  return other;
}

// Merges the values of each group of `lanes` neighbouring lanes, a power of two, and returns the
// result to all of them. All get the same bits, since merge() is commutative and the tree is
// symmetric. All 32 lanes of the warp must call it.
template <typename T>
__device__ T merge_lanes(T value, int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    value.merge(shuffle_xor(value, mask));
  }
  return value;
}

// Merges the values of a block in a fixed order and returns the result to all threads. All threads
// must call it, and the block must be whole warps.
//
// Shared mem:  one T per warp.
// Sync:        every warp waits for every warp's result; the second barrier keeps the next call
//              from overwriting results that a slow warp still reads.
template <typename T>
__device__ T merge_block(T value) {
  constexpr int kMaxWarps = 1024 / kWarpSize;
  constexpr int kWords = sizeof(T) / sizeof(unsigned long long);
  static_assert(sizeof(T) % sizeof(unsigned long long) == 0, "whole words");
  __shared__ unsigned long long results[kMaxWarps * kWords];

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = merge_lanes(value, kWarpSize);
  if (lane == 0) {
    std::memcpy(results + warp * kWords, &value, sizeof(T));
  }
  __syncthreads();
  T other;
  if (lane < num_warps) {
    std::memcpy(&other, results + lane * kWords, sizeof(T));
  }
  value = merge_lanes(other, kWarpSize);
  __syncthreads();
  return value;
}

// Values that one kernel of a call leaves for the next, one per block. The next kernel sums them in
// a fixed order and without atomics, so the bits are the same every time.
struct Partials {
  GroupCounts* counts = nullptr;  // [num_counts], from count_rows; or null
  GroupSums* sums = nullptr;      // [num_sums], from the forward; null for none
  int num_counts = 0;
  int num_sums = 0;
};

// Merges an array; returns the result to every thread of the block.
template <typename T>
__device__ T merge_partials(const T* partials, int num_partials) {
  T total;
  for (int i = static_cast<int>(threadIdx.x); i < num_partials; i += static_cast<int>(blockDim.x)) {
    total.merge(partials[i]);
  }
  return merge_block(total);
}

// The divisors of the gradient that the forward writes: from the given counts, or from those that
// count_rows left.
template <typename scalar_t, typename acc_t>
__device__ GroupDivisors forward_divisors(const ForwardArgs<scalar_t, acc_t>& args,
                                          const Partials& partials) {
  if (!args.needs_counts_first()) {
    return args.divisors();
  }
  return args.divisor_rule(merge_partials(partials.counts, partials.num_counts));
}

// The gradient of a row, from the statistics that the forward saved.
template <typename scalar_t, typename acc_t>
__device__ RowGradient<acc_t> backward_gradient(const BackwardArgs<scalar_t, acc_t>& args,
                                                int64_t row) {
  const int64_t label = args.labels[row];
  const RowKind kind = args.labels.rule.kind(label);
  const auto coefficients = args.coefficients(row, label, kind);
  if (!coefficients.counts) {
    return RowGradient<acc_t>();
  }
  return args.row_gradient(coefficients, args.class_here(label, kind), kind, args.row_max[row],
                           args.row_sum_exp[row], args.grad[row], args.divisors());
}

template <typename scalar_t>
__device__ auto logit_at(const scalar_t* row, const RowLayout& layout, int64_t cls) {
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
  return static_cast<acc_t>(row[layout.class_offset(cls)]);
}

}  // namespace oe_ext::cuda
