// Choice of experts, its gradient, and the order of rows by expert.

#include <algorithm>

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

// ---------------------------------------------------------------------------------------------
// A warp a token.

struct RouterJob {
  View logits;
  const float* bias = nullptr;
  bool sigmoid = true, normalise = true, balanced = false;
  float scale = 1;
  int experts = 0, groups = 1, group_limit = 1, top_k = 1;
  float* scores = nullptr;
  std::int32_t* chosen = nullptr;
  float* weights = nullptr;
};

/// Orders like the floats do; never 0 for a number.
__device__ __forceinline__ std::uint32_t key_of(float x) {
  const std::uint32_t bits = __float_as_uint(x);
  return (bits >> 31U) != 0 ? ~bits : bits | 0x80000000U;
}

/// Of all lanes: the largest key, and among equals the smallest index.
struct Best {
  std::uint32_t key, index;
};
__device__ __forceinline__ Best best_of_warp(std::uint32_t key, std::uint32_t index) {
  const std::uint32_t most = __reduce_max_sync(kAllLanes, key);
  return {most, __reduce_min_sync(kAllLanes, key == most ? index : 0xffffffffU)};
}

/// Whether this lane's group is among the best. `keys` of all experts are in shared memory; lane g
/// looks at group g, at 32 + g, ...: bit i of the result is for group 32 i + g.
__device__ __forceinline__ std::uint32_t groups_in(const RouterJob& job, const float* biased,
                                                   int lane) {
  const int size = job.experts / job.groups;
  std::uint32_t in = 0;
  std::uint32_t taken = 0;
  for (int chosen = 0; chosen < job.group_limit; ++chosen) {
    std::uint32_t key = 0;
    std::uint32_t index = 0xffffffffU;
    for (int g = lane, i = 0; g < job.groups; g += 32, ++i) {
      if ((taken >> i & 1U) != 0) continue;
      float best = -INFINITY;
      float second = -INFINITY;
      for (int e = g * size; e < (g + 1) * size; ++e) {
        const float x = biased[e];
        second = fmaxf(second, fminf(best, x));
        best = fmaxf(best, x);
      }
      const std::uint32_t mine = key_of(job.bias != nullptr && size > 1 ? best + second : best);
      if (mine > key) {
        key = mine;
        index = static_cast<std::uint32_t>(g);
      }
    }
    const Best winner = best_of_warp(key, index);
    if (static_cast<int>(winner.index % 32) == lane) {
      taken |= 1U << winner.index / 32;
      in = taken;
    }
  }
  return in;
}

__global__ void __launch_bounds__(kBlock, 1) router(const __grid_constant__ RouterJob job) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  float* const biased = reinterpret_cast<float*>(dynamic_shared()) + warp * job.experts;
  const std::int64_t warps = all_threads() / 32;
  for (std::int64_t token = first_thread() / 32; token < job.logits.rows; token += warps) {
    float* const scores = job.scores + token * job.experts;
    // Scores.
    float largest = -INFINITY;
    for (int e = lane; e < job.experts; e += 32) {
      float x[kOctet];
      load<Access::elements, Formats::plain>(job.logits, token, e, 1, x);
      biased[e] = x[0];
      largest = fmaxf(largest, x[0]);
    }
    float sum = 0;
    if (!job.sigmoid) {
      largest = warp_max(largest);
      for (int e = lane; e < job.experts; e += 32) {
        biased[e] = expf(biased[e] - largest);
        sum += biased[e];
      }
      sum = warp_sum(sum);
    }
    for (int e = lane; e < job.experts; e += 32) {
      const float score = job.sigmoid ? 1.0F / (1.0F + expf(-biased[e])) : biased[e] / sum;
      scores[e] = score;
      biased[e] = score + (job.bias != nullptr ? job.bias[e] : 0.0F);
    }
    __syncwarp();

    // Groups: experts of those that are out get no key.
    if (!job.balanced && job.group_limit < job.groups) {
      const std::uint32_t in = groups_in(job, biased, lane);
      __syncwarp();
      const int size = job.experts / job.groups;
      for (int g = lane, i = 0; g < job.groups; g += 32, ++i) {
        if ((in >> i & 1U) != 0) continue;
        for (int e = g * size; e < (g + 1) * size; ++e) biased[e] = __uint_as_float(0x7fffffffU);
      }
      __syncwarp();
    }

    // Experts, best first. Lane i remembers choice i (and 32 + i, ...: weights are written at once
    // only where all fit).
    float chosen_sum = 0;
    for (int i = 0; i < job.top_k; ++i) {
      std::uint32_t expert = 0;
      if (job.balanced) {
        expert = static_cast<std::uint32_t>((token * job.top_k + i) % job.experts);
      } else {
        std::uint32_t key = 0;
        std::uint32_t index = 0xffffffffU;
        for (int e = lane; e < job.experts; e += 32) {
          const float x = biased[e];
          const std::uint32_t mine = isnan(x) ? 0U : key_of(x);
          if (mine > key) {
            key = mine;
            index = static_cast<std::uint32_t>(e);
          }
        }
        expert = best_of_warp(key, index).index;
        if (expert >= static_cast<std::uint32_t>(job.experts)) expert = 0;  // NaN everywhere
        if (expert % 32 == static_cast<std::uint32_t>(lane)) {
          biased[expert] = __uint_as_float(0x7fffffffU);
        }
      }
      __syncwarp();  // scores of all lanes, and the one struck out, are seen
      const float score = scores[expert];
      chosen_sum += score;
      if (lane == 0) {
        job.chosen[token * job.top_k + i] = static_cast<std::int32_t>(expert);
        job.weights[token * job.top_k + i] = score;
      }
    }
    __syncwarp();
    const float factor = job.normalise ? job.scale / chosen_sum : job.scale;
    for (int i = lane; i < job.top_k; i += 32) job.weights[token * job.top_k + i] *= factor;
    __syncwarp();
  }
}

