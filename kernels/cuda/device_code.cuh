#pragma once
// What the streaming kernels share: views of matrices, eight elements at a time, sums over a group
// of threads, and their launch. Formats are told apart while running (the branch is the same for
// all threads), so that there is one kernel and not one for each combination of formats.

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels/call.hpp"
#include "kernels/choose_streaming.hpp"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.hpp"

namespace orrery::kernels::cuda {

/// Threads of a block of most kernels: with more than 32 registers each, it has an SM to itself, so
/// that a grid of n blocks uses n SMs.
inline constexpr int kBlock = 1024;

/// A Matrix for device code. `vectors`: octets that start at a multiple of 8 columns can be moved
/// as words of 16 bytes (e4m3: 8, e5m6: 4); true where there is no matrix.
struct View {
  unsigned char* data = nullptr;
  std::int64_t rows = 0, columns = 0, pitch = 0;
  float* scales = nullptr;
  std::int64_t scale_pitch = 0;
  Format format = Format::fp32;
  Scaling scaling = Scaling::none;
  bool vectors = false;
};

inline View view_of(const Matrix& matrix) {
  View view{.data = static_cast<unsigned char*>(matrix.data),
            .rows = matrix.rows,
            .columns = matrix.columns,
            .pitch = matrix.pitch,
            .scales = matrix.scales,
            .scale_pitch = matrix.scale_pitch,
            .format = matrix.format,
            .scaling = matrix.scaling};
  const std::uintptr_t word = matrix.format == Format::e4m3   ? 8
                              : matrix.format == Format::e5m6 ? 4
                                                              : 16;
  const std::int64_t pitch_bits = matrix.pitch * bits_of(matrix.format);
  view.vectors = reinterpret_cast<std::uintptr_t>(matrix.data) % word == 0 &&
                 pitch_bits % (8 * static_cast<std::int64_t>(word)) == 0;
  return view;
}

// ---------------------------------------------------------------------------------------------
// Eight elements.

/// A kernel comes twice: for operands of which all octets can be moved as vectors (Access::vectors:
/// their views say `vectors`, and columns are a multiple of 8), and for the rest.
enum class Access { vectors, elements };
/// Which formats a kernel has to know: fewer cost fewer registers.
enum class Formats { plain, any };  ///< plain: fp32 and bf16

/// As they are in memory, so that several can be on their way.
struct Raw {
  std::uint32_t words[8];
  float scale;
};

__device__ __forceinline__ float scale_at(const View& v, std::int64_t row, std::int64_t column) {
  if (v.scaling == Scaling::rows) return v.scales[column / kTile * v.scale_pitch + row];
  if (v.scaling == Scaling::blocks) {
    return v.scales[row / kTile * v.scale_pitch + column / kTile];
  }
  return 1.0F;
}

/// The first `count` (1 .. 8) elements from `column` on, the rest zero. With Access::vectors count
/// is 8 and column a multiple of 8. Columns and count of e5m6 are even.
template <Access kAccess, Formats kFormats>
__device__ __forceinline__ Raw load_raw(const View& v, std::int64_t row, std::int64_t column,
                                        int count) {
  constexpr bool kAny = kFormats == Formats::any;
  Raw raw{};
  raw.scale = 1.0F;
  const std::int64_t index = row * v.pitch + column;
  if constexpr (kAccess == Access::vectors) {
    if (v.format == Format::bf16) {
      const uint4 w = *reinterpret_cast<const uint4*>(v.data + index * 2);
      raw.words[0] = w.x, raw.words[1] = w.y, raw.words[2] = w.z, raw.words[3] = w.w;
    } else if (!kAny || v.format == Format::fp32) {
      const auto* from = reinterpret_cast<const uint4*>(v.data + index * 4);
      const uint4 w = from[0];
      const uint4 z = from[1];
      raw.words[0] = w.x, raw.words[1] = w.y, raw.words[2] = w.z, raw.words[3] = w.w;
      raw.words[4] = z.x, raw.words[5] = z.y, raw.words[6] = z.z, raw.words[7] = z.w;
    } else if (v.format == Format::e4m3) {
      const uint2 w = *reinterpret_cast<const uint2*>(v.data + index);
      raw.words[0] = w.x, raw.words[1] = w.y;
    } else {
      const auto* from = reinterpret_cast<const std::uint32_t*>(v.data + index / 2 * 3);
      raw.words[0] = from[0];
      raw.words[1] = from[1];
      raw.words[2] = from[2];
    }
  } else {
    if (v.format == Format::bf16) {
      const auto* from = reinterpret_cast<const std::uint16_t*>(v.data) + index;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i < count) raw.words[i / 2] |= static_cast<std::uint32_t>(from[i]) << (i % 2 * 16);
      }
    } else if (!kAny || v.format == Format::fp32) {
      const auto* from = reinterpret_cast<const std::uint32_t*>(v.data) + index;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i < count) raw.words[i] = from[i];
      }
    } else {
      const bool wide = v.format == Format::e5m6;
      const unsigned char* from = v.data + (wide ? index / 2 * 3 : index);
      const int bytes = wide ? count / 2 * 3 : count;
#pragma unroll
      for (int i = 0; i < 12; ++i) {
        if (i < bytes) raw.words[i / 4] |= static_cast<std::uint32_t>(from[i]) << (i % 4 * 8);
      }
    }
  }
  if (kAny && v.scaling != Scaling::none) raw.scale = scale_at(v, row, column);
  return raw;
}

