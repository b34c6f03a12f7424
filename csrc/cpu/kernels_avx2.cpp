// The kernels with AVX2, FMA and F16C.
#include "baseline.h"

#if defined(__x86_64__)

// Applies to all functions and templates that are defined below.
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx,avx2,fma,f16c")
#endif

#define OE_EXT_FMA 1
#define OE_EXT_F16C 1

namespace oe_ext::cpu {
constexpr int kSquareBytes = 32;
}

#include "tile_kernels.h"

namespace oe_ext::cpu {
constinit const Kernels kKernelsAvx2 = make_kernels();
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif
