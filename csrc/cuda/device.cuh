// What the kernels need from the device: wide loads, a fast exponential, and merges over a warp and
// a block.
#pragma once

#include <cmath>
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

// 2^x in one instruction, with a relative error of at most 2^-22 (PTX ISA, ex2.approx). Results
// below the smallest normal number are 0. The harness has a twin that is as wrong as that.
#ifndef SIMT_CPU
__device__ inline float exp2_approx(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// What power() raises to x: 2 in float, e in double; and the logarithm of e to that base.
__device__ inline float power(float x) { return exp2_approx(x); }
__device__ inline double power(double x) { return std::exp(x); }
template <typename acc_t>
constexpr acc_t kLogOfE = 1;
template <>
constexpr float kLogOfE<float> = 1.44269504088896341f;

// e^x of a logit minus a maximum.
template <typename acc_t>
__device__ acc_t exponential(acc_t x) {
  return power(x * kLogOfE<acc_t>);
}

// The value of the lane whose index differs in the bits of `mask`.
template <typename T>
__device__ T shuffle_xor(const T& value, int mask) {
  constexpr int kWords = sizeof(T) / sizeof(unsigned);
  static_assert(sizeof(T) % sizeof(unsigned) == 0, "whole words");
  unsigned words[kWords];
  std::memcpy(words, &value, sizeof(T));
  for (int i = 0; i < kWords; ++i) {
    words[i] = __shfl_xor_sync(kFullMask, words[i], mask);
  }
  T other;
  std::memcpy(&other, words, sizeof(T));
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
// Sync:        every warp waits for every warp's result. The next call for this T overwrites them:
//              one for another T, or a barrier, must lie between.
template <typename T>
__device__ T merge_block(T value) {
  constexpr int kMaxWarps = 1024 / kWarpSize;
  constexpr int kWords = sizeof(T) / sizeof(unsigned);
  static_assert(sizeof(T) % sizeof(unsigned) == 0, "whole words");
  __shared__ unsigned results[kMaxWarps * kWords];

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
  return merge_lanes(other, kWarpSize);
}

// Values that one kernel of a call leaves for the next, one per block. The next kernel sums them in
// a fixed order and without atomics, so the bits are the same every time.
struct Partials {
  GroupCounts* counts = nullptr;  // [num_counts], or null
  GroupSums* sums = nullptr;      // [num_sums], from the forward; null for none
  int num_counts = 0;
  int num_sums = 0;
  bool counted = false;  // by count_rows; else the forward's first block leaves the counts
};

// The sums of the losses of one thread. An inlier counts as 1: with class weights, the counts of a
// mean come from another kernel.
struct ThreadSums {
  __device__ void add(RowKind kind, double loss) {
    if (kind == RowKind::kInlier) {
      inliers += loss;
      ++num_inliers;
    } else if (kind == RowKind::kOutlier) {
      outliers += loss;
      ++num_outliers;
    }
  }

  // Leaves the sums of a block to the next kernel. All threads must call it.
  __device__ void leave(const Partials& partials) const {
    if (partials.sums != nullptr) {
      const GroupSums sums = merge_block(
          GroupSums{inliers,
                    outliers,
                    {static_cast<double>(num_inliers), static_cast<double>(num_outliers)}});
      if (threadIdx.x == 0) {
        partials.sums[blockIdx.x] = sums;
      }
    }
  }

  double inliers = 0;
  double outliers = 0;
  unsigned num_inliers = 0;
  unsigned num_outliers = 0;
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

// The counts of a thread's labels.
template <typename acc_t>
struct ThreadCounts {
  __device__ void add(int64_t label, const LabelRule& rule,
                      const ClassWeights<acc_t>& class_weights) {
    outliers += rule.is_outlier(label);
    const bool inlier = rule.is_inlier(label);
    inliers += inlier;
    if (inlier && class_weights.data != nullptr) {
      inlier_weight += static_cast<double>(class_weights[label]);
    }
  }

  double inlier_weight = 0;
  unsigned inliers = 0;
  unsigned outliers = 0;
};

// The integer of `bits` bits that begins at bit `position` of 16 bytes.
__device__ inline int64_t integer_in(const Vector<uint64_t, 2>& unit, int position, int bits,
                                     bool is_unsigned) {
  const uint64_t word = position < 64 ? unit.values[0] : unit.values[1];
  const uint64_t top = word << (64 - bits - position % 64);
  return is_unsigned ? static_cast<int64_t>(top >> (64 - bits))
                     : static_cast<int64_t>(top) >> (64 - bits);
}

// The counts of a block's labels: of `threads` threads each takes 16 bytes in turn, four at once.
// All threads of the block must call it.
template <typename acc_t>
__device__ GroupCounts count_labels(const Labels& labels, const ClassWeights<acc_t>& class_weights,
                                    int64_t num_rows, int64_t thread, int64_t threads) {
  using Unit = Vector<uint64_t, 2>;
  constexpr int kAtOnce = 4;
  const int bits = 8 * labels.element_size();
  const bool is_unsigned = labels.are_unsigned();
  const Unit* units = static_cast<const Unit*>(labels.data);
  const bool aligned = reinterpret_cast<uintptr_t>(units) % kVectorBytes == 0;
  const int64_t labels_per_unit = 8 * kVectorBytes / bits;
  const int64_t num_units = aligned ? num_rows / labels_per_unit : 0;
  ThreadCounts<acc_t> counts;
  for (int64_t first = thread; first < num_units; first += kAtOnce * threads) {
    Unit loaded[kAtOnce];
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * threads < num_units) {
        loaded[i] = units[first + i * threads];
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      for (int bit = 0; bit < 8 * kVectorBytes && first + i * threads < num_units; bit += bits) {
        counts.add(integer_in(loaded[i], bit, bits, is_unsigned), labels.rule, class_weights);
      }
    }
  }
  for (int64_t row = num_units * labels_per_unit + thread; row < num_rows; row += threads) {
    counts.add(labels[row], labels.rule, class_weights);
  }
  return merge_block(GroupCounts{
      class_weights.data != nullptr ? counts.inlier_weight : static_cast<double>(counts.inliers),
      static_cast<double>(counts.outliers)});
}

// The divisor of each group, in the dtype of the arithmetic.
template <typename acc_t>
struct Divisors {
  __device__ explicit Divisors(const GroupDivisors& divisors)
      : inliers(static_cast<acc_t>(divisors.inliers)),
        outliers(static_cast<acc_t>(divisors.outliers)) {}

  __device__ acc_t of(RowKind kind) const { return kind == RowKind::kOutlier ? outliers : inliers; }

  acc_t inliers;
  acc_t outliers;
};

// The divisors of the gradient that the forward writes: from the given counts, from those that
// count_rows left, or from all labels.
template <typename scalar_t, typename acc_t>
__device__ GroupDivisors forward_divisors(const ForwardArgs<scalar_t, acc_t>& args,
                                          const Partials& partials) {
  if (!args.needs_counts_first()) {
    return args.divisors();
  }
  const bool is_first = blockIdx.x == 0;
  if (args.grad_logits == nullptr && (partials.counted || !is_first)) {
    return GroupDivisors();  // only write_loss divides
  }
  if (partials.counted) {
    return args.divisor_rule(merge_partials(partials.counts, partials.num_counts));
  }
  const GroupCounts counts = count_labels(args.labels, args.class_weights, args.layout.num_rows(),
                                          threadIdx.x, blockDim.x);
  if (is_first && threadIdx.x == 0) {
    *partials.counts = counts;
  }
  return args.divisor_rule(counts);
}

}  // namespace oe_ext::cuda
