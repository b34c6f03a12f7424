// What the scheduler and the checker know of each other.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <vector>

#include "simt.h"

namespace simt {

constexpr size_t kStackSize = 64 * 1024;

enum class State : uint8_t { kReady, kBarrier, kWarp, kDone };

// One CUDA thread of the running block.
struct Fiber {
  uint3 index{};
  unsigned number = 0;
  State state = State::kReady;
  int line = 0;       // of the barrier that it waits at
  unsigned mask = 0;  // of the warp operation that it waits in
  const char* operation = nullptr;
  bool fence = false;
  unsigned char slot[8]{};  // what it offers to a shuffle
  unsigned epoch = 0;       // block barriers passed
  unsigned warp_epoch = 0;  // warp barriers passed
  unsigned meetings = 0;    // block barriers and warp operations passed
  bool started = false;
  ucontext_t context{};  // to start with
  jmp_buf place{};       // to go on from
};

extern Fiber* current;          // null outside a kernel
extern unsigned current_block;  // its number, from 1

// Whose stack an address lies on, or -1.
int stack_owner(uintptr_t address);

// The dynamic shared memory of the running kernel: as much as a block of sm_90 may ask for.
constexpr size_t kMaxSharedBytes = 227 * 1024;
extern size_t shared_bytes;

// The checker is told when a kernel starts, when a block ends, and when the kernel does.
void start_launch(const Launch& launch);
void end_block();
void end_launch();

}  // namespace simt
