#pragma once
// The instructions of kernels/cuda/hopper.cuh and wgmma.cuh in plain C++: barriers in shared
// memory, the copy engine, and products that read shared memory as a matrix descriptor says. What a
// GPU does some time later happens here either at once or as late as it may, in turns.

#include <cuda_runtime.h>

#include <cstdint>

/// What make_map() is asked for.
struct CUtensorMap {
  const unsigned char* data = nullptr;
  int element_bytes = 0;
  std::int64_t rows = 0, columns = 0, pitch_bytes = 0;
  int box_rows = 0, box_columns = 0;
  bool swizzled = false;
};

namespace emulator::hopper {

/// Whether copies and products happen late, instead of at once.
inline bool late = false;
void be_late(bool yes);

std::uint32_t shared_address(const void* pointer);
float load_shared(std::uint32_t address);
float2 load_shared_pair(std::uint32_t address);
void clear_shared(std::uint32_t address);
uint4 load_shared_vector(std::uint32_t address);

void init_barrier(std::uint32_t barrier, int arrivals);
inline void publish_barriers() {}
void arrive_and_expect(std::uint32_t barrier, int bytes);
void arrive_at(std::uint32_t barrier, int rank);
void arrive(std::uint32_t barrier);
void wait_for(std::uint32_t barrier, int parity);

inline void prefetch_map(const CUtensorMap*) {}
void load_box(std::uint32_t to, const CUtensorMap* map, int column, int row, std::uint32_t barrier);
void load_box_multicast(std::uint32_t to, const CUtensorMap* map, int column, int row,
                        std::uint32_t barrier, int mask);
inline void fence_async_proxy() {}

inline void cluster_barrier() {
  emulator::cluster_barrier();
}
template <int kRegisters>
void give_registers_back() {}
template <int kRegisters>
void take_registers() {}

void store_matrices(std::uint32_t to, std::uint32_t m0, std::uint32_t m1, std::uint32_t m2,
                    std::uint32_t m3);
inline void add_to_global(float* to, float x) {
  *to += x;
}
inline void add_to_global(float* to, float x, float y) {
  to[0] += x;
  to[1] += y;
}

/// d: this thread's part of 64 x columns.
void multiply(float* d, int columns, std::uint64_t a, std::uint64_t b, bool add, bool bf16,
              bool a_along_columns, bool b_along_columns);
inline void wgmma_fence() {}
void wgmma_commit();
void wait_for_batches(int under_way);
template <int kUnderWay>
void wgmma_wait() {
  wait_for_batches(kUnderWay);
}
inline void pin(float&) {}

}  // namespace emulator::hopper