struct RouterBackwardJob {
  bool sigmoid = true, normalise = true;
  float scale = 1;
  int top_k = 1;
  const float* scores = nullptr;
  const std::int32_t* chosen = nullptr;
  const float* d_weights = nullptr;
  View d_logits;
};

__device__ __forceinline__ void store_one(const View& v, std::int64_t row, std::int64_t column,
                                          float value) {
  const float x[kOctet] = {value};
  store<Access::elements, Formats::plain>(v, row, column, 1, x);
}

/// weight_i = scale s_i / S with S the sum of the chosen if normalised, else 1. With softmax, all
/// experts' logits move: d_logit_e = s_e (d_s_e - sum over the chosen of d_s s).
__global__ void __launch_bounds__(kBlock, 1)
    router_backward(const __grid_constant__ RouterBackwardJob job) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t warps = all_threads() / 32;
  const int experts = static_cast<int>(job.d_logits.columns);
  for (std::int64_t token = first_thread() / 32; token < job.d_logits.rows; token += warps) {
    const float* const scores = job.scores + token * experts;
    const std::int32_t* const chosen = job.chosen + token * job.top_k;
    const float* const d_weights = job.d_weights + token * job.top_k;
    float score_sum = 0;
    float along = 0;  // sum of d_weight s
    for (int i = lane; i < job.top_k; i += 32) {
      const float s = scores[chosen[i]];
      score_sum += s;
      along += d_weights[i] * s;
    }
    score_sum = warp_sum(score_sum);
    along = warp_sum(along);
    const float inverse = job.normalise ? 1.0F / score_sum : 1.0F;
    const float mean = job.normalise ? along * inverse : 0.0F;
    // Sum over the chosen of d_s s, with d_s = scale (d_weight - mean) inverse: nothing if
    // normalised.
    const float softmax_mean = job.sigmoid || job.normalise ? 0.0F : job.scale * along;
    for (int e = lane; e < experts; e += 32) {
      store_one(job.d_logits, token, e, job.sigmoid ? 0.0F : -scores[e] * softmax_mean);
    }
    __syncwarp();
    for (int i = lane; i < job.top_k; i += 32) {
      const float s = scores[chosen[i]];
      const float d_s = job.scale * (d_weights[i] - mean) * inverse;
      store_one(job.d_logits, token, chosen[i],
                job.sigmoid ? d_s * s * (1.0F - s) : s * (d_s - softmax_mean));
    }
  }
}

// ---------------------------------------------------------------------------------------------
// Counting sort. Pairs are cut into chunks; a warp counts the experts of its chunk, one block turns
// counts into the first row of each (chunk, expert), and a warp places the pairs of its chunk in
// order. Nothing depends on which warp is first.

struct MapJob {
  RoutingMap call;
  std::int64_t pairs_per_chunk = 0, chunks = 0;
  std::int32_t* counts = nullptr;  ///< (experts, chunks): counts, then first rows
};

