// Fits to tables of a device that is known, and to YAML and back.

#include "calibrate/fit_cached.hpp"

#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "calibrate/write_profile.hpp"
#include "sim/config.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

class FitCached : public testing::Test {
 protected:
  FitCached()
      : folder_(fs::temp_directory_path() / ("orrery-fit-cached-" + std::to_string(getpid()))) {
    fs::create_directories(folder_ / "kernels");
    fs::create_directories(folder_ / "deepseek");
    profile_.name = "made-up";
    profile_.device = {.name = "made up",
                       .sms = 100,
                       .memory_bytes = 1e11,
                       .memory_bytes_per_s = 3e12,
                       .bf16_flops_per_s = 1e15,
                       .source = "nowhere"};
    profile_.launch_gap_source = "nowhere";
    profile_.bandwidth_by_sms = {{100, 1.0}};
    profile_.bandwidth_by_sms_source = "nowhere";
  }
  ~FitCached() override { fs::remove_all(folder_); }

  fs::path folder_;
  Profile profile_;
};

constexpr CachedModel kTruth{.launch_s = 12e-6, .bytes_per_s = 2.6e12, .flops_per_s = 3e14};

TEST_F(FitCached, FindsTheConstantsOfAKnownDevice) {
  const fs::path path = folder_ / "decode.csv";
  {
    std::ofstream out(path);
    out << "kernel_source,mla_dtype,kv_cache_dtype,num_heads,batch_size,isl,tp_size,step,latency\n";
    for (const int heads : {8, 16, 32, 64, 128}) {
      for (int batch = 1; batch <= 1024; batch *= 2) {
        for (int context = 64; context <= 65'536; context *= 2) {
          const CachedAttention a{.inputs = NumberFormat::bf16,
                                  .cache = NumberFormat::bf16,
                                  .latent = true,
                                  .batch = batch,
                                  .heads = heads,
                                  .kv_heads = 1,
                                  .q_len = 1,
                                  .kv_len = context,
                                  .d_qk = 576,
                                  .d_v = 512};
          const double off =
              1 + 0.1 * std::sin(std::log(batch)) + 0.05 * std::cos(std::log(context));
          const double ms = 1e3 * cached_skeleton_s(kTruth, a, 100, profile_) * off;
          out << "default,bfloat16,bfloat16," << heads << ',' << batch << ",1,1," << context - 1
              << ',' << ms << '\n';
          // Another format of the cache must not be taken.
          out << "default,bfloat16,fp8," << heads << ',' << batch << ",1,1," << context - 1 << ','
              << 9 * ms << '\n';
        }
      }
    }
  }
  CachedTable table{.id = "made-up",
                    .source = "nowhere",
                    .inputs = NumberFormat::bf16,
                    .cache = NumberFormat::bf16,
                    .latent = true};
  const auto [made, error] = read_latent_decode(path.string(), profile_, table);
  // The mean of the smooth part is 1; its shape moves the constants a little.
  EXPECT_NEAR(made.model.launch_s / kTruth.launch_s, 1, 0.15);
  EXPECT_NEAR(made.model.bytes_per_s / kTruth.bytes_per_s, 1, 0.1);
  EXPECT_NEAR(made.model.flops_per_s / kTruth.flops_per_s, 1, 0.2);
  // 6 batches, 5 contexts from 128 up and 3 numbers of heads are on the grid.
  EXPECT_EQ(made.points.size(), 6u * 5 * 3);
  EXPECT_EQ(error.points, 4u * 11 * 10 - made.points.size());  // from 16 heads and 128 tokens up
  EXPECT_LT(error.median, 0.03);
  EXPECT_LT(std::abs(error.bias), 0.02);
  EXPECT_GT(made.spread, 0);

  // And it survives being written.
  profile_.cached_attention = {made};
  Problems problems;
  const Node node = read_document_text(profile_yaml(profile_, "", {}), "made-up.yaml", problems);
  const Profile again = read_profile(node, problems);
  EXPECT_EQ(format_problems(problems.list()), "");
  ASSERT_EQ(again.cached_attention.size(), 1u);
  const CachedTable& back = again.cached_attention[0];
  EXPECT_EQ(back.cache, NumberFormat::bf16);
  EXPECT_TRUE(back.latent);
  EXPECT_FALSE(back.gathered);
  ASSERT_EQ(back.points.size(), made.points.size());
  EXPECT_EQ(back.points[7].shape, made.points[7].shape);
  EXPECT_NEAR(back.points[7].seconds / made.points[7].seconds, 1, 1e-5);
  EXPECT_NEAR(back.model.flops_per_s / made.model.flops_per_s, 1, 1e-4);
}

