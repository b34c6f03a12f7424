// Runs a grid: blocks one after another in a random order, each thread a fiber, warps with random
// priorities, so that one may run far ahead of another.
#include "scheduler.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>

#include "guard.h"

namespace simt {

uint3 thread_index;
uint3 block_index;
dim3 grid_size;
dim3 block_size;

int64_t max_blocks = 1024;
int64_t max_stage_bytes = 223 * 1024;

Fiber* current = nullptr;
unsigned current_block = 0;
size_t shared_bytes = 0;

namespace {

std::vector<Fiber> fibers;
std::unique_ptr<unsigned char[]> stacks;
size_t stacks_size = 0;
jmp_buf scheduler_place;
void (*thread_body)(const void*) = nullptr;
const void* thread_context = nullptr;
std::string failure;
unsigned seed = 1;
alignas(16) unsigned char shared_memory[kMaxSharedBytes];

// Between fibers that have started, _setjmp and _longjmp: swapcontext would make a system call each
// time, to save a signal mask that nobody changes.
void return_to_scheduler() {
  if (_setjmp(current->place) == 0) _longjmp(scheduler_place, 1);
}

void run_fiber(Fiber& fiber) {
  current = &fiber;
  thread_index = fiber.index;
  if (_setjmp(scheduler_place) == 0) {
    if (fiber.started) _longjmp(fiber.place, 1);
    fiber.started = true;
    setcontext(&fiber.context);
  }
  current = nullptr;
}

void fiber_main() {
  thread_body(thread_context);
  current->state = State::kDone;
  return_to_scheduler();
}

void start_fibers() {
  const auto count = static_cast<unsigned>(fibers.size());
  for (unsigned i = 0; i < count; ++i) {
    Fiber& fiber = fibers[i];
    fiber.state = State::kReady;
    fiber.started = false;
    fiber.epoch = fiber.warp_epoch = fiber.meetings = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.get() + i * kStackSize;
    fiber.context.uc_stack.ss_size = kStackSize;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
}

// Lets a warp operation go on whose whole mask has arrived.
bool release_warp(unsigned first, unsigned last) {
  for (unsigned i = first; i < last; ++i) {
    const Fiber& fiber = fibers[i];
    if (fiber.state != State::kWarp) continue;
    const std::string operation = fiber.operation;
    bool complete = true;
    for (unsigned lane = 0; lane < 32 && complete; ++lane) {
      if ((fiber.mask >> lane & 1) == 0) continue;
      if (first + lane >= last)
        throw Error(operation + ": the mask names a lane that is not there");
      const Fiber& peer = fibers[first + lane];
      if (peer.state == State::kDone) throw Error(operation + ": a lane of the mask has exited");
      if (peer.state != State::kWarp) {
        complete = false;
      } else if (peer.mask != fiber.mask || peer.operation != fiber.operation) {
        throw Error(operation + ": lanes of one mask met different warp operations");
      }
    }
    if (!complete) continue;
    const unsigned mask = fiber.mask;
    const bool fence = fiber.fence;
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) != 0) {
        fibers[first + lane].warp_epoch += fence;
        ++fibers[first + lane].meetings;
        fibers[first + lane].state = State::kReady;
      }
    }
    return true;
  }
  return false;
}

// Runs the first warp, by priority, that can run. False: all wait for a barrier, or are done.
bool step(const std::vector<unsigned>& warps, std::mt19937& random) {
  const auto count = static_cast<unsigned>(fibers.size());
  std::vector<unsigned> ready;
  for (const unsigned warp : warps) {
    const unsigned first = warp * 32;
    const unsigned last = std::min(count, first + 32);
    ready.clear();
    for (unsigned i = first; i < last; ++i) {
      if (fibers[i].state == State::kReady) ready.push_back(i);
    }
    if (ready.empty()) {
      if (release_warp(first, last)) return true;
      continue;
    }
    std::shuffle(ready.begin(), ready.end(), random);
    for (const unsigned i : ready) {
      run_fiber(fibers[i]);
      if (!failure.empty()) throw Error(failure);
    }
    return true;
  }
  return false;
}

