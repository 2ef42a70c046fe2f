// Rotary embedding, and copies between heads and columns.

#include <algorithm>

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

/// Heads that one warp rotates after it has computed the angles of a row.
constexpr std::int64_t kHeadsPerWarp = 32;

struct RopeJob {
  View x;
  std::int64_t heads = 1, head_dim = 0, offset = 0;
  int dim = 0;
  const std::int32_t* positions = nullptr;
  double log2_theta = 0;
  bool inverse = false;
  std::int64_t chunks = 1;  ///< of heads
};

/// A warp takes a row and some heads. Angles are computed in double and reduced to one turn before
/// they are rounded: a float of position 100000 has 0.004 rad for its last bit.
template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) rope(const __grid_constant__ RopeJob job) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int pairs = job.dim / 2;
  float* const cosines =
      reinterpret_cast<float*>(dynamic_shared()) + static_cast<int>(threadIdx.x) / 32 * job.dim;
  float* const sines = cosines + pairs;
  const std::int64_t warps = all_threads() / 32;
  for (std::int64_t unit = first_thread() / 32; unit < job.x.rows * job.chunks; unit += warps) {
    const std::int64_t row = unit / job.chunks;
    const std::int64_t first_head = (unit - row * job.chunks) * kHeadsPerWarp;
    const std::int64_t heads = min(job.heads - first_head, kHeadsPerWarp);
    const double position = job.positions[row];
    __syncwarp();  // everybody has read the last row's table
    for (int i = lane; i < pairs; i += 32) {
      constexpr double kTurn = 6.283185307179586477;
      const double angle = position * exp2(-2.0 * i / job.dim * job.log2_theta);
      const auto rest = static_cast<float>(angle - kTurn * rint(angle / kTurn));
      float sine = 0;
      float cosine = 0;
      sincosf(rest, &sine, &cosine);
      cosines[i] = cosine;
      sines[i] = job.inverse ? -sine : sine;
    }
    __syncwarp();
    if constexpr (kAccess == Access::vectors) {
      const int octets = job.dim / kOctet;  // of a head
#pragma unroll 4
      for (int i = lane; i < static_cast<int>(heads) * octets; i += 32) {
        const int head = i / octets;
        const int first_pair = (i - head * octets) * (kOctet / 2);
        const std::int64_t column =
            (first_head + head) * job.head_dim + job.offset + 2 * first_pair;
        float x[kOctet];
        load<kAccess, Formats::plain>(job.x, row, column, kOctet, x);
        const float4 c = *reinterpret_cast<const float4*>(cosines + first_pair);
        const float4 s = *reinterpret_cast<const float4*>(sines + first_pair);
        const float cosine[4] = {c.x, c.y, c.z, c.w};
        const float sine[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
        for (int p = 0; p < 4; ++p) {
          const float a = x[2 * p];
          const float b = x[2 * p + 1];
          x[2 * p] = a * cosine[p] - b * sine[p];
          x[2 * p + 1] = a * sine[p] + b * cosine[p];
        }
        store<kAccess, Formats::plain>(job.x, row, column, kOctet, x);
      }
    } else {
      for (int i = lane; i < static_cast<int>(heads) * pairs; i += 32) {
        const int head = i / pairs;
        const int pair = i - head * pairs;
        const std::int64_t column = (first_head + head) * job.head_dim + job.offset + 2 * pair;
        float x[kOctet];
        load<kAccess, Formats::plain>(job.x, row, column, 2, x);
        const float a = x[0];
        const float b = x[1];
        x[0] = a * cosines[pair] - b * sines[pair];
        x[1] = a * sines[pair] + b * cosines[pair];
        store<kAccess, Formats::plain>(job.x, row, column, 2, x);
      }
    }
  }
}

struct HeadJob {
  View from, to;
  std::int64_t rows = 0;
  std::int64_t from_offset = 0, from_stride = 0, to_offset = 0, to_stride = 0;
  std::int64_t width = 0;
  std::uint32_t heads = 1, octets = 0;  ///< octets of a head
};

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) copy_heads(const __grid_constant__ HeadJob job) {
  constexpr int kBatch = 4;
  struct HeadPlace {
    std::int64_t row, head, column;
  };
  const auto place = [&](std::int64_t index) {
    const auto head_index = static_cast<std::uint32_t>(index / job.octets);
    const std::uint32_t row = head_index / job.heads;
    return HeadPlace{row, head_index - row * job.heads, (index % job.octets) * kOctet};
  };
  Raw raw[kBatch];
  stream<kBatch>(
      job.rows * job.heads * job.octets,
      [&](int b, std::int64_t index) {
        const HeadPlace at = place(index);
        raw[b] = load_raw<kAccess, Formats::plain>(
            job.from, at.row, job.from_offset + at.head * job.from_stride + at.column,
            octet_count(job.width, at.column));
      },
      [&](int b, std::int64_t index, bool there) {
        if (!there) return;
        const HeadPlace at = place(index);
        float x[kOctet];
        decode<Formats::plain>(raw[b], job.from.format, x);
        store<kAccess, Formats::plain>(job.to, at.row,
                                       job.to_offset + at.head * job.to_stride + at.column,
                                       octet_count(job.width, at.column), x);
      });
}

