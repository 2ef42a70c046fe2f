#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {

void run(const Quantize& q) {
  store(q.to, rows_in_use(q.used_rows, q.from),
        [&](std::int64_t r, std::int64_t c) { return element(q.from, r, c); });
}

void run(const Dequantize& q) {
  store(q.to, rows_in_use(q.used_rows, q.from),
        [&](std::int64_t r, std::int64_t c) { return element(q.from, r, c); });
}

void run(const Transpose& t) {
  if (t.from.scaling == Scaling::blocks) {
    for (std::int64_t r = 0; r < t.from.rows; ++r) {
      for (std::int64_t c = 0; c < t.from.columns; ++c) {
        set_code(t.to, c, r, code_at(t.from, r, c));
        *scale_at(t.to, c, r) = *scale_at(t.from, r, c);
      }
    }
    return;
  }
  const std::int64_t used = rows_in_use(t.used_rows, t.from);
  const std::int64_t touched = std::min((used + kTile - 1) / kTile * kTile, t.from.rows);
  Matrix to = t.to;
  to.columns = touched;
  store(to, to.rows,
        [&](std::int64_t r, std::int64_t c) { return c < used ? element(t.from, c, r) : 0.0; });
}

}  // namespace orrery::kernels::reference
