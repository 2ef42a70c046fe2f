#include "tests/calibrate/reference_model.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#include "sim/check.hpp"

namespace orrery::reference {
namespace {

std::size_t size(std::int64_t n) {
  return static_cast<std::size_t>(n);
}

/// Rows are tokens.
struct Matrix {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(std::int64_t r, std::int64_t c) : rows(r), columns(c), values(size(r * c)) {}

  double* row(std::int64_t r) { return values.data() + r * columns; }
  const double* row(std::int64_t r) const { return values.data() + r * columns; }

  Matrix& operator+=(const Matrix& other) {
    ORRERY_CHECK(rows == other.rows && columns == other.columns, "{}x{} += {}x{}", rows, columns,
                 other.rows, other.columns);
    for (std::size_t i = 0; i < values.size(); ++i) values[i] += other.values[i];
    return *this;
  }
};

/// The same values with another split into rows: (tokens, heads * d) as (tokens * heads, d).
Matrix reshaped(Matrix m, std::int64_t columns) {
  m.rows = m.rows * m.columns / columns;
  m.columns = columns;
  return m;
}

/// Columns [first, first + count).
Matrix columns_of(const Matrix& m, std::int64_t first, std::int64_t count) {
  Matrix part(m.rows, count);
  for (std::int64_t r = 0; r < m.rows; ++r) std::copy_n(m.row(r) + first, count, part.row(r));
  return part;
}

void set_columns(Matrix& m, std::int64_t first, const Matrix& part) {
  for (std::int64_t r = 0; r < m.rows; ++r) {
    std::copy_n(part.row(r), part.columns, m.row(r) + first);
  }
}

double dot(const double* a, const double* b, std::int64_t n) {
  double sums[4] = {};  // four, since one would wait for each addition
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int j = 0; j < 4; ++j) sums[j] += a[i + j] * b[i + j];
  }
  for (; i < n; ++i) sums[0] += a[i] * b[i];
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

void add_scaled(double* to, double factor, const double* from, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) to[i] += factor * from[i];
}

/// A parameter, or one matrix of a stack, and where its gradient goes (null: nowhere).
struct Weight {
  const double* value = nullptr;
  double* gradient = nullptr;
  std::int64_t out = 0;
  std::int64_t in = 0;
};

Matrix multiply(const Matrix& x, const Weight& w) {
  ORRERY_CHECK(x.columns == w.in, "{} columns for {}", x.columns, w.in);
  Matrix y(x.rows, w.out);
  for (std::int64_t r = 0; r < x.rows; ++r) {
    for (std::int64_t o = 0; o < w.out; ++o) {
      y.row(r)[o] = dot(x.row(r), w.value + o * w.in, w.in);
    }
  }
  return y;
}

/// The gradient of x; that of w is added up.
Matrix multiply_backward(const Matrix& x, const Weight& w, const Matrix& d_y) {
  Matrix d_x(x.rows, x.columns);
  for (std::int64_t r = 0; r < x.rows; ++r) {
    for (std::int64_t o = 0; o < w.out; ++o) {
      add_scaled(d_x.row(r), d_y.row(r)[o], w.value + o * w.in, w.in);
      add_scaled(w.gradient + o * w.in, d_y.row(r)[o], x.row(r), w.in);
    }
  }
  return d_x;
}

double root_mean_square(const double* x, std::int64_t n, double epsilon) {
  return std::sqrt(dot(x, x, n) / static_cast<double>(n) + epsilon);
}

Matrix normalise(const Matrix& x, const Weight& gain, double epsilon) {
  Matrix y(x.rows, x.columns);
  for (std::int64_t r = 0; r < x.rows; ++r) {
    const double rms = root_mean_square(x.row(r), x.columns, epsilon);
    for (std::int64_t c = 0; c < x.columns; ++c) y.row(r)[c] = gain.value[c] * x.row(r)[c] / rms;
  }
  return y;
}

/// With u = gain * d_y: d_x = u / rms - x (u . x) / (n rms^3).
Matrix normalise_backward(const Matrix& x, const Weight& gain, const Matrix& d_y, double epsilon) {
  Matrix d_x(x.rows, x.columns);
  for (std::int64_t r = 0; r < x.rows; ++r) {
    const double* in = x.row(r);
    const double rms = root_mean_square(in, x.columns, epsilon);
    double along = 0;
    for (std::int64_t c = 0; c < x.columns; ++c) {
      along += gain.value[c] * d_y.row(r)[c] * in[c];
      gain.gradient[c] += d_y.row(r)[c] * in[c] / rms;
    }
    along /= static_cast<double>(x.columns) * rms * rms * rms;
    for (std::int64_t c = 0; c < x.columns; ++c) {
      d_x.row(r)[c] = gain.value[c] * d_y.row(r)[c] / rms - along * in[c];
    }
  }
  return d_x;
}

