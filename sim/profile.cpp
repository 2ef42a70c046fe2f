#include "sim/profile.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <limits>

#include "sim/kernel_prices.hpp"
#include "sim/scaled_profile.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kMany = std::int64_t{1} << 40;
constexpr double kMaxSpread = 10;

std::string cited(MapReader& reader) {
  std::string source = reader.text("source");
  if (source.empty() && reader.node().find("source")) {
    reader.problems().add(*reader.node().find("source"), "a source must say who measured this");
  }
  return source;
}

NumberFormat read_format(MapReader& reader, const char* key = "inputs") {
  return reader.choice<NumberFormat>(key, {{"fp32", NumberFormat::fp32},
                                           {"bf16", NumberFormat::bf16},
                                           {"fp8_tensor", NumberFormat::fp8_tensor},
                                           {"fp8_block", NumberFormat::fp8_block}});
}

/// One row of whole numbers and a last number, `columns` in all; null if malformed (reported).
std::optional<std::vector<double>> read_row(const Node& row, std::size_t columns,
                                            std::string_view what, Problems& problems) {
  if (row.kind() != Node::Kind::sequence || row.size() != columns) {
    problems.add(row, fmt::format("expected [{}]", what));
    return std::nullopt;
  }
  std::vector<double> values;
  for (std::size_t i = 0; i < columns; ++i) {
    if (i + 1 < columns) {
      const auto v = read_integer(row[i], problems, 0, kMany);
      if (!v) return std::nullopt;
      values.push_back(static_cast<double>(*v));
    } else {
      const auto v = read_number(row[i], problems, 1e-6, 1e12);
      if (!v) return std::nullopt;
      values.push_back(*v);
    }
  }
  return values;
}

/// Calls `use(row values)` for each well-formed row of `points`.
template <class Use>
void read_points(MapReader& reader, std::size_t columns, std::string_view what, const Use& use) {
  const Node points = reader.require("points");
  if (points.kind() == Node::Kind::null) return;
  if (points.kind() != Node::Kind::sequence || points.size() == 0) {
    reader.problems().add(points,
                          fmt::format("points of {} must be a list of [{}]", reader.what(), what));
    return;
  }
  for (std::size_t i = 0; i < points.size(); ++i) {
    const auto row = read_row(points[i], columns, what, reader.problems());
    if (!row) continue;
    if (std::any_of(row->begin() + (columns == 10 ? 1 : 0), row->end(),
                    [](double v) { return v <= 0; })) {
      reader.problems().add(points[i], "every number of a point must be above zero");
      continue;
    }
    use(*row);
  }
}

/// The elements of a list; a problem if `node` is there and is none.
std::vector<Node> elements(const Node& node, std::string_view what, Problems& problems) {
  std::vector<Node> list;
  if (node.kind() == Node::Kind::null) return list;
  if (node.kind() != Node::Kind::sequence) {
    problems.add(node, fmt::format("{} must be a list", what));
    return list;
  }
  for (std::size_t i = 0; i < node.size(); ++i) list.push_back(node[i]);
  return list;
}

std::int64_t whole(double v) {
  return static_cast<std::int64_t>(v);
}

