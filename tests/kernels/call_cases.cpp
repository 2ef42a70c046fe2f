#include "tests/kernels/call_cases.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include <fmt/core.h>

#include "kernels/reference/reference.hpp"
#include "tests/kernels/host_operands.hpp"

namespace orrery::kernels {
namespace {

using Layout = CaseMemory::Layout;
using Ints = std::vector<std::int32_t>;
using Floats = std::vector<float>;

/// Of an FP32 sum, for each unit of the sum of its terms' magnitudes.
constexpr double kSum = 0x1p-20;
/// Of a few FP32 operations and an exponential.
constexpr double kFew = 0x1p-19;

/// Without gaps; columns of a wider matrix; at odd places.
constexpr Layout kTight{0, 0}, kColumns{64, 0}, kOdd{3, 1};
constexpr std::array<Layout, 3> kLayouts = {kTight, kColumns, kOdd};
constexpr std::array<Format, 2> kPlain = {Format::bf16, Format::fp32};

const char* name_of(const Layout& l) {
  return l.skew > 0 ? "odd" : l.gap > 0 ? "columns" : "tight";
}

class Cases {
 public:
  void add(const std::string& name, Layout layout, std::function<Call(CaseMemory&)> make) {
    cases_.push_back({name + " " + name_of(layout), layout, std::move(make)});
  }
  /// One layout after the other.
  void add(const std::string& name, std::function<Call(CaseMemory&)> make) {
    add(name, kLayouts[next_++ % kLayouts.size()], std::move(make));
  }
  void add_all(const std::string& name, const std::function<Call(CaseMemory&)>& make) {
    for (const Layout& layout : kLayouts) add(name, layout, make);
  }
  std::vector<CallCase> take() { return std::move(cases_); }