/// Columns [first, first + count) of x. x has `heads` rows a token, tokens in order of position.
/// direction 1, or -1 for the gradient.
void rotate(Matrix& x, std::int64_t heads, std::int64_t first, std::int64_t count, double theta,
            int direction) {
  for (std::int64_t r = 0; r < x.rows; ++r) {
    const auto position = static_cast<double>(r / heads);
    for (std::int64_t i = 0; i < count; i += 2) {
      const double frequency =
          std::pow(theta, -static_cast<double>(i) / static_cast<double>(count));
      const double angle = direction * position * frequency;
      double* pair = x.row(r) + first + i;
      const double a = pair[0];
      const double b = pair[1];
      pair[0] = a * std::cos(angle) - b * std::sin(angle);
      pair[1] = a * std::sin(angle) + b * std::cos(angle);
    }
  }
}

/// Softmax attention of one sequence. q: (tokens * heads, d_qk); k and v: (tokens * kv_heads, d).
struct Core {
  std::int64_t heads = 0;
  std::int64_t kv_heads = 0;
  Matrix q, k, v;
  Matrix shares;  ///< (heads * tokens, tokens), after the softmax

  std::int64_t tokens() const { return q.rows / heads; }
  std::int64_t kv_row(std::int64_t token, std::int64_t head) const {
    return token * kv_heads + head / (heads / kv_heads);
  }

  Matrix forward() {
    const double scale = 1 / std::sqrt(static_cast<double>(q.columns));
    Matrix out(q.rows, v.columns);
    shares = Matrix(heads * tokens(), tokens());
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < tokens(); ++i) {
        double* share = shares.row(h * tokens() + i);
        double largest = -std::numeric_limits<double>::infinity();
        for (std::int64_t j = 0; j <= i; ++j) {
          share[j] = scale * dot(q.row(i * heads + h), k.row(kv_row(j, h)), q.columns);
          largest = std::max(largest, share[j]);
        }
        double sum = 0;
        for (std::int64_t j = 0; j <= i; ++j) sum += share[j] = std::exp(share[j] - largest);
        for (std::int64_t j = 0; j <= i; ++j) {
          share[j] /= sum;
          add_scaled(out.row(i * heads + h), share[j], v.row(kv_row(j, h)), v.columns);
        }
      }
    }
    return out;
  }

  struct Gradients {
    Matrix q, k, v;
  };

  Gradients backward(const Matrix& d_out) const {
    const double scale = 1 / std::sqrt(static_cast<double>(q.columns));
    Gradients d{Matrix(q.rows, q.columns), Matrix(k.rows, k.columns), Matrix(v.rows, v.columns)};
    std::vector<double> d_share(size(tokens()));
    for (std::int64_t h = 0; h < heads; ++h) {
      for (std::int64_t i = 0; i < tokens(); ++i) {
        const double* share = shares.row(h * tokens() + i);
        const double* d_row = d_out.row(i * heads + h);
        double mean = 0;
        for (std::int64_t j = 0; j <= i; ++j) {
          d_share[size(j)] = dot(d_row, v.row(kv_row(j, h)), v.columns);
          mean += share[j] * d_share[size(j)];
          add_scaled(d.v.row(kv_row(j, h)), share[j], d_row, v.columns);
        }
        for (std::int64_t j = 0; j <= i; ++j) {
          const double d_score = scale * share[j] * (d_share[size(j)] - mean);
          add_scaled(d.q.row(i * heads + h), d_score, k.row(kv_row(j, h)), q.columns);
          add_scaled(d.k.row(kv_row(j, h)), d_score, q.row(i * heads + h), q.columns);
        }
      }
    }
    return d;
  }
};

double sigmoid(double x) {
  return 1 / (1 + std::exp(-x));
}

struct FeedForward {
  Weight up, down;
  Matrix x, in, out;  ///< input, [gate | up], activation

  Matrix forward(Matrix input) {
    x = std::move(input);
    in = multiply(x, up);
    out = Matrix(x.rows, down.in);
    for (std::int64_t r = 0; r < x.rows; ++r) {
      for (std::int64_t c = 0; c < out.columns; ++c) {
        const double gate = in.row(r)[c];
        out.row(r)[c] = gate * sigmoid(gate) * in.row(r)[out.columns + c];
      }
    }
    return multiply(out, down);
  }

  Matrix backward(const Matrix& d_y) const {
    const Matrix d_out = multiply_backward(out, down, d_y);
    Matrix d_in(in.rows, in.columns);
    for (std::int64_t r = 0; r < in.rows; ++r) {
      for (std::int64_t c = 0; c < out.columns; ++c) {
        const double gate = in.row(r)[c];
        const double s = sigmoid(gate);
        d_in.row(r)[c] = d_out.row(r)[c] * in.row(r)[out.columns + c] * s * (1 + gate * (1 - s));
        d_in.row(r)[out.columns + c] = d_out.row(r)[c] * gate * s;
      }
    }
    return multiply_backward(x, up, d_in);
  }
};

struct Router {
  const Moe& moe;
  double scale = 1;
  const double* bias = nullptr;  ///< none: zero
  Matrix scores;                 ///< (tokens, experts)
  Matrix weights;                ///< (tokens, top_k)
  std::vector<std::int32_t> chosen;

