// Between fp32 or bf16 and e4m3 or e5m6 with scales, and the transposition of e4m3.

#include <algorithm>

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

struct Job {
  View from, to;
  const std::int32_t* used_rows = nullptr;
  std::uint32_t tiles = 0;
};

/// A tile of 1x128 is 16 lanes; also for fp32 and bf16 without scales.
template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) quantize_rows(const __grid_constant__ Job job) {
  constexpr int kBatch = 2;
  const std::int64_t octets = octets_of(rows_in_use(job.used_rows, job.from.rows), job.tiles);
  Raw raw[kBatch];
  stream<kBatch>(
      octets,
      [&](int b, std::int64_t index) {
        const Place at = place_of(index, job.tiles);
        if (at.column >= job.from.columns) return;
        raw[b] = load_raw<kAccess, Formats::plain>(job.from, at.row, at.column,
                                                   octet_count(job.from.columns, at.column));
      },
      [&](int b, std::int64_t index, bool there) {
        const Place at = place_of(index, job.tiles);
        const int count =
            there && at.column < job.from.columns ? octet_count(job.from.columns, at.column) : 0;
        float x[kOctet] = {};
        if (count > 0) decode<Formats::plain>(raw[b], job.from.format, x);
        store_tile<kAccess>(job.to, at.row, at.column, count, x);
      });
}

/// A block of threads a block of 128x128: 64 rows at a time, 16 threads a row.
template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) quantize_blocks(const __grid_constant__ Job job) {
  __shared__ float shared[2 * kBlock / 32];
  Group<float> group(kBlock, shared);
  const std::int64_t rows = rows_in_use(job.used_rows, job.from.rows);
  const std::int64_t blocks = (rows + kTile - 1) / kTile * job.tiles;
  for (std::int64_t block = blockIdx.x; block < blocks; block += gridDim.x) {
    const std::int64_t block_row = block / job.tiles;
    const std::int64_t block_column = block - block_row * job.tiles;
    const std::int64_t column = block_column * kTile + threadIdx.x % 16 * kOctet;
    float x[2][kOctet] = {};
    int count[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const std::int64_t row = block_row * kTile + i * 64 + threadIdx.x / 16;
      if (row >= rows || column >= job.from.columns) continue;
      count[i] = octet_count(job.from.columns, column);
      load<kAccess, Formats::plain>(job.from, row, column, count[i], x[i]);
    }
    const float scale = scale_of(
        group.largest(fmaxf(largest_magnitude(x[0]), largest_magnitude(x[1]))), job.to.format);
    const Divisor divisor(scale);
    if (threadIdx.x == 0) job.to.scales[block_row * job.to.scale_pitch + block_column] = scale;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (count[i] == 0) continue;
      divisor.divide(x[i]);
      store<kAccess, Formats::any>(job.to, block_row * kTile + i * 64 + threadIdx.x / 16, column,
                                   count[i], x[i]);
    }
  }
}

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) dequantize(const __grid_constant__ Job job) {
  constexpr int kBatch = 4;
  const std::int64_t octets = octets_of(rows_in_use(job.used_rows, job.from.rows), job.tiles);
  Raw raw[kBatch];
  stream<kBatch>(
      octets,
      [&](int b, std::int64_t index) {
        const Place at = place_of(index, job.tiles);
        if (at.column >= job.from.columns) return;
        raw[b] = load_raw<kAccess, Formats::any>(job.from, at.row, at.column,
                                                 octet_count(job.from.columns, at.column));
      },
      [&](int b, std::int64_t index, bool there) {
        const Place at = place_of(index, job.tiles);
        if (!there || at.column >= job.from.columns) return;
        float x[kOctet];
        decode<Formats::any>(raw[b], job.from.format, x);
        store<kAccess, Formats::plain>(job.to, at.row, at.column,
                                       octet_count(job.from.columns, at.column), x);
      });
}

// ---------------------------------------------------------------------------------------------
// Transposing blocks of 128x128 bytes.

constexpr int kTileThreads = 256;     ///< they hold a block, 64 bytes each
constexpr int kTransposeBlock = 768;  ///< three of them; up to 80 registers a thread

/// What one group of threads has in shared memory.
struct TileMemory {
  alignas(16) unsigned char codes[kTile * 128];  ///< rows of `to`, swizzled
  float from_scales[kTile];
  float largest[kTileThreads / 32][kTile + 4];
};

/// Byte i of each of four words, from byte `byte` of four others.
__device__ __forceinline__ std::uint32_t gather(std::uint32_t a, std::uint32_t b, std::uint32_t c,
                                                std::uint32_t d, unsigned byte) {
  const std::uint32_t low = __byte_perm(a, b, byte | (byte + 4U) << 4U);
  const std::uint32_t high = __byte_perm(c, d, byte | (byte + 4U) << 4U);
  return __byte_perm(low, high, 0x5410U);
}

