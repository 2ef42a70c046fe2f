#include "kernels/call.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <set>
#include <vector>

namespace orrery::kernels {
namespace {

/// Addresses that nobody reads: a Call is data. Every operand gets its own.
struct Addresses {
  std::uintptr_t next = 0x10000;
  template <class Element>
  Element* of(std::int64_t bytes) {
    const std::uintptr_t begin = next;
    next += (static_cast<std::uintptr_t>(bytes) + 511) / 256 * 256;
    return reinterpret_cast<Element*>(begin);
  }
  float* floats(std::int64_t n) { return of<float>(4 * n); }
  std::int32_t* ints(std::int64_t n) { return of<std::int32_t>(4 * n); }
  Matrix matrix(std::int64_t rows, std::int64_t columns, Format format = Format::bf16,
                Scaling scaling = Scaling::none) {
    Matrix m{.data = of<void>(element_bytes(rows, columns, format)),
             .rows = rows,
             .columns = columns,
             .pitch = columns,
             .format = format,
             .scaling = scaling};
    if (scaling != Scaling::none) {
      m.scales = floats(scale_elements(rows, columns, scaling));
      m.scale_pitch = scale_pitch_of(rows, columns, scaling);
    }
    return m;
  }
};

TEST(CallSizes, Scales) {
  EXPECT_EQ(scale_pitch_of(300, 257, Scaling::none), 0);
  EXPECT_EQ(scale_elements(300, 257, Scaling::none), 0);
  // 257 columns are 3 tiles, 300 rows 3 block rows; pitch of blocks: 3 rounded up to 4.
  EXPECT_EQ(scale_pitch_of(300, 257, Scaling::rows), 300);
  EXPECT_EQ(scale_elements(300, 257, Scaling::rows), 900);
  EXPECT_EQ(scale_pitch_of(300, 257, Scaling::blocks), 4);
  EXPECT_EQ(scale_elements(300, 257, Scaling::blocks), 12);
  EXPECT_EQ(scale_elements(128, 7168, Scaling::blocks), 56);
  EXPECT_EQ(scale_elements(0, 7168, Scaling::rows), 0);
}

TEST(CallSizes, Elements) {
  EXPECT_EQ(element_bytes(3, 10, Format::fp32), 120);
  EXPECT_EQ(element_bytes(3, 10, Format::bf16), 60);
  EXPECT_EQ(element_bytes(3, 10, Format::e4m3), 30);
  EXPECT_EQ(element_bytes(3, 10, Format::e5m6), 45);
}

Gemm plain_gemm(Addresses& at) {
  return {.a = at.matrix(96, 64), .b = at.matrix(48, 64), .d = at.matrix(96, 48)};
}

Gemm fp8_gemm(Addresses& at) {
  return {.a = at.matrix(96, 256, Format::e4m3, Scaling::rows),
          .b = at.matrix(130, 256, Format::e4m3, Scaling::blocks),
          .d = at.matrix(96, 130)};
}

Gemm grouped_gemm(Addresses& at) {
  return {.a = at.matrix(96, 64),
          .b = at.matrix(3 * 48, 64),
          .d = at.matrix(96, 48),
          .grouping = Grouping::rows,
          .groups = 3,
          .group_begin = at.ints(3),
          .group_rows = at.ints(3)};
}

Gemm weight_gemm(Addresses& at) {
  return {.a = at.matrix(96, 32),
          .b = at.matrix(96, 48),
          .d = at.matrix(3 * 32, 48, Format::fp32),
          .a_transposed = true,
          .b_transposed = true,
          .accumulate = true,
          .grouping = Grouping::contraction,
          .groups = 3,
          .group_begin = at.ints(3),
          .group_rows = at.ints(3)};
}

AttentionShape shape_of_attention() {
  return {.batch = 2,
          .heads = 6,
          .kv_heads = 3,
          .q_len = 5,
          .kv_len = 9,
          .d_qk = 12,
          .d_v = 8,
          .causal = true,
          .scale = 0.3F};
}

AttentionForward attention_forward(Addresses& at) {
  return {.shape = shape_of_attention(),
          .q = at.matrix(10, 72),
          .k = at.matrix(18, 36),
          .v = at.matrix(18, 24),
          .out = at.matrix(10, 48),
          .lse = at.floats(60)};
}

AttentionBackward attention_backward(Addresses& at) {
  const AttentionForward f = attention_forward(at);
  return {.shape = f.shape,
          .q = f.q,
          .k = f.k,
          .v = f.v,
          .out = f.out,
          .d_out = at.matrix(10, 48),
          .lse = f.lse,
          .d_q = at.matrix(10, 72),
          .d_k = at.matrix(18, 36),
          .d_v = at.matrix(18, 24),
          .workspace = at.of<void>(attention_workspace_bytes(f.shape))};
}

NormForward norm_forward(Addresses& at) {
  return {.terms = {at.matrix(7, 24), Matrix{}, at.matrix(7, 24, Format::fp32)},
          .sum = at.matrix(7, 24),
          .gain = at.matrix(1, 8, Format::fp32),
          .bias = at.matrix(1, 8, Format::fp32),
          .y = at.matrix(7, 24),
          .segments = 3,
          .centred = true};
}

NormBackward norm_backward(Addresses& at) {
  return {.d_y = at.matrix(7, 24),
          .x = at.matrix(7, 24),
          .gain = at.matrix(1, 8, Format::fp32),
          .add = at.matrix(7, 24),
          .d_x = at.matrix(7, 24),
          .d_gain = at.floats(8),
          .d_bias = at.floats(8),
          .segments = 3,
          .centred = true};
}

Rope rope(Addresses& at) {
  return {.x = at.matrix(7, 60),
          .heads = 3,
          .head_dim = 20,
          .offset = 12,
          .dim = 8,
          .positions = at.ints(7)};
}

HeadCopy head_copy(Addresses& at) {
  return {.from = at.matrix(7, 40),
          .to = at.matrix(7, 36),
          .heads = 3,
          .width = 8,
          .from_offset = 2,
          .from_stride = 10,
          .to_offset = 4,
          .to_stride = 12};
}

ActivationForward activation_forward(Addresses& at) {
  return {.kind = Activation::swiglu,
          .in = at.matrix(7, 400),
          .out = at.matrix(7, 200, Format::e4m3, Scaling::rows),
          .row_weight = at.floats(7),
          .used_rows = at.ints(1)};
}

ActivationBackward activation_backward(Addresses& at) {
  return {.kind = Activation::gelu,
          .in = at.matrix(7, 200),
          .d_out = at.matrix(7, 200),
          .d_in = at.matrix(7, 200),
          .out_again = at.matrix(7, 200, Format::e4m3, Scaling::rows),
          .row_weight = at.floats(7),
          .used_rows = at.ints(1)};
}

RowDot row_dot(Addresses& at) {
  return {.a = at.matrix(7, 20),
          .b = at.matrix(7, 20, Format::fp32),
          .row_weight = at.floats(7),
          .out = at.floats(7),
          .used_rows = at.ints(1)};
}

Quantize quantize(Addresses& at) {
  return {.from = at.matrix(7, 200), .to = at.matrix(7, 200, Format::e5m6, Scaling::rows)};
}

Dequantize dequantize(Addresses& at) {
  return {.from = at.matrix(150, 200, Format::e4m3, Scaling::blocks), .to = at.matrix(150, 200)};
}

Transpose transpose(Addresses& at) {
  return {.from = at.matrix(150, 200, Format::e4m3, Scaling::rows),
          .to = at.matrix(200, 150, Format::e4m3, Scaling::rows),
          .used_rows = at.ints(1)};
}

Router router(Addresses& at) {
  return {.logits = at.matrix(7, 16, Format::fp32),
          .bias = at.floats(16),
          .groups = 4,
          .group_limit = 2,
          .top_k = 3,
          .scores = at.floats(7 * 16),
          .experts = at.ints(21),
          .weights = at.floats(21)};
}

RouterBackward router_backward(Addresses& at) {
  return {.top_k = 3,
          .scores = at.floats(7 * 16),
          .experts = at.ints(21),
          .d_weights = at.floats(21),
          .d_logits = at.matrix(7, 16, Format::fp32)};
}

RoutingMap routing_map(Addresses& at) {
  return {.experts = at.ints(21),
          .weights = at.floats(21),
          .tokens = at.ints(1),
          .max_tokens = 7,
          .top_k = 3,
          .local_experts = 4,
          .alignment = 8,
          .capacity = 50,
          .group_begin = at.ints(5),
          .group_rows = at.ints(4),
          .used_rows = at.ints(1),
          .row_source = at.ints(50),
          .row_weight = at.floats(50),
          .slot_row = at.ints(21),
          .overflow = at.ints(1)};
}

Permute permute(Addresses& at) {
  return {.from = at.matrix(7, 200, Format::e4m3, Scaling::rows),
          .to = at.matrix(50, 200, Format::e4m3, Scaling::rows),
          .row_source = at.ints(50),
          .used_rows = at.ints(1)};
}

Unpermute unpermute(Addresses& at) {
  return {.from = at.matrix(50, 20),
          .to = at.matrix(7, 20, Format::fp32),
          .slot_row = at.ints(21),
          .tokens = at.ints(1),
          .top_k = 3,
          .row_values = at.floats(50),
          .slot_values = at.floats(21)};
}

Embedding embedding(Addresses& at) {
  return {.table = at.matrix(1000, 20), .out = at.matrix(7, 20), .tokens = at.ints(7)};
}

EmbeddingBackward embedding_backward(Addresses& at) {
  return {.d_out = at.matrix(7, 20),
          .d_table = at.matrix(1000, 20, Format::fp32),
          .tokens = at.ints(7)};
}

AdamW adamw(Addresses& at) {
  return {.elements = 100,
          .gradient = at.floats(100),
          .master = at.floats(100),
          .first_moment = at.of<void>(200),
          .second_moment = at.of<void>(200),
          .moments = Format::bf16,
          .parameter = at.of<void>(200),
          .parameters = Format::bf16,
          .scalars = at.of<AdamScalars>(sizeof(AdamScalars)),
          .square_sum = at.of<double>(8)};
}

/// One of every kind, all operands there.
std::vector<Call> every_call() {
  Addresses at;
  return {
      plain_gemm(at),
      attention_forward(at),
      attention_backward(at),
      norm_forward(at),
      norm_backward(at),
      rope(at),
      head_copy(at),
      activation_forward(at),
      activation_backward(at),
      row_dot(at),
      quantize(at),
      dequantize(at),
      transpose(at),
      Add{.terms = {at.matrix(7, 20), at.matrix(7, 20)}, .out = at.matrix(7, 20)},
      Copy{.from = at.matrix(7, 20), .to = at.matrix(7, 20, Format::fp32)},
      router(at),
      router_backward(at),
      routing_map(at),
      permute(at),
      unpermute(at),
      embedding(at),
      embedding_backward(at),
      CrossEntropyPartial{
          .logits = at.matrix(7, 50), .targets = at.ints(7), .partial = at.floats(21)},
      CrossEntropyLoss{.partials = at.floats(42),
                       .parts = 2,
                       .rows = 7,
                       .targets = at.ints(7),
                       .lse = at.floats(7),
                       .loss = at.of<double>(8)},
      CrossEntropyBackward{.logits = at.matrix(7, 50), .targets = at.ints(7), .lse = at.floats(7)},
      adamw(at),
      SquareSum{.values = at.floats(100), .elements = 100, .out = at.of<double>(8)},
      Fill{.data = at.of<void>(100), .bytes = 100},
      Loopback{.from = at.of<void>(100), .to = at.of<void>(100), .bytes = 100}};
}

TEST(Call, EveryKindHasANameOfItsOwnAndIsPossible) {
  const std::vector<Call> calls = every_call();
  ASSERT_EQ(calls.size(), std::variant_size_v<Call>);
  std::set<std::string_view> names;
  for (std::size_t i = 0; i < calls.size(); ++i) {
    EXPECT_EQ(calls[i].index(), i);
    names.insert(name_of(calls[i]));
    EXPECT_EQ(why_impossible(calls[i]), "") << describe(calls[i]);
    EXPECT_EQ(describe(calls[i]).rfind(std::string(name_of(calls[i])) + " ", 0), 0u);
  }
  EXPECT_EQ(names.size(), calls.size());
  Addresses at;
  for (const Call& call : {Call(fp8_gemm(at)), Call(grouped_gemm(at)), Call(weight_gemm(at))}) {
    EXPECT_EQ(why_impossible(call), "") << describe(call);
  }
}

TEST(Call, Describes) {
  Addresses at;
  EXPECT_EQ(describe(fp8_gemm(at)), "gemm e4m3 96x130x256");
  EXPECT_EQ(describe(grouped_gemm(at)), "gemm bf16 3 groups of m, 96x48x64");
  EXPECT_EQ(describe(weight_gemm(at)), "gemm bf16 3 groups of k, 32x48x96 accumulated");
  EXPECT_EQ(describe(attention_forward(at)),
            "attention_forward bf16 2x6/3 heads, 5x9 tokens, 12/8 wide, causal");
  EXPECT_EQ(describe(quantize(at)), "quantize bf16 to e5m6 7x200");
}

TEST(CallCost, Gemm) {
  Addresses at;
  Cost cost = cost_of(plain_gemm(at));
  EXPECT_EQ(cost.flops, 2.0 * 96 * 48 * 64);
  EXPECT_EQ(cost.bytes, 2.0 * (96 * 64 + 48 * 64 + 96 * 48));
  // Scales of A: 2 tiles of 96 rows; of B: 2 x 2 blocks, padding not touched.
  cost = cost_of(fp8_gemm(at));
  EXPECT_EQ(cost.flops, 2.0 * 96 * 130 * 256);
  EXPECT_EQ(cost.bytes, 96.0 * 256 + 2 * 96 * 4 + 130 * 256 + 2 * 2 * 4 + 96 * 130 * 2);
  // Groups share the rows.
  cost = cost_of(grouped_gemm(at));
  EXPECT_EQ(cost.flops, 2.0 * 96 * 48 * 64);
  EXPECT_EQ(cost.bytes, 2.0 * (96 * 64 + 3 * 48 * 64 + 96 * 48) + 2 * 3 * 4);
  // D is read and written.
  cost = cost_of(weight_gemm(at));
  EXPECT_EQ(cost.flops, 2.0 * 32 * 48 * 96);
  EXPECT_EQ(cost.bytes, 2.0 * (96 * 32 + 96 * 48) + 2 * 4 * 3 * 32 * 48 + 2 * 3 * 4);
}

TEST(CallCost, AttentionCountsPairsThatAreNotMasked) {
  Addresses at;
  AttentionForward forward = attention_forward(at);
  AttentionBackward backward = attention_backward(at);
  for (const auto& [q_len, kv_len] : {std::pair{5, 9}, {9, 5}, {7, 7}, {1, 4}}) {
    forward.shape.q_len = backward.shape.q_len = q_len;
    forward.shape.kv_len = backward.shape.kv_len = kv_len;
    int pairs = 0;
    for (int i = 0; i < q_len; ++i) {
      for (int j = 0; j < kv_len; ++j) pairs += j <= kv_len - q_len + i ? 1 : 0;
    }
    EXPECT_EQ(cost_of(forward).flops, 2.0 * pairs * 2 * 6 * (12 + 8));
    EXPECT_EQ(cost_of(backward).flops, 2.0 * pairs * 2 * 6 * (3 * 12 + 2 * 8));
  }
  forward.shape = shape_of_attention();
  forward.shape.causal = false;
  EXPECT_EQ(cost_of(forward).flops, 2.0 * 5 * 9 * 2 * 6 * (12 + 8));
  const double operands = 2.0 * (10 * 72 + 18 * 36 + 18 * 24 + 10 * 48);
  EXPECT_EQ(cost_of(forward).bytes, operands + 4 * 60);
  backward.shape = shape_of_attention();
  EXPECT_EQ(cost_of(backward).bytes, 2 * operands + 4 * 60);
  EXPECT_EQ(attention_workspace_bytes(backward.shape), 4 * (60 + 60 * 12));
}

TEST(CallCost, LookUpsMoveTheRowsThatAreLookedUp) {
  Addresses at;
  EXPECT_EQ(cost_of(embedding(at)).bytes, 2.0 * 7 * 20 * 2 + 7 * 4);
  EXPECT_EQ(cost_of(embedding_backward(at)).bytes, 7.0 * 20 * 2 + 2 * 7 * 20 * 4 + 7 * 4);
}

TEST(CallCost, StreamingKernels) {
  Addresses at;
  EXPECT_EQ(cost_of(adamw(at)).bytes,
            100.0 * (4 + 8 + 4 + 4 + 2) + sizeof(AdamScalars) + sizeof(double));
  EXPECT_EQ(cost_of(quantize(at)).bytes, 7.0 * 200 * 2 + 7 * 200 * 1.5 + 2 * 7 * 4);
  EXPECT_EQ(cost_of(head_copy(at)).bytes, 2.0 * 7 * 3 * 8 * 2);
  EXPECT_EQ(cost_of(rope(at)).bytes, 2.0 * 7 * 3 * 8 * 2 + 7 * 4);
  EXPECT_EQ(cost_of(rope(at)).flops, 0);
  Addresses other;
  NormForward norm = norm_forward(other);
  EXPECT_EQ(cost_of(norm).bytes, 7.0 * 24 * (2 + 4 + 2 + 2) + 2 * 8 * 4);
}

// ---------------------------------------------------------------------------------------------

/// Bytes of all pieces, by address.
std::vector<bool> bytes_of(const std::vector<Touch>& touches, bool written, std::size_t size) {
  std::vector<bool> bytes(size);
  for (const Touch& touch : touches) {
    if (touch.written != written) continue;
    const auto begin = reinterpret_cast<std::uintptr_t>(touch.begin) - 0x10000;
    for (std::int64_t r = 0; r < touch.rows; ++r) {
      for (std::int64_t b = 0; b < touch.row_bytes; ++b) {
        bytes.at(begin + static_cast<std::uintptr_t>(r * touch.pitch_bytes + b)) = true;
      }
    }
  }
  return bytes;
}

TEST(CallTouches, ContiguousOperandsAreOnePieceEach) {
  Addresses at;
  const Gemm gemm = fp8_gemm(at);
  const std::vector<Touch> touches = touches_of(gemm);
  ASSERT_EQ(touches.size(), 5u);
  for (const Touch& touch : touches) {
    if (touch.begin == gemm.a.data) {
      EXPECT_EQ(touch.row_bytes, 96 * 256);
    } else if (touch.begin == gemm.a.scales) {
      EXPECT_EQ(touch.row_bytes, 2 * 96 * 4);
    } else if (touch.begin == gemm.b.scales) {  // two of four in each row
      EXPECT_EQ(touch.rows, 2);
      EXPECT_EQ(touch.row_bytes, 2 * 4);
      EXPECT_EQ(touch.pitch_bytes, 4 * 4);
      continue;
    } else if (touch.begin == gemm.d.data) {
      EXPECT_TRUE(touch.written);
    }
    EXPECT_EQ(touch.rows, 1);
    EXPECT_EQ(touch.written, touch.begin == gemm.d.data);
  }
}

TEST(CallTouches, ColumnsOfAWiderMatrixAreRowsOfAPiece) {
  Addresses at;
  Gemm gemm = plain_gemm(at);
  gemm.d.pitch = 100;
  const std::vector<Touch> touches = touches_of(gemm);
  const auto d = std::find_if(touches.begin(), touches.end(),
                              [&](const Touch& t) { return t.begin == gemm.d.data; });
  ASSERT_NE(d, touches.end());
  EXPECT_EQ(d->rows, 96);
  EXPECT_EQ(d->row_bytes, 48 * 2);
  EXPECT_EQ(d->pitch_bytes, 100 * 2);
}

TEST(CallTouches, HeadsThatAreNotThereAreNotTouched) {
  for (const std::int64_t pitch : {60, 64}) {  // pieces evenly spaced over rows, and not
    Addresses at;
    Rope call = rope(at);
    call.x.pitch = pitch;
    const std::vector<bool> bytes = bytes_of(touches_of(call), true, 4096);
    const auto begin = reinterpret_cast<std::uintptr_t>(call.x.data) - 0x10000;
    for (int r = 0; r < 7; ++r) {
      for (int c = 0; c < pitch; ++c) {
        const bool rotated = c < 60 && c % 20 >= 12;
        const std::size_t byte = begin + static_cast<std::size_t>((r * pitch + c) * 2);
        EXPECT_EQ(bytes[byte] && bytes[byte + 1], rotated) << r << " " << c;
      }
    }
  }
}

TEST(CallTouches, HeadCopyTouchesItsColumns) {
  Addresses at;
  HeadCopy call = head_copy(at);
  const auto expect = [&](bool written, const Matrix& m, auto touched) {
    const std::vector<bool> bytes = bytes_of(touches_of(call), written, 4096);
    const auto begin = reinterpret_cast<std::uintptr_t>(m.data) - 0x10000;
    for (std::int64_t i = 0; i < 7 * m.pitch; ++i) {
      EXPECT_EQ(bytes[begin + static_cast<std::size_t>(2 * i)], touched(i % m.pitch)) << i;
    }
  };
  const auto to = [](std::int64_t c) { return c % 12 >= 4; };
  expect(false, call.from, [](std::int64_t c) { return c >= 2 && c < 32 && (c - 2) % 10 < 8; });
  expect(true, call.to, to);
  call.from_stride = 0;  // all from the same
  expect(false, call.from, [](std::int64_t c) { return c >= 2 && c < 10; });
  expect(true, call.to, to);
  call.from_stride = 10;
  call.sum_heads = true;
  expect(true, call.to, [](std::int64_t c) { return c >= 4 && c < 12; });
}

/// Begins of what is written and what is only read.
void expect_touched(const Call& call, std::vector<const void*> written,
                    std::vector<const void*> read) {
  std::vector<const void*> is_written;
  std::vector<const void*> is_read;
  for (const Touch& t : touches_of(call)) (t.written ? is_written : is_read).push_back(t.begin);
  for (auto* list : {&written, &read, &is_written, &is_read}) std::sort(list->begin(), list->end());
  EXPECT_EQ(is_written, written) << describe(call);
  EXPECT_EQ(is_read, read) << describe(call);
}

TEST(CallTouches, EveryOperandOfEveryCall) {
  Addresses at;
  const auto gemm = weight_gemm(at);
  expect_touched(gemm, {gemm.d.data},
                 {gemm.a.data, gemm.b.data, gemm.group_begin, gemm.group_rows});
  auto forward = attention_forward(at);
  forward.shape.query_positions = at.ints(5);
  expect_touched(forward, {forward.out.data, forward.lse},
                 {forward.q.data, forward.k.data, forward.v.data, forward.shape.query_positions});
  const auto backward = attention_backward(at);
  expect_touched(backward,
                 {backward.d_q.data, backward.d_k.data, backward.d_v.data, backward.workspace},
                 {backward.q.data, backward.k.data, backward.v.data, backward.out.data,
                  backward.d_out.data, backward.lse});
  const auto norm = norm_forward(at);
  expect_touched(norm, {norm.sum.data, norm.y.data},
                 {norm.terms[0].data, norm.terms[2].data, norm.gain.data, norm.bias.data});
  const auto norm_b = norm_backward(at);
  expect_touched(norm_b, {norm_b.d_x.data, norm_b.d_gain, norm_b.d_bias},
                 {norm_b.d_y.data, norm_b.x.data, norm_b.gain.data, norm_b.add.data});
  const auto act = activation_forward(at);
  expect_touched(act, {act.out.data, act.out.scales}, {act.in.data, act.row_weight, act.used_rows});
  const auto act_b = activation_backward(at);
  expect_touched(act_b, {act_b.d_in.data, act_b.out_again.data, act_b.out_again.scales},
                 {act_b.in.data, act_b.d_out.data, act_b.row_weight, act_b.used_rows});
  const auto dot = row_dot(at);
  expect_touched(dot, {dot.out}, {dot.a.data, dot.b.data, dot.row_weight, dot.used_rows});
  const auto q = quantize(at);
  expect_touched(q, {q.to.data, q.to.scales}, {q.from.data});
  const auto dq = dequantize(at);
  expect_touched(dq, {dq.to.data}, {dq.from.data, dq.from.scales});
  const auto tr = transpose(at);
  expect_touched(tr, {tr.to.data, tr.to.scales}, {tr.from.data, tr.from.scales, tr.used_rows});
  const Add add{.terms = {at.matrix(7, 20), at.matrix(7, 20)}, .out = at.matrix(7, 20)};
  expect_touched(add, {add.out.data}, {add.terms[0].data, add.terms[1].data});
  const Copy copy{.from = at.matrix(7, 20), .to = at.matrix(7, 20)};
  expect_touched(copy, {copy.to.data}, {copy.from.data});
  const auto route = router(at);
  expect_touched(route, {route.scores, route.experts, route.weights},
                 {route.logits.data, route.bias});
  const auto route_b = router_backward(at);
  expect_touched(route_b, {route_b.d_logits.data},
                 {route_b.scores, route_b.experts, route_b.d_weights});
  const auto map = routing_map(at);
  expect_touched(map,
                 {map.group_begin, map.group_rows, map.used_rows, map.row_source, map.row_weight,
                  map.slot_row, map.overflow},
                 {map.experts, map.weights, map.tokens});
  const auto per = permute(at);
  expect_touched(per, {per.to.data, per.to.scales},
                 {per.from.data, per.from.scales, per.row_source, per.used_rows});
  const auto un = unpermute(at);
  expect_touched(un, {un.to.data, un.slot_values},
                 {un.from.data, un.slot_row, un.tokens, un.row_values});
  const auto emb = embedding(at);
  expect_touched(emb, {emb.out.data}, {emb.table.data, emb.tokens});
  const auto emb_b = embedding_backward(at);
  expect_touched(emb_b, {emb_b.d_table.data}, {emb_b.d_out.data, emb_b.tokens});
  const CrossEntropyPartial partial{
      .logits = at.matrix(7, 50), .targets = at.ints(7), .partial = at.floats(21)};
  expect_touched(partial, {partial.partial}, {partial.logits.data, partial.targets});
  const CrossEntropyLoss loss{.partials = at.floats(42),
                              .parts = 2,
                              .rows = 7,
                              .targets = at.ints(7),
                              .lse = at.floats(7),
                              .loss = at.of<double>(8)};
  expect_touched(loss, {loss.lse, loss.loss}, {loss.partials, loss.targets});
  const CrossEntropyBackward ce{
      .logits = at.matrix(7, 50), .targets = at.ints(7), .lse = at.floats(7)};
  expect_touched(ce, {ce.logits.data}, {ce.targets, ce.lse});
  const auto adam = adamw(at);
  expect_touched(adam, {adam.master, adam.first_moment, adam.second_moment, adam.parameter},
                 {adam.gradient, adam.scalars, adam.square_sum});
  const SquareSum sum{.values = at.floats(9), .elements = 9, .out = at.of<double>(8)};
  expect_touched(sum, {sum.out}, {sum.values});
  const Fill fill{.data = at.of<void>(100), .bytes = 100};
  expect_touched(fill, {fill.data}, {});
  const Loopback loop{.from = at.of<void>(9), .to = at.of<void>(9), .bytes = 9};
  expect_touched(loop, {loop.to}, {loop.from});
}

// ---------------------------------------------------------------------------------------------

/// The message after `change` to what `make` makes.
template <class Kind, class Change>
std::string after(Kind (*make)(Addresses&), Change change) {
  Addresses at;
  Kind call = make(at);
  change(call);
  return why_impossible(call);
}

TEST(CallImpossible, Gemm) {
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.a.data = nullptr; }), "A is missing");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.b.columns = 62; }), "k of A is 64, of B 62");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.d.rows = 95; }), "m of A is 96, of D 95");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.b.rows = 47; }), "n of B is 47, of D 48");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.b_transposed = true; }), "k of A is 64, of B 48");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.accumulate = true; }),
            "D is bf16 with no scales, fp32 needed");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.a.format = Format::fp32; }), "A is fp32, B bf16");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.a.pitch = 63; }), "pitch of A is 63, columns 64");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.groups = 2; }),
            "groups is 2, grouping is none and has 1");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.groups = 0; }), "groups is 0, at least 1 needed");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.a.data = static_cast<std::byte*>(c.a.data) + 1; }),
            "A is not aligned to its elements");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.a.rows = -1; }), "A is -1x64");
  EXPECT_EQ(after(fp8_gemm, [](Gemm& c) { c.a_transposed = true; }),
            "e4m3 operands cannot be transposed");
  EXPECT_EQ(after(fp8_gemm, [](Gemm& c) { c.a.scaling = Scaling::blocks; }),
            "A is e4m3 with scales of blocks, fp32, bf16 or e4m3 with scales of rows needed");
  EXPECT_EQ(after(fp8_gemm, [](Gemm& c) { c.a.scales = nullptr; }), "scales of A are missing");
  EXPECT_EQ(after(fp8_gemm, [](Gemm& c) { c.a.scale_pitch = 95; }),
            "scale_pitch of A is 95, 96 needed");
  EXPECT_EQ(after(fp8_gemm, [](Gemm& c) { c.b.scale_pitch = 8; }),
            "scale_pitch of B is 8, 4 needed");
  EXPECT_EQ(after(fp8_gemm, [](Gemm& c) { c.b.scaling = Scaling::none; }),
            "B is e4m3 with no scales");
  EXPECT_EQ(after(plain_gemm, [](Gemm& c) { c.b.format = Format::e5m6; }),
            "B is e5m6 with no scales, fp32, bf16 or e4m3 needed");
  EXPECT_EQ(after(grouped_gemm, [](Gemm& c) { c.groups = 2; }),
            "n times groups of D is 96, rows of B 144");
  EXPECT_EQ(after(grouped_gemm, [](Gemm& c) { c.group_rows = nullptr; }), "group_rows is missing");
  EXPECT_EQ(after(grouped_gemm, [](Gemm& c) { c.group_begin = nullptr; }),
            "group_begin is missing");
  EXPECT_EQ(after(grouped_gemm, [](Gemm& c) { c.a_transposed = true; }),
            "A is split by rows and cannot be transposed");
  EXPECT_EQ(after(grouped_gemm, [](Gemm& c) { c.b_transposed = true; }),
            "k of A is 192, times groups; rows of B 144");
  EXPECT_EQ(after(weight_gemm, [](Gemm& c) { c.b_transposed = false; }),
            "A and B are split by the contraction, along their rows: both are transposed");
  EXPECT_EQ(after(weight_gemm, [](Gemm& c) { c.d.rows = 32; }),
            "m times groups of A is 96, rows of D 32");
  EXPECT_EQ(after(weight_gemm, [](Gemm& c) { c.b.rows = 95; }), "k of A is 96, of B 95");
  Addresses at;
  Gemm fp8_weight = weight_gemm(at);
  fp8_weight.a_transposed = fp8_weight.b_transposed = false;
  fp8_weight.a = at.matrix(32, 256, Format::e4m3, Scaling::rows);
  fp8_weight.b = at.matrix(48, 256, Format::e4m3, Scaling::rows);
  EXPECT_EQ(why_impossible(fp8_weight), "");
  fp8_weight.a = at.matrix(32, 192, Format::e4m3, Scaling::rows);
  fp8_weight.b = at.matrix(48, 192, Format::e4m3, Scaling::rows);
  EXPECT_EQ(why_impossible(fp8_weight), "k of A is 192, a multiple of 128 needed");
}