// Nothing can run: the block is done, or all its threads stand at one barrier, or it is wrong.
bool pass_barrier() {
  size_t waiting = 0;
  size_t done = 0;
  int line = -1;
  bool mixed = false;
  for (const Fiber& fiber : fibers) {
    done += fiber.state == State::kDone;
    if (fiber.state == State::kBarrier) {
      ++waiting;
      mixed |= line >= 0 && line != fiber.line;
      line = fiber.line;
    }
  }
  if (done == fibers.size()) return false;
  if (waiting + done < fibers.size()) {
    throw Error("deadlock: a warp operation waits for lanes that never come");
  }
  if (done > 0) throw Error("__syncthreads() reached by a part of the block; others have exited");
  if (mixed) throw Error("threads of one block met different __syncthreads()");
  for (Fiber& fiber : fibers) {
    fiber.state = State::kReady;
    ++fiber.epoch;
    ++fiber.meetings;
  }
  return true;
}

void run_block(std::mt19937& random) {
  start_fibers();
  std::vector<unsigned> warps((fibers.size() + 31) / 32);
  std::iota(warps.begin(), warps.end(), 0u);
  std::shuffle(warps.begin(), warps.end(), random);
  do {
    do {
      if (random() % 64 == 0) std::shuffle(warps.begin(), warps.end(), random);
    } while (step(warps, random));
  } while (pass_barrier());
}

void run_blocks(dim3 grid) {
  std::mt19937 random(seed++);
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned i : blocks) {
    block_index = {i % grid.x, i / grid.x % grid.y, i / (grid.x * grid.y)};
    current_block = i + 1;
    run_block(random);
    end_block();
  }
}

}  // namespace

int stack_owner(uintptr_t address) {
  const auto begin = reinterpret_cast<uintptr_t>(stacks.get());
  return address >= begin && address < begin + stacks_size
             ? static_cast<int>((address - begin) / kStackSize)
             : -1;
}

void fail(const std::string& message) {
  if (current == nullptr) throw Error(message);
  failure = message;
  for (;;) return_to_scheduler();
}

void barrier(int line) {
  current->state = State::kBarrier;
  current->line = line;
  return_to_scheduler();
}

void meet_warp(unsigned mask, const char* operation, bool fence) {
  if ((mask >> lane() & 1) == 0) {
    fail(std::string(operation) + ": the calling lane is not in its own mask");
  }
  current->state = State::kWarp;
  current->mask = mask;
  current->operation = operation;
  current->fence = fence;
  return_to_scheduler();
}

unsigned lane() { return current->number % 32; }

void put_slot(const void* value, size_t size) { std::memcpy(current->slot, value, size); }

bool get_slot(unsigned lane, void* value, size_t size) {
  const unsigned i = current->number / 32 * 32 + lane;
  if (i >= fibers.size()) return false;
  std::memcpy(value, fibers[i].slot, size);
  return true;
}

unsigned char* dynamic_shared() { return shared_memory; }

void set_seed(unsigned new_seed) { seed = new_seed; }

void run(const Launch& launch, void (*thread)(const void*), const void* context) {
  const dim3 grid = launch.grid;
  const dim3 block = launch.block;
  const unsigned num_threads = block.x * block.y * block.z;
  if (num_threads == 0 || num_threads > 1024) throw Error("launch: a block has 1 to 1024 threads");
  if (num_threads > static_cast<unsigned>(launch.max_threads)) {
    throw Error("launch bounds: " + std::to_string(num_threads) + " threads, at most " +
                std::to_string(launch.max_threads));
  }
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) throw Error("launch: an empty grid");
  // Any block may have 48 KB, whatever the tests allow the launchers; none more than there is.
  const size_t allowed = std::max<size_t>(max_stage_bytes, 48 * 1024);
  if (launch.shared_bytes > std::min(allowed, kMaxSharedBytes)) {
    throw Error("launch: too much shared memory");
  }
  if (stacks_size < num_threads * kStackSize) {
    stacks_size = num_threads * kStackSize;
    stacks.reset(new unsigned char[stacks_size]);
  }
  fibers.assign(num_threads, Fiber());
  for (unsigned i = 0; i < num_threads; ++i) {
    fibers[i].number = i;
    fibers[i].index = {i % block.x, i / block.x % block.y, i / (block.x * block.y)};
  }
  thread_body = thread;
  thread_context = context;
  grid_size = grid;
  block_size = block;
  shared_bytes = launch.shared_bytes;
  failure.clear();
  start_launch(launch);

  open_device_memory();
  try {
    run_blocks(grid);
  } catch (...) {
    current = nullptr;
    end_launch();
    close_device_memory();
    throw;
  }
  end_launch();
  close_device_memory();
}

}  // namespace simt
