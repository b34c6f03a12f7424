// Judges every load and store of a kernel: races in shared and global memory, reads of shared
// memory that nobody has written, accesses outside the buffers that the launch was given, and
// launchers that look into device memory. Counts what is moved, where asked to.
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <set>
#include <tuple>
#include <unordered_map>

#include "scheduler.h"
#include "watch.h"

namespace simt {
namespace {

// Who touched a byte, and when.
struct Access {
  unsigned thread = 0;
  unsigned block = 0;  // 0: nobody
  unsigned epoch = 0;
  unsigned warp_epoch = 0;
};

enum class Readers : uint8_t { kOne, kOneWarp, kSeveralWarps };

struct Shadow {
  Access write;
  Access read;
  Readers readers = Readers::kOne;
};

constexpr uintptr_t kPageSize = 256;  // of addresses that share a shadow
std::unordered_map<uintptr_t, std::unique_ptr<Shadow[]>> pages;

struct Segment {
  uintptr_t begin;
  uintptr_t end;
  const char* name = nullptr;

  bool contains(uintptr_t address, size_t size = 1) const {
    return address >= begin && address + size <= end;
  }
};

std::vector<Segment> watched;  // a stack: watches end in the reverse of their order

// The writable segments of loaded libraries: a kernel's statics, which are its shared memory.
std::vector<Segment> static_memory;

void find_static_memory() {
  static_memory.clear();
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void*) {
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type == PT_LOAD && (header.p_flags & PF_W) != 0) {
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            static_memory.push_back({begin, begin + header.p_memsz});
          }
        }
        return 0;
      },
      nullptr);
}

bool any_contains(const std::vector<Segment>& segments, uintptr_t address, size_t size) {
  return std::any_of(segments.begin(), segments.end(),
                     [&](const Segment& segment) { return segment.contains(address, size); });
}

// The built-in variables, which a kernel reads.
bool is_builtin(uintptr_t address) {
  const auto inside = [address](const auto& variable) {
    const auto begin = reinterpret_cast<uintptr_t>(&variable);
    return address >= begin && address < begin + sizeof variable;
  };
  return inside(thread_index) || inside(block_index) || inside(grid_size) || inside(block_size);
}

bool is_shared(uintptr_t address, size_t size) {
  const auto dynamic = reinterpret_cast<uintptr_t>(dynamic_shared());
  if (address + size > dynamic && address < dynamic + kMaxSharedBytes) {
    if (address < dynamic || address + size > dynamic + shared_bytes) {
      fail("out of bounds: dynamic shared memory that the launch did not ask for");
    }
    return true;
  }
  return any_contains(static_memory, address, size);
}

bool same_warp(unsigned a, unsigned b) { return a / 32 == b / 32; }

// Is an earlier access of this block ordered before what the current thread does now?
bool is_ordered(const Access& access) {
  return access.thread == current->number || access.epoch != current->epoch ||
         (same_warp(access.thread, current->number) && access.warp_epoch != current->warp_epoch);
}

void check_order(const Access& earlier, bool shared, const char* kind) {
  if (earlier.block == 0) return;
  // Another block's shared memory is not ours, though it lies at the same place here.
  const bool fine = earlier.block == current_block ? is_ordered(earlier) : shared;
  if (fine) return;
  char message[160];
  std::snprintf(message, sizeof message, "%s-memory race: %s, block:thread %u:%u and %u:%u",
                shared ? "shared" : "global", kind, earlier.block - 1, earlier.thread,
                current_block - 1, current->number);
  fail(message);
}

// Reads that `read` does not name: a later write must be ordered after those too.
bool other_reads_are_ordered(const Shadow& shadow) {
  const Access& read = shadow.read;
  if (shadow.readers == Readers::kOne || read.block != current_block ||
      read.epoch != current->epoch) {
    return true;
  }
  return shadow.readers == Readers::kOneWarp && same_warp(read.thread, current->number) &&
         read.warp_epoch != current->warp_epoch;
}

