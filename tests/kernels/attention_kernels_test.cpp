// The attention kernels for tensor cores, run on a machine that plays a Hopper block on the CPU
// (attention_machine.hpp), against attention by its definition in double.

#include <gtest/gtest.h>

#include "tests/kernels/attention_for_tests.hpp"

// The kernels come after it: it says what __global__ means.
#include "tests/kernels/attention_machine.hpp"

#include "kernels/cuda/attention_hopper.cuh"

namespace orrery::kernels::cuda::attention {
namespace {

constexpr std::uint16_t kPoison = 0x7fc1;  // a NaN

/// A BF16 matrix in memory, with rows that are longer than its columns, and a margin.
struct Operand {
  std::vector<std::uint16_t> memory;
  Matrix matrix;
  static constexpr std::int64_t kMargin = 64;

  Operand(std::int64_t rows, std::int64_t columns, std::int64_t gap) {
    const std::int64_t pitch = columns + gap;
    memory.assign(static_cast<std::size_t>(rows * pitch + 2 * kMargin), kPoison);
    matrix = {.data = memory.data() + kMargin,
              .rows = rows,
              .columns = columns,
              .pitch = pitch,
              .format = Format::bf16};
  }
  std::vector<double> draw(std::mt19937_64& random, double deviation) {
    std::normal_distribution<double> normal(0, deviation);
    std::vector<double> numbers;
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      for (std::int64_t c = 0; c < matrix.columns; ++c) {
        const std::uint16_t code = bf16_of(static_cast<float>(normal(random)));
        at(r, c) = code;
        numbers.push_back(static_cast<double>(float_of_bf16(code)));
      }
    }
    return numbers;
  }
  std::vector<double> numbers() const {
    std::vector<double> values;
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      for (std::int64_t c = 0; c < matrix.columns; ++c) {
        values.push_back(static_cast<double>(float_of_bf16(at(r, c))));
      }
    }
    return values;
  }
  /// Whether what lies outside of the rows' columns is as it was.
  bool untouched_outside() const {
    std::vector<bool> inside(memory.size(), false);
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      for (std::int64_t c = 0; c < matrix.columns; ++c) {
        inside[static_cast<std::size_t>(kMargin + r * matrix.pitch + c)] = true;
      }
    }
    for (std::size_t i = 0; i < memory.size(); ++i) {
      if (!inside[i] && memory[i] != kPoison) return false;
    }
    return true;
  }
  std::uint16_t& at(std::int64_t r, std::int64_t c) {
    return memory[static_cast<std::size_t>(kMargin + r * matrix.pitch + c)];
  }
  const std::uint16_t& at(std::int64_t r, std::int64_t c) const {
    return memory[static_cast<std::size_t>(kMargin + r * matrix.pitch + c)];
  }
};

CUtensorMap map_of(const MapGeometry& g) {
  CUtensorMap map;
  map.data = static_cast<const std::uint16_t*>(g.data);
  for (std::size_t i = 0; i < 4; ++i) {
    map.dims[i] = g.dims[i];
    map.strides[i] = g.strides[i];
    map.box[i] = g.box[i];
  }
  return map;
}

struct Case {
  const char* name;
  std::int64_t batch, heads, kv_heads, q_len, kv_len, d_qk, d_v;
  bool causal;
  int sms;
  std::int64_t l2_bytes;
};

