#include "sim/shape.hpp"

#include <gtest/gtest.h>

namespace orrery {
namespace {

Shape shape_of(const Gemm& g) {
  return {.work = g, .label = "", .sms = 0};
}
Shape shape_of(const AttentionCore& a) {
  return {.work = a, .label = "", .sms = 0};
}

/// The definition of the mask, pair by pair.
double counted_pairs(std::int64_t q_len, std::int64_t kv_len) {
  double pairs = 0;
  for (std::int64_t i = 0; i < q_len; ++i) {
    for (std::int64_t key = 0; key < kv_len; ++key) pairs += key <= kv_len - q_len + i ? 1 : 0;
  }
  return pairs;
}

TEST(Shape, CausalAttentionCountsThePairsThatAreNotMasked) {
  for (const auto& [q, kv] : {std::pair{1, 1}, {7, 7}, {5, 12}, {12, 5}, {1, 64}, {64, 1}}) {
    const AttentionCore a{.causal = true,
                          .batch = 2,
                          .heads = 3,
                          .kv_heads = 1,
                          .q_len = q,
                          .kv_len = kv,
                          .d_qk = 4,
                          .d_v = 8};
    EXPECT_EQ(flops_of(shape_of(a)), 2 * counted_pairs(q, kv) * 2 * 3 * (4 + 8))
        << q << " by " << kv;
  }
}

TEST(Shape, AttentionFlopsAgreeWithWhatCudnnPublishes) {
  // NVIDIA/cudnn-frontend, H200, dsv3, 4096: 1.148 ms at 599 TFLOP/s forward, 4.424 ms at 404
  // backward. It counts half of the square, we the diagonal too: 1 / 4096 more. Its figures have
  // three digits.
  AttentionCore a{.inputs = NumberFormat::bf16,
                  .causal = true,
                  .heads = 128,
                  .kv_heads = 128,
                  .q_len = 4096,
                  .kv_len = 4096,
                  .d_qk = 192,
                  .d_v = 128};
  EXPECT_NEAR(flops_of(shape_of(a)) / (1.148e-3 * 599e12), 1, 2e-3);
  a.backward = true;
  EXPECT_NEAR(flops_of(shape_of(a)) / (4.424e-3 * 404e12), 1, 2e-3);
}

TEST(Shape, GemmFlopsAndBytes) {
  const Gemm grouped{.inputs = NumberFormat::bf16, .groups = 4, .m = 10, .n = 20, .k = 30};
  EXPECT_EQ(flops_of(shape_of(grouped)), 2.0 * 4 * 10 * 20 * 30);
  EXPECT_EQ(bytes_of(shape_of(grouped)), 4 * 2.0 * (10 * 30 + 30 * 20 + 10 * 20));
  Gemm weight{.inputs = NumberFormat::fp8_block,
              .pass = Pass::backward_weight,
              .accumulate = true,
              .m = 256,
              .n = 512,
              .k = 128};
  // 1 byte an element, an FP32 scale for each of the 256 + 512 tiles of 1x128, FP32 read and
  // written.
  EXPECT_EQ(bytes_of(shape_of(weight)), (256 + 512) * 128 + 4 * (256 + 512) + 8.0 * 256 * 512);
  Gemm forward{.inputs = NumberFormat::fp8_block, .m = 256, .n = 512, .k = 128};
  // The weight has one scale for each of its 4 blocks of 128x128; BF16 out.
  EXPECT_EQ(bytes_of(shape_of(forward)), (256 + 512) * 128 + 4 * (256 + 4) + 2.0 * 256 * 512);
}

TEST(Shape, BytesPerElement) {
  EXPECT_EQ(bytes_per_element(NumberFormat::fp32), 4);
  EXPECT_EQ(bytes_per_element(NumberFormat::bf16), 2);
  EXPECT_EQ(bytes_per_element(NumberFormat::fp8_tensor), 1);
  EXPECT_EQ(128 * bytes_per_element(NumberFormat::fp8_block), 128 + 4);
  EXPECT_EQ(128 * bytes_per_element(NumberFormat::e5m6), 128 * 12 / 8 + 4);
}

TEST(Shape, Description) {
  Shape s = shape_of(Gemm{.inputs = NumberFormat::fp8_block, .m = 4096, .n = 24576, .k = 1536});
  s.sms = 112;
  EXPECT_EQ(describe(s), "GEMM fp8_block 4096x24576x1536 on 112 SMs");
  EXPECT_EQ(describe({.work = Mark{}, .label = "", .sms = 0}), "mark");
}

TEST(Shape, StreamingAndTransfersDoNoArithmetic) {
  EXPECT_EQ(flops_of({.work = Streaming{.bytes_read = 8}, .label = "", .sms = 0}), 0);
  EXPECT_EQ(flops_of({.work = Send{.bytes = 8}, .label = "", .sms = 0}), 0);
  EXPECT_EQ(
      bytes_of({.work = Streaming{.bytes_read = 8, .bytes_written = 3}, .label = "", .sms = 0}),
      11);
}

}  // namespace
}  // namespace orrery
