#pragma once
// Attention on the CUDA cores, in FP32, of FP32 or BF16 operands: any mask, any length, head
// dimensions up to 256. It is there so that everything runs; 32 rows a block and four threads a row
// are not fast.

#include <cstdint>

#include "kernels/choose_attention.hpp"
#include "kernels/cuda/attention_device.cuh"

namespace orrery::kernels::cuda::attention {

inline constexpr int kSimpleRows = 32;
inline constexpr int kThreadsPerRow = 4;
inline constexpr int kSimpleThreads = kSimpleRows * kThreadsPerRow;
inline constexpr int kScoresPerThread = kSimpleRows / kThreadsPerRow;

/// Rows of batch * length, columns of heads * d.
template <class T>
struct Rows {
  T* data;
  std::int64_t pitch;
};

struct SimpleShape {
  std::int32_t batch, heads, kv_heads, q_len, kv_len, d_qk, d_v;
  float scale;
  bool causal;
  const std::int32_t* positions;  ///< or null

  /// Keys that a query sees: 0 .. this.
  __device__ __forceinline__ int seen(int query) const {
    if (query >= q_len) return 0;
    int keys = kv_len;
    if (positions != nullptr) {
      keys = positions[query] + 1;
    } else if (causal) {
      keys = kv_len - q_len + query + 1;
    }
    return keys < 0 ? 0 : min(keys, kv_len);
  }
};

template <class T>
struct SimpleArguments {
  SimpleShape shape;
  Rows<const T> q, k, v, d_out;
  Rows<T> out, d_q, d_k, d_v;
  float* lse_out;    ///< (batch, heads, q_len), of the forward pass,
  const float* lse;  ///< and of the backward pass
  float* row_sums;   ///< (batch, heads, q_len)
};

__device__ __forceinline__ float number_of(float x) {
  return x;
}
__device__ __forceinline__ float number_of(std::uint16_t code) {
  return __uint_as_float(static_cast<std::uint32_t>(code) << 16U);
}
__device__ __forceinline__ void put(float* to, float x) {
  *to = x;
}
__device__ __forceinline__ void put(std::uint16_t* to, float x) {
  *to = static_cast<std::uint16_t>(pack_bf16x2(x, 0.0F));
}

/// 32 rows from `first` of a head into shared memory as FP32, zero behind the last. `pitch`: of
/// both tiles' rows there, odd, so that four rows lie in four banks.
template <class T>
__device__ __forceinline__ void load_rows(float* to, int pitch, const Rows<T>& from,
                                          std::int64_t base, int first, int length, int column,
                                          int d) {
  for (int i = static_cast<int>(threadIdx.x); i < kSimpleRows * d; i += kSimpleThreads) {
    const int r = i / d;
    const int c = i - r * d;
    to[r * pitch + c] = first + r < length
                            ? number_of(from.data[(base + first + r) * from.pitch + column + c])
                            : 0.0F;
  }
}
__device__ __forceinline__ float dot(const float* a, const float* b, int d) {
  float sum = 0;
  for (int c = 0; c < d; ++c) sum += a[c] * b[c];
  return sum;
}
__device__ __forceinline__ float sum_of_row(float x) {
  x += from_lane_xor(x, 1);
  return x + from_lane_xor(x, 2);
}
__device__ __forceinline__ float largest_of_row(float x) {
  x = fmaxf(x, from_lane_xor(x, 1));
  return fmaxf(x, from_lane_xor(x, 2));
}

ORRERY_HOST_DEVICE inline int odd_pitch(int d) {
  return d + 1 - d % 2;
}
/// Bytes of shared memory: four tiles of rows and two of scores.
inline int simple_shared_bytes(std::int64_t d_qk, std::int64_t d_v) {
  const int pitches = 2 * odd_pitch(static_cast<int>(d_qk)) + 2 * odd_pitch(static_cast<int>(d_v));
  return 4 * (kSimpleRows * pitches + 2 * kSimpleRows * (kSimpleRows + 1));
}

struct SimpleMemory {
  int pitch_qk, pitch_v;
  float *rows_qk, *rows_v;      ///< of the block: queries (and dO), or keys and values
  float *others_qk, *others_v;  ///< that it walks over
  float *scores, *gradients;    ///< (row, other)
  static constexpr int kPitch = kSimpleRows + 1;