class AttentionKernels : public ::testing::TestWithParam<Case> {
 protected:
  template <int kDqk, int kDv>
  static void run(std::uint64_t seed) {
    const Case& c = GetParam();
    AttentionShape s{.batch = c.batch,
                     .heads = c.heads,
                     .kv_heads = c.kv_heads,
                     .q_len = c.q_len,
                     .kv_len = c.kv_len,
                     .d_qk = c.d_qk,
                     .d_v = c.d_v,
                     .causal = c.causal,
                     .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(c.d_qk)))};
    AttentionDevice device;
    device.sms = c.sms;
    device.l2_bytes = c.l2_bytes;

    std::mt19937_64 random(seed);
    Operand q(c.batch * c.q_len, c.heads * c.d_qk, 8);
    Operand k(c.batch * c.kv_len, c.kv_heads * c.d_qk, 0);
    Operand v(c.batch * c.kv_len, c.kv_heads * c.d_v, 16);
    Operand out(c.batch * c.q_len, c.heads * c.d_v, 24);
    Operand d_out(c.batch * c.q_len, c.heads * c.d_v, 8);
    Operand d_q(c.batch * c.q_len, c.heads * c.d_qk, 8);
    Operand d_k(c.batch * c.kv_len, c.kv_heads * c.d_qk, 40);
    Operand d_v(c.batch * c.kv_len, c.kv_heads * c.d_v, 8);
    AttentionNumbers numbers;
    numbers.shape = s;
    // Scores of a few units, so that softmax is neither flat nor one key.
    numbers.q = q.draw(random, 2);
    numbers.k = k.draw(random, 1);
    numbers.v = v.draw(random, 1);
    numbers.d_out = d_out.draw(random, 1);
    std::vector<float> lse(static_cast<std::size_t>(c.batch * c.heads * c.q_len + 2),
                           std::numeric_limits<float>::quiet_NaN());
    const AttentionResults expected = attention_by_definition(numbers);

    Machine machine(seed);
    const AttentionForward forward{s, q.matrix, k.matrix, v.matrix, out.matrix, lse.data() + 1};
    const ForwardArguments arguments = forward_arguments(forward, device);
    const CUtensorMap q128 = map_of(geometry_of(q.matrix, s, c.heads, c.q_len, kAttentionTile));
    const CUtensorMap k128 = map_of(geometry_of(k.matrix, s, c.kv_heads, c.kv_len, kKeys));
    const CUtensorMap v128 = map_of(geometry_of(v.matrix, s, c.kv_heads, c.kv_len, kKeys));
    machine.run(arguments.work.grid, kThreads, ForwardMemory<kDqk, kDv>::bytes,
                [&] { forward_kernel<kDqk, kDv>(q128, k128, v128, arguments); });
    // BF16 keeps 8 bits: 2^-9 of rounding in P, in the result, and less elsewhere.
    EXPECT_LT(distance(out.numbers(), expected.out), 4e-3);
    EXPECT_TRUE(out.untouched_outside());
    std::vector<double> lse_numbers;
    for (std::size_t i = 1; i + 1 < lse.size(); ++i) {
      lse_numbers.push_back(static_cast<double>(lse[i]));
    }
    EXPECT_LT(distance(lse_numbers, expected.lse), 1e-6);
    EXPECT_TRUE(std::isnan(lse.front()) && std::isnan(lse.back()));

    std::vector<float> workspace(static_cast<std::size_t>(tensor_core_backward_bytes(s) / 4 + 64),
                                 std::numeric_limits<float>::quiet_NaN());
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(workspace.data());
    float* const aligned = workspace.data() + (256 - address % 256) % 256 / 4;
    const AttentionBackward backward{s,          q.matrix,     k.matrix,       v.matrix,
                                     out.matrix, d_out.matrix, lse.data() + 1, d_q.matrix,
                                     d_k.matrix, d_v.matrix,   aligned};
    const RowSumArguments sums = row_sum_arguments(backward);
    machine.run(3, 64, 0, [&] { row_sum_kernel<kDv>(sums); });

    const CUtensorMap d_out128 =
        map_of(geometry_of(d_out.matrix, s, c.heads, c.q_len, kAttentionTile));
    const CUtensorMap q64 = map_of(geometry_of(q.matrix, s, c.heads, c.q_len, kStep));
    const CUtensorMap d_out64 = map_of(geometry_of(d_out.matrix, s, c.heads, c.q_len, kStep));
    const CUtensorMap k64 = map_of(geometry_of(k.matrix, s, c.kv_heads, c.kv_len, kStep));
    const CUtensorMap v64 = map_of(geometry_of(v.matrix, s, c.kv_heads, c.kv_len, kStep));
    const BackwardArguments over_keys = backward_arguments(backward, true, device);
    machine.run(over_keys.work.grid, kThreads, KeysMemory<kDqk, kDv>::bytes,
                [&] { keys_kernel<kDqk, kDv>(k128, v128, q64, d_out64, over_keys); });
    const BackwardArguments over_queries = backward_arguments(backward, false, device);
    machine.run(over_queries.work.grid, kThreads, QueriesMemory<kDqk, kDv>::bytes,
                [&] { queries_kernel<kDqk, kDv>(q128, d_out128, k64, v64, over_queries); });
    EXPECT_LT(distance(d_q.numbers(), expected.d_q), 8e-3);
    EXPECT_LT(distance(d_k.numbers(), expected.d_k), 8e-3);
    EXPECT_LT(distance(d_v.numbers(), expected.d_v), 8e-3);
    EXPECT_TRUE(d_q.untouched_outside());
    EXPECT_TRUE(d_k.untouched_outside());
    EXPECT_TRUE(d_v.untouched_outside());
  }
};

TEST_P(AttentionKernels, ComputeAttentionAndItsGradients) {
  const Case& c = GetParam();
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    SCOPED_TRACE(seed);
    if (c.d_qk == 192) {
      run<192, 128>(seed);
    } else if (c.d_qk == 128) {
      run<128, 128>(seed);
    } else {
      run<64, 64>(seed);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AttentionKernels,
    ::testing::Values(Case{"OneTile", 1, 1, 1, 128, 128, 64, 64, true, 1, 1 << 20},
                      Case{"DeepSeekV3", 1, 1, 1, 384, 384, 192, 128, true, 2, 1 << 20},
                      Case{"DeepSeekV3Odd", 1, 2, 2, 203, 203, 192, 128, true, 2, 1 << 20},
                      Case{"Grouped", 2, 4, 2, 150, 150, 128, 128, true, 3, 1 << 16},
                      Case{"MoreKeysThanQueries", 1, 2, 1, 70, 333, 64, 64, true, 2, 1 << 20},
                      Case{"ManyBlocks", 1, 1, 1, 128, 700, 64, 64, true, 1, 1 << 20},
                      Case{"NotCausal", 1, 1, 1, 130, 200, 128, 128, false, 1, 1 << 20},
                      Case{"Short", 1, 2, 2, 5, 5, 64, 64, true, 8, 1 << 20}),
    [](const ::testing::TestParamInfo<Case>& one) { return one.param.name; });

}  // namespace
}  // namespace orrery::kernels::cuda::attention
