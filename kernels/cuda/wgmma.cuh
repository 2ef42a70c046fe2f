#pragma once
// wgmma.mma_async of e4m3 and bf16 with FP32 accumulators, operands in shared memory: d (64 x n, as
// fragment_row and fragment_column of gemm_layout.hpp hold it) = a b^T, plus d if `add`.

#include <cstdint>

#include "kernels/cuda/hopper.cuh"

namespace orrery::kernels::cuda {

enum class Element { e4m3, bf16 };

/// Which of an operand's dimensions runs along its rows in shared memory.
enum class Major { contraction, other };

#ifdef ORRERY_EMULATED

template <Element kElement, int kColumns, Major kA, Major kB>
struct Wgmma {
  static void multiply(float (&d)[kColumns / 2], std::uint64_t a, std::uint64_t b, bool add) {
    emulator::hopper::multiply(d, kColumns, a, b, add, kElement == Element::bf16,
                               kA == Major::other, kB == Major::other);
  }
};

#else

template <Element kElement, int kColumns, Major kA, Major kB>
struct Wgmma;

// Operands of asm: registers 0 .. n - 1 of d, then descriptors and the predicate.
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

template <>
struct Wgmma<Element::e4m3, 64, Major::contraction, Major::contraction> {
  static __device__ __forceinline__ void multiply(float (&d)[32], std::uint64_t a, std::uint64_t b,
                                                  bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e4m3 {" ORRERY_NAMES32
        "}, "
        "%32, %33, add, 1, 1;\n"
        "}"
        : ORRERY_D32(0)
        : "l"(a), "l"(b), "r"(add ? 1 : 0));
  }
};
template <>
struct Wgmma<Element::e4m3, 128, Major::contraction, Major::contraction> {
  static __device__ __forceinline__ void multiply(float (&d)[64], std::uint64_t a, std::uint64_t b,
                                                  bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" ORRERY_NAMES64
        "}, "
        "%64, %65, add, 1, 1;\n"
        "}"
        : ORRERY_D32(0), ORRERY_D32(32)
        : "l"(a), "l"(b), "r"(add ? 1 : 0));
  }
};
template <>
struct Wgmma<Element::e4m3, 192, Major::contraction, Major::contraction> {
  static __device__ __forceinline__ void multiply(float (&d)[96], std::uint64_t a, std::uint64_t b,
                                                  bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k32.f32.e4m3.e4m3 {" ORRERY_NAMES96
        "}, "
        "%96, %97, add, 1, 1;\n"
        "}"
        : ORRERY_D32(0), ORRERY_D32(32), ORRERY_D32(64)
        : "l"(a), "l"(b), "r"(add ? 1 : 0));
  }
};
template <Major kA, Major kB>
struct Wgmma<Element::bf16, 128, kA, kB> {
  static __device__ __forceinline__ void multiply(float (&d)[64], std::uint64_t a, std::uint64_t b,
                                                  bool add) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {" ORRERY_NAMES64
        "}, "
        "%64, %65, add, 1, 1, %67, %68;\n"
        "}"
        : ORRERY_D32(0), ORRERY_D32(32)
        : "l"(a), "l"(b), "r"(add ? 1 : 0), "n"(kA == Major::other ? 1 : 0),
          "n"(kB == Major::other ? 1 : 0));
  }
};

#undef ORRERY_D8
#undef ORRERY_D32
#undef ORRERY_NAMES32
#undef ORRERY_NAMES64
#undef ORRERY_NAMES96

#endif

}  // namespace orrery::kernels::cuda
