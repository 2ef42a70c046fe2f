#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <map>
#include <optional>

#include "calibrate/derive_profiles.hpp"
#include "calibrate/table_file.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

constexpr const char* kSource =
    "deepseek-ai/profile-data train.json (training, one overlapped forward-backward pair of 4 MoE "
    "layers, "
    "H800, EP64, 4096 tokens)";
constexpr int kSms = 112;             // the other 20 run the exchange
constexpr std::int64_t kExperts = 4;  // on each GPU

bool ends_with(const std::string& s, std::string_view end) {
  return std::string_view(s).ends_with(end);
}

struct TraceGemm {
  std::string op;
  Gemm gemm;
  double seconds = 0;
};

/// The table gives the dimensions of the forward layer for every pass; here are those of the
/// kernel.
std::vector<TraceGemm> read_gemms(const std::string& folder) {
  const TableFile file(folder + "/deepseek/trace_train_gemm.csv");
  std::vector<TraceGemm> gemms;
  for (std::size_t i = 0; i < file.size(); ++i) {
    const auto whole = [&](const char* column) {
      return static_cast<std::int64_t>(file.number(i, file.column(column)));
    };
    const std::string op = file.text(i, file.column("op"));
    const std::int64_t groups = op.rfind("routed", 0) == 0 ? kExperts : 1;
    const std::int64_t rows = whole("M_tokens_or_rows") / groups;
    const std::int64_t out = whole("N");
    const std::int64_t in = whole("K");
    Gemm g{.inputs = NumberFormat::fp8_block, .groups = groups};
    if (ends_with(op, "wgrad")) {
      g.pass = Pass::backward_weight;
      g.accumulate = true;
      g.m = out, g.n = in, g.k = rows;
    } else if (ends_with(op, "dgrad")) {
      g.pass = Pass::backward_input;
      g.m = rows, g.n = in, g.k = out;
    } else {
      g.m = rows, g.n = out, g.k = in;
    }
    gemms.push_back({op, g, file.number(i, file.column("dur_us")) * 1e-6});
  }
  return gemms;
}

struct Event {
  double start_us, duration_us;
  int layer;
  std::string phase, kernel, op;
  std::int64_t grid_x, grid_y, grid_z;
};

std::vector<Event> read_events(const std::string& folder) {
  const TableFile file(folder + "/deepseek/trace_train_events.csv");
  std::vector<Event> events;
  for (std::size_t i = 0; i < file.size(); ++i) {
    const auto text = [&](const char* column) { return file.text(i, file.column(column)); };
    const auto grid = [&](const char* column) {
      return text(column).empty() ? 0
                                  : static_cast<std::int64_t>(file.number(i, file.column(column)));
    };
    if (text("layer_idx").empty()) continue;
    events.push_back(
        {file.number(i, file.column("start_us")), file.number(i, file.column("dur_us")),
         static_cast<int>(file.number(i, file.column("layer_idx"))), text("phase"),
         text("kernel_class"), text("gemm_op"), grid("grid_x"), grid("grid_y"), grid("grid_z")});
  }
  return events;
}

/// Expert rows on this GPU in the backward chunk of each layer.
std::map<int, std::int64_t> backward_rows(const std::string& folder) {
  const TableFile file(folder + "/deepseek/trace_train_gemm.csv");
  std::map<int, std::int64_t> rows;
  for (std::size_t i = 0; i < file.size(); ++i) {
    if (file.text(i, file.column("op")) != "routed_down dgrad") continue;
    rows[static_cast<int>(file.number(i, file.column("layer_idx")))] =
        static_cast<std::int64_t>(file.number(i, file.column("M_tokens_or_rows")));
  }
  return rows;
}

/// The experts' weight gradients run on two streams at once, one kernel per expert: what counts is
/// the time in which any of them runs.
std::vector<TraceGemm> routed_weight_gradients(const std::vector<Event>& events,
                                               const std::map<int, std::int64_t>& rows) {
  std::vector<TraceGemm> gemms;
  for (const auto& [layer, layer_rows] : rows) {
    for (const bool down : {true, false}) {
      std::vector<std::pair<double, double>> spans;
      for (const Event& e : events) {
        if (e.layer == layer && e.op == (down ? "routed wgrad (down)" : "routed wgrad (gateup)")) {
          spans.emplace_back(e.start_us, e.start_us + e.duration_us);
        }
      }
      std::sort(spans.begin(), spans.end());
      double busy_us = 0;
      double until = 0;
      for (const auto& [begin, end] : spans) {
        busy_us += std::max(0.0, end - std::max(begin, until));
        until = std::max(until, end);
      }
      const Gemm g{.inputs = NumberFormat::fp8_block,
                   .pass = Pass::backward_weight,
                   .accumulate = true,
                   .groups = kExperts,
                   .m = down ? 7168 : 4096,
                   .n = down ? 2048 : 7168,
                   .k = layer_rows / kExperts};
      gemms.push_back({down ? "routed_down wgrad" : "routed_gateup wgrad", g, busy_us * 1e-6});
    }
  }
  return gemms;
}

