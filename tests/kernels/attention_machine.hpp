#pragma once
// A block of a Hopper GPU on the CPU, as far as kernels/cuda/attention_hopper.cuh can tell: it
// defines what attention_device.cuh gets from PTX, so that the kernels themselves run, thread by
// thread, in a test.
//
// Threads are coroutines that are resumed in random order. What hardware does at a time of its own
// is done late or early, at random: the copy engine delivers whenever no one looks, and a wgmma
// reads its registers and shared memory, and writes its results, anywhere between its issue and the
// wait for it. A kernel that relies on luck there gives wrong results for some seeds. Shared memory
// begins as NaN, and a block in which nobody can go on is reported.
//
// Layouts are those of the PTX ISA 9.0 (swizzles, matrix descriptors, fragments of wgmma), written
// down here a second time, element by element.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include "kernels/format.hpp"

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace orrery::kernels::cuda::attention {

struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, gridDim, blockDim;

/// A matrix of four dimensions, fastest first, and the box that is moved at once.
struct CUtensorMap {
  const std::uint16_t* data = nullptr;
  std::array<std::int64_t, 4> dims{};
  std::array<std::int64_t, 4> strides{};  ///< in elements
  std::array<int, 4> box{};
};

class Machine {
 public:
  static constexpr std::uint32_t kSharedBase = 1040;  ///< of its addresses; no multiple of 1024
  static constexpr int kSharedBytes = 227 * 1024;

  explicit Machine(std::uint64_t seed) : random_(seed) {}

  /// Runs kernel() in every thread of every block. Throws if a block hangs, or does what it must
  /// not.
  void run(int grid, int block, int shared_bytes, const std::function<void()>& kernel) {
    if (shared_bytes > kSharedBytes) throw std::runtime_error("too much shared memory");
    gridDim.x = static_cast<unsigned>(grid);
    blockDim.x = static_cast<unsigned>(block);
    current_ = this;
    for (int b = 0; b < grid; ++b) {
      blockIdx.x = static_cast<unsigned>(b);
      run_block(block, shared_bytes, kernel);
    }
    current_ = nullptr;
  }

  static Machine& current() { return *current_; }

  // What threads call.

  void wait_until(const std::function<bool()>& ready) {
    while (!ready()) yield();
    ++events_;
  }
  unsigned char* shared(std::uint32_t address, std::uint32_t bytes) {
    if (address < kSharedBase || address + bytes > kSharedBase + shared_.size()) {
      throw std::runtime_error("outside of shared memory");
    }
    return shared_.data() + (address - kSharedBase);
  }

  struct Barrier {
    int expected = 0;
    int missing = 0;
    std::int64_t bytes = 0;
    int phase = 0;
  };
  void init_barrier(std::uint32_t address, int arrivals) {
    if (address % 8 != 0) throw std::runtime_error("a barrier at an odd address");
    barriers_[address] = {arrivals, arrivals, 0, 0};
  }
  void arrive(std::uint32_t address, int bytes) {
    Barrier& barrier = barriers_.at(address);
    barrier.bytes += bytes;
    if (--barrier.missing < 0) throw std::runtime_error("more arrivals than a barrier takes");
    settle(barrier);
  }
  void wait_for(std::uint32_t address, int parity) {
    const Barrier& barrier = barriers_.at(address);
    wait_until([&] { return barrier.phase % 2 != parity; });
  }

  void copy(std::uint32_t barrier, int bytes, std::function<void()> action) {
    copies_.push_back([this, barrier, bytes, action = std::move(action)] {
      action();
      Barrier& b = barriers_.at(barrier);
      b.bytes -= bytes;
      settle(b);
    });
    ++events_;
  }

  /// Whole warps; `waits` false: bar.arrive.
  void turn(int id, int threads, bool waits) {
    Turn& turn = turns_[id];
    const int generation = turn.generation;
    ++events_;
    if (++turn.arrived == threads) {
      turn.arrived = 0;
      ++turn.generation;
    }
    if (waits) wait_until([&] { return turn.generation != generation; });
  }

  float exchange(float value, int bits) {
    const int thread = static_cast<int>(threadIdx.x);
    Warp& warp = warps_[static_cast<std::size_t>(thread / 32)];
    const std::size_t lane = static_cast<std::size_t>(thread % 32);
    const std::size_t half = warp.uses[lane]++ % 2;
    warp.values[half][lane] = value;
    const int target = warp.uses[lane] * 32;
    ++warp.arrived;
    ++events_;
    wait_until([&] { return warp.arrived >= target; });
    return warp.values[half][lane ^ static_cast<std::size_t>(bits)];
  }

  // wgmma.

  struct Product {
    int columns = 0;
    bool from_registers = false;
    bool add = false;
    std::uint64_t a = 0, b = 0;
    std::array<float*, 128> d{};
    std::array<std::array<const std::uint32_t*, 4>, 128> a_registers{};
    int joined = 0;
    bool early = false;      ///< it runs when all have issued it, else when it is waited for,
    std::int64_t round = 0;  ///< and not before this
  };
  void multiply(const Product& product, float* d, const std::array<const std::uint32_t*, 4>& a) {
    const std::size_t thread = threadIdx.x % 128;
    Group& group = groups_[threadIdx.x / 128];
    const std::size_t index = group.issued[thread]++;
    if (index == group.products.size()) {
      group.products.push_back(product);
      group.products.back().early = random_() % 4 < early_;
    }
    Product& shared_product = group.products[index];
    if (shared_product.columns != product.columns || shared_product.a != product.a ||
        shared_product.b != product.b || shared_product.add != product.add ||
        shared_product.from_registers != product.from_registers) {
      throw std::runtime_error("threads of a warpgroup issue different products");
    }
    shared_product.d[thread] = d;
    shared_product.a_registers[thread] = a;
    if (++shared_product.joined == 128) {
      shared_product.round = round_ + static_cast<std::int64_t>(random_() % 6);
    }
    ++events_;
    // Products of a warpgroup run in order.
    if (shared_product.joined == 128 && shared_product.early) run_up_to(group, index + 1);
  }
  void commit() {
    const std::size_t thread = threadIdx.x % 128;
    Group& group = groups_[threadIdx.x / 128];
    group.commits[thread].push_back(group.issued[thread]);
  }
  void wait_products(std::size_t under_way) {
    const std::size_t thread = threadIdx.x % 128;
    Group& group = groups_[threadIdx.x / 128];
    const std::vector<std::size_t>& commits = group.commits[thread];
    if (commits.size() <= under_way) return;
    const std::size_t count = commits[commits.size() - 1 - under_way];
    wait_until([&] {
      if (group.run >= count) return true;
      if (group.products.size() < count || group.products[count - 1].joined < 128) return false;
      ++events_;  // it takes its time, but goes on
      return round_ >= group.products[count - 1].round;
    });
    run_up_to(group, count);
  }

 private:
  struct Turn {
    int arrived = 0;
    int generation = 0;
  };
  struct Warp {
    std::array<std::array<float, 32>, 2> values{};
    std::array<int, 32> uses{};
    int arrived = 0;
  };
  struct Group {
    std::deque<Product> products;
    std::size_t run = 0;
    std::array<std::size_t, 128> issued{};
    std::array<std::vector<std::size_t>, 128> commits;
  };
  struct Thread {
    ucontext_t context{};
    std::vector<unsigned char> stack;
    bool over = false;
    void* fake_stack = nullptr;
  };

  void settle(Barrier& barrier) {
    if (barrier.missing == 0 && barrier.bytes == 0) {
      barrier.missing = barrier.expected;
      ++barrier.phase;
    }
    ++events_;
  }

  void run_up_to(Group& group, std::size_t count) {
    for (; group.run < count; ++group.run) run_product(group.products[group.run]);
  }

  static std::uint32_t swizzled(std::uint32_t address) {
    return address ^ ((address >> 7U & 7U) << 4U);
  }
  float element(std::uint32_t address) {
    std::uint16_t code = 0;
    std::memcpy(&code, shared(swizzled(address), 2), 2);
    return float_of_bf16(code);
  }
  struct Matrix {
    std::uint32_t start, leading, stride;
  };
  static Matrix matrix_of(std::uint64_t descriptor) {
    if (descriptor >> 62U != 1) throw std::runtime_error("not a swizzle of 128 bytes");
    return {static_cast<std::uint32_t>(descriptor & 0x3fffU) << 4U,
            static_cast<std::uint32_t>(descriptor >> 16U & 0x3fffU) << 4U,
            static_cast<std::uint32_t>(descriptor >> 32U & 0x3fffU) << 4U};
  }
  /// Row i, element k of a matrix whose rows run along the contraction.
  float along(const Matrix& m, std::uint32_t i, std::uint32_t k) {
    return element(m.start + i / 8 * m.stride + i % 8 * 128 + k * 2);
  }
  /// Row k, element n of a matrix whose rows run along the other dimension.
  float down(const Matrix& m, std::uint32_t k, std::uint32_t n) {
    return element(m.start + n / 64 * m.leading + k / 8 * m.stride + k % 8 * 128 + n % 64 * 2);
  }

  void run_product(Product& product) {
    constexpr std::uint32_t kDepth = 16;
    std::array<std::array<float, kDepth>, 64> a{};
    const auto n = static_cast<std::uint32_t>(product.columns);
    std::vector<float> b(kDepth * n);
    if (product.from_registers) {
      for (std::uint32_t t = 0; t < 128; ++t) {
        for (std::uint32_t r = 0; r < 4; ++r) {
          const std::uint32_t both = *product.a_registers[t][r];
          const std::uint32_t row = t / 32 * 16 + t % 32 / 4 + r % 2 * 8;
          const std::uint32_t column = t % 4 * 2 + r / 2 * 8;
          a[row][column] = float_of_bf16(static_cast<std::uint16_t>(both & 0xffffU));
          a[row][column + 1] = float_of_bf16(static_cast<std::uint16_t>(both >> 16U));
        }
      }
    } else {
      const Matrix m = matrix_of(product.a);
      for (std::uint32_t i = 0; i < 64; ++i) {
        for (std::uint32_t k = 0; k < kDepth; ++k) a[i][k] = along(m, i, k);
      }
    }
    const Matrix m = matrix_of(product.b);
    for (std::uint32_t k = 0; k < kDepth; ++k) {
      for (std::uint32_t j = 0; j < n; ++j) {
        b[k * n + j] = product.from_registers ? down(m, k, j) : along(m, j, k);
      }
    }
    std::vector<float> sums(n);
    for (std::uint32_t i = 0; i < 64; ++i) {
      std::fill(sums.begin(), sums.end(), 0.0F);
      for (std::uint32_t k = 0; k < kDepth; ++k) {
        for (std::uint32_t j = 0; j < n; ++j) sums[j] += a[i][k] * b[k * n + j];
      }
      for (std::uint32_t j = 0; j < n; ++j) {
        const std::uint32_t t = i / 16 * 32 + i % 8 * 4 + j % 8 / 2;
        float& d = product.d[t][j / 8 * 4 + i % 16 / 8 * 2 + j % 2];
        d = product.add ? d + sums[j] : sums[j];
      }
    }
    ++events_;
  }

  // Coroutines.

  void yield() { leave(*thread_, false); }

  void leave([[maybe_unused]] Thread& from, [[maybe_unused]] bool for_ever) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_ever ? nullptr : &from.fake_stack, main_bottom_, main_size_);
#endif
    swapcontext(&from.context, &main_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from.fake_stack, &main_bottom_, &main_size_);
#endif
  }
  void resume(Thread& to) {
    thread_ = &to;
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, to.stack.data(), to.stack.size());
#endif
    swapcontext(&main_, &to.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  static void entry() {
    Machine& machine = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.main_bottom_, &machine.main_size_);
#endif
    try {
      (*machine.kernel_)();
    } catch (const std::exception& error) {
      if (machine.error_.empty()) machine.error_ = error.what();
    }
    machine.thread_->over = true;
    ++machine.events_;
    machine.leave(*machine.thread_, true);
  }

  void run_block(int block, int shared_bytes, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    error_.clear();
    early_ = random_() % 3 * 2;
    shared_.assign(static_cast<std::size_t>(shared_bytes), 0xff);
    barriers_.clear();
    turns_.clear();
    copies_.clear();
    warps_.assign(static_cast<std::size_t>(block / 32), {});
    groups_ = std::vector<Group>(static_cast<std::size_t>(block / 128));
    std::vector<std::unique_ptr<Thread>> threads;
    for (int t = 0; t < block; ++t) {
      auto thread = std::make_unique<Thread>();
      thread->stack.resize(256 * 1024);
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = thread->stack.data();
      thread->context.uc_stack.ss_size = thread->stack.size();
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, &Machine::entry, 0);
      threads.push_back(std::move(thread));
    }
    std::vector<int> order;
    for (int t = 0; t < block; ++t) order.push_back(t);
    while (!order.empty()) {
      const std::int64_t before = events_;
      ++round_;
      for (const int t : order) {
        threadIdx.x = static_cast<unsigned>(t);
        resume(*threads[static_cast<std::size_t>(t)]);
        if (!error_.empty()) throw std::runtime_error(error_);
        if (!copies_.empty() && random_() % 64 == 0) deliver();
      }
      std::erase_if(order, [&](int t) { return threads[static_cast<std::size_t>(t)]->over; });
      std::shuffle(order.begin(), order.end(), random_);
      if (events_ == before && !order.empty()) {
        if (copies_.empty()) {
          throw std::runtime_error(
              "block " + std::to_string(blockIdx.x) + " hangs: " + std::to_string(order.size()) +
              " threads wait, thread " + std::to_string(order.front()) + " among them");
        }
        deliver();
      }
    }
    if (!copies_.empty()) throw std::runtime_error("a block ends before its copies do");
  }
  void deliver() {
    const auto one = static_cast<std::ptrdiff_t>(random_() % copies_.size());
    const std::function<void()> copy = std::move(copies_[static_cast<std::size_t>(one)]);
    copies_.erase(copies_.begin() + one);
    copy();
  }

  inline static Machine* current_ = nullptr;
  std::mt19937_64 random_;
  std::uint64_t early_ =
      0;  ///< of four products in this block: since they run in order, 0 makes all late
  std::int64_t events_ = 0;
  std::int64_t round_ = 0;  ///< every thread that can has been resumed so often
  std::vector<unsigned char> shared_;
  std::map<std::uint32_t, Barrier> barriers_;
  std::map<int, Turn> turns_;
  std::vector<std::function<void()>> copies_;
  std::vector<Warp> warps_;
  std::vector<Group> groups_;
  ucontext_t main_{};
  const void* main_bottom_ = nullptr;
  std::size_t main_size_ = 0;
  Thread* thread_ = nullptr;
  const std::function<void()>* kernel_ = nullptr;
  std::string error_;
};

