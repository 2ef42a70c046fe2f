#include "sim/cluster.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>

namespace orrery {
namespace {

Cluster read(const std::string& text, Problems& problems) {
  const Node node = read_document_text(text, "folder/cluster.yaml", problems);
  return read_cluster(node, problems);
}

std::string good() {
  return "name: two nodes\n"
         "nodes: 2\n"
         "gpus_per_node: 8\n"
         "profile: ../profiles/x.yaml\n"
         "nvlink: {bandwidth: 160 GB/s, peak: 200 GB/s, latency: 3 us, source: here}\n"
         "nic: {bandwidth: 384 Gb/s, peak: 50 GB/s, latency: 4 us, source: there}\n"
         "collectives: {base: 5 us, nvlink_hop: 1 us, low_latency_rate: 100 GB/s, "
         "bulk_latency: 15 us, copy_rate: 1 TB/s, nvlink_pipeline: 1 MB, peer_rate: 5 GB/s, "
         "peer_latency: 7 us, spread: 0.1, "
         "nic_tree_hop: 30 us, nic_ring_hop: 20 us, nic_peer: 2 us, nic_pipeline: 150 kB, "
         "nic_spread: 0.2, source: elsewhere}\n";
}

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const auto at = text.find(from);
  EXPECT_NE(at, std::string::npos) << from;
  return text.replace(at, from.size(), to);
}

TEST(Cluster, ReadsUnitsAndResolvesTheProfile) {
  Problems problems;
  const Cluster c = read(good(), problems);
  EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  EXPECT_EQ(c.gpus(), 16);
  EXPECT_DOUBLE_EQ(c.nvlink.bandwidth_bytes_per_s, 160e9);
  EXPECT_DOUBLE_EQ(c.nic.bandwidth_bytes_per_s, 48e9);
  EXPECT_DOUBLE_EQ(c.nic_peak_bytes_per_s, 50e9);
  EXPECT_DOUBLE_EQ(c.collectives.nic_pipeline_bytes, 150e3);
  EXPECT_EQ(c.profile, "profiles/x.yaml");
  EXPECT_EQ(c.nvlink.source, "here");
  EXPECT_FALSE(c.nvls);
}

TEST(Cluster, ReportsEveryProblemWithItsLine) {
  std::string text = good();
  text = replaced(text, "nodes: 2", "nodes: 0");
  text = replaced(text, "bandwidth: 160 GB/s", "bandwidth: 260 GB/s");
  text = replaced(text, "latency: 4 us", "latency: 4 GB");
  text = replaced(text, "profile:", "profil:");
  Problems problems;
  read(text, problems);
  std::vector<int> lines;
  for (const Problem& p : problems.list()) lines.push_back(p.at.line);
  for (const int line : {2, 4, 5, 6}) {
    EXPECT_NE(std::find(lines.begin(), lines.end(), line), lines.end()) << "line " << line;
  }
}

TEST(Cluster, NeedsANicOnlyAcrossNodes) {
  const auto begin = good().find("nic: {");
  std::string text = good();
  text.erase(begin, text.find('\n', begin) + 1 - begin);
  Problems two;
  read(text, two);
  EXPECT_EQ(two.size(), 1u) << format_problems(two.list());
  Problems one;
  read(replaced(text, "nodes: 2", "nodes: 1"), one);
  EXPECT_TRUE(one.empty()) << format_problems(one.list());
}

TEST(Cluster, BoundsTheNumberOfGpus) {
  Problems problems;
  read(replaced(good(), "nodes: 2", "nodes: 200_000"), problems);
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_EQ(problems.list()[0].at.line, 2);
}

TEST(Cluster, SourceIsNotOptional) {
  Problems problems;
  read(replaced(good(), ", source: here", ""), problems);
  EXPECT_EQ(problems.size(), 1u);
}

TEST(Cluster, WrittenClustersReadBack) {
  for (const auto& entry :
       std::filesystem::directory_iterator(ORRERY_SOURCE_DIR "/scenarios/clusters")) {
    SCOPED_TRACE(entry.path().string());
    Problems problems;
    Cluster c = read_cluster(read_document(entry.path().string(), problems), problems);
    c.nvlink.bandwidth_bytes_per_s /= 3;  // digits that no unit shortens
    c.collectives.source += " \"quoted\": \\ # and more";
    // From another folder than the one that it was read from.
    const std::string folder = std::filesystem::path(c.profile).parent_path();
    const std::string text = to_yaml(c, folder);
    const std::string name = folder + "/c.yaml";
    EXPECT_EQ(read_cluster(read_document_text(text, name, problems), problems), c) << text;
    EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
  }
  // Where a file's own words give the number, they are what is written.
  Problems problems;
  const std::string text = to_yaml(read(good(), problems), "x");
  for (const char* line : {"bandwidth: 160 GB/s\n", "  nic_pipeline: 150 kB\n", "  base: 5 us\n"}) {
    EXPECT_NE(text.find(line), std::string::npos) << text;
  }
}

TEST(Cluster, MeasuredLinesAreReadAndWritten) {
  const std::string lines =
      "source: elsewhere, lines: [{operation: all_to_all, ranks: 4, base: 5 us, bandwidth: 2 GB/s, "
      "spread: 0.1}, {operation: send, ranks: 4, base: 3 us, bandwidth: 3 GB/s, spread: 0.2}]}";
  Problems problems;
  const Cluster c = read(replaced(good(), "source: elsewhere}", lines), problems);
  ASSERT_TRUE(problems.empty()) << format_problems(problems.list());
  ASSERT_EQ(c.collectives.lines.size(), 2u);
  EXPECT_EQ(c.collectives.lines[0], (MeasuredLine{CollectiveKind::all_to_all, 4, 5e-6, 2e9, 0.1}));
  EXPECT_EQ(c.collectives.lines[1].kind, std::nullopt);
  const std::string text = to_yaml(c, "folder");
  EXPECT_EQ(read(text, problems), c) << text;

  read(replaced(good(), "source: elsewhere}", replaced(lines, "all_to_all", "all_to_al")),
       problems);
  ASSERT_EQ(problems.size(), 1u);
  EXPECT_NE(format_problems(problems.list()).find("all_to_all"), std::string::npos);
}

TEST(Cluster, EveryScenarioClusterIsReadable) {
  int files = 0;
  for (const auto& entry :
       std::filesystem::directory_iterator(ORRERY_SOURCE_DIR "/scenarios/clusters")) {
    SCOPED_TRACE(entry.path().string());
    Problems problems;
    const Node node = read_document(entry.path().string(), problems);
    const Cluster c = read_cluster(node, problems);
    EXPECT_TRUE(problems.empty()) << format_problems(problems.list());
    EXPECT_EQ(c.gpus_per_node, 8);
    EXPECT_LT(c.nvlink.bandwidth_bytes_per_s, c.nvlink_peak_bytes_per_s);
    ++files;
  }
  EXPECT_GE(files, 8);
}

}  // namespace
}  // namespace orrery
