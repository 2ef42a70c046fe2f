#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {
namespace {

/// Experts of the groups that a token may not choose from get -infinity.
void leave_groups_out(std::vector<double>& biased, const Router& k) {
  const auto experts = static_cast<std::int64_t>(biased.size());
  const std::int64_t size = experts / k.groups;
  std::vector<double> rank(static_cast<std::size_t>(k.groups));
  for (std::int64_t g = 0; g < k.groups; ++g) {
    std::vector<double> of_group(biased.begin() + g * size, biased.begin() + (g + 1) * size);
    std::sort(of_group.begin(), of_group.end(), std::greater<>());
    const bool two = k.bias != nullptr && size > 1;
    rank[static_cast<std::size_t>(g)] = of_group[0] + (two ? of_group[1] : 0.0);
  }
  std::vector<std::int64_t> order(rank.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return rank[static_cast<std::size_t>(a)] > rank[static_cast<std::size_t>(b)];
  });
  for (std::int64_t i = k.group_limit; i < k.groups; ++i) {
    const std::int64_t first = order[static_cast<std::size_t>(i)] * size;
    std::fill_n(biased.begin() + first, size, -std::numeric_limits<double>::infinity());
  }
}

}  // namespace

void run(const Router& k) {
  const std::int64_t experts = k.logits.columns;
  for (std::int64_t t = 0; t < k.logits.rows; ++t) {
    std::vector<double> score(static_cast<std::size_t>(experts));
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (std::int64_t e = 0; e < experts; ++e) largest = std::max(largest, element(k.logits, t, e));
    for (std::int64_t e = 0; e < experts; ++e) {
      const double logit = element(k.logits, t, e);
      const double value = k.sigmoid ? 1 / (1 + std::exp(-logit)) : std::exp(logit - largest);
      score[static_cast<std::size_t>(e)] = value;
      sum += value;
    }
    std::vector<double> biased(score.size());
    for (std::size_t e = 0; e < score.size(); ++e) {
      if (!k.sigmoid) score[e] /= sum;
      biased[e] = score[e] + (k.bias == nullptr ? 0.0 : double{k.bias[e]});
      k.scores[static_cast<std::size_t>(t * experts) + e] = static_cast<float>(score[e]);
    }
    if (k.group_limit < k.groups) leave_groups_out(biased, k);
    std::vector<std::int64_t> order(score.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
      return biased[static_cast<std::size_t>(a)] > biased[static_cast<std::size_t>(b)];
    });
    if (k.balanced) {
      for (std::int64_t i = 0; i < k.top_k; ++i) {
        order[static_cast<std::size_t>(i)] = (t * k.top_k + i) % experts;
      }
    }
    double chosen = 0;
    for (std::int64_t i = 0; i < k.top_k; ++i) {
      chosen += score[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])];
    }
    for (std::int64_t i = 0; i < k.top_k; ++i) {
      const std::int64_t e = order[static_cast<std::size_t>(i)];
      const double weight = score[static_cast<std::size_t>(e)] / (k.normalise ? chosen : 1.0);
      k.experts[t * k.top_k + i] = static_cast<std::int32_t>(e);
      k.weights[t * k.top_k + i] = static_cast<float>(weight * k.scale);
    }
  }
}

