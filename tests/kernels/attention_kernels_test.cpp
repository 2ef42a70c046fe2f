// The attention kernels of our own, run on a machine that plays a Hopper block on the CPU
// (attention_machine.hpp), against attention by its definition in double.

#include <gtest/gtest.h>

#include <cstring>

#include "tests/kernels/attention_for_tests.hpp"

// The kernels come after it: it says what __global__ means.
#include "tests/kernels/attention_machine.hpp"

#include "kernels/cuda/attention_hopper.cuh"
#include "kernels/cuda/attention_simple.cuh"

namespace orrery::kernels::cuda::attention {
namespace {

double number(std::uint16_t code) {
  return static_cast<double>(float_of_bf16(code));
}
double number(float x) {
  return static_cast<double>(x);
}
template <class T>
T poison() {
  if constexpr (sizeof(T) == 4) {
    return std::numeric_limits<float>::quiet_NaN();
  } else {
    return 0x7fc1;  // a NaN
  }
}

/// A matrix in memory, BF16 or FP32, whose rows are longer than its columns, with a margin around
/// it.
template <class T>
struct Operand {
  std::vector<T> memory;
  Matrix matrix;
  static constexpr std::int64_t kMargin = 64;

  Operand(std::int64_t rows, std::int64_t columns, std::int64_t gap) {
    const std::int64_t pitch = columns + gap;
    memory.assign(static_cast<std::size_t>(rows * pitch + 2 * kMargin), poison<T>());
    matrix = {.data = memory.data() + kMargin,
              .rows = rows,
              .columns = columns,
              .pitch = pitch,
              .format = sizeof(T) == 4 ? Format::fp32 : Format::bf16};
  }
  std::vector<double> draw(std::mt19937_64& random, double deviation) {
    std::normal_distribution<double> normal(0, deviation);
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      for (std::int64_t c = 0; c < matrix.columns; ++c) {
        const auto x = static_cast<float>(normal(random));
        if constexpr (sizeof(T) == 4) {
          at(r, c) = x;
        } else {
          at(r, c) = bf16_of(x);
        }
      }
    }
    return numbers();
  }
  std::vector<double> numbers() {
    std::vector<double> values;
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      for (std::int64_t c = 0; c < matrix.columns; ++c) values.push_back(number(at(r, c)));
    }
    return values;
  }
  /// Whether what lies outside of the rows' columns is as it was.
  bool untouched_outside() {
    std::vector<T> blank = memory;
    for (std::int64_t r = 0; r < matrix.rows; ++r) {
      for (std::int64_t c = 0; c < matrix.columns; ++c) {
        blank[static_cast<std::size_t>(kMargin + r * matrix.pitch + c)] = poison<T>();
      }
    }
    const std::vector<T> expected(memory.size(), poison<T>());
    return std::memcmp(blank.data(), expected.data(), blank.size() * sizeof(T)) == 0;
  }
  T& at(std::int64_t r, std::int64_t c) {
    return memory[static_cast<std::size_t>(kMargin + r * matrix.pitch + c)];
  }
};

/// Operands of a forward and a backward pass, drawn, and what should come out.
template <class T>
struct Problem {
  AttentionShape s;
  Operand<T> q, k, v, out, d_out, d_q, d_k, d_v;
  std::vector<float> lse, workspace;
  AttentionForward forward;
  AttentionBackward backward;
  AttentionResults expected;

