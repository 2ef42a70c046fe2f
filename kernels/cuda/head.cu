// Embedding and cross-entropy.

#include <algorithm>

#include "kernels/cuda/device_code.cuh"

namespace orrery::kernels::cuda {
namespace {

// ---------------------------------------------------------------------------------------------
// Embedding.

struct EmbeddingJob {
  View table, out;
  const std::int32_t* tokens = nullptr;
  std::int64_t first_row = 0;
  std::uint32_t tiles = 0;
};

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1) embed(const __grid_constant__ EmbeddingJob job) {
  constexpr int kBatch = 4;
  Raw raw[kBatch];
  stream<kBatch>(
      octets_of(job.out.rows, job.tiles),
      [&](int b, std::int64_t index) {
        const Place at = place_of(index, job.tiles);
        if (at.column >= job.out.columns) return;
        const std::int64_t row = job.tokens[at.row] - job.first_row;
        raw[b] = Raw{};
        if (row < 0 || row >= job.table.rows) return;
        raw[b] = load_raw<kAccess, Formats::plain>(job.table, row, at.column,
                                                   octet_count(job.out.columns, at.column));
      },
      [&](int b, std::int64_t index, bool there) {
        const Place at = place_of(index, job.tiles);
        if (!there || at.column >= job.out.columns) return;
        float x[kOctet];
        decode<Formats::plain>(raw[b], job.table.format, x);
        store<kAccess, Formats::plain>(job.out, at.row, at.column,
                                       octet_count(job.out.columns, at.column), x);
      });
}

// ---------------------------------------------------------------------------------------------
// Its gradient, without atomics and without sorting: the first position of a token adds up all of
// the token's positions. For each position a group of threads looks through the tokens before it;
// if the same is among them, somebody else does it. Else it goes through the tokens behind it in
// order. So it reads n^2 / 2 tokens of 4 bytes out of caches, for a batch of n: 2^25 for 8192
// tokens, little beside n rows of thousands of columns.

constexpr int kGatherThreads = 256;  ///< a group: a position and up to 2048 columns at a time
constexpr int kMatches = 256;        ///< positions found at a time: what 256 threads look at

struct GatherJob {
  View d_out, d_table;
  const std::int32_t* tokens = nullptr;
  std::int64_t first_row = 0, positions = 0;
};

struct GatherMemory {
  std::int32_t matches[kMatches];
  std::int32_t counts[kGatherThreads / 32];
  std::uint32_t masks[kGatherThreads / 32];
};

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1)
    embedding_backward(const __grid_constant__ GatherJob job) {
  constexpr int kGroups = kBlock / kGatherThreads;
  constexpr std::int64_t kColumns = std::int64_t{kGatherThreads} * kOctet;
  __shared__ GatherMemory memory[kGroups];
  const int number = static_cast<int>(threadIdx.x) / kGatherThreads;
  const int thread = static_cast<int>(threadIdx.x) % kGatherThreads;
  const int lane = thread % 32;
  const int warp = thread / 32;
  GatherMemory& mine = memory[number];
  const auto wait = [&] { barrier(1 + number, kGatherThreads); };

  // Where in [begin, end) the token is: bit i is set if it is among the 256 from begin + 256 (32 k
  // + i) on, for any k.
  const auto look = [&](std::int32_t token, std::int64_t begin, std::int64_t end) {
    std::uint32_t mask = 0;
#pragma unroll 4
    for (std::int64_t i = begin + thread; i < end; i += kMatches) {
      if (job.tokens[i] == token) mask |= 1U << ((i - begin) / kMatches % 32);
    }
    mask = __reduce_or_sync(kAllLanes, mask);
    wait();  // the last masks have been read
    if (lane == 0) mine.masks[warp] = mask;
    wait();
    mask = 0;
    for (int w = 0; w < kGatherThreads / 32; ++w) mask |= mine.masks[w];
    return mask;
  };
  // Positions of `token` among 256 tokens from `base` on, in order, into mine.matches; their
  // number.
  const auto find = [&](std::int32_t token, std::int64_t base, std::int64_t end) {
    const bool same = base + thread < end && job.tokens[base + thread] == token;
    const std::uint32_t votes = __ballot_sync(kAllLanes, same);
    wait();  // the last matches have been used
    if (lane == 0) mine.counts[warp] = __popc(votes);
    wait();
    int before = 0;
    int all = 0;
    for (int w = 0; w < kGatherThreads / 32; ++w) {
      if (w == warp) before = all;
      all += mine.counts[w];
    }
    if (same) {
      mine.matches[before + __popc(votes & ((1U << lane) - 1U))] =
          static_cast<std::int32_t>(base + thread);
    }
    wait();
    return all;
  };

  const std::int64_t column_blocks = (job.d_table.columns + kColumns - 1) / kColumns;
  for (std::int64_t unit = std::int64_t{blockIdx.x} * kGroups + number;
       unit < job.positions * column_blocks; unit += std::int64_t{gridDim.x} * kGroups) {
    const std::int64_t position = unit / column_blocks;
    const std::int64_t column = (unit - position * column_blocks) * kColumns + thread * kOctet;
    const std::int32_t token = job.tokens[position];
    const std::int64_t row = token - job.first_row;
    if (row < 0 || row >= job.d_table.rows) continue;
    if (look(token, 0, position) != 0) continue;
    const std::uint32_t later = look(token, position + 1, job.positions);

    const int count = column < job.d_table.columns ? octet_count(job.d_table.columns, column) : 0;
    float sum[kOctet] = {};
    if (count > 0) {
      load<kAccess, Formats::plain>(job.d_table, row, column, count, sum);
      float x[kOctet];
      load<kAccess, Formats::plain>(job.d_out, position, column, count, x);
#pragma unroll
      for (int j = 0; j < kOctet; ++j) sum[j] += x[j];
    }
    for (std::int64_t base = position + 1; base < job.positions && later != 0; base += kMatches) {
      if ((later >> ((base - position - 1) / kMatches % 32) & 1U) == 0) continue;
      const int found = find(token, base, job.positions);
      if (count == 0) continue;
#pragma unroll 2
      for (int i = 0; i < found; ++i) {
        float x[kOctet];
        load<kAccess, Formats::plain>(job.d_out, mine.matches[i], column, count, x);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sum[j] += x[j];
      }
    }
    if (count > 0) store<kAccess, Formats::plain>(job.d_table, row, column, count, sum);
  }
}