  const std::int32_t* chosen_by(std::int64_t token) const {
    return chosen.data() + token * moe.top_k;
  }

  void forward(const Matrix& logits) {
    scores = logits;
    weights = Matrix(logits.rows, moe.top_k);
    for (std::int64_t t = 0; t < logits.rows; ++t) {
      score(scores.row(t));
      const std::vector<std::int32_t> best = choose(scores.row(t));
      double sum = 0;
      for (const std::int32_t e : best) sum += scores.row(t)[e];
      for (std::int64_t i = 0; i < moe.top_k; ++i) {
        weights.row(t)[i] = scale * scores.row(t)[best[size(i)]] / sum;
      }
      chosen.insert(chosen.end(), best.begin(), best.end());
    }
  }

  /// d_logits.
  Matrix backward(const Matrix& d_weights) const {
    Matrix d_logits(scores.rows, scores.columns);
    for (std::int64_t t = 0; t < scores.rows; ++t) {
      const double* s = scores.row(t);
      const std::int32_t* experts = chosen_by(t);
      double sum = 0;
      double mean = 0;  // of the weights' gradients, by weight
      for (std::int64_t i = 0; i < moe.top_k; ++i) {
        sum += s[experts[i]];
        mean += weights.row(t)[i] * d_weights.row(t)[i];
      }
      std::vector<double> d_scores(size(scores.columns));
      double along = 0;
      for (std::int64_t i = 0; i < moe.top_k; ++i) {
        double& d = d_scores[size(experts[i])];
        d = (scale * d_weights.row(t)[i] - mean) / sum;
        along += d * s[experts[i]];
      }
      for (std::int64_t e = 0; e < scores.columns; ++e) {
        d_logits.row(t)[e] = moe.sigmoid_scores ? d_scores[size(e)] * s[e] * (1 - s[e])
                                                : s[e] * (d_scores[size(e)] - along);
      }
    }
    return d_logits;
  }

 private:
  void score(double* row) const {
    const double largest = *std::max_element(row, row + moe.routed_experts);
    double sum = 0;
    for (std::int64_t e = 0; e < moe.routed_experts; ++e) {
      row[e] = moe.sigmoid_scores ? sigmoid(row[e]) : std::exp(row[e] - largest);
      sum += row[e];
    }
    if (moe.sigmoid_scores) return;
    for (std::int64_t e = 0; e < moe.routed_experts; ++e) row[e] /= sum;
  }

  /// The best `count` of `values`, best first; of equals the smaller index.
  static std::vector<std::int32_t> best_of(const std::vector<double>& values, std::int64_t count) {
    std::vector<std::int32_t> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      return values[static_cast<std::size_t>(a)] > values[static_cast<std::size_t>(b)];
    });
    order.resize(size(count));
    return order;
  }

  std::vector<std::int32_t> choose(const double* row) const {
    std::vector<double> biased(row, row + moe.routed_experts);
    for (std::size_t e = 0; bias && e < biased.size(); ++e) biased[e] += bias[e];
    if (moe.group_limit < moe.groups) {
      const std::int64_t width = moe.routed_experts / moe.groups;
      std::vector<double> ranks;
      for (std::int64_t g = 0; g < moe.groups; ++g) {
        std::vector<double> group(biased.begin() + g * width, biased.begin() + (g + 1) * width);
        std::sort(group.rbegin(), group.rend());
        ranks.push_back(group[0] + (moe.router_bias && width > 1 ? group[1] : 0));
      }
      std::vector<bool> in(size(moe.groups));
      for (const std::int32_t g : best_of(ranks, moe.group_limit)) in[size(g)] = true;
      for (std::int64_t e = 0; e < moe.routed_experts; ++e) {
        if (!in[size(e / width)]) biased[size(e)] = -std::numeric_limits<double>::infinity();
      }
    }
    return best_of(biased, moe.top_k);
  }
};

/// Parameters and gradients by name.
class Weights {
 public:
  Weights(const Tensors& values, Tensors* gradients) : values_(values), gradients_(gradients) {}

  /// Matrix `index` of `count`.
  Weight matrix(const std::string& name, std::int64_t out, std::int64_t in, std::int64_t index = 0,
                std::int64_t count = 1) const {
    const auto found = values_.find(name);
    ORRERY_CHECK(found != values_.end(), "no parameter {}", name);
    ORRERY_CHECK(found->second.size() == size(count * out * in), "{} has {} elements, not {}x{}x{}",
                 name, found->second.size(), count, out, in);
    Weight w{found->second.data() + index * out * in, nullptr, out, in};
    if (gradients_) {
      std::vector<double>& gradient = (*gradients_)[name];
      gradient.resize(found->second.size());
      w.gradient = gradient.data() + index * out * in;
    }
    return w;
  }

  Weight gain(const std::string& name, std::int64_t n) const { return matrix(name, 1, n); }