// With S the sum of the chosen scores: d weight_i / d score_j = scale ([i = j] / S - score_i /
// S^2).
void run(const RouterBackward& k) {
  const std::int64_t experts = k.d_logits.columns;
  for (std::int64_t t = 0; t < k.d_logits.rows; ++t) {
    const float* score = k.scores + t * experts;
    double chosen = 0, weighted = 0;
    for (std::int64_t i = 0; i < k.top_k; ++i) {
      const double s = score[k.experts[t * k.top_k + i]];
      chosen += s;
      weighted += k.d_weights[t * k.top_k + i] * s;
    }
    std::vector<double> d_score(static_cast<std::size_t>(experts), 0.0);
    for (std::int64_t i = 0; i < k.top_k; ++i) {
      const double d = k.d_weights[t * k.top_k + i];
      d_score[static_cast<std::size_t>(k.experts[t * k.top_k + i])] =
          k.scale * (k.normalise ? d / chosen - weighted / (chosen * chosen) : d);
    }
    double mean = 0;  // of the gradient under the softmax
    for (std::int64_t e = 0; e < experts; ++e)
      mean += d_score[static_cast<std::size_t>(e)] * score[e];
    for (std::int64_t e = 0; e < experts; ++e) {
      const double s = score[e], d = d_score[static_cast<std::size_t>(e)];
      set_code(k.d_logits, t, e, k.sigmoid ? d * s * (1 - s) : s * (d - mean));
    }
  }
}

void run(const RoutingMap& m) {
  const std::int64_t tokens = m.tokens == nullptr ? m.max_tokens : *m.tokens;
  std::vector<std::vector<std::int64_t>> slots(static_cast<std::size_t>(m.local_experts));
  for (std::int64_t slot = 0; slot < tokens * m.top_k; ++slot) {
    m.slot_row[slot] = -1;
    if (m.experts[slot] >= 0) slots[static_cast<std::size_t>(m.experts[slot])].push_back(slot);
  }
  std::int64_t row = 0;
  std::int32_t left_out = 0;
  for (std::int64_t e = 0; e < m.local_experts; ++e) {
    m.group_begin[e] = static_cast<std::int32_t>(row);
    std::int32_t count = 0;
    for (const std::int64_t slot : slots[static_cast<std::size_t>(e)]) {
      if (row >= m.capacity) {
        ++left_out;
        continue;
      }
      m.row_source[row] = static_cast<std::int32_t>(slot / m.top_k);
      m.row_weight[row] = m.weights[slot];
      m.slot_row[slot] = static_cast<std::int32_t>(row);
      ++row;
      ++count;
    }
    m.group_rows[e] = count;
    for (; row % m.alignment != 0 && row < m.capacity; ++row) {
      m.row_source[row] = -1;
      m.row_weight[row] = 0;
    }
  }
  m.group_begin[m.local_experts] = static_cast<std::int32_t>(row);
  *m.used_rows = static_cast<std::int32_t>(row);
  *m.overflow = left_out;
}

void run(const Permute& p) {
  const auto bytes = static_cast<std::size_t>(element_bytes(1, p.from.columns, p.from.format));
  const auto row_of = [](const Matrix& m, std::int64_t row) {
    return static_cast<std::byte*>(m.data) + element_bytes(row, m.pitch, m.format);
  };
  for (std::int64_t r = 0; r < rows_in_use(p.used_rows, p.to); ++r) {
    const std::int32_t source = p.row_source[r];
    if (source < 0) {
      std::memset(row_of(p.to, r), 0, bytes);
    } else {
      std::memcpy(row_of(p.to, r), row_of(p.from, source), bytes);
    }
    if (p.to.scaling == Scaling::none) continue;
    for (std::int64_t c = 0; c < p.to.columns; c += kTile) {
      *scale_at(p.to, r, c) = source < 0 ? 1.0F : *scale_at(p.from, source, c);
    }
  }
}

void run(const Unpermute& u) {
  const std::int64_t tokens = u.tokens == nullptr ? u.to.rows : *u.tokens;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int32_t* rows = u.slot_row + t * u.top_k;
    for (std::int64_t c = 0; c < u.to.columns; ++c) {
      double sum = 0;
      for (std::int64_t i = 0; i < u.top_k; ++i) {
        if (rows[i] >= 0) sum += element(u.from, rows[i], c);
      }
      set_code(u.to, t, c, sum);
    }
    if (u.row_values == nullptr) continue;
    for (std::int64_t i = 0; i < u.top_k; ++i) {
      u.slot_values[t * u.top_k + i] = rows[i] < 0 ? 0.0F : u.row_values[rows[i]];
    }
  }
}

}  // namespace orrery::kernels::reference