__device__ __forceinline__ std::int64_t pairs_of(const RoutingMap& call) {
  return rows_in_use(call.tokens, call.max_tokens) * call.top_k;
}

/// An expert here, or -1.
__device__ __forceinline__ int expert_at(const RoutingMap& call, std::int64_t pair,
                                         std::int64_t pairs) {
  const std::int32_t expert = pair < pairs ? call.experts[pair] : -1;
  return expert < call.local_experts ? expert : -1;
}

/// Body(pair, expert, rank among the lanes with this expert, their number) for a chunk's pairs, 32
/// at a time.
template <class Body>
__device__ __forceinline__ void each_pair(const MapJob& job, std::int64_t chunk, const Body& body) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t pairs = pairs_of(job.call);
  const std::int64_t end = min((chunk + 1) * job.pairs_per_chunk, pairs);
  for (std::int64_t base = chunk * job.pairs_per_chunk; base < end; base += 32) {
    const int expert = expert_at(job.call, base + lane, end);
    const std::uint32_t same = __match_any_sync(kAllLanes, expert);
    body(base + lane, expert, __popc(same & ((1U << lane) - 1U)), __popc(same));
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kBlock, 1) count_experts(const __grid_constant__ MapJob job) {
  const auto experts = static_cast<int>(job.call.local_experts);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto* const mine = reinterpret_cast<std::int32_t*>(dynamic_shared()) +
                     static_cast<int>(threadIdx.x) / 32 * experts;
  for (std::int64_t chunk = first_thread() / 32; chunk < job.chunks; chunk += all_threads() / 32) {
    for (int e = lane; e < experts; e += 32) mine[e] = 0;
    __syncwarp();
    each_pair(job, chunk, [&](std::int64_t, int expert, int rank, int count) {
      if (expert >= 0 && rank == 0) mine[expert] += count;
    });
    for (int e = lane; e < experts; e += 32) job.counts[e * job.chunks + chunk] = mine[e];
    __syncwarp();
  }
}

/// Inclusive sums over the lanes.
__device__ __forceinline__ std::int32_t warp_scan(std::int32_t x, int lane) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const std::int32_t before = __shfl_up_sync(kAllLanes, x, static_cast<unsigned>(step));
    if (lane >= step) x += before;
  }
  return x;
}

/// One block. A warp an expert.
__global__ void __launch_bounds__(kBlock, 1) lay_out_rows(const __grid_constant__ MapJob job) {
  const RoutingMap& call = job.call;
  const auto experts = static_cast<int>(call.local_experts);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  auto* const totals = reinterpret_cast<std::int32_t*>(dynamic_shared());
  for (int e = warp; e < experts; e += kBlock / 32) {
    std::int32_t total = 0;
    for (std::int64_t base = 0; base < job.chunks; base += 32) {
      std::int32_t* const at = job.counts + e * job.chunks + base + lane;
      const bool there = base + lane < job.chunks;
      const std::int32_t count = there ? *at : 0;
      const std::int32_t sum = warp_scan(count, lane);
      if (there) *at = total + sum - count;
      total += __shfl_sync(kAllLanes, sum, 31);
    }
    if (lane == 0) totals[e] = total;
  }
  __syncthreads();
  if (warp == 0) {
    std::int32_t begin = 0;
    std::int32_t left_out = 0;
    const auto alignment = static_cast<std::int32_t>(call.alignment);
    const auto capacity = static_cast<std::int32_t>(call.capacity);
    for (int base = 0; base < experts; base += 32) {
      const int e = base + lane;
      const std::int32_t total = e < experts ? totals[e] : 0;
      const std::int32_t room = (total + alignment - 1) / alignment * alignment;
      const std::int32_t sum = warp_scan(room, lane);
      const std::int32_t first = begin + sum - room;
      if (e < experts) {
        const std::int32_t fits = max(min(total, capacity - first), 0);
        call.group_begin[e] = min(first, capacity);
        call.group_rows[e] = fits;
        left_out += total - fits;
      }
      begin += __shfl_sync(kAllLanes, sum, 31);
    }
    left_out = static_cast<std::int32_t>(warp_scan(left_out, lane));
    if (lane == 31) {
      call.group_begin[experts] = min(begin, capacity);
      *call.used_rows = min(begin, capacity);
      *call.overflow = left_out;
    }
  }
  __syncthreads();
  for (int e = warp; e < experts; e += kBlock / 32) {  // padding
    for (std::int32_t row = call.group_begin[e] + call.group_rows[e] + lane;
         row < call.group_begin[e + 1]; row += 32) {
      call.row_source[row] = -1;
      call.row_weight[row] = 0;
    }
  }
}

