#include "sim/low_latency.hpp"

#include <algorithm>
#include <filesystem>

#include "sim/check.hpp"
#include "sim/network_prices.hpp"

namespace orrery {
namespace {

constexpr double kHeaderBytes = 16;

LowLatencyCost read_cost(const Node& node, const std::string& what, Problems& problems) {
  MapReader map(node, problems, what);
  LowLatencyCost cost;
  cost.latency_s = map.quantity("latency", Dimension::seconds);
  cost.kernel_bytes_per_s = map.quantity("kernel_bandwidth", Dimension::bytes_per_s);
  cost.remote_latency_s = map.quantity("remote_latency", Dimension::seconds);
  cost.nic_share = map.number("nic_share", 0.01, 2);
  map.finish();
  return cost;
}

}  // namespace

LowLatencyBytes low_latency_bytes(const ExpertExchange& e) {
  const double row =
      static_cast<double>(e.hidden) * bytes_per_element(e.format) + (e.combine ? 0 : kHeaderBytes);
  const double copies = static_cast<double>(e.tokens) * static_cast<double>(e.top_k) *
                        static_cast<double>(e.busiest_gpu_per_mille) / 1000;
  const double gpus = static_cast<double>(e.ep);
  const double here = static_cast<double>(std::min(e.gpus_per_node, e.ep));
  return {.near = copies * row * (here - 1) / gpus, .far = copies * row * (gpus - here) / gpus};
}

double low_latency_s(const LowLatencyCost& cost, const LowLatencyBytes& bytes,
                     double nvlink_bytes_per_s, double nic_bytes_per_s) {
  const double near_s =
      cost.latency_s + bytes.near / std::min(cost.kernel_bytes_per_s, nvlink_bytes_per_s);
  if (bytes.far == 0) return near_s;
  return std::max(near_s, cost.remote_latency_s + bytes.far / (cost.nic_share * nic_bytes_per_s));
}

LowLatencyTable read_low_latency_table(const Node& node, Problems& problems) {
  if (node.kind() == Node::Kind::scalar) {
    const std::size_t before = problems.size();
    const std::filesystem::path directory = std::filesystem::path(node.at().file).parent_path();
    const Node document = read_document((directory / node.text()).string(), problems);
    if (problems.size() != before) return {};
    if (document.kind() != Node::Kind::scalar) return read_low_latency_table(document, problems);
  }
  MapReader map(node, problems, "low_latency_exchange");
  LowLatencyTable table;
  table.id = map.text("id");
  table.source = map.text("source");
  table.spread = map.number("spread", 0, 1);
  table.near_spread = map.number("near_spread", 0, 1);
  table.dispatch = read_cost(map.require("dispatch"), "low_latency_exchange.dispatch", problems);
  table.combine = read_cost(map.require("combine"), "low_latency_exchange.combine", problems);
  const Node tokens = map.require("tokens");
  table.tokens = map.integers("tokens", 1, 1'000'000'000);
  if (table.tokens.size() != 2 || table.tokens[0] > table.tokens[1]) {
    if (tokens.kind() != Node::Kind::null) problems.add(tokens, "expected [lowest, highest]");
    table.tokens = {1, 1};
  }
  map.finish();
  return table;
}

Price price_low_latency(const ExpertExchange& exchange, const Profile& profile,
                        const Cluster& cluster) {
  if (exchange.ep <= 1 || exchange.tokens == 0) {
    return {.source = PriceSource::derived, .note = "one GPU: nothing to exchange"};
  }
  const bool remote = exchange.ep > exchange.gpus_per_node;
  ORRERY_CHECK(!remote || cluster.nic.bandwidth_bytes_per_s > 0, "{} has no NIC", cluster.name);
  const LowLatencyBytes bytes = low_latency_bytes(exchange);
  const double nvlink = cluster.nvlink.bandwidth_bytes_per_s;
  const double nic = cluster.nic.bandwidth_bytes_per_s;
  const LowLatencyTable& table = profile.low_latency;
  if (table.id.empty()) {
    const double far_s = remote ? cluster.nic.latency_s + bytes.far / nic : 0;
    return {
        .time_ps = from_seconds(std::max(cluster.nvlink.latency_s + bytes.near / nvlink, far_s)),
        .source = PriceSource::roofline,
        .spread = 0.3,
        .extrapolated = true,
        .note = "link rates only: the profile has no low_latency_exchange"};
  }
  const LowLatencyCost& cost = exchange.combine ? table.combine : table.dispatch;
  const bool outside = exchange.tokens < table.tokens[0] || exchange.tokens > table.tokens[1];
  return {.time_ps = from_seconds(low_latency_s(cost, bytes, nvlink, nic)),
          .source = PriceSource::derived,
          .spread = (remote ? table.spread : table.near_spread) * (outside ? 2 : 1),
          .extrapolated = outside,
          .note = table.id};
}

}  // namespace orrery
