#include "models/stragglers.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <string_view>
#include <utility>

#include "sim/random.hpp"

namespace orrery {
namespace {

constexpr std::uint64_t kStragglerStream = 0x737472;
constexpr std::int64_t kMostGpus = 1 << 20;

template <class... Visit>
struct Overloaded : Visit... {
  using Visit::operator()...;
};
template <class... Visit>
Overloaded(Visit...) -> Overloaded<Visit...>;

}  // namespace

Stragglers read_stragglers(const Node& node, Problems& problems) {
  Stragglers stragglers;
  if (node.kind() != Node::Kind::sequence) {
    problems.add(node, "stragglers must be a list", "stragglers: [{gpu: 17, slowdown: 1.1}]");
    return stragglers;
  }
  for (std::size_t i = 0; i < node.size(); ++i) {
    const std::size_t before = problems.size();
    MapReader map(node[i], problems, "stragglers");
    if (node[i].kind() != Node::Kind::map) continue;
    int kinds = 0;
    for (const std::string_view key : {"gpu", "node", "share", "sigma"}) kinds += map.has(key);
    if (kinds != 1) {
      problems.add(node[i], "a straggler is either a gpu, a node, a share or a sigma");
      continue;
    }
    const auto slowdown = [&] { return map.number("slowdown", 1, 100); };
    Straggler straggler;
    if (map.has("gpu")) {
      straggler = SlowGpu{map.integer("gpu", 0, kMostGpus), slowdown()};
    } else if (map.has("node")) {
      straggler = SlowNode{map.integer("node", 0, kMostGpus), slowdown()};
    } else if (map.has("share")) {
      straggler = SlowShare{map.number("share", 0, 1), slowdown()};
    } else {
      straggler = SpeedSpread{map.number("sigma", 0, 1)};
    }
    map.finish();
    if (problems.size() == before) stragglers.push_back(straggler);
  }
  return stragglers;
}

void check_stragglers(const Stragglers& stragglers, const Node& node, std::int64_t world,
                      std::int64_t gpus_per_node, Problems& problems) {
  const std::int64_t nodes = (world + gpus_per_node - 1) / gpus_per_node;
  const auto check = [&](std::size_t i, std::string_view what, std::int64_t index,
                         std::int64_t count) {
    if (index < count) return;
    problems.add(node[i].find(what).value_or(node[i]),
                 fmt::format("there is no {} {}: the layout has {} of them, 0 to {}", what, index,
                             count, count - 1));
  };
  for (std::size_t i = 0; i < stragglers.size(); ++i) {
    if (const auto* gpu = std::get_if<SlowGpu>(&stragglers[i])) check(i, "gpu", gpu->gpu, world);
    if (const auto* slow = std::get_if<SlowNode>(&stragglers[i])) {
      check(i, "node", slow->node, nodes);
    }
  }
}

std::string to_yaml(const Stragglers& stragglers) {
  std::vector<std::string> parts;
  for (const Straggler& straggler : stragglers) {
    parts.push_back(std::visit(
        Overloaded{[](const SlowGpu& s) {
                     return fmt::format("{{gpu: {}, slowdown: {}}}", s.gpu, s.slowdown);
                   },
                   [](const SlowNode& s) {
                     return fmt::format("{{node: {}, slowdown: {}}}", s.node, s.slowdown);
                   },
                   [](const SlowShare& s) {
                     return fmt::format("{{share: {}, slowdown: {}}}", s.share, s.slowdown);
                   },
                   [](const SpeedSpread& s) { return fmt::format("{{sigma: {}}}", s.sigma); }},
        straggler));
  }
  return fmt::format("[{}]", fmt::join(parts, ", "));
}

std::vector<double> slowdowns(const Stragglers& stragglers, std::int64_t world,
                              std::int64_t gpus_per_node, std::uint64_t seed) {
  std::vector<double> factors(static_cast<std::size_t>(world), 1.0);
  for (std::size_t i = 0; i < stragglers.size(); ++i) {
    Random random = Random::of({seed, kStragglerStream, i});
    std::visit(
        Overloaded{
            [&](const SlowGpu& s) { factors[static_cast<std::size_t>(s.gpu)] *= s.slowdown; },
            [&](const SlowNode& s) {
              const std::int64_t end = std::min(world, (s.node + 1) * gpus_per_node);
              for (std::int64_t g = s.node * gpus_per_node; g < end; ++g) {
                factors[static_cast<std::size_t>(g)] *= s.slowdown;
              }
            },
            [&](const SlowShare& s) {
              // The first so many of a random order.
              std::vector<std::size_t> order(factors.size());
              std::iota(order.begin(), order.end(), std::size_t{0});
              const auto slow =
                  static_cast<std::size_t>(std::llround(s.share * static_cast<double>(world)));
              for (std::size_t k = 0; k < slow; ++k) {
                std::swap(order[k], order[k + random.below(order.size() - k)]);
                factors[order[k]] *= s.slowdown;
              }
            },
            [&](const SpeedSpread& s) {
              for (double& factor : factors) {
                factor *= std::exp(s.sigma * random.normal());
              }
            }},
        stragglers[i]);
  }
  const bool any = std::any_of(factors.begin(), factors.end(), [](double f) { return f != 1; });
  return any ? factors : std::vector<double>{};
}

}  // namespace orrery
