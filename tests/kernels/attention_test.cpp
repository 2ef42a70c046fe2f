#include <gtest/gtest.h>
#include <oneapi/tbb/task_arena.h>

#include <cmath>
#include <limits>
#include <sstream>

#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/reference/reference.hpp"
#include "tests/kernels/operand_memory.hpp"

namespace orrery::kernels {
namespace {

std::string text_of(const AttentionShape& s, Format format) {
  std::ostringstream text;
  text << name_of(format) << " " << s.batch << "x" << s.heads << "/" << s.kv_heads << " " << s.q_len
       << "x" << s.kv_len << " " << s.d_qk << "/" << s.d_v << (s.causal ? " causal" : "")
       << (s.query_positions != nullptr ? " positions" : "");
  return text.str();
}

struct Operands {
  AttentionForward forward;
  AttentionBackward backward;
};

/// Random q, k, v and d_out; the rest is poison.
Operands make(const AttentionShape& s, Format format, std::int64_t gap, OperandMemory& memory,
              std::mt19937& random) {
  const auto matrix = [&](std::int64_t rows, std::int64_t columns) {
    return memory.matrix(rows, columns, format, gap);
  };
  AttentionForward f{.shape = s,
                     .q = matrix(s.batch * s.q_len, s.heads * s.d_qk),
                     .k = matrix(s.batch * s.kv_len, s.kv_heads * s.d_qk),
                     .v = matrix(s.batch * s.kv_len, s.kv_heads * s.d_v),
                     .out = matrix(s.batch * s.q_len, s.heads * s.d_v),
                     .lse = memory.array<float>(s.batch * s.heads * s.q_len)};
  AttentionBackward b{.shape = s,
                      .q = f.q,
                      .k = f.k,
                      .v = f.v,
                      .out = f.out,
                      .d_out = matrix(f.out.rows, f.out.columns),
                      .lse = f.lse,
                      .d_q = matrix(f.q.rows, f.q.columns),
                      .d_k = matrix(f.k.rows, f.k.columns),
                      .d_v = matrix(f.v.rows, f.v.columns),
                      .workspace = memory.array<std::byte>(attention_workspace_bytes(s))};
  for (const Matrix* m : {&f.q, &f.k, &f.v, &b.d_out}) fill_random(*m, random);
  return {f, b};
}

std::vector<double> lse_of(const AttentionForward& f) {
  return {f.lse, f.lse + f.shape.batch * f.shape.heads * f.shape.q_len};
}

// ---------------------------------------------------------------------------------------------
// The reference.

TEST(AttentionReference, OneKeyIsItsValue) {
  std::mt19937 random(1);
  OperandMemory memory(1 << 16);
  const AttentionShape s{.batch = 2,
                         .heads = 4,
                         .kv_heads = 2,
                         .q_len = 1,
                         .kv_len = 1,
                         .d_qk = 5,
                         .d_v = 3,
                         .causal = true,
                         .scale = 0.7F};
  const Operands o = make(s, Format::fp32, 1, memory, random);
  reference::run(o.forward);
  reference::run(o.backward);
  for (std::int64_t b = 0; b < 2; ++b) {
    for (std::int64_t h = 0; h < 4; ++h) {
      double score = 0;
      for (std::int64_t c = 0; c < 5; ++c) {
        score += value_at(o.forward.q, b, h * 5 + c) * value_at(o.forward.k, b, h / 2 * 5 + c);
        // The only weight is 1 whatever the score: nothing to learn from.
        EXPECT_NEAR(value_at(o.backward.d_q, b, h * 5 + c), 0, 1e-6);
      }
      EXPECT_NEAR(o.forward.lse[b * 4 + h], double{0.7F} * score, 1e-6);
      for (std::int64_t c = 0; c < 3; ++c) {
        EXPECT_EQ(value_at(o.forward.out, b, h * 3 + c), value_at(o.forward.v, b, h / 2 * 3 + c));
      }
    }
    for (std::int64_t g = 0; g < 2; ++g) {  // heads 2g and 2g + 1 read it
      for (std::int64_t c = 0; c < 3; ++c) {
        EXPECT_NEAR(value_at(o.backward.d_v, b, g * 3 + c),
                    value_at(o.backward.d_out, b, 2 * g * 3 + c) +
                        value_at(o.backward.d_out, b, (2 * g + 1) * 3 + c),
                    1e-6);
      }
    }
  }
}

TEST(AttentionReference, EqualScoresAverageTheKeysThatAreSeen) {
  std::mt19937 random(2);
  const std::vector<std::int32_t> positions = {5, 0, -1, 2};
  for (const int mask : {0, 1, 2}) {
    OperandMemory memory(1 << 16);
    const AttentionShape s{.batch = 1,
                           .heads = 1,
                           .kv_heads = 1,
                           .q_len = 4,
                           .kv_len = 6,
                           .d_qk = 2,
                           .d_v = 3,
                           .causal = mask > 0,
                           .scale = 1,
                           .query_positions = mask == 2 ? positions.data() : nullptr};
    const Operands o = make(s, Format::fp32, 0, memory, random);
    std::fill_n(static_cast<float*>(o.forward.q.data), 8, 0.0F);
    reference::run(o.forward);
    const int seen[3][4] = {{6, 6, 6, 6}, {3, 4, 5, 6}, {6, 1, 0, 3}};
    for (std::int64_t i = 0; i < 4; ++i) {
      const int keys = seen[mask][i];
      // Without keys: log 0.
      EXPECT_FLOAT_EQ(o.forward.lse[i], std::log(static_cast<float>(keys)));
      for (std::int64_t c = 0; c < 3; ++c) {
        double mean = 0;
        for (std::int64_t j = 0; j < keys; ++j) mean += value_at(o.forward.v, j, c) / keys;
        EXPECT_NEAR(value_at(o.forward.out, i, c), mean, 1e-7);
      }
    }
  }
}

/// sum of out * d_out in double, with one element of q, k or v moved by `step`.
double loss(const Operands& o, const Matrix* moved, std::int64_t row, std::int64_t column,
            double step) {
  const AttentionShape& s = o.forward.shape;
  const auto at = [&](const Matrix& m, std::int64_t r, std::int64_t c) {
    return value_at(m, r, c) + (&m == moved && r == row && c == column ? step : 0);
  };
  double sum = 0;
  for (std::int64_t b = 0; b < s.batch; ++b) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      const std::int64_t g = h * s.kv_heads / s.heads;
      for (std::int64_t i = 0; i < s.q_len; ++i) {
        double weights = 0;
        double weighted = 0;
        for (std::int64_t j = 0; j < s.kv_len; ++j) {
          if (s.causal && j > s.kv_len - s.q_len + i) continue;
          double score = 0;
          for (std::int64_t c = 0; c < s.d_qk; ++c) {
            score += at(o.forward.q, b * s.q_len + i, h * s.d_qk + c) *
                     at(o.forward.k, b * s.kv_len + j, g * s.d_qk + c);
          }
          const double weight = std::exp(score * double{s.scale});
          weights += weight;
          for (std::int64_t c = 0; c < s.d_v; ++c) {
            weighted += weight * at(o.forward.v, b * s.kv_len + j, g * s.d_v + c) *
                        value_at(o.backward.d_out, b * s.q_len + i, h * s.d_v + c);
          }
        }
        if (weights > 0) sum += weighted / weights;
      }
    }
  }
  return sum;
}

