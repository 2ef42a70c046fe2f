#include "reports/network.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "reports/json_object.hpp"
#include "reports/terminal.hpp"
#include "sim/collective_flows.hpp"
#include "sim/exchange.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kMaxBytes = std::int64_t{1} << 42;
constexpr std::int64_t kMaxTokens = std::int64_t{1} << 24;

[[noreturn]] void reject(std::string message, std::string hint = "") {
  std::vector<Problem> problems(1);
  problems[0].at.file = "command line";
  problems[0].message = std::move(message);
  problems[0].hint = std::move(hint);
  throw InputError(std::move(problems));
}

/// What the file says: a cluster, and where it is a scenario, all else.
struct Source {
  Cluster cluster;
  std::optional<Scenario> scenario;
  std::shared_ptr<const Fabric> fabric;
  Node profile;  ///< where a cluster names it
};

Profile profile_of(const Source& source) {
  if (source.scenario) return source.scenario->profile;
  Problems problems;
  const Node root = read_named_document(source.profile, source.cluster.profile, problems);
  Profile profile = read_profile(root, problems);
  problems.throw_if_any();
  return profile;
}

Source read_source(const std::string& file, const Overrides& overrides) {
  Problems problems;
  const Node document = read_document(file, problems);
  problems.throw_if_any();
  Source source;
  if (document.find("plan") || document.find("model")) {
    source.scenario = read_scenario(file, overrides);
    source.cluster = source.scenario->cluster;
    source.fabric = source.scenario->fabric;
    return source;
  }
  const Node root = with_overrides(document, overrides, problems);
  source.cluster = read_cluster(root, problems);
  problems.throw_if_any();
  if (!source.cluster.fabric.empty()) {
    const Node named = root.find("fabric").value_or(root);
    const Node fabric = read_named_document(named, source.cluster.fabric, problems);
    problems.throw_if_any();
    source.fabric = read_fabric_of(source.cluster, named, fabric, problems);
    problems.throw_if_any();
  }
  source.profile = root.find("profile").value_or(root);
  // Overrides of the profile have an effect on what asks for it.
  if (!overrides_below(source.profile).empty()) profile_of(source);
  report_without_effect(root, problems);
  problems.throw_if_any();
  return source;
}

void place_ranks(NetworkQuestion& q, const Cluster& c) {
  if (q.ranks_per_node > c.gpus_per_node) {
    reject(fmt::format("--ranks-per-node {}: a node of '{}' has {} GPUs", q.ranks_per_node, c.name,
                       c.gpus_per_node));
  }
  if (q.ranks == 0) q.ranks = q.ranks_per_node > 0 ? q.ranks_per_node : c.gpus_per_node;
  if (q.ranks < 2) reject("--ranks: at least two have something to say to each other");
  if (q.ranks_per_node == 0) q.ranks_per_node = c.gpus_per_node;
  q.ranks_per_node = std::min(q.ranks_per_node, q.ranks);
  if (q.ranks > c.nodes * q.ranks_per_node) {
    reject(fmt::format("--ranks {}: '{}' has {} {} of {} GPUs{}", q.ranks, c.name, c.nodes,
                       c.nodes == 1 ? "node" : "nodes", c.gpus_per_node,
                       q.ranks_per_node < c.gpus_per_node
                           ? fmt::format(", of which {} are used", q.ranks_per_node)
                           : ""));
  }
}

/// The first GPUs of the first nodes.
std::vector<GpuId> members_of(const NetworkQuestion& q, const Cluster& c) {
  std::vector<GpuId> members;
  for (std::int64_t rank = 0; rank < q.ranks; ++rank) {
    members.emplace_back(static_cast<std::size_t>(rank / q.ranks_per_node * c.gpus_per_node +
                                                  rank % q.ranks_per_node));
  }
  return members;
}