  __device__ __forceinline__ explicit SimpleMemory(const SimpleShape& s) {
    pitch_qk = odd_pitch(s.d_qk);
    pitch_v = odd_pitch(s.d_v);
    rows_qk = reinterpret_cast<float*>(dynamic_shared());
    rows_v = rows_qk + kSimpleRows * pitch_qk;
    others_qk = rows_v + kSimpleRows * pitch_v;
    others_v = others_qk + kSimpleRows * pitch_qk;
    scores = others_v + kSimpleRows * pitch_v;
    gradients = scores + kSimpleRows * kPitch;
  }
};

/// columns[i] of a thread are 4 i + its place in the row.
template <int kColumns>
__device__ __forceinline__ void add_products(float (&columns)[kColumns], const float* weights,
                                             const float* rows, int pitch, int place, int d) {
  for (int j = 0; j < kSimpleRows; ++j) {
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int c = kThreadsPerRow * i + place;
      if (c < d) columns[i] += weights[j] * rows[j * pitch + c];
    }
  }
}
template <int kColumns, class T>
__device__ __forceinline__ void put_columns(const float (&columns)[kColumns], float factor,
                                            const Rows<T>& to, std::int64_t row, int column,
                                            int place, int d) {
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int c = kThreadsPerRow * i + place;
    if (c < d) put(to.data + row * to.pitch + column + c, columns[i] * factor);
  }
}

/// The most keys that a query of rows [first, first + 32) sees.
__device__ __forceinline__ int most_seen(const SimpleShape& shape, int first) {
  int most = 0;
  for (int r = 0; r < kSimpleRows; ++r) most = max(most, shape.seen(first + r));
  return most;
}

template <class T, int kColumns>
__global__ void __launch_bounds__(kSimpleThreads)
    simple_forward_kernel(const SimpleArguments<T> arguments) {
  const SimpleShape& s = arguments.shape;
  const SimpleMemory m(s);
  const int r = static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int place = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  const int tiles = (s.q_len + kSimpleRows - 1) / kSimpleRows;
  const std::int64_t items = static_cast<std::int64_t>(tiles) * s.batch * s.heads;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t all_heads = item / tiles;
    const int first = static_cast<int>(item - all_heads * tiles) * kSimpleRows;
    const std::int64_t sequence = all_heads / s.heads;
    const int head = static_cast<int>(all_heads - sequence * s.heads);
    const int kv_head = head / (s.heads / s.kv_heads);
    const int seen = s.seen(first + r);
    const int keys = most_seen(s, first);
    float out[kColumns];
#pragma unroll
    for (float& x : out) x = 0;
    float largest = -__builtin_inff();
    float sum = 0;
    __syncthreads();
    load_rows(m.rows_qk, m.pitch_qk, arguments.q, sequence * s.q_len, first, s.q_len, head * s.d_qk,
              s.d_qk);
    for (int key = 0; key < keys; key += kSimpleRows) {
      __syncthreads();
      load_rows(m.others_qk, m.pitch_qk, arguments.k, sequence * s.kv_len, key, s.kv_len,
                kv_head * s.d_qk, s.d_qk);
      load_rows(m.others_v, m.pitch_v, arguments.v, sequence * s.kv_len, key, s.kv_len,
                kv_head * s.d_v, s.d_v);
      __syncthreads();
      float scores[kScoresPerThread];
      float most = largest;
#pragma unroll
      for (int i = 0; i < kScoresPerThread; ++i) {
        const int j = kThreadsPerRow * i + place;
        scores[i] = key + j < seen ? s.scale * dot(m.rows_qk + r * m.pitch_qk,
                                                   m.others_qk + j * m.pitch_qk, s.d_qk)
                                   : -__builtin_inff();
        most = fmaxf(most, scores[i]);
      }
      most = largest_of_row(most);
      const float base = most == -__builtin_inff() ? 0.0F : most;
      const float shrink = exp_of(largest - base);
      largest = most;
      float total = 0;
#pragma unroll
      for (int i = 0; i < kScoresPerThread; ++i) {
        const float x = exp_of(scores[i] - base);
        total += x;
        m.scores[r * SimpleMemory::kPitch + kThreadsPerRow * i + place] = x;
      }
      sum = sum * shrink + sum_of_row(total);
#pragma unroll
      for (float& x : out) x *= shrink;
      __syncthreads();
      add_products(out, m.scores + r * SimpleMemory::kPitch, m.others_v, m.pitch_v, place, s.d_v);
    }
    if (first + r < s.q_len) {
      put_columns(out, sum > 0 ? 1 / sum : 0.0F, arguments.out, sequence * s.q_len + first + r,
                  head * s.d_v, place, s.d_v);
      if (place == 0) {
        arguments.lse_out[all_heads * s.q_len + first + r] = largest + log_of(sum);
      }
    }
  }
}