/// Where a row's octets divide a warp, its lanes take all of them for several heads at a time, and
/// add up over the lanes in the end; else a thread takes an octet for all heads.
template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) sum_heads(const __grid_constant__ HeadJob job) {
  const std::uint32_t slices = 32 % job.octets == 0 ? 32 / job.octets : 1;
  const std::uint32_t each = job.octets * slices;  // threads of a row
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (std::int64_t index = first_thread(); index - lane < job.rows * each;
       index += all_threads()) {
    const std::int64_t row = index / each;
    const auto rest = static_cast<std::uint32_t>(index - row * each);
    const std::int64_t column = static_cast<std::int64_t>(rest % job.octets) * kOctet;
    const int count = octet_count(job.width, column);
    float sum[kOctet] = {};
    if (row < job.rows) {
#pragma unroll 2
      for (std::int64_t head = rest / job.octets; head < job.heads; head += slices) {
        float x[kOctet];
        load<kAccess, Formats::plain>(job.from, row,
                                      job.from_offset + head * job.from_stride + column, count, x);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sum[j] += x[j];
      }
    }
    if (slices > 1) {
      for (int step = static_cast<int>(job.octets); step < 32; step *= 2) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sum[j] += __shfl_xor_sync(kAllLanes, sum[j], step);
      }
    }
    if (row < job.rows && rest < job.octets) {
      store<kAccess, Formats::plain>(job.to, row, job.to_offset + column, count, sum);
    }
  }
}

bool whole_octets(std::initializer_list<std::int64_t> sizes) {
  return std::all_of(sizes.begin(), sizes.end(), [](std::int64_t s) { return s % kOctet == 0; });
}

}  // namespace

void launch(const Rope& call, const LaunchContext& context) {
  if (call.x.rows == 0 || call.heads == 0 || call.dim == 0) return;
  const RopeJob job{.x = view_of(call.x),
                    .heads = call.heads,
                    .head_dim = call.head_dim,
                    .offset = call.offset,
                    .dim = static_cast<int>(call.dim),
                    .positions = call.positions,
                    .log2_theta = std::log2(call.theta),
                    .inverse = call.inverse,
                    .chunks = (call.heads + kHeadsPerWarp - 1) / kHeadsPerWarp};
  const bool vectors = job.x.vectors && whole_octets({call.dim, call.offset, call.head_dim});
  start(context, "rope", pick(vectors, rope<Access::vectors>, rope<Access::elements>),
        choose_grid(call.x.rows * job.chunks * 32, context.sms, kBlock), kBlock,
        sizeof(float) * kBlock / 32 * static_cast<std::size_t>(call.dim), job);
}

void launch(const HeadCopy& call, const LaunchContext& context) {
  if (call.from.rows == 0 || call.heads == 0 || call.width == 0) return;
  const HeadJob job{.from = view_of(call.from),
                    .to = view_of(call.to),
                    .rows = call.from.rows,
                    .from_offset = call.from_offset,
                    .from_stride = call.from_stride,
                    .to_offset = call.to_offset,
                    .to_stride = call.to_stride,
                    .width = call.width,
                    .heads = static_cast<std::uint32_t>(call.heads),
                    .octets = static_cast<std::uint32_t>((call.width + kOctet - 1) / kOctet)};
  const bool vectors = job.from.vectors && job.to.vectors &&
                       whole_octets({call.width, call.from_offset, call.from_stride, call.to_offset,
                                     call.to_stride});
  if (call.sum_heads) {
    start(context, "sum_heads",
          pick(vectors, sum_heads<Access::vectors>, sum_heads<Access::elements>),
          choose_grid(job.rows * std::max<std::int64_t>(job.octets, 32), context.sms, kBlock),
          kBlock, 0, job);
  } else {
    start(context, "copy_heads",
          pick(vectors, copy_heads<Access::vectors>, copy_heads<Access::elements>),
          choose_grid(job.rows * job.heads * job.octets, context.sms, kBlock), kBlock, 0, job);
  }
}

}  // namespace orrery::kernels::cuda
