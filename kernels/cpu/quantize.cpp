#include "kernels/cpu/clones.hpp"
#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

void quantize_blocks(const Quantize& q) {
  const std::int64_t rows = rows_in_use(q.used_rows, q.from);
  const std::int64_t blocks = (rows + kTile - 1) / kTile;
  for_rows(blocks, kTile * q.from.columns, [&](std::int64_t first, std::int64_t last) {
    float* row = row_buffer(0, q.from.columns);
    const std::int64_t tiles = (q.from.columns + kTile - 1) / kTile;
    float* largest = row_buffer(1, tiles);
    for (std::int64_t b = first; b < last; ++b) {
      const std::int64_t end = std::min(rows, (b + 1) * kTile);
      std::fill_n(largest, tiles, 0.0F);
      for (std::int64_t r = b * kTile; r < end; ++r) {
        load_row(q.from, r, row);
        for (std::int64_t t = 0; t < tiles; ++t) {
          const std::int64_t c = t * kTile;
          largest[t] =
              std::max(largest[t], largest_magnitude(row + c, std::min(kTile, q.from.columns - c)));
        }
      }
      float* scales = q.to.scales + b * q.to.scale_pitch;
      for (std::int64_t t = 0; t < tiles; ++t) scales[t] = scale_for(largest[t], q.to.format);
      for (std::int64_t r = b * kTile; r < end; ++r) {
        load_row(q.from, r, row);
        for (std::int64_t t = 0; t < tiles; ++t) {
          const std::int64_t c = t * kTile;
          encode(q.to, r, c, std::min(kTile, q.from.columns - c), row + c, scales[t]);
        }
      }
    }
  });
}

/// A tile of codes, transposed: 128 bytes a row.
struct CodeTile {
  alignas(64) std::uint8_t codes[kTile * kTile];
};

/// 8 words of 8 codes each, as vectors of the compiler's: it does not see the loop in these.
using Words = std::uint64_t __attribute__((vector_size(64)));

/// In each of the 8x8 blocks, blocks of kDistance that lie across from each other change places.
template <int kDistance, std::uint64_t kMask>
[[gnu::always_inline]] inline void swap_blocks(Words* x) {
  for (int r = 0; r < 8; ++r) {
    if ((r & kDistance) != 0) continue;
    const Words moved = (x[r] >> (8 * kDistance) ^ x[r + kDistance]) & kMask;
    x[r + kDistance] ^= moved;
    x[r] ^= moved << (8 * kDistance);
  }
}

/// Codes of 8 rows and 128 columns become columns 8 i to 8 i + 7 of the tile.
ORRERY_CLONES
void transpose_eight(const std::uint8_t* from, std::int64_t pitch, std::int64_t i, CodeTile& to) {
  for (std::int64_t c = 0; c < kTile; c += 64) {
    Words x[8];
    for (int r = 0; r < 8; ++r) std::memcpy(&x[r], from + r * pitch + c, 64);
    swap_blocks<4, 0x00000000FFFFFFFFU>(x);
    swap_blocks<2, 0x0000FFFF0000FFFFU>(x);
    swap_blocks<1, 0x00FF00FF00FF00FFU>(x);
    for (int b = 0; b < 8; ++b) {
      for (int r = 0; r < 8; ++r) {
        const std::uint64_t word = x[r][b];
        std::memcpy(to.codes + (c + 8 * b + r) * kTile + 8 * i, &word, 8);
      }
    }
  }
}

void transpose_tile(const Matrix& from, std::int64_t r0, std::int64_t c0, std::int64_t rows,
                    std::int64_t columns, CodeTile& to) {
  std::int64_t r = 0;
  if (columns == kTile) {
    for (; r + 8 <= rows; r += 8) {
      transpose_eight(row_at<std::uint8_t>(from, r0 + r) + c0, from.pitch, r / 8, to);
    }
  }
  for (; r < rows; ++r) {
    const std::uint8_t* in = row_at<std::uint8_t>(from, r0 + r) + c0;
    for (std::int64_t c = 0; c < columns; ++c) to.codes[c * kTile + r] = in[c];
  }
}

