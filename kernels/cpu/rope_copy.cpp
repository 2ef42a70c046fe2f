#include <cmath>

#include "kernels/cpu/clones.hpp"
#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

ORRERY_CLONES
void turn(float* __restrict pair, const float* __restrict cosine, const float* __restrict sine,
          std::int64_t pairs) {
  for (std::int64_t i = 0; i < pairs; ++i) {
    const float a = pair[2 * i], b = pair[2 * i + 1];
    pair[2 * i] = a * cosine[i] - b * sine[i];
    pair[2 * i + 1] = a * sine[i] + b * cosine[i];
  }
}

/// Columns of an FP32 or BF16 matrix as one of their own.
Matrix columns_of(const Matrix& m, std::int64_t first, std::int64_t count) {
  Matrix part = m;
  part.data = static_cast<std::byte*>(m.data) + element_bytes(1, first, m.format);
  part.columns = count;
  return part;
}

}  // namespace

void run(const Rope& rope) {
  const std::int64_t pairs = rope.dim / 2;
  std::vector<double> frequency(static_cast<std::size_t>(pairs));
  for (std::int64_t i = 0; i < pairs; ++i) {
    frequency[static_cast<std::size_t>(i)] =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(rope.dim));
  }
  for_rows(rope.x.rows, rope.heads * rope.dim, [&](std::int64_t first, std::int64_t last) {
    float* x = row_buffer(0, rope.dim);
    float* cosine = row_buffer(1, pairs);
    float* sine = row_buffer(2, pairs);
    for (std::int64_t r = first; r < last; ++r) {
      cosines_and_sines(rope.positions[r], frequency.data(), cosine, sine, pairs);
      if (rope.inverse) {
        for (std::int64_t i = 0; i < pairs; ++i) sine[i] = -sine[i];
      }
      for (std::int64_t h = 0; h < rope.heads; ++h) {
        const Matrix head = columns_of(rope.x, h * rope.head_dim + rope.offset, rope.dim);
        load_row(head, r, x);
        turn(x, cosine, sine, pairs);
        store_row(head, r, x);
      }
    }
  });
}

void run(const HeadCopy& copy) {
  const auto bytes = static_cast<std::size_t>(element_bytes(1, copy.width, copy.to.format));
  const auto from_head = [&](std::int64_t h) {
    return columns_of(copy.from, copy.from_offset + h * copy.from_stride, copy.width);
  };
  const auto to_head = [&](std::int64_t h) {
    return columns_of(copy.to, copy.to_offset + h * copy.to_stride, copy.width);
  };
  for_rows(copy.to.rows, copy.heads * copy.width, [&](std::int64_t first, std::int64_t last) {
    float* values = row_buffer(0, copy.width);
    float* scratch = row_buffer(1, copy.width);
    for (std::int64_t r = first; r < last; ++r) {
      for (std::int64_t h = 0; h < copy.heads; ++h) {
        const Matrix from = from_head(h);
        if (copy.sum_heads && h > 0) {
          add_row(from, r, values, scratch);
        } else if (copy.sum_heads || from.format != copy.to.format) {
          load_row(from, r, values);
        }
        if (copy.sum_heads) continue;
        const Matrix to = to_head(h);
        if (from.format != to.format) {
          store_row(to, r, values);
        } else {
          std::memcpy(row_begin(to, r), row_begin(from, r), bytes);
        }
      }
      if (copy.sum_heads) store_row(to_head(0), r, values);
    }
  });
}

void run(const Add& add) {
  for_rows(add.out.rows, add.out.columns, [&](std::int64_t first, std::int64_t last) {
    float* sum = row_buffer(0, add.out.columns);
    float* scratch = row_buffer(1, add.out.columns);
    for (std::int64_t r = first; r < last; ++r) {
      bool any = false;
      for (const Matrix& term : add.terms) {
        if (!term) continue;
        if (any) {
          add_row(term, r, sum, scratch);
        } else {
          load_row(term, r, sum);
        }
        any = true;
      }
      store_row(add.out, r, sum);
    }
  });
}

void run(const Copy& copy) {
  const bool convert = copy.from.format != copy.to.format;
  const auto bytes = static_cast<std::size_t>(element_bytes(1, copy.to.columns, copy.to.format));
  for_rows(copy.to.rows, copy.to.columns, [&](std::int64_t first, std::int64_t last) {
    float* row = row_buffer(0, copy.to.columns);
    for (std::int64_t r = first; r < last; ++r) {
      if (convert) {
        load_row(copy.from, r, row);
        store_row(copy.to, r, row);
      } else {
        std::memcpy(row_begin(copy.to, r), row_begin(copy.from, r), bytes);
      }
    }
  });
  if (copy.to.scaling == Scaling::none) return;
  const bool rows = copy.to.scaling == Scaling::rows;
  const std::int64_t outer =
      rows ? (copy.to.columns + kTile - 1) / kTile : (copy.to.rows + kTile - 1) / kTile;
  const std::int64_t inner = rows ? copy.to.rows : (copy.to.columns + kTile - 1) / kTile;
  for (std::int64_t i = 0; i < outer; ++i) {
    std::copy_n(copy.from.scales + i * copy.from.scale_pitch, inner,
                copy.to.scales + i * copy.to.scale_pitch);
  }
}

void run(const Fill& fill) {
  constexpr std::int64_t kBlock = 1 << 18;
  for_blocks(fill.bytes, kBlock, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    std::memset(static_cast<std::byte*>(fill.data) + first, 0,
                static_cast<std::size_t>(last - first));
  });
}

void run(const Loopback& copy) {
  constexpr std::int64_t kBlock = 1 << 18;
  for_blocks(copy.bytes, kBlock, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    std::memcpy(static_cast<std::byte*>(copy.to) + first,
                static_cast<const std::byte*>(copy.from) + first,
                static_cast<std::size_t>(last - first));
  });
}

}  // namespace orrery::kernels::cpu