TEST(CallImpossible, Attention) {
  EXPECT_EQ(after(attention_forward, [](AttentionForward& c) { c.shape.kv_heads = 4; }),
            "heads are 6, not a multiple of kv_heads 4");
  EXPECT_EQ(after(attention_forward, [](AttentionForward& c) { c.shape.kv_heads = 0; }),
            "kv_heads is 0, at least 1 needed");
  EXPECT_EQ(after(attention_forward, [](AttentionForward& c) { c.shape.kv_len = 8; }),
            "rows of k are 18, 16 needed");
  EXPECT_EQ(after(attention_forward, [](AttentionForward& c) { c.v.columns = 20; }),
            "columns of v are 20, 24 needed");
  EXPECT_EQ(after(attention_forward, [](AttentionForward& c) { c.k.format = Format::fp32; }),
            "k is fp32, q bf16");
  EXPECT_EQ(after(attention_forward, [](AttentionForward& c) { c.lse = nullptr; }),
            "lse is missing");
  EXPECT_EQ(after(attention_backward, [](AttentionBackward& c) { c.workspace = nullptr; }),
            "workspace is missing");
  EXPECT_EQ(after(attention_backward, [](AttentionBackward& c) { c.d_k.rows = 17; }),
            "rows of d_k are 17, 18 needed");
}

