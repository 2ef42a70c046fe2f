#include <cuda.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <utility>
#include <vector>

#include "kernels/cuda/tensor_map.hpp"
#include "kernels/format.hpp"

namespace emulator::hopper {
namespace {

/// Where dynamic shared memory begins: aligned to 16 bytes only.
constexpr std::uint32_t kBegin = 1024 + 48;

[[noreturn]] void fail(const char* message) {
  std::fprintf(stderr, "emulator: %s (block %u, thread %u)\n", message, blockIdx.x, threadIdx.x);
  std::abort();
}

unsigned char* memory_at(unsigned rank, std::uint32_t address, std::size_t bytes) {
  if (address < kBegin || address - kBegin + bytes > emulator::shared_bytes()) {
    fail("outside of shared memory");
  }
  return emulator::shared_of(rank) + (address - kBegin);
}

struct Mbarrier {
  int arrivals = 0;  ///< of a phase
  int missing = 0;
  std::int64_t bytes =
      0;  ///< expected and not yet there; negative: there before they were expected
  int phase = 0;

  void settle() {
    if (missing == 0 && bytes == 0) {
      missing = arrivals;
      phase ^= 1;
    }
  }
};

struct Copy {
  unsigned rank;
  std::uint32_t to;
  CUtensorMap map;
  int column, row;
  std::uint32_t barrier;
};

struct Product {
  float* d;
  int columns;
  std::uint64_t a, b;
  bool add, bf16, a_along_columns, b_along_columns;
  unsigned rank, thread;
};

struct Batches {
  std::deque<std::vector<Product>> closed;
  std::vector<Product> open;
};

struct State {
  std::map<std::pair<unsigned, std::uint32_t>, Mbarrier> barriers;
  std::vector<Copy> copies;
  std::map<std::pair<unsigned, unsigned>, Batches> batches;  ///< by rank and thread
  unsigned random = 1;
  std::uint64_t turn = 0;
  int waiting = 0;  ///< for turns to pass
};

State& state() {
  static State the_state;
  return the_state;
}

Mbarrier& barrier_at(unsigned rank, std::uint32_t address) {
  if (emulator::has_left(rank)) fail("a barrier of a block that has left");
  const auto found = state().barriers.find({rank, address});
  if (found == state().barriers.end()) fail("no barrier was initialised here");
  return found->second;
}

std::uint32_t swizzle(std::uint32_t address) {
  return address ^ ((address >> 3U) & 0x70U);
}

void perform(const Copy& c) {
  const int row_bytes = c.map.box_columns * c.map.element_bytes;
  for (int r = 0; r < c.map.box_rows; ++r) {
    // 16 bytes at a time: the swizzle moves no less.
    for (int first = 0; first < row_bytes; first += 16) {
      unsigned char chunk[16] = {};
      const std::int64_t row = c.row + r;
      for (int i = 0; i < 16; i += c.map.element_bytes) {
        const std::int64_t column = c.column + (first + i) / c.map.element_bytes;
        if (row < 0 || row >= c.map.rows || column < 0 || column >= c.map.columns) continue;
        std::memcpy(chunk + i, c.map.data + row * c.map.pitch_bytes + column * c.map.element_bytes,
                    static_cast<std::size_t>(c.map.element_bytes));
      }
      const auto at = c.to + static_cast<std::uint32_t>(r * row_bytes + first);
      std::memcpy(memory_at(c.rank, c.map.swizzled ? swizzle(at) : at, 16), chunk, 16);
    }
  }
  Mbarrier& barrier = barrier_at(c.rank, c.barrier);
  barrier.bytes -= static_cast<std::int64_t>(row_bytes) * c.map.box_rows;
  barrier.settle();
}

void start(const Copy& c) {
  if (c.to % (c.map.swizzled ? 1024U : 128U) != 0) fail("a box's place is not aligned");
  if (!late) return perform(c);
  state().copies.push_back(c);
}

/// Lets time pass: one of the copies that are under way is done, and whoever waits for turns to
/// pass may go on.
bool pass_time() {
  State& s = state();
  ++s.turn;
  if (s.copies.empty()) return s.waiting > 0;
  s.random = s.random * 1664525U + 1013904223U;
  const std::size_t i = (s.random >> 8U) % s.copies.size();
  const Copy chosen = s.copies[i];
  s.copies.erase(s.copies.begin() + static_cast<std::ptrdiff_t>(i));
  perform(chosen);
  return true;
}

struct Descriptor {
  std::uint32_t start, leading, stride;

