#pragma once
// Calls of every kind that the streaming kernels of kernels/cuda run, in the shapes that take
// different ways through them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "arena.hpp"
#include "kernels/call.hpp"

namespace orrery::kernels::streaming {

/// Binds a call to operands of an arena: the same operands each time.
using CallCases = std::vector<std::function<Call(Arena&)>>;

inline constexpr Format kF32 = Format::fp32;
inline constexpr Format kBf16 = Format::bf16;
inline constexpr Format kE4m3 = Format::e4m3;
inline constexpr Format kE5m6 = Format::e5m6;
inline constexpr Tolerance kExact{};

struct NormCase {
  std::int64_t rows, columns, segments;
  bool centred;
  Format format;
  int terms;
  bool sum;
  std::int64_t gap, offset;
};
// A warp, a part of a block and a whole one for a row; segments; rows that are held and that are
// read again; rows that are not aligned.
inline const std::vector<NormCase> kNorms = {
    {5, 64, 1, false, kBf16, 1, false, 0, 0},   {9, 7168, 1, false, kBf16, 3, true, 0, 0},
    {33, 512, 4, false, kBf16, 1, false, 8, 0}, {4, 1536, 1, true, kF32, 2, true, 0, 0},
    {3, 8200, 1, true, kBf16, 1, false, 0, 0},  {7, 100, 1, false, kBf16, 2, true, 3, 1},
    {7, 300, 3, true, kF32, 1, true, 5, 1},     {2, 40000, 1, true, kBf16, 4, true, 0, 0},
    {130, 96, 3, false, kBf16, 1, false, 0, 0},
};

inline void add_norm_forward(CallCases& cases) {
  for (const NormCase& n : kNorms) {
    cases.push_back([=](Arena& a) -> Call {
      NormForward c{.segments = n.segments, .centred = n.centred};
      for (int i = 0; i < n.terms; ++i) {
        c.terms[static_cast<std::size_t>(i)] =
            a.matrix(n.rows, n.columns, i == 1 ? kF32 : n.format, Scaling::none, n.gap, n.offset);
      }
      if (n.sum) {
        c.sum = a.matrix(n.rows, n.columns, n.format, Scaling::none, n.gap, n.offset);
        a.output(c.sum);
      }
      c.gain = a.matrix(1, n.columns / n.segments, kF32);
      if (n.centred) c.bias = a.matrix(1, n.columns / n.segments, kF32);
      c.y = a.matrix(n.rows, n.columns, n.format, Scaling::none, n.gap, n.offset);
      // A sum that rounds the other way moves y by one rounding of x.
      a.output(c.y, n.format == kBf16 ? Tolerance{0x1p-7, 0.03} : Tolerance{1e-5, 1e-5});
      return c;
    });
  }
}

inline void add_norm_backward(CallCases& cases) {
  for (const NormCase& n : kNorms) {
    if (n.columns == 40'000) continue;  // its sums over groups take half a minute in the emulator
    cases.push_back([=](Arena& a) -> Call {
      const auto rows = [&](Format format) {
        return a.matrix(n.rows, n.columns, format, Scaling::none, n.gap, n.offset);
      };
      const std::int64_t width = n.columns / n.segments;
      NormBackward c{.d_y = rows(n.format),
                     .x = rows(n.format),
                     .gain = a.matrix(1, width, kF32),
                     .segments = n.segments,
                     .centred = n.centred};
      if (n.sum) c.add = rows(kF32);
      c.d_x = n.terms == 2 ? c.d_y : rows(n.format);
      c.d_gain =
          a.array<float>(width, [](std::int64_t i) { return 0.01F * static_cast<float>(i); });
      a.output(c.d_x, {rounding_of(n.format).relative, 1e-5});
      a.output(c.d_gain, width, {1e-5, 1e-4});
      if (n.centred) {
        c.d_bias = a.array<float>(width, [](std::int64_t) { return 1.0F; });
        a.output(c.d_bias, width, {1e-5, 1e-4});
      }
      return c;
    });
  }
}

inline void add_rope(CallCases& cases) {
  struct RopeCase {
    std::int64_t heads, head_dim, offset, dim;
    Format format;
    bool inverse;
  };
  for (const RopeCase& r : std::vector<RopeCase>{{3, 192, 128, 64, kBf16, false},
                                                 {3, 70, 3, 6, kF32, false},
                                                 {40, 192, 128, 64, kBf16, true},
                                                 {1, 64, 0, 64, kF32, true}}) {
    cases.push_back([=](Arena& a) -> Call {
      Rope c{.x = a.matrix(11, r.heads * r.head_dim, r.format, Scaling::none, 8),
             .heads = r.heads,
             .head_dim = r.head_dim,
             .offset = r.offset,
             .dim = r.dim,
             .positions = a.array<std::int32_t>(11, [](std::int64_t i) { return 15'000 * i; }),
             .inverse = r.inverse};
      a.output(c.x, {rounding_of(r.format).relative, 2e-6});
      return c;
    });
  }
}

inline void add_head_copy(CallCases& cases) {
  struct HeadCase {
    std::int64_t width, from_stride, to_offset;
    bool sum;
    Format from;
  };
  for (const HeadCase& h : std::vector<HeadCase>{{64, 192, 32, false, kBf16},
                                                 {5, 192, 3, false, kF32},
                                                 {64, 0, 32, false, kBf16},
                                                 {64, 192, 32, true, kBf16},
                                                 {24, 192, 32, true, kF32},
                                                 {7, 192, 1, true, kF32}}) {
    cases.push_back([=](Arena& a) -> Call {
      HeadCopy c{.from = a.matrix(13, 12 * 192 + 128, h.from),
                 .to = a.matrix(13, 12 * 128 + 96, kBf16),
                 .heads = 12,
                 .width = h.width,
                 .from_offset = 128,
                 .from_stride = h.from_stride,
                 .to_offset = h.to_offset,
                 .to_stride = 128,
                 .sum_heads = h.sum};
      a.output(c.to, h.sum ? rounding_of(kBf16) : kExact);
      return c;
    });
  }
}

struct ActivationCase {
  std::int64_t rows, columns;
  Activation kind;
  Format in, out;
  bool used, weighted;
  std::int64_t offset;
};
inline const std::vector<ActivationCase> kActivations = {
    {40, 256, Activation::swiglu, kBf16, kBf16, true, true, 0},
    {40, 256, Activation::swiglu, kBf16, kE4m3, true, true, 0},
    {5, 200, Activation::swiglu, kF32, kE4m3, false, false, 0},
    {9, 77, Activation::swiglu, kBf16, kE4m3, false, true, 1},
    {9, 333, Activation::gelu, kBf16, kF32, true, false, 1},
    {17, 128, Activation::gelu, kF32, kBf16, false, true, 0},
};

/// Scales of rows < used are outputs too.
inline void output_with_scales(Arena& a, const Matrix& m, std::int64_t used) {
  a.output(m, {rounding_of(m.format).relative, m.format == kE4m3 ? 0x1p-9 : 1e-6});
  if (m.scaling != Scaling::rows) return;
  a.output({.data = m.scales,
            .rows = (m.columns + kTile - 1) / kTile,
            .columns = used,
            .pitch = m.scale_pitch},
           {1e-5, 0});
}

inline const float* weights_of(Arena& a, std::int64_t rows) {
  return a.array<float>(rows, [](std::int64_t i) { return 0.1F * static_cast<float>(i); });
}

inline void add_activation_forward(CallCases& cases) {
  for (const ActivationCase& k : kActivations) {
    cases.push_back([=](Arena& a) -> Call {
      const std::int64_t used = k.used ? k.rows * 2 / 3 : k.rows;
      ActivationForward c{
          .kind = k.kind,
          .in = a.matrix(k.rows, k.columns * (k.kind == Activation::swiglu ? 2 : 1), k.in,
                         Scaling::none, 0, k.offset),
          .out = a.matrix(k.rows, k.columns, k.out, k.out == kE4m3 ? Scaling::rows : Scaling::none,
                          k.offset)};
      if (k.weighted) c.row_weight = weights_of(a, k.rows);
      if (k.used) c.used_rows = a.one(static_cast<std::int32_t>(used));
      output_with_scales(a, c.out, used);
      return c;
    });
  }
}

inline void add_activation_backward(CallCases& cases) {
  for (const ActivationCase& k : kActivations) {
    cases.push_back([=](Arena& a) -> Call {
      const std::int64_t used = k.used ? k.rows * 2 / 3 : k.rows;
      const std::int64_t in_columns = k.columns * (k.kind == Activation::swiglu ? 2 : 1);
      ActivationBackward c{.kind = k.kind,
                           .in = a.matrix(k.rows, in_columns, k.in, Scaling::none, 0, k.offset),
                           .d_out = a.matrix(k.rows, k.columns, k.in)};
      c.d_in = k.weighted ? c.in : a.matrix(k.rows, in_columns, kF32);
      c.out_again = a.matrix(k.rows, k.columns, k.out,
                             k.out == kE4m3 ? Scaling::rows : Scaling::none, k.offset);
      if (k.weighted) c.row_weight = weights_of(a, k.rows);
      if (k.used) c.used_rows = a.one(static_cast<std::int32_t>(used));
      a.output(c.d_in, {rounding_of(c.d_in.format).relative, 1e-5});
      output_with_scales(a, c.out_again, used);
      return c;
    });
  }
}

inline void add_row_dot(CallCases& cases) {
  for (const std::int64_t columns : {264, 77}) {
    cases.push_back([=](Arena& a) -> Call {
      RowDot c{.a = a.matrix(20, columns, kBf16),
               .b = a.matrix(20, columns, kF32),
               .row_weight = a.array<float>(
                   20, [](std::int64_t i) { return 0.3F * static_cast<float>(i % 5); }),
               .out = a.array<float>(20),
               .used_rows = a.one<std::int32_t>(17)};
      a.output(c.out, 17, {1e-4, 1e-4});
      return c;
    });
  }
}

struct TileCase {
  std::int64_t rows, columns;
  Format plain, tiles;
  Scaling scaling;
  bool used;
  std::int64_t gap;
};
inline const std::vector<TileCase> kTiles = {
    {37, 384, kBf16, kE4m3, Scaling::rows, true, 0},
    {37, 200, kF32, kE4m3, Scaling::rows, false, 5},
    {300, 264, kBf16, kE4m3, Scaling::blocks, false, 0},
    {300, 201, kF32, kE4m3, Scaling::blocks, false, 3},
    {19, 256, kBf16, kE5m6, Scaling::rows, false, 0},
    {19, 102, kF32, kE5m6, Scaling::rows, true, 2},
};

inline void add_quantize_rounds_like_the_reference(CallCases& cases) {
  for (const TileCase& t : kTiles) {
    cases.push_back([=](Arena& a) -> Call {
      Quantize c{.from = a.matrix(t.rows, t.columns, t.plain, Scaling::none, t.gap),
                 .to = a.matrix(t.rows, t.columns, t.tiles, t.scaling, t.gap)};
      if (t.used) c.used_rows = a.one(static_cast<std::int32_t>(t.rows * 2 / 3));
      return c;
    });
  }
}

inline void add_quantize_takes_zeros_and_tiny_numbers(CallCases& cases) {
  cases.push_back([](Arena& a) -> Call {
    const auto value = [](std::int64_t i) {
      const std::int64_t tile = i / 128 % 3;
      const int exponent = tile == 1 ? -140 : 110;  // -140: no normal numbers
      return tile == 0 ? 0.0F : std::ldexp(static_cast<float>(i % 128), exponent);
    };
    return Quantize{.from = a.matrix(4, 384, kF32, Scaling::none, 0, 0, value),
                    .to = a.matrix(4, 384, kE4m3, Scaling::rows)};
  });
}

inline void add_dequantize(CallCases& cases) {
  for (const TileCase& t : kTiles) {
    cases.push_back([=](Arena& a) -> Call {
      Dequantize c{.from = a.matrix(t.rows, t.columns, t.tiles, t.scaling, t.gap),
                   .to = a.matrix(t.rows, t.columns, t.plain, Scaling::none, t.gap)};
      if (t.used) c.used_rows = a.one(static_cast<std::int32_t>(t.rows * 2 / 3));
      a.output(c.to, {1e-6, 0});
      return c;
    });
  }
}

inline void add_transpose(CallCases& cases) {
  struct TransposeCase {
    std::int64_t rows, columns;
    Scaling scaling;
    std::int64_t used, gap;
  };
  for (const TransposeCase& t : std::vector<TransposeCase>{{256, 384, Scaling::rows, -1, 0},
                                                           {300, 200, Scaling::rows, -1, 0},
                                                           {300, 200, Scaling::rows, 130, 0},
                                                           {77, 45, Scaling::rows, 40, 3},
                                                           {256, 128, Scaling::blocks, -1, 0},
                                                           {200, 300, Scaling::blocks, -1, 4},
                                                           {130, 50, Scaling::blocks, -1, 1}}) {
    cases.push_back([=](Arena& a) -> Call {
      Transpose c{.from = a.matrix(t.rows, t.columns, kE4m3, t.scaling, t.gap),
                  .to = a.matrix(t.columns, t.rows, kE4m3, t.scaling, t.gap)};
      if (t.used >= 0) c.used_rows = a.one(static_cast<std::int32_t>(t.used));
      return c;
    });
  }
}

inline void add_add_in_place_and_not(CallCases& cases) {
  for (const std::int64_t columns : {264, 33}) {
    for (const bool in_place : {false, true}) {
      cases.push_back([=](Arena& a) -> Call {
        Add c{.terms = {a.matrix(21, columns, kF32), a.matrix(21, columns, kBf16, Scaling::none, 8),
                        Matrix{}, a.matrix(21, columns, kF32)}};
        c.out = in_place ? c.terms[0] : a.matrix(21, columns, kBf16);
        a.output(c.out);
        return c;
      });
    }
  }
}

inline void add_copy(CallCases& cases) {
  struct CopyCase {
    Format from, to;
    Scaling scaling;
    std::int64_t gap;
  };
  for (const CopyCase& k : std::vector<CopyCase>{{kF32, kBf16, Scaling::none, 0},
                                                 {kBf16, kF32, Scaling::none, 8},
                                                 {kE4m3, kE4m3, Scaling::rows, 16},
                                                 {kE4m3, kE4m3, Scaling::blocks, 3},
                                                 {kBf16, kBf16, Scaling::none, 3},
                                                 {kF32, kF32, Scaling::none, 0}}) {
    cases.push_back([=](Arena& a) -> Call {
      return Copy{.from = a.matrix(150, 208, k.from, k.scaling),
                  .to = a.matrix(150, 208, k.to, k.scaling, k.gap)};
    });
  }
}

inline void add_router(CallCases& cases) {
  struct RouterCase {
    std::int64_t experts, groups, group_limit, top_k;
    bool bias, sigmoid, normalise, balanced;
    Format logits;
  };
  for (const RouterCase& r : std::vector<RouterCase>{
           {256, 8, 4, 8, true, true, true, false, kF32},     // DeepSeek-V3
           {160, 8, 3, 6, false, false, false, false, kF32},  // DeepSeek-V2
           {256, 8, 4, 8, true, true, true, false, kBf16},
           {16, 1, 1, 2, false, false, true, false, kF32},
           {256, 8, 4, 8, true, true, true, true, kF32},
           {72, 36, 3, 5, true, true, true, false, kF32},  // more groups than lanes
           {64, 1, 1, 40, false, true, true, false, kF32}}) {
    cases.push_back([=](Arena& a) -> Call {
      constexpr std::int64_t kTokens = 37;
      Router c{.logits = a.matrix(kTokens, r.experts, r.logits),
               .sigmoid = r.sigmoid,
               .normalise = r.normalise,
               .balanced = r.balanced,
               .scale = 2.5F,
               .groups = r.groups,
               .group_limit = r.group_limit,
               .top_k = r.top_k,
               .scores = a.array<float>(kTokens * r.experts),
               .experts = a.array<std::int32_t>(kTokens * r.top_k),
               .weights = a.array<float>(kTokens * r.top_k)};
      if (r.bias) {
        c.bias = a.array<float>(r.experts, [&](std::int64_t) { return 0.1F * a.normal(); });
      }
      a.output(c.scores, kTokens * r.experts, {1e-5, 1e-7});
      a.output(c.weights, kTokens * r.top_k);
      return c;
    });
  }
}

inline void add_router_gives_ties_to_the_smaller_expert(CallCases& cases) {
  cases.push_back([](Arena& a) -> Call {
    Router c{.logits = a.matrix(5, 64, kF32, Scaling::none, 0, 0,
                                [](std::int64_t i) { return i % 64 % 3 == 0 ? 1.0F : 0.0F; }),
             .groups = 4,
             .group_limit = 2,
             .top_k = 6,
             .scores = a.array<float>(5 * 64),
             .experts = a.array<std::int32_t>(5 * 6),
             .weights = a.array<float>(5 * 6)};
    a.output(c.scores, 5 * 64);
    a.output(c.weights, 5 * 6);
    return c;
  });
}

inline void add_router_backward(CallCases& cases) {
  for (const bool sigmoid : {false, true}) {
    for (const bool normalise : {false, true}) {
      cases.push_back([=](Arena& a) -> Call {
        constexpr std::int64_t kTokens = 37;
        constexpr std::int64_t kExperts = 160;
        RouterBackward c{
            .sigmoid = sigmoid,
            .normalise = normalise,
            .scale = 2.5F,
            .top_k = 6,
            .scores = a.array<float>(
                kTokens * kExperts,
                [&](std::int64_t) { return (sigmoid ? 1.0F : 0.05F) * (0.01F + a.uniform()); }),
            .experts =
                a.array<std::int32_t>(kTokens * 6, [](std::int64_t i) { return i * 7 % kExperts; }),
            .d_weights = a.array<float>(kTokens * 6, [&](std::int64_t) { return a.normal(); }),
            .d_logits = a.matrix(kTokens, kExperts, sigmoid ? kF32 : kBf16)};
        a.output(c.d_logits);
        return c;
      });
    }
  }
}

inline void add_routing_map(CallCases& cases) {
  struct MapCase {
    std::int64_t max_tokens, tokens, experts, alignment, capacity;
  };
  constexpr std::int64_t kTopK = 8;
  for (const MapCase& m : std::vector<MapCase>{{3000, 3000, 4, 128, 30'000},
                                               {500, 500, 70, 128, 20'000},
                                               {500, 333, 4, 128, 6000},
                                               {500, 500, 4, 1, 6000},
                                               {500, 500, 4, 128, 400},
                                               {500, 500, 4, 128, 1000},
                                               {500, 0, 4, 128, 1000}}) {
    cases.push_back([=](Arena& a) -> Call {
      return RoutingMap{
          .experts = a.array<std::int32_t>(
              m.max_tokens * kTopK,
              [&](std::int64_t) {
                const std::int64_t expert = a.below(2 * m.experts) - m.experts;
                return expert == 2 ? 1 : std::max<std::int64_t>(expert, -1);  // 2 gets none
              }),
          .weights =
              a.array<float>(m.max_tokens * kTopK, [&](std::int64_t) { return a.uniform(); }),
          .tokens = m.tokens == m.max_tokens ? nullptr : a.one(static_cast<std::int32_t>(m.tokens)),
          .max_tokens = m.max_tokens,
          .top_k = kTopK,
          .local_experts = m.experts,
          .alignment = m.alignment,
          .capacity = m.capacity,
          .group_begin = a.array<std::int32_t>(m.experts + 1),
          .group_rows = a.array<std::int32_t>(m.experts),
          .used_rows = a.array<std::int32_t>(1),
          .row_source = a.array<std::int32_t>(m.capacity),
          .row_weight = a.array<float>(m.capacity),
          .slot_row = a.array<std::int32_t>(m.max_tokens * kTopK),
          .overflow = a.array<std::int32_t>(1)};
    });
  }
}

inline void add_permute(CallCases& cases) {
  for (const Format format : {kBf16, kE4m3, kE5m6, kF32}) {
    for (const std::int64_t columns : {256, 38}) {
      cases.push_back([=](Arena& a) -> Call {
        const Scaling scaling = format == kE4m3 || format == kE5m6 ? Scaling::rows : Scaling::none;
        return Permute{
            .from = a.matrix(50, columns, format, scaling),
            .to = a.matrix(120, columns, format, scaling, 8),
            .row_source = a.array<std::int32_t>(
                120, [&](std::int64_t) { return std::max<std::int64_t>(a.below(60) - 10, -1); }),
            .used_rows = a.one<std::int32_t>(101)};
      });
    }
  }
}

inline void add_unpermute(CallCases& cases) {
  for (const std::int64_t top_k : {1, 3, 8}) {
    cases.push_back([=](Arena& a) -> Call {
      const std::int64_t columns = top_k == 3 ? 37 : 256;
      Unpermute c{.from = a.matrix(120, columns, kBf16),
                  .to = a.matrix(40, columns, top_k == 8 ? kF32 : kBf16),
                  .slot_row = a.array<std::int32_t>(
                      40 * top_k,
                      [&](std::int64_t) { return std::max<std::int64_t>(a.below(180) - 60, -1); }),
                  .top_k = top_k};
      if (top_k > 1) {
        c.tokens = a.one<std::int32_t>(29);
        c.row_values = a.array<float>(120, [&](std::int64_t) { return a.normal(); });
        c.slot_values = a.array<float>(40 * top_k);
      }
      return c;
    });
  }
}

inline void add_embedding(CallCases& cases) {
  for (const std::int64_t columns : {256, 35}) {
    cases.push_back([=](Arena& a) -> Call {
      return Embedding{
          .table = a.matrix(60, columns, kF32),
          .out = a.matrix(90, columns, kBf16),
          .tokens = a.array<std::int32_t>(90, [&](std::int64_t) { return a.below(81); }),
          .first_row = 10};
    });
  }
}

// Tokens that come once, and some that come all the time.
inline void add_embedding_backward(CallCases& cases) {
  for (const std::int64_t columns : {256, 2056, 35}) {
    cases.push_back([=](Arena& a) -> Call {
      const std::int64_t positions = columns == 256 ? 1500 : 90;
      const EmbeddingBackward c{
          .d_out = a.matrix(positions, columns, kBf16),
          .d_table = a.matrix(60, columns, kF32),
          .tokens = a.array<std::int32_t>(
              positions, [&](std::int64_t) { return 3 * a.below(columns == 256 ? 20 : 300); }),
          .first_row = 10};
      a.output(c.d_table, {1e-5, 1e-5});
      return c;
    });
  }
}

inline void add_cross_entropy(CallCases& cases) {
  for (const std::int64_t columns : {9001, 40'000, 64}) {
    cases.push_back([=](Arena& a) -> Call {
      CrossEntropyPartial c{
          .logits = a.matrix(7, columns, columns == 40'000 ? kBf16 : kF32),
          .targets = a.array<std::int32_t>(
              7, [&](std::int64_t i) { return i == 2 ? -1 : a.below(3 * columns); }),
          .first_column = columns,
          .partial = a.array<float>(21)};
      a.output(c.partial, 21, {1e-5, 0});
      return c;
    });
  }
  for (const std::int64_t columns : {504, 77}) {
    cases.push_back([=](Arena& a) -> Call {
      CrossEntropyBackward c{.logits = a.matrix(33, columns, columns == 504 ? kBf16 : kF32),
                             .targets = a.array<std::int32_t>(
                                 33, [&](std::int64_t) { return a.below(2 * columns + 5) - 5; }),
                             .lse = a.array<float>(33, [](std::int64_t) { return 5.0F; }),
                             .first_column = 40,
                             .scale = 0.5F};
      a.output(c.logits);
      return c;
    });
  }
}

inline void add_cross_entropy_loss(CallCases& cases) {
  for (const std::int64_t parts : {1, 3}) {
    cases.push_back([=](Arena& a) -> Call {
      constexpr std::int64_t kRows = 1100;
      CrossEntropyLoss c{
          .partials =
              a.array<float>(parts * kRows * 3, [&](std::int64_t) { return 1 + 8 * a.uniform(); }),
          .parts = parts,
          .rows = kRows,
          .targets = a.array<std::int32_t>(kRows, [&](std::int64_t) { return a.below(9) - 1; }),
          .lse = a.array<float>(kRows),
          .loss = a.array<double>(1, [](std::int64_t) { return 3.0; })};
      a.output(c.lse, kRows);
      a.output(c.loss, {1e-6, 0});
      return c;
    });
  }
}

inline void add_adam_w(CallCases& cases) {
  for (const std::int64_t elements : {40'000, 5003}) {
    for (const Format moments : {kF32, kBf16}) {
      cases.push_back([=](Arena& a) -> Call {
        const auto line = [&](Format format, Tolerance tolerance, bool positive = false) {
          const Matrix m = a.matrix(1, elements, format, Scaling::none, 0, 0, [&](std::int64_t) {
            const float x = a.normal();
            return positive ? std::abs(x) : x;
          });
          a.output(m, tolerance);
          return m.data;
        };
        const Tolerance moment{rounding_of(moments).relative, 1e-4};
        const AdamScalars scalars{.learning_rate = 1e-3F,
                                  .beta1_power = 0.5F,
                                  .beta2_power = 0.7F,
                                  .max_norm = moments == kBf16 ? 1.0F : 0.0F};
        AdamW c{.elements = elements,
                .gradient = static_cast<const float*>(a.matrix(1, elements, kF32).data),
                .master = static_cast<float*>(line(kF32, {1e-5, 1e-6})),
                .first_moment = line(moments, moment),
                .second_moment = line(moments, moment, true),
                .moments = moments,
                .parameter = line(kBf16, rounding_of(kBf16)),
                .parameters = kBf16,
                .scalars = a.one(scalars),
                .square_sum = a.one(40'000.0),
                .decay = elements != 5003};
        return c;
      });
    }
  }
}

inline void add_square_sum(CallCases& cases) {
  for (const std::int64_t elements : {0, 100'003, 64'000}) {
    cases.push_back([=](Arena& a) -> Call {
      SquareSum c{.values = static_cast<const float*>(a.matrix(1, 100'003, kF32).data),
                  .elements = elements,
                  .out = a.array<double>(1, [](std::int64_t) { return 2.0; }),
                  .accumulate = elements == 64'000};
      a.output(c.out, {1e-12, 0});
      return c;
    });
  }
}

inline void add_fill_and_loopback(CallCases& cases) {
  for (const std::int64_t bytes : {1, 5, 1000, 50'003}) {
    for (const std::size_t offset : {0, 3}) {
      cases.push_back([=](Arena& a) -> Call {
        return Fill{.data = a.bytes(static_cast<std::size_t>(bytes), offset), .bytes = bytes};
      });
      cases.push_back([=](Arena& a) -> Call {
        return Loopback{.from = a.bytes(static_cast<std::size_t>(bytes), offset),
                        .to = a.bytes(static_cast<std::size_t>(bytes)),
                        .bytes = bytes};
      });
    }
  }
  cases.push_back([](Arena& a) -> Call {
    return Loopback{.from = a.bytes(400 << 10U), .to = a.bytes(400 << 10U), .bytes = 400 << 10U};
  });
}

/// Some cases, with a name for tests.
struct Family {
  std::string name;
  void (*add)(CallCases&);

  CallCases cases() const {
    CallCases all;
    add(all);
    return all;
  }
};

inline void PrintTo(const Family& family, std::ostream* out) {
  *out << family.name;
}

inline const std::vector<Family>& families() {
  static const std::vector<Family> all = {
      {"NormForward", add_norm_forward},
      {"NormBackward", add_norm_backward},
      {"Rope", add_rope},
      {"HeadCopy", add_head_copy},
      {"ActivationForward", add_activation_forward},
      {"ActivationBackward", add_activation_backward},
      {"RowDot", add_row_dot},
      {"QuantizeRoundsLikeTheReference", add_quantize_rounds_like_the_reference},
      {"QuantizeTakesZerosAndTinyNumbers", add_quantize_takes_zeros_and_tiny_numbers},
      {"Dequantize", add_dequantize},
      {"Transpose", add_transpose},
      {"AddInPlaceAndNot", add_add_in_place_and_not},
      {"Copy", add_copy},
      {"Router", add_router},
      {"RouterGivesTiesToTheSmallerExpert", add_router_gives_ties_to_the_smaller_expert},
      {"RouterBackward", add_router_backward},
      {"RoutingMap", add_routing_map},
      {"Permute", add_permute},
      {"Unpermute", add_unpermute},
      {"Embedding", add_embedding},
      {"EmbeddingBackward", add_embedding_backward},
      {"CrossEntropy", add_cross_entropy},
      {"CrossEntropyLoss", add_cross_entropy_loss},
      {"AdamW", add_adam_w},
      {"SquareSum", add_square_sum},
      {"FillAndLoopback", add_fill_and_loopback},
  };
  return all;
}

}  // namespace orrery::kernels::streaming