/// dQ, and the row sums of dO * O that simple_keys_kernel reads.
template <class T, int kColumns>
__global__ void __launch_bounds__(kSimpleThreads)
    simple_queries_kernel(const SimpleArguments<T> arguments) {
  const SimpleShape& s = arguments.shape;
  const SimpleMemory m(s);
  const int r = static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int place = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  const int tiles = (s.q_len + kSimpleRows - 1) / kSimpleRows;
  const std::int64_t items = static_cast<std::int64_t>(tiles) * s.batch * s.heads;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t all_heads = item / tiles;
    const int first = static_cast<int>(item - all_heads * tiles) * kSimpleRows;
    const std::int64_t sequence = all_heads / s.heads;
    const int head = static_cast<int>(all_heads - sequence * s.heads);
    const int kv_head = head / (s.heads / s.kv_heads);
    const int query = first + r;
    const bool there = query < s.q_len;
    const int seen = s.seen(query);
    const int keys = most_seen(s, first);
    __syncthreads();
    load_rows(m.rows_qk, m.pitch_qk, arguments.q, sequence * s.q_len, first, s.q_len, head * s.d_qk,
              s.d_qk);
    load_rows(m.rows_v, m.pitch_v, arguments.d_out, sequence * s.q_len, first, s.q_len,
              head * s.d_v, s.d_v);
    __syncthreads();
    float row_sum = 0;
    if (there) {
      const T* const out =
          arguments.out.data + (sequence * s.q_len + query) * arguments.out.pitch + head * s.d_v;
      for (int c = place; c < s.d_v; c += kThreadsPerRow) {
        row_sum += number_of(out[c]) * m.rows_v[r * m.pitch_v + c];
      }
    }
    row_sum = sum_of_row(row_sum);
    const float lse = there ? arguments.lse[all_heads * s.q_len + query] : 0.0F;
    if (there && place == 0) arguments.row_sums[all_heads * s.q_len + query] = row_sum;

    float d_q[kColumns];
#pragma unroll
    for (float& x : d_q) x = 0;
    for (int key = 0; key < keys; key += kSimpleRows) {
      __syncthreads();
      load_rows(m.others_qk, m.pitch_qk, arguments.k, sequence * s.kv_len, key, s.kv_len,
                kv_head * s.d_qk, s.d_qk);
      load_rows(m.others_v, m.pitch_v, arguments.v, sequence * s.kv_len, key, s.kv_len,
                kv_head * s.d_v, s.d_v);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kScoresPerThread; ++i) {
        const int j = kThreadsPerRow * i + place;
        float gradient = 0;
        if (key + j < seen) {
          const float score =
              s.scale * dot(m.rows_qk + r * m.pitch_qk, m.others_qk + j * m.pitch_qk, s.d_qk);
          gradient = exp_of(score - lse) *
                     (dot(m.rows_v + r * m.pitch_v, m.others_v + j * m.pitch_v, s.d_v) - row_sum);
        }
        m.gradients[r * SimpleMemory::kPitch + j] = gradient;
      }
      __syncthreads();
      add_products(d_q, m.gradients + r * SimpleMemory::kPitch, m.others_qk, m.pitch_qk, place,
                   s.d_qk);
    }
    if (there) {
      put_columns(d_q, s.scale, arguments.d_q, sequence * s.q_len + query, head * s.d_qk, place,
                  s.d_qk);
    }
  }
}