TEST(AttentionReference, GradientsAreDifferenceQuotients) {
  std::mt19937 random(3);
  for (const bool causal : {false, true}) {
    for (const auto& [q_len, kv_len] : {std::pair{3, 5}, {4, 4}, {5, 3}}) {
      OperandMemory memory(1 << 16);
      const AttentionShape s{.batch = 2,
                             .heads = 4,
                             .kv_heads = 2,
                             .q_len = q_len,
                             .kv_len = kv_len,
                             .d_qk = 3,
                             .d_v = 2,
                             .causal = causal,
                             .scale = 0.8F};
      const Operands o = make(s, Format::fp32, 1, memory, random);
      reference::run(o.forward);
      reference::run(o.backward);
      const std::pair<const Matrix*, const Matrix*> pairs[] = {{&o.forward.q, &o.backward.d_q},
                                                               {&o.forward.k, &o.backward.d_k},
                                                               {&o.forward.v, &o.backward.d_v}};
      for (const auto& [m, gradient] : pairs) {
        for (std::int64_t r = 0; r < m->rows; ++r) {
          for (std::int64_t c = 0; c < m->columns; ++c) {
            constexpr double kStep = 1e-4;  // the quotient errs by its square
            const double quotient =
                (loss(o, m, r, c, kStep) - loss(o, m, r, c, -kStep)) / (2 * kStep);
            // out and lse come rounded to FP32, and so does the gradient.
            ASSERT_NEAR(value_at(*gradient, r, c), quotient, 2e-6) << text_of(s, Format::fp32);
          }
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The CPU's.

/// `absolute`: what sums in FP32 may err by; then the output is rounded.
void expect_near(const std::vector<double>& actual, const std::vector<double>& expected,
                 Format format, double absolute, const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    if (actual[i] == expected[i]) continue;  // infinities
    ASSERT_NEAR(actual[i], expected[i], epsilon_of(format) * std::fabs(expected[i]) + absolute)
        << what << ", element " << i;
  }
}

void expect_agreement(const AttentionShape& s, Format format, std::int64_t gap, unsigned seed) {
  std::mt19937 random(seed);
  OperandMemory memory;
  const Operands o = make(s, format, gap, memory, random);
  const std::string what = text_of(s, format);
  ASSERT_EQ(why_impossible(o.forward), "") << what;
  ASSERT_EQ(why_impossible(o.backward), "") << what;

  const std::vector<std::byte> before = memory.contents();
  cpu::run(o.forward);
  EXPECT_EQ(memory.written_outside(o.forward, before), "") << what;
  const std::vector<double> out = values_of(o.forward.out);
  const std::vector<double> lse = lse_of(o.forward);
  memory.set_contents(before);
  reference::run(o.forward);
  EXPECT_EQ(memory.written_outside(o.forward, before), "") << what;
  // A score is a sum of d_qk products of at most 1; its error moves all weights by as much. Each
  // of two sums over keys adds its own.
  const double eps = 0x1p-23;
  const double score_error = eps * static_cast<double>(s.d_qk + 4) * double{s.scale};
  const double weight_error = 2 * score_error + eps * static_cast<double>(s.kv_len + 4);
  expect_near(out, values_of(o.forward.out), format, weight_error, what + ": out");
  expect_near(lse, lse_of(o.forward), Format::fp32, score_error + 8 * eps, what + ": lse");

  // Both backwards get the reference's out and lse.
  const std::vector<std::byte> between = memory.contents();
  cpu::run(o.backward);
  EXPECT_EQ(memory.written_outside(o.backward, between), "") << what;
  const std::vector<double> d_q = values_of(o.backward.d_q);
  const std::vector<double> d_k = values_of(o.backward.d_k);
  const std::vector<double> d_v = values_of(o.backward.d_v);
  memory.set_contents(between);
  reference::run(o.backward);
  EXPECT_EQ(memory.written_outside(o.backward, between), "") << what;
  // Sums over keys (d_q) or over the queries that see a key, of weights times at most 2 d_v.
  const double d_p = static_cast<double>(2 * s.d_v);
  const double readers = static_cast<double>(s.q_len * s.heads / s.kv_heads);
  const double d_s_error =
      (weight_error + eps * static_cast<double>(s.d_v)) * d_p * double{s.scale};
  expect_near(d_q, values_of(o.backward.d_q), format, d_s_error, what + ": d_q");
  // Weights of a query sum to 1, so those of a key sum to readers / keys, give or take.
  const double column = std::max(1.0, readers / static_cast<double>(s.kv_len));
  expect_near(d_k, values_of(o.backward.d_k), format, 4 * column * d_s_error, what + ": d_k");
  expect_near(d_v, values_of(o.backward.d_v), format, 4 * column * (weight_error + eps * readers),
              what + ": d_v");
}

TEST(AttentionCpu, AgreesOnSmallShapes) {
  std::mt19937 random(4);
  const std::int64_t lengths[] = {1, 2, 3, 8, 17, 33, 64};
  const std::int64_t widths[] = {1, 3, 8, 16, 24, 33};
  for (unsigned i = 0; i < 100; ++i) {
    const auto groups = static_cast<std::int64_t>(1 + random() % 3);
    AttentionShape s{.batch = static_cast<std::int64_t>(1 + random() % 2),
                     .heads = groups * static_cast<std::int64_t>(1 + random() % 3),
                     .kv_heads = groups,
                     .q_len = lengths[random() % std::size(lengths)],
                     .kv_len = lengths[random() % std::size(lengths)],
                     .d_qk = widths[random() % std::size(widths)],
                     .d_v = widths[random() % std::size(widths)],
                     .causal = random() % 3 != 0};
    s.scale = 1 / std::sqrt(static_cast<float>(s.d_qk));
    std::vector<std::int32_t> positions;
    if (random() % 3 == 0) {
      // Any order; before the first key and behind the last too.
      for (std::int64_t q = 0; q < s.q_len; ++q) {
        positions.push_back(
            static_cast<std::int32_t>(random() % static_cast<unsigned>(s.kv_len + 3)) - 1);
      }
      s.query_positions = positions.data();
    }
    expect_agreement(s, random() % 2 == 0 ? Format::fp32 : Format::bf16,
                     static_cast<std::int64_t>(random() % 3), i);
  }
}

TEST(AttentionCpu, AgreesWhereThereAreManyBlocks) {
  // 256 queries and keys are a block.
  for (const Format format : {Format::fp32, Format::bf16}) {
    for (const auto& [q_len, kv_len] : {std::pair{600, 600}, {300, 700}, {520, 257}}) {
      expect_agreement({.batch = 1,
                        .heads = 2,
                        .kv_heads = 1,
                        .q_len = q_len,
                        .kv_len = kv_len,
                        .d_qk = 12,
                        .d_v = 8,
                        .causal = true,
                        .scale = 0.3F},
                       format, 2, 5);
    }
  }
}

TEST(AttentionCpu, AgreesWhereScoresAreLarge) {
  // Scores of up to +-60: the largest has to be taken off first.
  std::mt19937 random(6);
  OperandMemory memory;
  const AttentionShape s{.batch = 1,
                         .heads = 1,
                         .kv_heads = 1,
                         .q_len = 400,
                         .kv_len = 400,
                         .d_qk = 4,
                         .d_v = 4,
                         .causal = true,
                         .scale = 30};
  const Operands o = make(s, Format::fp32, 0, memory, random);
  cpu::run(o.forward);
  const std::vector<double> out = values_of(o.forward.out);
  const std::vector<double> lse = lse_of(o.forward);
  reference::run(o.forward);
  // Scores of 60 err by 60 epsilon.
  expect_near(out, values_of(o.forward.out), Format::fp32, 1e-4, "out");
  expect_near(lse, lse_of(o.forward), Format::fp32, 1e-4, "lse");
}

TEST(AttentionCpu, BytesDoNotDependOnThreads) {
  std::mt19937 random(7);
  OperandMemory memory;
  const AttentionShape s{.batch = 2,
                         .heads = 4,
                         .kv_heads = 2,
                         .q_len = 300,
                         .kv_len = 300,
                         .d_qk = 16,
                         .d_v = 8,
                         .causal = true,
                         .scale = 0.25F};
  const Operands o = make(s, Format::bf16, 0, memory, random);
  const std::vector<std::byte> before = memory.contents();
  std::vector<std::vector<std::byte>> after;
  for (const int threads : {1, 2}) {
    memory.set_contents(before);
    tbb::task_arena(threads).execute([&] {
      cpu::run(o.forward);
      cpu::run(o.backward);
    });
    after.push_back(memory.contents());
  }
  EXPECT_EQ(after[0], after[1]);
  EXPECT_NE(after[0], before);
}

}  // namespace
}  // namespace orrery::kernels