AttentionCore v3_attention(bool backward) {
  return {.inputs = NumberFormat::bf16,
          .backward = backward,
          .causal = true,
          .batch = 1,
          .heads = 128,
          .kv_heads = 128,
          .q_len = 4096,
          .kv_len = 4096,
          .d_qk = 192,
          .d_v = 128};
}

/// Mean over layers of the time of the attention core (backward with what it runs before and
/// after).
double attention_seconds(const std::vector<Event>& events, bool backward) {
  double us = 0;
  for (const Event& e : events) {
    const bool bwd = e.kernel.rfind("attn bwd", 0) == 0;
    const bool fwd = e.kernel.rfind("attn fwd", 0) == 0;
    if (backward ? bwd : fwd) us += e.duration_us;
  }
  return us * 1e-6 / 4;
}

/// Bytes over the time of chosen kernels whose tensors are known: an event is one when `bytes` says
/// so.
template <class Bytes>
std::optional<double> rate(const std::vector<Event>& events, const Bytes& bytes) {
  double total_bytes = 0;
  double us = 0;
  for (const Event& e : events) {
    const double b = bytes(e);
    if (b <= 0) continue;
    total_bytes += b;
    us += e.duration_us;
  }
  if (us <= 0) return std::nullopt;
  return total_bytes / (us * 1e-6);
}