/// 1-5-6 bits, bias 15.
__device__ __forceinline__ float float_of_e5m6_code(std::uint32_t code) {
  const std::uint32_t magnitude = code & 0x7ffU;
  const float value = magnitude < 64 ? static_cast<float>(magnitude) * 0x1p-20F
                                     : __uint_as_float((magnitude << 17U) + ((127U - 15U) << 23U));
  return (code & 0x800U) != 0 ? -value : value;
}

/// To the nearest, ties to even; saturates.
__device__ __forceinline__ std::uint32_t e5m6_code_of(float value) {
  const std::uint32_t sign = __float_as_uint(value) >> 31U << 11U;
  const float magnitude = fminf(fabsf(value), kE5m6Max);
  if (magnitude < 0x1p-14F) {  // steps of 2^-20; 64 of them are the smallest normal number
    return sign | static_cast<std::uint32_t>(__float2int_rn(magnitude * 0x1p20F));
  }
  std::uint32_t bits = __float_as_uint(magnitude);
  bits += 0xffffU + (bits >> 17U & 1U);  // 17 bits go; a carry into the exponent is right
  return sign | min((bits >> 17U) - ((127U - 15U) << 6U), 0x7ffU);
}

/// The values, with their scale.
template <Formats kFormats>
__device__ __forceinline__ void decode(const Raw& raw, Format format, float (&x)[kOctet]) {
  if (format == Format::bf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(raw.words[i] << 16U);
      x[2 * i + 1] = __uint_as_float(raw.words[i] & 0xffff0000U);
    }
  } else if (kFormats == Formats::plain || format == Format::fp32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) x[i] = __uint_as_float(raw.words[i]);
  } else if (format == Format::e4m3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      unpack_e4m3x2(raw.words[i / 2] >> (i % 2 * 16), x[2 * i], x[2 * i + 1]);
      x[2 * i] *= raw.scale;
      x[2 * i + 1] *= raw.scale;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {  // element i: 12 bits from bit 12 i on
      const int word = i * 12 / 32;
      const int shift = i * 12 % 32;
      std::uint32_t code = raw.words[word] >> shift;
      if (shift > 20) code |= raw.words[word + 1] << (32 - shift);
      x[i] = float_of_e5m6_code(code & kE5m6Mask) * raw.scale;
    }
  }
}

