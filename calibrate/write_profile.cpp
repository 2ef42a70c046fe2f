#include "calibrate/write_profile.hpp"

#include <fmt/core.h>
#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <string>

#include "calibrate/derive_profiles.hpp"

namespace orrery {
namespace {

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + "\"";
}

class Writer {
 public:
  template <class... T>
  void line(int indent, fmt::format_string<T...> format, T&&... arguments) {
    text_.append(static_cast<std::size_t>(indent), ' ');
    fmt::format_to(std::back_inserter(text_), format, std::forward<T>(arguments)...);
    text_ += '\n';
  }
  std::string take() { return std::move(text_); }

 private:
  std::string text_;
};

std::string rate(double bytes_per_s) {
  return fmt::format("{:.5g} GB/s", bytes_per_s / 1e9);
}
std::string time(double s) {
  return fmt::format("{:.4g} us", s * 1e6);
}
std::string flops(double flops_per_s) {
  return fmt::format("{:.5g} TFLOP/s", flops_per_s / 1e12);
}

void write(Writer& w, const Device& d) {
  w.line(0, "device:");
  w.line(2, "name: {}", quoted(d.name));
  w.line(2, "sms: {}", d.sms);
  w.line(2, "memory: {:.12g} B", d.memory_bytes);
  w.line(2, "memory_bandwidth: {}", rate(d.memory_bytes_per_s));
  w.line(2, "bf16: {}", flops(d.bf16_flops_per_s));
  if (d.fp8_flops_per_s > 0) w.line(2, "fp8: {}", flops(d.fp8_flops_per_s));
  if (d.fp32_flops_per_s > 0) w.line(2, "fp32: {}", flops(d.fp32_flops_per_s));
  w.line(2, "source: {}", quoted(d.source));
}

void write(Writer& w, const GemmTable& t) {
  w.line(2, "- id: {}", t.id);
  w.line(4, "source: {}", quoted(t.source));
  w.line(4, "inputs: {}", name_of(t.inputs));
  w.line(4, "pass: {}", name_of(t.pass));
  w.line(4, "grouped: {}", t.grouped);
  w.line(4, "accumulate: {}", t.accumulate);
  w.line(4, "derived: {}", t.derived);
  w.line(4, "spread: {:.3f}", t.spread);
  w.line(4, "model:");
  std::string tiles;
  for (const GemmTile& tile : t.model.tiles) {
    tiles += fmt::format("{}[{}, {}]", tiles.empty() ? "" : ", ", tile.m, tile.n);
  }
  w.line(6, "tiles: [{}]", tiles);
  w.line(6, "sm_rate: {}", flops(t.model.flops_per_s_per_sm));
  w.line(6, "sm_operand_rate: {}", rate(t.model.operand_bytes_per_s_per_sm));
  w.line(6, "tile_overhead: {}", time(t.model.tile_s));
  w.line(6, "launch: {}", time(t.model.launch_s));
  w.line(6, "memory_bandwidth: {}", rate(t.model.bytes_per_s));
  w.line(4, "points:  # [groups, m, n, k, sms, microseconds]");
  for (const GemmPoint& p : t.points) {
    w.line(6, "- [{}, {}, {}, {}, {}, {:.6g}]", p.groups, p.m, p.n, p.k, p.sms, p.seconds * 1e6);
  }
}

void write(Writer& w, const AttentionTable& t) {
  w.line(2, "- id: {}", t.id);
  w.line(4, "source: {}", quoted(t.source));
  w.line(4, "inputs: {}", name_of(t.inputs));
  w.line(4, "direction: {}", t.backward ? "backward" : "forward");
  w.line(4, "derived: {}", t.derived);
  w.line(4, "spread: {:.3f}", t.spread);
  w.line(4, "model:");
  w.line(6, "sm_rate: {}", flops(t.model.flops_per_s_per_sm));
  w.line(6, "block_overhead: {}", time(t.model.block_s));
  w.line(6, "launch: {}", time(t.model.launch_s));
  w.line(
      4,
      "points:  # [causal, batch, heads, kv_heads, q_len, kv_len, d_qk, d_v, sms, microseconds]");
  for (const AttentionPoint& p : t.points) {
    const AttentionCore& a = p.shape;
    w.line(6, "- [{}, {}, {}, {}, {}, {}, {}, {}, {}, {:.6g}]", a.causal ? 1 : 0, a.batch, a.heads,
           a.kv_heads, a.q_len, a.kv_len, a.d_qk, a.d_v, p.sms, p.seconds * 1e6);
  }
}

void write(Writer& w, const CachedTable& t) {
  w.line(2, "- id: {}", t.id);
  w.line(4, "source: {}", quoted(t.source));
  w.line(4, "inputs: {}", name_of(t.inputs));
  w.line(4, "cache: {}", name_of(t.cache));
  w.line(4, "latent: {}", t.latent);
  w.line(4, "gathered: {}", t.gathered);
  w.line(4, "derived: {}", t.derived);
  w.line(4, "spread: {:.3f}", t.spread);
  w.line(4, "model:");
  w.line(6, "launch: {}", time(t.model.launch_s));
  w.line(6, "memory_bandwidth: {}", rate(t.model.bytes_per_s));
  w.line(6, "rate: {}", flops(t.model.flops_per_s));
  w.line(4, "points:  # [sequences, heads, kv_heads, q_len, kv_len, d_qk, d_v, sms, microseconds]");
  for (const CachedPoint& p : t.points) {
    const CachedAttention& a = p.shape;
    w.line(6, "- [{}, {}, {}, {}, {}, {}, {}, {}, {:.6g}]", a.batch, a.heads, a.kv_heads, a.q_len,
           a.kv_len, a.d_qk, a.d_v, p.sms, p.seconds * 1e6);
  }
}

void write(Writer& w, StreamingKind kind, const StreamingRate& r) {
  w.line(2, "{}:", name_of(kind));
  w.line(4, "bandwidth: {}", rate(r.bytes_per_s));
  w.line(4, "launch: {}", time(r.launch_s));
  w.line(4, "derived: {}", r.derived);
  w.line(4, "spread: {:.3f}", r.spread);
  w.line(4, "id: {}", r.id);
  w.line(4, "source: {}", quoted(r.source));
  if (r.points.empty()) return;
  w.line(4, "points:  # [label, bytes read, bytes written, launches, sms, microseconds]");
  for (const StreamingPoint& p : r.points) {
    w.line(6, "- [{}, {}, {}, {}, {}, {:.6g}]", quoted(p.label), p.bytes_read, p.bytes_written,
           p.launches, p.sms, p.seconds * 1e6);
  }
}

}  // namespace

