// CUDA on the CPU, for tests: the names that our kernels use, so that g++ compiles their source.
//
// Every CUDA thread of a block is a fiber; blocks run one after another. Between synchronisations
// the schedule is random but seeded, so that a missing barrier changes results. The kernels' file
// is compiled with -fsanitize=thread and linked without it: checker.cpp supplies the callbacks and
// judges each load and store by CUDA's rules.
//
// Include c10's headers first: they must not see these macros.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#define __global__ __attribute__((noinline))  // or its accesses would be those of launch()
#define __device__
#define __host__
#define __launch_bounds__(...)  // run() has them from the launcher
#define __forceinline__ inline __attribute__((always_inline))
#define __shared__ static  // one block runs at a time
#define OE_EXT_DYNAMIC_SHARED(name) unsigned char* const name = ::simt::dynamic_shared()

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

// What a finding throws: a race, a read of nothing, a divergent barrier, ...
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

extern uint3 thread_index;
extern uint3 block_index;
extern dim3 grid_size;
extern dim3 block_size;

// What the launchers may ask for; the tests make it smaller.
extern int64_t max_blocks;
extern int64_t max_stage_bytes;

[[noreturn]] void fail(const std::string& message);

struct Launch {
  const char* name;
  int max_threads;  // the kernel's launch bounds
  dim3 grid;
  dim3 block;
  size_t shared_bytes;
};

void run(const Launch& launch, void (*thread)(const void*), const void* context);
unsigned char* dynamic_shared();
void barrier(int line);
// Waits for all lanes of the mask. A fence also orders their memory accesses.
void meet_warp(unsigned mask, const char* operation, bool fence);
unsigned lane();
void put_slot(const void* value, size_t size);
bool get_slot(unsigned lane, void* value, size_t size);  // false: no such lane

template <typename... Params, typename... Args>
void launch(const char* name, int max_threads, dim3 grid, dim3 block, size_t shared_bytes,
            void (*kernel)(Params...), const Args&... args) {
  // What copies the arguments belongs to the launch, not to the kernel: it is not checked.
  const auto body = [&]() __attribute__((no_sanitize_thread)) { kernel(args...); };
  const auto call = [](const void* context) __attribute__((no_sanitize_thread)) {
    (*static_cast<const decltype(body)*>(context))();
  };
  run({name, max_threads, grid, block, shared_bytes}, call, &body);
}

// The value of lane `source`; of this lane itself where there is none.
template <typename T>
T exchange(unsigned mask, T value, int source, const char* operation) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8, "a shuffle moves 8 bytes");
  put_slot(&value, sizeof value);
  meet_warp(mask, operation, /*fence=*/false);
  T result = value;
  if (source >= 0 && source < 32 && static_cast<unsigned>(source) != lane()) {
    const bool named = (mask >> source & 1) != 0;
    if (!named || !get_slot(static_cast<unsigned>(source), &result, sizeof result)) {
      fail(std::string(operation) + ": reads a lane outside its mask");
    }
  }
  meet_warp(mask, operation, /*fence=*/false);
  return result;
}

}  // namespace simt

#define threadIdx (::simt::thread_index)
#define blockIdx (::simt::block_index)
#define blockDim (::simt::block_size)
#define gridDim (::simt::grid_size)
#define __syncthreads() ::simt::barrier(__LINE__)
#undef CUDA_KERNEL_ASSERT
#define CUDA_KERNEL_ASSERT(condition) \
  ((condition) ? void() : ::simt::fail("device-side assert: " #condition))

inline void __syncwarp(unsigned mask = ~0u) { simt::meet_warp(mask, "__syncwarp", /*fence=*/true); }

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return simt::exchange(mask, value, static_cast<int>(simt::lane()) ^ lane_mask, "__shfl_xor_sync");
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned source = ::simt::lane() + delta;
  return simt::exchange(mask, value, source < 32 ? static_cast<int>(source) : -1,
                        "__shfl_down_sync");
}

// 2^x as wrong as a GPU's may be: off by up to 2 units in the last place (the bound that the PTX
// ISA gives for ex2.approx), here by an amount that depends on the bits of x; 0 where it would not
// be a normal number; exact at 0 and infinity.
inline float exp2_approx(float x) {
  const float result = std::exp2(x);
  if (x == 0 || !std::isfinite(x) || !std::isfinite(result)) return result;
  if (result < std::numeric_limits<float>::min()) return 0;
  const auto hash = __builtin_bit_cast(uint32_t, x) * 2654435761u >> 16;
  const int ulps = static_cast<int>(hash % 5) - 2;
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, result) + ulps);
}