void note_read(Shadow& shadow, const Access& now) {
  const Access& last = shadow.read;
  if (last.block != now.block || last.epoch != now.epoch) {
    shadow.readers = Readers::kOne;
  } else if (!same_warp(last.thread, now.thread)) {
    shadow.readers = Readers::kSeveralWarps;
  } else if (shadow.readers != Readers::kSeveralWarps) {
    if (last.warp_epoch != now.warp_epoch) {
      shadow.readers = Readers::kOne;
    } else if (last.thread != now.thread) {
      shadow.readers = Readers::kOneWarp;
    }
  }
  shadow.read = now;
}

// --- Counting -------------------------------------------------------------------------------

bool counting = false;
std::vector<LaunchRecord> records;

constexpr uintptr_t kSectorBytes = 32;

struct Request {
  const char* buffer = nullptr;
  size_t size = 0;  // of one lane's access
  int64_t bytes = 0;
  std::set<uintptr_t> sectors;
};

// Lanes run one after another; what they execute together on a GPU is the same instruction, for the
// same time since the warp last met.
using RequestKey = std::tuple<unsigned, const void*, bool, unsigned, unsigned>;
std::map<RequestKey, Request> requests;
std::map<std::tuple<unsigned, const void*, unsigned>, unsigned> times;

void count_access(const char* buffer, uintptr_t address, size_t size, bool is_write,
                  const void* instruction) {
  const unsigned warp = current->number / 32;
  const unsigned time = times[{current->number, instruction, current->meetings}]++;
  Request& request = requests[{warp, instruction, is_write, current->meetings, time}];
  request.buffer = buffer;
  request.size = size;
  request.bytes += static_cast<int64_t>(size);
  for (uintptr_t sector = address / kSectorBytes; sector <= (address + size - 1) / kSectorBytes;
       ++sector) {
    request.sectors.insert(sector);
  }
}

void add_requests(LaunchRecord& record) {
  for (const auto& [key, request] : requests) {
    auto& by_buffer = std::get<2>(key) ? record.writes : record.reads;
    Traffic& traffic = by_buffer[request.buffer];
    traffic.bytes += request.bytes;
    traffic.requests += 1;
    traffic.sectors += static_cast<int64_t>(request.sectors.size());
    traffic.least_sectors += (request.bytes + kSectorBytes - 1) / kSectorBytes;
    traffic.wide_bytes += request.size == 16 ? request.bytes : 0;
  }
  requests.clear();
  times.clear();
}

// --- Checks -----------------------------------------------------------------------------------

// A thread that makes so many accesses without meeting another is not going to end.
constexpr int64_t kMaxAccesses = 50'000'000;
int64_t accesses_of_block = 0;

bool host_touched_device = false;

const Segment* find_watched(uintptr_t address, size_t size) {
  const auto found = std::find_if(watched.begin(), watched.end(), [&](const Segment& segment) {
    return segment.contains(address, size);
  });
  return found == watched.end() ? nullptr : &*found;
}

void check_access(uintptr_t address, size_t size, bool is_write, const void* instruction) {
  if (current == nullptr) {
    // The launcher itself, on the host. Nothing may be thrown through code that does not expect it.
    host_touched_device |= find_watched(address, size) != nullptr;
    return;
  }
  if (const int owner = stack_owner(address); owner >= 0) {
    if (static_cast<unsigned>(owner) != current->number) {
      fail("access to another thread's local memory");
    }
    return;
  }
  if (is_builtin(address)) return;
  if (++accesses_of_block > kMaxAccesses) fail("runaway: the block does not end");
  const Segment* const buffer = find_watched(address, size);
  const bool shared = buffer == nullptr && is_shared(address, size);
  if (buffer == nullptr && !shared) {
    fail(is_write ? "out of bounds: a write to global memory that the kernel was not given"
                  : "out of bounds: a read of global memory that the kernel was not given");
  }
  if (counting && !shared) count_access(buffer->name, address, size, is_write, instruction);
  const Access now{current->number, current_block, current->epoch, current->warp_epoch};
  for (size_t i = 0; i < size; ++i, ++address) {
    auto& page = pages[address / kPageSize];
    if (!page) page.reset(new Shadow[kPageSize]);
    Shadow& shadow = page[address % kPageSize];
    check_order(shadow.write, shared, is_write ? "write after write" : "read after write");
    if (is_write) {
      check_order(shadow.read, shared, "write after read");
      if (!other_reads_are_ordered(shadow)) fail("race: a write after reads by several threads");
      shadow.write = now;
    } else {
      if (shared && shadow.write.block != current_block) {
        fail("uninitialised: a read of shared memory that nobody has written");
      }
      note_read(shadow, now);
    }
  }
}

