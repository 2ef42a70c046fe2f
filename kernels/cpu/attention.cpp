// Attention in blocks of queries and keys, without the matrix of all scores (Dao et al., arXiv
// 2205.14135), with products of FP32. Blocks that the mask leaves nothing of are skipped.

#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/sgemm.hpp"

namespace orrery::kernels::cpu {
namespace {

constexpr std::int64_t kQueries = 256;  // of a block
constexpr std::int64_t kKeys = 256;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

/// Keys that query i of a sequence sees.
std::int64_t keys_of(const AttentionShape& s, std::int64_t i) {
  std::int64_t keys = s.kv_len;
  if (s.query_positions != nullptr) {
    keys = s.query_positions[i] + std::int64_t{1};
  } else if (s.causal) {
    keys = s.kv_len - s.q_len + i + 1;
  }
  return std::clamp<std::int64_t>(keys, 0, s.kv_len);
}

/// Queries [begin, begin + count) of a sequence and the keys that any of them sees.
struct Queries {
  std::int64_t begin, count, keys;
};
Queries queries_from(const AttentionShape& s, std::int64_t begin) {
  Queries q{begin, std::min(kQueries, s.q_len - begin), 0};
  for (std::int64_t i = begin; i < begin + q.count; ++i) q.keys = std::max(q.keys, keys_of(s, i));
  return q;
}

/// Of one sequence and head.
struct Head {
  std::int64_t batch, head, kv_head;
};

/// A block's part of q, k, ... as FP32.
Panel block_of(const Matrix& m, std::int64_t row, std::int64_t head, std::int64_t rows,
               std::int64_t width, float* buffer) {
  return panel_of(m, row, head * width, rows, width, buffer);
}

void forward(const AttentionForward& c, const Head& h, std::int64_t first_query) {
  const AttentionShape& s = c.shape;
  const Queries queries = queries_from(s, first_query);
  const std::int64_t query_row = h.batch * s.q_len + queries.begin;
  float* const q_buffer =
      scratch(kQueries * (s.d_qk + s.d_v + kKeys + 2) + kKeys * std::max(s.d_qk, s.d_v));
  float* const out = q_buffer + kQueries * s.d_qk;
  float* const scores = out + kQueries * s.d_v;
  float* const largest = scores + kQueries * kKeys;
  float* const sums = largest + kQueries;
  float* const kv_buffer = sums + kQueries;  // of keys, then of values

  std::fill_n(largest, queries.count, kMinusInfinity);
  std::fill_n(sums, queries.count, 0.0F);
  std::fill_n(out, queries.count * s.d_v, 0.0F);
  const Panel q = block_of(c.q, query_row, h.head, queries.count, s.d_qk, q_buffer);
  for (std::int64_t key = 0; key < queries.keys; key += kKeys) {
    const std::int64_t keys = std::min(kKeys, queries.keys - key);
    const std::int64_t key_row = h.batch * s.kv_len + key;
    const Panel k = block_of(c.k, key_row, h.kv_head, keys, s.d_qk, kv_buffer);
    sgemm(false, true, queries.count, keys, s.d_qk, s.scale, q, k, 0, scores, keys);
    for (std::int64_t i = 0; i < queries.count; ++i) {
      float* const row = scores + i * keys;
      const std::int64_t seen =
          std::clamp<std::int64_t>(keys_of(s, queries.begin + i) - key, 0, keys);
      std::fill(row + seen, row + keys, 0.0F);  // weights of what is masked
      if (seen == 0) continue;
      const float now = std::max(largest[i], largest_of(row, seen));
      const float shrink = std::exp(largest[i] - now);  // 0 the first time
      sums[i] = sums[i] * shrink + exp_minus(row, seen, now);
      if (shrink != 1) {
        for (std::int64_t x = 0; x < s.d_v; ++x) out[i * s.d_v + x] *= shrink;
      }
      largest[i] = now;
    }
    const Panel v = block_of(c.v, key_row, h.kv_head, keys, s.d_v, kv_buffer);
    sgemm(false, false, queries.count, s.d_v, keys, 1, {scores, keys}, v, 1, out, s.d_v);
  }
  float* const lse = c.lse + (h.batch * s.heads + h.head) * s.q_len + queries.begin;
  for (std::int64_t i = 0; i < queries.count; ++i) {
    lse[i] = largest[i] + std::log(sums[i]);  // minus infinity without any key
    const float share = sums[i] > 0 ? 1 / sums[i] : 0;
    for (std::int64_t x = 0; x < s.d_v; ++x) out[i * s.d_v + x] *= share;
  }
  store_panel(c.out, query_row, h.head * s.d_v, queries.count, s.d_v, {out, s.d_v});
}

/// Memory of the backward of one key-value head.
struct BackwardScratch {
  explicit BackwardScratch(const AttentionShape& s) {
    float* next = scratch(kQueries * (s.d_qk + s.d_v + 2 * kKeys) + 2 * kKeys * (s.d_qk + s.d_v));
    const auto take = [&](std::int64_t floats) {
      float* const taken = next;
      next += floats;
      return taken;
    };
    q = take(kQueries * s.d_qk);
    d_out = take(kQueries * s.d_v);
    weights = take(kQueries * kKeys);
    d_scores = take(kQueries * kKeys);
    k = take(kKeys * s.d_qk);
    v = take(kKeys * s.d_v);
    d_k = take(kKeys * s.d_qk);
    d_v = take(kKeys * s.d_v);
  }
  float *q, *d_out, *weights, *d_scores, *k, *v, *d_k, *d_v;
};

/// What the calls' workspace holds.
struct Workspace {
  Workspace(const AttentionBackward& c, const AttentionShape& s)
      : row_sums(static_cast<float*>(c.workspace)),
        d_q(row_sums + s.batch * s.heads * s.q_len),
        d_q_pitch(s.heads * s.d_qk) {}
  float* row_sums;  ///< of d_out * out, like lse
  float* d_q;       ///< sums over blocks of keys, like d_q
  std::int64_t d_q_pitch;
};

/// Row sums of d_out * out, and zero in the workspace's d_q.
void prepare(const AttentionBackward& c, const Workspace& workspace, const Head& h,
             const BackwardScratch& memory) {
  const AttentionShape& s = c.shape;
  for (std::int64_t begin = 0; begin < s.q_len; begin += kQueries) {
    const std::int64_t count = std::min(kQueries, s.q_len - begin);
    const std::int64_t row = h.batch * s.q_len + begin;
    // One row at a time: out's part needs no buffer of its own.
    for (std::int64_t i = 0; i < count; ++i) {
      const Panel out = block_of(c.out, row + i, h.head, 1, s.d_v, memory.d_out);
      const Panel d_out = block_of(c.d_out, row + i, h.head, 1, s.d_v, memory.v);
      float sum = 0;
      for (std::int64_t x = 0; x < s.d_v; ++x) sum += out.data[x] * d_out.data[x];
      workspace.row_sums[(h.batch * s.heads + h.head) * s.q_len + begin + i] = sum;
      std::fill_n(workspace.d_q + (row + i) * workspace.d_q_pitch + h.head * s.d_qk, s.d_qk, 0.0F);
    }
  }
}

/// One block of queries of one head against the block of keys that `k` and `v` hold: adds to
/// memory.d_k and memory.d_v, and to the workspace's d_q.
void backward_block(const AttentionBackward& c, const Workspace& workspace, const Head& h,
                    const Queries& queries, std::int64_t key, std::int64_t keys, const Panel& k,
                    const Panel& v, const BackwardScratch& memory) {
  const AttentionShape& s = c.shape;
  const std::int64_t row = h.batch * s.q_len + queries.begin;
  const Panel q = block_of(c.q, row, h.head, queries.count, s.d_qk, memory.q);
  const Panel d_out = block_of(c.d_out, row, h.head, queries.count, s.d_v, memory.d_out);
  const Panel weights{memory.weights, keys};
  const Panel d_scores{memory.d_scores, keys};
  sgemm(false, true, queries.count, keys, s.d_qk, s.scale, q, k, 0, memory.weights, keys);
  sgemm(false, true, queries.count, keys, s.d_v, 1, d_out, v, 0, memory.d_scores, keys);
  const std::int64_t first = (h.batch * s.heads + h.head) * s.q_len + queries.begin;
  for (std::int64_t i = 0; i < queries.count; ++i) {
    float* const p = memory.weights + i * keys;
    float* const d = memory.d_scores + i * keys;
    const std::int64_t seen =
        std::clamp<std::int64_t>(keys_of(s, queries.begin + i) - key, 0, keys);
    if (seen > 0) exp_minus(p, seen, c.lse[first + i]);
    const float row_sum = workspace.row_sums[first + i];
    for (std::int64_t j = 0; j < seen; ++j) d[j] = p[j] * (d[j] - row_sum) * s.scale;
    std::fill(p + seen, p + keys, 0.0F);
    std::fill(d + seen, d + keys, 0.0F);
  }
  sgemm(true, false, keys, s.d_v, queries.count, 1, weights, d_out, 1, memory.d_v, s.d_v);
  sgemm(true, false, keys, s.d_qk, queries.count, 1, d_scores, q, 1, memory.d_k, s.d_qk);
  sgemm(false, false, queries.count, s.d_qk, keys, 1, d_scores, k, 1,
        workspace.d_q + row * workspace.d_q_pitch + h.head * s.d_qk, workspace.d_q_pitch);
}

/// All of one key-value head of one sequence, with the query heads that read it.
void backward(const AttentionBackward& c, std::int64_t batch, std::int64_t kv_head) {
  const AttentionShape& s = c.shape;
  const Workspace workspace(c, s);
  const BackwardScratch memory(s);
  const std::int64_t shared = s.heads / s.kv_heads;
  const auto for_each_head = [&](const auto& work) {
    for (std::int64_t h = kv_head * shared; h < (kv_head + 1) * shared; ++h) {
      work(Head{batch, h, kv_head});
    }
  };
  for_each_head([&](const Head& h) { prepare(c, workspace, h, memory); });
  for (std::int64_t key = 0; key < s.kv_len; key += kKeys) {
    const std::int64_t keys = std::min(kKeys, s.kv_len - key);
    const std::int64_t key_row = batch * s.kv_len + key;
    const Panel k = block_of(c.k, key_row, kv_head, keys, s.d_qk, memory.k);
    const Panel v = block_of(c.v, key_row, kv_head, keys, s.d_v, memory.v);
    std::fill_n(memory.d_k, keys * s.d_qk, 0.0F);
    std::fill_n(memory.d_v, keys * s.d_v, 0.0F);
    for_each_head([&](const Head& h) {
      for (std::int64_t begin = 0; begin < s.q_len; begin += kQueries) {
        const Queries queries = queries_from(s, begin);
        if (queries.keys <= key) continue;
        backward_block(c, workspace, h, queries, key, std::min(keys, queries.keys - key), k, v,
                       memory);
      }
    });
    store_panel(c.d_k, key_row, kv_head * s.d_qk, keys, s.d_qk, {memory.d_k, s.d_qk});
    store_panel(c.d_v, key_row, kv_head * s.d_v, keys, s.d_v, {memory.d_v, s.d_v});
  }
  for_each_head([&](const Head& h) {
    const std::int64_t row = batch * s.q_len;
    store_panel(c.d_q, row, h.head * s.d_qk, s.q_len, s.d_qk,
                {workspace.d_q + row * workspace.d_q_pitch + h.head * s.d_qk, workspace.d_q_pitch});
  });
}

}  // namespace

void run(const AttentionForward& call) {
  const AttentionShape& s = call.shape;
  const std::int64_t blocks = (s.q_len + kQueries - 1) / kQueries;
  tbb::parallel_for(std::int64_t{0}, s.batch * s.heads * blocks, [&](std::int64_t task) {
    // Blocks with the most keys first.
    const std::int64_t block = blocks - 1 - task / (s.batch * s.heads);
    const std::int64_t head = task % s.heads;
    forward(call, {task / s.heads % s.batch, head, head / (s.heads / s.kv_heads)},
            block * kQueries);
  });
}

void run(const AttentionBackward& call) {
  const AttentionShape& s = call.shape;
  tbb::parallel_for(std::int64_t{0}, s.batch * s.kv_heads, [&](std::int64_t task) {
    backward(call, task / s.kv_heads, task % s.kv_heads);
  });
}

}  // namespace orrery::kernels::cpu
