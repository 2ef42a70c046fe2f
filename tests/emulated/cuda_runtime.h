#pragma once
// As much of CUDA as the streaming kernels use, on one thread of a CPU: threads of a block are
// fibers that run until they wait for each other. Found before the toolkit's header of this name by
// the targets of tests/emulated. It shows whether kernels compute the right thing, stay inside of
// their operands and wait where they have to (with fibers run forwards and backwards); it says
// nothing about time, memory order or what is PTX (kernels/cuda/intrinsics.cuh).

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define ORRERY_EMULATED
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // one block runs at a time
#define __grid_constant__
#define __launch_bounds__(...)

struct uint2 {
  std::uint32_t x, y;
};
struct alignas(16) uint4 {
  std::uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(std::uint32_t x, std::uint32_t y) {
  return {x, y};
}
inline uint4 make_uint4(std::uint32_t x, std::uint32_t y, std::uint32_t z, std::uint32_t w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
struct float2 {
  float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x_) : x(x_) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace emulator {

/// Runs body() as every thread of every block; the blocks of a cluster run together.
void run(dim3 grid, dim3 block, std::size_t shared_bytes, const std::function<void()>& body,
         unsigned cluster = 1);
/// The order in which blocks, and threads of a block, get their turns.
inline bool backwards = false;

/// Called when all threads have had a turn; returns whether it did something. Empty: there is nothing.
inline std::function<bool()> between_turns;

void named_barrier(int id, int threads);
void wait_until(const std::function<bool()>& condition);
void cluster_barrier();
unsigned rank_in_cluster();
/// Whether all threads of a block of the cluster have returned.
bool has_left(unsigned rank);
/// Dynamic shared memory of a block of the cluster.
unsigned char* shared_of(unsigned rank);
std::size_t shared_bytes();
unsigned char* dynamic_shared();
/// Everybody's bits, after all 32 lanes of the warp have come here.
const std::uint64_t* exchange(std::uint64_t bits);

template <class T>
std::uint64_t bits_of(T value) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T value_of(std::uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline int lane() {
  return static_cast<int>(threadIdx.x % 32);
}

}  // namespace emulator

// ---------------------------------------------------------------------------------------------
// Functions of device code. Masks must be those of the whole warp.

inline void __syncthreads() {
  emulator::named_barrier(0, static_cast<int>(blockDim.x));
}
inline void __syncwarp() {
  emulator::exchange(0);
}
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return emulator::value_of<T>(emulator::exchange(emulator::bits_of(value))[from % 32]);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulator::value_of<T>(
      emulator::exchange(emulator::bits_of(value))[emulator::lane() ^ mask]);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta) {
  const std::uint64_t* all = emulator::exchange(emulator::bits_of(value));
  const int from = emulator::lane() - static_cast<int>(delta);
  return from < 0 ? value : emulator::value_of<T>(all[from]);
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  const std::uint64_t* all = emulator::exchange(vote ? 1 : 0);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) votes |= static_cast<unsigned>(all[i]) << i;
  return votes;
}
inline unsigned __match_any_sync(unsigned, int value) {
  const std::uint64_t mine = emulator::bits_of(value);
  const std::uint64_t* all = emulator::exchange(mine);
  unsigned same = 0;
  for (int i = 0; i < 32; ++i) same |= (all[i] == mine ? 1U : 0U) << i;
  return same;
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const std::uint64_t* all = emulator::exchange(value);
  std::uint64_t most = 0;
  for (int i = 0; i < 32; ++i) most = all[i] > most ? all[i] : most;
  return static_cast<unsigned>(most);
}
inline unsigned __reduce_min_sync(unsigned, unsigned value) {
  const std::uint64_t* all = emulator::exchange(value);
  std::uint64_t least = all[0];
  for (int i = 0; i < 32; ++i) least = all[i] < least ? all[i] : least;
  return static_cast<unsigned>(least);
}
inline unsigned __reduce_or_sync(unsigned, unsigned value) {
  const std::uint64_t* all = emulator::exchange(value);
  std::uint64_t any = 0;
  for (int i = 0; i < 32; ++i) any |= all[i];
  return static_cast<unsigned>(any);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const std::uint64_t bytes = x | static_cast<std::uint64_t>(y) << 32U;
  unsigned result = 0;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned byte = selector >> (4 * i) & 7U;
    result |= static_cast<unsigned>(bytes >> (8 * byte) & 0xffU) << (8 * i);
  }
  return result;
}
inline float __uint_as_float(unsigned bits) {
  return std::bit_cast<float>(bits);
}
inline unsigned __float_as_uint(float value) {
  return std::bit_cast<unsigned>(value);
}
inline int __float2int_rn(float value) {
  return static_cast<int>(std::lrintf(value));
}
template <class T>
T __ldg(const T* from) {
  return *from;
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
using std::isnan;

// ---------------------------------------------------------------------------------------------
// Functions of the host.

using cudaStream_t = struct EmulatedStream*;
enum cudaError_t { cudaSuccess = 0 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  emulator::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                [&] { kernel(Parameters(arguments)...); },
                config->numAttrs > 0 ? config->attrs[0].val.clusterDim.x : 1);
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
