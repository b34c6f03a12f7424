// What a file of kernels includes before it chooses an instruction set. Functions of these headers
// are compiled for every processor of the architecture: a linker may take them from any file.
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

// The kernels' own functions become part of the loops that call them.
#define OE_EXT_INLINE inline __attribute__((always_inline))