// ---------------------------------------------------------------------------------------------
// What hopper.cuh, intrinsics.cuh and attention_device.cuh offer on a GPU.

inline unsigned char* dynamic_shared() {
  return Machine::current().shared(Machine::kSharedBase, 0);
}
inline std::uint32_t shared_address(const void*) {
  return Machine::kSharedBase;
}
inline void init_barrier(std::uint32_t barrier, int arrivals) {
  Machine::current().init_barrier(barrier, arrivals);
}
inline void publish_barriers() {}
inline void arrive(std::uint32_t barrier) {
  Machine::current().arrive(barrier, 0);
}
inline void arrive_and_expect(std::uint32_t barrier, int bytes) {
  Machine::current().arrive(barrier, bytes);
}
inline void wait_for(std::uint32_t barrier, int parity) {
  Machine::current().wait_for(barrier, parity);
}
inline void prefetch_map(const CUtensorMap*) {}

inline void load_box(std::uint32_t to, const CUtensorMap* map, int column, int head, int row,
                     int sequence, std::uint32_t barrier) {
  if (to % 1024 != 0) throw std::runtime_error("a swizzled box at an odd address");
  const std::array<int, 4> corner = {column, head, row, sequence};
  const int bytes = map->box[0] * map->box[1] * map->box[2] * map->box[3] * 2;
  if (map->box[0] != 64) throw std::runtime_error("a box that is not 128 bytes wide");
  Machine& machine = Machine::current();
  machine.copy(barrier, bytes, [&machine, to, map = *map, corner] {
    std::uint32_t line = 0;
    for (int s = 0; s < map.box[3]; ++s) {
      for (int r = 0; r < map.box[2]; ++r) {
        for (int h = 0; h < map.box[1]; ++h, ++line) {
          for (int c = 0; c < map.box[0]; ++c) {
            const std::array<std::int64_t, 4> at = {corner[0] + c, corner[1] + h, corner[2] + r,
                                                    corner[3] + s};
            std::uint16_t code = 0;  // outside of the matrix
            bool inside = true;
            std::int64_t offset = 0;
            for (std::size_t i = 0; i < 4; ++i) {
              inside = inside && at[i] >= 0 && at[i] < map.dims[i];
              offset += at[i] * map.strides[i];
            }
            if (inside) code = map.data[offset];
            const std::uint32_t address = to + line * 128 + static_cast<std::uint32_t>(2 * c);
            std::memcpy(machine.shared(address ^ ((address >> 7U & 7U) << 4U), 2), &code, 2);
          }
        }
      }
    }
  });
}
inline void load_bytes(std::uint32_t to, const void* from, int bytes, std::uint32_t barrier) {
  if (to % 16 != 0 || bytes % 16 != 0 || reinterpret_cast<std::uintptr_t>(from) % 16 != 0) {
    throw std::runtime_error("a copy that is not aligned to 16 bytes");
  }
  Machine& machine = Machine::current();
  machine.copy(barrier, bytes, [&machine, to, from, bytes] {
    std::memcpy(machine.shared(to, static_cast<std::uint32_t>(bytes)), from,
                static_cast<std::size_t>(bytes));
  });
}
inline void arrive_at_turn(int id, int threads) {
  Machine::current().turn(id, threads, false);
}
inline void wait_for_turn(int id, int threads) {
  Machine::current().turn(id, threads, true);
}
inline void __syncthreads() {
  Machine::current().turn(0, static_cast<int>(blockDim.x), true);
}
inline float exp2_of(float x) {
  return std::exp2(x);
}
inline float log2_of(float x) {
  return std::log2(x);
}
inline float exp_of(float x) {
  return std::exp(x);
}
inline float log_of(float x) {
  return std::log(x);
}
inline float from_lane_xor(float x, int bits) {
  return Machine::current().exchange(x, bits);
}
/// Of small numbers, which floats hold.
inline int from_lane_xor(int x, int bits) {
  return static_cast<int>(Machine::current().exchange(static_cast<float>(x), bits));
}
template <class T>
void load_pair(std::uint32_t address, T& x, T& y) {
  if (address % 8 != 0) throw std::runtime_error("two numbers at an odd address");
  const unsigned char* const from = Machine::current().shared(address, 8);
  std::memcpy(&x, from, 4);
  std::memcpy(&y, from + 4, 4);
}
template <int kRegisters>
void give_registers_back() {}
template <int kRegisters>
void take_registers() {}
inline void wgmma_fence() {}
inline void wgmma_commit() {
  Machine::current().commit();
}
template <int kUnderWay>
void wgmma_wait() {
  Machine::current().wait_products(kUnderWay);
}
inline void pin(float&) {}

template <int kColumns>
void multiply_shared(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool add) {
  Machine::Product product;
  product.columns = kColumns;
  product.add = add;
  product.a = a;
  product.b = b;
  Machine::current().multiply(product, d, {});
}
template <int kColumns>
void multiply_registers(float (&d)[kColumns / 2], const std::uint32_t& a0, const std::uint32_t& a1,
                        const std::uint32_t& a2, const std::uint32_t& a3, std::uint64_t b) {
  Machine::Product product;
  product.columns = kColumns;
  product.from_registers = true;
  product.add = true;
  product.b = b;
  Machine::current().multiply(product, d, {&a0, &a1, &a2, &a3});
}

inline std::uint32_t pack_bf16x2(float low, float high) {
  return bf16_of(low) | static_cast<std::uint32_t>(bf16_of(high)) << 16U;
}
inline float __uint_as_float(std::uint32_t bits) {
  float x = 0;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline int min(int a, int b) {
  return std::min(a, b);
}
inline int max(int a, int b) {
  return std::max(a, b);
}

}  // namespace orrery::kernels::cuda::attention
