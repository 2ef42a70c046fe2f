#include "calibrate/derive_profiles.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "calibrate/fit_attention.hpp"
#include "calibrate/fit_cached.hpp"
#include "calibrate/minimise.hpp"
#include "calibrate/table_file.hpp"
#include "sim/kernel_prices.hpp"

namespace orrery {
namespace {

constexpr double kHopperSms = 132;
constexpr const char* kHopperExchange = "expert_exchange_hopper.yaml";
constexpr const char* kFirstExchange =
    "expert_exchange_h800_2025_02.yaml";  // nearest to V3's training
const std::vector<GemmTile> kAnyTile{{128, 256}, {256, 128}, {128, 128}, {128, 112},
                                     {128, 96},  {128, 64},  {64, 128},  {64, 64}};
// DeepGEMM of February 2025 has blocks of at most 128 x 128 and picks their width, 112 among others
// (its README, "unaligned block sizes").
const std::vector<GemmTile> kDeepGemmTile{{128, 128}, {128, 112}, {128, 96},
                                          {128, 64},  {64, 128},  {64, 64}};

Limits limits_of(const Device& d, NumberFormat format) {
  const double peak = format == NumberFormat::bf16 ? d.bf16_flops_per_s : d.fp8_flops_per_s;
  return {peak / d.sms, d.memory_bytes_per_s};
}

GemmModel first_guess(const Device& d, NumberFormat format) {
  const Limits limits = limits_of(d, format);
  return {.tiles = kAnyTile,
          .flops_per_s_per_sm = 0.8 * limits.flops_per_s_per_sm,
          .operand_bytes_per_s_per_sm = 2e11,
          .tile_s = 1e-6,
          .launch_s = 2e-6,
          .bytes_per_s = 0.9 * limits.bytes_per_s};
}

// ---- GEMM tables of 100,000 rows
// ----------------------------------------------------------------------

/// Rows with at least 128 in every dimension: training has no smaller GEMM worth a price. With `few`
/// instead those of fewer rows m, which decoding has.
std::vector<GemmPoint> read_gemms(const TableFile& table, std::string_view type, int sms,
                                  bool few = false) {
  const std::size_t dtype = table.column("gemm_dtype");
  const std::array<std::size_t, 3> dims{table.column("m"), table.column("n"), table.column("k")};
  const std::size_t latency = table.column("latency");
  std::vector<GemmPoint> points;
  for (std::size_t i = 0; i < table.size(); ++i) {
    if (table.text(i, dtype) != type) continue;
    const auto dim = [&](std::size_t d) {
      return static_cast<std::int64_t>(table.number(i, dims[d]));
    };
    const GemmPoint p{.groups = 1,
                      .m = dim(0),
                      .n = dim(1),
                      .k = dim(2),
                      .sms = sms,
                      .seconds = table.number(i, latency) * 1e-3,
                      .at = {}};
    if (std::min(p.n, p.k) >= 128 && (p.m < 128) == few) points.push_back(p);
  }
  return points;
}

GemmTable from_rows(const TableFile& file, std::string_view type, NumberFormat format,
                    const std::string& id, const std::string& source, DerivedProfile& out) {
  const Profile& profile = out.profile;
  std::vector<GemmPoint> seen;
  std::vector<GemmPoint> unseen;
  for (const GemmPoint& p : read_gemms(file, type, profile.device.sms)) {
    (held_out(p.n, p.k) ? unseen : seen).push_back(p);
  }
  GemmTable table{
      .id = id, .source = source, .inputs = format, .model = first_guess(profile.device, format)};
  std::vector<GemmPoint> sample;
  for (std::size_t i = 0; i < seen.size(); i += 5) sample.push_back(seen[i]);
  fit_model(table, sample, limits_of(profile.device, format));
  table.points = thin(table, seen);
  prepare(table, profile);
  const HeldOutError error = error_on(table, unseen, id);
  out.errors.push_back(error);
  std::erase_if(unseen, [](const GemmPoint& p) { return p.m < 2048; });
  out.errors.push_back(error_on(table, unseen, id + ", m >= 2048"));
  // None of these is in the table: how far the skeleton carries to the few rows of a decode step.
  out.errors.push_back(
      error_on(table, read_gemms(file, type, profile.device.sms, true), id + ", m < 128"));
  table.spread = error.percentile_68;
  return table;
}

// ---- DeepGEMM's published tables
// ----------------------------------------------------------------------

struct DeepGemmTables {
  GemmTable dense;
  GemmTable grouped;
};

double seconds_of(double groups, double m, double n, double k, double teraflops_per_s) {
  return 2 * groups * m * n * k / (teraflops_per_s * 1e12);
}

/// `first`: the values of the first publication; else the last published ones.
DeepGemmTables deepgemm_tables(const std::string& folder, bool first, DerivedProfile& out) {
  const TableFile file(folder + "/deepseek/deepgemm_perf.csv");
  const std::size_t date = file.column("first_seen");
  const std::size_t final = file.column("is_final_published_value");
  const std::string suffix = first ? "2025-02" : "2025-04";
  const std::string source = fmt::format(
      "deepseek-ai/DeepGEMM README, H800 SXM, FP8 E4M3 1x128 by 128x128, {}; kernels alone on 132 "
      "SMs",
      first ? "first published values, 2025-02-25, commit a6d97a1c"
            : "last published values, 2025-02-25 to 2025-04-09, commits a6d97a1c to a9967bc2");
  DeepGemmTables t;
  t.dense = {.id = "deepgemm-" + suffix,
             .source = source,
             .inputs = NumberFormat::fp8_block,
             .model = first_guess(out.profile.device, NumberFormat::fp8_block)};
  t.dense.model.tiles = kDeepGemmTile;
  t.grouped = t.dense;
  t.grouped.id += "-grouped";
  t.grouped.grouped = true;
  for (std::size_t i = 0; i < file.size(); ++i) {
    if (first ? file.text(i, date) != "2025-02-25" : file.text(i, final) != "1") continue;
    const bool dense = file.text(i, file.column("layout")) == "dense";
    const double groups = dense ? 1 : file.number(i, file.column("groups"));
    const double m = file.number(i, file.column("M_or_M_per_group"));
    const double n = file.number(i, file.column("N"));
    const double k = file.number(i, file.column("K"));
    const double tflops = file.number(i, file.column("TFLOPS"));
    (dense ? t.dense : t.grouped)
        .points.push_back({.groups = static_cast<std::int64_t>(groups),
                           .m = static_cast<std::int64_t>(m),
                           .n = static_cast<std::int64_t>(n),
                           .k = static_cast<std::int64_t>(k),
                           .sms = out.profile.device.sms,
                           .seconds = seconds_of(groups, m, n, k, tflops),
                           .at = {}});
  }
  // One kernel with a scheduler for each layout: one skeleton.
  std::vector<GemmPoint> all = t.dense.points;
  all.insert(all.end(), t.grouped.points.begin(), t.grouped.points.end());
  fit_model(t.dense, all, limits_of(out.profile.device, NumberFormat::fp8_block));
  t.grouped.model = t.dense.model;
  for (GemmTable* table : {&t.dense, &t.grouped}) {
    prepare(*table, out.profile);
    out.errors.push_back(leave_one_out(*table, table->id + " (leave one out)"));
    table->spread = out.errors.back().percentile_68;
  }
  return t;
}

struct WeightGradient {
  double groups, m, n, k, tflops;
};

/// DeepGEMM's weight-gradient kernel as published with it. Rows: gradient of y[t, m] = x[t, n] w.
/// `slowdown` 1.2 gives the kernel it replaced.
DeepGemmTables weight_gradient_tables(double slowdown, const GemmModel& forward,
                                      DerivedProfile& out) {
  constexpr std::array<WeightGradient, 9> kDense{{{1, 2112, 7168, 4096, 920},
                                                  {1, 24576, 1536, 4096, 986},
                                                  {1, 32768, 512, 4096, 878},
                                                  {1, 7168, 16384, 4096, 994},
                                                  {1, 4096, 7168, 4096, 942},
                                                  {1, 7168, 2048, 4096, 920},
                                                  {1, 2112, 7168, 8192, 1052},
                                                  {1, 24576, 1536, 8192, 1092},
                                                  {1, 32768, 512, 8192, 1014}}};
  constexpr std::array<WeightGradient, 5> kGrouped{{{4, 4096, 7168, 4096, 939},
                                                    {4, 7168, 2048, 4096, 900},
                                                    {4, 4096, 7168, 8192, 1044},
                                                    {4, 7168, 2048, 8192, 1033},
                                                    {8, 4096, 7168, 4096, 942}}};
  const bool predecessor = slowdown != 1;
  std::string source =
      "deepseek-ai/DeepGEMM pull request 95 (wgrad_gemm_fp8_fp8_fp32_nt, merged 2025-05-14, commit "
      "04278f6): 1x128 scales on both operands, FP32 accumulation into D, kernels alone on 132 SMs "
      "of an "
      "H800";
  if (predecessor) {
    source +=
        "; times x 1.2, the pull request's speedup over DeepSeek's internal CUTLASS kernel, which "
        "is the "
        "one that existed when DeepSeek-V3 was trained";
  }
  DeepGemmTables t;
  t.dense = {.id = predecessor ? "deepgemm-pr95-x1.2" : "deepgemm-pr95",
             .source = source,
             .inputs = NumberFormat::fp8_block,
             .pass = Pass::backward_weight,
             .accumulate = true,
             .derived = predecessor,
             .model = forward};
  t.grouped = t.dense;
  t.grouped.id += "-grouped";
  t.grouped.grouped = true;
  t.grouped.source +=
      "; k is the mean number of rows per group; issue 107 (H200) measured 10-18 % more time";
  const auto add = [&](GemmTable& table, const WeightGradient& w) {
    table.points.push_back({.groups = static_cast<std::int64_t>(w.groups),
                            .m = static_cast<std::int64_t>(w.m),
                            .n = static_cast<std::int64_t>(w.n),
                            .k = static_cast<std::int64_t>(w.k),
                            .sms = out.profile.device.sms,
                            .seconds = slowdown * seconds_of(w.groups, w.m, w.n, w.k, w.tflops),
                            .at = {}});
  };
  for (const WeightGradient& w : kDense) add(t.dense, w);
  for (const WeightGradient& w : kGrouped) add(t.grouped, w);
  std::vector<GemmPoint> all = t.dense.points;
  all.insert(all.end(), t.grouped.points.begin(), t.grouped.points.end());
  // Loads, launch and memory are those of the forward kernel; the promotion inside the loop is
  // dearer (two scales per element) and so is the end of a tile.
  fit_model(t.dense, all, limits_of(out.profile.device, NumberFormat::fp8_block), {1, 3, 4});
  t.grouped.model = t.dense.model;
  for (GemmTable* table : {&t.dense, &t.grouped}) {
    prepare(*table, out.profile);
    out.errors.push_back(leave_one_out(*table, table->id + " (leave one out)"));
    // Board to board the same kernel differs by 10-18 % (issue 107).
    table->spread = std::hypot(out.errors.back().percentile_68, predecessor ? 0.12 : 0.10);
  }
  return t;
}

// ---- Attention
// ----------------------------------------------------------------------------------------

/// cuDNN's own training benchmark. Where a shape has both, the backward that need not be
/// deterministic.
void add_cudnn(const std::string& folder, const std::string& gpu, const std::string& type, int sms,
               AttentionTable& table) {
  const TableFile file(folder + "/kernels/attention-forward-backward-cudnn.csv");
  const auto text = [&](std::size_t row, const char* column) -> const std::string& {
    return file.text(row, file.column(column));
  };
  const auto whole = [&](std::size_t row, const char* column) {
    return static_cast<std::int64_t>(file.number(row, file.column(column)));
  };
  std::map<AttentionCore, std::pair<bool, double>> best;  // deterministic?, seconds
  for (std::size_t i = 0; i < file.size(); ++i) {
    if (text(i, "gpu") != gpu || text(i, "dtype") != type || !text(i, "window").empty()) continue;
    const std::string& ms = text(i, table.backward ? "bwd_ms" : "fwd_ms");
    const std::string& mask = text(i, "mask");
    if (ms.empty() || (mask != "top_left" && mask != "no_mask")) continue;
    const AttentionCore shape{.inputs = table.inputs,
                              .backward = table.backward,
                              .causal = mask == "top_left",
                              .batch = whole(i, "batch"),
                              .heads = whole(i, "q_heads"),
                              .kv_heads = whole(i, "kv_heads"),
                              .q_len = whole(i, "q_seq"),
                              .kv_len = whole(i, "kv_seq"),
                              .d_qk = whole(i, "d_qk"),
                              .d_v = whole(i, "d_v")};
    const bool deterministic = text(i, "deterministic_bwd") == "True";
    const double s = std::stod(ms) * 1e-3;
    const auto found = best.find(shape);
    if (found == best.end() || (found->second.first && !deterministic))
      best[shape] = {deterministic, s};
  }
  for (const auto& [shape, time] : best) {
    table.points.push_back({.shape = shape, .sms = sms, .seconds = time.second, .at = {}});
  }
}

/// A curve over sequence lengths 512 ... 16384 with 16384 tokens and heads x d = 2048, in TFLOP/s.
void add_curve(AttentionTable& table, int sms, bool causal, std::int64_t d,
               const std::array<double, 6>& tflops) {
  for (std::size_t i = 0; i < tflops.size(); ++i) {
    const std::int64_t length = std::int64_t{512} << i;
    const AttentionCore shape{.inputs = NumberFormat::bf16,
                              .backward = table.backward,
                              .causal = causal,
                              .batch = 16384 / length,
                              .heads = 2048 / d,
                              .kv_heads = 2048 / d,
                              .q_len = length,
                              .kv_len = length,
                              .d_qk = d,
                              .d_v = d};
    // The authors count half of the square when causal, and 2.5 times the forward for the backward.
    const double flops = 4.0 * 16384 * static_cast<double>(length) * 2048 * (causal ? 0.5 : 1) *
                         (table.backward ? 2.5 : 1);
    table.points.push_back(
        {.shape = shape, .sms = sms, .seconds = flops / (tflops[i] * 1e12), .at = {}});
  }
}

void add_tritonbench(AttentionTable& table, const std::array<double, 4>& microseconds) {
  for (std::size_t i = 0; i < microseconds.size(); ++i) {
    const std::int64_t length = std::int64_t{1024} << i;
    const AttentionCore shape{.inputs = NumberFormat::bf16,
                              .backward = table.backward,
                              .causal = true,
                              .batch = 4,
                              .heads = 48,
                              .kv_heads = 48,
                              .q_len = length,
                              .kv_len = length,
                              .d_qk = 128,
                              .d_v = 128};
    table.points.push_back(
        {.shape = shape, .sms = 132, .seconds = microseconds[i] * 1e-6, .at = {}});
  }
}

constexpr const char* kCudnn = "NVIDIA/cudnn-frontend benchmark/sdpa_benchmark_training";

void add_hopper_attention(const std::string& folder, bool this_device, DerivedProfile& out) {
  const double peak = out.profile.device.bf16_flops_per_s / kHopperSms;
  AttentionTable forward{.id = "hopper-cudnn-fa3-fwd", .inputs = NumberFormat::bf16};
  forward.source = fmt::format(
      "{}, H200, 2026-02-27; FlashAttention-3 figures of Dao-AILab/flash-attention, H100 SXM5 "
      "(read off "
      "the plots, +-2 %); meta-pytorch/tritonbench pull request 1267, H100, 2026-09-15. Compute "
      "bound and "
      "the same compute die in H100, H200 and H800",
      kCudnn);
  forward.derived = !this_device;
  add_cudnn(folder, "NVIDIA H200", "bfloat16", 132, forward);
  add_curve(forward, 132, false, 64, {333, 392, 460, 476, 496, 497});
  add_curve(forward, 132, true, 64, {197, 265, 371, 420, 460, 473});
  add_curve(forward, 132, false, 128, {467, 565, 625, 638, 646, 648});
  add_curve(forward, 132, true, 128, {292, 423, 521, 579, 602, 616});
  add_curve(forward, 132, false, 256, {482, 630, 707, 736, 746, 756});
  add_curve(forward, 132, true, 256, {286, 427, 537, 612, 628, 642});
  add_tritonbench(forward, {141.6, 368.4, 1236.9, 4817});

  AttentionTable backward{
      .id = "hopper-cudnn-fa3-bwd", .inputs = NumberFormat::bf16, .backward = true};
  backward.source = fmt::format(
      "{}, H200, 2026-02-27 (192/128 heads only with a deterministic backward, 128 only without); "
      "FlashAttention-3, arXiv 2407.08608, backward figure, and flash-attention pull request 2207 "
      "(64, "
      "deterministic), H100; meta-pytorch/tritonbench pull request 1267, H100",
      kCudnn);
  backward.derived = !this_device;
  add_cudnn(folder, "NVIDIA H200", "bfloat16", 132, backward);
  add_curve(backward, 132, false, 128, {316, 424, 501, 542, 559, 561});
  add_curve(backward, 132, false, 64, {240, 298, 355, 394, 450, 507});
  add_tritonbench(backward, {709.7, 1631, 4643, 15308});

  for (AttentionTable* table : {&forward, &backward}) {
    fit_attention(*table, peak);
    out.errors.push_back(leave_one_out(*table, table->id + " (leave one out)"));
    table->spread = out.errors.back().percentile_68;
    out.profile.attention.push_back(*table);
  }
  // Another number format and another machine: the deterministic 192/128 rows may be slow by the
  // 9-16 % that determinism costs llama3.1 in the paired Blackwell rows of the same benchmark.
  out.profile.attention.back().spread = std::max(out.profile.attention.back().spread, 0.12);
  for (const bool direction : {false, true}) {
    AttentionTable fp8{.id = direction ? "hopper-cudnn-fp8-bwd" : "hopper-cudnn-fp8-fwd",
                       .source = fmt::format("{}, H200, 2026-02-27", kCudnn),
                       .inputs = NumberFormat::fp8_tensor,
                       .backward = direction,
                       .derived = !this_device};
    add_cudnn(folder, "NVIDIA H200", "fp8", 132, fp8);
    fit_attention(fp8, out.profile.device.fp8_flops_per_s / kHopperSms);
    out.errors.push_back(leave_one_out(fp8, fp8.id + " (leave one out)"));
    fp8.spread = std::max(out.errors.back().percentile_68, 0.1);
    out.profile.attention.push_back(fp8);
  }
}

void add_blackwell_attention(const std::string& folder, DerivedProfile& out) {
  for (const bool backward : {false, true}) {
    AttentionTable table{.id = backward ? "gb200-cudnn-bwd" : "gb200-cudnn-fwd",
                         .source = fmt::format("{}, GB200 (1200 W; a B200 has 1000 W), 2026-04-24; "
                                               "backward not deterministic",
                                               kCudnn),
                         .inputs = NumberFormat::bf16,
                         .backward = backward,
                         .derived = true};
    add_cudnn(folder, "NVIDIA GB200", "bfloat16", out.profile.device.sms, table);
    fit_attention(table, out.profile.device.bf16_flops_per_s / out.profile.device.sms);
    out.errors.push_back(leave_one_out(table, table.id + " (leave one out)"));
    table.spread = std::hypot(out.errors.back().percentile_68, 0.1);
    out.profile.attention.push_back(table);
  }
}

/// FlashAttention-2 publishes forward and backward together for A100; for H100 it publishes the
/// forward alone too. There the backward reaches a median 0.85 of the forward's rate (12 points,
/// heads of 128), which splits the A100's figures.
void add_ampere_attention(DerivedProfile& out) {
  constexpr double kRatio = 0.85;
  constexpr double kForward = (1 + 2.5 / kRatio) / 3.5;  // forward rate over that of both together
  struct Curve {
    bool causal;
    std::int64_t d;
    std::array<double, 6> both;
  };
  constexpr std::array<Curve, 4> kCurves{{{true, 128, {99, 133, 155, 173, 182, 189}},
                                          {false, 128, {150, 172, 187, 196, 201, 203}},
                                          {true, 64, {88, 119, 140, 156, 165, 171}},
                                          {false, 64, {132, 153, 162, 171, 175, 176}}}};
  for (const bool backward : {false, true}) {
    AttentionTable table{
        .id = backward ? "a100-fa2-bwd" : "a100-fa2-fwd",
        .source =
            "Dao-AILab/flash-attention, FlashAttention-2 figure for A100 80GB SXM4, forward and "
            "backward together (read off the plot, +-2 %), split by the ratio 0.85 of backward to "
            "forward rate in its H100 figures",
        .inputs = NumberFormat::bf16,
        .backward = backward,
        .derived = true};
    for (const Curve& curve : kCurves) {
      std::array<double, 6> rate = curve.both;
      for (double& r : rate) r *= backward ? kForward * kRatio : kForward;
      add_curve(table, out.profile.device.sms, curve.causal, curve.d, rate);
    }
    fit_attention(table, out.profile.device.bf16_flops_per_s / out.profile.device.sms);
    out.errors.push_back(leave_one_out(table, table.id + " (leave one out)"));
    table.spread = std::max(out.errors.back().percentile_68, 0.08);
    out.profile.attention.push_back(table);
  }
}

// ---- Attention over a cache
// ---------------------------------------------------------------------------------

/// Absorbed MLA in decode, BF16 and FP8. `carried`: measured on another device with the same die
/// and memory bandwidth.
void add_latent_decode(const std::string& folder, const std::string& file, const std::string& gpu,
                       const std::string& prefix, bool carried, DerivedProfile& out) {
  for (const bool fp8 : {false, true}) {
    CachedTable table{.id = prefix + (fp8 ? "-mla-decode-fp8" : "-mla-decode-bf16"),
                      .source = fmt::format(
                          "ai-dynamo/aiconfigurator systems/data, TensorRT-LLM 1.3.0rc20, commit "
                          "095f58a5, {}, MLA decode (absorbed, one query token), {} cache; times "
                          "of the framework's op, launches included",
                          gpu, fp8 ? "FP8" : "BF16"),
                      .inputs = fp8 ? NumberFormat::fp8_tensor : NumberFormat::bf16,
                      .cache = fp8 ? NumberFormat::fp8_tensor : NumberFormat::bf16,
                      .latent = true,
                      .derived = carried};
    auto [made, error] = read_latent_decode(folder + "/kernels/" + file, out.profile, table);
    out.profile.cached_attention.push_back(std::move(made));
    out.errors.push_back(std::move(error));
  }
}

/// FlashMLA's sparse kernels, of which only the rate is published. The point stands for a call that
/// fills the device: 128 heads, 2048 rows each of so many queries.
void add_sparse(bool h800, DerivedProfile& out) {
  struct Published {
    const char* id;
    NumberFormat cache;
    std::int64_t queries;
    double flops_per_s;
    const char* what;
  };
  const CachedModel& dense = out.profile.cached_attention.front().model;
  for (const Published& p :
       {Published{"flashmla-sparse-prefill", NumberFormat::bf16, 4096, 640e12,
                  "640 TFLOP/s, prefill"},
        Published{"flashmla-sparse-decode", NumberFormat::fp8_block, 256, 410e12,
                  "410 TFLOP/s, decode with the FP8 cache of 656 bytes a token"}}) {
    CachedTable table{.id = p.id,
                      .source = fmt::format(
                          "deepseek-ai/FlashMLA README (2025-09-29), H800 SXM5, token-level sparse "
                          "attention: {}, compute bound; launch and bandwidth are those of the "
                          "dense decode kernel",
                          p.what),
                      .inputs = NumberFormat::bf16,
                      .cache = p.cache,
                      .latent = true,
                      .gathered = true,
                      .derived = !h800,
                      .spread = 0.15,
                      .model = {.launch_s = dense.launch_s,
                                .bytes_per_s = dense.bytes_per_s,
                                .flops_per_s = p.flops_per_s}};
    CachedPoint point{.shape = {.inputs = table.inputs,
                                .cache = p.cache,
                                .latent = true,
                                .gathered = true,
                                .batch = p.queries,
                                .heads = 128,
                                .kv_heads = 1,
                                .q_len = 1,
                                .kv_len = 2048,
                                .d_qk = 576,
                                .d_v = 512},
                      .sms = out.profile.device.sms,
                      .seconds = 0,
                      .at = {}};
    point.seconds = flops_of({.work = point.shape, .label = "", .sms = 0}) / p.flops_per_s;
    table.points.push_back(point);
    prepare(table, out.profile);
    out.profile.cached_attention.push_back(std::move(table));
  }
}

// ---- Streaming kernels
// --------------------------------------------------------------------------------

struct Norm {
  double launch_s = 0;
  double bytes_per_s = 0;
  double spread = 0;
};

/// launch_s and bandwidth that fit the fused (cuDNN) RMSNorm of a GPU best, in relative error.
Norm fit_norm(const std::string& folder, const std::string& gpu, bool backward) {
  const TableFile file(folder + "/kernels/rmsnorm-cudnn.csv");
  std::vector<std::pair<double, double>> points;  // bytes, seconds
  for (std::size_t i = 0; i < file.size(); ++i) {
    if (file.text(i, file.column("gpu")) != gpu ||
        file.text(i, file.column("norm")) != "rms_norm" ||
        file.text(i, file.column("backend")) != "cudnn") {
      continue;
    }
    const std::string& ms = file.text(i, file.column(backward ? "bwd_ms" : "fwd_ms"));
    if (ms.empty()) continue;
    // BF16; forward reads and writes, backward reads two and writes one.
    const double bytes = 2.0 * (backward ? 3 : 2) * file.number(i, file.column("N")) *
                         file.number(i, file.column("C"));
    points.emplace_back(bytes, std::stod(ms) * 1e-3);
  }
  std::vector<double> x{std::log(2e-6), std::log(3e12)};
  const auto off = [&](const std::vector<double>& logs, const std::pair<double, double>& p) {
    return std::abs((std::exp(logs[0]) + p.first / std::exp(logs[1])) / p.second - 1);
  };
  minimise(x, 0.3, 300, [&](const std::vector<double>& logs) {
    double sum = 0;
    for (const auto& p : points) sum += off(logs, p);
    return sum;
  });
  std::vector<double> errors;
  errors.reserve(points.size());
  for (const auto& p : points) errors.push_back(off(x, p));
  std::sort(errors.begin(), errors.end());
  return {std::exp(x[0]), std::exp(x[1]), errors[errors.size() * 68 / 100]};
}

/// Rates that were measured on Hopper, as shares of the memory bandwidth of the device they were
/// measured on; another device is taken to reach the same share (derived).
struct StreamingShare {
  StreamingKind kind;
  double share;
  double spread;
  const char* id;
  const char* source;
  const char* device;  ///< where measured; "" when it is another kind's rate
};

constexpr double kH100 = 3352e9;
constexpr double kH200 = 4800e9;
constexpr const char* kTorchao =
    "pytorch/ao benchmarks/prototype/blockwise_fp8_training/README.md @55c56d0, 2026-03-20, H100 "
    "80GB HBM3";
constexpr const char* kCopy =
    "no measurement of this kind found; the 92 % of peak that pytorch/ao (@55c56d0, 2026-03-20) "
    "takes as "
    "achievable on H100 for kernels that read and write once";

const std::vector<StreamingShare>& streaming_shares() {
  static const std::vector<StreamingShare> kShares{
      {StreamingKind::quantize, 2773e9 / kH100, 0.10, "torchao-1x128-quantize", kTorchao, "H100"},
      {StreamingKind::dequantize, 2773e9 / kH100, 0.15, "torchao-1x128-quantize",
       "the rate of quantize (pytorch/ao @55c56d0, H100): the same bytes the other way", ""},
      {StreamingKind::pack_e5m6, 2773e9 / kH100, 0.25, "torchao-1x128-quantize",
       "the rate of quantize (pytorch/ao @55c56d0, H100); packing 12-bit numbers is not aligned "
       "and may be "
       "slower",
       ""},
      {StreamingKind::transpose, 2634e9 / kH100, 0.30, "torchao-1x128-transposed",
       "pytorch/ao README @55c56d0, H100: act_quant_transposed_lhs 154.5 us; TransformerEngine "
       "pull request "
       "1513 reaches 0.4-0.5 of peak with two outputs in one kernel",
       ""},
      {StreamingKind::activation_forward, 2830e9 / kH100, 0.10, "vllm-silu-mul-quant",
       "vllm-project/vllm pull request 23562, 2025-08-25, H100 80GB HBM3: silu*mul + 1x128 "
       "quantise, 2807-2847 "
       "GB/s at 512-1024 rows of 256 experts",
       "H100"},
      {StreamingKind::activation_backward, 2830e9 / kH100, 0.20, "vllm-silu-mul-quant",
       "the rate of activation_forward (vllm pull request 23562, H100)", ""},
      {StreamingKind::permute, 1920e9 / kH200, 0.25, "vllm-permute",
       "tile-ai/TileOPs pull request 2125, 2026-09-11, H200: 4096 tokens, top 8, 7168 wide; vLLM's "
       "Triton "
       "kernel 1.92 TB/s, tuned 2.40 TB/s",
       "H200"},
      {StreamingKind::unpermute, 2930e9 / kH200, 0.20, "vllm-unpermute",
       "tile-ai/TileOPs pull request 608, 2026-03-19, H200: 2048 x 2 x 4096, vLLM 2.93 TB/s",
       "H200"},
      {StreamingKind::embedding_forward, 2930e9 / kH200, 0.30, "vllm-unpermute",
       "a gather of rows, as unpermute (TileOPs pull request 608)", ""},
      {StreamingKind::embedding_backward, 1920e9 / kH200, 0.50, "vllm-permute",
       "a scatter of rows, as permute (TileOPs pull request 2125)", ""},
      {StreamingKind::rope, 0.92, 0.20, "copy", kCopy, ""},
      {StreamingKind::elementwise, 0.92, 0.15, "copy", kCopy, ""},
      {StreamingKind::copy, 0.92, 0.10, "copy",
       "the 92 % of peak that pytorch/ao (@55c56d0, 2026-03-20) takes as achievable on H100; 3.04 "
       "of 3.35 "
       "TB/s elsewhere",
       ""},
      {StreamingKind::cross_entropy, 0.92, 0.20, "copy", kCopy, ""},
      {StreamingKind::optimizer, 0.92, 0.15, "copy", kCopy, ""},
      {StreamingKind::reduction, 0.92, 0.15, "copy", kCopy, ""},
      {StreamingKind::router, 0.92, 1.00, "copy",
       "nothing public for 4096 tokens; bound by its launches, the bandwidth is that of copies",
       ""},
  };
  return kShares;
}

void add_streaming(const std::string& folder, const std::string& norm_gpu, double norm_peak,
                   const std::string& this_device, DerivedProfile& out) {
  Profile& p = out.profile;
  const double scale = p.device.memory_bytes_per_s / norm_peak;
  double launch_s = 0;
  for (const bool backward : {false, true}) {
    const Norm norm = fit_norm(folder, norm_gpu, backward);
    if (!backward) launch_s = norm.launch_s;
    const bool carried = !norm_gpu.ends_with(this_device);
    StreamingRate rate{
        .bytes_per_s = norm.bytes_per_s * scale,
        .launch_s = norm.launch_s,
        .derived = carried,
        .spread = std::hypot(norm.spread, carried ? 0.1 : 0.0),
        .id = "cudnn-rmsnorm",
        .source = fmt::format(
            "NVIDIA/cudnn-frontend benchmark/norms, {}, 2026-02: RMSNorm, BF16, cuDNN (a fused "
            "kernel, as training frameworks have; PyTorch's own backward takes twice as "
            "long){}",
            norm_gpu, carried ? ", times the ratio of memory bandwidths" : "")};
    p.streaming[backward ? StreamingKind::norm_backward : StreamingKind::norm_forward] = rate;
  }
  for (const StreamingShare& s : streaming_shares()) {
    const bool same = this_device == s.device;
    p.streaming[s.kind] = {
        .bytes_per_s = s.share * p.device.memory_bytes_per_s,
        .launch_s = launch_s,
        .derived = !same,
        .spread = std::hypot(s.spread, same ? 0.0 : 0.1),
        .id = s.id,
        .source = std::string(s.source) +
                  (same ? "" : "; the share of the memory bandwidth carried over")};
  }
}

// ---- Profiles
// -----------------------------------------------------------------------------------------

DerivedProfile start(const std::string& name, const Device& device) {
  DerivedProfile d;
  d.profile.name = name;
  d.profile.device = device;
  d.profile.launch_gap_s = 1.0e-6;
  d.profile.launch_gap_source =
      "RRZE-HPC/gpu-benches @1038c5d gpu-small-kernels: 10,000 dependent kernels of 64 kB in a "
      "CUDA graph take "
      "1.28 us each on H200 and 1.37 us on A100, the kernel included; programmatic dependent "
      "launch hides "
      "0.96 us (pegainfer issue 569, 2026-07-06). Taken as 1.0 us";
  // Inverse of the slowdown of a decode step, scaled to this device's SM count.
  const double scale = device.sms / kHopperSms;
  for (const auto& [sms, slowdown] : std::array<std::pair<double, double>, 6>{
           {{32, 1.33}, {48, 1.21}, {64, 1.09}, {80, 1.08}, {96, 1.06}, {132, 1.0}}}) {
    d.profile.bandwidth_by_sms.emplace_back(static_cast<int>(std::lround(sms * scale)),
                                            1 / slowdown);
  }
  d.profile.bandwidth_by_sms_source =
      "sgl-project/sglang-omni pull request 1934, 2026-09-03, H200 green contexts: slowdown of a "
      "decode step "
      "(mostly memory bound) on 32 to 132 SMs; scaled to the SM count of other devices. The bytes "
      "in "
      "flight agree: 132 SMs need about 17 kB each to fill 3.35 TB/s at 0.65 us, and can hold 32 "
      "kB of "
      "16-byte loads";
  return d;
}

std::string aiconfigurator(const std::string& kernel, const std::string& gpu, bool carried) {
  return fmt::format("ai-dynamo/aiconfigurator systems/data, SGLang {}, commit 095f58a5, {}, {}{}",
                     gpu == "A100 SXM" ? "0.5.10" : "0.5.14", gpu, kernel,
                     carried ? " (preferred over H200: the same memory as H800)" : "");
}

/// The dense tables of a GPU; `carried`: for another device with the same die.
void add_dense(const TableFile& file, const std::string& gpu, const std::string& prefix,
               bool fp8_block, bool fp8, bool carried, DerivedProfile& out) {
  const auto add = [&](std::string_view type, NumberFormat format, const std::string& id,
                       const std::string& kernel) {
    GemmTable t =
        from_rows(file, type, format, prefix + id, aiconfigurator(kernel, gpu, carried), out);
    t.derived = carried;
    out.profile.gemms.push_back(std::move(t));
  };
  if (fp8_block) {
    add("fp8_block", NumberFormat::fp8_block, "-deepgemm", "DeepGEMM, FP8 1x128 by 128x128");
  }
  add("bfloat16", NumberFormat::bf16, "-cublas-bf16", "torch.nn.functional.linear");
  if (fp8)
    add("fp8", NumberFormat::fp8_tensor, "-fp8-tensor", "fp8_scaled_mm, one scale per tensor");
}

const Device kH800Device{
    .name = "NVIDIA H800 SXM",
    .sms = 132,
    .memory_bytes = 80e9,
    .memory_bytes_per_s = 3.35e12,
    .bf16_flops_per_s = 989.4e12,
    .fp8_flops_per_s = 1978.9e12,
    .source =
        "compute, memory size and bandwidth of the H100 SXM5 (NVIDIA data sheet, sparse figures "
        "halved); deepseek-ai/FlashMLA documents name 990 TFLOP/s and 3.35 TB/s"};
const Device kH100Device{.name = "NVIDIA H100 SXM5 80GB",
                         .sms = 132,
                         .memory_bytes = 80e9,
                         .memory_bytes_per_s = 3.35e12,
                         .bf16_flops_per_s = 989.4e12,
                         .fp8_flops_per_s = 1978.9e12,
                         .source = "NVIDIA H100 data sheet (sparse figures halved)"};
const Device kH200Device{.name = "NVIDIA H200 SXM",
                         .sms = 132,
                         .memory_bytes = 141e9,
                         .memory_bytes_per_s = 4.8e12,
                         .bf16_flops_per_s = 989.4e12,
                         .fp8_flops_per_s = 1978.9e12,
                         .source = "NVIDIA H200 data sheet (sparse figures halved)"};
const Device kB200Device{
    .name = "NVIDIA B200 SXM",
    .sms = 148,
    .memory_bytes = 180e9,
    .memory_bytes_per_s = 8.0e12,
    .bf16_flops_per_s = 2250e12,
    .fp8_flops_per_s = 4500e12,
    .source = "HGX B200, 1000 W: glennklockwood.com and vultr documents (secondary)"};
const Device kA100Device{.name = "NVIDIA A100 SXM4 80GB",
                         .sms = 108,
                         .memory_bytes = 80e9,
                         .memory_bytes_per_s = 2.039e12,
                         .bf16_flops_per_s = 312e12,
                         .source = "NVIDIA A100 data sheet"};

}  // namespace

std::vector<DerivedProfile> derive_profiles(const std::string& folder) {
  const TableFile h100_gemms(folder + "/kernels/h100_sxm-gemm.csv.gz");
  std::vector<DerivedProfile> all;
  const std::string hopper = "NVIDIA H200";

  for (const bool first : {true, false}) {
    DerivedProfile d = start(first ? "h800" : "h800_deepgemm_2025_04", kH800Device);
    d.comment = fmt::format(
        "H800 from public kernel benchmarks; nothing here comes from DeepSeek's training trace.\n"
        "FP8 block GEMMs: DeepGEMM's {} H800 tables; weight gradients: {}.\n"
        "Everything else is carried over from H100 (same die and memory), or H200 where only that "
        "exists.",
        first ? "first published (nearest in time to the training of DeepSeek-V3)"
              : "last published",
        first ? "DeepGEMM pull request 95 slowed down to the kernel it replaced"
              : "DeepGEMM pull request 95");
    DeepGemmTables forward = deepgemm_tables(folder, first, d);
    DeepGemmTables weight = weight_gradient_tables(first ? 1.2 : 1.0, forward.dense.model, d);
    d.profile.gemms = {forward.dense, forward.grouped, weight.dense, weight.grouped};
    add_dense(h100_gemms, "H100 SXM", "h100", false, true, true, d);
    add_hopper_attention(folder, false, d);
    add_latent_decode(folder, "h100_sxm-mla-decode.csv.gz", "H100 SXM", "h100", true, d);
    add_sparse(true, d);
    add_streaming(folder, hopper, kH200, "H800", d);
    all.push_back(std::move(d));
  }
  for (const bool h100 : {true, false}) {
    DerivedProfile d = start(h100 ? "h100" : "h200", h100 ? kH100Device : kH200Device);
    d.comment =
        "From public kernel benchmarks. FP8 grouped and weight-gradient GEMMs are DeepGEMM's on "
        "H800 (same die).";
    if (h100) {
      add_dense(h100_gemms, "H100 SXM", "h100", true, true, false, d);
    } else {
      add_dense(TableFile(folder + "/kernels/h200_sxm-gemm.csv.gz"), "H200 SXM", "h200", true, true,
                false, d);
    }
    DeepGemmTables grouped = deepgemm_tables(folder, false, d);
    DeepGemmTables weight = weight_gradient_tables(1.0, grouped.dense.model, d);
    for (GemmTable* t : {&grouped.grouped, &weight.dense, &weight.grouped}) {
      t->derived = true;
      d.profile.gemms.push_back(*t);
    }
    add_hopper_attention(folder, true, d);
    add_latent_decode(folder, h100 ? "h100_sxm-mla-decode.csv.gz" : "h200_sxm-mla-decode.csv.gz",
                      h100 ? "H100 SXM" : "H200 SXM", h100 ? "h100" : "h200", false, d);
    add_sparse(false, d);
    add_streaming(folder, hopper, kH200, h100 ? "H100" : "H200", d);
    all.push_back(std::move(d));
  }
  {
    DerivedProfile d = start("b200", kB200Device);
    d.comment =
        "From public kernel benchmarks; streaming kernels without a Blackwell table are carried "
        "over "
        "from Hopper by their share of the memory bandwidth.";
    add_dense(TableFile(folder + "/kernels/b200_sxm-gemm.csv.gz"), "B200 SXM", "b200", true, true,
              false, d);
    add_blackwell_attention(folder, d);
    add_latent_decode(folder, "b200_sxm-mla-decode.csv.gz", "B200 SXM", "b200", false, d);
    add_streaming(folder, "NVIDIA GB200", 8.0e12, "B200", d);
    all.push_back(std::move(d));
  }
  {
    DerivedProfile d = start("a100", kA100Device);
    d.comment =
        "From public kernel benchmarks; streaming kernels are carried over from Hopper by their "
        "share "
        "of the memory bandwidth.";
    add_dense(TableFile(folder + "/kernels/a100_sxm-gemm.csv.gz"), "A100 SXM", "a100", false, false,
              false, d);
    add_ampere_attention(d);
    add_streaming(folder, hopper, kH200, "A100", d);
    all.push_back(std::move(d));
  }
  for (DerivedProfile& d : all) {
    prepare(d.profile);
    const bool hopper_device = d.profile.device.sms == static_cast<int>(kHopperSms);
    if (hopper_device) {
      d.expert_exchange = kHopperExchange;
      d.low_latency_exchange = kLowLatencyFile;
    }
    if (d.profile.name == "h800") d.expert_exchange = kFirstExchange;
  }
  return all;
}

}  // namespace orrery
