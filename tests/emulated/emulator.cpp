#include <cuda_runtime.h>
#include <setjmp.h>
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

/// Where somebody stopped. Made by ucontext, but left and entered by jumps: swapcontext would ask
/// the kernel for the signal mask each time.
struct Context {
  ucontext_t first{};
  jmp_buf stopped{};
  bool started = true;  ///< the scheduler is

  void make(char* stack, void (*entry)()) {
    getcontext(&first);
    first.uc_stack.ss_sp = stack;
    first.uc_stack.ss_size = kStackBytes;
    first.uc_link = nullptr;
    makecontext(&first, entry, 0);
    started = false;
  }
};

void switch_to(Context& from, Context& to) {
  if (_setjmp(from.stopped) != 0) return;
  if (to.started) _longjmp(to.stopped, 1);
  to.started = true;
  setcontext(&to.first);
}

struct Fiber {
  Context context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  const Barrier* waits_for = nullptr;
  std::uint64_t generation = 0;
  const std::function<bool()>* condition = nullptr;
  unsigned block = 0;  ///< of the cluster
  unsigned thread = 0;
  bool finished = false;
};

struct Warp {
  Barrier barrier;
  std::uint64_t slots[2][32];
};

struct Block {
  std::vector<Warp> warps;
  Barrier barriers[16];
  std::vector<uint4> shared;
};

/// One cluster of blocks at a time, on one thread.
struct Machine {
  Context scheduler;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks;
  Barrier cluster;
  unsigned first_block = 0;
  const std::function<void()>* body = nullptr;
  Fiber* running = nullptr;

  Block& block() { return blocks[running->block]; }
  /// Fiber `f` goes on.
  void enter(Fiber& f) {
    running = &f;
    blockIdx = dim3(first_block + f.block);
    threadIdx = dim3(f.thread);
  }
  void leave() {
    Fiber& f = *running;
    switch_to(f.context, scheduler);
    enter(f);
  }
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
  m.running->waits_for = &barrier;
  m.running->generation = barrier.generation;
  m.leave();
}

void enter() {
  Machine& m = machine();
  (*m.body)();
  m.running->finished = true;
  switch_to(m.running->context, m.scheduler);
}

bool waits(Fiber& f) {
  if (f.waits_for != nullptr && f.waits_for->generation == f.generation) return true;
  if (f.condition != nullptr && !(*f.condition)()) return true;
  f.waits_for = nullptr;
  f.condition = nullptr;
  return false;
}

void run_cluster(unsigned threads, std::size_t shared_bytes) {
  Machine& m = machine();
  const auto blocks = static_cast<unsigned>(m.blocks.size());
  m.cluster = Barrier{};
  for (Block& block : m.blocks) {
    block.warps.assign((threads + 31) / 32, Warp{});
    std::fill(std::begin(block.barriers), std::end(block.barriers), Barrier{});
    block.shared.assign((shared_bytes + 15) / 16,
                        uint4{0x7fc0beefU, 0x7fc0beefU, 0x7fc0beefU, 0x7fc0beefU});
  }
  const unsigned fibers = threads * blocks;
  while (m.fibers.size() < fibers) m.fibers.push_back(std::make_unique<Fiber>());
  for (unsigned i = 0; i < fibers; ++i) {
    Fiber& fiber = *m.fibers[i];
    fiber.context.make(fiber.stack.get(), enter);
    fiber.waits_for = nullptr;
    fiber.condition = nullptr;
    fiber.block = i / threads;
    fiber.thread = i % threads;
    fiber.finished = false;
  }
  unsigned left = fibers;
  while (left > 0) {
    bool moved = false;
    for (unsigned turn = 0; turn < fibers; ++turn) {
      Fiber& fiber = *m.fibers[backwards ? fibers - 1 - turn : turn];
      if (fiber.finished || waits(fiber)) continue;
      moved = true;
      m.enter(fiber);
      switch_to(m.scheduler, fiber.context);
      if (fiber.finished) --left;
    }
    if (between_turns) moved |= between_turns();
    if (!moved) fail("threads wait for others that have left or wait elsewhere");
  }
}

}  // namespace

void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body,
         unsigned cluster) {
  if (block.x % 32 != 0 || block.x == 0 || block.x > 1024) fail("a block of odd size");
  if (grid.x % cluster != 0) fail("a grid that is not a multiple of its clusters");
  Machine& m = machine();
  m.body = &body;
  m.blocks.resize(cluster);
  gridDim = grid;
  blockDim = block;
  for (unsigned c = 0; c < grid.x; c += cluster) {
    m.first_block = backwards ? grid.x - cluster - c : c;
    run_cluster(block.x, shared_bytes);
  }
}

void wait_until(const std::function<bool()>& condition) {
  Machine& m = machine();
  if (condition()) return;
  m.running->condition = &condition;
  m.leave();
}

void cluster_barrier() {
  Machine& m = machine();
  wait(m.cluster, static_cast<int>(blockDim.x * m.blocks.size()));
}

bool has_left(unsigned rank) {
  Machine& m = machine();
  const std::size_t threads = blockDim.x;
  for (std::size_t i = rank * threads; i < (rank + 1) * threads; ++i) {
    if (!m.fibers[i]->finished) return false;
  }
  return true;
}

unsigned rank_in_cluster() {
  return machine().running->block;
}

unsigned char* shared_of(unsigned rank) {
  return reinterpret_cast<unsigned char*>(machine().blocks.at(rank).shared.data());
}

std::size_t shared_bytes() {
  return machine().blocks.front().shared.size() * sizeof(uint4);
}

void named_barrier(int id, int threads) {
  if (id < 0 || id > 15 || threads % 32 != 0) fail("no such barrier");
  wait(machine().block().barriers[id], threads);
}

unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>(machine().block().shared.data());
}

const std::uint64_t* exchange(std::uint64_t bits) {
  Warp& warp = machine().block().warps[threadIdx.x / 32];
  std::uint64_t* const slots = warp.slots[warp.barrier.generation % 2];
  slots[lane()] = bits;
  wait(warp.barrier, 32);
  return slots;
}

}  // namespace emulator
