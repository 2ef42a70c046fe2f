#include <limits>

#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::cpu {
namespace {

constexpr float kOut = -std::numeric_limits<float>::infinity();

/// The largest of those not taken yet, the first of equals; it is taken.
std::int64_t take_largest(float* values, std::int64_t count) {
  std::int64_t best = 0;
  for (std::int64_t i = 1; i < count; ++i) {
    if (values[i] > values[best]) best = i;
  }
  return best;
}

void leave_groups_out(const Router& k, float* biased, float* rank, std::int64_t size) {
  for (std::int64_t g = 0; g < k.groups; ++g) {
    float best = kOut, second = kOut;
    for (std::int64_t e = g * size; e < (g + 1) * size; ++e) {
      if (biased[e] > best) {
        second = best;
        best = biased[e];
      } else {
        second = std::max(second, biased[e]);
      }
    }
    rank[g] = best + (k.bias != nullptr && size > 1 ? second : 0.0F);
  }
  for (std::int64_t i = 0; i < k.group_limit; ++i) rank[take_largest(rank, k.groups)] = kOut;
  // What is left has not been taken.
  for (std::int64_t g = 0; g < k.groups; ++g) {
    if (rank[g] != kOut) std::fill_n(biased + g * size, size, kOut);
  }
}

}  // namespace

void run(const Router& k) {
  const std::int64_t experts = k.logits.columns;
  for_rows(k.logits.rows, experts * 4, [&](std::int64_t first, std::int64_t last) {
    float* biased = row_buffer(0, experts);
    float* rank = row_buffer(1, k.groups);
    for (std::int64_t t = first; t < last; ++t) {
      float* score = k.scores + t * experts;
      load_row(k.logits, t, score);
      if (k.sigmoid) {
        for (std::int64_t e = 0; e < experts; ++e) score[e] = 1 / (1 + fast_exp(-score[e]));
      } else {
        float largest = score[0], sum = 0;
        for (std::int64_t e = 1; e < experts; ++e) largest = std::max(largest, score[e]);
        for (std::int64_t e = 0; e < experts; ++e) {
          score[e] = fast_exp(score[e] - largest);
          sum += score[e];
        }
        for (std::int64_t e = 0; e < experts; ++e) score[e] /= sum;
      }
      for (std::int64_t e = 0; e < experts; ++e) {
        biased[e] = k.bias == nullptr ? score[e] : score[e] + k.bias[e];
      }
      if (k.group_limit < k.groups) leave_groups_out(k, biased, rank, experts / k.groups);
      float chosen = 0;
      std::int32_t* ids = k.experts + t * k.top_k;
      for (std::int64_t i = 0; i < k.top_k; ++i) {
        const std::int64_t e =
            k.balanced ? (t * k.top_k + i) % experts : take_largest(biased, experts);
        biased[e] = kOut;
        ids[i] = static_cast<std::int32_t>(e);
        chosen += score[e];
      }
      const float factor = k.normalise ? k.scale / chosen : k.scale;
      for (std::int64_t i = 0; i < k.top_k; ++i) {
        k.weights[t * k.top_k + i] = score[ids[i]] * factor;
      }
    }
  });
}

// With S the sum of the chosen scores: d weight_i / d score_j = scale ([i = j] / S - score_i /
// S^2).
void run(const RouterBackward& k) {
  const std::int64_t experts = k.d_logits.columns;
  for_rows(k.d_logits.rows, experts * 2, [&](std::int64_t first, std::int64_t last) {
    float* d = row_buffer(0, experts);
    for (std::int64_t t = first; t < last; ++t) {
      const float* score = k.scores + t * experts;
      const std::int32_t* ids = k.experts + t * k.top_k;
      const float* d_weights = k.d_weights + t * k.top_k;
      float chosen = 0, weighted = 0;
      for (std::int64_t i = 0; i < k.top_k; ++i) {
        chosen += score[ids[i]];
        weighted += d_weights[i] * score[ids[i]];
      }
      std::fill_n(d, experts, 0.0F);
      for (std::int64_t i = 0; i < k.top_k; ++i) {
        d[ids[i]] = k.normalise ? k.scale * (d_weights[i] / chosen - weighted / (chosen * chosen))
                                : k.scale * d_weights[i];
      }
      if (k.sigmoid) {
        for (std::int64_t e = 0; e < experts; ++e) d[e] *= score[e] * (1 - score[e]);
      } else {
        float mean = 0;
        for (std::int64_t e = 0; e < experts; ++e) mean += d[e] * score[e];
        for (std::int64_t e = 0; e < experts; ++e) d[e] = score[e] * (d[e] - mean);
      }
      store_row(k.d_logits, t, d);
    }
  });
}

/// Counting and placing are linear already, and each place depends on those before.
void run(const RoutingMap& map) {
  reference::run(map);
}

void run(const Permute& p) {
  const auto bytes = static_cast<std::size_t>(element_bytes(1, p.from.columns, p.from.format));
  const std::int64_t tiles = (p.to.columns + kTile - 1) / kTile;
  for_rows(
      rows_in_use(p.used_rows, p.to), p.to.columns, [&](std::int64_t first, std::int64_t last) {
        for (std::int64_t r = first; r < last; ++r) {
          const std::int64_t source = p.row_source[r];
          auto* to = static_cast<std::byte*>(p.to.data) + element_bytes(r, p.to.pitch, p.to.format);
          if (source < 0) {
            std::memset(to, 0, bytes);
          } else {
            std::memcpy(to,
                        static_cast<const std::byte*>(p.from.data) +
                            element_bytes(source, p.from.pitch, p.from.format),
                        bytes);
          }
          if (p.to.scaling == Scaling::none) continue;
          for (std::int64_t t = 0; t < tiles; ++t) {
            p.to.scales[t * p.to.scale_pitch + r] =
                source < 0 ? 1.0F : p.from.scales[t * p.from.scale_pitch + source];
          }
        }
      });
}

void run(const Unpermute& u) {
  const std::int64_t tokens = u.tokens == nullptr ? u.to.rows : *u.tokens;
  for_rows(tokens, u.to.columns * 2, [&](std::int64_t first, std::int64_t last) {
    float* sum = row_buffer(0, u.to.columns);
    float* scratch = row_buffer(1, u.to.columns);
    for (std::int64_t t = first; t < last; ++t) {
      const std::int32_t* rows = u.slot_row + t * u.top_k;
      bool any = false;
      for (std::int64_t i = 0; i < u.top_k; ++i) {
        if (rows[i] < 0) continue;
        if (any) {
          add_row(u.from, rows[i], sum, scratch);
        } else {
          load_row(u.from, rows[i], sum);
        }
        any = true;
      }
      if (!any) std::fill_n(sum, u.to.columns, 0.0F);
      store_row(u.to, t, sum);
      if (u.row_values == nullptr) continue;
      for (std::int64_t i = 0; i < u.top_k; ++i) {
        u.slot_values[t * u.top_k + i] = rows[i] < 0 ? 0.0F : u.row_values[rows[i]];
      }
    }
  });
}

}  // namespace orrery::kernels::cpu
