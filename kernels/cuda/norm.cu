// RMSNorm and LayerNorm. A group of threads holds a row, or a segment of it, in registers: one pass
// over memory. Gradients of gain and bias are summed in registers over the rows of a group, then
// over groups in a second kernel.

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

constexpr int kBackwardBlock = 512;  ///< up to 128 registers a thread

struct ForwardJob {
  View terms[4];
  View sum, gain, bias, y;
  float epsilon = 0;
  std::int64_t segments = 1, width = 0, units = 0;
  int threads_per_row = 32;
};

/// x of octet `column` of the segment, and `sum` where it is wanted.
template <Access kAccess, bool kWriteSum>
__device__ __forceinline__ void add_terms(const ForwardJob& job, std::int64_t row,
                                          std::int64_t column, int count, float (&x)[kOctet]) {
#pragma unroll
  for (int j = 0; j < kOctet; ++j) x[j] = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (job.terms[i].data == nullptr) continue;
    float term[kOctet];
    load<kAccess, Formats::plain>(job.terms[i], row, column, count, term);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) x[j] += term[j];
  }
  if (job.sum.data != nullptr) {
    round_to(job.sum.format, x);
    if (kWriteSum) store<kAccess, Formats::plain>(job.sum, row, column, count, x);
  }
}

/// Holds kOctets octets a thread, all of them vectors; with kOctets 0 any access, and x is added up
/// anew for each pass over the row. Then `sum` is written in the last pass, because it may be one
/// of the terms.
template <int kOctets, bool kCentred>
__global__ void __launch_bounds__(kBlock, 1) norm_forward(const __grid_constant__ ForwardJob job) {
  __shared__ float shared[2 * kBlock / 32];
  Group<float> group(job.threads_per_row, shared);
  const int groups = static_cast<int>(blockDim.x) / job.threads_per_row;
  const std::int64_t step = std::int64_t{job.threads_per_row} * kOctet;
  const float inverse_width = 1.0F / static_cast<float>(job.width);
  constexpr int kHeld = kOctets > 0 ? kOctets : 1;
  constexpr bool kHold = kOctets > 0;
  constexpr Access kAccess = kHold ? Access::vectors : Access::elements;

  for (std::int64_t unit = std::int64_t{blockIdx.x} * groups + group.number(); unit < job.units;
       unit += std::int64_t{gridDim.x} * groups) {
    const std::int64_t row = unit / job.segments;
    const std::int64_t first = (unit - row * job.segments) * job.width;
    float x[kHeld][kOctet];

    // body(k, local column, count) for each octet of this thread
    const auto each = [&](const auto& body) {
      if constexpr (kHold) {
#pragma unroll
        for (int k = 0; k < kOctets; ++k) {
          const std::int64_t local = k * step + group.thread() * kOctet;
          if (local < job.width) body(k, local, octet_count(job.width, local));
        }
      } else {
        for (std::int64_t local = group.thread() * kOctet; local < job.width; local += step) {
          body(0, local, octet_count(job.width, local));
        }
      }
    };

    float total = 0;
    if (kHold || kCentred) {
      each([&](int k, std::int64_t local, int count) {
        add_terms<kAccess, kHold>(job, row, first + local, count, x[k]);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) total += x[k][j];
      });
    }
    const float mean = kCentred ? group.sum(total) * inverse_width : 0.0F;

    float squares = 0;
    each([&](int k, std::int64_t local, int count) {
      if (!kHold) add_terms<kAccess, false>(job, row, first + local, count, x[k]);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const float d = j < count ? x[k][j] - mean : 0.0F;
        squares += d * d;
      }
    });
    const float scale = 1.0F / sqrtf(group.sum(squares) * inverse_width + job.epsilon);

    each([&](int k, std::int64_t local, int count) {
      if (!kHold) add_terms<kAccess, true>(job, row, first + local, count, x[k]);
      float gain[kOctet];
      load<kAccess, Formats::plain>(job.gain, 0, local, count, gain);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) x[k][j] = (x[k][j] - mean) * scale * gain[j];
      if (kCentred && job.bias.data != nullptr) {
        float bias[kOctet];
        load<kAccess, Formats::plain>(job.bias, 0, local, count, bias);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) x[k][j] += bias[j];
      }
      store<kAccess, Formats::plain>(job.y, row, first + local, count, x[k]);
    });
  }
}

struct BackwardJob {
  View d_y, x, gain, add, d_x;
  float* partial = nullptr;  ///< (groups, width) of d_gain, then the same of d_bias if centred
  float epsilon = 0;
  std::int64_t segments = 1, width = 0, units = 0, groups = 0;
  int threads_per_row = 32;
};

