// AdamW and the sum of squares.

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

struct AdamJob {
  View gradient, master, first_moment, second_moment, parameter;
  const AdamScalars* scalars = nullptr;
  const double* square_sum = nullptr;
  std::int64_t elements = 0;
  bool decay = true;
};

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) adam_w(const __grid_constant__ AdamJob job) {
  const AdamScalars s = *job.scalars;
  float clip = 1;
  if (job.square_sum != nullptr && s.max_norm > 0) {
    const double norm = sqrt(*job.square_sum);
    if (norm > s.max_norm) clip = static_cast<float>(s.max_norm / norm);
  }
  const float first_correction = 1.0F / (1.0F - s.beta1_power);
  const float second_correction = 1.0F / (1.0F - s.beta2_power);
  const float decay = job.decay ? s.weight_decay : 0.0F;

  const std::int64_t step = all_threads() * kOctet;
  for (std::int64_t i = first_thread() * kOctet; i < job.elements; i += step) {
    const int count = octet_count(job.elements, i);
    float g[kOctet];
    float w[kOctet];
    float m[kOctet];
    float v[kOctet];
    load<kAccess, Formats::plain>(job.gradient, 0, i, count, g);
    load<kAccess, Formats::plain>(job.master, 0, i, count, w);
    load<kAccess, Formats::plain>(job.first_moment, 0, i, count, m);
    load<kAccess, Formats::plain>(job.second_moment, 0, i, count, v);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
      const float clipped = g[j] * clip;
      m[j] = s.beta1 * m[j] + (1.0F - s.beta1) * clipped;
      v[j] = s.beta2 * v[j] + (1.0F - s.beta2) * clipped * clipped;
      const float update = m[j] * first_correction / (sqrtf(v[j] * second_correction) + s.epsilon);
      w[j] -= s.learning_rate * (update + decay * w[j]);
    }
    store<kAccess, Formats::plain>(job.master, 0, i, count, w);
    store<kAccess, Formats::plain>(job.first_moment, 0, i, count, m);
    store<kAccess, Formats::plain>(job.second_moment, 0, i, count, v);
    if (job.parameter.data != nullptr) {
      store<kAccess, Formats::plain>(job.parameter, 0, i, count, w);
    }
  }
}

/// Sum of a block's threads, in thread 0.
__device__ __forceinline__ double block_sum(double x) {
  __shared__ double sums[kBlock / 32];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  x = warp_sum(x);
  if (lane == 0) sums[threadIdx.x / 32] = x;
  __syncthreads();
  return threadIdx.x < 32 ? warp_sum(sums[lane]) : 0.0;
}

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1)
    square_sums(const __grid_constant__ View values, double* sums) {
  constexpr int kBatch = 2;
  const std::int64_t step = all_threads() * kOctet;
  double sum = 0;
  for (std::int64_t i = first_thread() * kOctet; i < values.columns; i += kBatch * step) {
    float x[kBatch][kOctet] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const std::int64_t at = i + b * step;
      if (at >= values.columns) continue;
      load<kAccess, Formats::plain>(values, 0, at, octet_count(values.columns, at), x[b]);
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const double wide = x[b][j];
        sum += wide * wide;
      }
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kBlock, 1)
    add_square_sums(const double* sums, int count, double* out, bool accumulate) {
  double sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kBlock) sum += sums[i];
  sum = block_sum(sum);
  if (threadIdx.x == 0) *out = accumulate ? *out + sum : sum;
}

View line_of(const void* data, std::int64_t elements, Format format) {
  return view_of({.data = const_cast<void*>(data),
                  .rows = 1,
                  .columns = elements,
                  .pitch = (elements + 15) / 16 * 16,  // there is one row: any pitch will do
                  .format = format});
}

}  // namespace

void launch(const AdamW& call, const LaunchContext& context) {
  if (call.elements == 0) return;
  const AdamJob job{.gradient = line_of(call.gradient, call.elements, Format::fp32),
                    .master = line_of(call.master, call.elements, Format::fp32),
                    .first_moment = line_of(call.first_moment, call.elements, call.moments),
                    .second_moment = line_of(call.second_moment, call.elements, call.moments),
                    .parameter = line_of(call.parameter, call.elements, call.parameters),
                    .scalars = call.scalars,
                    .square_sum = call.square_sum,
                    .elements = call.elements,
                    .decay = call.decay};
  const bool vectors = job.gradient.vectors && job.master.vectors && job.first_moment.vectors &&
                       job.second_moment.vectors && job.parameter.vectors &&
                       call.elements % kOctet == 0;
  start(context, "adam_w", pick(vectors, adam_w<Access::vectors>, adam_w<Access::elements>),
        choose_grid((call.elements + kOctet - 1) / kOctet, context.sms, kBlock), kBlock, 0, job);
}

void launch(const SquareSum& call, const LaunchContext& context) {
  const View values = line_of(call.values, call.elements, Format::fp32);
  const int grid = choose_grid((call.elements + kOctet - 1) / kOctet, context.sms, kBlock);
  auto* sums = workspace<double>(context, grid, "square_sums");
  const bool vectors = values.vectors && call.elements % kOctet == 0;
  start(context, "square_sums",
        pick(vectors, square_sums<Access::vectors>, square_sums<Access::elements>), grid, kBlock, 0,
        values, sums);
  start(context, "add_square_sums", add_square_sums, 1, kBlock, 0, sums, grid, call.out,
        call.accumulate);
}

}  // namespace orrery::kernels::cuda