  const double* selection_bias(const std::string& name, std::int64_t experts) const {
    const auto found = values_.find(name);
    ORRERY_CHECK(found != values_.end() && found->second.size() == size(experts), "{}", name);
    return found->second.data();
  }

 private:
  const Tensors& values_;
  Tensors* gradients_;
};

/// Multi-head latent attention of one sequence, from the block's normed input to what is added to
/// the residual stream.
class LatentAttention {
 public:
  LatentAttention(const Model& model, const Options& options, const Weights& weights,
                  const std::string& prefix)
      : mla_(*model.attention.mla), options_(options), heads_(model.attention.heads) {
    const std::int64_t d_qk = mla_.qk_nope_head_dim + mla_.qk_rope_head_dim;
    std::int64_t query_in = model.hidden;
    if (mla_.q_lora_rank > 0) {
      query_in = mla_.q_lora_rank;
      q_a_ = weights.matrix(prefix + "q_a", query_in, model.hidden);
      q_norm_ = weights.gain(prefix + "q_norm", query_in);
    }
    q_b_ = weights.matrix(prefix + "q_b", heads_ * d_qk, query_in);
    kv_a_ =
        weights.matrix(prefix + "kv_a", mla_.kv_lora_rank + mla_.qk_rope_head_dim, model.hidden);
    kv_norm_ = weights.gain(prefix + "kv_norm", mla_.kv_lora_rank);
    kv_b_ = weights.matrix(prefix + "kv_b", heads_ * (mla_.qk_nope_head_dim + mla_.v_head_dim),
                           mla_.kv_lora_rank);
    o_ = weights.matrix(prefix + "o", model.hidden, heads_ * mla_.v_head_dim);
  }

  Matrix forward(Matrix input) {
    const std::int64_t nope = mla_.qk_nope_head_dim;
    const std::int64_t rope = mla_.qk_rope_head_dim;
    x_ = std::move(input);
    query_in_ = x_;
    if (mla_.q_lora_rank > 0) {
      query_latent_ = multiply(x_, q_a_);
      query_in_ = normalise(query_latent_, q_norm_, options_.epsilon);
    }
    Matrix q = reshaped(multiply(query_in_, q_b_), nope + rope);
    rotate(q, heads_, nope, rope, options_.rope_theta, 1);

    const Matrix down = multiply(x_, kv_a_);
    latent_ = columns_of(down, 0, mla_.kv_lora_rank);
    Matrix rotary_key = columns_of(down, mla_.kv_lora_rank, rope);
    rotate(rotary_key, 1, 0, rope, options_.rope_theta, 1);
    latent_normed_ = normalise(latent_, kv_norm_, options_.epsilon);
    const Matrix up = reshaped(multiply(latent_normed_, kv_b_), nope + mla_.v_head_dim);

    Matrix k(up.rows, nope + rope);
    set_columns(k, 0, columns_of(up, 0, nope));
    for (std::int64_t r = 0; r < k.rows; ++r) {
      std::copy_n(rotary_key.row(r / heads_), rope, k.row(r) + nope);
    }
    core_ =
        Core{heads_, heads_, std::move(q), std::move(k), columns_of(up, nope, mla_.v_head_dim), {}};
    out_ = reshaped(core_.forward(), heads_ * mla_.v_head_dim);
    return multiply(out_, o_);
  }

  Matrix backward(const Matrix& d_y) const {
    const std::int64_t nope = mla_.qk_nope_head_dim;
    const std::int64_t rope = mla_.qk_rope_head_dim;
    const Matrix d_out = multiply_backward(out_, o_, d_y);
    Core::Gradients d = core_.backward(reshaped(d_out, mla_.v_head_dim));

    Matrix d_rotary_key(x_.rows, rope);
    for (std::int64_t r = 0; r < d.k.rows; ++r) {
      add_scaled(d_rotary_key.row(r / heads_), 1, d.k.row(r) + nope, rope);
    }
    rotate(d_rotary_key, 1, 0, rope, options_.rope_theta, -1);
    Matrix d_up(d.k.rows, nope + mla_.v_head_dim);
    set_columns(d_up, 0, columns_of(d.k, 0, nope));
    set_columns(d_up, nope, d.v);
    const Matrix d_latent_normed =
        multiply_backward(latent_normed_, kv_b_, reshaped(std::move(d_up), kv_b_.out));
    Matrix d_down(x_.rows, kv_a_.out);
    set_columns(d_down, 0,
                normalise_backward(latent_, kv_norm_, d_latent_normed, options_.epsilon));
    set_columns(d_down, mla_.kv_lora_rank, d_rotary_key);
    Matrix d_x = multiply_backward(x_, kv_a_, d_down);

    rotate(d.q, heads_, nope, rope, options_.rope_theta, -1);
    Matrix d_query_in = multiply_backward(query_in_, q_b_, reshaped(std::move(d.q), q_b_.out));
    if (mla_.q_lora_rank > 0) {
      d_query_in = multiply_backward(
          x_, q_a_, normalise_backward(query_latent_, q_norm_, d_query_in, options_.epsilon));
    }
    return d_x += d_query_in;
  }

