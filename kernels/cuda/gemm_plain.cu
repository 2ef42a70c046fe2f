// The product of any formats, layouts, groups and alignments, in FP32 on the cores that are not
// tensor cores: for small models in FP32 and for shapes that nothing faster takes.

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/choose_gemm.hpp"
#include "kernels/cuda/gemm_parts.hpp"
#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/launch.hpp"
#include "kernels/gemm_layout.hpp"

namespace orrery::kernels::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kSide = 64;   // of a tile
constexpr int kDepth = 16;  // of the contraction at a time
constexpr int kEach = 4;    // rows and columns of a thread

/// An operand as (row of D or column of D, position along the contraction).
struct Operand {
  const unsigned char* data = nullptr;
  std::int64_t pitch = 0;
  const float* scales = nullptr;
  std::int64_t scale_pitch = 0;
  Format format = Format::fp32;
  Scaling scaling = Scaling::none;
  bool transposed = false;
};

struct PlainArguments {
  Operand a, b;
  TileGrid grid;
  void* d = nullptr;
  std::int64_t d_pitch = 0;
  bool d_fp32 = false;
};

__device__ __forceinline__ float element(const Operand& x, std::int64_t at, std::int64_t k) {
  const std::int64_t row = x.transposed ? k : at;
  const std::int64_t column = x.transposed ? at : k;
  const std::int64_t i = row * x.pitch + column;
  if (x.format == Format::fp32) return reinterpret_cast<const float*>(x.data)[i];
  if (x.format == Format::bf16) {
    return __uint_as_float(static_cast<unsigned>(reinterpret_cast<const std::uint16_t*>(x.data)[i])
                           << 16U);
  }
  float value = 0, unused = 0;
  unpack_e4m3x2(x.data[i], value, unused);
  if (x.scaling == Scaling::none) return value;
  return value * (x.scaling == Scaling::rows
                      ? x.scales[column / kTile * x.scale_pitch + row]
                      : x.scales[row / kTile * x.scale_pitch + column / kTile]);
}

/// Tiles of 64 x 64, 16 of the contraction at a time through shared memory, 4 x 4 sums a thread.
__global__ void __launch_bounds__(kThreads, 1)
    plain_gemm(const __grid_constant__ PlainArguments args) {
  __shared__ float a[kDepth][kSide + 4];
  __shared__ float b[kDepth][kSide + 4];
  const TileGrid& grid = args.grid;
  const int thread = static_cast<int>(threadIdx.x);
  TileWalk walk(grid, static_cast<int>(blockIdx.x));
  Tile tile;
  while (walk.next(tile, static_cast<int>(gridDim.x), 0)) {
    // Where the group's B begins: rows of B, or of the contraction where B is transposed.
    const std::int64_t group = grid.grouping == Grouping::rows ? tile.group : 0;
    const std::int64_t b_row = args.b.transposed ? 0 : group * grid.n;
    const std::int64_t b_k = args.b.transposed ? group * grid.k : 0;
    float sums[kEach][kEach] = {};
    for (int k = tile.k_begin; k < tile.k_end; k += kDepth) {
      __syncthreads();
      for (int i = thread; i < kSide * kDepth; i += kThreads) {
        // Neighbours in memory to neighbouring threads.
        const int at = args.a.transposed ? i % kSide : i / kDepth;
        const int depth = args.a.transposed ? i / kSide : i % kDepth;
        a[depth][at] = at < tile.rows && k + depth < tile.k_end
                           ? element(args.a, tile.row + at, k + depth)
                           : 0.0F;
      }
      for (int i = thread; i < kSide * kDepth; i += kThreads) {
        const int at = args.b.transposed ? i % kSide : i / kDepth;
        const int depth = args.b.transposed ? i / kSide : i % kDepth;
        b[depth][at] = tile.column + at < grid.n && k + depth < tile.k_end
                           ? element(args.b, b_row + tile.column + at, b_k + k + depth)
                           : 0.0F;
      }
      __syncthreads();
      for (int depth = 0; depth < kDepth; ++depth) {
#pragma unroll
        for (int y = 0; y < kEach; ++y) {
#pragma unroll
          for (int x = 0; x < kEach; ++x) {
            sums[y][x] += a[depth][thread / 16 * kEach + y] * b[depth][thread % 16 * kEach + x];
          }
        }
      }
    }
    const std::int64_t row =
        (grid.grouping == Grouping::contraction ? static_cast<std::int64_t>(tile.group) * grid.m
                                                : 0) +
        tile.row;
#pragma unroll
    for (int y = 0; y < kEach; ++y) {
#pragma unroll
      for (int x = 0; x < kEach; ++x) {
        const int r = thread / 16 * kEach + y;
        const int c = tile.column + thread % 16 * kEach + x;
        if (r >= tile.rows || c >= grid.n) continue;
        const std::int64_t i = (row + r) * args.d_pitch + c;
        if (!args.d_fp32) {
          static_cast<std::uint16_t*>(args.d)[i] =
              static_cast<std::uint16_t>(pack_bf16x2(sums[y][x], 0) & 0xffffU);
        } else if (grid.accumulate) {
          static_cast<float*>(args.d)[i] += sums[y][x];
        } else {
          static_cast<float*>(args.d)[i] = sums[y][x];
        }
      }
    }
  }
}

Operand operand_of(const Matrix& x, bool transposed) {
  return {static_cast<const unsigned char*>(x.data),
          x.pitch,
          x.scales,
          x.scale_pitch,
          x.format,
          x.scaling,
          transposed};
}

}  // namespace

void launch_plain(const Gemm& call, const GemmPlan& plan, const LaunchContext& context) {
  PlainArguments args;
  args.a = operand_of(call.a, call.a_transposed);
  args.b = operand_of(call.b, call.b_transposed);
  args.grid = tile_grid_of(call, plan);
  args.d = call.d.data;
  args.d_pitch = call.d.pitch;
  args.d_fp32 = call.d.format == Format::fp32;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.blocks));
  config.blockDim = dim3(kThreads);
  config.stream = context.stream;
  check(cudaLaunchKernelEx(&config, plain_gemm, args), "plain_gemm");
}

}  // namespace orrery::kernels::cuda
