#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {
namespace {

/// D[d_row + i, j] = sum over p of A[a_row + i, a_k + p] B[b_row + j, b_k + p] for i < m, p < k.
struct Product {
  std::int64_t m, k;
  std::int64_t a_row = 0, a_k = 0, b_row = 0, b_k = 0, d_row = 0;
};

void multiply(const Gemm& c, const Product& p) {
  // (row, k) of an operand, however it is stored.
  const auto a = [&](std::int64_t row, std::int64_t k) {
    return c.a_transposed ? element(c.a, k, row) : element(c.a, row, k);
  };
  const auto b = [&](std::int64_t row, std::int64_t k) {
    return c.b_transposed ? element(c.b, k, row) : element(c.b, row, k);
  };
  for (std::int64_t i = 0; i < p.m; ++i) {
    for (std::int64_t j = 0; j < c.d.columns; ++j) {
      double sum = c.accumulate ? element(c.d, p.d_row + i, j) : 0;
      for (std::int64_t x = 0; x < p.k; ++x) {
        sum += a(p.a_row + i, p.a_k + x) * b(p.b_row + j, p.b_k + x);
      }
      set_code(c.d, p.d_row + i, j, sum);
    }
  }
}

}  // namespace

void run(const Gemm& call) {
  const std::int64_t k = call.a_transposed ? call.a.rows : call.a.columns;
  const std::int64_t n = call.d.columns;
  for (std::int64_t g = 0; g < call.groups; ++g) {
    switch (call.grouping) {
      case Grouping::none:
        multiply(call, {.m = call.d.rows, .k = k});
        break;
      case Grouping::rows:
        // Where B is stored (k, n), its matrices lie below each other along k.
        multiply(call, {.m = call.group_rows[g],
                        .k = k,
                        .a_row = call.group_begin[g],
                        .b_row = call.b_transposed ? 0 : g * n,
                        .b_k = call.b_transposed ? g * k : 0,
                        .d_row = call.group_begin[g]});
        break;
      case Grouping::contraction: {
        const std::int64_t m = call.d.rows / call.groups;
        multiply(call, {.m = m,
                        .k = call.group_rows[g],
                        .a_k = call.group_begin[g],
                        .b_k = call.group_begin[g],
                        .d_row = g * m});
        break;
      }
    }
  }
}

}  // namespace orrery::kernels::reference