 private:
  const Mla& mla_;
  const Options& options_;
  std::int64_t heads_;
  Weight q_a_, q_norm_, q_b_, kv_a_, kv_norm_, kv_b_, o_;
  Matrix x_, query_latent_, query_in_, latent_, latent_normed_, out_;
  Core core_;
};

/// Grouped-query attention of one sequence, likewise.
class GroupedAttention {
 public:
  GroupedAttention(const Model& model, const Options& options, const Weights& weights,
                   const std::string& prefix)
      : a_(model.attention),
        options_(options),
        qkv_(weights.matrix(prefix + "qkv", (a_.heads + 2 * a_.kv_heads) * a_.head_dim,
                            model.hidden)),
        o_(weights.matrix(prefix + "o", model.hidden, a_.heads * a_.head_dim)) {
    if (!a_.qk_norm) return;
    query_norm_ = weights.gain(prefix + "query_norm", a_.head_dim);
    key_norm_ = weights.gain(prefix + "key_norm", a_.head_dim);
  }

  Matrix forward(Matrix input) {
    const std::int64_t d = a_.head_dim;
    x_ = std::move(input);
    const Matrix qkv = multiply(x_, qkv_);
    q_ = reshaped(columns_of(qkv, 0, a_.heads * d), d);
    k_ = reshaped(columns_of(qkv, a_.heads * d, a_.kv_heads * d), d);
    Matrix q = a_.qk_norm ? normalise(q_, query_norm_, options_.epsilon) : q_;
    Matrix k = a_.qk_norm ? normalise(k_, key_norm_, options_.epsilon) : k_;
    rotate(q, a_.heads, 0, d, options_.rope_theta, 1);
    rotate(k, a_.kv_heads, 0, d, options_.rope_theta, 1);
    Matrix v = reshaped(columns_of(qkv, (a_.heads + a_.kv_heads) * d, a_.kv_heads * d), d);
    core_ = Core{a_.heads, a_.kv_heads, std::move(q), std::move(k), std::move(v), {}};
    out_ = reshaped(core_.forward(), a_.heads * d);
    return multiply(out_, o_);
  }

  Matrix backward(const Matrix& d_y) const {
    const std::int64_t dim = a_.head_dim;
    const Matrix d_out = multiply_backward(out_, o_, d_y);
    Core::Gradients d = core_.backward(reshaped(d_out, dim));
    rotate(d.q, a_.heads, 0, dim, options_.rope_theta, -1);
    rotate(d.k, a_.kv_heads, 0, dim, options_.rope_theta, -1);
    if (a_.qk_norm) {
      d.q = normalise_backward(q_, query_norm_, d.q, options_.epsilon);
      d.k = normalise_backward(k_, key_norm_, d.k, options_.epsilon);
    }
    Matrix d_qkv(x_.rows, qkv_.out);
    set_columns(d_qkv, 0, reshaped(std::move(d.q), a_.heads * dim));
    set_columns(d_qkv, a_.heads * dim, reshaped(std::move(d.k), a_.kv_heads * dim));
    set_columns(d_qkv, (a_.heads + a_.kv_heads) * dim, reshaped(std::move(d.v), a_.kv_heads * dim));
    return multiply_backward(x_, qkv_, d_qkv);
  }

 private:
  const Attention& a_;
  const Options& options_;
  Weight qkv_, o_, query_norm_, key_norm_;
  Matrix x_, q_, k_, out_;
  Core core_;
};

/// Shared and routed experts of one sequence, likewise.
class Experts {
 public:
  Experts(const Model& model, const Options& options, const Weights& weights,
          const std::string& prefix)
      : moe_(*model.moe),
        gate_(weights.matrix(prefix + "gate", moe_.routed_experts, model.hidden)),
        router_{moe_, options.routed_scale} {
    if (moe_.router_bias) {
      router_.bias = weights.selection_bias(prefix + "router_bias", moe_.routed_experts);
    }
    if (moe_.shared_experts > 0) {
      shared_ = FeedForward{
          weights.matrix(prefix + "shared_up", 2 * moe_.shared_intermediate, model.hidden),
          weights.matrix(prefix + "shared_down", model.hidden, moe_.shared_intermediate)};
    }
    const std::int64_t width = moe_.expert_intermediate;
    for (std::int64_t e = 0; e < moe_.routed_experts; ++e) {
      routed_.push_back(
          {{weights.matrix(prefix + "routed_up", 2 * width, model.hidden, e, moe_.routed_experts),
            weights.matrix(prefix + "routed_down", model.hidden, width, e, moe_.routed_experts)}});
    }
  }

  const std::vector<std::int32_t>& chosen() const { return router_.chosen; }