// ---------------------------------------------------------------------------------------------
// Cross-entropy.

struct EntropyJob {
  View logits;
  const std::int32_t* targets = nullptr;
  const float* lse = nullptr;
  std::int64_t first_column = 0;
  float scale = 1;
  float* partial = nullptr;
  int threads_per_row = 32;
};

/// One pass over a row. Each thread keeps its largest logit and the sum relative to that.
template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1)
    cross_entropy_partial(const __grid_constant__ EntropyJob job) {
  constexpr int kBatch = 2;
  __shared__ float shared[2 * kBlock / 32];
  Group<float> group(job.threads_per_row, shared);
  const int groups = kBlock / job.threads_per_row;
  const std::int64_t columns = job.logits.columns;
  const std::int64_t step = std::int64_t{job.threads_per_row} * kOctet;
  for (std::int64_t row = std::int64_t{blockIdx.x} * groups + group.number(); row < job.logits.rows;
       row += std::int64_t{gridDim.x} * groups) {
    float largest = -INFINITY;
    float sum = 0;
    for (std::int64_t c = group.thread() * kOctet; c < columns; c += kBatch * step) {
      Raw raw[kBatch];
      int count[kBatch] = {};
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (c + b * step >= columns) continue;
        count[b] = octet_count(columns, c + b * step);
        raw[b] = load_raw<kAccess, Formats::plain>(job.logits, row, c + b * step, count[b]);
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (count[b] == 0) continue;
        float x[kOctet];
        decode<Formats::plain>(raw[b], job.logits.format, x);
        float most = largest;
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          if (j >= count[b]) x[j] = -INFINITY;
          most = fmaxf(most, x[j]);
        }
        if (most > largest) {
          sum *= expf(largest - most);
          largest = most;
        }
#pragma unroll
        for (int j = 0; j < kOctet; ++j) sum += x[j] == -INFINITY ? 0.0F : expf(x[j] - largest);
      }
    }
    const float most = group.largest(largest);
    const float all = group.sum(largest == -INFINITY ? 0.0F : sum * expf(largest - most));
    if (group.thread() == 0) {
      const std::int64_t target = job.targets[row] - job.first_column;
      float x[kOctet] = {};
      if (job.targets[row] >= 0 && target >= 0 && target < columns) {
        load<Access::elements, Formats::plain>(job.logits, row, target, 1, x);
      }
      job.partial[3 * row] = most;
      job.partial[3 * row + 1] = all;
      job.partial[3 * row + 2] = x[0];
    }
  }
}

/// One block; the loss of a thread's rows, then of all threads, in a fixed order.
__global__ void __launch_bounds__(kBlock, 1)
    cross_entropy_loss(const __grid_constant__ CrossEntropyLoss call) {
  __shared__ double sums[kBlock / 32];
  double loss = 0;
  for (std::int64_t row = threadIdx.x; row < call.rows; row += kBlock) {
    float largest = -INFINITY;
    for (std::int64_t p = 0; p < call.parts; ++p) {
      largest = fmaxf(largest, call.partials[(p * call.rows + row) * 3]);
    }
    float sum = 0;
    float target = 0;
    for (std::int64_t p = 0; p < call.parts; ++p) {
      const float* const part = call.partials + (p * call.rows + row) * 3;
      sum += part[1] * expf(part[0] - largest);
      target += part[2];
    }
    const float lse = largest + logf(sum);
    call.lse[row] = lse;
    if (call.targets[row] >= 0) loss += static_cast<double>(lse) - target;
  }
  loss = warp_sum(loss);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = loss;
  __syncthreads();
  if (threadIdx.x < 32) {
    loss = warp_sum(sums[threadIdx.x]);
    if (threadIdx.x == 0) *call.loss += loss;
  }
}