TEST(CallImpossible, RowsAndColumns) {
  EXPECT_EQ(after(norm_forward, [](NormForward& c) { c.terms = {}; }), "there are no terms");
  EXPECT_EQ(after(norm_forward, [](NormForward& c) { c.terms[2].rows = 6; }),
            "rows of a term are 6, 7 needed");
  EXPECT_EQ(after(norm_forward, [](NormForward& c) { c.segments = 5; }),
            "columns are 24, not a multiple of segments 5");
  EXPECT_EQ(after(norm_forward, [](NormForward& c) { c.segments = 0; }),
            "segments is 0, at least 1 needed");
  EXPECT_EQ(after(norm_forward, [](NormForward& c) { c.segments = 1; }),
            "columns of gain are 8, 24 needed");
  EXPECT_EQ(after(norm_forward, [](NormForward& c) { c.centred = false; }),
            "bias is there, but the norm is not centred");
  EXPECT_EQ(after(norm_backward, [](NormBackward& c) { c.centred = false; }),
            "d_bias is there, but the norm is not centred");
  EXPECT_EQ(after(rope, [](Rope& c) { c.dim = 7; }), "dim is 7, an even number needed");
  EXPECT_EQ(after(rope, [](Rope& c) { c.offset = 13; }), "head_dim is 20, at least 21 needed");
  EXPECT_EQ(after(rope, [](Rope& c) { c.heads = 2; }),
            "columns of x is 60, heads times head_dim 40");
  EXPECT_EQ(after(head_copy, [](HeadCopy& c) { c.from_offset = 13; }),
            "columns of from is 40, at least 41 needed");
  EXPECT_EQ(after(head_copy, [](HeadCopy& c) { c.to_offset = 5; }),
            "columns of to is 36, at least 37 needed");
  EXPECT_EQ(after(head_copy, [](HeadCopy& c) { c.to_stride = 7; }),
            "to_stride is 7, at least 8 needed");
  EXPECT_EQ(after(activation_forward, [](ActivationForward& c) { c.kind = Activation::gelu; }),
            "columns of in are 400, 200 needed");
  EXPECT_EQ(after(activation_backward, [](ActivationBackward& c) { c.kind = Activation::swiglu; }),
            "columns of in are 200, 400 needed");
  EXPECT_EQ(after(row_dot, [](RowDot& c) { c.row_weight = nullptr; }), "row_weight is missing");
  EXPECT_EQ(after(quantize, [](Quantize& c) { c.to.pitch = 201; }),
            "columns and pitch of to are e5m6 and have to be even");
  EXPECT_EQ(after(quantize, [](Quantize& c) { c.to.format = Format::bf16; }),
            "to is bf16 with scales of rows, e4m3 or e5m6 needed");
  EXPECT_EQ(after(dequantize, [](Dequantize& c) { c.to.columns = 199; }),
            "columns of to are 199, 200 needed");
  EXPECT_EQ(after(transpose, [](Transpose& c) { c.to.rows = 150; }),
            "rows of to are 150, 200 needed");
  EXPECT_EQ(after(transpose,
                  [](Transpose& c) {
                    for (Matrix* m : {&c.from, &c.to}) m->scaling = Scaling::blocks;
                    c.from.scale_pitch = c.to.scale_pitch = 4;
                  }),
            "used_rows is there, but the scales are of blocks");
}