template <int kOctets, bool kCentred>
__global__ void __launch_bounds__(kBackwardBlock, 1)
    norm_backward(const __grid_constant__ BackwardJob job) {
  __shared__ float shared[2 * kBackwardBlock / 32];
  Group<float> group(job.threads_per_row, shared);
  const int groups = static_cast<int>(blockDim.x) / job.threads_per_row;
  const std::int64_t step = std::int64_t{job.threads_per_row} * kOctet;
  const float inverse_width = 1.0F / static_cast<float>(job.width);
  const std::int64_t group_index = std::int64_t{blockIdx.x} * groups + group.number();
  float* const gain_sums = job.partial + group_index * job.width;
  float* const bias_sums = job.partial + (job.groups + group_index) * job.width;
  constexpr int kHeld = kOctets > 0 ? kOctets : 1;
  constexpr bool kHold = kOctets > 0;
  constexpr Access kAccess = kHold ? Access::vectors : Access::elements;

  float d_gain[kHeld][kOctet] = {};
  float d_bias[kCentred ? kHeld : 1][kOctet] = {};
  const auto each = [&](const auto& body) {
    if constexpr (kHold) {
#pragma unroll
      for (int k = 0; k < kOctets; ++k) {
        const std::int64_t local = k * step + group.thread() * kOctet;
        if (local < job.width) body(k, local, octet_count(job.width, local));
      }
    } else {
      for (std::int64_t local = group.thread() * kOctet; local < job.width; local += step) {
        body(0, local, octet_count(job.width, local));
      }
    }
  };
  if (!kHold) {
    each([&](int, std::int64_t local, int count) {
      for (int j = 0; j < count; ++j) {
        gain_sums[local + j] = 0;
        if (kCentred) bias_sums[local + j] = 0;
      }
    });
  }

  for (std::int64_t unit = group_index; unit < job.units; unit += job.groups) {
    const std::int64_t row = unit / job.segments;
    const std::int64_t first = (unit - row * job.segments) * job.width;
    float x[kHeld][kOctet];
    float d_y[kHeld][kOctet];
    const auto read = [&](int k, std::int64_t local, int count) {
      const Raw raw_x = load_raw<kAccess, Formats::plain>(job.x, row, first + local, count);
      const Raw raw_d_y = load_raw<kAccess, Formats::plain>(job.d_y, row, first + local, count);
      decode<Formats::plain>(raw_x, job.x.format, x[k]);
      decode<Formats::plain>(raw_d_y, job.d_y.format, d_y[k]);
    };

    float total = 0;
    if (kHold || kCentred) {
      each([&](int k, std::int64_t local, int count) {
        read(k, local, count);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) total += x[k][j];
      });
    }
    const float mean = kCentred ? group.sum(total) * inverse_width : 0.0F;

    // With h = (x - mean) * scale and g = d_y * gain: the mean of h^2 is known only after scale, so
    // sums are of x - mean.
    float squares = 0;
    float along = 0;  // sum of g (x - mean)
    float g_sum = 0;
    each([&](int k, std::int64_t local, int count) {
      if (!kHold) read(k, local, count);
      float gain[kOctet];
      load<kAccess, Formats::plain>(job.gain, 0, local, count, gain);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const float d = j < count ? x[k][j] - mean : 0.0F;
        const float g = d_y[k][j] * gain[j];
        squares += d * d;
        along += g * d;
        g_sum += g;
      }
    });
    const float scale = 1.0F / sqrtf(group.sum(squares) * inverse_width + job.epsilon);
    const float along_mean = group.sum(along) * inverse_width * scale;
    const float g_mean = kCentred ? group.sum(g_sum) * inverse_width : 0.0F;

    each([&](int k, std::int64_t local, int count) {
      if (!kHold) read(k, local, count);
      float gain[kOctet];
      load<kAccess, Formats::plain>(job.gain, 0, local, count, gain);
      float d_x[kOctet] = {};
      if (job.add.data != nullptr)
        load<kAccess, Formats::plain>(job.add, row, first + local, count, d_x);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        const float h = (x[k][j] - mean) * scale;
        d_x[j] += (d_y[k][j] * gain[j] - h * along_mean - g_mean) * scale;
        if (kHold) {
          d_gain[k][j] += d_y[k][j] * h;
          if (kCentred) d_bias[k][j] += d_y[k][j];
        } else if (j < count) {
          gain_sums[local + j] += d_y[k][j] * h;
          if (kCentred) bias_sums[local + j] += d_y[k][j];
        }
      }
      store<kAccess, Formats::plain>(job.d_x, row, first + local, count, d_x);
    });
  }
  if constexpr (kHold) {
    each([&](int k, std::int64_t local, int count) {
#pragma unroll
      for (int j = 0; j < kOctet; ++j) {
        if (j < count) {
          gain_sums[local + j] = d_gain[k][j];
          if (kCentred) bias_sums[local + j] = d_bias[k][j];
        }
      }
    });
  }
}