template <Access kAccess>
__global__ void __launch_bounds__(kBlock, 1)
    cross_entropy_backward(const __grid_constant__ EntropyJob job) {
  constexpr int kBatch = 2;
  const std::int64_t columns = job.logits.columns;
  const std::uint32_t tiles = static_cast<std::uint32_t>((columns + kTile - 1) / kTile);
  Raw raw[kBatch];
  stream<kBatch>(
      octets_of(job.logits.rows, tiles),
      [&](int b, std::int64_t index) {
        const Place at = place_of(index, tiles);
        if (at.column >= columns) return;
        raw[b] = load_raw<kAccess, Formats::plain>(job.logits, at.row, at.column,
                                                   octet_count(columns, at.column));
      },
      [&](int b, std::int64_t index, bool there) {
        const Place at = place_of(index, tiles);
        if (!there || at.column >= columns) return;
        const std::int32_t target = job.targets[at.row];
        const float lse = job.lse[at.row];
        float x[kOctet];
        decode<Formats::plain>(raw[b], job.logits.format, x);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
          const bool is_target = job.first_column + at.column + j == target;
          x[j] = target < 0 ? 0.0F : (expf(x[j] - lse) - (is_target ? 1.0F : 0.0F)) * job.scale;
        }
        store<kAccess, Formats::plain>(job.logits, at.row, at.column,
                                       octet_count(columns, at.column), x);
      });
}

}  // namespace

void launch(const Embedding& call, const LaunchContext& context) {
  const EmbeddingJob job{.table = view_of(call.table),
                         .out = view_of(call.out),
                         .tokens = call.tokens,
                         .first_row = call.first_row,
                         .tiles = tiles_of(call.out.columns)};
  const std::int64_t octets = octets_of(call.out.rows, job.tiles);
  if (octets == 0) return;
  const bool vectors = job.table.vectors && job.out.vectors && call.out.columns % kOctet == 0;
  start(context, "embedding", pick(vectors, embed<Access::vectors>, embed<Access::elements>),
        choose_grid(octets, context.sms, kBlock), kBlock, 0, job);
}

void launch(const EmbeddingBackward& call, const LaunchContext& context) {
  if (call.d_out.rows == 0 || call.d_out.columns == 0) return;
  const GatherJob job{.d_out = view_of(call.d_out),
                      .d_table = view_of(call.d_table),
                      .tokens = call.tokens,
                      .first_row = call.first_row,
                      .positions = call.d_out.rows};
  const bool vectors = job.d_out.vectors && job.d_table.vectors && call.d_out.columns % kOctet == 0;
  start(context, "embedding_backward",
        pick(vectors, embedding_backward<Access::vectors>, embedding_backward<Access::elements>),
        choose_grid(call.d_out.rows * kGatherThreads, context.sms, kBlock), kBlock, 0, job);
}

void launch(const CrossEntropyPartial& call, const LaunchContext& context) {
  if (call.logits.rows == 0) return;
  const View logits = view_of(call.logits);
  const bool vectors = logits.vectors && call.logits.columns % kOctet == 0;
  const RowPlan plan = choose_rows(call.logits.rows, call.logits.columns, context.sms, kBlock, 4);
  start(context, "cross_entropy_partial",
        pick(vectors, cross_entropy_partial<Access::vectors>,
             cross_entropy_partial<Access::elements>),
        plan.grid, kBlock, 0,
        {.logits = logits,
         .targets = call.targets,
         .first_column = call.first_column,
         .partial = call.partial,
         .threads_per_row = plan.threads_per_row});
}

void launch(const CrossEntropyLoss& call, const LaunchContext& context) {
  start(context, "cross_entropy_loss", cross_entropy_loss, 1, kBlock, 0, call);
}

void launch(const CrossEntropyBackward& call, const LaunchContext& context) {
  if (call.logits.rows == 0 || call.logits.columns == 0) return;
  const View logits = view_of(call.logits);
  const bool vectors = logits.vectors && call.logits.columns % kOctet == 0;
  start(
      context, "cross_entropy_backward",
      pick(vectors, cross_entropy_backward<Access::vectors>,
           cross_entropy_backward<Access::elements>),
      choose_grid(octets_of(call.logits.rows, tiles_of(call.logits.columns)), context.sms, kBlock),
      kBlock, 0,
      {.logits = logits,
       .targets = call.targets,
       .lse = call.lse,
       .first_column = call.first_column,
       .scale = call.scale});
}

}  // namespace orrery::kernels::cuda
