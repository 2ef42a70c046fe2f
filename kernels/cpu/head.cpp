#include <cmath>
#include <numeric>

#include "kernels/cpu/clones.hpp"
#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

/// Columns whose exponentials are summed in FP32: a vocabulary's would lose three digits.
constexpr std::int64_t kSummed = 4096;

/// x = exp(x - lse) * scale.
ORRERY_CLONES
void softmax_of(float* x, float lse, float scale, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = exponential(x[i] - lse) * scale;
}

}  // namespace

void run(const Embedding& e) {
  const bool same = e.table.format == e.out.format;
  const auto bytes = static_cast<std::size_t>(element_bytes(1, e.out.columns, e.out.format));
  for_rows(e.out.rows, e.out.columns, [&](std::int64_t first, std::int64_t last) {
    float* row = row_buffer(0, e.out.columns);
    for (std::int64_t r = first; r < last; ++r) {
      const std::int64_t at = e.tokens[r] - e.first_row;
      if (at < 0 || at >= e.table.rows) {
        std::memset(row_begin(e.out, r), 0, bytes);
      } else if (same) {
        std::memcpy(row_begin(e.out, r), row_begin(e.table, at), bytes);
      } else {
        load_row(e.table, at, row);
        store_row(e.out, r, row);
      }
    }
  });
}

/// Rows of the batch by token, so that each row of the table has one thread and its sum an order.
void run(const EmbeddingBackward& e) {
  std::vector<std::int64_t> order(static_cast<std::size_t>(e.d_out.rows));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](std::int64_t a, std::int64_t b) { return e.tokens[a] < e.tokens[b]; });
  std::vector<std::size_t> begin;  // of each token's run
  for (std::size_t i = 0; i < order.size(); ++i) {
    if (i == 0 || e.tokens[order[i]] != e.tokens[order[i - 1]]) begin.push_back(i);
  }
  const auto runs = static_cast<std::int64_t>(begin.size());
  begin.push_back(order.size());
  for_rows(runs, e.d_out.columns, [&](std::int64_t first, std::int64_t last) {
    float* scratch = row_buffer(0, e.d_out.columns);
    for (std::int64_t k = first; k < last; ++k) {
      const std::size_t i0 = begin[static_cast<std::size_t>(k)];
      const std::int64_t at = e.tokens[order[i0]] - e.first_row;
      if (at < 0 || at >= e.d_table.rows) continue;
      for (std::size_t i = i0; i < begin[static_cast<std::size_t>(k) + 1]; ++i) {
        add_row(e.d_out, order[i], row_at<float>(e.d_table, at), scratch);
      }
    }
  });
}

void run(const CrossEntropyPartial& p) {
  for_rows(p.logits.rows, p.logits.columns, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t columns = p.logits.columns;
    float* x = row_buffer(0, columns);
    for (std::int64_t r = first; r < last; ++r) {
      load_row(p.logits, r, x);
      const std::int64_t target = p.targets[r] - p.first_column;
      const float largest = largest_of(x, columns);
      p.partial[3 * r] = largest;
      p.partial[3 * r + 2] = target >= 0 && target < columns ? x[target] : 0.0F;
      double sum = 0;
      for (std::int64_t c = 0; c < columns; c += kSummed) {
        sum += exp_minus(x + c, std::min(kSummed, columns - c), largest);
      }
      p.partial[3 * r + 1] = static_cast<float>(sum);
    }
  });
}

void run(const CrossEntropyLoss& l) {
  double loss = 0;
  for (std::int64_t r = 0; r < l.rows; ++r) {
    const auto part = [&](std::int64_t p) { return l.partials + 3 * (p * l.rows + r); };
    double largest = part(0)[0], sum = 0, target = 0;
    for (std::int64_t p = 1; p < l.parts; ++p) largest = std::max(largest, double{part(p)[0]});
    for (std::int64_t p = 0; p < l.parts; ++p) {
      sum += part(p)[1] * std::exp(part(p)[0] - largest);
      target += part(p)[2];
    }
    const double lse = largest + std::log(sum);
    l.lse[r] = static_cast<float>(lse);
    if (l.targets[r] >= 0) loss += lse - target;
  }
  *l.loss += loss;
}

void run(const CrossEntropyBackward& b) {
  for_rows(b.logits.rows, b.logits.columns, [&](std::int64_t first, std::int64_t last) {
    const std::int64_t columns = b.logits.columns;
    float* x = row_buffer(0, columns);
    for (std::int64_t r = first; r < last; ++r) {
      if (b.targets[r] < 0) {
        std::fill_n(x, columns, 0.0F);
      } else {
        load_row(b.logits, r, x);
        softmax_of(x, b.lse[r], b.scale, columns);
        const std::int64_t target = b.targets[r] - b.first_column;
        if (target >= 0 && target < columns) x[target] -= b.scale;
      }
      store_row(b.logits, r, x);
    }
  });
}

}  // namespace orrery::kernels::cpu
