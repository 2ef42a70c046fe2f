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

/// One 128x128 tile of codes, transposed.
void transpose_codes(const Matrix& from, const Matrix& to, std::int64_t r0, std::int64_t c0) {
  const std::int64_t r1 = std::min(from.rows, r0 + kTile), c1 = std::min(from.columns, c0 + kTile);
  for (std::int64_t r = r0; r < r1; ++r) {
    const std::uint8_t* in = row_at<std::uint8_t>(from, r);
    for (std::int64_t c = c0; c < c1; ++c) row_at<std::uint8_t>(to, c)[r] = in[c];
  }
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
      for (std::int64_t i = first; i < last; ++i) {
        for (std::int64_t j = 0; j < tiles_across; ++j) {
          transpose_codes(t.from, t.to, j * kTile, i * kTile);
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
    float* tile = row_buffer(0, kTile * kTile);  // transposed: (column, row)
    float* row = row_buffer(1, kTile);
    for (std::int64_t i = first; i < last; ++i) {
      const std::int64_t r0 = i / tiles_down * kTile, c0 = i % tiles_down * kTile;
      const std::int64_t rows = std::min(used - r0, kTile),
                         columns = std::min(t.from.columns - c0, kTile);
      const std::int64_t written = std::min(touched - r0, kTile);
      for (std::int64_t r = 0; r < rows; ++r) {
        load_row(t.from, r0 + r, c0, columns, row);
        for (std::int64_t c = 0; c < columns; ++c) tile[c * kTile + r] = row[c];
      }
      for (std::int64_t c = 0; c < columns; ++c) {
        float* values = tile + c * kTile;
        std::fill(values + rows, values + written, 0.0F);
        const float scale = scale_for(largest_magnitude(values, written), t.to.format);
        t.to.scales[r0 / kTile * t.to.scale_pitch + c0 + c] = scale;
        encode(t.to, c0 + c, r0, written, values, scale);
      }
    }
  });
}

}  // namespace orrery::kernels::cpu
