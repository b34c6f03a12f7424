// What the kernels need of the device: wide loads, and merges over a warp and a block.
#pragma once

#include <cstring>

#include "../kernel_args.h"

namespace oe_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kVectorBytes = 16;

// Elements of one 16-byte load.
template <typename scalar_t>
constexpr int kVectorSize = kVectorBytes / static_cast<int>(sizeof(scalar_t));

// kSize neighbouring elements, moved at once; aligned to their size.
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

// The value of the lane `distance` above this one.
template <typename T>
__device__ RowStats<T> shuffle_down(const RowStats<T>& stats, int distance) {
  RowStats<T> other;
  other.max = __shfl_down_sync(kFullMask, stats.max, distance);
  other.sum_exp = __shfl_down_sync(kFullMask, stats.sum_exp, distance);
  other.sum_shifted = __shfl_down_sync(kFullMask, stats.sum_shifted, distance);
  other.count = __shfl_down_sync(kFullMask, stats.count, distance);
  return other;
}

__device__ inline GroupSums shuffle_down(const GroupSums& sums, int distance) {
  GroupSums other;
  other.inliers = __shfl_down_sync(kFullMask, sums.inliers, distance);
  other.outliers = __shfl_down_sync(kFullMask, sums.outliers, distance);
  other.counts.inliers = __shfl_down_sync(kFullMask, sums.counts.inliers, distance);
  other.counts.outliers = __shfl_down_sync(kFullMask, sums.counts.outliers, distance);
  return other;
}

// Merges the values of a warp into lane 0, always in the same order. All 32 lanes must call it.
template <typename T>
__device__ T merge_warp(T value) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value.merge(shuffle_down(value, distance));
  }
  return value;
}

// Merges the values of a block into thread 0, always in the same order. All threads must call it,
// and the block must be whole warps.
//
// Shared mem:  one T a warp.
// Sync:        thread 0's warp waits for every warp's result; the second barrier keeps the next
//              call in a loop from writing over what that warp still reads.
template <typename T>
__device__ T merge_block(T value) {
  constexpr int kMaxWarps = 1024 / kWarpSize;
  constexpr int kWords = sizeof(T) / sizeof(unsigned long long);
  static_assert(sizeof(T) % sizeof(unsigned long long) == 0, "whole words");
  __shared__ unsigned long long results[kMaxWarps * kWords];

  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int num_warps = static_cast<int>(blockDim.x) / kWarpSize;
  value = merge_warp(value);
  if (lane == 0) {
    std::memcpy(results + warp * kWords, &value, sizeof(T));
  }
  __syncthreads();
  if (warp == 0) {
    T other;
    if (lane < num_warps) {
      std::memcpy(&other, results + lane * kWords, sizeof(T));
    }
    value = merge_warp(other);
  }
  __syncthreads();
  return value;
}

}  // namespace oe_ext::cuda
