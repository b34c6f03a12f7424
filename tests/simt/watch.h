// The memory that kernels may touch.
#pragma once

#include <cstddef>

namespace simt {

// Allows accesses to [begin, begin + size) while this object lives. A null pointer allows nothing.
class Watch {
 public:
  Watch(const void* begin, size_t size);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
};

}  // namespace simt
