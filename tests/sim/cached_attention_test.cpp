#include <gtest/gtest.h>

#include <cmath>

#include "sim/config.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

CachedAttention v3(std::int64_t batch, std::int64_t context) {
  return {.inputs = NumberFormat::bf16,
          .cache = NumberFormat::bf16,
          .latent = true,
          .batch = batch,
          .heads = 128,
          .kv_heads = 1,
          .q_len = 1,
          .kv_len = context,
          .d_qk = 576,
          .d_v = 512};
}

Profile shipped_profile(const std::string& name) {
  Problems problems;
  const std::string path = std::string(ORRERY_SOURCE_DIR) + "/scenarios/profiles/" + name + ".yaml";
  Profile profile = read_profile(read_document(path, problems), problems);
  problems.throw_if_any();
  return profile;
}

TEST(CachedAttention, RowsAreAsPublished) {
  CachedAttention a = v3(1, 1);
  EXPECT_DOUBLE_EQ(cached_row_bytes(a), 1152);  // 70,272 B over 61 layers, arXiv 2505.09343 Table 1
  a.cache = NumberFormat::fp8_block;
  EXPECT_DOUBLE_EQ(cached_row_bytes(a), 656);  // FlashMLA README, "FP8 with scale"
  a.cache = NumberFormat::fp8_tensor;
  EXPECT_DOUBLE_EQ(cached_row_bytes(a), 576);
  const CachedAttention gqa{.cache = NumberFormat::bf16,
                            .heads = 128,
                            .kv_heads = 8,
                            .kv_len = 1,
                            .d_qk = 128,
                            .d_v = 128};
  EXPECT_DOUBLE_EQ(cached_row_bytes(gqa), 4096);  // 516,096 B over 126 layers
}

TEST(CachedAttention, CountsWhatTheKernelDoes) {
  // FlashMLA's deep dive: 2 * heads * q_len * kv_len * (576 + 512) FLOPs over one read of the
  // cache.
  CachedAttention a = v3(2, 4096);
  const Shape shape{.work = a, .label = "", .sms = 0};
  EXPECT_DOUBLE_EQ(flops_of(shape), 2.0 * 2 * 128 * 4096 * 1088);
  EXPECT_DOUBLE_EQ(bytes_of(shape), 2.0 * 4096 * 1152 + 2.0 * 128 * 1088 * 2);
  // Two query tokens share the rows, unless each has picked its own.
  a.q_len = 2;
  EXPECT_DOUBLE_EQ(bytes_of(a), 2.0 * 4096 * 1152 + 4.0 * 128 * 1088 * 2);
  a.gathered = true;
  EXPECT_DOUBLE_EQ(bytes_of(a), 4.0 * 4096 * 1152 + 4.0 * 128 * 1088 * 2);
}

TEST(CachedAttention, NeverBeatsMemory) {
  for (const char* name : {"h800", "h100", "h200", "b200", "a100"}) {
    const Profile profile = shipped_profile(name);
    for (const std::int64_t heads : {8, 16, 128}) {
      for (const std::int64_t context : {100, 3000, 100'000}) {
        CachedAttention a = v3(32, context);
        a.heads = heads;
        const Price price = price_cached_attention(a, 0, profile);
        EXPECT_GE(seconds(price.time_ps), bytes_of(a) / profile.device.memory_bytes_per_s) << name;
        EXPECT_GT(price.spread, 0);
      }
    }
  }
}

TEST(CachedAttention, GrowsWithContextAndSequences) {
  const Profile profile = shipped_profile("h100");
  Picoseconds before = 0;
  for (std::int64_t context = 512; context <= 131'072; context *= 2) {
    const Picoseconds now = price_cached_attention(v3(64, context), 0, profile).time_ps;
    EXPECT_GT(now, before) << context;
    before = now;
  }
  before = 0;
  for (std::int64_t batch = 8; batch <= 512; batch *= 2) {
    const Picoseconds now = price_cached_attention(v3(batch, 8192), 0, profile).time_ps;
    EXPECT_GT(now, before) << batch;
    before = now;
  }
}

// FlashMLA's README: 660 TFLOP/s compute bound on H800. It is another kernel than the table's, so
// the two need only be near.
TEST(CachedAttention, IsNearFlashMla) {
  const Profile profile = shipped_profile("h800");
  const CachedAttention a = v3(128, 16'384);
  const double rate = flops_of({.work = a, .label = "", .sms = 0}) /
                      seconds(price_cached_attention(a, 0, profile).time_ps);
  EXPECT_NEAR(rate / 660e12, 1, 0.1);
}

TEST(CachedAttention, WithoutATableTakesPeakRates) {
  Profile profile;
  profile.device = {.name = "toy",
                    .sms = 10,
                    .memory_bytes = 1e9,
                    .memory_bytes_per_s = 1e12,
                    .bf16_flops_per_s = 1e15,
                    .source = ""};
  const CachedAttention a = v3(4, 10'000);
  const Price price = price_cached_attention(a, 0, profile);
  EXPECT_EQ(price.source, PriceSource::roofline);
  EXPECT_NEAR(seconds(price.time_ps), bytes_of(a) / 1e12, 1e-9);
  CachedAttention dear = a;
  dear.q_len = 8;  // 8 x 242 FLOPs a byte, of 1000 that are free
  EXPECT_NEAR(seconds(price_cached_attention(dear, 0, profile).time_ps),
              flops_of({.work = dear, .label = "", .sms = 0}) / 1e15, 1e-9);
}

}  // namespace
}  // namespace orrery