/// Four codes from `row`, column on; zeros beyond rows and columns.
template <Access kAccess>
__device__ __forceinline__ std::uint32_t load_word(const View& v, std::int64_t rows,
                                                   std::int64_t row, std::int64_t column) {
  if (row >= rows || column >= v.columns) return 0;
  const unsigned char* from = v.data + row * v.pitch + column;
  if constexpr (kAccess == Access::vectors) return *reinterpret_cast<const std::uint32_t*>(from);
  std::uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    if (column + i < v.columns) word |= static_cast<std::uint32_t>(from[i]) << (8 * i);
  }
  return word;
}

/// A thread holds 16 rows x 4 columns of `from`: a warp reads 128 bytes of one row at a time, all
/// sectors whole, with 16 loads of 4 bytes on their way in each thread. It has 4 rows x 16 columns
/// of `to` then, which go through shared memory to be written as whole rows of 128 bytes.
template <bool kScaleAgain, Access kAccess>
__global__ void __launch_bounds__(kTransposeBlock, 1) transpose(const __grid_constant__ Job job) {
  const int number = static_cast<int>(threadIdx.x) / kTileThreads;
  const int thread = static_cast<int>(threadIdx.x) % kTileThreads;
  const int lane = thread % 32;
  const int warp = thread / 32;  // holds rows 16 * warp to 16 * warp + 15 of the block
  TileMemory& mine = reinterpret_cast<TileMemory*>(dynamic_shared())[number];
  const std::int64_t rows = rows_in_use(job.used_rows, job.from.rows);
  const std::int64_t blocks = (rows + kTile - 1) / kTile * job.tiles;
  const std::int64_t groups = std::int64_t{gridDim.x} * (kTransposeBlock / kTileThreads);

  for (std::int64_t block = std::int64_t{blockIdx.x} * (kTransposeBlock / kTileThreads) + number;
       block < blocks; block += groups) {
    const std::int64_t block_row = block / job.tiles;
    const std::int64_t block_column = block - block_row * job.tiles;
    std::uint32_t words[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      words[i] = load_word<kAccess>(job.from, rows, block_row * kTile + 16 * warp + i,
                                    block_column * kTile + 4 * lane);
    }
    std::uint32_t columns[4][4];  // column 4 * lane + c of `from`, 16 bytes each
    if constexpr (kScaleAgain) {
      if (thread < kTile) {
        const std::int64_t row = block_row * kTile + thread;
        mine.from_scales[thread] =
            row < rows ? job.from.scales[block_column * job.from.scale_pitch + row] : 0.0F;
      }
      barrier(1 + number, kTileThreads);
      float largest[4] = {};
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        float x[4];
        unpack_e4m3x2(words[i], x[0], x[1]);
        unpack_e4m3x2(words[i] >> 16U, x[2], x[3]);
        const float scale = mine.from_scales[16 * warp + i];
#pragma unroll
        for (int c = 0; c < 4; ++c) largest[c] = fmaxf(largest[c], fabsf(x[c] * scale));
      }
      *reinterpret_cast<float4*>(&mine.largest[warp][4 * lane]) =
          make_float4(largest[0], largest[1], largest[2], largest[3]);
      barrier(1 + number, kTileThreads);
#pragma unroll
      for (int w = 0; w < kTileThreads / 32; ++w) {
        const float4 other = *reinterpret_cast<const float4*>(&mine.largest[w][4 * lane]);
        largest[0] = fmaxf(largest[0], other.x);
        largest[1] = fmaxf(largest[1], other.y);
        largest[2] = fmaxf(largest[2], other.z);
        largest[3] = fmaxf(largest[3], other.w);
      }
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float scale[2] = {scale_of(largest[2 * pair], Format::e4m3),
                                scale_of(largest[2 * pair + 1], Format::e4m3)};
        const Divisor by[2] = {Divisor(scale[0]), Divisor(scale[1])};
        if (warp == 0) {
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const std::int64_t column = block_column * kTile + 4 * lane + 2 * pair + c;
            if (column < job.from.columns) {
              job.to.scales[block_row * job.to.scale_pitch + column] = scale[c];
            }
          }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float y[2][4];
#pragma unroll
          for (int r = 0; r < 4; ++r) {
            float x[2];
            unpack_e4m3x2(words[4 * i + r] >> (16 * pair), x[0], x[1]);
            const float from_scale = mine.from_scales[16 * warp + 4 * i + r];
            y[0][r] = x[0] * from_scale;
            y[1][r] = x[1] * from_scale;
          }
          by[0].divide(y[0]);
          by[1].divide(y[1]);
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            columns[2 * pair + c][i] = pack_e4m3x2(y[c][0], y[c][1]) | pack_e4m3x2(y[c][2], y[c][3])
                                                                           << 16U;
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (unsigned c = 0; c < 4; ++c) {
          columns[c][i] =
              gather(words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3], c);
        }
      }
      if (thread == 0) {
        job.to.scales[block_column * job.to.scale_pitch + block_row] =
            job.from.scales[block_row * job.from.scale_pitch + block_column];
      }
    }

    // 16 bytes `warp` of row r of `to` lie at place warp ^ (r / 4 mod 8) of the row, so that eight
    // neighbouring lanes use all banks, writing and reading.
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      *reinterpret_cast<uint4*>(&mine.codes[(4 * lane + c) * 128 + (warp ^ (lane % 8)) * 16]) =
          make_uint4(columns[c][0], columns[c][1], columns[c][2], columns[c][3]);
    }
    barrier(1 + number, kTileThreads);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = thread / 8 + 32 * i;
      const int place = thread % 8;
      const std::int64_t row = block_column * kTile + r;
      const std::int64_t column = block_row * kTile + 16 * place;
      if (row >= job.to.rows || column >= job.to.columns) continue;
      const uint4 codes =
          *reinterpret_cast<const uint4*>(&mine.codes[r * 128 + (place ^ (r / 4 % 8)) * 16]);
      unsigned char* to = job.to.data + row * job.to.pitch + column;
      if (kAccess == Access::vectors && column + 16 <= job.to.columns) {
        *reinterpret_cast<uint4*>(to) = codes;
      } else {
        const std::uint32_t parts[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          if (column + j < job.to.columns) {
            to[j] = static_cast<unsigned char>(parts[j / 4] >> (j % 4 * 8));
          }
        }
      }
    }
    barrier(1 + number, kTileThreads);  // the next block overwrites the memory
  }
}