__global__ void __launch_bounds__(kBlock, 1) place_pairs(const __grid_constant__ MapJob job) {
  const RoutingMap& call = job.call;
  const auto experts = static_cast<int>(call.local_experts);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  auto* const next = reinterpret_cast<std::int32_t*>(dynamic_shared()) +
                     static_cast<int>(threadIdx.x) / 32 * experts;
  for (std::int64_t chunk = first_thread() / 32; chunk < job.chunks; chunk += all_threads() / 32) {
    for (int e = lane; e < experts; e += 32) next[e] = job.counts[e * job.chunks + chunk];
    __syncwarp();
    const std::int64_t pairs = pairs_of(call);
    each_pair(job, chunk, [&](std::int64_t pair, int expert, int rank, int count) {
      std::int32_t row = -1;
      if (expert >= 0) {
        const std::int32_t place = next[expert] + rank;
        if (place < call.group_rows[expert]) row = call.group_begin[expert] + place;
      }
      __syncwarp();  // all have read the counter
      if (expert >= 0 && rank == 0) next[expert] += count;
      if (row >= 0) {
        call.row_source[row] = static_cast<std::int32_t>(pair / call.top_k);
        call.row_weight[row] = call.weights == nullptr ? 1.0F : call.weights[pair];
      }
      if (pair < pairs) call.slot_row[pair] = row;
    });
  }
}

}  // namespace

void launch(const Router& call, const LaunchContext& context) {
  if (call.logits.rows == 0) return;
  const RouterJob job{.logits = view_of(call.logits),
                      .bias = call.bias,
                      .sigmoid = call.sigmoid,
                      .normalise = call.normalise,
                      .balanced = call.balanced,
                      .scale = call.scale,
                      .experts = static_cast<int>(call.logits.columns),
                      .groups = static_cast<int>(call.groups),
                      .group_limit = static_cast<int>(call.group_limit),
                      .top_k = static_cast<int>(call.top_k),
                      .scores = call.scores,
                      .chosen = call.experts,
                      .weights = call.weights};
  const int warps = warps_that_fit(call.logits.columns * 4, context.limits.shared_bytes_per_block);
  start(context, "router", router, choose_grid(call.logits.rows, context.sms, warps), warps * 32,
        static_cast<std::size_t>(warps) * static_cast<std::size_t>(job.experts) * 4, job);
}

void launch(const RouterBackward& call, const LaunchContext& context) {
  if (call.d_logits.rows == 0) return;
  const RouterBackwardJob job{.sigmoid = call.sigmoid,
                              .normalise = call.normalise,
                              .scale = call.scale,
                              .top_k = static_cast<int>(call.top_k),
                              .scores = call.scores,
                              .chosen = call.experts,
                              .d_weights = call.d_weights,
                              .d_logits = view_of(call.d_logits)};
  start(context, "router_backward", router_backward,
        choose_grid(call.d_logits.rows * 32, context.sms, kBlock), kBlock, 0, job);
}

void launch(const RoutingMap& call, const LaunchContext& context) {
  const ChunkPlan plan = choose_chunks(call.max_tokens * call.top_k, call.local_experts,
                                       static_cast<std::int64_t>(context.workspace_bytes));
  const MapJob job{
      .call = call,
      .pairs_per_chunk = plan.pairs_per_chunk,
      .chunks = plan.chunks,
      .counts = workspace<std::int32_t>(context, plan.chunks * call.local_experts, "routing_map")};
  const int warps = warps_that_fit(call.local_experts * 4, context.limits.shared_bytes_per_block);
  const auto shared_bytes =
      static_cast<std::size_t>(warps) * static_cast<std::size_t>(call.local_experts) * 4;
  const int grid = choose_grid(plan.chunks, context.sms, warps);
  start(context, "count_experts", count_experts, grid, warps * 32, shared_bytes, job);
  start(context, "lay_out_rows", lay_out_rows, 1, kBlock,
        static_cast<std::size_t>(call.local_experts) * 4, job);
  start(context, "place_pairs", place_pairs, grid, warps * 32, shared_bytes, job);
}

}  // namespace orrery::kernels::cuda
