#include "sim/network_prices.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <span>

#include "sim/check.hpp"

namespace orrery {
namespace {

/// CollectiveRates says where this form comes from.
double pipelined_s(double bytes, double pipeline_bytes, double bytes_per_s) {
  return (bytes + 2 * std::sqrt(bytes * pipeline_bytes)) / bytes_per_s;
}

// ---- expert exchange

struct Links {
  double nvlink_bytes_per_s = 0;
  double nic_bytes_per_s = 0;
};

/// The bytes one GPU's tokens put on each kind of link, per direction; with uneven experts, the
/// bytes on the links of the busiest.
struct ExchangeBytes {
  double token = 0;  ///< of one token
  double nvlink = 0;
  double nic = 0;
  double nodes = 0;  ///< distinct, per token, own included
  double gpus = 0;
  MostOverMean most;
};

ExchangeBytes bytes_of_exchange(const ExpertExchange& e) {
  const std::int64_t whole_nodes = std::max<std::int64_t>(1, e.ep / e.gpus_per_node);
  const auto nodes = static_cast<double>(whole_nodes);
  const double per_node = static_cast<double>(e.ep) / nodes;
  ExchangeBytes b;
  b.token = static_cast<double>(e.hidden) * bytes_per_element(e.format);
  b.nodes = mean_nodes_per_token(e);
  b.gpus = mean_gpus_per_token(e);
  const double all = static_cast<double>(e.tokens) * b.token;
  // Every GPU of the group is as likely as another, so 1/G of the copies in a node stay on the GPU
  // that received the token, and 1/N of the nodes are the token's own.
  b.nvlink = all * b.gpus * (per_node - 1) / per_node;
  b.nic = all * b.nodes * (nodes - 1) / nodes;
  // The exchange lasts until the busiest has all. No GPU and no node gets a token twice, so it is
  // sent at most every token of the group. A node's NICs share its tokens evenly: each comes in at
  // the GPU with the place of its sender. What the SMs do, of which most is reading, sending and
  // forwarding a GPU's own tokens, stays even: how much of it is receiving is not published.
  b.most = {.gpu = static_cast<double>(e.ep) / b.gpus, .node = nodes / b.nodes};
  const auto over_mean = [&](std::int64_t per_mille, double most) {
    return std::min(static_cast<double>(per_mille) / 1000, most);
  };
  if (e.busiest_gpu_per_mille != 1000) b.nvlink *= over_mean(e.busiest_gpu_per_mille, b.most.gpu);
  if (e.busiest_node_per_mille != 1000) b.nic *= over_mean(e.busiest_node_per_mille, b.most.node);
  return b;
}

double cost_per_copy_s(const ExchangeCost& cost, double token_bytes) {
  return cost.copy_s + token_bytes / cost.copy_bytes_per_s;
}

/// SM-seconds, in one node or across nodes.
double sm_work_s(const ExpertExchange& e, const ExchangeCost& cost, const ExchangeBytes& b) {
  const auto tokens = static_cast<double>(e.tokens);
  if (b.nic > 0) {
    constexpr double kReferenceHidden = 7168;
    const double scale = cost_per_copy_s(cost, b.token) /
                         cost_per_copy_s(cost, kReferenceHidden * bytes_per_element(e.format));
    return tokens * (cost.remote_token_s + b.nodes * cost.remote_node_s) * scale;
  }
  const double per_token =
      cost.token_s + (cost.token_bytes_per_s > 0 ? b.token / cost.token_bytes_per_s : 0);
  return tokens * (per_token + b.gpus * cost_per_copy_s(cost, b.token));
}

struct ExchangeTime {
  double seconds = 0;
  const char* limit = "";
};

ExchangeTime exchange_time(const ExpertExchange& e, int sms, const ExchangeCost& cost,
                           const Links& links) {
  const ExchangeBytes b = bytes_of_exchange(e);
  const bool remote = b.nic > 0;
  const double sm_s = sm_work_s(e, cost, b) / sms;
  const double nvlink_s = b.nvlink / (links.nvlink_bytes_per_s * cost.nvlink_share);
  const double nic_s = remote ? b.nic / (links.nic_bytes_per_s * cost.nic_share) : 0;
  const double slowest = std::max({sm_s, nvlink_s, nic_s});
  const double pipeline_s = remote ? cost.remote_pipeline_s : cost.pipeline_s;
  ExchangeTime time;
  time.seconds = slowest + 2 * std::sqrt(pipeline_s * slowest) +
                 (remote ? cost.remote_latency_s : cost.latency_s);
  time.limit = slowest == sm_s ? "SMs" : slowest == nvlink_s ? "NVLink" : "NIC";
  return time;
}

bool near(double a, double b, double tolerance) {
  return std::abs(a / b - 1) <= tolerance;
}

/// A cluster of one node may have no NIC; then NVLink decides.
const ExchangeMachine* machine_like(const ExchangeTable& table, const Links& links) {
  for (const ExchangeMachine& machine : table.machines) {
    if (near(machine.nvlink_bytes_per_s, links.nvlink_bytes_per_s, 0.05) &&
        (links.nic_bytes_per_s == 0 ||
         near(machine.nic_bytes_per_s, links.nic_bytes_per_s, 0.05))) {
      return &machine;
    }
  }
  return nullptr;
}

/// Of the machines that tell these kernels from those of the formula, the one with the nearest
/// links; null if the formula's are meant.
const ExchangeMachine* own_machine(const ExchangeTable& table, const Links& links) {
  const auto away = [&](const ExchangeMachine& m) {
    const double nic = links.nic_bytes_per_s > 0
                           ? std::abs(std::log(m.nic_bytes_per_s / links.nic_bytes_per_s))
                           : 0;
    return std::abs(std::log(m.nvlink_bytes_per_s / links.nvlink_bytes_per_s)) + nic;
  };
  const auto own =
      std::span(table.machines).first(std::min(table.own_machines, table.machines.size()));
  const auto nearest = std::min_element(
      own.begin(), own.end(), [&](const auto& a, const auto& b) { return away(a) < away(b); });
  return nearest == own.end() ? nullptr : &*nearest;
}

/// How far apart two exchanges are in everything but the size of the group.
double distance(const ExchangePoint& point, const ExpertExchange& e, int sms) {
  const auto log_ratio = [](double a, double b) { return std::abs(std::log2(a / b)); };
  const auto d = [](std::int64_t v) { return static_cast<double>(v); };
  const ExpertExchange& p = point.shape;
  return log_ratio(d(p.tokens), d(e.tokens)) + log_ratio(d(p.hidden), d(e.hidden)) +
         log_ratio(d(p.top_k), d(e.top_k)) + log_ratio(d(p.experts), d(e.experts)) +
         log_ratio(point.sms, sms) + (p.format == e.format ? 0 : 1);
}

/// Measured over formula at the neighbouring group sizes, interpolated over log ep.
struct Correction {
  double ratio = 1;
  bool exact = false;    ///< a point is this very exchange
  bool between = false;  ///< group size inside the points' range, all else close
};

Correction correction(const ExpertExchange& e, int sms, const ExchangeMachine& machine,
                      const ExchangeCost& cost) {
  const ExchangePoint* below = nullptr;
  const ExchangePoint* above = nullptr;
  const auto better = [&](const ExchangePoint& a, const ExchangePoint* b) {
    if (b == nullptr || a.shape.ep != b->shape.ep) {
      return b == nullptr || std::abs(a.shape.ep - e.ep) < std::abs(b->shape.ep - e.ep);
    }
    return distance(a, e, sms) < distance(*b, e, sms);
  };
  for (const ExchangePoint& point : machine.points) {
    // A group inside a node runs another kernel than one across nodes.
    const bool same_kernel =
        (point.shape.ep > point.shape.gpus_per_node) == (e.ep > e.gpus_per_node);
    if (point.shape.combine != e.combine || !same_kernel) continue;
    if (point.shape.ep <= e.ep && better(point, below)) below = &point;
    if (point.shape.ep >= e.ep && better(point, above)) above = &point;
  }
  Correction result;
  if (below == nullptr && above == nullptr) return result;
  result.between = below != nullptr && above != nullptr;
  if (below == nullptr) below = above;
  if (above == nullptr) above = below;

  const Links links{machine.nvlink_bytes_per_s, machine.nic_bytes_per_s};
  const auto ratio_at = [&](const ExchangePoint& point) {
    return point.seconds / exchange_time(point.shape, point.sms, cost, links).seconds;
  };
  const double low = ratio_at(*below);
  result.ratio = low;
  if (above->shape.ep != below->shape.ep) {
    const auto log_ep = [](const ExchangePoint& p) { return std::log(double(p.shape.ep)); };
    const double x = (std::log(double(e.ep)) - log_ep(*below)) / (log_ep(*above) - log_ep(*below));
    result.ratio = low + x * (ratio_at(*above) - low);
  }
  const double off = std::max(distance(*below, e, sms), distance(*above, e, sms));
  ExpertExchange same = e;
  same.new_layout = below->shape.new_layout;
  same.stride = below->shape.stride;
  result.exact = below == above && below->shape == same && below->sms == sms;
  result.between = result.between && off <= 1.5;
  return result;
}

bool outside(const std::vector<std::int64_t>& range, std::int64_t value) {
  return 2 * value < range[0] || value > 2 * range[1];
}

// ---- collectives

/// A group laid over nodes.
struct Group {
  double ranks = 1;
  double per_node = 1;
  double nodes = 1;
};

Group group_of(const Collective& collective) {
  ORRERY_CHECK(collective.ranks_per_node >= 1, "ranks_per_node {}", collective.ranks_per_node);
  Group group;
  group.ranks = static_cast<double>(collective.ranks);
  group.per_node = static_cast<double>(std::min(collective.ranks, collective.ranks_per_node));
  group.nodes = std::ceil(group.ranks / group.per_node);
  return group;
}

double ring_bytes(double bytes, double ranks) {
  return bytes * (ranks - 1) / ranks;
}

/// Slowest link of a ring through all members: NVLink inside, all members' NICs side by side
/// outside.
double ring_rate(const Group& g, const Cluster& c) {
  const double nics = g.per_node * c.nic.bandwidth_bytes_per_s;
  return g.per_node > 1 ? std::min(c.nvlink.bandwidth_bytes_per_s, nics) : nics;
}

/// The first chunk of a transfer inside a node: nothing overlaps it.
double first_chunk_s(double bytes, const Cluster& c, double bytes_per_s) {
  constexpr double kSteps = 8;
  return std::min(bytes / kSteps, c.collectives.nvlink_pipeline_bytes) / bytes_per_s;
}

/// `bytes` per direction over a GPU's NVLink in the bulk protocol, without latency.
double bulk_s(double bytes, const Cluster& c, double share = 1) {
  const double bytes_per_s = c.nvlink.bandwidth_bytes_per_s * share;
  return bytes / bytes_per_s + first_chunk_s(bytes, c, bytes_per_s);
}

/// Reduction in the switch moves S up and S/n down, then S/n up and S down (NCCL maintainer, nccl
/// issue 1083), which is S (1 + 1/n) per direction; NCCL uses it above 4 GPUs.
std::optional<double> nvls_s(double bytes, double ranks, const Cluster& c) {
  if (!c.nvls || ranks <= 4) return std::nullopt;
  return bulk_s(bytes * (1 + 1 / ranks), c, c.collectives.nvls_share);
}

double chain_s(double bytes, double ranks, const Cluster& c) {
  return bulk_s(2 * ring_bytes(bytes, ranks), c);
}

bool switch_reduces(double bytes, double ranks, const Cluster& c) {
  const std::optional<double> nvls = nvls_s(bytes, ranks, c);
  return nvls && *nvls < chain_s(bytes, ranks, c);
}

/// All-reduce inside a node without its latency.
double node_all_reduce_s(double bytes, double ranks, const Cluster& c) {
  return switch_reduces(bytes, ranks, c) ? *nvls_s(bytes, ranks, c) : chain_s(bytes, ranks, c);
}

/// One GPU to one other in its node, or to several at once, `message` bytes to each: small messages
/// go without a handshake, at a rate so low that from some size on the handshake is shorter.
double peers_s(double message, double peers, const Cluster& c) {
  const CollectiveRates& r = c.collectives;
  return r.nvlink_hop_s + std::min(message / r.peer_bytes_per_s, r.peer_latency_s) +
         bulk_s(message * peers, c);
}

/// `steps` of a ring, `bytes` per direction over each member's NVLink; `own` bytes of its own block
/// each member copies to where the result is. In the low latency protocol a block goes through an
/// SM once more than over a link (sent first, or received last), of 128 bytes 8 are flags.
double ring_in_node_s(double steps, double bytes, double own, double block, const Cluster& c) {
  const CollectiveRates& r = c.collectives;
  const double low_rate =
      std::min(r.low_latency_bytes_per_s, c.nvlink.bandwidth_bytes_per_s * 120 / 128);
  const double low = (bytes + block) / low_rate;
  const double bulk = r.bulk_latency_s + bulk_s(bytes, c) + own / r.copy_bytes_per_s;
  return steps * r.nvlink_hop_s + std::min(low, bulk);
}

double one_node_s(CollectiveKind kind, double bytes, double ranks, const Cluster& c) {
  const CollectiveRates& r = c.collectives;
  const double block = bytes / ranks;
  switch (kind) {
    case CollectiveKind::all_reduce: {
      // No block is only copied: a member's own one enters where it is reduced.
      const double ring =
          ring_in_node_s(2 * (ranks - 1), 2 * ring_bytes(bytes, ranks), 0, block, c);
      const std::optional<double> nvls = nvls_s(bytes, ranks, c);
      // Up to the switch and down again, with a handshake each.
      return nvls ? std::min(ring, 2 * (r.nvlink_hop_s + r.bulk_latency_s) + *nvls) : ring;
    }
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
      return ring_in_node_s(ranks - 1, ring_bytes(bytes, ranks), block, block, c);
    case CollectiveKind::all_to_all:
      return peers_s(block, ranks - 1, c) + block / r.copy_bytes_per_s;
    case CollectiveKind::broadcast:
      return ring_in_node_s(ranks - 1, bytes, 0, 0, c);
  }
  return 0;
}

// ---- measured lines

/// Of those of an operation, the one of the nearest number of ranks; null where there is none.
const MeasuredLine* line_of(const Cluster& cluster, std::optional<CollectiveKind> kind,
                            std::int64_t ranks) {
  const MeasuredLine* best = nullptr;
  const auto off = [&](const MeasuredLine& line) {
    return std::abs(std::log(static_cast<double>(line.ranks) / static_cast<double>(ranks)));
  };
  for (const MeasuredLine& line : cluster.collectives.lines) {
    if (line.kind == kind && (best == nullptr || off(line) < off(*best))) best = &line;
  }
  return best;
}

Price price_by(const MeasuredLine& line, double bytes_sent, std::int64_t ranks) {
  const bool exact = line.ranks == ranks;
  return {.time_ps = from_seconds(line.base_s + bytes_sent / line.bytes_per_s),
          .source = PriceSource::derived,
          .spread = line.spread * (exact ? 1 : 2),
          .extrapolated = !exact,
          .note = fmt::format("base and bandwidth measured on {} ranks", line.ranks)};
}

/// What a rank sends on a ring, which is also what it sends when all exchange directly.
double bytes_sent(CollectiveKind kind, double bytes, double ranks) {
  switch (kind) {
    case CollectiveKind::all_reduce:
      return 2 * ring_bytes(bytes, ranks);
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
    case CollectiveKind::all_to_all:
      return ring_bytes(bytes, ranks);
    case CollectiveKind::broadcast:
      return bytes;
  }
  return 0;
}

/// What a member's NIC sends for the double binary tree over nodes: a node passes S with two nodes
/// and 2 S with more.
double tree_nic_bytes(double bytes, const Group& g) {
  return (g.nodes <= 2 ? 1 : 2) * bytes / g.per_node;
}

double ring_all_reduce_s(double bytes, const Group& g, const Cluster& c) {
  return 2 * ((g.ranks - 1) * c.collectives.nic_ring_hop_s +
              ring_bytes(bytes, g.ranks) / ring_rate(g, c));
}

/// NCCL's double binary tree over nodes, a chain (or NVLS) inside each, over all members' NICs.
double tree_all_reduce_s(double bytes, const Group& g, const Cluster& c) {
  const CollectiveRates& r = c.collectives;
  const double levels = std::log2(g.nodes);
  const double nic_s = pipelined_s(tree_nic_bytes(bytes, g), r.nic_pipeline_bytes * levels,
                                   c.nic.bandwidth_bytes_per_s);
  const double node_s = g.per_node > 1 ? node_all_reduce_s(bytes, g.per_node, c) : 0;
  return 2 * (g.per_node - 1) * r.nvlink_hop_s + 2 * std::ceil(levels) * r.nic_tree_hop_s +
         std::max(nic_s, node_s);
}

double many_nodes_s(CollectiveKind kind, double bytes, const Group& g, const Cluster& c) {
  const CollectiveRates& r = c.collectives;
  const double steps = g.ranks - 1;
  switch (kind) {
    case CollectiveKind::all_reduce:
      return std::min(ring_all_reduce_s(bytes, g, c), tree_all_reduce_s(bytes, g, c));
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
      // In step with one another, the members wait in every step for the one behind a NIC.
      return steps * r.nic_ring_hop_s + ring_bytes(bytes, g.ranks) / ring_rate(g, c);
    case CollectiveKind::all_to_all: {
      const double far = g.ranks - g.per_node;
      const double nic_s =
          pipelined_s(bytes * far / g.ranks, r.nic_pipeline_bytes, c.nic.bandwidth_bytes_per_s);
      const double node_s = bulk_s(bytes * (g.per_node - 1) / g.ranks, c);
      return far * r.nic_peer_s + std::max(nic_s, node_s);
    }
    case CollectiveKind::broadcast:
      return (g.nodes - 1) * r.nic_ring_hop_s + g.nodes * (g.per_node - 1) * r.nvlink_hop_s +
             pipelined_s(bytes, r.nic_pipeline_bytes, ring_rate(g, c));
  }
  return 0;
}

}  // namespace

Price price_exchange(const ExpertExchange& exchange, int sms, const Profile& profile,
                     const Cluster& cluster) {
  if (exchange.ep <= 1 || exchange.tokens == 0) {
    return {.source = PriceSource::derived, .note = "one GPU: nothing to exchange"};
  }
  ORRERY_CHECK(exchange.gpus_per_node >= 1 && exchange.hidden > 0, "gpus_per_node {} hidden {}",
               exchange.gpus_per_node, exchange.hidden);
  const bool remote = exchange.ep > exchange.gpus_per_node;
  ORRERY_CHECK(!remote || cluster.nic.bandwidth_bytes_per_s > 0, "{} has no NIC", cluster.name);
  const Links links{cluster.nvlink.bandwidth_bytes_per_s, cluster.nic.bandwidth_bytes_per_s};
  if (sms <= 0) sms = std::max(1, profile.device.sms);
  const ExchangeTable& table = profile.exchange;

  if (table.id.empty()) {
    const ExchangeBytes b = bytes_of_exchange(exchange);
    if (const MeasuredLine* line = line_of(cluster, CollectiveKind::all_to_all, exchange.ep);
        !remote && line != nullptr) {
      Price price = price_by(*line, b.nvlink, exchange.ep);
      price.note += ", as an all-to-all: the profile has no expert_exchange";
      return price;
    }
    const double nic_s = remote ? b.nic / links.nic_bytes_per_s : 0;
    const double latency_s = remote ? cluster.nic.latency_s : cluster.nvlink.latency_s;
    return {
        .time_ps = from_seconds(latency_s + std::max(b.nvlink / links.nvlink_bytes_per_s, nic_s)),
        .source = PriceSource::roofline,
        .spread = 0.3,
        .note = "link rates only: the profile has no expert_exchange"};
  }

  const ExchangeCost& cost = exchange.combine ? table.combine : table.dispatch;
  const ExchangeTime formula = exchange_time(exchange, sms, cost, links);
  Correction corrected;
  const ExchangeMachine* machine = machine_like(table, links);
  const bool alike = machine != nullptr;
  if (!alike) machine = own_machine(table, links);
  if (machine != nullptr) corrected = correction(exchange, sms, *machine, cost);
  const double layout_s = remote && exchange.new_layout ? cost.layout_s : 0;

  Price price;
  price.time_ps = from_seconds(formula.seconds * corrected.ratio + layout_s);
  price.extrapolated = outside(table.range.tokens, exchange.tokens) ||
                       outside(table.range.hidden, exchange.hidden) ||
                       outside(table.range.sms, sms) || outside(table.range.ep, exchange.ep);
  if (alike && corrected.exact) {
    constexpr double kRounding = 0.02;  // the published rates are rounded to 1 in 50 GB/s
    price.source = PriceSource::measured;
    price.spread = kRounding;
  } else if (alike && corrected.between) {
    price.source = PriceSource::interpolated;
    price.spread = table.interpolated_spread;
  } else {
    price.source = PriceSource::derived;
    price.spread = table.spread * (price.extrapolated ? 2 : 1);
  }
  price.note = fmt::format("{}{}{}{}, limited by {}", table.id, machine != nullptr ? ", " : "",
                           machine != nullptr ? machine->name : "",
                           machine != nullptr && !alike ? " on other links" : "", formula.limit);
  return price;
}

Price price_collective(const Collective& collective, const Cluster& cluster) {
  if (collective.ranks <= 1 || collective.bytes == 0) {
    return {.source = PriceSource::derived, .note = "one rank or no bytes"};
  }
  const CollectiveRates& rates = cluster.collectives;
  const auto bytes = static_cast<double>(collective.bytes);
  const Group group = group_of(collective);

  constexpr double kLargestBytes = 16.0 * (1LL << 30);  // of the published all-reduces
  if (const MeasuredLine* line = line_of(cluster, collective.kind, collective.ranks);
      group.nodes == 1 && line != nullptr) {
    return price_by(*line, bytes_sent(collective.kind, bytes, group.ranks), collective.ranks);
  }
  Price price;
  price.source = PriceSource::derived;
  if (group.nodes == 1) {
    price.time_ps =
        from_seconds(rates.base_s + one_node_s(collective.kind, bytes, group.ranks, cluster));
    price.spread = rates.spread;
    price.extrapolated = bytes > 2 * kLargestBytes || group.ranks > 16;
    price.note = "NCCL in a node, ring or NVLS, low latency or bulk";
  } else {
    ORRERY_CHECK(cluster.nic.bandwidth_bytes_per_s > 0, "{} has no NIC", cluster.name);
    price.time_ps =
        from_seconds(rates.base_s + many_nodes_s(collective.kind, bytes, group, cluster));
    // Only all-reduce has tables; the other kinds rest on a published row each.
    const bool tabulated = collective.kind == CollectiveKind::all_reduce;
    price.spread = rates.nic_spread * (tabulated ? 1 : 2);
    price.extrapolated = bytes > 2 * kLargestBytes || group.nodes > 2048;
    price.note = tabulated ? "NCCL across nodes, tree or ring on all rails"
                           : "NCCL across nodes, all rails, few published rows";
  }
  return price;
}

Price price_send(const Send& send, const Cluster& cluster) {
  const CollectiveRates& rates = cluster.collectives;
  const LinkRate& link = send.same_node ? cluster.nvlink : cluster.nic;
  ORRERY_CHECK(link.bandwidth_bytes_per_s > 0, "{} has no such link", cluster.name);
  const auto bytes = static_cast<double>(send.bytes);
  // Every pair of neighbours sends at once, whatever their number was when it was measured: the
  // most is nearest to a step.
  if (const MeasuredLine* line = line_of(cluster, std::nullopt, cluster.gpus_per_node);
      send.same_node && line != nullptr) {
    return price_by(*line, bytes, line->ranks);
  }
  const double path_s = send.same_node
                            ? peers_s(bytes, 1, cluster)
                            : link.latency_s + pipelined_s(bytes, rates.nic_pipeline_bytes,
                                                           link.bandwidth_bytes_per_s);
  Price price;
  price.time_ps = from_seconds(rates.base_s + path_s);
  price.source = PriceSource::derived;
  price.spread = send.same_node ? rates.spread : rates.nic_spread;
  price.note = send.same_node ? "NVLink, low latency or bulk" : "one NIC, rate and latency";
  return price;
}

Price price_storage_write(const StorageWrite& write) {
  return {.time_ps = from_seconds(static_cast<double>(write.bytes) /
                                  static_cast<double>(write.bytes_per_s)),
          .source = PriceSource::derived,
          .note = "the rate that the plan states"};
}

MostOverMean most_over_mean(const ExpertExchange& exchange) {
  return bytes_of_exchange(exchange).most;
}

Communication communication_of(const ExpertExchange& exchange) {
  const auto pattern =
      exchange.combine ? CommunicationPattern::combine : CommunicationPattern::dispatch;
  if (exchange.ep <= 1 || exchange.tokens == 0) return {.pattern = pattern};
  if (exchange.low_latency) {
    // Written to where it is sent from, read from there, and read again where it arrives.
    const LowLatencyBytes copies = low_latency_bytes(exchange);
    return {.pattern = pattern,
            .near_bytes = copies.near,
            .far_bytes = copies.far,
            .memory_bytes = 3 * (copies.near + copies.far)};
  }
  const ExchangeBytes bytes = bytes_of_exchange(exchange);
  const double all = static_cast<double>(exchange.tokens) * bytes.token;
  const double nodes = bytes.nic > 0 ? bytes.nodes : 0;
  const double touched = all * (1 + 1.5 * nodes + 2.5 * bytes.gpus) + 1.5 * bytes.nic;
  return {.pattern = pattern,
          .near_bytes = bytes.nvlink,
          .far_bytes = bytes.nic,
          .memory_bytes = touched};
}

namespace {

constexpr double kNcclMemoryBytes = 2.5;  // for each byte sent; NVIDIA/nccl issue 1428

Communication nccl(CommunicationPattern pattern, double near_bytes, double far_bytes) {
  return {.pattern = pattern,
          .near_bytes = near_bytes,
          .far_bytes = far_bytes,
          .memory_bytes = kNcclMemoryBytes * (near_bytes + far_bytes)};
}

}  // namespace

Communication communication_of(const Collective& collective, const Cluster& cluster) {
  const Group g = group_of(collective);
  const auto bytes = static_cast<double>(collective.bytes);
  const bool alone = g.nodes == 1;
  const double others = (g.per_node - 1) / g.per_node;
  // Every ring passes through all members of a node, and goes out over the NIC of one of them.
  const auto on_rings = [&](double moved) {
    return nccl(CommunicationPattern::ring, alone ? moved : moved * others,
                alone ? 0 : moved / g.per_node);
  };
  switch (collective.kind) {
    case CollectiveKind::all_reduce: {
      const bool tree =
          !alone && tree_all_reduce_s(bytes, g, cluster) < ring_all_reduce_s(bytes, g, cluster);
      if (!alone && !tree) return on_rings(2 * ring_bytes(bytes, g.ranks));
      const double members = alone ? g.ranks : g.per_node;
      double near_bytes = 0;
      if (members > 1) {
        near_bytes = switch_reduces(bytes, members, cluster) ? bytes * (1 + 1 / members)
                                                             : 2 * ring_bytes(bytes, members);
      }
      return nccl(tree ? CommunicationPattern::tree : CommunicationPattern::ring, near_bytes,
                  tree ? tree_nic_bytes(bytes, g) : 0);
    }
    case CollectiveKind::all_gather:
    case CollectiveKind::reduce_scatter:
      return on_rings(ring_bytes(bytes, g.ranks));
    case CollectiveKind::broadcast:
      return on_rings(bytes);
    case CollectiveKind::all_to_all:
      return nccl(CommunicationPattern::all_to_all, bytes * (g.per_node - 1) / g.ranks,
                  bytes * (g.ranks - g.per_node) / g.ranks);
  }
  return {};
}

Communication communication_of(const Send& send) {
  const auto bytes = static_cast<double>(send.bytes);
  return nccl(CommunicationPattern::send, send.same_node ? bytes : 0, send.same_node ? 0 : bytes);
}

Communication communication_of(const StorageWrite& write) {
  const auto bytes = static_cast<double>(write.bytes);
  // Read once on the way out, by the NIC or a copy engine.
  return {.pattern = CommunicationPattern::storage,
          .far_bytes = write.own_network ? 0 : bytes,
          .memory_bytes = bytes};
}

std::optional<Communication> communication_of(const Shape& shape, const Cluster& cluster) {
  std::optional<Communication> moves;
  if (const auto* e = std::get_if<ExpertExchange>(&shape.work)) {
    moves = communication_of(*e);
  } else if (const auto* c = std::get_if<Collective>(&shape.work)) {
    if (c->ranks > 1) moves = communication_of(*c, cluster);
  } else if (const auto* s = std::get_if<Send>(&shape.work)) {
    moves = communication_of(*s);
  } else if (const auto* w = std::get_if<StorageWrite>(&shape.work)) {
    moves = communication_of(*w);
  }
  if (moves && moves->memory_bytes == 0) moves.reset();
  return moves;
}

}  // namespace orrery
