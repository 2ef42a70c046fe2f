#pragma once
// Attention and its gradients in double, one loop after the other, from their definition. What
// tests of attention kernels compare with.

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "kernels/call.hpp"

namespace orrery::kernels {

/// Operands of one call, rows of exactly heads * d columns, as numbers.
struct AttentionNumbers {
  AttentionShape shape;
  std::vector<double> q, k, v, d_out;
};
struct AttentionResults {
  std::vector<double> out, lse, d_q, d_k, d_v;
};

inline std::int64_t elements(const AttentionShape& s, std::int64_t heads, std::int64_t length,
                             std::int64_t d) {
  return s.batch * length * heads * d;
}

inline AttentionResults attention_by_definition(const AttentionNumbers& n) {
  const AttentionShape& s = n.shape;
  AttentionResults r;
  r.out.assign(static_cast<std::size_t>(elements(s, s.heads, s.q_len, s.d_v)), 0);
  r.lse.assign(static_cast<std::size_t>(s.batch * s.heads * s.q_len), 0);
  r.d_q.assign(n.q.size(), 0);
  r.d_k.assign(n.k.size(), 0);
  r.d_v.assign(n.v.size(), 0);
  const auto at = [](std::int64_t sequence, std::int64_t length, std::int64_t row,
                     std::int64_t heads, std::int64_t head, std::int64_t d) {
    return static_cast<std::size_t>(((sequence * length + row) * heads + head) * d);
  };
  const auto dq = static_cast<std::size_t>(s.d_qk);
  const auto dv = static_cast<std::size_t>(s.d_v);
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t kv = h / (s.heads / s.kv_heads);
      for (std::int64_t i = 0; i < s.q_len; ++i) {
        std::int64_t seen = s.causal ? s.kv_len - s.q_len + i + 1 : s.kv_len;
        if (s.query_positions != nullptr) seen = s.query_positions[i] + 1;
        const std::size_t q = at(b, s.q_len, i, s.heads, h, s.d_qk);
        const std::size_t o = at(b, s.q_len, i, s.heads, h, s.d_v);
        std::vector<double> p(static_cast<std::size_t>(std::max<std::int64_t>(seen, 0)));
        double most = -std::numeric_limits<double>::infinity();
        for (std::size_t j = 0; j < p.size(); ++j) {
          const std::size_t k =
              at(b, s.kv_len, static_cast<std::int64_t>(j), s.kv_heads, kv, s.d_qk);
          double dot = 0;
          for (std::size_t c = 0; c < dq; ++c) dot += n.q[q + c] * n.k[k + c];
          p[j] = dot * static_cast<double>(s.scale);
          most = std::max(most, p[j]);
        }
        double sum = 0;
        for (double& x : p) sum += x = std::exp(x - most);
        for (double& x : p) x /= sum;
        r.lse[static_cast<std::size_t>((b * s.heads + h) * s.q_len + i)] = most + std::log(sum);
        double row_sum = 0;
        for (std::size_t c = 0; c < dv; ++c) {
          for (std::size_t j = 0; j < p.size(); ++j) {
            r.out[o + c] +=
                p[j] *
                n.v[at(b, s.kv_len, static_cast<std::int64_t>(j), s.kv_heads, kv, s.d_v) + c];
          }
          row_sum += n.d_out[o + c] * r.out[o + c];
        }
        for (std::size_t j = 0; j < p.size(); ++j) {
          const std::size_t k =
              at(b, s.kv_len, static_cast<std::int64_t>(j), s.kv_heads, kv, s.d_qk);
          const std::size_t v =
              at(b, s.kv_len, static_cast<std::int64_t>(j), s.kv_heads, kv, s.d_v);
          double d_p = 0;
          for (std::size_t c = 0; c < dv; ++c) {
            d_p += n.d_out[o + c] * n.v[v + c];
            r.d_v[v + c] += p[j] * n.d_out[o + c];
          }
          const double d_s = static_cast<double>(s.scale) * p[j] * (d_p - row_sum);
          for (std::size_t c = 0; c < dq; ++c) {
            r.d_q[q + c] += d_s * n.k[k + c];
            r.d_k[k + c] += d_s * n.q[q + c];
          }
        }
      }
    }
  }
  return r;
}

/// |a - b| / |b|, as vectors; NaN if anything is.
inline double distance(const std::vector<double>& a, const std::vector<double>& b) {
  double difference = 0;
  double norm = 0;
  for (std::size_t i = 0; i < b.size(); ++i) {
    difference += (a[i] - b[i]) * (a[i] - b[i]);
    norm += b[i] * b[i];
  }
  return std::sqrt(difference / norm);
}

}  // namespace orrery::kernels