  Matrix forward(Matrix input) {
    x_ = std::move(input);
    router_.forward(multiply(x_, gate_));
    Matrix y = shared_ ? shared_->forward(x_) : Matrix(x_.rows, x_.columns);
    for (std::int64_t t = 0; t < x_.rows; ++t) {
      for (std::int64_t i = 0; i < moe_.top_k; ++i) {
        routed_[size(router_.chosen_by(t)[i])].slots.push_back({t, i});
      }
    }
    for (Expert& expert : routed_) {
      Matrix in(static_cast<std::int64_t>(expert.slots.size()), x_.columns);
      for (std::int64_t r = 0; r < in.rows; ++r) {
        std::copy_n(x_.row(expert.slots[size(r)].token), x_.columns, in.row(r));
      }
      expert.y = expert.ffn.forward(std::move(in));
      for (std::int64_t r = 0; r < expert.y.rows; ++r) {
        const Slot slot = expert.slots[size(r)];
        add_scaled(y.row(slot.token), router_.weights.row(slot.token)[slot.choice], expert.y.row(r),
                   y.columns);
      }
    }
    return y;
  }

  Matrix backward(const Matrix& d_y) const {
    Matrix d_x = shared_ ? shared_->backward(d_y) : Matrix(x_.rows, x_.columns);
    Matrix d_weights(x_.rows, moe_.top_k);
    for (const Expert& expert : routed_) {
      Matrix d_out(expert.y.rows, expert.y.columns);
      for (std::int64_t r = 0; r < d_out.rows; ++r) {
        const Slot slot = expert.slots[size(r)];
        const double* from = d_y.row(slot.token);
        add_scaled(d_out.row(r), router_.weights.row(slot.token)[slot.choice], from, d_y.columns);
        d_weights.row(slot.token)[slot.choice] = dot(from, expert.y.row(r), d_y.columns);
      }
      const Matrix d_in = expert.ffn.backward(d_out);
      for (std::int64_t r = 0; r < d_in.rows; ++r) {
        add_scaled(d_x.row(expert.slots[size(r)].token), 1, d_in.row(r), d_in.columns);
      }
    }
    return d_x += multiply_backward(x_, gate_, router_.backward(d_weights));
  }

 private:
  struct Slot {
    std::int64_t token = 0;
    std::int64_t choice = 0;
  };
  struct Expert {
    FeedForward ffn;
    std::vector<Slot> slots;
    Matrix y;
  };

  const Moe& moe_;
  Weight gate_;
  Router router_;
  std::optional<FeedForward> shared_;
  std::vector<Expert> routed_;
  Matrix x_;
};

/// One transformer layer on one sequence.
class Block {
 public:
  Block(const Model& model, const Options& options, const Weights& weights, std::int64_t layer,
        bool moe)
      : options_(options), layer_(layer) {
    const std::string prefix = "layers." + std::to_string(layer) + ".";
    attention_norm_ = weights.gain(prefix + "attention_norm", model.hidden);
    ffn_norm_ = weights.gain(prefix + "ffn_norm", model.hidden);
    if (model.attention.mla) {
      latent_.emplace(model, options, weights, prefix);
    } else {
      grouped_.emplace(model, options, weights, prefix);
    }
    if (moe) {
      experts_.emplace(model, options, weights, prefix);
    } else {
      ffn_ = FeedForward{weights.matrix(prefix + "ffn_up", 2 * model.intermediate, model.hidden),
                         weights.matrix(prefix + "ffn_down", model.hidden, model.intermediate)};
    }
  }

  std::int64_t layer() const { return layer_; }
  /// Null in a dense layer.
  const std::vector<std::int32_t>* chosen() const {
    return experts_ ? &experts_->chosen() : nullptr;
  }

  Matrix forward(Matrix x) {
    x_ = std::move(x);
    Matrix normed = normalise(x_, attention_norm_, options_.epsilon);
    middle_ = latent_ ? latent_->forward(std::move(normed)) : grouped_->forward(std::move(normed));
    middle_ += x_;
    normed = normalise(middle_, ffn_norm_, options_.epsilon);
    Matrix y = experts_ ? experts_->forward(std::move(normed)) : ffn_->forward(std::move(normed));
    return y += middle_;
  }

  Matrix backward(const Matrix& d_y) const {
    Matrix d_middle = normalise_backward(middle_, ffn_norm_,
                                         experts_ ? experts_->backward(d_y) : ffn_->backward(d_y),
                                         options_.epsilon);
    d_middle += d_y;
    Matrix d_x = normalise_backward(
        x_, attention_norm_, latent_ ? latent_->backward(d_middle) : grouped_->backward(d_middle),
        options_.epsilon);
    return d_x += d_middle;
  }

 private:
  const Options& options_;
  std::int64_t layer_;
  Weight attention_norm_, ffn_norm_;
  std::optional<LatentAttention> latent_;
  std::optional<GroupedAttention> grouped_;
  std::optional<Experts> experts_;
  std::optional<FeedForward> ffn_;
  Matrix x_, middle_;
};

/// Norm, head and cross-entropy against `targets`.
struct Head {
  Weight norm, head;
  double epsilon = 0;
  std::span<const std::int32_t> targets;
  Matrix x, normed, shares;
  std::vector<double> losses;

