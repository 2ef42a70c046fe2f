#include "sim/exchange.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <map>
#include <random>

#include "sim/check.hpp"
#include "sim/overrides.hpp"

namespace orrery {
namespace {

struct Means {
  double nodes = 0;
  double gpus = 0;
};

/// Probability that `drawn` of `experts` miss a subset of `held` (which need not be whole: experts
/// that do not divide evenly).
double miss_probability(double held, std::int64_t experts, std::int64_t drawn) {
  double miss = 1;
  for (std::int64_t i = 0; i < drawn; ++i) {
    const auto left = static_cast<double>(experts - i);
    miss *= std::max(0.0, left - held) / left;
  }
  return miss;
}

double mean_distinct(std::int64_t parts, std::int64_t experts, std::int64_t drawn) {
  const auto n = static_cast<double>(parts);
  return n * (1 - miss_probability(static_cast<double>(experts) / n, experts, drawn));
}

std::int64_t nodes_of(const ExpertExchange& shape) {
  return std::max<std::int64_t>(1, shape.ep / std::max<std::int64_t>(1, shape.gpus_per_node));
}

/// Draws the greatest of a node's scores one after the other, without drawing the rest: the
/// greatest of n uniform numbers below x is x u^(1/n).
class DescendingScores {
 public:
  explicit DescendingScores(std::int64_t count) : left_(count) {}
  double next(std::mt19937_64& random) {
    if (left_ == 0) return -1;
    const double u = (static_cast<double>(random() >> 11) + 0.5) * 0x1p-53;
    last_ *= std::pow(u, 1.0 / static_cast<double>(left_--));
    return last_;
  }

