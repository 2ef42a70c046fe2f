#include "sim/transfers.hpp"

#include <algorithm>
#include <unordered_map>
#include <utility>

#include "sim/check.hpp"

namespace orrery {
namespace {

using Nodes = std::span<const std::vector<GpuId>>;

std::size_t largest(Nodes nodes) {
  std::size_t most = 0;
  for (const auto& node : nodes) most = std::max(most, node.size());
  return most;
}

GpuId on_rail(const std::vector<GpuId>& node, std::size_t rail) {
  return node[std::min(rail, node.size() - 1)];
}

/// Collects transfers between nodes, which go on all rails side by side.
struct Across {
  explicit Across(Nodes all) : nodes(all), rails(largest(all)) {}

  void operator()(std::size_t a, std::size_t b) {
    for (std::size_t rail = 0; rail < rails; ++rail) {
      far.push_back({on_rail(nodes[a], rail), on_rail(nodes[b], rail), 1});
    }
  }

  Nodes nodes;
  std::size_t rails;
  std::vector<Transfer> far;
};

void ring_inside(std::vector<Transfer>& near, Nodes nodes) {
  for (const auto& node : nodes) {
    if (node.size() < 2) continue;
    for (std::size_t i = 0; i < node.size(); ++i) {
      near.push_back({node[i], node[(i + 1) % node.size()], 1});
    }
  }
}

void everyone_inside(std::vector<Transfer>& near, Nodes nodes) {
  for (const auto& node : nodes) {
    for (const GpuId from : node) {
      for (const GpuId to : node) {
        if (from != to) near.push_back({from, to, 1});
      }
    }
  }
}

/// Node i of the one tree is node n - 1 - i of the other, so that who is inside in one is a leaf of
/// the other (with an even number of nodes).
void double_tree(Across& across) {
  const std::size_t n = across.nodes.size();
  for (std::size_t child = 1; child < n; ++child) {
    const std::size_t parent = (child - 1) / 2;
    across(child, parent);
    across(parent, child);
    across(n - 1 - child, n - 1 - parent);
    across(n - 1 - parent, n - 1 - child);
  }
}

void normalise(std::vector<Transfer>& transfers) {
  std::unordered_map<std::uint32_t, double> sent;
  double most = 0;
  for (const Transfer& t : transfers) most = std::max(most, sent[t.from.value] += t.bytes);
  for (Transfer& t : transfers) t.bytes /= most;
}

}  // namespace

std::string_view name_of(CommunicationPattern pattern) {
  switch (pattern) {
    case CommunicationPattern::ring:
      return "ring";
    case CommunicationPattern::tree:
      return "tree";
    case CommunicationPattern::all_to_all:
      return "all_to_all";
    case CommunicationPattern::dispatch:
      return "dispatch";
    case CommunicationPattern::combine:
      return "combine";
    case CommunicationPattern::send:
      return "send";
    case CommunicationPattern::storage:
      return "storage";
  }
  return "?";
}

std::vector<std::vector<GpuId>> by_node(std::span<const GpuId> members, const Fabric& fabric) {
  std::vector<std::vector<GpuId>> nodes;
  std::int32_t node = -1;
  for (const GpuId gpu : members) {
    const std::int32_t its = fabric.vertices()[fabric.vertex(gpu)].node;
    if (nodes.empty() || its != node) nodes.emplace_back();
    node = its;
    nodes.back().push_back(gpu);
  }
  return nodes;
}

UnitTransfers unit_transfers(CommunicationPattern pattern, Nodes nodes) {
  for (const auto& node : nodes) ORRERY_CHECK(!node.empty(), "a node without members");
  UnitTransfers unit;
  Across across(nodes);
  switch (pattern) {
    case CommunicationPattern::ring:
      ring_inside(unit.near, nodes);
      for (std::size_t n = 0; nodes.size() > 1 && n < nodes.size(); ++n) {
        across(n, (n + 1) % nodes.size());
      }
      break;
    case CommunicationPattern::tree:
      ring_inside(unit.near, nodes);
      double_tree(across);
      break;
    case CommunicationPattern::all_to_all:
      everyone_inside(unit.near, nodes);
      for (std::size_t a = 0; a < nodes.size(); ++a) {
        for (std::size_t b = 0; b < nodes.size(); ++b) {
          if (a == b) continue;
          for (const GpuId from : nodes[a]) {
            for (const GpuId to : nodes[b]) across.far.push_back({from, to, 1});
          }
        }
      }
      break;
    case CommunicationPattern::dispatch:
    case CommunicationPattern::combine:
      everyone_inside(unit.near, nodes);
      for (std::size_t a = 0; a < nodes.size(); ++a) {
        for (std::size_t b = 0; b < nodes.size(); ++b) {
          if (a != b) across(a, b);
        }
      }
      if (pattern == CommunicationPattern::combine) {
        for (Transfer& t : unit.near) std::swap(t.from, t.to);
        for (Transfer& t : across.far) std::swap(t.from, t.to);
      }
      break;
    case CommunicationPattern::send: {
      const bool near = nodes.size() == 1;
      ORRERY_CHECK(near ? nodes[0].size() == 2 : nodes.size() == 2, "a send among {} nodes",
                   nodes.size());
      if (near) {
        unit.near.push_back({nodes[0][0], nodes[0][1], 1});
      } else {
        across.far.push_back({nodes[0][0], nodes[1][0], 1});
      }
      break;
    }
    case CommunicationPattern::storage:
      break;  // no GPU at the other end: Fabric::way_out()
  }
  unit.far = std::move(across.far);
  normalise(unit.near);
  normalise(unit.far);
  return unit;
}

}  // namespace orrery
