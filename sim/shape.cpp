#include "sim/shape.hpp"

#include <fmt/core.h>

#include <algorithm>

namespace orrery {
namespace {

constexpr double kScaleBytes = 4.0;  // one FP32 scale
constexpr double kBlock = 128.0;

double product(std::initializer_list<std::int64_t> factors) {
  double p = 1;
  for (const std::int64_t f : factors) p *= static_cast<double>(f);
  return p;
}

/// Key-query pairs that are not masked, per (sequence, head).
double attended_pairs(const AttentionCore& a) {
  const double q = static_cast<double>(a.q_len);
  const double kv = static_cast<double>(a.kv_len);
  if (!a.causal) return q * kv;
  // Queries that come before the first key see nothing.
  const double rows = std::min(q, kv);
  return rows * (kv - rows) + rows * (rows + 1) / 2;
}

}  // namespace

double bytes_of(const Gemm& g) {
  const double element = bytes_per_element(g.inputs);
  // The second operand of a forward or input-gradient GEMM is a weight with one scale per 128x128.
  const bool weight_blocks = g.inputs == NumberFormat::fp8_block && g.pass != Pass::backward_weight;
  const double weight = weight_blocks ? 1 + kScaleBytes / (kBlock * kBlock) : element;
  const double out = g.accumulate ? 8 : g.inputs == NumberFormat::fp32 ? 4 : 2;
  return product({g.groups, g.m, g.k}) * element + product({g.groups, g.k, g.n}) * weight +
         product({g.groups, g.m, g.n}) * out;
}

double bytes_of(const AttentionCore& a) {
  const double element = bytes_per_element(a.inputs);
  const double q = product({a.batch, a.heads, a.q_len, a.d_qk});
  const double o = product({a.batch, a.heads, a.q_len, a.d_v});
  const double k = product({a.batch, a.kv_heads, a.kv_len, a.d_qk});
  const double v = product({a.batch, a.kv_heads, a.kv_len, a.d_v});
  const double row_statistics = 4 * product({a.batch, a.heads, a.q_len});
  if (!a.backward) return (q + k + v + o) * element + row_statistics;
  // Reads q, k, v, o, do and the row statistics; writes dq, dk, dv.
  return (2 * (q + k + v) + 2 * o) * element + row_statistics;
}

double cached_row_bytes(const CachedAttention& a) {
  const double element = bytes_per_element(a.cache);
  if (!a.latent) return product({a.kv_heads, a.d_qk + a.d_v}) * element;
  const double rotary = a.cache == NumberFormat::fp8_block ? 2 : element;
  return static_cast<double>(a.d_v) * element + static_cast<double>(a.d_qk - a.d_v) * rotary;
}

double bytes_of(const CachedAttention& a) {
  constexpr double kBf16 = 2;
  const double queries = product({a.batch, a.q_len});
  const double rows =
      (a.gathered ? queries : static_cast<double>(a.batch)) * static_cast<double>(a.kv_len);
  return rows * cached_row_bytes(a) + queries * product({a.heads, a.d_qk + a.d_v}) * kBf16;
}

double bytes_per_element(NumberFormat format) {
  switch (format) {
    case NumberFormat::fp32:
      return 4;
    case NumberFormat::bf16:
      return 2;
    case NumberFormat::fp8_tensor:
      return 1;
    case NumberFormat::fp8_block:
      return 1 + kScaleBytes / kBlock;
    case NumberFormat::e5m6:
      return 1.5 + kScaleBytes / kBlock;
  }
  return 0;
}

std::string_view name_of(NumberFormat format) {
  switch (format) {
    case NumberFormat::fp32:
      return "fp32";
    case NumberFormat::bf16:
      return "bf16";
    case NumberFormat::fp8_tensor:
      return "fp8_tensor";
    case NumberFormat::fp8_block:
      return "fp8_block";
    case NumberFormat::e5m6:
      return "e5m6";
  }
  return "?";
}

std::string_view name_of(Pass pass) {
  switch (pass) {
    case Pass::forward:
      return "forward";
    case Pass::backward_input:
      return "backward_input";
    case Pass::backward_weight:
      return "backward_weight";
  }
  return "?";
}

std::string_view name_of(StreamingKind kind) {
  switch (kind) {
    case StreamingKind::norm_forward:
      return "norm_forward";
    case StreamingKind::norm_backward:
      return "norm_backward";
    case StreamingKind::quantize:
      return "quantize";
    case StreamingKind::dequantize:
      return "dequantize";
    case StreamingKind::pack_e5m6:
      return "pack_e5m6";
    case StreamingKind::transpose:
      return "transpose";
    case StreamingKind::rope:
      return "rope";
    case StreamingKind::activation_forward:
      return "activation_forward";
    case StreamingKind::activation_backward:
      return "activation_backward";
    case StreamingKind::elementwise:
      return "elementwise";
    case StreamingKind::copy:
      return "copy";
    case StreamingKind::permute:
      return "permute";
    case StreamingKind::unpermute:
      return "unpermute";
    case StreamingKind::router:
      return "router";
    case StreamingKind::embedding_forward:
      return "embedding_forward";
    case StreamingKind::embedding_backward:
      return "embedding_backward";
    case StreamingKind::cross_entropy:
      return "cross_entropy";
    case StreamingKind::optimizer:
      return "optimizer";
    case StreamingKind::reduction:
      return "reduction";
  }
  return "?";
}

std::string_view name_of(CollectiveKind kind) {
  switch (kind) {
    case CollectiveKind::all_reduce:
      return "all_reduce";
    case CollectiveKind::all_gather:
      return "all_gather";
    case CollectiveKind::reduce_scatter:
      return "reduce_scatter";
    case CollectiveKind::all_to_all:
      return "all_to_all";
    case CollectiveKind::broadcast:
      return "broadcast";
  }
  return "?";
}

double flops_of(const Shape& shape) {
  if (const auto* g = std::get_if<Gemm>(&shape.work)) {
    return 2 * product({g->groups, g->m, g->n, g->k});
  }
  if (const auto* a = std::get_if<AttentionCore>(&shape.work)) {
    // Forward: S = Q K^T, O = P V. Backward: S again, dV, dP, dQ, dK.
    const std::int64_t depth = a->backward ? 3 * a->d_qk + 2 * a->d_v : a->d_qk + a->d_v;
    return 2 * attended_pairs(*a) * product({a->batch, a->heads, depth});
  }
  if (const auto* a = std::get_if<CachedAttention>(&shape.work)) {
    return 2 * product({a->batch, a->heads, a->q_len, a->kv_len, a->d_qk + a->d_v});
  }
  return 0;
}

double bytes_of(const Shape& shape) {
  struct Visitor {
    double operator()(const Mark&) const { return 0; }
    double operator()(const Gemm& g) const { return orrery::bytes_of(g); }
    double operator()(const AttentionCore& a) const { return orrery::bytes_of(a); }
    double operator()(const CachedAttention& a) const { return orrery::bytes_of(a); }
    double operator()(const Streaming& s) const {
      return static_cast<double>(s.bytes_read) + static_cast<double>(s.bytes_written);
    }
    double operator()(const ExpertExchange& e) const {
      return 2 * product({e.tokens, e.hidden}) * bytes_per_element(e.format);
    }
    double operator()(const Collective& c) const { return 2 * static_cast<double>(c.bytes); }
    double operator()(const Send& s) const { return static_cast<double>(s.bytes); }
    double operator()(const StorageWrite& w) const { return static_cast<double>(w.bytes); }
  };
  return std::visit(Visitor{}, shape.work);
}

std::string describe(const Shape& shape) {
  struct Visitor {
    std::string operator()(const Mark&) const { return "mark"; }
    std::string operator()(const Gemm& g) const {
      const std::string groups = g.groups > 1 ? fmt::format("{} x ", g.groups) : "";
      return fmt::format("GEMM {} {}{}x{}x{}{}", name_of(g.inputs), groups, g.m, g.n, g.k,
                         g.accumulate ? " accumulating" : "");
    }
    std::string operator()(const AttentionCore& a) const {
      return fmt::format("attention {}{} {} {}x{}/{} heads, {} by {} tokens, {}/{} wide",
                         a.causal ? "causal " : "", a.backward ? "backward" : "forward",
                         name_of(a.inputs), a.batch, a.heads, a.kv_heads, a.q_len, a.kv_len, a.d_qk,
                         a.d_v);
    }
    std::string operator()(const CachedAttention& a) const {
      return fmt::format(
          "attention over {} cache {}{}, {} sequences, {}/{} heads, {} by {} tokens, "
          "{}/{} wide",
          name_of(a.cache), a.latent ? "of latents" : "of keys and values",
          a.gathered ? ", gathered" : "", a.batch, a.heads, a.kv_heads, a.q_len, a.kv_len, a.d_qk,
          a.d_v);
    }
    std::string operator()(const Streaming& s) const {
      const std::string launches = s.launches > 1 ? fmt::format(", {} launches", s.launches) : "";
      return fmt::format("{} {} B in, {} B out{}", name_of(s.kind), s.bytes_read, s.bytes_written,
                         launches);
    }
    std::string operator()(const ExpertExchange& e) const {
      std::string text =
          fmt::format("{}{} {} {} tokens x {}, top {} of {}, {} GPUs",
                      e.low_latency ? "low-latency " : "", e.combine ? "combine" : "dispatch",
                      name_of(e.format), e.tokens, e.hidden, e.top_k, e.experts, e.ep);
      if (e.busiest_gpu_per_mille != 1000 || e.busiest_node_per_mille != 1000) {
        text += fmt::format(", busiest GPU {:.3f}, node {:.3f} of the mean",
                            static_cast<double>(e.busiest_gpu_per_mille) / 1000,
                            static_cast<double>(e.busiest_node_per_mille) / 1000);
      }
      return text;
    }
    std::string operator()(const Collective& c) const {
      return fmt::format("{} {} B, {} ranks ({} a node)", name_of(c.kind), c.bytes, c.ranks,
                         c.ranks_per_node);
    }
    std::string operator()(const Send& s) const {
      return fmt::format("send {} B{}", s.bytes, s.same_node ? " inside the node" : "");
    }
    std::string operator()(const StorageWrite& w) const {
      return fmt::format("write {} B to storage at {} B/s{}", w.bytes, w.bytes_per_s,
                         w.own_network ? " over its own network" : "");
    }
  };
  const std::string what = std::visit(Visitor{}, shape.work);
  return shape.sms > 0 ? fmt::format("{} on {} SMs", what, shape.sms) : what;
}

}  // namespace orrery
