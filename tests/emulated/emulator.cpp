#include <cuda_runtime.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 128 * 1024;

struct Barrier {
  int arrived = 0;
  std::uint64_t generation = 0;
};

struct Fiber {
  ucontext_t context{};
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Barrier* waits_for = nullptr;
  std::uint64_t generation = 0;
  bool finished = false;
};

struct Warp {
  Barrier barrier;
  std::uint64_t slots[2][32];
};

/// One block at a time, on one thread.
struct Machine {
  ucontext_t scheduler{};
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<uint4> shared;
  const std::function<void()>* body = nullptr;
  Fiber* running = nullptr;
};

Machine& machine() {
  static Machine the_machine;
  return the_machine;
}

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %u of %u, %u threads)\n", message, blockIdx.x,
               gridDim.x, blockDim.x);
  std::abort();
}

void wait(Barrier& barrier, int threads) {
  Machine& m = machine();
  if (++barrier.arrived == threads) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  Fiber& me = *m.running;
  const dim3 index = threadIdx;
  me.waits_for = &barrier;
  me.generation = barrier.generation;
  swapcontext(&me.context, &m.scheduler);
  threadIdx = index;
}

void enter() {
  Machine& m = machine();
  (*m.body)();
  m.running->finished = true;
  swapcontext(&m.running->context, &m.scheduler);
}

void run_block(unsigned threads) {
  Machine& m = machine();
  while (m.fibers.size() < threads) m.fibers.push_back(std::make_unique<Fiber>());
  m.warps.assign((threads + 31) / 32, Warp{});
  std::fill(std::begin(m.barriers), std::end(m.barriers), Barrier{});
  std::fill(m.shared.begin(), m.shared.end(),
            uint4{0x7fc0beefU, 0x7fc0beefU, 0x7fc0beefU, 0x7fc0beefU});
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = *m.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.waits_for = nullptr;
    fiber.finished = false;
  }
  unsigned left = threads;
  while (left > 0) {
    bool moved = false;
    for (unsigned turn = 0; turn < threads; ++turn) {
      const unsigned i = backwards ? threads - 1 - turn : turn;
      Fiber& fiber = *m.fibers[i];
      if (fiber.finished) continue;
      if (fiber.waits_for != nullptr && fiber.waits_for->generation == fiber.generation) continue;
      fiber.waits_for = nullptr;
      moved = true;
      m.running = &fiber;
      threadIdx = dim3(i);
      swapcontext(&m.scheduler, &fiber.context);
      if (fiber.finished) --left;
    }
    if (!moved) fail("threads wait for others that have left or wait elsewhere");
  }
}

}  // namespace

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body) {
  if (block.x % 32 != 0 || block.x == 0 || block.x > 1024) fail("a block of odd size");
  Machine& m = machine();
  m.body = &body;
  m.shared.resize((shared_bytes + 15) / 16);
  gridDim = grid;
  blockDim = block;
  for (unsigned b = 0; b < grid.x; ++b) {
    blockIdx = dim3(backwards ? grid.x - 1 - b : b);
    run_block(block.x);
  }
}

void named_barrier(int id, int threads) {
  if (id < 0 || id > 15 || threads % 32 != 0) fail("no such barrier");
  wait(machine().barriers[id], threads);
}

unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(machine().shared.data());
}

const std::uint64_t* exchange(std::uint64_t bits) {
  Warp& warp = machine().warps[threadIdx.x / 32];
  std::uint64_t* const slots = warp.slots[warp.barrier.generation % 2];
  slots[lane()] = bits;
  wait(warp.barrier, 32);
  return slots;
}

}  // namespace emulator