template <Access kAccess, Formats kFormats>
__device__ __forceinline__ void load(const View& v, std::int64_t row, std::int64_t column,
                                     int count, float (&x)[kOctet]) {
  decode<kFormats>(load_raw<kAccess, kFormats>(v, row, column, count), v.format, x);
}

/// Codes of values that are divided by their scale already.
template <Formats kFormats>
__device__ __forceinline__ Raw encode(const float (&x)[kOctet], Format format) {
  Raw raw{};
  if (format == Format::bf16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) raw.words[i] = pack_bf16x2(x[2 * i], x[2 * i + 1]);
  } else if (kFormats == Formats::plain || format == Format::fp32) {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) raw.words[i] = __float_as_uint(x[i]);
  } else if (format == Format::e4m3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      raw.words[i / 2] |= pack_e4m3x2(x[2 * i], x[2 * i + 1]) << (i % 2 * 16);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kOctet; ++i) {
      const std::uint32_t code = e5m6_code_of(x[i]);
      const int word = i * 12 / 32;
      const int shift = i * 12 % 32;
      raw.words[word] |= code << shift;
      if (shift > 20) raw.words[word + 1] |= code >> (32 - shift);
    }
  }
  return raw;
}

template <Access kAccess, Formats kFormats>
__device__ __forceinline__ void store_raw(const View& v, std::int64_t row, std::int64_t column,
                                          int count, const Raw& raw) {
  constexpr bool kAny = kFormats == Formats::any;
  const std::int64_t index = row * v.pitch + column;
  if constexpr (kAccess == Access::vectors) {
    if (v.format == Format::bf16) {
      *reinterpret_cast<uint4*>(v.data + index * 2) =
          make_uint4(raw.words[0], raw.words[1], raw.words[2], raw.words[3]);
    } else if (!kAny || v.format == Format::fp32) {
      auto* to = reinterpret_cast<uint4*>(v.data + index * 4);
      to[0] = make_uint4(raw.words[0], raw.words[1], raw.words[2], raw.words[3]);
      to[1] = make_uint4(raw.words[4], raw.words[5], raw.words[6], raw.words[7]);
    } else if (v.format == Format::e4m3) {
      *reinterpret_cast<uint2*>(v.data + index) = make_uint2(raw.words[0], raw.words[1]);
    } else {
      auto* to = reinterpret_cast<std::uint32_t*>(v.data + index / 2 * 3);
      to[0] = raw.words[0];
      to[1] = raw.words[1];
      to[2] = raw.words[2];
    }
  } else {
    if (v.format == Format::bf16) {
      auto* to = reinterpret_cast<std::uint16_t*>(v.data) + index;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i < count) to[i] = static_cast<std::uint16_t>(raw.words[i / 2] >> (i % 2 * 16));
      }
    } else if (!kAny || v.format == Format::fp32) {
      auto* to = reinterpret_cast<std::uint32_t*>(v.data) + index;
#pragma unroll
      for (int i = 0; i < kOctet; ++i) {
        if (i < count) to[i] = raw.words[i];
      }
    } else {
      const bool wide = v.format == Format::e5m6;
      unsigned char* to = v.data + (wide ? index / 2 * 3 : index);
      const int bytes = wide ? count / 2 * 3 : count;
#pragma unroll
      for (int i = 0; i < 12; ++i) {
        if (i < bytes) to[i] = static_cast<unsigned char>(raw.words[i / 4] >> (i % 4 * 8));
      }
    }
  }
}

template <Access kAccess, Formats kFormats>
__device__ __forceinline__ void store(const View& v, std::int64_t row, std::int64_t column,
                                      int count, const float (&x)[kOctet]) {
  store_raw<kAccess, kFormats>(v, row, column, count, encode<kFormats>(x, v.format));
}

/// What fp32 or bf16 would be after `store` and `load`.
__device__ __forceinline__ void round_to(Format format, float (&x)[kOctet]) {
  if (format == Format::fp32) return;
  decode<Formats::plain>(encode<Formats::plain>(x, format), format, x);
}

