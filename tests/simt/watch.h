// What the harness's backend tells the checker, and asks it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace simt {

// Allows accesses to [begin, begin + size) while this object lives. A null pointer allows nothing.
class Watch {
 public:
  Watch(const char* name, const void* begin, size_t size);
  ~Watch();
  Watch(const Watch&) = delete;
  Watch& operator=(const Watch&) = delete;
};

void set_seed(unsigned seed);

// Throws if the launcher that has just ended touched watched memory itself.
void end_launcher();

// The traffic between the kernels and one buffer. A request is what the lanes of a warp load or
// store with one instruction; a sector is 32 bytes, the least that a GPU moves.
struct Traffic {
  int64_t bytes = 0;
  int64_t requests = 0;
  int64_t sectors = 0;
  int64_t least_sectors = 0;  // if the bytes of each request lay next to one another, aligned
  int64_t wide_bytes = 0;     // moved 16 bytes a lane
};

struct LaunchRecord {
  std::string kernel;
  int64_t blocks = 0;
  int64_t threads = 0;
  int64_t shared_bytes = 0;
  std::map<std::string, Traffic> reads;
  std::map<std::string, Traffic> writes;
};

// Counts what kernels move from now on, and hands over what they have moved.
void start_counting();
std::vector<LaunchRecord> stop_counting();

}  // namespace simt