  void forward(Matrix input) {
    x = std::move(input);
    normed = normalise(x, norm, epsilon);
    shares = multiply(normed, head);
    for (std::int64_t r = 0; r < shares.rows; ++r) {
      double* row = shares.row(r);
      const double largest = *std::max_element(row, row + shares.columns);
      const double target = row[targets[size(r)]];
      double sum = 0;
      for (std::int64_t c = 0; c < shares.columns; ++c) sum += row[c] = std::exp(row[c] - largest);
      for (std::int64_t c = 0; c < shares.columns; ++c) row[c] /= sum;
      losses.push_back(std::log(sum) + largest - target);
    }
  }

  /// Of the sum of losses, times factor.
  Matrix backward(double factor) const {
    Matrix d_logits = shares;
    for (std::int64_t r = 0; r < d_logits.rows; ++r) {
      d_logits.row(r)[targets[size(r)]] -= 1;
      for (std::int64_t c = 0; c < d_logits.columns; ++c) d_logits.row(r)[c] *= factor;
    }
    return normalise_backward(x, norm, multiply_backward(normed, head, d_logits), epsilon);
  }
};

/// An MTP module up to its block.
struct MtpFront {
  Weight norm_hidden, norm_embedding, projection;
  double epsilon = 0;
  Matrix hidden, embedding, joined;

  Matrix forward(Matrix h, Matrix e) {
    hidden = std::move(h);
    embedding = std::move(e);
    joined = Matrix(hidden.rows, 2 * hidden.columns);
    set_columns(joined, 0, normalise(hidden, norm_hidden, epsilon));
    set_columns(joined, hidden.columns, normalise(embedding, norm_embedding, epsilon));
    return multiply(joined, projection);
  }

  /// Gradients of hidden and embedding.
  std::pair<Matrix, Matrix> backward(const Matrix& d_y) const {
    const Matrix d = multiply_backward(joined, projection, d_y);
    const std::int64_t n = hidden.columns;
    return {normalise_backward(hidden, norm_hidden, columns_of(d, 0, n), epsilon),
            normalise_backward(embedding, norm_embedding, columns_of(d, n, n), epsilon)};
  }
};

/// One sequence through the whole model.
class Pass {
 public:
  Pass(const Model& model, const Options& options, const Weights& weights, const Sequence& tokens)
      : model_(model),
        tokens_(tokens),
        length_(static_cast<std::int64_t>(tokens.size()) - 1 - model.mtp_modules),
        embedding_(weights.matrix("embedding", model.vocabulary, model.hidden)) {
    ORRERY_CHECK(length_ > 0, "{} tokens", tokens.size());
    const Weight head =
        model.tied_embeddings ? embedding_ : weights.matrix("head", model.vocabulary, model.hidden);
    const auto targets = [&](std::int64_t ahead) {
      return std::span(tokens_).subspan(size(ahead), size(length_));
    };
    for (std::int64_t layer = 0; layer < model.layers; ++layer) {
      blocks_.emplace_back(model, options, weights, layer, model.is_moe(layer));
    }
    heads_.push_back({weights.gain("final_norm", model.hidden), head, options.epsilon, targets(1)});
    for (std::int64_t module = 0; module < model.mtp_modules; ++module) {
      const std::string prefix = "mtp." + std::to_string(module) + ".";
      fronts_.push_back({weights.gain(prefix + "norm_hidden", model.hidden),
                         weights.gain(prefix + "norm_embedding", model.hidden),
                         weights.matrix(prefix + "projection", model.hidden, 2 * model.hidden),
                         options.epsilon});
      blocks_.emplace_back(model, options, weights, model.layers + module, model.moe.has_value());
      heads_.push_back({weights.gain(prefix + "final_norm", model.hidden), head, options.epsilon,
                        targets(module + 2)});
    }
  }