std::string profile_yaml(const Profile& p, std::string_view comment,
                         std::span<const HeldOutError> errors, const std::string& expert_exchange) {
  Writer w;
  std::size_t start = 0;
  while (start < comment.size()) {
    const std::size_t end = std::min(comment.find('\n', start), comment.size());
    w.line(0, "# {}", comment.substr(start, end - start));
    start = end + 1;
  }
  if (!errors.empty()) w.line(0, "# |predicted / measured - 1| on points not used:");
  for (const HeldOutError& e : errors) {
    w.line(0,
           "#   {:<34} {:>5} points, median {:4.1f} %, 90th percentile {:4.1f} %, bias {:+.1f} %",
           e.family, e.points, 100 * e.median, 100 * e.percentile_90, 100 * e.bias);
  }
  w.line(0, "name: {}", p.name);
  write(w, p.device);
  if (p.launch_gap_s > 0) w.line(0, "launch_gap: {}", time(p.launch_gap_s));
  w.line(0, "launch_gap_source: {}", quoted(p.launch_gap_source));
  if (p.beside_communication) w.line(0, "beside_communication: true");
  if (!p.bandwidth_by_sms.empty()) {
    w.line(0, "bandwidth_by_sms:");
    w.line(2, "source: {}", quoted(p.bandwidth_by_sms_source));
    w.line(2, "points:");
    for (const auto& [sms, share] : p.bandwidth_by_sms) w.line(4, "- [{}, {:.4g}]", sms, share);
  }
  w.line(0, "gemm:");
  for (const GemmTable& t : p.gemms) write(w, t);
  w.line(0, "attention:");
  for (const AttentionTable& t : p.attention) write(w, t);
  if (!p.cached_attention.empty()) w.line(0, "cached_attention:");
  for (const CachedTable& t : p.cached_attention) write(w, t);
  w.line(0, "streaming:");
  for (const auto& [kind, rate] : p.streaming) write(w, kind, rate);
  if (!expert_exchange.empty()) w.line(0, "expert_exchange: {}", expert_exchange);
  return w.take();
}

std::string write_profile(const DerivedProfile& derived) {
  std::string text =
      profile_yaml(derived.profile,
                   "Written by orrery_derive; change calibrate/derive_profiles.cpp, not this "
                   "file.\n" +
                       derived.comment,
                   derived.errors, derived.expert_exchange);
  if (!derived.low_latency_exchange.empty()) {
    text += "low_latency_exchange: " + derived.low_latency_exchange + "\n";
  }
  return text;
}

}  // namespace orrery
