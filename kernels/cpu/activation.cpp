#include "kernels/cpu/clones.hpp"
#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

ORRERY_CLONES
void gelu(const float* __restrict in, float weight, float* __restrict out, std::int64_t width) {
  for (std::int64_t c = 0; c < width; ++c) out[c] = in[c] * normal_below(in[c]) * weight;
}

/// `again`: the output.
ORRERY_CLONES
void gelu_gradient(const float* __restrict in, const float* __restrict d_out, float weight,
                   float* __restrict d_in, float* __restrict again, std::int64_t width) {
  constexpr float kDensity = 0.398942280F;  // of the standard normal distribution at 0
  for (std::int64_t c = 0; c < width; ++c) {
    const float x = in[c], below = normal_below(x);
    d_in[c] = d_out[c] * weight * (below + x * kDensity * exponential(-0.5F * x * x));
    again[c] = x * below * weight;
  }
}

ORRERY_CLONES
void swiglu(const float* __restrict gate, const float* __restrict up, float weight,
            float* __restrict out, std::int64_t width) {
  for (std::int64_t c = 0; c < width; ++c) {
    out[c] = gate[c] / (1 + exponential(-gate[c])) * up[c] * weight;
  }
}

/// `again`: the output.
ORRERY_CLONES
void swiglu_gradient(const float* __restrict gate, const float* __restrict up,
                     const float* __restrict d_out, float weight, float* __restrict d_gate,
                     float* __restrict d_up, float* __restrict again, std::int64_t width) {
  for (std::int64_t c = 0; c < width; ++c) {
    const float s = 1 / (1 + exponential(-gate[c]));
    const float d = d_out[c] * weight, silu = gate[c] * s;
    d_gate[c] = d * up[c] * (s + silu * (1 - s));
    d_up[c] = d * silu;
    again[c] = silu * up[c] * weight;
  }
}

ORRERY_CLONES
float dot_of(const float* __restrict a, const float* __restrict b, std::int64_t count) {
  return sum_of(count, [=](std::int64_t i) { return a[i] * b[i]; });
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
                 gelu(in, weight, out, width);
               } else {
                 swiglu(in, in + width, weight, out, width);
               }
               store_row(a.out, r, out);
             }
           });
}

void run(const ActivationBackward& a) {
  const std::int64_t width = a.d_out.columns;
  for_rows(rows_in_use(a.used_rows, a.in), a.in.columns,
           [&](std::int64_t first, std::int64_t last) {
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
                 gelu_gradient(in, d_out, weight, d_in, again, width);
               } else {
                 swiglu_gradient(in, in + width, d_out, weight, d_in, d_in + width, again, width);
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
               const float sum = dot_of(a, b, dot.a.columns);
               dot.out[r] = dot.row_weight[r] == 0 ? 0.0F : sum / dot.row_weight[r];
             }
           });
}

}  // namespace orrery::kernels::cpu