  Problem(const AttentionShape& shape, std::uint64_t seed)
      : s(shape),
        q(s.batch * s.q_len, s.heads * s.d_qk, 8),
        k(s.batch * s.kv_len, s.kv_heads * s.d_qk, 0),
        v(s.batch * s.kv_len, s.kv_heads * s.d_v, 16),
        out(s.batch * s.q_len, s.heads * s.d_v, 24),
        d_out(s.batch * s.q_len, s.heads * s.d_v, 8),
        d_q(s.batch * s.q_len, s.heads * s.d_qk, 8),
        d_k(s.batch * s.kv_len, s.kv_heads * s.d_qk, 40),
        d_v(s.batch * s.kv_len, s.kv_heads * s.d_v, 8),
        lse(static_cast<std::size_t>(s.batch * s.heads * s.q_len + 2), poison<float>()),
        workspace(
            static_cast<std::size_t>(
                std::max(attention_workspace_bytes(s), tensor_core_backward_bytes(s)) / 4 + 64),
            poison<float>()) {
    std::mt19937_64 random(seed);
    // Scores of a few units, so that softmax is neither flat nor one key.
    AttentionNumbers numbers{.shape = s,
                             .q = q.draw(random, 2),
                             .k = k.draw(random, 1),
                             .v = v.draw(random, 1),
                             .d_out = d_out.draw(random, 1)};
    expected = attention_by_definition(numbers);
    const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(workspace.data());
    float* const aligned = workspace.data() + (256 - address % 256) % 256 / 4;
    forward = {s, q.matrix, k.matrix, v.matrix, out.matrix, lse.data() + 1};
    backward = {s,          q.matrix,     k.matrix,       v.matrix,
                out.matrix, d_out.matrix, lse.data() + 1, d_q.matrix,
                d_k.matrix, d_v.matrix,   aligned};
  }

  void check_forward(double tolerance, double lse_tolerance) {
    EXPECT_LT(distance(out.numbers(), expected.out), tolerance);
    EXPECT_TRUE(out.untouched_outside());
    for (std::size_t i = 0; i < expected.lse.size(); ++i) {
      if (std::isinf(expected.lse[i])) {
        EXPECT_EQ(number(lse[i + 1]), expected.lse[i]);
      } else {
        EXPECT_NEAR(number(lse[i + 1]), expected.lse[i], lse_tolerance);
      }
    }
    EXPECT_TRUE(std::isnan(lse.front()) && std::isnan(lse.back()));
  }
  void check_backward(double tolerance) {
    EXPECT_LT(distance(d_q.numbers(), expected.d_q), tolerance);
    EXPECT_LT(distance(d_k.numbers(), expected.d_k), tolerance);
    EXPECT_LT(distance(d_v.numbers(), expected.d_v), tolerance);
    EXPECT_TRUE(d_q.untouched_outside());
    EXPECT_TRUE(d_k.untouched_outside());
    EXPECT_TRUE(d_v.untouched_outside());
  }
};

AttentionShape shape_for(std::int64_t batch, std::int64_t heads, std::int64_t kv_heads,
                         std::int64_t q_len, std::int64_t kv_len, std::int64_t d_qk,
                         std::int64_t d_v, bool causal = true) {
  return {.batch = batch,
          .heads = heads,
          .kv_heads = kv_heads,
          .q_len = q_len,
          .kv_len = kv_len,
          .d_qk = d_qk,
          .d_v = d_v,
          .causal = causal,
          .scale = static_cast<float>(1 / std::sqrt(static_cast<double>(d_qk)))};
}

// ---------------------------------------------------------------------------------------------
// Tensor cores.

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
  AttentionShape shape;
  int sms;                ///< blocks at most
  std::int64_t l2_bytes;  ///< decides how many heads make a section
};

