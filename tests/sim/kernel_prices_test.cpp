#include "sim/kernel_prices.hpp"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <string>
#include <vector>

namespace orrery {
namespace {

const Profile& shipped(const std::string& name) {
  static std::map<std::string, Profile> read;
  const auto found = read.find(name);
  if (found != read.end()) return found->second;
  Problems problems;
  const std::string path = std::string(ORRERY_SOURCE_DIR) + "/scenarios/profiles/" + name + ".yaml";
  Profile profile = read_profile(read_document(path, problems), problems);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  return read[name] = std::move(profile);
}

double kernel_s(const Price& price, const Profile& profile) {
  return seconds(price.time_ps) - profile.launch_gap_s;
}

Gemm fp8(std::int64_t m, std::int64_t n, std::int64_t k) {
  return {.inputs = NumberFormat::fp8_block, .m = m, .n = n, .k = k};
}

AttentionCore causal(std::int64_t heads, std::int64_t kv_heads, std::int64_t length,
                     std::int64_t d_qk, std::int64_t d_v, bool backward = false) {
  return {.inputs = NumberFormat::bf16,
          .backward = backward,
          .causal = true,
          .heads = heads,
          .kv_heads = kv_heads,
          .q_len = length,
          .kv_len = length,
          .d_qk = d_qk,
          .d_v = d_v};
}

// ---- The skeleton against closed forms
// ----------------------------------------------------------------

const GemmModel kModel{.tiles = {{128, 128}},
                       .flops_per_s_per_sm = 1e13,
                       .operand_bytes_per_s_per_sm = 1e30,
                       .tile_s = 1e-6,
                       .launch_s = 3e-6,
                       .bytes_per_s = 1e30};

TEST(GemmSkeleton, CountsWavesOfTiles) {
  // 32 x 56 tiles; a tile takes 1 us + 2 128 128 1000 / 1e13 s = 4.2768 us.
  const Gemm g{.inputs = NumberFormat::bf16, .m = 4096, .n = 7168, .k = 1000};
  const double tile = 4.2768e-6;
  EXPECT_NEAR(gemm_skeleton_s(kModel, g, 132, 1), 3e-6 + 14 * tile, 1e-12);  // 13.6 waves
  EXPECT_NEAR(gemm_skeleton_s(kModel, g, 112, 1), 3e-6 + 16 * tile, 1e-12);  // 16 exactly
  EXPECT_NEAR(gemm_skeleton_s(kModel, g, 128, 1), 3e-6 + 14 * tile, 1e-12);  // as many as 132 need
  Gemm experts = g;
  experts.groups = 4;
  experts.m = 1000;  // 8 rows of tiles per expert, the last one not full
  EXPECT_NEAR(gemm_skeleton_s(kModel, experts, 132, 1), 3e-6 + 14 * tile, 1e-12);
}

TEST(GemmSkeleton, IsBoundByMemory) {
  GemmModel slow = kModel;
  slow.bytes_per_s = 1e9;
  slow.tile_s = 1e-12;
  const Gemm g{.inputs = NumberFormat::bf16, .m = 128, .n = 128, .k = 8192};
  const double bytes = 2.0 * (2 * 128 * 8192 + 128 * 128);
  EXPECT_NEAR(gemm_skeleton_s(slow, g, 132, 1), 3e-6 + bytes / 1e9, 1e-9);
  EXPECT_NEAR(gemm_skeleton_s(slow, g, 112, 0.5), 3e-6 + bytes / 0.5e9, 1e-9);
}

TEST(AttentionSkeleton, WalksOverKeyBlocks) {
  const AttentionModel model{.flops_per_s_per_sm = 1e13, .block_s = 2e-6, .launch_s = 5e-6};
  const double block = 2.0 * 128 * 128 * (192 + 128) / 1e13;
  AttentionCore a = causal(128, 128, 4096, 192, 128);
  // 32 query blocks a head with 1 ... 32 key blocks: 528, the diagonal in full.
  EXPECT_NEAR(attention_skeleton_s(model, a, 132), 5e-6 + 128 * (32 * 2e-6 + 528 * block) / 132,
              1e-11);
  a.causal = false;  // 4096 equal blocks in 32 waves on 132 SMs, 37 on 112
  EXPECT_NEAR(attention_skeleton_s(model, a, 132), 5e-6 + 32 * (2e-6 + 32 * block), 1e-11);
  EXPECT_NEAR(attention_skeleton_s(model, a, 112), 5e-6 + 37 * (2e-6 + 32 * block), 1e-11);
}

// ---- Prices against published figures
// -----------------------------------------------------------------

struct Published {
  std::int64_t groups, m, n, k;
  double tflops;
};

TEST(GemmPrice, IsDeepGemmsOwnWhereItWasPublished) {
  // deepseek-ai/DeepGEMM README of 2025-02-25.
  const Profile& p = shipped("h800");
  for (const Published& row : {Published{1, 4096, 7168, 16384, 1358},
                               {1, 4096, 24576, 1536, 990},
                               {1, 4096, 32768, 512, 590},
                               {4, 8192, 4096, 7168, 1297},
                               {8, 4096, 7168, 2048, 1093}}) {
    Gemm g = fp8(row.m, row.n, row.k);
    g.groups = row.groups;
    const Price price = price_gemm(g, 0, p);
    const double flops = 2.0 * static_cast<double>(row.groups * row.m * row.n * row.k);
    EXPECT_NEAR(flops / kernel_s(price, p) / 1e12, row.tflops, 0.001 * row.tflops);
    EXPECT_EQ(price.source, PriceSource::measured);
    EXPECT_FALSE(price.extrapolated);
  }
}

TEST(GemmPrice, AnInputGradientIsTheForwardKernelOnOtherOperands) {
  const Profile& p = shipped("h800");
  Gemm g = fp8(4096, 16384, 7168);
  const Price forward = price_gemm(g, 112, p);
  g.pass = Pass::backward_input;
  EXPECT_EQ(price_gemm(g, 112, p).time_ps, forward.time_ps);
}

TEST(GemmPrice, FewerSmsCostWholeWaves) {
  // 1792 tiles of 128 x 128: 14 waves on 132 SMs, 16 on 112; other tiles can only be as good.
  const Profile& p = shipped("h800");
  const Gemm g = fp8(4096, 7168, 16384);
  const Price all = price_gemm(g, 132, p);
  const Price part = price_gemm(g, 112, p);
  const double ratio = kernel_s(part, p) / kernel_s(all, p);
  EXPECT_GT(ratio, 1.08);
  EXPECT_LT(ratio, 132.0 / 112.0 + 0.03);
  EXPECT_EQ(part.source, PriceSource::derived);
  EXPECT_NE(part.note.find("112/132 SMs"), std::string::npos) << part.note;
}

TEST(GemmPrice, WeightGradientsWithoutATableCostWhatOthersMeasured) {
  // MooreThreads/SimuMax@4dcaae5, a100_pcie: weight gradients with FP32 accumulation reach a median
  // of 0.951 of the forward rate over 55 shapes. Here: derived from forward tables by the traffic
  // into D.
  const Profile& p = shipped("a100");
  std::vector<double> ratios;
  for (const auto& [out, in] : {std::pair{4096, 4096},
                                {8192, 4096},
                                {4096, 14336},
                                {28672, 4096},
                                {5120, 5120},
                                {7168, 7168},
                                {10240, 8192}}) {
    const Gemm forward{.inputs = NumberFormat::bf16, .m = 4096, .n = out, .k = in};
    const Gemm weight{.inputs = NumberFormat::bf16,
                      .pass = Pass::backward_weight,
                      .accumulate = true,
                      .m = out,
                      .n = in,
                      .k = 4096};
    const Price price = price_gemm(weight, 0, p);
    EXPECT_EQ(price.source, PriceSource::derived);
    ratios.push_back(kernel_s(price_gemm(forward, 0, p), p) / kernel_s(price, p));
  }
  std::sort(ratios.begin(), ratios.end());
  EXPECT_NEAR(ratios[ratios.size() / 2], 0.951, 0.06);
}

TEST(GemmPrice, SaysWhenItExtrapolatesAndWhenThereIsNothing) {
  const Profile& p = shipped("h100");
  EXPECT_FALSE(price_gemm({.inputs = NumberFormat::bf16, .m = 4096, .n = 8192, .k = 8192}, 0, p)
                   .extrapolated);
  const Price far =
      price_gemm({.inputs = NumberFormat::bf16, .m = 1 << 22, .n = 8192, .k = 8192}, 0, p);
  EXPECT_TRUE(far.extrapolated);
  EXPECT_EQ(far.source, PriceSource::derived);
  const Price none =
      price_gemm({.inputs = NumberFormat::fp32, .m = 4096, .n = 8192, .k = 8192}, 0, p);
  EXPECT_EQ(none.source, PriceSource::roofline);
  EXPECT_TRUE(none.extrapolated);
}

TEST(AttentionPrice, IsCudnnsOwnWhereItWasPublished) {
  // NVIDIA/cudnn-frontend, H200, dsv3: 1.148 and 4.424 ms at 4096, 4.278 ms at 8192.
  const Profile& p = shipped("h200");
  EXPECT_NEAR(kernel_s(price_attention(causal(128, 128, 4096, 192, 128), 0, p), p), 1.148e-3, 1e-8);
  EXPECT_NEAR(kernel_s(price_attention(causal(128, 128, 4096, 192, 128, true), 0, p), p), 4.424e-3,
              1e-8);
  EXPECT_NEAR(kernel_s(price_attention(causal(128, 128, 8192, 192, 128), 0, p), p), 4.278e-3, 1e-8);
}

TEST(AttentionPrice, BothDirectionsTogetherAreFlashAttention2sFigure) {
  // A100, heads of 128, causal, 16384 tokens in sequences of 8192: 182 TFLOP/s forward and
  // backward.
  const Profile& p = shipped("a100");
  AttentionCore a = causal(16, 16, 8192, 128, 128);
  a.batch = 2;
  AttentionCore b = a;
  b.backward = true;
  const double s = kernel_s(price_attention(a, 0, p), p) + kernel_s(price_attention(b, 0, p), p);
  const double flops = flops_of(Shape{a, "", 0}) + flops_of(Shape{b, "", 0});
  EXPECT_NEAR(flops / s / 1e12, 182, 0.5);
}

TEST(AttentionPrice, ScalesWithTheSmsItGets) {
  for (const bool backward : {false, true}) {
    const Profile& p = shipped("h800");
    const AttentionCore a = causal(128, 128, 4096, 192, 128, backward);
    const double ratio =
        kernel_s(price_attention(a, 112, p), p) / kernel_s(price_attention(a, 132, p), p);
    EXPECT_NEAR(ratio, 132.0 / 112.0, 0.02);
  }
}

TEST(AttentionPrice, KnowsOtherHeadsThanThoseMeasured) {
  // FlashAttention-3 and cuDNN reach 400 to 700 TFLOP/s on Hopper at these lengths, whatever the
  // heads.
  const Profile& p = shipped("h100");
  for (const std::int64_t d : {64, 96, 128, 192, 256}) {
    for (const bool is_causal : {true, false}) {
      AttentionCore a = causal(32, 8, 8192, d, d);
      a.causal = is_causal;
      const Price price = price_attention(a, 0, p);
      const double tflops = flops_of(Shape{a, "", 0}) / kernel_s(price, p) / 1e12;
      EXPECT_GT(tflops, 380) << d;
      EXPECT_LT(tflops, 780) << d;
      EXPECT_FALSE(price.extrapolated) << d;
    }
  }
}

TEST(StreamingPrice, IsLaunchesPlusBytesOverBandwidth) {
  Profile p;
  p.device.sms = 100;
  p.device.memory_bytes_per_s = 2e12;
  p.launch_gap_s = 1e-6;
  p.bandwidth_by_sms = {{50, 0.8}, {100, 1.0}};
  p.streaming[StreamingKind::rope] = {
      .bytes_per_s = 1e12, .launch_s = 2e-6, .spread = 0.2, .id = "copy", .source = "test"};
  const Streaming s{.kind = StreamingKind::rope,
                    .bytes_read = 3'000'000,
                    .bytes_written = 1'000'000,
                    .launches = 5};
  EXPECT_EQ(price_streaming(s, "q rope", 0, p).time_ps, from_seconds(5 * 3e-6 + 4e-6));
  EXPECT_EQ(price_streaming(s, "q rope", 75, p).time_ps, from_seconds(5 * 3e-6 + 4e-6 / 0.9));
  EXPECT_EQ(price_streaming(s, "q rope", 25, p).time_ps, from_seconds(5 * 3e-6 + 4e-6 / 0.4));
  EXPECT_EQ(price_streaming(s, "q rope", 0, p).source, PriceSource::interpolated);
  EXPECT_EQ(price_streaming(s, "q rope", 75, p).source, PriceSource::derived);
  const Price unknown =
      price_streaming({.kind = StreamingKind::copy, .bytes_read = 2'000'000}, "", 0, p);
  EXPECT_EQ(unknown.source, PriceSource::roofline);
  EXPECT_EQ(unknown.time_ps, from_seconds(1e-6 + 1e-6));
}

/// 1 TB/s and 2 us, 100 SMs of which 50 draw 0.8 of the bandwidth, a gap of 1 us.
Profile profile_with_points(std::vector<StreamingPoint> points) {
  Profile p;
  p.device.sms = 100;
  p.device.memory_bytes_per_s = 2e12;
  p.launch_gap_s = 1e-6;
  p.bandwidth_by_sms = {{50, 0.8}, {100, 1.0}};
  p.streaming[StreamingKind::copy] = {.bytes_per_s = 1e12,
                                      .launch_s = 2e-6,
                                      .spread = 0.2,
                                      .id = "copies",
                                      .source = "test",
                                      .points = std::move(points)};
  prepare(p);
  return p;
}

Streaming copy_of(std::int64_t bytes, std::int64_t launches = 1) {
  return {.kind = StreamingKind::copy,
          .bytes_read = bytes,
          .bytes_written = bytes,
          .launches = launches};
}

StreamingPoint copy_point(std::string label, std::int64_t bytes, double seconds, int sms = 100) {
  return {.label = std::move(label),
          .bytes_read = bytes,
          .bytes_written = bytes,
          .launches = 1,
          .sms = sms,
          .seconds = seconds};
}

TEST(StreamingPrice, AMeasuredOpHasItsTimeAndTheGap) {
  const Profile p = profile_with_points(
      {copy_point("key concat", 4'000'000, 17e-6), copy_point("", 4'000'000, 9e-6)});
  const Price key = price_streaming(copy_of(4'000'000), "key concat", 0, p);
  EXPECT_EQ(key.time_ps, from_seconds(18e-6));
  EXPECT_EQ(key.source, PriceSource::measured);
  // A point without a label is any op's, but one of its own goes first.
  const Price other = price_streaming(copy_of(4'000'000), "value copy", 0, p);
  EXPECT_EQ(other.time_ps, from_seconds(10e-6));
  EXPECT_EQ(other.source, PriceSource::measured);
  // What reads and writes other bytes, or more often, is another op.
  EXPECT_EQ(price_streaming(copy_of(4'000'001), "key concat", 0, p).source,
            PriceSource::interpolated);
  EXPECT_EQ(price_streaming(copy_of(4'000'000, 2), "key concat", 0, p).source,
            PriceSource::interpolated);
}

TEST(StreamingPrice, OnOtherSmsTheSkeletonSaysHowAMeasuredTimeChanges) {
  // 4 + 4 MB: 2 + 8 us on all SMs, 2 + 8 / 0.8 = 12 us on half of them.
  const Profile p = profile_with_points({copy_point("", 4'000'000, 20e-6)});
  const Price half = price_streaming(copy_of(4'000'000), "", 50, p);
  EXPECT_EQ(half.time_ps, from_seconds(20e-6 * 12 / 10 + 1e-6));
  EXPECT_EQ(half.source, PriceSource::derived);
  // Unless it was measured there.
  const Profile both =
      profile_with_points({copy_point("", 4'000'000, 20e-6), copy_point("", 4'000'000, 31e-6, 50)});
  EXPECT_EQ(price_streaming(copy_of(4'000'000), "", 50, both).time_ps, from_seconds(32e-6));
  EXPECT_EQ(price_streaming(copy_of(4'000'000), "", 50, both).source, PriceSource::measured);
}

TEST(StreamingPrice, BetweenPointsTheirResidualIsAveraged) {
  // Bytes 8 and 32 MB, skeletons 10 and 34 us; measured twice and half that. Half way between them
  // in ln(bytes), 16 MB with 18 us, both count alike: sqrt(2 / 2) = 1.
  const Profile p =
      profile_with_points({copy_point("", 4'000'000, 20e-6), copy_point("", 16'000'000, 17e-6)});
  const Price middle = price_streaming(copy_of(8'000'000), "", 0, p);
  EXPECT_NEAR(seconds(middle.time_ps), 18e-6 + 1e-6, 1e-11);
  EXPECT_EQ(middle.source, PriceSource::interpolated);
  // Near the first it is nearly twice the skeleton; a factor of two outside, no more.
  const double near = seconds(price_streaming(copy_of(4'100'000), "", 0, p).time_ps) - 1e-6;
  EXPECT_GT(near / (2e-6 + 8.2e-6), 1.7);
  const double outside = seconds(price_streaming(copy_of(1'000'000), "", 0, p).time_ps);
  EXPECT_NEAR(outside, 2e-6 + 2e-6 + 1e-6, 1e-11);
}

TEST(StreamingPrice, PointsOfTheSameOpGoBeforeOthersOfItsKind) {
  const Profile p = profile_with_points({copy_point("key concat", 4'000'000, 30e-6),
                                         copy_point("value copy", 5'000'000, 12e-6),
                                         copy_point("value copy", 64'000'000, 130e-6)});
  // Three times the skeleton, as key concat's only point says.
  EXPECT_NEAR(seconds(price_streaming(copy_of(5'000'000), "key concat", 0, p).time_ps),
              3 * 12e-6 + 1e-6, 1e-11);
  // Beyond the bytes that it was measured at, those of other copies are nearer.
  EXPECT_NEAR(seconds(price_streaming(copy_of(64'000'000), "key concat", 0, p).time_ps),
              130e-6 + 1e-6, 1e-11);
}

TEST(Prices, AShapeMeasuredOnTheVerySmsGoesBeforeOneScaledToThem) {
  Profile p;
  p.device = {.name = "x", .sms = 10, .memory_bytes_per_s = 1e15, .bf16_flops_per_s = 1e15};
  GemmTable table{.id = "t", .inputs = NumberFormat::bf16, .pass = Pass::forward};
  table.model = kModel;
  table.points = {{1, 512, 512, 512, 10, 1e-3, {}}, {1, 512, 512, 512, 6, 5e-3, {}}};
  p.gemms = {table};
  AttentionTable attention{.id = "a", .inputs = NumberFormat::bf16};
  attention.model = {1e12, 1e-6, 1e-6};
  const AttentionCore core = causal(8, 8, 512, 64, 64);
  attention.points = {{core, 10, 1e-3, {}}, {core, 6, 5e-3, {}}};
  p.attention = {attention};
  prepare(p);
  const Gemm g{.inputs = NumberFormat::bf16, .m = 512, .n = 512, .k = 512};
  EXPECT_EQ(price_gemm(g, 6, p).time_ps, from_seconds(5e-3));
  EXPECT_EQ(price_gemm(g, 6, p).source, PriceSource::measured);
  EXPECT_EQ(price_gemm(g, 0, p).time_ps, from_seconds(1e-3));
  EXPECT_EQ(price_gemm(g, 8, p).source, PriceSource::derived);
  EXPECT_EQ(price_attention(core, 6, p).time_ps, from_seconds(5e-3));
  EXPECT_EQ(price_attention(core, 6, p).source, PriceSource::measured);
}

TEST(Roofline, Fp32HasARateOfItsOwnOrTf32s) {
  Profile p;
  p.device = {.name = "x", .sms = 10, .memory_bytes_per_s = 1e15, .bf16_flops_per_s = 1e12};
  const Gemm g{.inputs = NumberFormat::fp32, .m = 1000, .n = 1000, .k = 1000};
  EXPECT_NEAR(seconds(price_gemm(g, 0, p).time_ps), 2e9 / 0.5e12, 1e-9);
  p.device.fp32_flops_per_s = 0.1e12;
  EXPECT_NEAR(seconds(price_gemm(g, 0, p).time_ps), 2e9 / 0.1e12, 1e-9);
  AttentionCore a = causal(8, 8, 1024, 128, 128);
  a.inputs = NumberFormat::fp32;
  EXPECT_NEAR(seconds(price_attention(a, 0, p).time_ps), flops_of({a, "", 0}) / 0.1e12, 1e-9);
}

TEST(StreamingPrice, ANormTakesWhatCudnnMeasured) {
  // NVIDIA/cudnn-frontend benchmark/norms, H200: 16384 x 4096 in 0.072 and 0.106 ms.
  const Profile& p = shipped("h200");
  const std::int64_t tensor = 16384 * 4096 * 2;
  const Price forward = price_streaming(
      {.kind = StreamingKind::norm_forward, .bytes_read = tensor, .bytes_written = tensor}, "", 0,
      p);
  EXPECT_NEAR(kernel_s(forward, p), 0.072e-3, 0.006e-3);
  const Price backward = price_streaming(
      {.kind = StreamingKind::norm_backward, .bytes_read = 2 * tensor, .bytes_written = tensor}, "",
      0, p);
  EXPECT_NEAR(kernel_s(backward, p), 0.106e-3, 0.010e-3);
}

// ---- Properties
// ---------------------------------------------------------------------------------------

const std::vector<std::string> kDevices{"h800", "h100", "h200", "b200", "a100"};

Gemm any_gemm(const Profile& p) {
  const auto dim = [](int low, int high) {
    return std::int64_t{128} * *rc::gen::inRange(low, high);
  };
  std::vector<NumberFormat> formats{NumberFormat::bf16};
  if (p.device.fp8_flops_per_s > 0) {
    formats = {NumberFormat::bf16, NumberFormat::fp8_tensor, NumberFormat::fp8_block};
  }
  const Pass pass = *rc::gen::element(Pass::forward, Pass::backward_input, Pass::backward_weight);
  return {.inputs = *rc::gen::elementOf(formats),
          .pass = pass,
          .accumulate = pass == Pass::backward_weight,
          .groups = *rc::gen::element<std::int64_t>(1, 1, 4, 8),
          .m = dim(1, 256),
          .n = dim(1, 256),
          .k = dim(1, 256)};
}

TEST(Prices, NoGemmIsFasterThanTheDataSheetAllows) {
  EXPECT_TRUE(rc::check("flops / time <= peak, bytes / time <= bandwidth", [] {
    const Profile& p = shipped(*rc::gen::elementOf(kDevices));
    const Gemm g = any_gemm(p);
    const int sms = *rc::gen::inRange(p.device.sms / 2, p.device.sms + 1);
    const double s = seconds(price_gemm(g, sms, p).time_ps);
    const double peak =
        g.inputs == NumberFormat::bf16 ? p.device.bf16_flops_per_s : p.device.fp8_flops_per_s;
    RC_ASSERT(flops_of(Shape{g, "", 0}) / s <= peak * sms / p.device.sms);
    // Small operands may still be in the cache (50 MB) when a benchmark repeats itself.
    if (bytes_of(g) > 500e6) RC_ASSERT(bytes_of(g) / s <= p.device.memory_bytes_per_s);
  }));
}

TEST(Prices, NoAttentionIsFasterThanTheDataSheetAllows) {
  EXPECT_TRUE(rc::check("flops / time <= peak", [] {
    const Profile& p = shipped(*rc::gen::elementOf(kDevices));
    const std::int64_t kv_heads = *rc::gen::inRange(1, 17);
    const std::int64_t length = 128 * *rc::gen::inRange(1, 257);
    const AttentionCore a{.inputs = NumberFormat::bf16,
                          .backward = *rc::gen::arbitrary<bool>(),
                          .causal = *rc::gen::arbitrary<bool>(),
                          .batch = *rc::gen::inRange(1, 5),
                          .heads = kv_heads * *rc::gen::inRange(1, 9),
                          .kv_heads = kv_heads,
                          .q_len = length,
                          .kv_len = length,
                          .d_qk = *rc::gen::element<std::int64_t>(64, 96, 128, 192, 256),
                          .d_v = 128};
    const double s = seconds(price_attention(a, 0, p).time_ps);
    RC_ASSERT(flops_of(Shape{a, "", 0}) / s <= p.device.bf16_flops_per_s);
  }));
}

TEST(Prices, MoreWorkIsNotMuchCheaperAndFewerSmsAreNotFaster) {
  EXPECT_TRUE(rc::check("doubling a dimension, halving the SMs", [] {
    const Profile& p = shipped(*rc::gen::elementOf(kDevices));
    const Gemm g = any_gemm(p);
    const double s = seconds(price_gemm(g, 0, p).time_ps);
    Gemm twice = g;
    (*rc::gen::element(&twice.m, &twice.n, &twice.k))[0] *= 2;
    const double s2 = seconds(price_gemm(twice, 0, p).time_ps);
    // Twice the work costs between 0.9 (another tile fits better) and 3 times as much.
    RC_ASSERT(s2 > 0.9 * s);
    RC_ASSERT(s2 < 3 * s);
    RC_ASSERT(seconds(price_gemm(g, p.device.sms / 2, p).time_ps) >= 0.999 * s);
  }));
}

}  // namespace
}  // namespace orrery