TEST_F(FitCached, KeepsToTheDataSheet) {
  CachedTable table{.id = "t",
                    .source = "",
                    .inputs = NumberFormat::bf16,
                    .cache = NumberFormat::bf16,
                    .latent = true};
  for (const std::int64_t context : {1000, 10'000, 100'000}) {
    CachedPoint p{.shape = {.inputs = NumberFormat::bf16,
                            .cache = NumberFormat::bf16,
                            .latent = true,
                            .batch = 64,
                            .heads = 16,
                            .kv_heads = 1,
                            .kv_len = context,
                            .d_qk = 576,
                            .d_v = 512},
                  .sms = 100};
    p.seconds = bytes_of(p.shape) / 9e12;  // three times what the memory can
    table.points.push_back(p);
  }
  fit_cached(table, profile_);
  EXPECT_LE(table.model.bytes_per_s, 3e12 * 1.1);
  EXPECT_LE(table.model.flops_per_s, 1e15 * 1.1);
}

TEST_F(FitCached, FindsTheLegsOfKnownExchanges) {
  const LowLatencyCost dispatch{
      .latency_s = 9e-6, .kernel_bytes_per_s = 2e11, .remote_latency_s = 33e-6, .nic_share = 0.9};
  const LowLatencyCost combine{.latency_s = 11e-6,
                               .kernel_bytes_per_s = 1.5e11,
                               .remote_latency_s = 25e-6,
                               .nic_share = 0.8};
  const auto us = [&](bool back, std::int64_t ep, std::int64_t tokens, std::int64_t hidden,
                      double nvlink) {
    const ExpertExchange e{.combine = back,
                           .low_latency = true,
                           .format = back ? NumberFormat::bf16 : NumberFormat::fp8_block,
                           .tokens = tokens,
                           .hidden = hidden,
                           .top_k = 8,
                           .experts = 256,
                           .ep = ep,
                           .gpus_per_node = 8};
    return 1e6 * low_latency_s(back ? combine : dispatch, low_latency_bytes(e), nvlink, 48e9);
  };
  {
    std::ofstream near(folder_ / "kernels" / "h200_sxm-deepep-lowlatency.csv.gz");
    near << "node_num,hidden_size,num_token,num_topk,num_experts,dispatch_avg_t_us,combine_avg_t_"
            "us\n";
    for (const int hidden : {2048, 4096, 7168}) {
      for (int tokens = 1; tokens <= 1024; tokens *= 2) {
        near << "1," << hidden << ',' << tokens << ",8,256," << us(false, 8, tokens, hidden, 450e9)
             << ',' << us(true, 8, tokens, hidden, 450e9) << '\n';
      }
    }
    std::ofstream far(folder_ / "deepseek" / "deepep_perf.csv");
    far << "version,kernel_kind,EP,dispatch_us,combine_us\n";
    for (const int ep : {8, 16, 32, 64, 128, 256}) {
      far << "v1-current,low-latency NVLink+RDMA," << ep << ',' << us(false, ep, 128, 7168, 160e9)
          << ',' << us(true, ep, 128, 7168, 160e9) << '\n';
    }
    far << "v1-current,internode RDMA,16,1,1\n";  // the normal kernels
  }
  const LowLatencyFit fit = fit_low_latency(folder_.string());
  for (const auto& [found, truth] :
       {std::pair{fit.table.dispatch, dispatch}, std::pair{fit.table.combine, combine}}) {
    EXPECT_NEAR(found.latency_s / truth.latency_s, 1, 0.02);
    EXPECT_NEAR(found.kernel_bytes_per_s / truth.kernel_bytes_per_s, 1, 0.02);
    EXPECT_NEAR(found.remote_latency_s / truth.remote_latency_s, 1, 0.02);
    EXPECT_NEAR(found.nic_share / truth.nic_share, 1, 0.02);
  }
  ASSERT_EQ(fit.errors.size(), 6u);
  for (const HeldOutError& e : fit.errors) EXPECT_LT(e.percentile_90, 0.02) << e.family;
  EXPECT_EQ(fit.errors[0].points, 11u);  // hidden 7168
  EXPECT_EQ(fit.errors[1].points, 5u);   // EP16 to EP256
  EXPECT_EQ(fit.errors[2].points, 1u);

  Problems problems;
  const LowLatencyTable again =
      read_low_latency_table(read_document_text(to_yaml(fit), "t.yaml", problems), problems);
  EXPECT_EQ(format_problems(problems.list()), "");
  EXPECT_NEAR(again.combine.nic_share / fit.table.combine.nic_share, 1, 1e-3);
  EXPECT_NEAR(again.dispatch.latency_s / fit.table.dispatch.latency_s, 1, 1e-3);
  EXPECT_EQ(again.tokens, fit.table.tokens);
}

}  // namespace
}  // namespace orrery