 private:
  std::vector<CallCase> cases_;
  std::size_t next_ = 0;
};

const std::int32_t* used(CaseMemory& m, std::int64_t rows) {
  return m.in(Ints{static_cast<std::int32_t>(rows)});
}

// ---- products ----

/// Groups' first rows and sizes.
struct Groups {
  Ints begin, rows;
  std::int64_t stored = 0;  ///< rows, with some that no group has behind the last
};

Groups groups_of(const Ints& rows, std::int64_t alignment) {
  Groups g{.begin = {}, .rows = rows};
  for (const std::int32_t r : rows) {
    g.begin.push_back(static_cast<std::int32_t>(g.stored));
    g.stored = (g.stored + r + alignment - 1) / alignment * alignment;
  }
  g.begin.push_back(static_cast<std::int32_t>(g.stored));
  g.stored += alignment;
  return g;
}

struct GemmCase {
  std::int64_t m, n, k;
  Format operands;
  Format result;
  bool a_transposed = false, b_transposed = false, accumulate = false;
  Scaling b_scaling = Scaling::blocks;
};

Tolerance of_product(const CaseMemory& m, Format operands, std::int64_t k, bool accumulate) {
  // Magnitudes are 0.5 in the mean.
  const double magnitude = 0.28 * static_cast<double>(k) + (accumulate ? 1 : 0);
  if (operands != Format::e4m3) return {.absolute = kSum * magnitude};
  const double error = m.tolerance().e4m3_product;
  return {.absolute = error * magnitude, .may_differ = error > kSum ? 1 : 0.03};
}

Matrix result_of(CaseMemory& m, std::int64_t rows, std::int64_t columns, Format format,
                 bool accumulate, Tolerance t) {
  return accumulate ? m.update(rows, columns, format, t) : m.out(rows, columns, format, t);
}

Matrix operand(CaseMemory& m, std::int64_t rows, std::int64_t columns, Format format,
               Scaling scaling) {
  return m.in(rows, columns, format, format == Format::e4m3 ? scaling : Scaling::none);
}

void add_products(Cases& cases) {
  std::vector<GemmCase> products;
  for (const Format f : kPlain) {
    for (const bool a : {false, true}) {
      for (const bool b : {false, true}) {
        products.push_back({5, 7, 9, f, Format::fp32, a, b});
        products.push_back({130, 72, 136, f, f, a, b});
        products.push_back({65, 129, 200, f, Format::fp32, a, b, true});
      }
    }
    products.push_back({1, 64, 64, f, f});
  }
  // DeepSeek-V3's: q_a, kv_a, gate, o's input gradient, a weight gradient.
  products.push_back({3, 1536, 7168, Format::bf16, Format::bf16});
  products.push_back({2, 576, 7168, Format::bf16, Format::bf16});
  products.push_back({9, 256, 7168, Format::bf16, Format::fp32});
  products.push_back({2, 1024, 7168, Format::bf16, Format::bf16, false, true});
  products.push_back({256, 512, 40, Format::bf16, Format::fp32, true, true, true});
  const Format e4m3 = Format::e4m3;
  products.push_back({7, 24, 200, e4m3, Format::bf16});
  products.push_back({128, 256, 384, e4m3, Format::bf16});
  products.push_back({33, 130, 640, e4m3, Format::fp32});
  products.push_back({3, 1536, 7168, e4m3, Format::bf16});
  products.push_back({16, 576, 2048, e4m3, Format::bf16});
  products.push_back({256, 192, 128, e4m3, Format::fp32, false, false, true, Scaling::rows});
  products.push_back({96, 130, 300, e4m3, Format::fp32, false, false, true, Scaling::rows});
  products.push_back({40, 72, 256, e4m3, Format::bf16, false, false, false, Scaling::rows});
  for (const GemmCase& g : products) {
    cases.add(fmt::format("gemm {} {}x{}x{} {}{} to {}{}", kernels::name_of(g.operands), g.m, g.n,
                          g.k, g.a_transposed ? "t" : "n", g.b_transposed ? "t" : "n",
                          kernels::name_of(g.result), g.accumulate ? " accumulate" : ""),
              [g](CaseMemory& m) -> Call {
                Gemm c;
                c.a = operand(m, g.a_transposed ? g.k : g.m, g.a_transposed ? g.m : g.k, g.operands,
                              Scaling::rows);
                c.b = operand(m, g.b_transposed ? g.k : g.n, g.b_transposed ? g.n : g.k, g.operands,
                              g.b_scaling);
                c.d = result_of(m, g.m, g.n, g.result, g.accumulate,
                                of_product(m, g.operands, g.k, g.accumulate));
                c.a_transposed = g.a_transposed;
                c.b_transposed = g.b_transposed;
                c.accumulate = g.accumulate;
                return c;
              });
  }
}

void add_grouped_products(Cases& cases) {
  struct Grouped {
    Ints rows;
    std::int64_t alignment, n, k;
    Format operands, result;
    bool b_transposed = false;
  };
  const Ints some = {5, 0, 130, 17};
  const std::vector<Grouped> by_rows = {
      {some, 1, 40, 72, Format::bf16, Format::bf16},
      {some, 1, 40, 72, Format::bf16, Format::bf16, true},
      {some, 8, 33, 50, Format::fp32, Format::fp32},
      {some, 128, 136, 256, Format::e4m3, Format::bf16},
      {{2, 0, 3}, 128, 256, 2048, Format::e4m3, Format::bf16},
      {{2, 3}, 1, 256, 7168, Format::bf16, Format::bf16, true},
  };
  for (const Grouped& g : by_rows) {
    cases.add(fmt::format("gemm {} of {} groups' rows {}x{}{}", kernels::name_of(g.operands),
                          g.rows.size(), g.n, g.k, g.b_transposed ? " nt" : ""),
              [g](CaseMemory& m) -> Call {
                const Groups groups = groups_of(g.rows, g.alignment);
                const auto count = static_cast<std::int64_t>(g.rows.size());
                Gemm c;
                c.a = operand(m, groups.stored, g.k, g.operands, Scaling::rows);
                c.b = operand(m, count * (g.b_transposed ? g.k : g.n), g.b_transposed ? g.n : g.k,
                              g.operands, Scaling::blocks);
                for (std::size_t i = 0; i < g.rows.size(); ++i) {
                  const std::int64_t end = groups.begin[i] + g.rows[i];
                  m.set_rows(c.a, end, groups.begin[i + 1] - end, 0);
                }
                c.d = m.out(groups.stored, g.n, g.result, of_product(m, g.operands, g.k, false));
                c.b_transposed = g.b_transposed;
                c.grouping = Grouping::rows;
                c.groups = count;
                c.group_begin = m.in(groups.begin);
                c.group_rows = m.in(groups.rows);
                return c;
              });
  }
  for (const Format f : {Format::bf16, Format::fp32, Format::e4m3}) {
    for (const bool accumulate : {false, true}) {
      cases.add(fmt::format("gemm {} of groups' contraction{}", kernels::name_of(f),
                            accumulate ? " accumulate" : ""),
                [f, accumulate, some](CaseMemory& m) -> Call {
                  const bool fp8 = f == Format::e4m3;
                  const Groups groups = groups_of(some, fp8 ? 128 : 1);
                  const std::int64_t height = 40, width = 72;
                  const auto count = static_cast<std::int64_t>(some.size());
                  Gemm c;
                  if (fp8) {
                    c.a = m.in(height, groups.stored, f, Scaling::rows);
                    c.b = m.in(width, groups.stored, f, Scaling::rows);
                    for (std::size_t g = 0; g < some.size(); ++g) {
                      const std::int64_t end = groups.begin[g] + some[g];
                      m.clear_columns(c.a, end, groups.begin[g + 1] - end);
                      m.clear_columns(c.b, end, groups.begin[g + 1] - end);
                    }
                  } else {
                    c.a = m.in(groups.stored, height, f);
                    c.b = m.in(groups.stored, width, f);
                    c.a_transposed = c.b_transposed = true;
                  }
                  c.d = result_of(m, count * height, width, Format::fp32, accumulate,
                                  of_product(m, f, 130, accumulate));
                  c.accumulate = accumulate;
                  c.grouping = Grouping::contraction;
                  c.groups = count;
                  c.group_begin = m.in(groups.begin);
                  c.group_rows = m.in(groups.rows);
                  return c;
                });
    }
  }
}

// ---- attention ----

struct AttentionCase {
  const char* name;
  AttentionShape shape;
  bool positions = false;
};

void add_attention(Cases& cases) {
  const auto shape = [](std::int64_t batch, std::int64_t heads, std::int64_t kv_heads,
                        std::int64_t q_len, std::int64_t kv_len, std::int64_t d_qk,
                        std::int64_t d_v, bool causal = true) {
    AttentionShape s{.batch = batch,
                     .heads = heads,
                     .kv_heads = kv_heads,
                     .q_len = q_len,
                     .kv_len = kv_len,
                     .d_qk = d_qk,
                     .d_v = d_v,
                     .causal = causal};
    s.scale = 1 / std::sqrt(static_cast<float>(d_qk));
    return s;
  };
  const std::vector<AttentionCase> list = {
      {"mla", shape(2, 4, 4, 40, 40, 192, 128)},
      {"mla of all heads", shape(1, 128, 128, 5, 5, 192, 128)},
      {"mla over tiles", shape(1, 1, 1, 200, 200, 192, 128)},
      {"gqa", shape(2, 8, 2, 33, 33, 64, 64)},
      {"gqa of 128", shape(1, 4, 1, 70, 70, 128, 128)},
      {"last queries", shape(1, 2, 1, 7, 50, 64, 64)},
      {"not causal", shape(2, 2, 2, 19, 30, 64, 64, false)},
      {"odd", shape(3, 3, 1, 5, 9, 12, 8)},
      {"positions", shape(2, 2, 1, 20, 45, 64, 32), true},
  };
  for (const Format f : kPlain) {
    for (const AttentionCase& a : list) {
      for (const bool backward : {false, true}) {
        cases.add(
            fmt::format("attention {} {} {}", backward ? "backward" : "forward",
                        kernels::name_of(f), a.name),
            [a, f, backward](CaseMemory& m) -> Call {
              AttentionShape s = a.shape;
              HostOperands host;
              // Rounded to the format.
              const auto draw = [&](std::int64_t rows, std::int64_t columns, double amplitude) {
                Matrix rounded = host.matrix(rows, columns, f), again = host.matrix(rows, columns);
                const Floats values = m.floats(rows * columns, 0.05 * amplitude, amplitude);
                reference::run(Copy{.from = host.matrix(rows, columns, values), .to = rounded});
                reference::run(Copy{.from = rounded, .to = again});
                return std::pair(rounded, floats_of(again));
              };
              const std::int64_t queries = s.batch * s.q_len, keys = s.batch * s.kv_len;
              const auto q = draw(queries, s.heads * s.d_qk, 2);
              const auto k = draw(keys, s.kv_heads * s.d_qk, 2);
              const auto v = draw(keys, s.kv_heads * s.d_v, 1);
              Ints positions;
              if (a.positions) {
                for (std::int64_t i = 0; i < s.q_len; ++i) {
                  positions.push_back(static_cast<std::int32_t>(m.integer(0, s.kv_len - 1)));
                }
                s.query_positions = m.in(positions);
              }
              const auto like = [&](const std::pair<Matrix, Floats>& x) {
                return m.in(x.first.rows, x.first.columns, f, x.second);
              };
              const double error = f == Format::bf16 ? m.tolerance().bf16_attention : kSum;
              const Tolerance t{.absolute = 4 * error, .may_differ = error > kSum ? 1 : 0.03};
              const std::int64_t lse = s.batch * s.heads * s.q_len;
              if (!backward) {
                AttentionForward c{.shape = s, .q = like(q), .k = like(k), .v = like(v)};
                c.out = m.out(queries, s.heads * s.d_v, f, t);
                c.lse = m.out_floats(lse, {.absolute = 8 * kSum, .relative = kFew});
                return c;
              }
              AttentionForward forward{.shape = s, .q = q.first, .k = k.first, .v = v.first};
              if (a.positions) forward.shape.query_positions = positions.data();
              forward.out = host.matrix(queries, s.heads * s.d_v, f);
              forward.lse = host.filled<float>(lse);
              reference::run(forward);
              Matrix out = host.matrix(queries, s.heads * s.d_v);
              reference::run(Copy{.from = forward.out, .to = out});
              AttentionBackward c{.shape = s, .q = like(q), .k = like(k), .v = like(v)};
              c.out = m.in(queries, s.heads * s.d_v, f, floats_of(out));
              c.d_out = m.in(queries, s.heads * s.d_v, f);
              c.lse = m.in(Floats(forward.lse, forward.lse + lse));
              // Sums over all that a key is seen by.
              Tolerance sums = t;
              sums.absolute *= 8 * static_cast<double>(s.heads / s.kv_heads);
              c.d_q = m.out(queries, s.heads * s.d_qk, f, sums);
              c.d_k = m.out(keys, s.kv_heads * s.d_qk, f, sums);
              c.d_v = m.out(keys, s.kv_heads * s.d_v, f, sums);
              c.workspace = m.scratch(attention_workspace_bytes(s));
              return c;
            });
      }
    }
  }
}

// ---- norms ----

void add_norms(Cases& cases) {
  struct Norm {
    std::int64_t rows, columns, segments;
    bool centred;
  };
  const std::vector<Norm> list = {
      {3, 7168, 1, false}, {70, 1536, 1, false}, {67, 512, 1, false}, {5, 128 * 24, 24, false},
      {65, 7, 1, false},   {6, 24, 3, true},     {130, 768, 1, true}, {1, 2, 1, false}};
  for (const Format f : kPlain) {
    for (const Norm& n : list) {
      const std::string size = fmt::format("{} {}x{} of {} segments{}", kernels::name_of(f), n.rows,
                                           n.columns, n.segments, n.centred ? " centred" : "");
      for (const int terms : {1, 2, 4}) {
        cases.add(fmt::format("norm_forward {} {} terms", size, terms), [=](CaseMemory& m) -> Call {
          NormForward c;
          for (int i = 0; i < terms; ++i) {
            // Of the first two, one stays away.
            c.terms[static_cast<std::size_t>(terms == 2 ? 2 * i : i)] = m.in(n.rows, n.columns, f);
          }
          const Tolerance t{.absolute = 4 * kFew, .relative = kFew};
          if (terms > 1) c.sum = m.out(n.rows, n.columns, f, {.absolute = kSum});
          c.gain = m.in(1, n.columns / n.segments, f);
          if (n.centred) c.bias = m.in(1, n.columns / n.segments, f);
          // The rounded sum may differ, and y with it.
          Tolerance of_y = t;
          if (terms > 1) of_y.absolute += f == Format::bf16 ? 0x1p-6 : 0;
          c.y = m.out(n.rows, n.columns, f, of_y);
          c.segments = n.segments;
          c.centred = n.centred;
          return c;
        });
      }
      for (const bool in_place : {false, true}) {
        cases.add(fmt::format("norm_backward {}{}", size, in_place ? " in place" : ""),
                  [=](CaseMemory& m) -> Call {
                    const std::int64_t width = n.columns / n.segments;
                    const auto sums = static_cast<double>(n.rows * n.segments);
                    const Tolerance t{.absolute = 16 * kFew, .relative = kFew};
                    NormBackward c;
                    c.x = m.in(n.rows, n.columns, f);
                    c.gain = m.in(1, width, f);
                    c.d_gain = m.update(m.floats(width), {.absolute = 2 * kSum * sums + kSum});
                    if (n.centred) {
                      c.d_bias = m.update(m.floats(width), {.absolute = kSum * sums + kSum});
                    }
                    if (in_place) {
                      c.d_x = m.update(n.rows, n.columns, f, t);
                      c.d_y = c.d_x;
                    } else {
                      c.d_y = m.in(n.rows, n.columns, f);
                      c.add = m.in(n.rows, n.columns, f);
                      c.d_x = m.out(n.rows, n.columns, f, t);
                    }
                    c.segments = n.segments;
                    c.centred = n.centred;
                    return c;
                  });
      }
    }
  }
  cases.add("norm_backward bf16 in place of add, of fp32 gradients", [](CaseMemory& m) -> Call {
    const Tolerance t{.absolute = 16 * kFew, .relative = kFew};
    NormBackward c{.d_y = m.in(9, 100, Format::fp32), .x = m.in(9, 100, Format::bf16)};
    c.gain = m.in(1, 100, Format::fp32);
    c.d_x = m.update(9, 100, Format::bf16, t);
    c.add = c.d_x;
    return c;
  });
}

// ---- rows and columns ----

void add_positions_and_copies(Cases& cases) {
  struct Turn {
    std::int64_t rows, heads, head_dim, offset, dim;
  };
  for (const Format f : kPlain) {
    for (const Turn& r : {Turn{4, 128, 192, 128, 64}, Turn{9, 1, 64, 0, 64},
                          Turn{40, 5, 128, 0, 128}, Turn{3, 2, 11, 3, 6}, Turn{2, 3, 5, 1, 2}}) {
      for (const bool inverse : {false, true}) {
        cases.add(fmt::format("rope {} {}x{}x{}{}", kernels::name_of(f), r.rows, r.heads,
                              r.head_dim, inverse ? " inverse" : ""),
                  [=](CaseMemory& m) -> Call {
                    Ints positions;
                    for (std::int64_t i = 0; i < r.rows; ++i) {
                      positions.push_back(static_cast<std::int32_t>(m.integer(0, 163'839)));
                    }
                    Rope c;
                    c.x = m.update(r.rows, r.heads * r.head_dim, f,
                                   {.absolute = kFew, .relative = kFew});
                    c.heads = r.heads;
                    c.head_dim = r.head_dim;
                    c.offset = r.offset;
                    c.dim = r.dim;
                    c.positions = m.in(positions);
                    c.inverse = inverse;
                    return c;
                  });
      }
    }
  }
  struct Heads {
    const char* name;
    std::int64_t rows, from, to, heads, width, from_offset, from_stride, to_offset, to_stride;
    bool sum = false;
  };
  const std::vector<Heads> copies = {
      {"key concat", 3, 128 * 256, 128 * 192, 128, 128, 0, 256, 0, 192},
      {"rotary key to all heads", 5, 64, 16 * 192, 16, 64, 0, 0, 128, 192},
      {"value", 3, 16 * 256, 16 * 128, 16, 128, 128, 256, 0, 128},
      {"rotary key gradient", 4, 128 * 192, 64, 128, 64, 128, 192, 0, 0, true},
      {"rotary key", 6, 576, 64, 1, 64, 512, 0, 0, 0},
      {"odd", 7, 23, 19, 3, 5, 2, 7, 1, 6},
      {"odd sum", 7, 23, 9, 3, 5, 2, 7, 3, 0, true},
  };
  for (const Format from : kPlain) {
    for (const Format to : kPlain) {
      for (const Heads& h : copies) {
        cases.add(fmt::format("head_copy {} {} to {}", h.name, kernels::name_of(from),
                              kernels::name_of(to)),
                  [=](CaseMemory& m) -> Call {
                    const Tolerance t = h.sum ? Tolerance{.absolute = 128 * kSum} : kExact;
                    HeadCopy c{.from = m.in(h.rows, h.from, from),
                               .to = m.out(h.rows, h.to, to, t)};
                    c.heads = h.heads;
                    c.width = h.width;
                    c.from_offset = h.from_offset;
                    c.from_stride = h.from_stride;
                    c.to_offset = h.to_offset;
                    c.to_stride = h.to_stride;
                    c.sum_heads = h.sum;
                    return c;
                  });
      }
      for (const std::int64_t columns : {7168, 33, 1}) {
        cases.add(fmt::format("copy {} to {} of {}", kernels::name_of(from), kernels::name_of(to),
                              columns),
                  [=](CaseMemory& m) -> Call {
                    return Copy{.from = m.in(9, columns, from),
                                .to = m.out(9, columns, to, kExact)};
                  });
      }
    }
    for (const int terms : {1, 2, 3, 4}) {
      for (const std::int64_t columns : {7168, 37}) {
        cases.add(fmt::format("add {} {} terms of {}", kernels::name_of(from), terms, columns),
                  [=](CaseMemory& m) -> Call {
                    const Tolerance t{.absolute = 4 * kSum};
                    Add c;
                    for (int i = 0; i < terms; ++i) {
                      // In place where there are two.
                      c.terms[static_cast<std::size_t>(3 - i)] = terms == 2 && i == 1
                                                                     ? m.update(5, columns, from, t)
                                                                     : m.in(5, columns, from);
                    }
                    c.out = terms == 2 ? c.terms[2] : m.out(5, columns, from, t);
                    return c;
                  });
      }
    }
  }
  cases.add("add of mixed formats", [](CaseMemory& m) -> Call {
    Add c{.terms = {m.in(6, 50, Format::bf16), m.in(6, 50, Format::fp32)}};
    c.out = m.out(6, 50, Format::bf16, {.absolute = kSum});
    return c;
  });
  for (const Scaling s : {Scaling::rows, Scaling::blocks}) {
    cases.add_all(s == Scaling::rows ? "copy e4m3 rows" : "copy e4m3 blocks",
                  [s](CaseMemory& m) -> Call {
                    return Copy{.from = m.in(150, 300, Format::e4m3, s),
                                .to = m.out(150, 300, Format::e4m3, kExact, s)};
                  });
  }
}

void add_activations(Cases& cases) {
  struct Sizes {
    std::int64_t rows, width, used;  ///< used < 0: not given
  };
  const std::vector<Sizes> list = {{3, 18432, -1}, {9, 2048, 6}, {40, 37, 33}, {3, 1, -1}};
  for (const Format f : kPlain) {
    for (const Activation kind : {Activation::swiglu, Activation::gelu}) {
      for (const Sizes& s : list) {
        const std::int64_t columns = kind == Activation::swiglu ? 2 * s.width : s.width;
        const std::string name =
            fmt::format("{} {} {}x{}", kind == Activation::swiglu ? "swiglu" : "gelu",
                        kernels::name_of(f), s.rows, s.width);
        // Rows of weight 0 are padding, whose elements nobody wrote.
        const auto weights = [s](CaseMemory& m, const std::vector<Matrix>& operands) {
          Floats w = m.floats(s.rows, 0.05, 1);
          for (const std::int64_t row : {std::int64_t{1}, s.used - 1}) {
            w[static_cast<std::size_t>(row)] = 0;
            for (const Matrix& operand : operands) m.set_rows(operand, row, 1, NAN);
          }
          return m.in(w);
        };
        const Tolerance t{.absolute = 4 * kFew, .relative = kFew};
        for (const bool fp8 : {false, true}) {
          cases.add(fmt::format("activation_forward {}{}", name, fp8 ? " to e4m3" : ""),
                    [=](CaseMemory& m) -> Call {
                      ActivationForward c;
                      c.kind = kind;
                      c.in = m.in(s.rows, columns, f, Scaling::none, 4);
                      c.out = m.out(s.rows, s.width, fp8 ? Format::e4m3 : f, t,
                                    fp8 ? Scaling::rows : Scaling::none);
                      if (s.used >= 0) {
                        c.used_rows = used(m, s.used);
                        c.row_weight = weights(m, {c.in});
                      }
                      return c;
                    });
        }
        for (const int again : {0, 1, 2}) {
          cases.add(fmt::format("activation_backward {}{}", name,
                                again == 0   ? ""
                                : again == 1 ? " again"
                                             : " again in e4m3"),
                    [=](CaseMemory& m) -> Call {
                      ActivationBackward c;
                      c.kind = kind;
                      c.in = m.in(s.rows, columns, f, Scaling::none, 4);
                      c.d_out = m.in(s.rows, s.width, f);
                      c.d_in = m.out(s.rows, columns, f, t);
                      if (again > 0) {
                        c.out_again = m.out(s.rows, s.width, again == 2 ? Format::e4m3 : f, t,
                                            again == 2 ? Scaling::rows : Scaling::none);
                      }
                      if (s.used >= 0) {
                        c.used_rows = used(m, s.used);
                        c.row_weight = weights(m, {c.in, c.d_out});
                      }
                      return c;
                    });
        }
      }
      cases.add(fmt::format("activation_backward in place {} {}", kernels::name_of(f),
                            kind == Activation::swiglu ? "swiglu" : "gelu"),
                [=](CaseMemory& m) -> Call {
                  ActivationBackward c;
                  c.kind = kind;
                  c.in = m.update(11, 200, f, {.absolute = 4 * kFew, .relative = kFew}, 4);
                  c.d_in = c.in;
                  c.d_out = m.in(11, kind == Activation::swiglu ? 100 : 200, f);
                  return c;
                });
    }
    for (const Sizes& s : list) {
      cases.add(fmt::format("row_dot {} {}x{}", kernels::name_of(f), s.rows, s.width),
                [=](CaseMemory& m) -> Call {
                  RowDot c{.a = m.in(s.rows, s.width, f), .b = m.in(s.rows, s.width, f)};
                  Floats weight = m.floats(s.rows, 0.25, 1);
                  weight[1] = 0;
                  c.row_weight = m.in(weight);
                  c.out = m.out_floats(
                      s.rows, {.absolute = 4 * kSum * 0.28 * static_cast<double>(s.width)});
                  if (s.used >= 0) c.used_rows = used(m, s.used);
                  return c;
                });
    }
  }
}

void add_conversions(Cases& cases) {
  struct Sizes {
    std::int64_t rows, columns, used;
  };
  const std::vector<Sizes> list = {
      {3, 7168, -1}, {9, 2048, 5}, {150, 270, -1}, {260, 130, 129}, {4, 2, 0}};
  for (const Format f : kPlain) {
    for (const Format small : {Format::e4m3, Format::e5m6}) {
      for (const Scaling scaling : {Scaling::rows, Scaling::blocks}) {
        for (const Sizes& s : list) {
          const std::string name =
              fmt::format("{} {} {} {}x{}", kernels::name_of(f), kernels::name_of(small),
                          scaling == Scaling::rows ? "rows" : "blocks", s.rows, s.columns);
          cases.add("quantize " + name, [=](CaseMemory& m) -> Call {
            // Magnitudes of many sizes, so that codes are subnormal too; a row of zeros.
            Floats values = m.floats(s.rows * s.columns, 0.5, 1);
            for (float& v : values) v *= static_cast<float>(std::exp2(m.uniform(-25, 0)));
            std::fill_n(values.begin(), s.columns, 0.0F);
            Quantize c{.from = m.in(s.rows, s.columns, f, values),
                       .to = m.out(s.rows, s.columns, small, {}, scaling)};
            if (s.used >= 0) c.used_rows = used(m, s.used);
            return c;
          });
          cases.add("dequantize " + name, [=](CaseMemory& m) -> Call {
            Dequantize c{.from = m.in(s.rows, s.columns, small, scaling),
                         .to = m.out(s.rows, s.columns, f, kExact)};
            if (s.used >= 0) c.used_rows = used(m, s.used);
            return c;
          });
        }
      }
    }
  }
  for (const Sizes& s : std::vector<Sizes>{{256, 384, -1},
                                           {200, 300, -1},
                                           {7, 130, -1},
                                           {128, 7168, -1},
                                           {384, 200, 130},
                                           {384, 256, 1},
                                           {300, 129, 290},
                                           {256, 128, 0},
                                           {256, 130, 256}}) {
    cases.add(fmt::format("transpose e4m3 rows {}x{} used {}", s.rows, s.columns, s.used),
              [=](CaseMemory& m) -> Call {
                Transpose c{.from = m.in(s.rows, s.columns, Format::e4m3, Scaling::rows),
                            .to = m.out(s.columns, s.rows, Format::e4m3, {}, Scaling::rows)};
                if (s.used >= 0) c.used_rows = used(m, s.used);
                return c;
              });
    if (s.used >= 0) continue;
    cases.add(
        fmt::format("transpose e4m3 blocks {}x{}", s.rows, s.columns), [=](CaseMemory& m) -> Call {
          return Transpose{.from = m.in(s.rows, s.columns, Format::e4m3, Scaling::blocks),
                           .to = m.out(s.columns, s.rows, Format::e4m3, kExact, Scaling::blocks)};
        });
  }
}

// ---- experts ----

struct RouterCase {
  std::int64_t tokens, experts, top_k, groups, group_limit;
  bool sigmoid, normalise, bias, balanced;
};

/// Whether any two of what is compared in a choice are too close for FP32 to tell apart.
bool has_ties(const RouterCase& r, const Floats& logits, const Floats& bias) {
  std::vector<double> biased, ranks;
  double sum = 0;
  for (const float x : logits) sum += std::exp(double{x});
  for (std::size_t e = 0; e < logits.size(); ++e) {
    const double x = logits[e];
    biased.push_back((r.sigmoid ? 1 / (1 + std::exp(-x)) : std::exp(x) / sum) +
                     (r.bias ? double{bias[e]} : 0));
  }
  const auto size = static_cast<std::ptrdiff_t>(r.experts / r.groups);
  for (std::ptrdiff_t g = 0; g < r.groups; ++g) {
    std::sort(biased.begin() + g * size, biased.begin() + (g + 1) * size);
    const double* end = biased.data() + (g + 1) * size;
    ranks.push_back(end[-1] + (r.bias && size > 1 ? end[-2] : 0));
  }
  const auto close = [&](std::vector<double>& values) {
    std::sort(values.begin(), values.end());
    return std::adjacent_find(values.begin(), values.end(), [&](double a, double b) {
             return b - a < (r.bias ? 2e-6 : 1e-5 * std::max(std::abs(a), std::abs(b)));
           }) != values.end();
  };
  return close(biased) || close(ranks);
}

void add_routers(Cases& cases) {
  const std::vector<RouterCase> list = {
      {6, 256, 8, 8, 4, true, true, true, false},     // DeepSeek-V3
      {5, 160, 6, 8, 3, false, false, false, false},  // DeepSeek-V2
      {7, 128, 8, 1, 1, false, true, false, false},   // Qwen3
      {300, 8, 2, 1, 1, false, true, false, false},   // Mixtral
      {4, 256, 8, 1, 1, true, true, true, true},     {9, 12, 3, 4, 2, true, false, false, false},
      {9, 12, 3, 12, 5, true, true, true, false},    {1, 1, 1, 1, 1, false, true, false, false},
      {3, 6, 6, 2, 2, false, false, true, false},
  };
  for (const Format f : kPlain) {
    for (const RouterCase& r : list) {
      const std::string name = fmt::format(
          "{} {} experts of {} groups{}{}{}{}", kernels::name_of(f), r.experts, r.groups,
          r.sigmoid ? " sigmoid" : " softmax", r.normalise ? " normalised" : "",
          r.bias ? " biased" : "", r.balanced ? " balanced" : "");
      cases.add("router " + name, [=](CaseMemory& m) -> Call {
        const Floats bias = m.floats(r.experts, 0.01, 0.2);
        Floats logits;
        // Multiples of 1/32 up to 4, which bf16 has.
        std::vector<std::int32_t> grid(256);
        std::iota(grid.begin(), grid.end(), -128);
        for (std::int64_t t = 0; t < r.tokens; ++t) {
          Floats row;
          do {
            std::shuffle(grid.begin(), grid.end(), m.random());
            row.clear();
            for (std::int64_t e = 0; e < r.experts; ++e) {
              row.push_back(static_cast<float>(grid[static_cast<std::size_t>(e)]) / 32);
            }
          } while (has_ties(r, row, bias));
          logits.insert(logits.end(), row.begin(), row.end());
        }
        Router c{.logits = m.in(r.tokens, r.experts, f, logits)};
        if (r.bias) c.bias = m.in(bias);
        c.sigmoid = r.sigmoid;
        c.normalise = r.normalise;
        c.balanced = r.balanced;
        c.scale = 2.5F;
        c.groups = r.groups;
        c.group_limit = r.group_limit;
        c.top_k = r.top_k;
        c.scores = m.out_floats(r.tokens * r.experts, {.relative = 2 * kFew});
        c.experts = m.out_ints(r.tokens * r.top_k);
        c.weights = m.out_floats(r.tokens * r.top_k, {.relative = 2 * kFew});
        return c;
      });
      cases.add("router_backward " + name, [=](CaseMemory& m) -> Call {
        RouterBackward c;
        c.sigmoid = r.sigmoid;
        c.normalise = r.normalise;
        c.scale = 2.5F;
        c.top_k = r.top_k;
        Floats scores = m.floats(r.tokens * r.experts, 0.1, 0.9);
        for (float& s : scores)
          s = std::abs(s) / (r.sigmoid ? 1.0F : static_cast<float>(r.experts));
        Ints experts, all(static_cast<std::size_t>(r.experts));
        std::iota(all.begin(), all.end(), 0);
        for (std::int64_t t = 0; t < r.tokens; ++t) {
          std::shuffle(all.begin(), all.end(), m.random());
          experts.insert(experts.end(), all.begin(), all.begin() + r.top_k);
        }
        c.scores = m.in(scores);
        c.experts = m.in(experts);
        c.d_weights = m.in(m.floats(r.tokens * r.top_k));
        // Normalised weights do not change with the sum of scores: under a softmax, gradients of
        // experts that were not chosen are what rounding leaves of 0.
        const bool cancels = !r.sigmoid && r.normalise;
        c.d_logits =
            m.out(r.tokens, r.experts, f,
                  {.absolute = 16 * kFew, .relative = kFew, .may_differ = cancels ? 1 : 0.03});
        return c;
      });
    }
  }
}

/// Tokens' choices among local experts and others (negative).
Ints choices(CaseMemory& m, std::int64_t tokens, std::int64_t top_k, std::int64_t local,
             std::int64_t others) {
  Ints result, all(static_cast<std::size_t>(local + others));
  std::iota(all.begin(), all.end(), 0);
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::shuffle(all.begin(), all.end(), m.random());
    for (std::int64_t i = 0; i < top_k; ++i) {
      const std::int32_t e = all[static_cast<std::size_t>(i)];
      result.push_back(e < local ? e : -1 - e);
    }
  }
  return result;
}

void add_routing(Cases& cases) {
  struct Map {
    std::int64_t tokens, received, top_k, local, others, alignment, capacity;
  };
  for (const Map& r :
       {Map{100, -1, 8, 32, 224, 1, 800}, Map{100, 77, 8, 8, 24, 128, 2000},
        Map{50, 0, 4, 5, 3, 128, 200}, Map{700, -1, 6, 160, 0, 1, 4200},
        Map{40, 40, 2, 8, 0, 1, 61}, Map{300, 290, 8, 4, 12, 128, 640}, Map{1, -1, 1, 1, 0, 8, 8},
        Map{3000, 2900, 8, 16, 0, 128, 24'000 + 16 * 128}}) {
    cases.add(
        fmt::format("routing_map {} tokens of {} to {} of {} experts by {}, room for {}",
                    r.received, r.tokens, r.local, r.local + r.others, r.alignment, r.capacity),
        kTight, [=](CaseMemory& m) -> Call {
          RoutingMap c;
          c.experts = m.in(choices(m, r.tokens, r.top_k, r.local, r.others));
          c.weights = m.in(m.floats(r.tokens * r.top_k));
          if (r.received >= 0) c.tokens = used(m, r.received);
          c.max_tokens = r.tokens;
          c.top_k = r.top_k;
          c.local_experts = r.local;
          c.alignment = r.alignment;
          c.capacity = r.capacity;
          c.group_begin = m.out_ints(r.local + 1);
          c.group_rows = m.out_ints(r.local);
          c.used_rows = m.out_ints(1);
          c.row_source = m.out_ints(r.capacity);
          c.row_weight = m.out_floats(r.capacity, kExact);
          c.slot_row = m.out_ints(r.tokens * r.top_k);
          c.overflow = m.out_ints(1);
          return c;
        });
  }

  struct Moved {
    std::int64_t tokens, rows, used, columns;
  };
  for (const Moved& p : {Moved{10, 40, 33, 7168}, Moved{300, 256, 256, 130}, Moved{5, 9, 0, 64},
                         Moved{3, 7, 5, 6}}) {
    const auto source = [p](CaseMemory& m) {
      Ints rows;
      for (std::int64_t r = 0; r < p.rows; ++r) {
        // One in four is padding; rows that are not used name no token.
        const bool padding = m.integer(0, 3) == 0;
        rows.push_back(r >= p.used ? 1 << 30
                       : padding   ? -1
                                   : static_cast<std::int32_t>(m.integer(0, p.tokens - 1)));
      }
      return m.in(rows);
    };
    for (const Format f : {Format::bf16, Format::fp32, Format::e4m3, Format::e5m6}) {
      const bool small = f == Format::e4m3 || f == Format::e5m6;
      const Scaling scaling = small ? Scaling::rows : Scaling::none;
      cases.add(fmt::format("permute {} {} rows of {}x{}", kernels::name_of(f), p.used, p.tokens,
                            p.columns),
                [=](CaseMemory& m) -> Call {
                  Permute c{.from = m.in(p.tokens, p.columns, f, scaling),
                            .to = m.out(p.rows, p.columns, f, kExact, scaling)};
                  c.row_source = source(m);
                  c.used_rows = used(m, p.used);
                  return c;
                });
    }
    for (const Format f : kPlain) {
      for (const bool values : {false, true}) {
        cases.add(
            fmt::format("unpermute {} {} tokens of {}x{}{}", kernels::name_of(f), p.tokens, p.rows,
                        p.columns, values ? " with values" : ""),
            [=](CaseMemory& m) -> Call {
              constexpr std::int64_t kTopK = 4;
              Ints slots;
              for (std::int64_t i = 0; i < p.tokens * kTopK; ++i) {
                // The first token has none.
                const bool none = i < kTopK || m.integer(0, 2) == 0;
                slots.push_back(none ? -1 : static_cast<std::int32_t>(m.integer(0, p.rows - 1)));
              }
              Unpermute c{.from = m.in(p.rows, p.columns, f),
                          .to = m.out(p.tokens, p.columns, f, {.absolute = 4 * kSum})};
              c.slot_row = m.in(slots);
              c.top_k = kTopK;
              if (values) {
                c.tokens = used(m, p.tokens - 1);
                c.row_values = m.in(m.floats(p.rows));
                c.slot_values = m.out_floats(p.tokens * kTopK, kExact);
              }
              return c;
            });
      }
    }
  }
}

// ---- edges ----

void add_edges(Cases& cases) {
  struct Table {
    std::int64_t tokens, rows, columns, first;
  };
  for (const Table& t :
       {Table{20, 40, 7168, 0}, Table{300, 50, 130, 25}, Table{7, 3, 5, 1}, Table{1, 1, 1, 0}}) {
    const auto tokens = [t](CaseMemory& m) {
      Ints result;
      for (std::int64_t i = 0; i < t.tokens; ++i) {
        result.push_back(static_cast<std::int32_t>(m.integer(0, t.first + t.rows + t.first)));
      }
      result[0] = static_cast<std::int32_t>(t.first);
      return m.in(result);
    };
    for (const Format f : kPlain) {
      const std::string name = fmt::format("{} {} of {}x{} from {}", kernels::name_of(f), t.tokens,
                                           t.rows, t.columns, t.first);
      cases.add("embedding " + name, [=](CaseMemory& m) -> Call {
        Embedding c{.table = m.in(t.rows, t.columns, f),
                    .out = m.out(t.tokens, t.columns, f, kExact)};
        c.tokens = tokens(m);
        c.first_row = t.first;
        return c;
      });
      cases.add("embedding_backward " + name, [=](CaseMemory& m) -> Call {
        EmbeddingBackward c{.d_out = m.in(t.tokens, t.columns, f)};
        c.d_table = m.update(t.rows, t.columns, Format::fp32,
                             {.absolute = kSum * static_cast<double>(t.tokens)});
        c.tokens = tokens(m);
        c.first_row = t.first;
        return c;
      });
    }
  }

  struct Vocabulary {
    std::int64_t rows, columns, first;
  };
  for (const Vocabulary& v : {Vocabulary{3, 129'280, 0}, Vocabulary{4, 16'160, 32'320},
                              Vocabulary{70, 37, 0}, Vocabulary{2, 1, 5}}) {
    // Some of this part, some of others, some without.
    const auto targets = [v](CaseMemory& m) {
      Ints result;
      for (std::int64_t r = 0; r < v.rows; ++r) {
        const std::int64_t target =
            r % 4 == 2 ? -1 : v.first + (r % 4 == 1 ? v.columns + r : m.integer(0, v.columns - 1));
        result.push_back(static_cast<std::int32_t>(target));
      }
      return result;
    };
    for (const Format f : kPlain) {
      const std::string name =
          fmt::format("{} {}x{} from {}", kernels::name_of(f), v.rows, v.columns, v.first);
      cases.add("cross_entropy_partial " + name, [=](CaseMemory& m) -> Call {
        CrossEntropyPartial c{.logits = m.in(v.rows, v.columns, f, Scaling::none, 8)};
        c.targets = m.in(targets(m));
        c.first_column = v.first;
        c.partial = m.out_floats(3 * v.rows, {.relative = 8 * kSum});
        return c;
      });
      cases.add("cross_entropy_backward " + name, [=](CaseMemory& m) -> Call {
        const Floats logits = m.floats(v.rows * v.columns, 0.05, 8);
        Floats lse;
        for (std::int64_t r = 0; r < v.rows; ++r) {
          double sum = 0;
          for (std::int64_t c = 0; c < v.columns; ++c) {
            sum += std::exp(logits[static_cast<std::size_t>(r * v.columns + c)]);
          }
          lse.push_back(static_cast<float>(std::log(sum)));
        }
        CrossEntropyBackward c;
        // Where the target is, what is left of 1 can be little.
        c.logits =
            m.update(v.rows, v.columns, f, logits, {.absolute = kFew / 64, .relative = 4 * kFew});
        c.targets = m.in(targets(m));
        c.lse = m.in(lse);
        c.first_column = v.first;
        c.scale = 1.0F / 64;
        return c;
      });
    }
  }
  for (const std::int64_t parts : {1, 8}) {
    for (const std::int64_t rows : {1, 5, 3000}) {
      cases.add(fmt::format("cross_entropy_loss {} parts of {} rows", parts, rows), kTight,
                [=](CaseMemory& m) -> Call {
                  CrossEntropyLoss c{.parts = parts, .rows = rows};
                  Floats partials;
                  for (std::int64_t i = 0; i < parts * rows; ++i) {
                    partials.push_back(static_cast<float>(m.uniform(2, 8)));
                    partials.push_back(static_cast<float>(m.uniform(1, 1000)));
                    // One part has the target.
                    partials.push_back(i / rows == i % parts ? static_cast<float>(m.uniform(-3, 2))
                                                             : 0.0F);
                  }
                  Ints targets;
                  for (std::int64_t r = 0; r < rows; ++r) targets.push_back(r % 3 == 2 ? -1 : 7);
                  c.partials = m.in(partials);
                  c.targets = m.in(targets);
                  c.lse = m.out_floats(rows, {.relative = kFew});
                  c.loss = m.update(std::vector<double>{3.25}, {.relative = kFew});
                  return c;
                });
    }
  }
}

// ---- optimizer ----

void add_optimizer(Cases& cases) {
  struct Adam {
    std::int64_t elements;
    Format moments, parameters;
    bool decay, separate;
    float max_norm;
    bool norm;
  };
  for (const Adam& a : {Adam{50'000, Format::fp32, Format::bf16, true, true, 1, true},
                        Adam{1001, Format::bf16, Format::bf16, false, true, 1, true},
                        Adam{40'003, Format::bf16, Format::fp32, true, true, 0, true},
                        Adam{16'384, Format::fp32, Format::fp32, true, false, 1, false},
                        Adam{7, Format::fp32, Format::bf16, true, true, 1e9F, true},
                        Adam{1, Format::bf16, Format::bf16, false, true, 0.5F, true}}) {
    cases.add(
        fmt::format("adamw {} moments {} parameters {}{}{}", a.elements,
                    kernels::name_of(a.moments), kernels::name_of(a.parameters),
                    a.decay ? " decay" : "", a.norm ? fmt::format(" norm {}", a.max_norm) : ""),
        [=](CaseMemory& m) -> Call {
          AdamW c{.elements = a.elements};
          const Floats gradient = m.floats(a.elements);
          double square_sum = 0;
          for (const float g : gradient) square_sum += double{g} * g;
          c.gradient = m.in(gradient);
          c.master = m.update(m.floats(a.elements), {.absolute = 0.01 * kFew, .relative = kFew});
          const auto moment = [&](bool second) -> void* {
            Floats values = m.floats(a.elements);
            if (second) {
              for (float& v : values) v *= v;
            }
            const Tolerance t{.absolute = kSum, .relative = kFew};
            if (a.moments == Format::fp32) return m.update(values, t);
            std::vector<std::uint16_t> codes(values.size());
            std::transform(values.begin(), values.end(), codes.begin(), bf16_of);
            return m.update(codes, t);
          };
          c.first_moment = moment(false);
          c.second_moment = moment(true);
          c.moments = a.moments;
          if (a.separate) {
            c.parameter =
                m.out(1, a.elements, a.parameters, {.absolute = 0.01 * kFew, .relative = kFew})
                    .data;
          }
          c.parameters = a.parameters;
          AdamScalars s{.learning_rate = 0.01F, .max_norm = a.max_norm};
          s.beta1_power = static_cast<float>(std::pow(0.9, 7));
          s.beta2_power = static_cast<float>(std::pow(0.95, 7));
          c.scalars = m.in(std::vector<AdamScalars>{s});
          if (a.norm) c.square_sum = m.in(std::vector<double>{square_sum});
          c.decay = a.decay;
          return c;
        });
  }
  for (const std::int64_t elements : {1, 1000, 16'384, 100'003}) {
    for (const bool accumulate : {false, true}) {
      cases.add(fmt::format("square_sum {}{}", elements, accumulate ? " accumulate" : ""), kTight,
                [=](CaseMemory& m) -> Call {
                  SquareSum c{.values = m.in(m.floats(elements)), .elements = elements};
                  c.out = m.update(std::vector<double>{m.uniform(1, 2)}, {.relative = 1e-12});
                  c.accumulate = accumulate;
                  return c;
                });
    }
  }
  for (const std::int64_t bytes : {1, 4096, 1'000'003}) {
    cases.add(fmt::format("fill {}", bytes), kTight, [=](CaseMemory& m) -> Call {
      return Fill{.data = m.out_bytes(bytes), .bytes = bytes};
    });
    cases.add(fmt::format("loopback {}", bytes), kTight, [=](CaseMemory& m) -> Call {
      std::vector<std::uint8_t> from;
      for (std::int64_t i = 0; i < bytes; ++i) {
        from.push_back(static_cast<std::uint8_t>(m.integer(0, 254)));
      }
      return Loopback{.from = m.in(from), .to = m.out_bytes(bytes), .bytes = bytes};
    });
  }
}

}  // namespace

std::vector<CallCase> call_cases() {
  Cases cases;
  add_products(cases);
  add_grouped_products(cases);
  add_attention(cases);
  add_norms(cases);
  add_positions_and_copies(cases);
  add_activations(cases);
  add_conversions(cases);
  add_routers(cases);
  add_routing(cases);
  add_edges(cases);
  add_optimizer(cases);
  return cases.take();
}

}  // namespace orrery::kernels
