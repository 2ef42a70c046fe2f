#pragma once
// All that is PTX in the streaming kernels, one small function each. With ORRERY_EMULATED (the
// tests that run the kernels on a CPU, tests/kernels/emulator) the same functions in plain C++.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/format.hpp"

namespace orrery::kernels::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffU;

#ifdef ORRERY_EMULATED

inline std::uint32_t pack_bf16x2(float low, float high) {
  return bf16_of(low) | static_cast<std::uint32_t>(bf16_of(high)) << 16U;
}
inline std::uint32_t pack_e4m3x2(float low, float high) {
  return e4m3_of(low) | static_cast<std::uint32_t>(e4m3_of(high)) << 8U;
}
inline void unpack_e4m3x2(std::uint32_t codes, float& low, float& high) {
  low = float_of_e4m3(static_cast<std::uint8_t>(codes & 0xffU));
  high = float_of_e4m3(static_cast<std::uint8_t>(codes >> 8U & 0xffU));
}
inline void barrier(int id, int threads) {
  emulator::named_barrier(id, threads);
}
inline unsigned char* dynamic_shared() {
  return emulator::dynamic_shared();
}

#else

/// To the nearest, ties to even.
__device__ __forceinline__ std::uint32_t pack_bf16x2(float low, float high) {
  std::uint32_t codes = 0;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(codes) : "f"(high), "f"(low));
  return codes;
}

/// To the nearest, ties to even; saturates at +-448. In the low 16 bits.
__device__ __forceinline__ std::uint32_t pack_e4m3x2(float low, float high) {
  std::uint16_t codes = 0;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
  return codes;
}

/// Of the low 16 bits. All codes of e4m3 are numbers of fp16.
__device__ __forceinline__ void unpack_e4m3x2(std::uint32_t codes, float& low, float& high) {
  asm("{\n"
      ".reg .b32 halves;\n"
      ".reg .b16 l, h;\n"
      "cvt.rn.f16x2.e4m3x2 halves, %2;\n"
      "mov.b32 {l, h}, halves;\n"
      "cvt.f32.f16 %0, l;\n"
      "cvt.f32.f16 %1, h;\n"
      "}"
      : "=f"(low), "=f"(high)
      : "h"(static_cast<std::uint16_t>(codes)));
}

/// Waits for `threads` threads of the block (whole warps), id 1 .. 15; orders shared memory among
/// them.
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// The block's dynamic shared memory, aligned to 16 bytes.
__device__ __forceinline__ unsigned char* dynamic_shared() {
  extern __shared__ uint4 orrery_dynamic_shared[];
  return reinterpret_cast<unsigned char*>(orrery_dynamic_shared);
}

#endif

}  // namespace orrery::kernels::cuda