class TensorCores : public ::testing::TestWithParam<Case> {
 protected:
  template <int kDqk, int kDv, bool kTable>
  static void run(std::uint64_t seed) {
    AttentionDevice device;
    device.sms = GetParam().sms;
    device.l2_bytes = GetParam().l2_bytes;
    Problem<std::uint16_t> problem(GetParam().shape, seed);
    const AttentionShape& s = problem.s;
    Machine machine(seed);
    std::vector<std::int64_t> table(static_cast<std::size_t>(attention_table_bytes(s) / 8 + 1), -1);
    void* const aligned = table.data() + reinterpret_cast<std::uintptr_t>(table.data()) % 16 / 8;
    if (kTable) {
      const SeenArguments seen = seen_arguments(s, aligned);
      machine.run(seen.padded / kRangeQueries, 32, 0, [&] { seen_kernel(seen); });
    }
    const auto map_of_rows = [&](const Matrix& m, std::int64_t heads, std::int64_t length,
                                 int rows) {
      return map_of(geometry_of(m, s, heads, length, rows));
    };
    const CUtensorMap q128 = map_of_rows(problem.q.matrix, s.heads, s.q_len, kAttentionTile);
    const CUtensorMap k128 = map_of_rows(problem.k.matrix, s.kv_heads, s.kv_len, kKeys);
    const CUtensorMap v128 = map_of_rows(problem.v.matrix, s.kv_heads, s.kv_len, kKeys);
    const ForwardArguments<kTable> arguments =
        forward_arguments<kTable>(problem.forward, aligned, device);
    machine.run(arguments.work.grid, kThreads, ForwardMemory<kDqk, kDv>::bytes,
                [&] { forward_kernel<kDqk, kDv, kTable>(q128, k128, v128, arguments); });
    // BF16 keeps 8 bits: up to 2^-9 of rounding in P, and again in what is stored.
    problem.check_forward(4e-3, 2e-6);

    const RowSumArguments sums = row_sum_arguments(problem.backward);
    machine.run(3, 64, 0, [&] { row_sum_kernel<kDv>(sums); });
    const CUtensorMap d_out128 =
        map_of_rows(problem.d_out.matrix, s.heads, s.q_len, kAttentionTile);
    const CUtensorMap q64 = map_of_rows(problem.q.matrix, s.heads, s.q_len, kStep);
    const CUtensorMap d_out64 = map_of_rows(problem.d_out.matrix, s.heads, s.q_len, kStep);
    const CUtensorMap k64 = map_of_rows(problem.k.matrix, s.kv_heads, s.kv_len, kStep);
    const CUtensorMap v64 = map_of_rows(problem.v.matrix, s.kv_heads, s.kv_len, kStep);
    const BackwardArguments<kTable> over_keys =
        backward_arguments<kTable>(problem.backward, true, aligned, device);
    machine.run(over_keys.work.grid, kThreads, KeysMemory<kDqk, kDv>::bytes,
                [&] { keys_kernel<kDqk, kDv, kTable>(k128, v128, q64, d_out64, over_keys); });
    const BackwardArguments<kTable> over_queries =
        backward_arguments<kTable>(problem.backward, false, aligned, device);
    machine.run(over_queries.work.grid, kThreads, QueriesMemory<kDqk, kDv>::bytes,
                [&] { queries_kernel<kDqk, kDv, kTable>(q128, d_out128, k64, v64, over_queries); });
    problem.check_backward(8e-3);
  }
};

TEST_P(TensorCores, ComputeAttentionAndItsGradients) {
  const AttentionShape& s = GetParam().shape;
  for (const std::uint64_t seed : {1U, 2U, 3U}) {
    SCOPED_TRACE(seed);
    if (s.d_qk == 192) {
      s.query_positions != nullptr ? run<192, 128, true>(seed) : run<192, 128, false>(seed);
    } else if (s.d_qk == 128) {
      s.query_positions != nullptr ? run<128, 128, true>(seed) : run<128, 128, false>(seed);
    } else {
      s.query_positions != nullptr ? run<64, 64, true>(seed) : run<64, 64, false>(seed);
    }
  }
}

/// What rank 1 of 3 has of a sequence that is cut in 6: pieces 1 and 4, so that all have the same
/// work (Llama 3 report, arXiv 2407.21783, 3.3.2); and queries in no order at all.
std::vector<std::int32_t> pieces_of_a_split_sequence() {
  std::vector<std::int32_t> positions;
  for (std::int32_t i = 0; i < 100; ++i) positions.push_back(100 + i);
  for (std::int32_t i = 0; i < 100; ++i) positions.push_back(400 + i);
  return positions;
}
std::vector<std::int32_t> any_order() {
  std::vector<std::int32_t> positions;
  for (std::int32_t i = 0; i < 140; ++i) positions.push_back(i * 89 % 300);
  return positions;
}
AttentionShape with_table(AttentionShape shape, const std::vector<std::int32_t>& positions) {
  shape.q_len = static_cast<std::int64_t>(positions.size());
  shape.query_positions = positions.data();
  return shape;
}
const std::vector<std::int32_t> kPieces = pieces_of_a_split_sequence();
const std::vector<std::int32_t> kAnyOrder = any_order();

