#include <numbers>

#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

float normal_below(float x) {
  return 0.5F * std::erfc(-x / std::numbers::sqrt2_v<float>);
}
float normal_density(float x) {
  return 0.398942280F * std::exp(-x * x / 2);
}

}  // namespace

void run(const ActivationForward& a) {
  const std::int64_t width = a.out.columns;
  for_rows(rows_in_use(a.used_rows, a.in), a.in.columns,
           [&](std::int64_t first, std::int64_t last) {
             float* in = row_buffer(0, a.in.columns);
             float* out = row_buffer(1, width);
             for (std::int64_t r = first; r < last; ++r) {
               const float weight = a.row_weight == nullptr ? 1.0F : a.row_weight[r];
               load_row(a.in, r, in);
               if (weight == 0) {
                 std::fill_n(out, width, 0.0F);
               } else if (a.kind == Activation::gelu) {
                 for (std::int64_t c = 0; c < width; ++c)
                   out[c] = in[c] * normal_below(in[c]) * weight;
               } else {
                 const float* up = in + width;
                 for (std::int64_t c = 0; c < width; ++c) {
                   out[c] = in[c] / (1 + fast_exp(-in[c])) * up[c] * weight;
                 }
               }
               store_row(a.out, r, out);
             }
           });
}

void run(const ActivationBackward& a) {
  const std::int64_t width = a.d_out.columns;
  for_rows(
      rows_in_use(a.used_rows, a.in), a.in.columns, [&](std::int64_t first, std::int64_t last) {
        float* in = row_buffer(0, a.in.columns);
        float* d_in = row_buffer(1, a.in.columns);
        float* d_out = row_buffer(2, width);
        float* again = row_buffer(3, width);
        for (std::int64_t r = first; r < last; ++r) {
          const float weight = a.row_weight == nullptr ? 1.0F : a.row_weight[r];
          load_row(a.in, r, in);
          load_row(a.d_out, r, d_out);
          if (weight == 0) {
            std::fill_n(d_in, a.in.columns, 0.0F);
            std::fill_n(again, width, 0.0F);
          } else if (a.kind == Activation::gelu) {
            for (std::int64_t c = 0; c < width; ++c) {
              const float below = normal_below(in[c]);
              d_in[c] = d_out[c] * weight * (below + in[c] * normal_density(in[c]));
              again[c] = in[c] * below * weight;
            }
          } else {
            const float* up = in + width;
            for (std::int64_t c = 0; c < width; ++c) {
              const float s = 1 / (1 + fast_exp(-in[c])), d = d_out[c] * weight, silu = in[c] * s;
              d_in[c] = d * up[c] * (s + silu * (1 - s));
              d_in[width + c] = d * silu;
              again[c] = silu * up[c] * weight;
            }
          }
          store_row(a.d_in, r, d_in);
          if (a.out_again) store_row(a.out_again, r, again);
        }
      });
}

void run(const RowDot& dot) {
  for_rows(rows_in_use(dot.used_rows, dot.a), dot.a.columns,
           [&](std::int64_t first, std::int64_t last) {
             float* a = row_buffer(0, dot.a.columns);
             float* b = row_buffer(1, dot.a.columns);
             for (std::int64_t r = first; r < last; ++r) {
               load_row(dot.a, r, a);
               load_row(dot.b, r, b);
               std::array<float, 16> part{};
               std::int64_t c = 0;
               for (; c + 16 <= dot.a.columns; c += 16) {
                 for (std::int64_t i = 0; i < 16; ++i) {
                   part[static_cast<std::size_t>(i)] += a[c + i] * b[c + i];
                 }
               }
               float sum = 0;
               for (; c < dot.a.columns; ++c) sum += a[c] * b[c];
               for (const float p : part) sum += p;
               dot.out[r] = dot.row_weight[r] == 0 ? 0.0F : sum / dot.row_weight[r];
             }
           });
}

}  // namespace orrery::kernels::cpu