// A GPU faults where a load or a store is not aligned to its own size.
void check_aligned_access(const void* pointer, size_t size, bool is_write,
                          const void* instruction) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (current != nullptr && address % size != 0) fail("misaligned access");
  check_access(address, size, is_write, instruction);
}

}  // namespace

Watch::Watch(const char* name, const void* begin, size_t size) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  watched.push_back(begin == nullptr ? Segment{0, 0, name}
                                     : Segment{address, address + size, name});
}

Watch::~Watch() { watched.pop_back(); }

void start_launch(const Launch& launch) {
  pages.clear();
  requests.clear();
  times.clear();
  accesses_of_block = 0;
  find_static_memory();
  if (counting) {
    records.push_back({launch.name, static_cast<int64_t>(launch.grid.x),
                       static_cast<int64_t>(launch.block.x),
                       static_cast<int64_t>(launch.shared_bytes)});
  }
}

void end_block() {
  accesses_of_block = 0;
  if (counting) add_requests(records.back());
}

void end_launch() { pages.clear(); }

void end_launcher() {
  if (host_touched_device) {
    host_touched_device = false;
    throw Error("host access: a launcher touches device memory, which a GPU's host must wait for");
  }
}

void start_counting() {
  counting = true;
  records.clear();
}

std::vector<LaunchRecord> stop_counting() {
  counting = false;
  return std::move(records);
}

}  // namespace simt

// What -fsanitize=thread calls for every access.
#define SIMT_CALLBACKS(size)                                                    \
  extern "C" void __tsan_read##size(void* p) {                                  \
    simt::check_aligned_access(p, size, false, __builtin_return_address(0));    \
  }                                                                             \
  extern "C" void __tsan_write##size(void* p) {                                 \
    simt::check_aligned_access(p, size, true, __builtin_return_address(0));     \
  }                                                                             \
  extern "C" void __tsan_unaligned_read##size(void* p) {                        \
    simt::check_access(uintptr_t(p), size, false, __builtin_return_address(0)); \
  }                                                                             \
  extern "C" void __tsan_unaligned_write##size(void* p) {                       \
    simt::check_access(uintptr_t(p), size, true, __builtin_return_address(0));  \
  }
SIMT_CALLBACKS(1)
SIMT_CALLBACKS(2)
SIMT_CALLBACKS(4)
SIMT_CALLBACKS(8)
SIMT_CALLBACKS(16)

extern "C" {
void __tsan_read_range(void* p, size_t size) {
  simt::check_access(uintptr_t(p), size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  simt::check_access(uintptr_t(p), size, true, __builtin_return_address(0));
}
void* __tsan_memcpy(void* to, const void* from, size_t size) {
  simt::check_access(uintptr_t(from), size, false, __builtin_return_address(0));
  simt::check_access(uintptr_t(to), size, true, __builtin_return_address(0));
  return std::memcpy(to, from, size);
}
void* __tsan_memset(void* to, int value, size_t size) {
  simt::check_access(uintptr_t(to), size, true, __builtin_return_address(0));
  return std::memset(to, value, size);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
}
