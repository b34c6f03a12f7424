// The kernels of csrc/cpu, on std::threads instead of OpenMP's threads.
//
// ThreadSanitizer understands how a std::thread waits, but not libgomp, which is not compiled with
// it: every barrier there looks like a race. The linker takes this definition before that of
// libtorch.
#include "cpu_kernels.h"

#include <torch/csrc/stable/c/shim.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

#include "cpu/launch_cpu.h"
#include "kernels.h"

namespace oe_ext::testing {

int64_t num_threads = 2;
bool threads_overlap = false;
bool no_memory = false;

}  // namespace oe_ext::testing

// Scratch is the only memory that the kernels align.
void* operator new(std::size_t size, std::align_val_t alignment) {
  const auto align = static_cast<std::size_t>(alignment);
  void* const memory = oe_ext::testing::no_memory
                           ? nullptr
                           : std::aligned_alloc(align, (size + align - 1) / align * align);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }

AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelFunc body,
                                  void* context) {
  using namespace oe_ext::testing;
  const int64_t most = (end - begin + grain - 1) / grain;
  const int64_t size =
      (end - begin + std::min(num_threads, most) - 1) / std::min(num_threads, most);
  std::atomic<bool> failed = false;  // all that libtorch's version reports of an exception
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += size) {
    const int64_t last = threads_overlap ? end : std::min(first + size, end);
    threads.emplace_back([=, &failed] {
      try {
        body(first, last, context);
      } catch (...) {
        failed = true;
      }
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
  return failed ? 1 : 0;
}

namespace oe_ext::testing {

template <typename scalar_t, typename acc_t>
int64_t run(const ForwardArgs<scalar_t, acc_t>& args) {
  return cpu::forward(args);
}

template <typename scalar_t, typename acc_t>
int64_t run(const BackwardArgs<scalar_t, acc_t>& args) {
  return cpu::backward(args);
}

OE_EXT_INSTANTIATE_RUN();

}  // namespace oe_ext::testing
