#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {
namespace {

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

/// One query of one head, with where its operands are.
struct Query {
  std::int64_t row, key_row;  ///< of q and out; of its sequence's first key
  std::int64_t head, kv_head;
  std::int64_t keys;
  std::int64_t index;  ///< into lse
};

template <class Work>
void for_each_query(const AttentionShape& s, Work work) {
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      for (std::int64_t i = 0; i < s.q_len; ++i) {
        work(Query{.row = b * s.q_len + i,
                   .key_row = b * s.kv_len,
                   .head = h,
                   .kv_head = h / (s.heads / s.kv_heads),
                   .keys = keys_of(s, i),
                   .index = (b * s.heads + h) * s.q_len + i});
      }
    }
  }
}

double dot(const Matrix& a, std::int64_t a_row, std::int64_t a_column, const Matrix& b,
           std::int64_t b_row, std::int64_t b_column, std::int64_t width) {
  double sum = 0;
  for (std::int64_t c = 0; c < width; ++c) {
    sum += element(a, a_row, a_column + c) * element(b, b_row, b_column + c);
  }
  return sum;
}

std::vector<double> scores_of(const AttentionShape& s, const Matrix& q, const Matrix& k,
                              const Query& at) {
  std::vector<double> scores(static_cast<std::size_t>(at.keys));
  for (std::int64_t j = 0; j < at.keys; ++j) {
    scores[static_cast<std::size_t>(j)] =
        double{s.scale} *
        dot(q, at.row, at.head * s.d_qk, k, at.key_row + j, at.kv_head * s.d_qk, s.d_qk);
  }
  return scores;
}

/// Sums of a gradient in double until all is added.
struct Sums {
  const Matrix& to;
  std::vector<double> values = std::vector<double>(static_cast<std::size_t>(to.rows * to.columns));
  double& at(std::int64_t row, std::int64_t column) {
    return values[static_cast<std::size_t>(row * to.columns + column)];
  }
  void store() {
    for (std::int64_t r = 0; r < to.rows; ++r) {
      for (std::int64_t c = 0; c < to.columns; ++c) set_code(to, r, c, at(r, c));
    }
  }
};

}  // namespace

void run(const AttentionForward& call) {
  const AttentionShape& s = call.shape;
  for_each_query(s, [&](const Query& at) {
    std::vector<double> weights = scores_of(s, call.q, call.k, at);
    double largest = -std::numeric_limits<double>::infinity();
    for (const double score : weights) largest = std::max(largest, score);
    double sum = 0;
    for (double& w : weights) sum += w = std::exp(w - largest);
    // Without any key: minus infinity, and an output of 0.
    call.lse[at.index] = static_cast<float>(largest + std::log(sum));
    for (std::int64_t c = 0; c < s.d_v; ++c) {
      double out = 0;
      for (std::int64_t j = 0; j < at.keys; ++j) {
        out += weights[static_cast<std::size_t>(j)] / sum *
               element(call.v, at.key_row + j, at.kv_head * s.d_v + c);
      }
      set_code(call.out, at.row, at.head * s.d_v + c, out);
    }
  });
}

// With P the weights and D = d_out V^T: dS = P * (D - rowsum(d_out * out)), d_q = scale dS K,
// d_k = scale dS^T Q, d_v = P^T d_out (Dao et al., arXiv 2205.14135, appendix B.2).
void run(const AttentionBackward& call) {
  const AttentionShape& s = call.shape;
  Sums d_q{call.d_q};
  Sums d_k{call.d_k};
  Sums d_v{call.d_v};
  for_each_query(s, [&](const Query& at) {
    const double row_sum =
        dot(call.d_out, at.row, at.head * s.d_v, call.out, at.row, at.head * s.d_v, s.d_v);
    const std::vector<double> scores = scores_of(s, call.q, call.k, at);
    for (std::int64_t j = 0; j < at.keys; ++j) {
      const double p = std::exp(scores[static_cast<std::size_t>(j)] - double{call.lse[at.index]});
      const std::int64_t key = at.key_row + j;
      const double d_p =
          dot(call.d_out, at.row, at.head * s.d_v, call.v, key, at.kv_head * s.d_v, s.d_v);
      const double d_s = p * (d_p - row_sum) * double{s.scale};
      for (std::int64_t c = 0; c < s.d_qk; ++c) {
        d_q.at(at.row, at.head * s.d_qk + c) += d_s * element(call.k, key, at.kv_head * s.d_qk + c);
        d_k.at(key, at.kv_head * s.d_qk + c) += d_s * element(call.q, at.row, at.head * s.d_qk + c);
      }
      for (std::int64_t c = 0; c < s.d_v; ++c) {
        d_v.at(key, at.kv_head * s.d_v + c) += p * element(call.d_out, at.row, at.head * s.d_v + c);
      }
    }
  });
  d_q.store();
  d_k.store();
  d_v.store();
}

}  // namespace orrery::kernels::reference