  explicit Descriptor(std::uint64_t bits)
      : start(static_cast<std::uint32_t>(bits & 0x3FFFU) << 4U),
        leading(static_cast<std::uint32_t>(bits >> 16U & 0x3FFFU) << 4U),
        stride(static_cast<std::uint32_t>(bits >> 32U & 0x3FFFU) << 4U) {
    if (bits >> 62U != 1) fail("a descriptor without the 128-byte swizzle");
    if ((bits >> 49U & 7U) != 0) fail("a descriptor with a base offset");
  }
};

const std::vector<float>& decoded_e4m3() {
  static const std::vector<float> decoded = [] {
    std::vector<float> all;
    for (int c = 0; c < 256; ++c) {
      all.push_back(orrery::kernels::float_of_e4m3(static_cast<std::uint8_t>(c)));
    }
    return all;
  }();
  return decoded;
}

float decoded_bf16(const unsigned char* from) {
  std::uint16_t code = 0;
  std::memcpy(&code, from, 2);
  return orrery::kernels::float_of_bf16(code);
}

/// 32 bytes of the contraction of row (or column, of B) `i`, decoded: 32 e4m3 or 16 bf16. PTX ISA,
/// canonical layouts with the 128-byte swizzle.
void read(float* to, const Product& p, const Descriptor& d, int i, bool along_columns) {
  const auto at = static_cast<std::uint32_t>(i);
  if (along_columns) {
    const std::uint32_t first = d.start + at / 64 * d.leading + at % 64 * 2;
    for (std::uint32_t k = 0; k < 16; ++k) {
      const std::uint32_t offset = k / 8 * d.stride + k % 8 * 128;
      to[k] = decoded_bf16(memory_at(p.rank, swizzle(first + offset), 2));
    }
    return;
  }
  const std::uint32_t first = d.start + at / 8 * d.stride + at % 8 * 128;
  for (std::uint32_t chunk = 0; chunk < 2; ++chunk) {
    const unsigned char* const from = memory_at(p.rank, swizzle(first + chunk * 16), 16);
    if (p.bf16) {
      for (int k = 0; k < 8; ++k) *to++ = decoded_bf16(from + 2 * k);
    } else {
      for (int k = 0; k < 16; ++k) *to++ = decoded_e4m3()[from[k]];
    }
  }
}

void perform(const Product& p) {
  const Descriptor a(p.a), b(p.b);
  const int depth = p.bf16 ? 16 : 32;
  const auto lane = static_cast<int>(p.thread % 32);
  const auto warp = static_cast<int>(p.thread / 32 % 4);
  float rows[2][32];
  for (int h = 0; h < 2; ++h) {
    read(rows[h], p, a, 16 * warp + lane / 4 + 8 * h, p.a_along_columns);
  }
  for (int c = 0; c < p.columns / 4; ++c) {  // this thread's columns: two of every eight
    float column[32];
    read(column, p, b, c / 2 * 8 + lane % 4 * 2 + c % 2, p.b_along_columns);
    for (int h = 0; h < 2; ++h) {
      float& d = p.d[c / 2 * 4 + h * 2 + c % 2];
      float sum = p.add ? d : 0.0F;
      for (int k = 0; k < depth; ++k) sum += rows[h][k] * column[k];
      d = sum;
    }
  }
}

Batches& my_batches() {
  return state().batches[{emulator::rank_in_cluster(), threadIdx.x}];
}

}  // namespace

std::uint32_t shared_address(const void* pointer) {
  const auto* const mine = emulator::shared_of(emulator::rank_in_cluster());
  return kBegin + static_cast<std::uint32_t>(static_cast<const unsigned char*>(pointer) - mine);
}
float load_shared(std::uint32_t address) {
  float value = 0;
  std::memcpy(&value, memory_at(emulator::rank_in_cluster(), address, 4), 4);
  return value;
}
float2 load_shared_pair(std::uint32_t address) {
  if (address % 8 != 0) fail("a pair that is not aligned");
  return {load_shared(address), load_shared(address + 4)};
}
void clear_shared(std::uint32_t address) {
  std::memset(memory_at(emulator::rank_in_cluster(), address, 16), 0, 16);
}
uint4 load_shared_vector(std::uint32_t address) {
  if (address % 16 != 0) fail("a vector that is not aligned");
  uint4 value{};
  std::memcpy(&value, memory_at(emulator::rank_in_cluster(), address, 16), 16);
  return value;
}

void init_barrier(std::uint32_t barrier, int arrivals) {
  memory_at(emulator::rank_in_cluster(), barrier, 8);
  if (barrier % 8 != 0) fail("a barrier that is not aligned");
  state().barriers[{emulator::rank_in_cluster(), barrier}] = {arrivals, arrivals, 0, 0};
}
void arrive_at(std::uint32_t barrier, int rank) {
  Mbarrier& b = barrier_at(static_cast<unsigned>(rank), barrier);
  if (--b.missing < 0) fail("one arrival too many");
  b.settle();
}
void arrive(std::uint32_t barrier) {
  arrive_at(barrier, static_cast<int>(emulator::rank_in_cluster()));
}
void arrive_and_expect(std::uint32_t barrier, int bytes) {
  barrier_at(emulator::rank_in_cluster(), barrier).bytes += bytes;
  arrive(barrier);
}
void wait_for(std::uint32_t barrier, int parity) {
  const Mbarrier& b = barrier_at(emulator::rank_in_cluster(), barrier);
  emulator::wait_until([&] { return b.phase != parity; });
}

void load_box(std::uint32_t to, const CUtensorMap* map, int column, int row,
              std::uint32_t barrier) {
  start({emulator::rank_in_cluster(), to, *map, column, row, barrier});
}
void load_box_multicast(std::uint32_t to, const CUtensorMap* map, int column, int row,
                        std::uint32_t barrier, int mask) {
  for (unsigned rank = 0; rank < 16; ++rank) {
    if ((mask >> rank & 1) != 0) start({rank, to, *map, column, row, barrier});
  }
}

void store_matrices(std::uint32_t to, std::uint32_t m0, std::uint32_t m1, std::uint32_t m2,
                    std::uint32_t m3) {
  const std::uint64_t* const addresses = emulator::exchange(to);
  const std::uint32_t matrices[4] = {m0, m1, m2, m3};
  for (int m = 0; m < 4; ++m) {
    const auto row = static_cast<std::uint32_t>(addresses[m * 8 + emulator::lane() / 4]);
    if (row % 16 != 0) fail("a row of a matrix that is not aligned");
    const auto at = row + static_cast<std::uint32_t>(emulator::lane() % 4 * 4);
    std::memcpy(memory_at(emulator::rank_in_cluster(), at, 4), &matrices[m], 4);
  }
}

void multiply(float* d, int columns, std::uint64_t a, std::uint64_t b, bool add, bool bf16,
              bool a_along_columns, bool b_along_columns) {
  const Product p{d,
                  columns,
                  a,
                  b,
                  add,
                  bf16,
                  a_along_columns,
                  b_along_columns,
                  emulator::rank_in_cluster(),
                  threadIdx.x};
  if (!late) return perform(p);
  // Until then nobody may read it.
  for (int i = 0; i < columns / 2 && !add; ++i) d[i] = -1e30F;
  my_batches().open.push_back(p);
}
void wgmma_commit() {
  Batches& mine = my_batches();
  mine.closed.push_back(std::move(mine.open));
  mine.open.clear();
}
void wait_for_batches(int under_way) {
  Batches& mine = my_batches();
  if (mine.closed.size() > static_cast<std::size_t>(under_way) && late) {
    // Others may go on before the products read shared memory.
    State& s = state();
    const std::uint64_t then = s.turn + 3;
    ++s.waiting;
    emulator::wait_until([&] { return s.turn >= then; });
    --s.waiting;
  }
  while (mine.closed.size() > static_cast<std::size_t>(under_way)) {
    for (const Product& p : mine.closed.front()) perform(p);
    mine.closed.pop_front();
  }
  // .sync.aligned: no lane is ahead of its warp.
  emulator::exchange(0);
}

void be_late(bool yes) {
  late = yes;
  emulator::between_turns = pass_time;
}

}  // namespace emulator::hopper

namespace orrery::kernels::cuda {

CUtensorMap make_map(const MapRequest& r) {
  if (reinterpret_cast<std::uintptr_t>(r.data) % 16 != 0 || r.pitch_bytes % 16 != 0 ||
      r.box_rows > 256 || r.box_columns > 256) {
    std::abort();
  }
  const int bytes = r.element == MapElement::byte ? 1 : r.element == MapElement::bf16 ? 2 : 4;
  if (r.swizzled && r.box_columns * bytes != 128) std::abort();
  return {static_cast<const unsigned char*>(r.data),
          bytes,
          r.rows,
          r.columns,
          r.pitch_bytes,
          r.box_rows,
          r.box_columns,
          r.swizzled};
}

}  // namespace orrery::kernels::cuda
