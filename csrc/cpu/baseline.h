// Every kernels_*.cpp includes this before it selects an instruction set. The functions of these
// headers are thus compiled for every processor of the architecture: the linker may keep the copy
// of any file.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>  // F16C, for elementwise.h
#endif

// Inlines the kernels' own functions into the loops that call them.
#define OE_EXT_INLINE inline __attribute__((always_inline))