std::vector<std::int64_t> sizes_of(NetworkQuestion& q, std::int64_t min, std::int64_t max,
                                   std::int64_t most, std::string_view what) {
  if (!q.min) q.min = std::min(min, q.max.value_or(min));
  if (!q.max) q.max = std::max(max, *q.min);
  if (*q.min < 1 || *q.max > most || *q.min > *q.max) {
    reject(
        fmt::format("sizes from --min {} to --max {}: they go from 1 to {} {}, the smaller first",
                    *q.min, *q.max, most, what));
  }
  if (q.factor < 2) reject(fmt::format("--factor {}: 2 or more", q.factor));
  std::vector<std::int64_t> sizes;
  for (std::int64_t s = *q.min; s <= *q.max; s *= q.factor) {
    sizes.push_back(s);
    if (s > *q.max / q.factor) break;
  }
  return sizes;
}

ExpertExchange shape_of(const ExchangeQuestion& x, const NetworkQuestion& q, const Source& source) {
  ExpertExchange e{.combine = x.combine,
                   .format = x.combine ? NumberFormat::bf16 : NumberFormat::fp8_block,
                   .hidden = 7168,
                   .top_k = 8,
                   .experts = 256,
                   .ep = q.ranks,
                   .gpus_per_node = q.ranks_per_node,
                   .node_limit = 4};
  if (source.scenario && source.scenario->model.moe) {
    const Scenario& s = *source.scenario;
    e.hidden = s.model.hidden;
    e.top_k = s.model.moe->top_k;
    e.experts = s.model.moe->routed_experts;
    e.node_limit = s.model.moe->group_limit < s.model.moe->groups ? s.model.moe->group_limit : 0;
    e.format = x.combine ? s.plan.precision.combine : s.plan.precision.dispatch;
  }
  e.hidden = x.hidden.value_or(e.hidden);
  e.top_k = x.top_k.value_or(e.top_k);
  e.experts = x.experts.value_or(e.experts);
  e.node_limit = x.node_limit.value_or(e.node_limit);
  e.format = x.format.value_or(e.format);
  if (e.top_k > e.experts) reject(fmt::format("--top-k {} of {} experts", e.top_k, e.experts));
  if (e.experts % e.ep != 0) {
    reject(fmt::format("--ranks {}: {} experts do not spread evenly over them", e.ep, e.experts));
  }
  if (e.ep % e.gpus_per_node != 0) {
    reject(fmt::format("--ranks {}: {} a node do not fill whole nodes", e.ep, e.gpus_per_node));
  }
  return e;
}

/// Lines of at most `width` characters, broken at blanks.
std::vector<std::string> wrapped(const std::string& text, std::size_t width) {
  std::vector<std::string> lines;
  std::size_t begin = 0;
  while (begin < text.size()) {
    std::size_t end = text.size();
    if (end - begin > width) {
      end = text.rfind(' ', begin + width);
      if (end == std::string::npos || end <= begin) end = std::min(begin + width, text.size());
    }
    lines.push_back(text.substr(begin, end - begin));
    begin = text.find_first_not_of(' ', end);
    if (begin == std::string::npos) break;
  }
  return lines;
}

std::string gbps(double bytes_per_s) {
  return fmt::format("{:.4g} GB/s", bytes_per_s / 1e9);
}
std::string us(double s) {
  return fmt::format("{:.4g} us", s * 1e6);
}

std::string node_of(const Cluster& c) {
  return fmt::format("{} {} of {} GPUs, {} in all", c.nodes, c.nodes == 1 ? "node" : "nodes",
                     c.gpus_per_node, c.gpus());
}

