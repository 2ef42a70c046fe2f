#pragma once
// Rows of matrices as spans of floats, in loops that compilers vectorise, and loops over rows that
// use threads where they pay.

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/call.hpp"
#include "kernels/cpu/convert.hpp"

namespace orrery::kernels::cpu {

/// A row's worth of floats that lives as long as the thread. `which`: as many as a kernel needs at
/// once.
inline float* row_buffer(int which, std::int64_t elements) {
  thread_local std::array<std::vector<float>, 6> buffers;
  std::vector<float>& buffer = buffers[static_cast<std::size_t>(which)];
  if (buffer.size() < static_cast<std::size_t>(elements)) {
    buffer.resize(static_cast<std::size_t>(elements));
  }
  return buffer.data();
}

inline constexpr std::int64_t kSerialElements = 32 * 1024;  ///< a task costs as much as these
inline constexpr std::int64_t kTaskElements = 16 * 1024;

/// body(first, last) over pieces of [0, rows), each of so many elements that a task pays. What a
/// piece does must not depend on where it ends.
template <class Body>
void for_rows(std::int64_t rows, std::int64_t elements_per_row, Body body) {
  if (rows <= 0) return;
  if (rows * elements_per_row <= kSerialElements || rows == 1) {
    body(std::int64_t{0}, rows);
    return;
  }
  const std::int64_t grain =
      std::max<std::int64_t>(1, kTaskElements / std::max<std::int64_t>(1, elements_per_row));
  oneapi::tbb::parallel_for(
      oneapi::tbb::blocked_range<std::int64_t>(0, rows, static_cast<std::size_t>(grain)),
      [&](const oneapi::tbb::blocked_range<std::int64_t>& r) { body(r.begin(), r.end()); });
}

/// body(block, first, last) over blocks of `size` of [0, count): blocks that do not depend on
/// threads, for sums whose parts are added up in order.
template <class Body>
void for_blocks(std::int64_t count, std::int64_t size, Body body) {
  const std::int64_t blocks = (count + size - 1) / size;
  if (blocks <= 1) {
    if (count > 0) body(std::int64_t{0}, std::int64_t{0}, count);
    return;
  }
  oneapi::tbb::parallel_for(std::int64_t{0}, blocks, [&](std::int64_t b) {
    body(b, b * size, std::min(count, (b + 1) * size));
  });
}

template <class T>
T* row_at(const Matrix& m, std::int64_t row) {
  return static_cast<T*>(m.data) + row * m.pitch;
}

inline std::byte* row_begin(const Matrix& m, std::int64_t row) {
  return static_cast<std::byte*>(m.data) + element_bytes(row, m.pitch, m.format);
}

/// e5m6; `column` is even.
inline std::uint8_t* packed_at(const Matrix& m, std::int64_t row, std::int64_t column) {
  return static_cast<std::uint8_t*>(m.data) + (row * m.pitch + column) / 2 * 3;
}

inline float scale_of_tile(const Matrix& m, std::int64_t row, std::int64_t tile) {
  return m.scaling == Scaling::rows ? m.scales[tile * m.scale_pitch + row]
                                    : m.scales[row / kTile * m.scale_pitch + tile];
}

/// `count` elements of a row from `first` on (with scales a multiple of 128).
inline void load_row(const Matrix& m, std::int64_t row, std::int64_t first, std::int64_t count,
                     float* out) {
  switch (m.format) {
    case Format::fp32:
      std::memcpy(out, row_at<float>(m, row) + first,
                  static_cast<std::size_t>(count) * sizeof(float));
      return;
    case Format::bf16:
      floats_of_bf16(row_at<std::uint16_t>(m, row) + first, out, count);
      return;
    case Format::e4m3: {
      const std::uint8_t* codes = row_at<std::uint8_t>(m, row) + first;
      for (std::int64_t c = 0; c < count; c += kTile) {
        floats_of_e4m3(codes + c, scale_of_tile(m, row, (first + c) / kTile), out + c,
                       std::min(kTile, count - c));
      }
      return;
    }
    case Format::e5m6: {
      const std::uint8_t* packed = packed_at(m, row, first);
      for (std::int64_t c = 0; c < count; c += kTile) {
        floats_of_e5m6(packed + c / 2 * 3, scale_of_tile(m, row, (first + c) / kTile), out + c,
                       std::min(kTile, count - c));
      }
      return;
    }
  }
}
inline void load_row(const Matrix& m, std::int64_t row, float* out) {
  load_row(m, row, 0, m.columns, out);
}

/// Adds instead of setting.
inline void add_row(const Matrix& m, std::int64_t row, float* out, float* scratch) {
  if (m.format == Format::bf16) {
    add_bf16(row_at<std::uint16_t>(m, row), out, m.columns);
  } else if (m.format == Format::fp32) {
    add_floats(row_at<float>(m, row), out, m.columns);
  } else {
    load_row(m, row, scratch);
    add_floats(scratch, out, m.columns);
  }
}

/// Scaling's rule; `largest` of a tile.
inline float scale_for(float largest, Format format) {
  if (largest == 0) return 1;
  if (format == Format::e4m3) return largest / kE4m3Max;
  const auto bits = std::bit_cast<std::uint32_t>(largest);
  const std::uint32_t up = (bits & 0x7FFFFF) != 0 ? 1 : 0;
  return std::bit_cast<float>(((bits >> 23) + up) << 23);
}

inline void encode(const Matrix& m, std::int64_t row, std::int64_t first, std::int64_t count,
                   const float* values, float scale) {
  if (m.format == Format::e4m3) {
    e4m3_of_floats(values, scale, row_at<std::uint8_t>(m, row) + first, count);
  } else {
    e5m6_of_floats(values, scale, packed_at(m, row, first), count);
  }
}

/// A whole row; quantised by its tiles with rows scales (not with blocks, whose tiles are 128
/// rows).
inline void store_row(const Matrix& m, std::int64_t row, const float* values) {
  switch (m.format) {
    case Format::fp32:
      std::memcpy(row_at<float>(m, row), values,
                  static_cast<std::size_t>(m.columns) * sizeof(float));
      return;
    case Format::bf16:
      bf16_of_floats(values, row_at<std::uint16_t>(m, row), m.columns);
      return;
    case Format::e4m3:
    case Format::e5m6:
      for (std::int64_t c = 0; c < m.columns; c += kTile) {
        const std::int64_t count = std::min(kTile, m.columns - c);
        const float scale = scale_for(largest_magnitude(values + c, count), m.format);
        m.scales[c / kTile * m.scale_pitch + row] = scale;
        encode(m, row, c, count, values + c, scale);
      }
      return;
  }
}

inline std::int64_t rows_in_use(const std::int32_t* used, const Matrix& m) {
  return used == nullptr ? m.rows : *used;
}

}  // namespace orrery::kernels::cpu