  std::int64_t length() const { return length_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  /// Of the model's own predictions (0) or those of MTP module `depth` - 1.
  const std::vector<double>& losses(std::int64_t depth) const { return heads_[size(depth)].losses; }

  void forward() {
    Matrix x = embed(0);
    for (std::int64_t layer = 0; layer < model_.layers; ++layer) {
      x = blocks_[size(layer)].forward(std::move(x));
    }
    heads_[0].forward(x);
    for (std::int64_t module = 0; module < model_.mtp_modules; ++module) {
      x = fronts_[size(module)].forward(std::move(x), embed(module + 1));
      x = blocks_[size(model_.layers + module)].forward(std::move(x));
      heads_[size(module + 1)].forward(x);
    }
  }

  /// Of `factor` times the sum of the model's losses plus `mtp_factor` times that of the modules'.
  void backward(double factor, double mtp_factor) const {
    Matrix d_x(length_, model_.hidden);
    for (std::int64_t module = model_.mtp_modules - 1; module >= 0; --module) {
      d_x += heads_[size(module + 1)].backward(mtp_factor);
      d_x = blocks_[size(model_.layers + module)].backward(d_x);
      auto [d_hidden, d_embedding] = fronts_[size(module)].backward(d_x);
      embed_backward(module + 1, d_embedding);
      d_x = std::move(d_hidden);
    }
    d_x += heads_[0].backward(factor);
    for (std::int64_t layer = model_.layers - 1; layer >= 0; --layer) {
      d_x = blocks_[size(layer)].backward(d_x);
    }
    embed_backward(0, d_x);
  }

 private:
  /// Of the tokens `ahead` of each position.
  Matrix embed(std::int64_t ahead) const {
    Matrix x(length_, model_.hidden);
    for (std::int64_t t = 0; t < length_; ++t) {
      const std::int32_t token = tokens_[size(t + ahead)];
      ORRERY_CHECK(token >= 0 && token < model_.vocabulary, "token {}", token);
      std::copy_n(embedding_.value + token * model_.hidden, model_.hidden, x.row(t));
    }
    return x;
  }

  void embed_backward(std::int64_t ahead, const Matrix& d_x) const {
    for (std::int64_t t = 0; t < length_; ++t) {
      add_scaled(embedding_.gradient + tokens_[size(t + ahead)] * model_.hidden, 1, d_x.row(t),
                 model_.hidden);
    }
  }

  const Model& model_;
  const Sequence& tokens_;
  std::int64_t length_;
  Weight embedding_;
  std::vector<Block> blocks_;     // the modules' behind the model's
  std::vector<MtpFront> fronts_;  // by module
  std::vector<Head> heads_;       // the model's, then the modules'
};

Evaluation run(const Model& model, const Options& options, const Tensors& parameters,
               std::span<const Sequence> batch, bool with_gradients) {
  ORRERY_CHECK(!batch.empty(), "an empty batch of {}", model.name);
  Evaluation result;
  const Weights weights(parameters, with_gradients ? &result.gradients : nullptr);
  const auto modules = static_cast<double>(model.mtp_modules);
  double predicted = 0;
  std::vector<double> mtp_sums(size(model.mtp_modules));
  for (const Sequence& tokens : batch) {
    ORRERY_CHECK(tokens.size() == batch.front().size(), "{} and {} tokens", tokens.size(),
                 batch.front().size());
    Pass pass(model, options, weights, tokens);
    pass.forward();
    predicted = static_cast<double>(pass.length()) * static_cast<double>(batch.size());
    if (with_gradients) pass.backward(1 / predicted, options.mtp_weight / modules / predicted);
    for (const Block& block : pass.blocks()) {
      if (!block.chosen()) continue;
      std::vector<std::int32_t>& all = result.experts[block.layer()];
      all.insert(all.end(), block.chosen()->begin(), block.chosen()->end());
    }
    const std::vector<double>& losses = pass.losses(0);
    result.token_losses.insert(result.token_losses.end(), losses.begin(), losses.end());
    for (std::int64_t module = 0; module < model.mtp_modules; ++module) {
      for (const double loss : pass.losses(module + 1)) mtp_sums[size(module)] += loss;
    }
  }
  for (const double loss : result.token_losses) result.next_token_loss += loss / predicted;
  result.loss = result.next_token_loss;
  for (const double sum : mtp_sums) {
    result.mtp_losses.push_back(sum / predicted);
    result.loss += options.mtp_weight / modules * sum / predicted;
  }
  return result;
}

bool is_gain(const std::string& name) {
  return name.find("norm") != std::string::npos;
}

}  // namespace

Evaluation evaluate(const Model& model, const Options& options, const Tensors& parameters,
                    std::span<const Sequence> batch) {
  return run(model, options, parameters, batch, false);
}

Evaluation differentiate(const Model& model, const Options& options, const Tensors& parameters,
                         std::span<const Sequence> batch) {
  return run(model, options, parameters, batch, true);
}

double adam_step(const AdamOptions& options, const Tensors& gradients, Tensors& parameters,
                 AdamState& state) {
  double squares = 0;
  for (const auto& [name, gradient] : gradients) {
    for (const double g : gradient) squares += g * g;
  }
  const double norm = std::sqrt(squares);
  const double clip = options.max_norm > 0 && norm > options.max_norm ? options.max_norm / norm : 1;
  state.steps += 1;
  const double correction1 = 1 - std::pow(options.beta1, static_cast<double>(state.steps));
  const double correction2 = 1 - std::pow(options.beta2, static_cast<double>(state.steps));
  for (const auto& [name, gradient] : gradients) {
    std::vector<double>& values = parameters.at(name);
    std::vector<double>& first = state.first[name];
    std::vector<double>& second = state.second[name];
    first.resize(gradient.size());
    second.resize(gradient.size());
    const double decay = is_gain(name) ? 0 : options.weight_decay;
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      const double g = clip * gradient[i];
      first[i] = options.beta1 * first[i] + (1 - options.beta1) * g;
      second[i] = options.beta2 * second[i] + (1 - options.beta2) * g * g;
      const double step =
          (first[i] / correction1) / (std::sqrt(second[i] / correction2) + options.epsilon);
      values[i] -= options.learning_rate * (step + decay * values[i]);
    }
  }
  return norm;
}

}  // namespace orrery::reference