__device__ __forceinline__ int octet_count(std::int64_t columns, std::int64_t column) {
  return static_cast<int>(min(columns - column, std::int64_t{kOctet}));
}

// ---------------------------------------------------------------------------------------------
// Quantising.

/// The scale of values of which `largest` is the largest magnitude.
__device__ __forceinline__ float scale_of(float largest, Format format) {
  if (!(largest > 0)) return 1.0F;
  if (format == Format::e4m3) return largest / kE4m3Max;
  int exponent = 0;
  const float fraction = frexpf(largest, &exponent);  // 0.5 .. 1, without 1
  return ldexpf(1.0F, fraction == 0.5F ? exponent - 1 : exponent);
}

/// Divides by one positive number many times: one reciprocal, then a product and a step of Newton's method on
/// the quotient, which rounds as a division does (Markstein, IBM J. Res. Dev. 34 (1990), 111). Where
/// the remainder could be too small for a normal number, it divides.
struct Divisor {
  float value, inverse;
  __device__ __forceinline__ explicit Divisor(float v) : value(v), inverse(1.0F / v) {}
  template <int kCount>
  __device__ __forceinline__ void divide(float (&x)[kCount]) const {
    if (value < 0x1p-90F || value > 0x1p90F) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) x[i] /= value;
      return;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float quotient = x[i] * inverse;
      // The sum loses the sign of a zero.
      x[i] = copysignf(fmaf(fmaf(-quotient, value, x[i]), inverse, quotient), x[i]);
    }
  }
};

/// Largest of 16 neighbouring lanes. All lanes of the warp call it.
__device__ __forceinline__ float largest_of_16(float x) {
#pragma unroll
  for (int step = 8; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

__device__ __forceinline__ float largest_magnitude(const float (&x)[kOctet]) {
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kOctet; ++i) largest = fmaxf(largest, fabsf(x[i]));
  return largest;
}

/// Stores in any format; e4m3 and e5m6 with a scale for each tile, which 16 neighbouring lanes
/// hold, 8 columns each. All lanes of the warp call it; those with count <= 0 have nothing, and x =
/// 0.
template <Access kAccess>
__device__ __forceinline__ void store_tile(const View& v, std::int64_t row, std::int64_t column,
                                           int count, float (&x)[kOctet]) {
  if (v.scaling == Scaling::rows) {
    const float scale = scale_of(largest_of_16(largest_magnitude(x)), v.format);
    Divisor(scale).divide(x);
    if (count > 0 && column % kTile == 0) v.scales[column / kTile * v.scale_pitch + row] = scale;
  }
  if (count > 0) store<kAccess, Formats::any>(v, row, column, count, x);
}

// ---------------------------------------------------------------------------------------------
// Who does what.

__device__ __forceinline__ std::int64_t first_thread() {
  return static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
__device__ __forceinline__ std::int64_t all_threads() {
  return static_cast<std::int64_t>(gridDim.x) * blockDim.x;
}

/// Where octet `index` of a matrix is, if each row has whole tiles of 16 octets.
struct Place {
  std::int64_t row, column;
};
__device__ __forceinline__ Place place_of(std::int64_t index, std::uint32_t tiles) {
  const auto tile = static_cast<std::uint32_t>(index >> 4);
  const std::uint32_t row = tile / tiles;
  return {row, static_cast<std::int64_t>((tile - row * tiles) * 16U +
                                         static_cast<std::uint32_t>(index & 15)) *
                   kOctet};
}
/// Octets of a matrix, counted like that.
__host__ __device__ inline std::int64_t octets_of(std::int64_t rows, std::uint32_t tiles) {
  return rows * tiles * 16;
}
inline std::uint32_t tiles_of(std::int64_t columns) {
  return static_cast<std::uint32_t>((columns + kTile - 1) / kTile);
}

/// Calls load(b, index) for some octets of a thread, all of them on their way at once, then
/// finish(b, index, there) for each; whole warps call finish, also for an index that is not
/// `there`.
template <int kBatch, class Load, class Finish>
__device__ __forceinline__ void stream(std::int64_t octets, const Load& load,
                                       const Finish& finish) {
  const std::int64_t step = all_threads();
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t base = first_thread(); base - lane < octets; base += kBatch * step) {
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * step < octets) load(b, base + b * step);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const std::int64_t index = base + b * step;
      if (index - lane < octets) finish(b, index, index < octets);
    }
  }
}