std::string links(const Cluster& c, const Fabric* fabric) {
  std::string out =
      fmt::format("{}\n{}{}\n\n", c.name, node_of(c), c.nvls ? ", NVSwitch reduces" : "");
  const auto source = [&](const std::string& text) {
    for (const std::string& line : wrapped(text, 88)) out += fmt::format("          {}\n", line);
  };
  const auto link = [&](std::string_view name, const LinkRate& rate, double peak) {
    out += fmt::format("{:<10}{} of {} each way (peak), {:.0f} %; 64 bytes in {}\n", name,
                       gbps(rate.bandwidth_bytes_per_s), gbps(peak),
                       100 * rate.bandwidth_bytes_per_s / peak, us(rate.latency_s));
    source(rate.source);
  };
  link("nvlink", c.nvlink, c.nvlink_peak_bytes_per_s);
  if (c.nic.bandwidth_bytes_per_s > 0) link("nic", c.nic, c.nic_peak_bytes_per_s);
  const CollectiveRates& r = c.collectives;
  out += fmt::format("\ncollectives in a node, within {:.0f} %\n", 100 * r.spread);
  out += fmt::format(
      "          base {}, ring step {}; low latency at {}; bulk after {},\n"
      "          first chunk up to {}, own block copied at {};\n"
      "          to peers at {}, or after {}{}\n",
      us(r.base_s), us(r.nvlink_hop_s), gbps(r.low_latency_bytes_per_s), us(r.bulk_latency_s),
      format_bytes(r.nvlink_pipeline_bytes), gbps(r.copy_bytes_per_s), gbps(r.peer_bytes_per_s),
      us(r.peer_latency_s),
      c.nvls ? fmt::format("; in the switch at {:.0f} % of the link", 100 * r.nvls_share) : "");
  if (c.nodes > 1) {
    out += fmt::format("collectives across nodes, within {:.0f} %\n", 100 * r.nic_spread);
    out += fmt::format("          tree level {}, ring step {}, peer {}, pipeline {}\n",
                       us(r.nic_tree_hop_s), us(r.nic_ring_hop_s), us(r.nic_peer_s),
                       format_bytes(r.nic_pipeline_bytes));
  }
  source(r.source);
  if (fabric == nullptr) return out + "\nno fabric: steps are simulated with formulas only\n";
  const FabricCounts counts = fabric->counts();
  return out +
         fmt::format("\nfabric    {}: {} endpoints, {} switches, {} cables between them, {}\n",
                     fabric->name(), counts.endpoints, counts.switches, counts.switch_cables,
                     c.load_balancing == LoadBalancing::spray ? "packets sprayed" : "ECMP");
}

std::string exchange_table(const NetworkAnswer& a) {
  const ExpertExchange& e = *a.exchange;
  std::string out;
  for (const std::string& remark : a.remarks) out += fmt::format("# {}\n", remark);
  std::vector<std::vector<std::string>> cells = {
      {"tokens", "time (us)", "DeepEP GB/s", "+-", "price is"}};
  for (const ExchangeRow& row : a.rows) {
    cells.push_back({fmt::to_string(row.tokens), fmt::format("{:.2f}", row.time_us),
                     fmt::format("{:.2f}", row.logical_gbps),
                     fmt::format("{:.0f} %", 100 * row.price.spread),
                     fmt::format("{}{}", name_of(row.price.source),
                                 row.price.extrapolated ? ", outside the measured range" : "")});
  }
  out += fmt::format("# {} of {} x {} a token, top {} of {} experts{}\n",
                     e.combine ? "combine" : "dispatch", e.hidden, name_of(e.format), e.top_k,
                     e.experts,
                     e.node_limit > 0 ? fmt::format(", at most {} nodes", e.node_limit) : "");
  return out + format_table(cells, "rrrrl");
}

void write(JsonWriter& writer, const LinkRate& link, double peak) {
  JsonObject o(writer);
  o("bandwidth_bytes_per_s", link.bandwidth_bytes_per_s);
  o("peak_bytes_per_s", peak);
  o("latency_s", link.latency_s);
  o("source", link.source);
}

