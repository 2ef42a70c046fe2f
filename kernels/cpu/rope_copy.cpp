#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {

void run(const Rope& rope) {
  const std::int64_t pairs = rope.dim / 2;
  std::vector<double> frequency(static_cast<std::size_t>(pairs));
  for (std::int64_t i = 0; i < pairs; ++i) {
    frequency[static_cast<std::size_t>(i)] =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(rope.dim));
  }
  for_rows(rope.x.rows, rope.heads * rope.dim, [&](std::int64_t first, std::int64_t last) {
    float* x = row_buffer(0, rope.x.columns);
    float* cosine = row_buffer(1, pairs);
    float* sine = row_buffer(2, pairs);
    for (std::int64_t r = first; r < last; ++r) {
      for (std::int64_t i = 0; i < pairs; ++i) {
        const double angle = rope.positions[r] * frequency[static_cast<std::size_t>(i)];
        cosine[i] = static_cast<float>(std::cos(angle));
        sine[i] = static_cast<float>(rope.inverse ? -std::sin(angle) : std::sin(angle));
      }
      load_row(rope.x, r, x);
      for (std::int64_t h = 0; h < rope.heads; ++h) {
        float* head = x + h * rope.head_dim + rope.offset;
        for (std::int64_t i = 0; i < pairs; ++i) {
          const float a = head[2 * i], b = head[2 * i + 1];
          head[2 * i] = a * cosine[i] - b * sine[i];
          head[2 * i + 1] = a * sine[i] + b * cosine[i];
        }
      }
      store_row(rope.x, r, x);
    }
  });
}

void run(const HeadCopy& copy) {
  // Columns of one row that are touched, and the two rows where they lie.
  const std::int64_t from_end = copy.from_offset + (copy.heads - 1) * copy.from_stride + copy.width;
  for_rows(copy.to.rows, copy.heads * copy.width, [&](std::int64_t first, std::int64_t last) {
    Matrix from = copy.from, to = copy.to;
    from.columns = from_end;
    float* in = row_buffer(0, from_end);
    float* sum = row_buffer(1, copy.width);
    for (std::int64_t r = first; r < last; ++r) {
      load_row(from, r, in);
      if (copy.sum_heads) {
        std::fill_n(sum, copy.width, 0.0F);
        for (std::int64_t h = 0; h < copy.heads; ++h) {
          const float* head = in + copy.from_offset + h * copy.from_stride;
          for (std::int64_t c = 0; c < copy.width; ++c) sum[c] += head[c];
        }
      }
      for (std::int64_t h = 0; h < (copy.sum_heads ? 1 : copy.heads); ++h) {
        const float* head = copy.sum_heads ? sum : in + copy.from_offset + h * copy.from_stride;
        const std::int64_t at = copy.to_offset + h * copy.to_stride;
        if (to.format == Format::fp32) {
          std::copy_n(head, copy.width, row_at<float>(to, r) + at);
        } else {
          std::uint16_t* codes = row_at<std::uint16_t>(to, r) + at;
          for (std::int64_t c = 0; c < copy.width; ++c) codes[c] = to_bf16(head[c]);
        }
      }
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
        std::memcpy(
            static_cast<std::byte*>(copy.to.data) + element_bytes(r, copy.to.pitch, copy.to.format),
            static_cast<const std::byte*>(copy.from.data) +
                element_bytes(r, copy.from.pitch, copy.from.format),
            bytes);
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