__device__ __forceinline__ std::int64_t rows_in_use(const std::int32_t* used_rows,
                                                    std::int64_t rows) {
  return used_rows == nullptr ? rows : min(static_cast<std::int64_t>(*used_rows), rows);
}

// ---------------------------------------------------------------------------------------------
// Sums of a fixed order.

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ double warp_sum(double x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

/// Some warps of a block that reduce together. All of their threads call what it offers, equally
/// often.
template <class T>
class Group {
 public:
  /// `shared`: 2 * blockDim / 32 elements of the block.
  __device__ __forceinline__ Group(int threads, T* shared)
      : threads_(threads),
        number_(static_cast<int>(threadIdx.x) / threads),
        thread_(static_cast<int>(threadIdx.x) % threads),
        shared_(shared + number_ * 2 * (threads / 32)) {}

  __device__ __forceinline__ int number() const { return number_; }
  __device__ __forceinline__ int thread() const { return thread_; }
  __device__ __forceinline__ void wait() const {
    if (threads_ > 32) {
      barrier(1 + number_, threads_);
    } else {
      __syncwarp();
    }
  }

  /// One barrier: the next call uses the other half of the memory, and nobody gets further than
  /// that.
  __device__ __forceinline__ T sum(T x) {
    x = warp_sum(x);
    if (threads_ == 32) return x;
    const int warps = threads_ / 32;
    T* const slots = shared_ + (odd_ ? warps : 0);
    odd_ = !odd_;
    if (thread_ % 32 == 0) slots[thread_ / 32] = x;
    wait();
    T total = 0;
    for (int i = 0; i < warps; ++i) total += slots[i];
    return total;
  }
  __device__ __forceinline__ T largest(T x) {
    x = warp_max(x);
    if (threads_ == 32) return x;
    const int warps = threads_ / 32;
    T* const slots = shared_ + (odd_ ? warps : 0);
    odd_ = !odd_;
    if (thread_ % 32 == 0) slots[thread_ / 32] = x;
    wait();
    T most = slots[0];
    for (int i = 1; i < warps; ++i) most = max(most, slots[i]);
    return most;
  }

 private:
  int threads_, number_, thread_;
  T* shared_;
  bool odd_ = false;
};

// ---------------------------------------------------------------------------------------------
// Launching.

/// Enqueues kernel(arguments...).
template <class... Parameters>
void start(const LaunchContext& context, const char* name, void (*kernel)(Parameters...), int grid,
           int block, std::size_t shared_bytes,
           const std::type_identity_t<Parameters>&... arguments) {
  if (shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid));
  config.blockDim = dim3(static_cast<unsigned>(block));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = context.stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...), name);
}

/// `kernel` by how its operands can be accessed.
template <class Kernel>
Kernel pick(bool vectors, Kernel with_vectors, Kernel with_elements) {
  return vectors ? with_vectors : with_elements;
}

/// Part of the stream's workspace.
template <class T>
T* workspace(const LaunchContext& context, std::int64_t elements, const char* name,
             std::int64_t offset_bytes = 0) {
  if (offset_bytes + elements * static_cast<std::int64_t>(sizeof(T)) >
      static_cast<std::int64_t>(context.workspace_bytes)) {
    throw std::runtime_error(std::string(name) + ": the stream's workspace is too small");
  }
  return reinterpret_cast<T*>(static_cast<char*>(context.workspace) + offset_bytes);
}

}  // namespace orrery::kernels::cuda