void write(JsonWriter& writer, const Cluster& c) {
  JsonObject o(writer);
  o("name", c.name);
  o("nodes", c.nodes);
  o("gpus_per_node", c.gpus_per_node);
  write(o.name("nvlink"), c.nvlink, c.nvlink_peak_bytes_per_s);
  if (c.nic.bandwidth_bytes_per_s > 0) write(o.name("nic"), c.nic, c.nic_peak_bytes_per_s);
  o("nvls", c.nvls);
  o("spread", c.collectives.spread);
  if (c.nodes > 1) o("nic_spread", c.collectives.nic_spread);
  o("collectives_source", c.collectives.source);
}

void write(JsonWriter& writer, const NcclTiming& t) {
  JsonObject o(writer);
  o("time", t.time_us);
  o("alg_bw", t.algbw_gbps);
  o("bus_bw", t.busbw_gbps);
  if (t.wrong) {
    o("nwrong", *t.wrong);
  } else {
    o.null("nwrong");
  }
}

void write(JsonWriter& writer, const NcclRow& row) {
  JsonObject o(writer);
  o("size", row.size_bytes);
  o("count", row.count);
  o("type", row.type);
  o("redop", row.redop);
  o("root", fmt::to_string(row.root));
  if (row.out_of_place) write(o.name("out_of_place"), *row.out_of_place);
  if (row.in_place) write(o.name("in_place"), *row.in_place);
}

void write(JsonWriter& writer, const ExchangeRow& row) {
  JsonObject o(writer);
  o("tokens", row.tokens);
  o("time_us", row.time_us);
  o("logical_gb_per_s", row.logical_gbps);
  o("spread", row.price.spread);
  o("source", name_of(row.price.source));
  o("extrapolated", row.price.extrapolated);
}

}  // namespace

std::optional<std::int64_t> parse_nccl_size(std::string_view text) {
  int shift = 0;
  if (!text.empty()) {
    switch (text.back()) {
      case 'k':
      case 'K':
        shift = 10;
        break;
      case 'm':
      case 'M':
        shift = 20;
        break;
      case 'g':
      case 'G':
        shift = 30;
        break;
      case 't':
      case 'T':
        shift = 40;
        break;
      default:
        break;
    }
  }
  if (shift > 0) text.remove_suffix(1);
  const auto value = parse_whole_number(text);
  if (!value || *value < 0 || *value > (std::int64_t{1} << 62) >> shift) return std::nullopt;
  return *value << shift;
}

