#include <gtest/gtest.h>

#include "sim/config.hpp"
#include "sim/low_latency.hpp"
#include "sim/network_prices.hpp"
#include "sim/price.hpp"

namespace orrery {
namespace {

ExpertExchange published(bool combine, std::int64_t ep) {
  return {.combine = combine,
          .low_latency = true,
          .format = combine ? NumberFormat::bf16 : NumberFormat::fp8_block,
          .tokens = 128,
          .hidden = 7168,
          .top_k = 8,
          .experts = 256,
          .ep = ep,
          .gpus_per_node = 8};
}

template <class T, class Read>
T read_shipped(const std::string& name, const Read& read) {
  Problems problems;
  const std::string path = std::string(ORRERY_SOURCE_DIR) + "/scenarios/" + name;
  T value = read(read_document(path, problems), problems);
  problems.throw_if_any();
  return value;
}

// DeepEP's README counts a copy as 7168 + 7168 / 128 * 4 + 16 = 7408 bytes out, 14336 back.
TEST(LowLatency, MovesWhatDeepEpCounts) {
  for (const std::int64_t ep : {8, 16, 256}) {
    const double own = 1.0 / static_cast<double>(ep);
    const LowLatencyBytes out = low_latency_bytes(published(false, ep));
    EXPECT_NEAR(out.near + out.far, (1 - own) * 128 * 8 * 7408, 1e-3) << ep;
    const LowLatencyBytes back = low_latency_bytes(published(true, ep));
    EXPECT_NEAR(back.near + back.far, (1 - own) * 128 * 8 * 14336, 1e-3) << ep;
    EXPECT_NEAR(out.near / (out.near + out.far), 7.0 / static_cast<double>(ep - 1), 1e-12) << ep;
  }
  ExpertExchange busy = published(false, 64);
  busy.busiest_gpu_per_mille = 1500;
  EXPECT_NEAR(low_latency_bytes(busy).far, 1.5 * low_latency_bytes(published(false, 64)).far, 1e-6);
}

TEST(LowLatency, TakesTheSlowerLeg) {
  const LowLatencyCost cost{
      .latency_s = 1e-6, .kernel_bytes_per_s = 1e9, .remote_latency_s = 5e-6, .nic_share = 0.5};
  EXPECT_DOUBLE_EQ(low_latency_s(cost, {.near = 1e3, .far = 0}, 1e12, 1e9), 2e-6);
  EXPECT_DOUBLE_EQ(low_latency_s(cost, {.near = 1e3, .far = 0}, 1e8, 1e9), 11e-6);  // a slow link
  EXPECT_DOUBLE_EQ(low_latency_s(cost, {.near = 1e3, .far = 1e3}, 1e12, 1e9), 7e-6);
}

// Of the far legs' fit each of these was left out in turn; EP8 on H800 was never part of it.
TEST(LowLatency, IsNearDeepEpOnH800) {
  const Profile profile = read_shipped<Profile>("profiles/h800.yaml", read_profile);
  const Cluster cluster = read_shipped<Cluster>("clusters/h800_2048.yaml", read_cluster);
  struct Row {
    std::int64_t ep;
    double dispatch_us;
    double combine_us;
    double within;
  };
  for (const Row& row :
       {Row{8, 77, 114, 0.4}, Row{16, 118, 195, 0.1}, Row{32, 155, 273, 0.1},
        Row{64, 173, 314, 0.1}, Row{128, 192, 369, 0.15}, Row{256, 194, 360, 0.1}}) {
    for (const bool combine : {false, true}) {
      const Price price = orrery::price({.work = published(combine, row.ep), .label = "", .sms = 0},
                                        profile, cluster);
      const double us = combine ? row.combine_us : row.dispatch_us;
      EXPECT_NEAR(seconds(price.time_ps) * 1e6 / us, 1, row.within) << row.ep << " " << combine;
    }
  }
}

TEST(LowLatency, WithoutATableTakesLinkRates) {
  const Cluster cluster = read_shipped<Cluster>("clusters/h800_2048.yaml", read_cluster);
  const Price price = price_low_latency(published(true, 128), Profile{}, cluster);
  EXPECT_EQ(price.source, PriceSource::roofline);
  EXPECT_NEAR(seconds(price.time_ps), 3.7e-6 + 120.0 / 128 * 128 * 8 * 14336 / 48e9, 1e-9);
  EXPECT_EQ(price_low_latency(published(true, 1), Profile{}, cluster).time_ps, 0);
}

TEST(LowLatency, BrokenTablesAreExplained) {
  Problems problems;
  const Node node = read_document_text(
      "id: x\nsource: me\nspread: 0.1\nnear_spread: 0.1\ntokens: [5, 1]\n"
      "dispatch: {latency: 1 us, kernel_bandwidth: 1 GB/s, remote_latency: 1 us, nic_share: 1}\n"
      "combine: {latency: 1 GB, kernel_bandwidth: 1 GB/s, remote_latency: 1 us, nic_shaer: 1}\n",
      "t.yaml", problems);
  read_low_latency_table(node, problems);
  const std::string said = format_problems(problems.list());
  EXPECT_NE(said.find("t.yaml:5:9: error: expected [lowest, highest]"), std::string::npos) << said;
  EXPECT_NE(said.find("unknown key 'nic_shaer' in low_latency_exchange.combine"), std::string::npos)
      << said;
  EXPECT_EQ(problems.size(), 4u) << said;  // and the wrong unit, and no nic_share
}

}  // namespace
}  // namespace orrery
