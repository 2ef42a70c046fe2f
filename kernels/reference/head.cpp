#include <limits>

#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {

void run(const Embedding& e) {
  for (std::int64_t r = 0; r < e.out.rows; ++r) {
    const std::int64_t row = e.tokens[r] - e.first_row;
    const bool here = row >= 0 && row < e.table.rows;
    for (std::int64_t c = 0; c < e.out.columns; ++c) {
      set_code(e.out, r, c, here ? element(e.table, row, c) : 0.0);
    }
  }
}

void run(const EmbeddingBackward& e) {
  for (std::int64_t row = 0; row < e.d_table.rows; ++row) {
    for (std::int64_t c = 0; c < e.d_table.columns; ++c) {
      double sum = 0;
      bool any = false;
      for (std::int64_t r = 0; r < e.d_out.rows; ++r) {
        if (e.tokens[r] - e.first_row != row) continue;
        sum += element(e.d_out, r, c);
        any = true;
      }
      if (any) {
        set_code(e.d_table, row, c, element(e.d_table, row, c) + sum);
      }
    }
  }
}

void run(const CrossEntropyPartial& p) {
  for (std::int64_t r = 0; r < p.logits.rows; ++r) {
    double largest = -std::numeric_limits<double>::infinity(), sum = 0;
    for (std::int64_t c = 0; c < p.logits.columns; ++c) {
      largest = std::max(largest, element(p.logits, r, c));
    }
    for (std::int64_t c = 0; c < p.logits.columns; ++c) {
      sum += std::exp(element(p.logits, r, c) - largest);
    }
    const std::int64_t target = p.targets[r] - p.first_column;
    const bool here = target >= 0 && target < p.logits.columns;
    p.partial[3 * r] = static_cast<float>(largest);
    p.partial[3 * r + 1] = static_cast<float>(sum);
    p.partial[3 * r + 2] = here ? static_cast<float>(element(p.logits, r, target)) : 0.0F;
  }
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
  for (std::int64_t r = 0; r < b.logits.rows; ++r) {
    for (std::int64_t c = 0; c < b.logits.columns; ++c) {
      double gradient = 0;
      if (b.targets[r] >= 0) {
        gradient = std::exp(element(b.logits, r, c) - b.lse[r]);
        if (c + b.first_column == b.targets[r]) gradient -= 1;
      }
      set_code(b.logits, r, c, gradient * b.scale);
    }
  }
}

}  // namespace orrery::kernels::reference