NetworkAnswer ask_network(NetworkQuestion question, const PriceOf& formula) {
  const Source source = read_source(question.file, question.overrides);
  const Cluster& c = source.cluster;
  NetworkAnswer answer;
  answer.cluster = c;
  answer.fabric = source.fabric;
  if (question.flows && source.fabric == nullptr) {
    reject(fmt::format("--network flows: '{}' names no fabric", c.name));
  }
  const auto price_of = [&](const Shape& shape, const Profile& profile, const Cluster& cluster) {
    Price p = formula(shape, profile, cluster);
    if (!question.flows) return p;
    const std::vector<GpuId> members = members_of(question, cluster);
    p.time_ps = time_as_flows(shape, members, p.time_ps, cluster, *source.fabric);
    p.note += ", as flows on " + source.fabric->name();
    return p;
  };
  if (const NcclOp* op = std::get_if<NcclOp>(&question.operation)) {
    place_ranks(question, c);
    const auto sizes = sizes_of(question, 8, std::int64_t{16} << 30, kMaxBytes, "bytes");
    const Profile none;  // collectives need no kernels
    double spread = 0;
    std::int64_t outside = 0;
    std::vector<std::string> notes;
    answer.table = simulated_nccl_table(
        *op, question.ranks, question.ranks_per_node, sizes, [&](std::int64_t bytes) {
          const auto shape = shape_of(*op, bytes, question.ranks, question.ranks_per_node);
          if (!shape) reject(fmt::format("there is no formula for {}", name_of(*op)));
          const Price p = price_of(*shape, none, c);
          spread = std::max(spread, p.spread);
          if (p.extrapolated) ++outside;
          if (std::find(notes.begin(), notes.end(), p.note) == notes.end()) notes.push_back(p.note);
          return seconds(p.time_ps);
        });
    answer.remarks = {fmt::format("{}: {}", c.name, node_of(c)),
                      "in-place is as out-of-place, and nothing was verified (#wrong)"};
    for (const std::string& note : notes) {
      answer.remarks.push_back(fmt::format("{}; spread {:.0f} %", note, 100 * spread));
    }
    if (outside > 0) {
      answer.remarks.push_back(fmt::format("{} rows are outside of what was measured", outside));
    }
  } else if (const auto* x = std::get_if<ExchangeQuestion>(&question.operation)) {
    place_ranks(question, c);
    ExpertExchange e = shape_of(*x, question, source);
    const auto sizes = sizes_of(question, 128, 16384, kMaxTokens, "tokens");
    constexpr int kV3Sms = 20;
    const int planned = source.scenario ? source.scenario->plan.communication_sms : 0;
    answer.sms = x->sms.value_or(planned > 0 ? planned : kV3Sms);
    const Profile profile = profile_of(source);
    if (profile.device.sms > 0 && answer.sms > profile.device.sms) {
      reject(
          fmt::format("--sms {}: {} has {}", answer.sms, profile.device.name, profile.device.sms));
    }
    const bool remote = e.ep > e.gpus_per_node;
    const double copies = remote ? mean_nodes_per_token(e) : mean_gpus_per_token(e);
    for (const std::int64_t tokens : sizes) {
      e.tokens = tokens;
      ExchangeRow row{.tokens = tokens,
                      .price = price_of({.work = e, .sms = answer.sms}, profile, c)};
      const double s = seconds(row.price.time_ps);
      row.time_us = s * 1e6;
      row.logical_gbps = static_cast<double>(tokens) * copies * static_cast<double>(e.hidden) *
                         bytes_per_element(e.format) / s / 1e9;
      answer.rows.push_back(std::move(row));
    }
    e.tokens = 0;
    answer.exchange = e;
    answer.remarks = {
        fmt::format("{}: {}", c.name, node_of(c)),
        fmt::format("{} GPUs, {} a node, {} SMs; a token goes to {:.3f} {}", e.ep, e.gpus_per_node,
                    answer.sms, copies, remote ? "nodes, its own included" : "GPUs"),
        fmt::format("DeepEP GB/s: tokens x {} x bytes of a token / time",
                    remote ? "nodes" : "GPUs")};
  }
  answer.question = std::move(question);
  return answer;
}

std::string to_terminal(const NetworkAnswer& a) {
  if (a.table) return format_nccl_table(*a.table, a.remarks);
  return a.exchange ? exchange_table(a) : links(a.cluster, a.fabric.get());
}

std::string to_json(const NetworkAnswer& a) {
  return json_document([&](JsonObject& o) {
    const auto text = [&](const std::string& line) { o.writer().String(line.c_str()); };
    write(o.name("cluster"), a.cluster);
    if (!a.table && !a.exchange) return;
    o("ranks", a.question.ranks);
    o("ranks_per_node", a.question.ranks_per_node);
    o.array("remarks", a.remarks, text);
    if (a.exchange) {
      const ExpertExchange& e = *a.exchange;
      o("operation", e.combine ? "combine" : "dispatch");
      o("format", name_of(e.format));
      o("hidden", e.hidden);
      o("top_k", e.top_k);
      o("experts", e.experts);
      o("node_limit", e.node_limit);
      o("sms", a.sms);
    } else {
      o("operation", name_of(a.table->op));
      // nccl-tests' own place for it, for those that read its files
      o.array("args", std::vector{fmt::format("{}_perf", name_of(a.table->op))}, text);
    }
    const auto row = [&](const auto& r) { write(o.writer(), r); };
    if (a.table) {
      o.array("results", a.table->rows, row);
    } else {
      o.array("results", a.rows, row);
    }
  });
}

}  // namespace orrery