INSTANTIATE_TEST_SUITE_P(
    Shapes, TensorCores,
    ::testing::Values(Case{"OneTile", shape_for(1, 1, 1, 128, 128, 64, 64), 1, 1 << 20},
                      Case{"DeepSeekV3", shape_for(1, 1, 1, 384, 384, 192, 128), 2, 1 << 20},
                      Case{"DeepSeekV3Odd", shape_for(1, 2, 2, 203, 203, 192, 128), 2, 1 << 20},
                      Case{"Grouped", shape_for(2, 2, 1, 150, 150, 128, 128), 3, 1 << 16},
                      Case{"MoreKeys", shape_for(1, 2, 1, 70, 333, 64, 64), 2, 1 << 20},
                      Case{"ManyBlocks", shape_for(1, 1, 1, 128, 700, 64, 64), 1, 1 << 20},
                      Case{"NotCausal", shape_for(1, 1, 1, 130, 200, 128, 128, false), 1, 1 << 20},
                      Case{"SplitSequence",
                           with_table(shape_for(1, 2, 1, 0, 600, 128, 128), kPieces), 2, 1 << 20},
                      Case{"AnyOrderDeepSeekV3",
                           with_table(shape_for(1, 1, 1, 0, 300, 192, 128), kAnyOrder), 2, 1 << 20},
                      Case{"AnyOrder", with_table(shape_for(1, 1, 1, 0, 300, 64, 64), kAnyOrder), 2,
                           1 << 20},
                      Case{"MoreQueries", shape_for(1, 1, 1, 300, 90, 64, 64), 2, 1 << 20},
                      Case{"Short", shape_for(1, 2, 2, 5, 5, 64, 64), 8, 1 << 20}),
    [](const ::testing::TestParamInfo<Case>& one) { return one.param.name; });

// ---------------------------------------------------------------------------------------------
// CUDA cores.

template <class T, int kColumns>
void run_cuda_cores(const AttentionShape& shape, std::uint64_t seed, int grid, double tolerance) {
  Problem<T> problem(shape, seed);
  Machine machine(seed);
  const int bytes = simple_shared_bytes(shape.d_qk, shape.d_v);
  const SimpleArguments<T> forward = simple_arguments<T>(problem.forward);
  machine.run(grid, kSimpleThreads, bytes, [&] { simple_forward_kernel<T, kColumns>(forward); });
  problem.check_forward(tolerance, 2e-6);
  const SimpleArguments<T> backward = simple_arguments<T>(problem.backward);
  machine.run(grid, kSimpleThreads, bytes, [&] { simple_queries_kernel<T, kColumns>(backward); });
  machine.run(grid, kSimpleThreads, bytes, [&] { simple_keys_kernel<T, kColumns>(backward); });
  problem.check_backward(tolerance);
}

TEST(CudaCores, ComputeAttentionInFp32) {
  run_cuda_cores<float, 16>(shape_for(2, 4, 2, 70, 70, 64, 64), 1, 3, 2e-6);
  run_cuda_cores<float, 64>(shape_for(1, 1, 1, 45, 60, 192, 128), 2, 2, 2e-6);
  run_cuda_cores<float, 16>(shape_for(1, 2, 2, 33, 80, 24, 17, false), 3, 1, 2e-6);
}

// The row sums are of what the forward pass stored, rounded.
TEST(CudaCores, ComputeAttentionInBf16) {
  run_cuda_cores<std::uint16_t, 32>(shape_for(1, 2, 1, 66, 66, 128, 128), 1, 2, 4e-3);
}

// Causal with more queries than keys: the first see none.
TEST(CudaCores, GiveZeroWhereNothingIsSeen) {
  run_cuda_cores<float, 16>(shape_for(1, 1, 1, 70, 40, 32, 32), 1, 1, 2e-6);
}

// A part of a sequence that is split over GPUs: rows 5, 6, 7, ... and 60, 61, ... of 90.
TEST(CudaCores, TakeATableOfWhatQueriesSee) {
  std::vector<std::int32_t> positions;
  for (std::int32_t i = 0; i < 25; ++i) positions.push_back(5 + i);
  for (std::int32_t i = 0; i < 30; ++i) positions.push_back(60 + i);
  AttentionShape shape = shape_for(2, 2, 1, 55, 90, 48, 32);
  shape.query_positions = positions.data();
  run_cuda_cores<float, 16>(shape, 1, 2, 2e-6);
}

}  // namespace
}  // namespace orrery::kernels::cuda::attention
