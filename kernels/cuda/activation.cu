// SwiGLU and GELU and their gradients, and the gradient of a row's weight. Eight columns a thread,
// 16 lanes a tile, so that the output can be quantised on the way.

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

constexpr int kBackwardBlock = 768;  ///< up to 80 registers a thread

struct ForwardJob {
  View in, out;
  const float* row_weight = nullptr;
  const std::int32_t* used_rows = nullptr;
  std::uint32_t tiles = 0;
};

struct BackwardJob {
  View in, d_out, d_in, out_again;
  const float* row_weight = nullptr;
  const std::int32_t* used_rows = nullptr;
  std::uint32_t tiles = 0;
};

__device__ __forceinline__ float sigmoid(float x) {
  return 1.0F / (1.0F + expf(-x));
}

/// x Phi(x), with the distribution function of the normal distribution.
__device__ __forceinline__ float gelu(float x) {
  return 0.5F * x * (1.0F + erff(x * 0.70710678118654752F));
}
__device__ __forceinline__ float gelu_slope(float x) {
  const float density = 0.39894228040143268F * expf(-0.5F * x * x);
  return 0.5F * (1.0F + erff(x * 0.70710678118654752F)) + x * density;
}

/// 0 for rows of padding, and where there is nothing.
__device__ __forceinline__ float weight_of(const float* weights, std::int64_t row, int count) {
  if (count <= 0) return 0;
  return weights == nullptr ? 1.0F : weights[row];
}

template <Activation kKind, Access kAccess>
__global__ void __launch_bounds__(kBlock, 1)
    activation_forward(const __grid_constant__ ForwardJob job) {
  constexpr bool kGated = kKind == Activation::swiglu;
  constexpr int kBatch = kGated ? 1 : 2;
  const std::int64_t width = job.out.columns;
  const std::int64_t octets = octets_of(rows_in_use(job.used_rows, job.out.rows), job.tiles);
  Raw gate[kBatch];
  Raw up[kBatch];
  stream<kBatch>(
      octets,
      [&](int b, std::int64_t index) {
        const Place at = place_of(index, job.tiles);
        if (at.column >= width) return;
        const int count = octet_count(width, at.column);
        gate[b] = load_raw<kAccess, Formats::plain>(job.in, at.row, at.column, count);
        if (kGated) {
          up[b] = load_raw<kAccess, Formats::plain>(job.in, at.row, width + at.column, count);
        }
      },
      [&](int b, std::int64_t index, bool there) {
        const Place at = place_of(index, job.tiles);
        const int count = there && at.column < width ? octet_count(width, at.column) : 0;
        float y[kOctet] = {};
        const float weight = weight_of(job.row_weight, at.row, count);
        if (weight != 0) {
          float x[kOctet];
          decode<Formats::plain>(gate[b], job.in.format, x);
          if (kGated) decode<Formats::plain>(up[b], job.in.format, y);
#pragma unroll
          for (int j = 0; j < kOctet; ++j) {
            y[j] = (kGated ? x[j] * sigmoid(x[j]) * y[j] : gelu(x[j])) * weight;
          }
        }
        store_tile<kAccess>(job.out, at.row, at.column, count, y);
      });
}

template <Activation kKind, Access kAccess>
__global__ void __launch_bounds__(kBackwardBlock, 1)
    activation_backward(const __grid_constant__ BackwardJob job) {
  constexpr bool kGated = kKind == Activation::swiglu;
  const std::int64_t width = job.d_out.columns;
  const std::int64_t octets = octets_of(rows_in_use(job.used_rows, job.d_out.rows), job.tiles);
  Raw gate{};
  Raw up{};
  Raw slope{};
  stream<1>(
      octets,
      [&](int, std::int64_t index) {
        const Place at = place_of(index, job.tiles);
        if (at.column >= width) return;
        const int count = octet_count(width, at.column);
        gate = load_raw<kAccess, Formats::plain>(job.in, at.row, at.column, count);
        if (kGated) {
          up = load_raw<kAccess, Formats::plain>(job.in, at.row, width + at.column, count);
        }
        slope = load_raw<kAccess, Formats::plain>(job.d_out, at.row, at.column, count);
      },
      [&](int, std::int64_t index, bool there) {
        const Place at = place_of(index, job.tiles);
        const int count = there && at.column < width ? octet_count(width, at.column) : 0;
        float y[kOctet] = {};
        if (count > 0) {
          const float weight = weight_of(job.row_weight, at.row, count);
          if (weight == 0) {  // whatever is in there
            gate = Raw{};
            up = Raw{};
            slope = Raw{};
          }
          float d[kOctet];
          decode<Formats::plain>(slope, job.d_out.format, d);
          float x[kOctet];
          decode<Formats::plain>(gate, job.in.format, x);
          if (kGated) {
            float u[kOctet];
            float d_u[kOctet];
            decode<Formats::plain>(up, job.in.format, u);
#pragma unroll
            for (int j = 0; j < kOctet; ++j) {
              const float s = sigmoid(x[j]);
              const float silu = x[j] * s;
              y[j] = silu * u[j] * weight;
              const float g = d[j] * weight;
              d_u[j] = g * silu;
              d[j] = g * u[j] * s * (1.0F + x[j] * (1.0F - s));
            }
            store<kAccess, Formats::plain>(job.d_in, at.row, width + at.column, count, d_u);
          } else {
#pragma unroll
            for (int j = 0; j < kOctet; ++j) {
              y[j] = gelu(x[j]) * weight;
              d[j] *= weight * gelu_slope(x[j]);
            }
          }
          store<kAccess, Formats::plain>(job.d_in, at.row, at.column, count, d);
        }
        if (job.out_again.data != nullptr) {
          store_tile<kAccess>(job.out_again, at.row, at.column, count, y);
        }
      });
}

