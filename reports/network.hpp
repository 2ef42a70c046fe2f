#pragma once
// What a cluster's network does: its links, and any collective or exchange as a table, the former
// in nccl-tests' columns.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "models/scenario.hpp"
#include "sim/nccl_table.hpp"
#include "sim/price.hpp"

namespace orrery {

/// Dispatch or combine; the routing is DeepSeek-V3's unless a scenario or an option says otherwise.
struct ExchangeQuestion {
  bool combine = false;
  std::optional<std::int64_t> hidden, top_k, experts;
  std::optional<std::int64_t> node_limit;  ///< 0: none
  std::optional<NumberFormat> format;      ///< fp8_block out, bf16 back
  std::optional<int> sms;                  ///< 20, what the plan gives to communication in V3
};

/// What `orrery network` was asked.
struct NetworkQuestion {
  std::string file;     ///< a cluster, or a scenario whose cluster is meant
  Overrides overrides;  ///< of that file
  std::variant<std::monostate, NcclOp, ExchangeQuestion> operation;  ///< none: the links
  std::int64_t ranks = 0;                                            ///< 0: one node
  std::int64_t ranks_per_node = 0;                                   ///< 0: as many as fit
  std::optional<std::int64_t> min;  ///< bytes (8), or tokens a GPU of an exchange (128)
  std::optional<std::int64_t> max;  ///< 16 GiB, or 16384 tokens
  std::int64_t factor = 2;
  bool flows = false;  ///< every transfer a flow on the cluster's fabric, not the formula's time
};

/// One size of a dispatch or combine. DeepEP's bandwidth counts the bytes of a token once for every
/// node it goes to (inside a node: every GPU), its own included, so it exceeds what the links
/// carry.
struct ExchangeRow {
  std::int64_t tokens = 0;  ///< a GPU
  double time_us = 0;
  double logical_gbps = 0;
  Price price;
};

struct NetworkAnswer {
  Cluster cluster;
  std::shared_ptr<const Fabric> fabric;    ///< null where the cluster names none
  NetworkQuestion question;                ///< with what was left out filled in
  std::optional<NcclTable> table;          ///< of a collective
  std::optional<ExpertExchange> exchange;  ///< shape of an exchange, tokens apart
  int sms = 0;
  std::vector<ExchangeRow> rows;
  std::vector<std::string> remarks;  ///< about the table, a line each
};

/// The time of a transfer as it runs on this cluster.
using PriceOf = std::function<Price(const Shape&, const Profile&, const Cluster&)>;

/// Reads the file and asks `price_of` (sim/price.hpp's formulas by default) for every size. With
/// flows it says what the transfers reach alone (sim/collective_flows.hpp). InputError for what is
/// not in the file, or does not fit on the cluster.
NetworkAnswer ask_network(NetworkQuestion question, const PriceOf& price_of = price);

std::string to_terminal(const NetworkAnswer& answer);
/// Results of a collective have the keys of nccl-tests' option -J.
std::string to_json(const NetworkAnswer& answer);

/// "8", "64K", "16G": nccl-tests' way of writing sizes, K being 1024. nullopt for anything else.
std::optional<std::int64_t> parse_nccl_size(std::string_view text);

}  // namespace orrery