TEST(CallImpossible, Routing) {
  EXPECT_EQ(after(router, [](Router& c) { c.groups = 3; }),
            "experts are 16, not a multiple of groups 3");
  EXPECT_EQ(after(router, [](Router& c) { c.group_limit = 5; }), "groups is 4, at least 5 needed");
  EXPECT_EQ(after(router, [](Router& c) { c.top_k = 9; }),
            "experts that group_limit leaves is 8, at least 9 needed");
  EXPECT_EQ(after(router_backward, [](RouterBackward& c) { c.top_k = 17; }),
            "experts is 16, at least 17 needed");
  EXPECT_EQ(after(routing_map, [](RoutingMap& c) { c.alignment = 0; }),
            "alignment is 0, at least 1 needed");
  EXPECT_EQ(after(routing_map, [](RoutingMap& c) { c.overflow = nullptr; }), "overflow is missing");
  EXPECT_EQ(after(permute, [](Permute& c) { c.to.columns = 199; }),
            "columns of to are 199, 200 needed");
  EXPECT_EQ(after(permute, [](Permute& c) { c.to = c.from, c.to.format = Format::e5m6; }),
            "to is e5m6, from e4m3");
  EXPECT_EQ(after(unpermute, [](Unpermute& c) { c.slot_values = nullptr; }),
            "of row_values and slot_values one is missing");
  EXPECT_EQ(after(embedding, [](Embedding& c) { c.tokens = nullptr; }), "tokens is missing");
  EXPECT_EQ(
      after(embedding_backward, [](EmbeddingBackward& c) { c.d_table.format = Format::bf16; }),
      "d_table is bf16 with no scales, fp32 needed");
  EXPECT_EQ(after(adamw, [](AdamW& c) { c.moments = Format::e4m3; }),
            "first_moment is e4m3, fp32 or bf16 needed");
  EXPECT_EQ(after(adamw, [](AdamW& c) { c.elements = -1; }), "elements is -1, at least 0 needed");
}

}  // namespace
}  // namespace orrery::kernels
