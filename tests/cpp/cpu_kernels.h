// How cpu_kernels.cpp runs them.
#pragma once

#include <cstdint>

namespace oe_ext::testing {

// A new thread for each part of a task, up to so many.
extern int64_t num_threads;

// A planted race: each thread also does the work of those after it.
extern bool threads_overlap;

// The kernels find no memory for their scratch.
extern bool no_memory;

}  // namespace oe_ext::testing
