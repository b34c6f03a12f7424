// Device memory that the host cannot read: while it is guarded, the memory of every new tensor is
// inaccessible unless a kernel runs.
#include "guard.h"

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>

#include <cstring>
#include <map>

namespace simt {
namespace {

std::map<void*, size_t> regions;
bool guarding = false;

void protect(int protection) {
  for (const auto& [begin, size] : regions) {
    mprotect(begin, size, protection);
  }
}

struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t num_bytes) override {
    constexpr size_t kPageSize = 4096;
    const size_t size = (num_bytes / kPageSize + 1) * kPageSize;
    void* const begin =
        mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(begin != MAP_FAILED, "mmap of ", size, " bytes");
    std::memset(begin, 0xff, size);  // NaN
    mprotect(begin, size, PROT_NONE);
    regions[begin] = size;
    return {begin, begin, &free, c10::Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t size) const override {
    default_copy_data(to, from, size);
  }

 private:
  static void free(void* begin) {
    munmap(begin, regions.at(begin));
    regions.erase(begin);
  }
};

GuardedAllocator allocator;
c10::Allocator* usual_allocator = nullptr;

}  // namespace

void start_guarding() {
  if (guarding) return;
  usual_allocator = c10::GetCPUAllocator();
  c10::SetCPUAllocator(&allocator, /*priority=*/100);
  guarding = true;
}

void stop_guarding() {
  guarding = false;
  protect(PROT_READ | PROT_WRITE);
  c10::SetCPUAllocator(usual_allocator, 100);
}

void open_device_memory() {
  if (guarding) protect(PROT_READ | PROT_WRITE);
}

void close_device_memory() {
  if (guarding) protect(PROT_NONE);
}

}  // namespace simt