/// to[c] += the sum of partial[g, c] over groups: 32 columns a block, 32 warps that each sum some
/// of the groups. blockIdx.y picks one of two sums.
__global__ void __launch_bounds__(1024, 1)
    sum_groups(const float* partial, std::int64_t groups, std::int64_t width, float* first,
               float* second) {
  __shared__ float sums[32][33];
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const std::int64_t blocks_each = (width + 31) / 32;
  for (std::int64_t b = blockIdx.x; b < 2 * blocks_each; b += gridDim.x) {
    float* const to = b < blocks_each ? first : second;
    if (to == nullptr) continue;
    const float* const from = partial + (b < blocks_each ? 0 : groups * width);
    const std::int64_t column = (b % blocks_each) * 32 + lane;
    float sum = 0;
    if (column < width) {
#pragma unroll 8
      for (std::int64_t g = warp; g < groups; g += 32) sum += from[g * width + column];
    }
    sums[warp][lane] = sum;
    __syncthreads();
    sum = warp_sum(sums[lane][warp]);  // of column `warp`, over the warps
    __syncthreads();
    if (lane == 0 && (b % blocks_each) * 32 + warp < width) {
      to[(b % blocks_each) * 32 + warp] += sum;
    }
  }
}

using ForwardKernel = void (*)(ForwardJob);
using BackwardKernel = void (*)(BackwardJob);

template <bool kCentred>
ForwardKernel forward_kernel(int octets) {
  return octets == 1   ? norm_forward<1, kCentred>
         : octets == 2 ? norm_forward<2, kCentred>
         : octets == 4 ? norm_forward<4, kCentred>
                       : norm_forward<0, kCentred>;
}

template <bool kCentred>
BackwardKernel backward_kernel(int octets) {
  return octets == 1   ? norm_backward<1, kCentred>
         : octets == 2 ? norm_backward<2, kCentred>
         : octets == 4 ? norm_backward<4, kCentred>
                       : norm_backward<0, kCentred>;
}

/// What both directions have.
template <class Job>
Job job_of(const Matrix& rows, std::int64_t segments, float epsilon) {
  Job job;
  job.epsilon = epsilon;
  job.segments = segments;
  job.width = rows.columns / segments;
  job.units = rows.rows * segments;
  return job;
}

/// A group's threads hold its row where they can, and all octets are whole: `octets` each, or more
/// for a row that is too wide.
template <class Job, class... Views>
RowPlan plan_of(const Job& job, int sms, int block, int octets, const Views&... views) {
  const bool vectors = (views.vectors && ...) && job.width % kOctet == 0;
  const RowPlan plan = choose_rows(job.units, job.width, sms, block, vectors ? octets : 0);
  return plan.octets > 0 || !vectors ? plan : choose_rows(job.units, job.width, sms, block, 4);
}

}  // namespace

void launch(const NormForward& call, const LaunchContext& context) {
  if (call.y.rows == 0 || call.y.columns == 0) return;
  auto job = job_of<ForwardJob>(call.y, call.segments, call.epsilon);
  for (int i = 0; i < 4; ++i) job.terms[i] = view_of(call.terms[static_cast<std::size_t>(i)]);
  job.sum = view_of(call.sum);
  job.gain = view_of(call.gain);
  job.bias = view_of(call.bias);
  job.y = view_of(call.y);
  const RowPlan plan = plan_of(job, context.sms, kBlock, 4, job.terms[0], job.terms[1],
                               job.terms[2], job.terms[3], job.sum, job.gain, job.bias, job.y);
  job.threads_per_row = plan.threads_per_row;
  start(context, "norm_forward",
        call.centred ? forward_kernel<true>(plan.octets) : forward_kernel<false>(plan.octets),
        plan.grid, plan.block, 0, job);
}

void launch(const NormBackward& call, const LaunchContext& context) {
  if (call.x.rows == 0 || call.x.columns == 0) return;
  auto job = job_of<BackwardJob>(call.x, call.segments, call.epsilon);
  job.d_y = view_of(call.d_y);
  job.x = view_of(call.x);
  job.gain = view_of(call.gain);
  job.add = view_of(call.add);
  job.d_x = view_of(call.d_x);
  const RowPlan plan =
      plan_of(job, context.sms, kBackwardBlock, 2, job.d_y, job.x, job.gain, job.add, job.d_x);
  job.threads_per_row = plan.threads_per_row;
  job.groups = plan.groups();
  job.partial =
      workspace<float>(context, (call.centred ? 2 : 1) * job.groups * job.width, "norm_backward");
  start(context, "norm_backward",
        call.centred ? backward_kernel<true>(plan.octets) : backward_kernel<false>(plan.octets),
        plan.grid, plan.block, 0, job);
  start(context, "sum_groups", sum_groups,
        choose_grid(2 * ((job.width + 31) / 32) * 1024, context.sms, 1024), 1024, 0, job.partial,
        job.groups, job.width, call.d_gain, call.centred ? call.d_bias : nullptr);
}

}  // namespace orrery::kernels::cuda