 private:
  std::int64_t left_;
  double last_ = 1;
};

Means draw_limited(std::int64_t experts, std::int64_t top_k, std::int64_t nodes,
                   std::int64_t gpus_per_node, std::int64_t limit) {
  constexpr int kTokens = 8192;
  const std::int64_t per_node = experts / nodes;
  // Which experts of a node are its best is uniform, so the GPUs hit by n of them need no draws.
  std::vector<double> gpus_hit(static_cast<std::size_t>(top_k) + 1);
  for (std::int64_t n = 0; n <= std::min(top_k, per_node); ++n) {
    gpus_hit[static_cast<std::size_t>(n)] = mean_distinct(gpus_per_node, per_node, n);
  }

  struct Node {
    DescendingScores scores;
    double best = 0;    // the best not taken yet
    double second = 0;  // the one after it
    std::int64_t taken = 0;
  };
  std::mt19937_64 random(20241227);  // any fixed seed; the date of the V3 report
  Means sum;
  std::vector<Node> drawn;
  for (int token = 0; token < kTokens; ++token) {
    drawn.assign(static_cast<std::size_t>(nodes), Node{DescendingScores(per_node)});
    for (Node& node : drawn) {
      node.best = node.scores.next(random);
      node.second = node.scores.next(random);
    }
    std::nth_element(
        drawn.begin(), drawn.begin() + (limit - 1), drawn.end(),
        [](const Node& a, const Node& b) { return a.best + a.second > b.best + b.second; });
    const auto end = drawn.begin() + limit;
    for (std::int64_t k = 0; k < top_k; ++k) {
      Node& node = *std::max_element(drawn.begin(), end,
                                     [](const Node& a, const Node& b) { return a.best < b.best; });
      ++node.taken;
      node.best = node.second;
      node.second = node.scores.next(random);
    }
    for (auto node = drawn.begin(); node != end; ++node) {
      sum.nodes += node->taken > 0 ? 1 : 0;
      sum.gpus += gpus_hit[static_cast<std::size_t>(node->taken)];
    }
  }
  return {sum.nodes / kTokens, sum.gpus / kTokens};
}

Means means_of(const ExpertExchange& shape) {
  ORRERY_CHECK(shape.experts >= shape.ep && shape.ep >= 1 && shape.top_k >= 1 &&
                   shape.top_k <= shape.experts,
               "experts {} ep {} top_k {}", shape.experts, shape.ep, shape.top_k);
  const std::int64_t nodes = nodes_of(shape);
  const std::int64_t limit = shape.node_limit;
  const bool limited = limit > 0 && limit < nodes && shape.experts / nodes >= 2 &&
                       limit * (shape.experts / nodes) >= shape.top_k;
  if (!limited) {
    return {mean_distinct(nodes, shape.experts, shape.top_k),
            mean_distinct(shape.ep, shape.experts, shape.top_k)};
  }
  using Routing = std::array<std::int64_t, 5>;
  const Routing routing{shape.experts, shape.top_k, nodes, shape.ep / nodes, limit};
  thread_local std::map<Routing, Means> known;  // of a pure function: the same in every thread
  const auto found = known.find(routing);
  if (found != known.end()) return found->second;
  const Means means = draw_limited(shape.experts, shape.top_k, nodes, shape.ep / nodes, limit);
  known.emplace(routing, means);
  return means;
}

ExchangeCost read_cost(const Node& node, const std::string& what, Problems& problems) {
  MapReader map(node, problems, what);
  ExchangeCost cost;
  cost.latency_s = map.quantity("latency", Dimension::seconds);
  cost.pipeline_s = map.quantity("pipeline", Dimension::seconds);
  cost.token_s = map.quantity_or("per_token", 0, Dimension::seconds);
  cost.token_bytes_per_s = map.quantity_or("token_bandwidth", 0, Dimension::bytes_per_s);
  cost.copy_s = map.quantity_or("per_copy", 0, Dimension::seconds);
  cost.copy_bytes_per_s = map.quantity("copy_bandwidth", Dimension::bytes_per_s);
  cost.remote_latency_s = map.quantity("remote_latency", Dimension::seconds);
  cost.remote_pipeline_s = map.quantity("remote_pipeline", Dimension::seconds);
  cost.remote_token_s = map.quantity("remote_per_token", Dimension::seconds);
  cost.remote_node_s = map.quantity("remote_per_node", Dimension::seconds);
  cost.layout_s = map.quantity_or("layout", 0, Dimension::seconds);
  cost.nvlink_share = map.number("nvlink_share", 0.01, 2);
  cost.nic_share = map.number("nic_share", 0.01, 2);
  map.finish();
  return cost;
}

ExchangePoint read_point(const Node& node, Problems& problems) {
  constexpr std::int64_t kMany = 1'000'000'000;
  MapReader map(node, problems, "expert_exchange point");
  ExchangePoint point;
  ExpertExchange& shape = point.shape;
  shape.combine = map.choice<bool>("direction", {{"dispatch", false}, {"combine", true}});
  shape.format = map.choice<NumberFormat>(
      "format", {{"bf16", NumberFormat::bf16}, {"fp8_block", NumberFormat::fp8_block}});
  shape.tokens = map.integer("tokens", 1, kMany);
  shape.hidden = map.integer("hidden", 1, kMany);
  shape.top_k = map.integer("top_k", 1, kMany);
  shape.experts = map.integer("experts", 1, kMany);
  shape.ep = map.integer("ep", 2, kMany);
  shape.gpus_per_node = map.integer("gpus_per_node", 1, kMany);
  shape.node_limit = map.integer_or("node_limit", 0, 1, kMany);
  point.sms = static_cast<int>(map.integer("sms", 1, 1024));
  point.seconds = map.quantity("time", Dimension::seconds);
  map.finish();
  if (shape.ep % shape.gpus_per_node != 0) {
    problems.add(node, "ep must be a multiple of gpus_per_node");
  }
  if (shape.experts < shape.ep || shape.experts < shape.top_k) {
    problems.add(node, "experts must be at least ep and at least top_k");
  }
  return point;
}

ExchangeMachine read_machine(const Node& node, Problems& problems) {
  MapReader map(node, problems, "expert_exchange machine");
  ExchangeMachine machine;
  machine.name = map.text("name");
  machine.source = map.text("source");
  machine.nvlink_bytes_per_s = map.quantity("nvlink", Dimension::bytes_per_s);
  machine.nic_bytes_per_s = map.quantity("nic", Dimension::bytes_per_s);
  const Node points = map.require("points");
  const std::size_t before = problems.size();
  for (std::size_t i = 0; i < points.size(); ++i) {
    machine.points.push_back(read_point(points[i], problems));
  }
  if (problems.size() > before) machine.points.clear();  // harmless values are no measurements
  map.finish();
  return machine;
}

std::vector<std::int64_t> read_range(MapReader& map, std::string_view key) {
  const Node node = map.require(key);
  std::vector<std::int64_t> range = map.integers(key, 1, 1'000'000'000);
  if (range.size() == 2 && range[0] <= range[1]) return range;
  if (node.kind() != Node::Kind::null) {
    map.problems().add(node, "expected [lowest, highest]");
  }
  return {1, 1};
}

/// The document that a scalar names, relative to the file it stands in; null with a problem if
/// there is none.
Node read_named_file(const Node& name, Problems& problems) {
  const std::filesystem::path directory = name.folder();
  return read_named_document(name, (directory / name.text()).string(), problems);
}

ExchangeTable read_table(const Node& node, Problems& problems, bool may_be_like) {
  const std::size_t before = problems.size();
  MapReader map(node, problems, "expert_exchange");
  ExchangeTable table;
  if (may_be_like && map.has("like")) {
    const Node base = read_named_file(map.at("like"), problems);
    if (problems.size() == before) table = read_table(base, problems, false);
    table.id = map.text("id");
    table.source = map.text("source") + "; " + table.source;
    const Node machines = map.at("machines");
    for (std::size_t i = machines.size(); i-- > 0;) {
      table.machines.insert(table.machines.begin(), read_machine(machines[i], problems));
    }
    map.finish();
    return table;
  }
  table.id = map.text("id");
  table.source = map.text("source");
  table.spread = map.number("spread", 0, 1);
  table.interpolated_spread = map.number("interpolated_spread", 0, 1);
  table.dispatch = read_cost(map.require("dispatch"), "expert_exchange.dispatch", problems);
  table.combine = read_cost(map.require("combine"), "expert_exchange.combine", problems);
  MapReader range(map.require("range"), problems, "expert_exchange.range");
  table.range.tokens = read_range(range, "tokens");
  table.range.hidden = read_range(range, "hidden");
  table.range.sms = read_range(range, "sms");
  table.range.ep = read_range(range, "ep");
  range.finish();
  const Node machines = map.at("machines");
  for (std::size_t i = 0; i < machines.size(); ++i) {
    table.machines.push_back(read_machine(machines[i], problems));
  }
  map.finish();
  return table;
}

}  // namespace

ExchangeTable read_exchange_table(const Node& node, Problems& problems) {
  if (node.kind() != Node::Kind::scalar) return read_table(node, problems, true);
  const std::size_t before = problems.size();
  const Node document = read_named_file(node, problems);
  return problems.size() == before ? read_table(document, problems, true) : ExchangeTable{};
}

double mean_nodes_per_token(const ExpertExchange& shape) {
  return means_of(shape).nodes;
}

double mean_gpus_per_token(const ExpertExchange& shape) {
  return means_of(shape).gpus;
}

}  // namespace orrery