void add_streaming(const std::vector<Event>& events, const std::map<int, std::int64_t>& rows,
                   Profile& profile) {
  constexpr double kTokens = 4096;
  constexpr double kHidden = 7168;
  constexpr double kFp8 = 1 + 4.0 / 128;
  constexpr double kHeads = 128;
  const double full = bandwidth_share(profile, kSms);  // rates are stored for the whole device
  const auto set = [&](StreamingKind kind, std::optional<double> bytes_per_s,
                       const std::string& what) {
    if (!bytes_per_s) return;
    StreamingRate& r = profile.streaming[kind];
    r.bytes_per_s = *bytes_per_s / full;
    r.derived = true;
    r.spread = 0.15;
    r.id = "v3-trace";
    r.source = fmt::format("{}: {}", kSource, what);
  };
  const auto is = [](const Event& e, const char* phase, const char* kernel) {
    return e.phase == phase && e.kernel == kernel;
  };
  const double output = kTokens * kHeads * 128;  // elements of the attention output
  const double query = kTokens * kHeads * 192;
  set(StreamingKind::quantize,
      rate(events,
           [&](const Event& e) {
             return is(e, "attn(F)", "cast bf16->fp8 1x128") && e.duration_us > 80
                        ? output * (2 + kFp8)
                        : 0;
           }),
      "cast of the 4096 x 16384 attention output");
  set(StreamingKind::pack_e5m6,
      rate(events,
           [&](const Event& e) {
             return is(e, "attn(F)", "cast bf16->special fmt (E5M6 class)")
                        ? output * (3.5 + 4.0 / 128)
                        : 0;
           }),
      "pack of the 4096 x 16384 attention output");
  set(StreamingKind::dequantize,
      rate(events,
           [&](const Event& e) {
             const double r = static_cast<double>(rows.at(e.layer));
             return is(e, "mlp(B)", "cast fp8->bf16") && e.duration_us > 100 ? r * 4096 * (kFp8 + 2)
                                                                             : 0;
           }),
      "cast of the experts' cached activation inputs (rows x 4096)");
  set(StreamingKind::transpose,
      rate(events,
           [&](const Event& e) {
             const double elements =
                 static_cast<double>(e.grid_x * 128) * static_cast<double>(e.grid_y * 128);
             return is(e, "mlp(W)", "recast+transpose fp8 128x1") ? 2 * kFp8 * elements : 0;
           }),
      "recast and transpose of the experts' rows x 7168");
  set(StreamingKind::norm_forward,
      rate(events,
           [&](const Event& e) {
             return is(e, "attn(F)", "rmsnorm fwd") && e.duration_us > 80 ? kTokens * kHidden * 4
                                                                          : 0;
           }),
      "RMSNorm of 4096 x 7168");
  set(StreamingKind::norm_backward,
      rate(events,
           [&](const Event& e) {
             return is(e, "attn(B)", "rmsnorm bwd") && e.duration_us > 80 ? kTokens * kHidden * 6
                                                                          : 0;
           }),
      "RMSNorm backward of 4096 x 7168");
  set(StreamingKind::rope,
      rate(events,
           [&](const Event& e) {
             return is(e, "attn(F)", "rope") && e.grid_z == 128 ? query * 4 : 0;
           }),
      "rotary embedding of the queries, 4096 x 128 x 192 read and written");
  set(StreamingKind::copy,
      rate(events,
           [&](const Event& e) {
             return is(e, "attn(F)", "copy/concat") ? query * 2 + output * 2 : 0;
           }),
      "concatenation of the keys, 4096 x 128 x (128 + 64)");
  set(StreamingKind::activation_forward,
      rate(events,
           [&](const Event& e) {
             // The cast after the experts' first GEMM contains SwiGLU: reads rows x 4096, writes
             // rows x 2048.
             const bool first =
                 is(e, "mlp(F)", "cast bf16->fp8 1x128") && e.grid_x > 8192 && e.duration_us < 150;
             return first ? static_cast<double>(e.grid_x) * (4096 * 2 + 2048 * kFp8) : 0;
           }),
      "SwiGLU and quantise of the experts' rows");
  set(StreamingKind::activation_backward,
      rate(events,
           [&](const Event& e) {
             // Reads the rows x 4096 inputs and the rows x 2048 gradient, writes the rows x 4096
             // gradient and the recomputed rows x 2048 output.
             return is(e, "mlp(B)", "swiglu bwd (recompute fwd)")
                        ? static_cast<double>(rows.at(e.layer)) * 2 * (4096 + 2048 + 4096 + 2048)
                        : 0;
           }),
      "SwiGLU backward of the experts' rows, all tensors BF16");
  set(StreamingKind::permute,
      rate(events,
           [&](const Event& e) {
             // 4096 x 7.50 tokens arrive (mean number of GPUs that hold one of a token's experts).
             const double out = static_cast<double>(e.grid_x) * 16;
             return is(e, "mlp(B)", "token expand/permute") ? (4096 * 7.5 + out) * kHidden * kFp8
                                                            : 0;
           }),
      "expansion of the received FP8 tokens to expert rows");
  set(StreamingKind::unpermute,
      rate(events,
           [&](const Event& e) {
             return is(e, "mlp(B)", "expert-output local reduce")
                        ? (static_cast<double>(rows.at(e.layer)) + static_cast<double>(e.grid_x)) *
                              kHidden * 2
                        : 0;
           }),
      "reduction of BF16 expert rows to received tokens");

  // The router is dozens of small kernels between the gate's GEMM and the dispatch.
  double us = 0;
  double kernels = 0;
  for (const Event& e : events) {
    if (e.phase != "attn(F)") continue;
    if (e.kernel == "topk" || e.kernel == "group topk" ||
        (e.kernel == "elementwise/reduce/other" && e.grid_x <= 4096 && e.duration_us < 12)) {
      us += e.duration_us;
      kernels += 1;
    }
  }
  StreamingRate& router = profile.streaming[StreamingKind::router];
  router.launch_s = us / kernels * 1e-6;
  router.derived = true;
  router.spread = 0.3;
  router.id = "v3-trace";
  router.source = fmt::format("{}: mean of the small kernels of the router", kSource);
}

}  // namespace