struct DotJob {
  View a, b;
  const float* row_weight = nullptr;
  float* out = nullptr;
  const std::int32_t* used_rows = nullptr;
};

/// A warp a row.
template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) row_dot(const __grid_constant__ DotJob job) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t rows = rows_in_use(job.used_rows, job.a.rows);
  const std::int64_t warps = all_threads() / 32;
  for (std::int64_t row = first_thread() / 32; row < rows; row += warps) {
    float sum = 0;
#pragma unroll 4
    for (std::int64_t c = lane * kOctet; c < job.a.columns; c += 32 * kOctet) {
      const int count = octet_count(job.a.columns, c);
      float a[kOctet];
      float b[kOctet];
      load<kAccess, Formats::plain>(job.a, row, c, count, a);
      load<kAccess, Formats::plain>(job.b, row, c, count, b);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sum += a[j] * b[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) {
      const float weight = job.row_weight == nullptr ? 1.0F : job.row_weight[row];
      job.out[row] = weight == 0 ? 0.0F : sum / weight;
    }
  }
}

}  // namespace

void launch(const ActivationForward& call, const LaunchContext& context) {
  const ForwardJob job{.in = view_of(call.in),
                       .out = view_of(call.out),
                       .row_weight = call.row_weight,
                       .used_rows = call.used_rows,
                       .tiles = tiles_of(call.out.columns)};
  const std::int64_t octets = octets_of(call.out.rows, job.tiles);
  if (octets == 0) return;
  const bool vectors = job.in.vectors && job.out.vectors && call.out.columns % kOctet == 0;
  using enum Activation;
  start(context, "activation_forward",
        call.kind == swiglu ? pick(vectors, activation_forward<swiglu, Access::vectors>,
                                   activation_forward<swiglu, Access::elements>)
                            : pick(vectors, activation_forward<gelu, Access::vectors>,
                                   activation_forward<gelu, Access::elements>),
        choose_grid(octets, context.sms, kBlock), kBlock, 0, job);
}

void launch(const ActivationBackward& call, const LaunchContext& context) {
  const BackwardJob job{.in = view_of(call.in),
                        .d_out = view_of(call.d_out),
                        .d_in = view_of(call.d_in),
                        .out_again = view_of(call.out_again),
                        .row_weight = call.row_weight,
                        .used_rows = call.used_rows,
                        .tiles = tiles_of(call.d_out.columns)};
  const std::int64_t octets = octets_of(call.d_out.rows, job.tiles);
  if (octets == 0) return;
  const bool vectors = job.in.vectors && job.d_out.vectors && job.d_in.vectors &&
                       job.out_again.vectors && call.d_out.columns % kOctet == 0;
  using enum Activation;
  start(context, "activation_backward",
        call.kind == swiglu ? pick(vectors, activation_backward<swiglu, Access::vectors>,
                                   activation_backward<swiglu, Access::elements>)
                            : pick(vectors, activation_backward<gelu, Access::vectors>,
                                   activation_backward<gelu, Access::elements>),
        choose_grid(octets, context.sms, kBackwardBlock), kBackwardBlock, 0, job);
}

void launch(const RowDot& call, const LaunchContext& context) {
  if (call.a.rows == 0) return;
  const DotJob job{.a = view_of(call.a),
                   .b = view_of(call.b),
                   .row_weight = call.row_weight,
                   .out = call.out,
                   .used_rows = call.used_rows};
  const bool vectors = job.a.vectors && job.b.vectors && call.a.columns % kOctet == 0;
  start(context, "row_dot", pick(vectors, row_dot<Access::vectors>, row_dot<Access::elements>),
        choose_grid(call.a.rows * 32, context.sms, kBlock), kBlock, 0, job);
}

}  // namespace orrery::kernels::cuda
