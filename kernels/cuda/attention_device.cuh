#pragma once
// What the attention kernels for compute capability 9.0a need beyond hopper.cuh: operands of wgmma
// from registers and with the contraction down the rows, boxes of four dimensions, exponentials.
// With ORRERY_EMULATED whoever includes this has the same functions, of a machine on the CPU
// (tests/kernels/attention_machine.hpp).

#ifndef ORRERY_EMULATED
#include "kernels/cuda/hopper.cuh"
#include "kernels/cuda/intrinsics.cuh"
#endif

#include <cstdint>

namespace orrery::kernels::cuda::attention {

#ifndef ORRERY_EMULATED

/// The map's box at (column, head, row, sequence) to shared memory; its bytes count for the
/// barrier.
__device__ __forceinline__ void load_box(std::uint32_t to, const CUtensorMap* map, int column,
                                         int head, int row, int sequence, std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(column), "r"(head), "r"(row), "r"(sequence), "r"(barrier)
      : "memory");
}

/// Contiguous bytes, a multiple of 16 from an address that is one.
__device__ __forceinline__ void load_bytes(std::uint32_t to, const void* from, int bytes,
                                           std::uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

/// Barriers of threads (id 1 .. 15) that some only announce themselves at.
__device__ __forceinline__ void arrive_at_turn(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void wait_for_turn(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/// 2^x; 0 of minus infinity.
__device__ __forceinline__ float exp2_of(float x) {
  float y = 0;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_of(float x) {
  float y = 0;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Of the lane whose number differs in these bits.
__device__ __forceinline__ float from_lane_xor(float x, int bits) {
  return __shfl_xor_sync(kAllLanes, x, bits);
}

/// Two that lie beside each other, from a multiple of 8 bytes.
__device__ __forceinline__ void load_pair(std::uint32_t address, float& x, float& y) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x), "=f"(y) : "r"(address) : "memory");
}

__device__ __forceinline__ float exp_of(float x) {
  return expf(x);
}
__device__ __forceinline__ float log_of(float x) {
  return logf(x);
}

// D (64 x columns, FP32) = A B, plus D if `add`. Thread t of the warpgroup holds of D, for each 8
// columns j, rows t / 32 * 16 + t % 32 / 4 and the 8th after it, columns 8 j + t % 4 * 2 and the
// next: d[4 j], d[4 j + 1], and d[4 j + 2], d[4 j + 3] (PTX ISA, "Register Fragments and Shared
// Memory Matrix Layouts" of wgmma). Of A (64 x 16, BF16) it holds in the same way the 16 columns of
// two such j.

#define ORRERY_D8(i)                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define ORRERY_D32(i) ORRERY_D8(i), ORRERY_D8(i + 8), ORRERY_D8(i + 16), ORRERY_D8(i + 24)
#define ORRERY_NAMES32                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ORRERY_NAMES64                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define ORRERY_NAMES96                                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, " \
  "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, " \
  "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, " \
  "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, " \
  "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, " \
  "%87, %88, %89, %90, %91, %92, %93, %94, %95"

/// A and B from shared memory, both with the contraction along their rows.
template <int kColumns>
__device__ __forceinline__ void multiply_shared(float (&d)[kColumns / 2], std::uint64_t a,
                                                std::uint64_t b, bool add);
/// A from registers, B from shared memory with the contraction down its rows; adds.
template <int kColumns>
__device__ __forceinline__ void multiply_registers(float (&d)[kColumns / 2],
                                                   const std::uint32_t& a0, const std::uint32_t& a1,
                                                   const std::uint32_t& a2, const std::uint32_t& a3,
                                                   std::uint64_t b);

template <>
__device__ __forceinline__ void multiply_shared<64>(float (&d)[32], std::uint64_t a,
                                                    std::uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %34, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ORRERY_NAMES32
      "}, %32, %33, add, 1, 1, 0, 0;\n"
      "}"
      : ORRERY_D32(0)
      : "l"(a), "l"(b), "r"(add ? 1 : 0));
}

template <>
__device__ __forceinline__ void multiply_shared<128>(float (&d)[64], std::uint64_t a,
                                                     std::uint64_t b, bool add) {
  asm volatile(
      "{\n"
      ".reg .pred add;\n"
      "setp.ne.b32 add, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ORRERY_NAMES64
      "}, %64, %65, add, 1, 1, 0, 0;\n"
      "}"
      : ORRERY_D32(0), ORRERY_D32(32)
      : "l"(a), "l"(b), "r"(add ? 1 : 0));
}

template <>
__device__ __forceinline__ void multiply_registers<64>(float (&d)[32], const std::uint32_t& a0,
                                                       const std::uint32_t& a1,
                                                       const std::uint32_t& a2,
                                                       const std::uint32_t& a3, std::uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" ORRERY_NAMES32
               "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
               : ORRERY_D32(0)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(1));
}

template <>
__device__ __forceinline__ void multiply_registers<128>(float (&d)[64], const std::uint32_t& a0,
                                                        const std::uint32_t& a1,
                                                        const std::uint32_t& a2,
                                                        const std::uint32_t& a3, std::uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ORRERY_NAMES64
               "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
               : ORRERY_D32(0), ORRERY_D32(32)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(1));
}

template <>
__device__ __forceinline__ void multiply_registers<192>(float (&d)[96], const std::uint32_t& a0,
                                                        const std::uint32_t& a1,
                                                        const std::uint32_t& a2,
                                                        const std::uint32_t& a3, std::uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" ORRERY_NAMES96
               "}, {%96, %97, %98, %99}, %100, 1, 1, 1, 1;"
               : ORRERY_D32(0), ORRERY_D32(32), ORRERY_D32(64)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(1));
}

#undef ORRERY_D8
#undef ORRERY_D32
#undef ORRERY_NAMES32
#undef ORRERY_NAMES64
#undef ORRERY_NAMES96

#endif

/// Of two BF16 in one word.
__device__ __forceinline__ float low_half(std::uint32_t both) {
  return __uint_as_float(both << 16U);
}
__device__ __forceinline__ float high_half(std::uint32_t both) {
  return __uint_as_float(both & 0xffff0000U);
}

template <int kCount>
__device__ __forceinline__ void pin_all(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) pin(values[i]);
}

}  // namespace orrery::kernels::cuda::attention