/// Bytes can be read as words of `word` bytes at any multiple of that many columns.
bool aligned(const Matrix& matrix, std::int64_t word) {
  return reinterpret_cast<std::uintptr_t>(matrix.data) % static_cast<std::uintptr_t>(word) == 0 &&
         matrix.pitch % word == 0;
}

Job job_of(const Matrix& from, const Matrix& to, const std::int32_t* used_rows) {
  return {.from = view_of(from),
          .to = view_of(to),
          .used_rows = used_rows,
          .tiles = tiles_of(from.columns)};
}

bool vectors(const Job& job) {
  return job.from.vectors && job.to.vectors && job.from.columns % kOctet == 0;
}

}  // namespace

void launch(const Quantize& call, const LaunchContext& context) {
  if (call.from.rows == 0 || call.from.columns == 0) return;
  const Job job = job_of(call.from, call.to, call.used_rows);
  const std::int64_t octets = octets_of(call.from.rows, job.tiles);
  if (call.to.scaling == Scaling::blocks) {
    start(context, "quantize_blocks",
          pick(vectors(job), quantize_blocks<Access::vectors>, quantize_blocks<Access::elements>),
          choose_grid((call.from.rows + kTile - 1) / kTile * job.tiles, context.sms, 1), kBlock, 0,
          job);
  } else {
    start(context, "quantize_rows",
          pick(vectors(job), quantize_rows<Access::vectors>, quantize_rows<Access::elements>),
          choose_grid(octets, context.sms, kBlock), kBlock, 0, job);
  }
}

void launch(const Dequantize& call, const LaunchContext& context) {
  if (call.from.rows == 0 || call.from.columns == 0) return;
  const Job job = job_of(call.from, call.to, call.used_rows);
  start(context, "dequantize",
        pick(vectors(job), dequantize<Access::vectors>, dequantize<Access::elements>),
        choose_grid(octets_of(call.from.rows, job.tiles), context.sms, kBlock), kBlock, 0, job);
}

void launch(const Transpose& call, const LaunchContext& context) {
  if (call.from.rows == 0 || call.from.columns == 0) return;
  const Job job = job_of(call.from, call.to, call.used_rows);
  const bool whole_words =
      aligned(call.from, 4) && call.from.columns % 4 == 0 && aligned(call.to, 16);
  const std::int64_t blocks = (call.from.rows + kTile - 1) / kTile * job.tiles;
  constexpr int kGroups = kTransposeBlock / kTileThreads;
  start(context, "transpose",
        call.from.scaling == Scaling::rows
            ? pick(whole_words, transpose<true, Access::vectors>, transpose<true, Access::elements>)
            : pick(whole_words, transpose<false, Access::vectors>,
                   transpose<false, Access::elements>),
        choose_grid(blocks, context.sms, kGroups), kTransposeBlock, kGroups * sizeof(TileMemory),
        job);
}

}  // namespace orrery::kernels::cuda