DerivedProfile derive_trace_profile(const std::string& folder, const Profile& base) {
  DerivedProfile d;
  d.profile = base;
  d.profile.name = "h800_trace";
  d.profile.beside_communication = true;
  d.expert_exchange = "expert_exchange_h800_2025_02.yaml";
  d.comment =
      "H800 with the kernel times of DeepSeek's published training trace: for telling the error of "
      "composing\n"
      "a step from the error of its kernels. It must never be used to judge the h800 profile's "
      "honesty:\n"
      "compare its steps with published steps, not with the trace.";
  const std::vector<Event> events = read_events(folder);
  std::vector<TraceGemm> gemms = read_gemms(folder);
  for (TraceGemm& g : routed_weight_gradients(events, backward_rows(folder)))
    gemms.push_back(std::move(g));

  // Mean over the layers of each distinct shape.
  std::map<Gemm, std::pair<double, int>> mean;
  for (const TraceGemm& g : gemms) {
    mean[g.gemm].first += g.seconds;
    mean[g.gemm].second += 1;
  }
  std::vector<GemmTable> tables;
  for (const Pass pass : {Pass::forward, Pass::backward_input, Pass::backward_weight}) {
    for (const bool grouped : {false, true}) {
      const bool weight = pass == Pass::backward_weight;
      const auto like = std::find_if(base.gemms.begin(), base.gemms.end(), [&](const GemmTable& t) {
        return t.inputs == NumberFormat::fp8_block && t.grouped == grouped &&
               (t.pass == Pass::backward_weight) == weight;
      });
      GemmTable t{.id = fmt::format("v3-trace-{}{}", name_of(pass), grouped ? "-grouped" : ""),
                  .source = kSource,
                  .inputs = NumberFormat::fp8_block,
                  .pass = pass,
                  .grouped = grouped,
                  .accumulate = weight,
                  .spread = 0.05,
                  .model = like->model};
      for (const auto& [g, sum] : mean) {
        if (g.pass != pass || (g.groups > 1) != grouped) continue;
        t.points.push_back({.groups = g.groups,
                            .m = g.m,
                            .n = g.n,
                            .k = g.k,
                            .sms = kSms,
                            .seconds = sum.first / sum.second,
                            .at = {}});
      }
      tables.push_back(std::move(t));
    }
  }
  std::erase_if(d.profile.gemms,
                [](const GemmTable& t) { return t.inputs == NumberFormat::fp8_block; });
  d.profile.gemms.insert(d.profile.gemms.begin(), tables.begin(), tables.end());

  for (AttentionTable& t : d.profile.attention) {
    if (t.inputs != NumberFormat::bf16) continue;
    t.id = t.backward ? "v3-trace-attention-bwd" : "v3-trace-attention-fwd";
    t.source = kSource;
    t.derived = false;
    t.spread = 0.05;
    t.points = {{.shape = v3_attention(t.backward),
                 .sms = kSms,
                 .seconds = attention_seconds(events, t.backward),
                 .at = {}}};
  }
  add_streaming(events, backward_rows(folder), d.profile);
  prepare(d.profile);
  return d;
}

std::string compare_with_trace(const std::string& folder, const Profile& profile) {
  std::vector<TraceGemm> gemms = read_gemms(folder);
  const std::vector<Event> events = read_events(folder);
  for (TraceGemm& g : routed_weight_gradients(events, backward_rows(folder)))
    gemms.push_back(std::move(g));
  struct Row {
    double measured = 0, predicted = 0;
    int count = 0;
  };
  std::map<std::string, Row> rows;
  std::vector<std::string> order;
  for (const TraceGemm& g : gemms) {
    if (!rows.contains(g.op)) order.push_back(g.op);
    Row& r = rows[g.op];
    r.measured += g.seconds;
    // Without the gap between kernels, which a trace's durations do not contain.
    r.predicted += seconds(price_gemm(g.gemm, kSms, profile).time_ps) - profile.launch_gap_s;
    r.count += 1;
  }
  std::string out =
      fmt::format("{} on {} SMs beside DeepSeek's training trace, mean us\n", profile.name, kSms);
  double measured = 0;
  double predicted = 0;
  for (const std::string& op : order) {
    const Row& r = rows[op];
    out += fmt::format("  {:<22} {:8.1f} {:8.1f}  {:+6.1f} %\n", op, r.measured / r.count * 1e6,
                       r.predicted / r.count * 1e6, 100 * (r.predicted / r.measured - 1));
    measured += r.measured;
    predicted += r.predicted;
  }
  out += fmt::format("  {:<22} {:8.1f} {:8.1f}  {:+6.1f} %\n", "all GEMMs of a layer",
                     measured / 4 * 1e6, predicted / 4 * 1e6, 100 * (predicted / measured - 1));
  for (const bool backward : {false, true}) {
    const double seen = attention_seconds(events, backward);
    const double said = seconds(price_attention(v3_attention(backward), kSms, profile).time_ps) -
                        profile.launch_gap_s;
    out += fmt::format("  {:<22} {:8.1f} {:8.1f}  {:+6.1f} %\n",
                       backward ? "attention backward" : "attention forward", seen * 1e6,
                       said * 1e6, 100 * (said / seen - 1));
  }
  return out;
}

}  // namespace orrery
