#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {
namespace {

/// D[d_row + i, j] = sum over p of A[a_row + i, a_k + p] B[b_row + j, b_k + p] for i < m, p < k.
struct Product {
  std::int64_t m, k;
  std::int64_t a_row = 0, a_k = 0, b_row = 0, b_k = 0, d_row = 0;
};

/// `a` and `b`: all elements of the operands.
void multiply(const Gemm& c, const std::vector<double>& a, const std::vector<double>& b,
              const Product& p) {
  // From (row, k) to the next k, and to the next row, of an operand, however it is stored.
  const std::int64_t a_step = c.a_transposed ? c.a.columns : 1;
  const std::int64_t a_row = c.a_transposed ? 1 : c.a.columns;
  const std::int64_t b_step = c.b_transposed ? c.b.columns : 1;
  const std::int64_t b_row = c.b_transposed ? 1 : c.b.columns;
  for (std::int64_t i = 0; i < p.m; ++i) {
    for (std::int64_t j = 0; j < c.d.columns; ++j) {
      double sum = c.accumulate ? element(c.d, p.d_row + i, j) : 0;
      for (std::int64_t x = 0; x < p.k; ++x) {
        sum += a[static_cast<std::size_t>((p.a_row + i) * a_row + (p.a_k + x) * a_step)] *
               b[static_cast<std::size_t>((p.b_row + j) * b_row + (p.b_k + x) * b_step)];
      }
      set_element(c.d, p.d_row + i, j, sum);
    }
  }
}

}  // namespace

void run(const Gemm& call) {
  const std::int64_t k = call.a_transposed ? call.a.rows : call.a.columns;
  const std::int64_t n = call.d.columns;
  const std::vector<double> a = load(call.a), b = load(call.b);
  for (std::int64_t g = 0; g < call.groups; ++g) {
    switch (call.grouping) {
      case Grouping::none:
        multiply(call, a, b, {.m = call.d.rows, .k = k});
        break;
      case Grouping::rows:
        // Where B is stored (k, n), its matrices lie below each other along k.
        multiply(call, a, b,
                 {.m = call.group_rows[g],
                  .k = k,
                  .a_row = call.group_begin[g],
                  .b_row = call.b_transposed ? 0 : g * n,
                  .b_k = call.b_transposed ? g * k : 0,
                  .d_row = call.group_begin[g]});
        break;
      case Grouping::contraction: {
        const std::int64_t m = call.d.rows / call.groups;
        multiply(call, a, b,
                 {.m = m,
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
