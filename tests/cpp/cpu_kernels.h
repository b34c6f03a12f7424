// How cpu_kernels.cpp runs them.
#pragma once

#include <cstdint>

namespace oe_ext::testing {

// A new thread for each part of a task, up to this many.
extern int64_t num_threads;

// A deliberate race: each thread also does the work of the threads after it.
extern bool threads_overlap;

// The allocation of scratch memory fails.
extern bool no_memory;

}  // namespace oe_ext::testing