/// code * scale, each with its own.
ORRERY_CLONES
void scaled_values(const std::uint8_t* __restrict codes, const float* __restrict scales,
                   float* __restrict values, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) values[i] = from_e4m3(codes[i]) * scales[i];
}

}  // namespace

void run(const Quantize& q) {
  if (q.to.scaling == Scaling::blocks) return quantize_blocks(q);
  for_rows(rows_in_use(q.used_rows, q.from), q.from.columns,
           [&](std::int64_t first, std::int64_t last) {
             float* row = row_buffer(0, q.from.columns);
             for (std::int64_t r = first; r < last; ++r) {
               load_row(q.from, r, row);
               store_row(q.to, r, row);
             }
           });
}

void run(const Dequantize& q) {
  for_rows(rows_in_use(q.used_rows, q.from), q.from.columns,
           [&](std::int64_t first, std::int64_t last) {
             float* row = row_buffer(0, q.from.columns);
             for (std::int64_t r = first; r < last; ++r) {
               load_row(q.from, r, row);
               store_row(q.to, r, row);
             }
           });
}

void run(const Transpose& t) {
  const std::int64_t tiles_down = (t.from.columns + kTile - 1) / kTile;
  if (t.from.scaling == Scaling::blocks) {
    const std::int64_t tiles_across = (t.from.rows + kTile - 1) / kTile;
    for_rows(tiles_down, kTile * t.from.rows, [&](std::int64_t first, std::int64_t last) {
      CodeTile tile;
      for (std::int64_t i = first; i < last; ++i) {
        const std::int64_t columns = std::min(kTile, t.from.columns - i * kTile);
        for (std::int64_t j = 0; j < tiles_across; ++j) {
          const std::int64_t rows = std::min(kTile, t.from.rows - j * kTile);
          transpose_tile(t.from, j * kTile, i * kTile, rows, columns, tile);
          for (std::int64_t c = 0; c < columns; ++c) {
            std::memcpy(row_at<std::uint8_t>(t.to, i * kTile + c) + j * kTile,
                        tile.codes + c * kTile, static_cast<std::size_t>(rows));
          }
          t.to.scales[i * t.to.scale_pitch + j] = t.from.scales[j * t.from.scale_pitch + i];
        }
      }
    });
    return;
  }
  const std::int64_t used = rows_in_use(t.used_rows, t.from);
  const std::int64_t tiles_across = (used + kTile - 1) / kTile;
  const std::int64_t touched = std::min(tiles_across * kTile, t.from.rows);
  for_rows(tiles_across * tiles_down, kTile * kTile, [&](std::int64_t first, std::int64_t last) {
    CodeTile tile;
    float* values = row_buffer(0, kTile);
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t r0 = i / tiles_down * kTile, c0 = i % tiles_down * kTile;
      const std::int64_t rows = std::min(used - r0, kTile),
                         columns = std::min(t.from.columns - c0, kTile);
      const std::int64_t written = std::min(touched - r0, kTile);
      const float* scales = t.from.scales + c0 / kTile * t.from.scale_pitch + r0;
      transpose_tile(t.from, r0, c0, rows, columns, tile);
      for (std::int64_t c = 0; c < columns; ++c) {
        scaled_values(tile.codes + c * kTile, scales, values, rows);
        std::fill(values + rows, values + written, 0.0F);
        const float scale = scale_for(largest_magnitude(values, written), t.to.format);
        t.to.scales[r0 / kTile * t.to.scale_pitch + c0 + c] = scale;
        encode(t.to, c0 + c, r0, written, values, scale);
      }
    }
  });
}

}  // namespace orrery::kernels::cpu