Device read_device(const Node& node, Problems& problems) {
  MapReader r(node, problems, "device");
  Device d;
  d.name = r.text("name");
  d.sms = static_cast<int>(r.integer("sms", 1, 10'000));
  d.memory_bytes = r.quantity("memory", Dimension::bytes);
  d.memory_bytes_per_s = r.quantity("memory_bandwidth", Dimension::bytes_per_s);
  d.bf16_flops_per_s = r.quantity("bf16", Dimension::flops_per_s);
  d.fp8_flops_per_s = r.quantity_or("fp8", 0, Dimension::flops_per_s);
  d.fp32_flops_per_s = r.quantity_or("fp32", 0, Dimension::flops_per_s);
  d.source = cited(r);
  r.finish();
  return d;
}

GemmModel read_gemm_model(const Node& node, Problems& problems) {
  MapReader r(node, problems, "gemm.model");
  GemmModel m;
  const Node tiles = r.require("tiles");
  for (const Node& tile : elements(tiles, "tiles", problems)) {
    if (tile.size() != 2) {
      problems.add(tile, "a tile is [rows, columns]");
      continue;
    }
    const auto rows = read_integer(tile[0], problems, 1, 4096);
    const auto columns = read_integer(tile[1], problems, 1, 4096);
    if (rows && columns) m.tiles.push_back({static_cast<int>(*rows), static_cast<int>(*columns)});
  }
  if (tiles.kind() == Node::Kind::sequence && tiles.size() == 0)
    problems.add(tiles, "no tile is given");
  m.flops_per_s_per_sm = r.quantity("sm_rate", Dimension::flops_per_s);
  m.operand_bytes_per_s_per_sm = r.quantity("sm_operand_rate", Dimension::bytes_per_s);
  m.tile_s = r.quantity("tile_overhead", Dimension::seconds);
  m.launch_s = r.quantity("launch", Dimension::seconds);
  m.bytes_per_s = r.quantity("memory_bandwidth", Dimension::bytes_per_s);
  r.finish();
  return m;
}

GemmTable read_gemm_table(const Node& node, Problems& problems) {
  MapReader r(node, problems, "gemm");
  GemmTable t;
  t.id = r.text("id");
  t.source = cited(r);
  t.inputs = read_format(r);
  t.pass = r.choice<Pass>("pass", {{"forward", Pass::forward},
                                   {"backward_input", Pass::backward_input},
                                   {"backward_weight", Pass::backward_weight}});
  t.grouped = r.flag_or("grouped", false);
  t.accumulate = r.flag_or("accumulate", false);
  t.derived = r.flag_or("derived", false);
  t.spread = r.number("spread", 0, kMaxSpread);
  t.model = read_gemm_model(r.require("model"), problems);
  read_points(r, 6, "groups, m, n, k, sms, microseconds", [&](const std::vector<double>& v) {
    t.points.push_back({.groups = whole(v[0]),
                        .m = whole(v[1]),
                        .n = whole(v[2]),
                        .k = whole(v[3]),
                        .sms = static_cast<int>(v[4]),
                        .seconds = v[5] * 1e-6,
                        .at = {}});
  });
  r.finish();
  return t;
}

AttentionTable read_attention_table(const Node& node, Problems& problems) {
  MapReader r(node, problems, "attention");
  AttentionTable t;
  t.id = r.text("id");
  t.source = cited(r);
  t.inputs = read_format(r);
  t.backward = r.choice<bool>("direction", {{"forward", false}, {"backward", true}});
  t.derived = r.flag_or("derived", false);
  t.spread = r.number("spread", 0, kMaxSpread);
  MapReader model(r.require("model"), problems, "attention.model");
  t.model.flops_per_s_per_sm = model.quantity("sm_rate", Dimension::flops_per_s);
  t.model.block_s = model.quantity("block_overhead", Dimension::seconds);
  t.model.launch_s = model.quantity("launch", Dimension::seconds);
  model.finish();
  read_points(
      r, 10, "causal (0 or 1), batch, heads, kv_heads, q_len, kv_len, d_qk, d_v, sms, microseconds",
      [&](const std::vector<double>& v) {
        t.points.push_back({.shape = {.inputs = t.inputs,
                                      .backward = t.backward,
                                      .causal = v[0] != 0,
                                      .batch = whole(v[1]),
                                      .heads = whole(v[2]),
                                      .kv_heads = whole(v[3]),
                                      .q_len = whole(v[4]),
                                      .kv_len = whole(v[5]),
                                      .d_qk = whole(v[6]),
                                      .d_v = whole(v[7])},
                            .sms = static_cast<int>(v[8]),
                            .seconds = v[9] * 1e-6,
                            .at = {}});
      });
  r.finish();
  return t;
}

CachedTable read_cached_table(const Node& node, Problems& problems) {
  MapReader r(node, problems, "cached_attention");
  CachedTable t;
  t.id = r.text("id");
  t.source = cited(r);
  t.inputs = read_format(r);
  t.cache = read_format(r, "cache");
  t.latent = r.flag_or("latent", false);
  t.gathered = r.flag_or("gathered", false);
  t.derived = r.flag_or("derived", false);
  t.spread = r.number("spread", 0, kMaxSpread);
  MapReader model(r.require("model"), problems, "cached_attention.model");
  t.model.launch_s = model.quantity("launch", Dimension::seconds);
  t.model.bytes_per_s = model.quantity("memory_bandwidth", Dimension::bytes_per_s);
  t.model.flops_per_s = model.quantity("rate", Dimension::flops_per_s);
  model.finish();
  const char* const what =
      "sequences, heads, kv_heads, q_len, kv_len, d_qk, d_v, sms, microseconds";
  read_points(r, 9, what, [&](const std::vector<double>& v) {
    t.points.push_back({.shape = {.inputs = t.inputs,
                                  .cache = t.cache,
                                  .latent = t.latent,
                                  .gathered = t.gathered,
                                  .batch = whole(v[0]),
                                  .heads = whole(v[1]),
                                  .kv_heads = whole(v[2]),
                                  .q_len = whole(v[3]),
                                  .kv_len = whole(v[4]),
                                  .d_qk = whole(v[5]),
                                  .d_v = whole(v[6])},
                        .sms = static_cast<int>(v[7]),
                        .seconds = v[8] * 1e-6,
                        .at = {}});
  });
  r.finish();
  return t;
}

std::optional<StreamingKind> streaming_kind(std::string_view name) {
  for (int i = 0; i <= static_cast<int>(StreamingKind::reduction); ++i) {
    const auto kind = static_cast<StreamingKind>(i);
    if (name_of(kind) == name) return kind;
  }
  return std::nullopt;
}

std::vector<std::string> streaming_names() {
  std::vector<std::string> names;
  for (int i = 0; i <= static_cast<int>(StreamingKind::reduction); ++i) {
    names.emplace_back(name_of(static_cast<StreamingKind>(i)));
  }
  return names;
}

/// [label, bytes_read, bytes_written, launches, sms, microseconds]; null if malformed (reported).
std::optional<StreamingPoint> read_streaming_point(const Node& row, Problems& problems) {
  if (row.kind() != Node::Kind::sequence || row.size() != 6) {
    problems.add(row, "expected [label, bytes read, bytes written, launches, sms, microseconds]");
    return std::nullopt;
  }
  if (row[0].kind() != Node::Kind::scalar) {
    problems.add(row[0], "a label is the name of an operation, or \"\" for any");
    return std::nullopt;
  }
  const auto read = read_integer(row[1], problems, 0, kMany);
  const auto written = read_integer(row[2], problems, 0, kMany);
  const auto launches = read_integer(row[3], problems, 1, kMany);
  const auto sms = read_integer(row[4], problems, 1, 10'000);
  const auto microseconds = read_number(row[5], problems, 1e-6, 1e12);
  if (!read || !written || !launches || !sms || !microseconds) return std::nullopt;
  if (*read + *written == 0) {
    problems.add(row, "a point must read or write something");
    return std::nullopt;
  }
  return StreamingPoint{.label = row[0].text(),
                        .bytes_read = *read,
                        .bytes_written = *written,
                        .launches = *launches,
                        .sms = static_cast<int>(*sms),
                        .seconds = *microseconds * 1e-6};
}

void read_streaming(const Node& node, Profile& profile, Problems& problems) {
  if (node.kind() == Node::Kind::null) return;
  if (node.kind() != Node::Kind::map) {
    problems.add(node, "streaming must be a map from kinds to rates");
    return;
  }
  for (std::size_t i = 0; i < node.size(); ++i) {
    const std::string& name = node.key(i).text();
    const auto kind = streaming_kind(name);
    if (!kind) {
      const auto near = nearest(name, streaming_names());
      problems.add(node.key(i), fmt::format("unknown kind of streaming kernel '{}'", name),
                   near ? fmt::format("did you mean '{}'?", *near) : "");
      continue;
    }
    MapReader r(node[i], problems, "streaming." + name);
    StreamingRate rate;
    rate.bytes_per_s = r.quantity("bandwidth", Dimension::bytes_per_s);
    rate.launch_s = r.quantity("launch", Dimension::seconds);
    rate.derived = r.flag_or("derived", false);
    rate.spread = r.number("spread", 0, kMaxSpread);
    rate.id = r.text("id");
    rate.source = cited(r);
    for (const Node& row : elements(r.at("points"), "points", problems)) {
      if (const auto point = read_streaming_point(row, problems)) rate.points.push_back(*point);
    }
    r.finish();
    profile.streaming[*kind] = rate;
  }
}

void read_bandwidth_by_sms(const Node& node, Profile& profile, Problems& problems) {
  if (node.kind() == Node::Kind::null) return;
  MapReader r(node, problems, "bandwidth_by_sms");
  profile.bandwidth_by_sms_source = cited(r);
  for (const Node& point : elements(r.require("points"), "points", problems)) {
    const auto row = read_row(point, 2, "sms, share of the bandwidth", problems);
    if (!row) continue;
    const int sms = static_cast<int>((*row)[0]);
    const bool ascends =
        profile.bandwidth_by_sms.empty() ? sms > 0 : sms > profile.bandwidth_by_sms.back().first;
    if (!ascends || (*row)[1] > 1) {
      problems.add(point, "SMs must ascend and shares be at most 1");
      continue;
    }
    profile.bandwidth_by_sms.emplace_back(sms, (*row)[1]);
  }
  r.finish();
}

}  // namespace

void prepare(Profile& profile) {
  for (GemmTable& table : profile.gemms) prepare(table, profile);
  for (AttentionTable& table : profile.attention) prepare(table);
  for (CachedTable& table : profile.cached_attention) prepare(table, profile);
  for (auto& [kind, rate] : profile.streaming) prepare(kind, rate, profile);
}

Profile read_profile(const Node& node, Problems& problems) {
  const std::size_t problems_before = problems.size();
  MapReader r(node, problems, "profile");
  Profile profile;
  const Device device = read_device(r.require("device"), problems);
  const bool scaled = r.has("scaled");
  if (scaled) profile = read_scaled_profile(r.at("scaled"), device, problems);
  profile.file = node.at().file;
  profile.name = r.text("name");
  profile.device = device;
  // Left out where the kernels' times contain it, as the source then says.
  if (!scaled || r.has("launch_gap")) {
    profile.launch_gap_s = r.quantity_or("launch_gap", 0, Dimension::seconds);
    profile.launch_gap_source = r.text("launch_gap_source");
  }
  profile.beside_communication = r.flag_or("beside_communication", profile.beside_communication);
  if (r.has("bandwidth_by_sms")) {
    profile.bandwidth_by_sms.clear();
    read_bandwidth_by_sms(r.at("bandwidth_by_sms"), profile, problems);
  }
  // Its own tables first: of equals the first is taken.
  std::vector<GemmTable> gemms;
  for (const Node& table : elements(r.at("gemm"), "gemm", problems)) {
    gemms.push_back(read_gemm_table(table, problems));
  }
  profile.gemms.insert(profile.gemms.begin(), gemms.begin(), gemms.end());
  std::vector<AttentionTable> attention;
  for (const Node& table : elements(r.at("attention"), "attention", problems)) {
    attention.push_back(read_attention_table(table, problems));
  }
  profile.attention.insert(profile.attention.begin(), attention.begin(), attention.end());
  for (const Node& table : elements(r.at("cached_attention"), "cached_attention", problems)) {
    profile.cached_attention.push_back(read_cached_table(table, problems));
  }
  read_streaming(r.at("streaming"), profile, problems);
  if (r.has("expert_exchange"))
    profile.exchange = read_exchange_table(r.at("expert_exchange"), problems);
  if (r.has("low_latency_exchange")) {
    profile.low_latency = read_low_latency_table(r.at("low_latency_exchange"), problems);
  }
  r.finish();
  if (problems.size() == problems_before) prepare(profile);
  return profile;
}

}  // namespace orrery