/// dK and dV of 32 keys, over all query heads that read them.
template <class T, int kColumns>
__global__ void __launch_bounds__(kSimpleThreads)
    simple_keys_kernel(const SimpleArguments<T> arguments) {
  const SimpleShape& s = arguments.shape;
  const SimpleMemory m(s);
  const int r = static_cast<int>(threadIdx.x) / kThreadsPerRow;
  const int place = static_cast<int>(threadIdx.x) % kThreadsPerRow;
  const int tiles = (s.kv_len + kSimpleRows - 1) / kSimpleRows;
  const int group = s.heads / s.kv_heads;
  const std::int64_t items = static_cast<std::int64_t>(tiles) * s.batch * s.kv_heads;
  for (std::int64_t item = blockIdx.x; item < items; item += gridDim.x) {
    const std::int64_t all_heads = item / tiles;
    const int first = static_cast<int>(item - all_heads * tiles) * kSimpleRows;
    const std::int64_t sequence = all_heads / s.kv_heads;
    const int kv_head = static_cast<int>(all_heads - sequence * s.kv_heads);
    const int key = first + r;
    float d_k[kColumns];
    float d_v[kColumns];
#pragma unroll
    for (int i = 0; i < kColumns; ++i) d_k[i] = d_v[i] = 0;
    __syncthreads();
    load_rows(m.rows_qk, m.pitch_qk, arguments.k, sequence * s.kv_len, first, s.kv_len,
              kv_head * s.d_qk, s.d_qk);
    load_rows(m.rows_v, m.pitch_v, arguments.v, sequence * s.kv_len, first, s.kv_len,
              kv_head * s.d_v, s.d_v);
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const std::int64_t numbers = (sequence * s.heads + head) * s.q_len;
      for (int query = 0; query < s.q_len; query += kSimpleRows) {
        if (most_seen(s, query) <= first) continue;
        __syncthreads();
        load_rows(m.others_qk, m.pitch_qk, arguments.q, sequence * s.q_len, query, s.q_len,
                  head * s.d_qk, s.d_qk);
        load_rows(m.others_v, m.pitch_v, arguments.d_out, sequence * s.q_len, query, s.q_len,
                  head * s.d_v, s.d_v);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kScoresPerThread; ++i) {
          const int j = kThreadsPerRow * i + place;
          float probability = 0;
          float gradient = 0;
          if (key < s.seen(query + j)) {
            const float score =
                s.scale * dot(m.rows_qk + r * m.pitch_qk, m.others_qk + j * m.pitch_qk, s.d_qk);
            probability = exp_of(score - arguments.lse[numbers + query + j]);
            gradient =
                probability * (dot(m.rows_v + r * m.pitch_v, m.others_v + j * m.pitch_v, s.d_v) -
                               arguments.row_sums[numbers + query + j]);
          }
          m.scores[r * SimpleMemory::kPitch + j] = probability;
          m.gradients[r * SimpleMemory::kPitch + j] = gradient;
        }
        __syncthreads();
        add_products(d_k, m.gradients + r * SimpleMemory::kPitch, m.others_qk, m.pitch_qk, place,
                     s.d_qk);
        add_products(d_v, m.scores + r * SimpleMemory::kPitch, m.others_v, m.pitch_v, place, s.d_v);
      }
    }
    if (key < s.kv_len) {
      const std::int64_t row = sequence * s.kv_len + key;
      put_columns(d_k, s.scale, arguments.d_k, row, kv_head * s.d_qk, place, s.d_qk);
      put_columns(d_v, 1.0F, arguments.d_v, row, kv_head * s.d_v, place, s.d_v);
    }
  }
}

// ---------------------------------------------------------------------------------------------
// What a launch passes, from the call.

inline SimpleShape simple_shape_of(const AttentionShape& s) {
  const auto narrow = [](std::int64_t x) { return static_cast<std::int32_t>(x); };
  return {narrow(s.batch),  narrow(s.heads),  narrow(s.kv_heads), narrow(s.q_len),
          narrow(s.kv_len), narrow(s.d_qk),   narrow(s.d_v),      s.scale,
          s.causal,         s.query_positions};
}
template <class T>
Rows<T> rows_of(const Matrix& matrix) {
  return {static_cast<T*>(matrix.data), matrix.pitch};
}
template <class T>
SimpleArguments<T> simple_arguments(const AttentionForward& call) {
  SimpleArguments<T> a{};
  a.shape = simple_shape_of(call.shape);
  a.q = rows_of<const T>(call.q);
  a.k = rows_of<const T>(call.k);
  a.v = rows_of<const T>(call.v);
  a.out = rows_of<T>(call.out);
  a.lse_out = call.lse;
  return a;
}
template <class T>
SimpleArguments<T> simple_arguments(const AttentionBackward& call) {
  SimpleArguments<T> a{};
  a.shape = simple_shape_of(call.shape);
  a.q = rows_of<const T>(call.q);
  a.k = rows_of<const T>(call.k);
  a.v = rows_of<const T>(call.v);
  a.out = rows_of<T>(call.out);
  a.d_out = rows_of<const T>(call.d_out);
  a.d_q = rows_of<T>(call.d_q);
  a.d_k = rows_of<T>(call.d_k);
  a.d_v = rows_of<T>(call.d_v);
  a.lse = call.lse;
  a.row_sums = static_cast<float*>(call.workspace);
  return a;
}

}  // namespace orrery::kernels::cuda::attention
