#include "models/scenario.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <string_view>
#include <system_error>
#include <utility>

#include "models/plan_rules.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

using FormatWords = std::initializer_list<std::pair<std::string_view, NumberFormat>>;

const FormatWords kActivationFormats = {{"fp32", NumberFormat::fp32}, {"bf16", NumberFormat::bf16}};
const FormatWords kLinearFormats = {{"fp32", NumberFormat::fp32},
                                    {"bf16", NumberFormat::bf16},
                                    {"fp8_tensor", NumberFormat::fp8_tensor},
                                    {"fp8_block", NumberFormat::fp8_block}};
const FormatWords kStoredFormats = {{"fp32", NumberFormat::fp32},
                                    {"bf16", NumberFormat::bf16},
                                    {"fp8_tensor", NumberFormat::fp8_tensor},
                                    {"fp8_block", NumberFormat::fp8_block},
                                    {"e5m6", NumberFormat::e5m6}};
const std::initializer_list<std::pair<std::string_view, std::int64_t>> kStateBytes = {
    {"fp32", 4}, {"bf16", 2}, {"fp8", 1}, {"none", 0}};
const std::initializer_list<std::pair<std::string_view, PrecisionKind>> kRecipes = {
    {"fp32", PrecisionKind::fp32},
    {"bf16", PrecisionKind::bf16},
    {"fp8_tensor", PrecisionKind::fp8_tensor},
    {"fp8_deepseek", PrecisionKind::fp8_deepseek}};
const std::initializer_list<std::pair<std::string_view, ScheduleKind>> kSchedules = {
    {"gpipe", ScheduleKind::gpipe},
    {"1f1b", ScheduleKind::one_f_one_b},
    {"interleaved_1f1b", ScheduleKind::interleaved_1f1b},
    {"zb_h1", ScheduleKind::zb_h1},
    {"zb_v", ScheduleKind::zb_v},
    {"dual_pipe", ScheduleKind::dual_pipe},
    {"dual_pipe_v", ScheduleKind::dual_pipe_v}};

struct RecomputeWord {
  std::string_view word;
  bool Recompute::*what;
};
constexpr RecomputeWord kRecomputeParts[] = {{"norms", &Recompute::norms},
                                             {"mla_up_projection", &Recompute::mla_up_projection},
                                             {"activation", &Recompute::activation},
                                             {"attention_core", &Recompute::attention_core}};

template <class E>
std::string_view word_for(std::initializer_list<std::pair<std::string_view, E>> words, E value) {
  for (const auto& [word, meaning] : words) {
    if (meaning == value) return word;
  }
  return words.begin()->first;
}

bool is_fp8(NumberFormat format) {
  return format == NumberFormat::fp8_tensor || format == NumberFormat::fp8_block;
}

/// The value of a key where there is one to point at, else the map that lacks it.
Node where(MapReader& reader, std::string_view key) {
  const Node value = reader.at(key);
  return value.at().file.empty() ? reader.node() : value;
}

std::string resolve(const fs::path& directory, const std::string& path) {
  return (directory / path).lexically_normal().string();  // an absolute path replaces the directory
}

/// The path of the file that `node` names; says at `node` if there is none.
std::optional<std::string> find_named(const Node& node, std::string_view what, Problems& problems) {
  const fs::path path = resolve(node.folder(), node.text());
  std::error_code ignored;
  if (fs::is_regular_file(path, ignored)) return path.string();
  const fs::path named(node.text());
  std::vector<std::string> names;
  for (fs::directory_iterator it(path.parent_path(), ignored), end; !ignored && it != end;
       it.increment(ignored)) {
    if (it->is_regular_file(ignored)) names.push_back(it->path().filename().string());
  }
  std::sort(names.begin(), names.end());
  const auto near = nearest(named.filename().string(), names);
  std::string hint =
      near ? fmt::format("did you mean '{}'?", (named.parent_path() / *near).generic_string()) : "";
  if (node.overridden() && fs::is_regular_file(named, ignored)) {
    hint = fmt::format("it is looked for from the scenario's folder: {}",
                       named.lexically_proximate(node.folder()).generic_string());
  }
  problems.add(node, fmt::format("there is no {} file '{}'", what, path.string()), hint);
  return std::nullopt;
}

/// Reads the `plan` map. Values are read in read_...(), each part noting whether it can be relied
/// on; then check_...() compares the parts that can with one another and with model, cluster and
/// device.
class PlanReader {
 public:
  /// `model`, `cluster` and `device` may be null: then they had problems, and what depends on them
  /// is not checked.
  PlanReader(const Node& node, const Model* model, const Cluster* cluster, const Device* device,
             Problems& problems, std::vector<std::string>& notes)
      : reader_(node, problems, "plan"),
        layout_reader_(reader_.require("layout"), problems, "plan.layout"),
        model_(model),
        cluster_(cluster),
        device_(device),
        problems_(problems),
        notes_(notes) {}

  Plan read() {
    if (reader_.node().kind() != Node::Kind::map) return plan_;
    layout_ok_ =
        layout_reader_.node().kind() == Node::Kind::map && without_problems([&] { read_layout(); });
    schedule_ok_ = without_problems([&] { read_schedule(); });
    batch_ok_ = without_problems([&] { read_batch(); });
    read_precision();
    read_recompute();
    read_communication_sms();
    read_checkpoint();
    read_routing();
    const bool stage_keys_ok = without_problems([&] { read_stage_keys(); });
    reader_.finish();

    Parallelism& layout = plan_.parallelism;
    layout_ok_ =
        layout_ok_ && cluster_ != nullptr && holds(check_world(layout, dp_given_, *cluster_));
    if (layout_ok_) note_unused_gpus();
    if (layout_ok_) layout_ok_ = holds(check_expert_block(layout));
    if (layout_ok_ && model_ != nullptr) {
      report(check_split_of_model(layout, *model_));
      note_split_of_model();
    }
    if (layout_ok_ && plan_.parallelism.ep == 1 && !stated_load(plan_.routing)) {
      note(
          "routing changes nothing with ep 1: every GPU has all experts, and their rows together "
          "are the same");
    }
    if (batch_ok_) {
      batch_ok_ = holds(check_tokens(plan_));
      note_positions();
    }
    if (batch_ok_ && layout_ok_) batch_ok_ = holds(check_batch(plan_));
    if (batch_ok_ && layout_ok_) report(check_sequence_split(plan_));
    if (batch_ok_ && layout_ok_ && schedule_ok_) report(check_schedule(plan_));
    if (layout_ok_ && schedule_ok_ && stage_keys_ok && model_ != nullptr) fill_stages();
    return plan_;
  }

 private:
  template <class Step>
  bool without_problems(Step&& step) {
    const std::size_t before = problems_.size();
    step();
    return problems_.size() == before;
  }

  /// Whether a rule has nothing against it; reports what it has.
  bool holds(const WhyImpossible& reasons) {
    report(reasons);
    return reasons.empty();
  }

  void note(std::string text) { notes_.push_back(std::move(text)); }

  // --- reading -----------------------------------------------------------------------------------

  void read_layout() {
    Parallelism& p = plan_.parallelism;
    const auto degree = [&](std::string_view key) {
      return layout_reader_.integer_or(key, 1, 1, kMaxGpus);
    };
    p.tp = degree("tp");
    p.cp = degree("cp");
    p.pp = degree("pp");
    p.ep = degree("ep");
    p.expert_tp = degree("expert_tp");
    dp_given_ = layout_reader_.has("dp");
    p.dp = degree("dp");
    p.zero_stage = static_cast<int>(layout_reader_.integer_or("zero", 1, 0, 3));
    p.sequence_parallel = layout_reader_.flag_or("sequence_parallel", true);
    layout_reader_.finish();
    if (p.zero_stage == 3 && p.pp > 1) {
      note(fmt::format("zero 3 with pp {}: parameters are gathered again for every micro-batch",
                       p.pp));
    }
  }

  void read_schedule() {
    plan_.schedule = reader_.choice<ScheduleKind>("schedule", kSchedules);
    switch (plan_.schedule) {
      case ScheduleKind::interleaved_1f1b:
        plan_.chunks = static_cast<int>(reader_.integer("virtual_stages", 2, kMaxVirtualStages));
        return;
      case ScheduleKind::zb_v:
      case ScheduleKind::dual_pipe:
      case ScheduleKind::dual_pipe_v:
        plan_.chunks = 2;
        break;
      case ScheduleKind::gpipe:
      case ScheduleKind::one_f_one_b:
      case ScheduleKind::zb_h1:
        plan_.chunks = 1;
        break;
    }
    if (reader_.has("virtual_stages")) {
      problems_.add(
          where(reader_, "virtual_stages"),
          fmt::format("virtual_stages is a choice of interleaved_1f1b only; {} has {} "
                      "stage{} per rank",
                      name_of(plan_.schedule), plan_.chunks, plan_.chunks == 1 ? "" : "s"),
          "remove the key");
    }
  }

  void read_batch() {
    plan_.sequence_length = reader_.integer("sequence_length", 1, kMaxSequenceLength);
    plan_.micro_batch_sequences = reader_.integer_or("micro_batch", 1, 1, kMaxMicroBatchTokens);
    plan_.global_batch_sequences = reader_.integer("global_batch", 1, kMaxGlobalBatch);
  }

  void read_precision() {
    Precision& p = plan_.precision;
    if (reader_.at("precision").kind() != Node::Kind::map) {
      p = make_precision(reader_.choice<PrecisionKind>("precision", kRecipes));
    } else {
      MapReader map(reader_.at("precision"), problems_, "plan.precision");
      p = make_precision(map.choice<PrecisionKind>("recipe", kRecipes));
      p.activations = map.choice_or("activations", p.activations, kActivationFormats);
      p.linear = map.choice_or("linear", p.linear, kLinearFormats);
      p.saved = map.choice_or("saved", p.saved, kStoredFormats);
      p.saved_attention = map.choice_or("saved_attention", p.saved_attention, kStoredFormats);
      p.dispatch = map.choice_or("dispatch", p.dispatch, kLinearFormats);
      p.combine = map.choice_or("combine", p.combine, kLinearFormats);
      p.parameter_bytes = map.choice_or<std::int64_t>("parameters", p.parameter_bytes,
                                                      {{"fp32", 4}, {"bf16", 2}, {"fp8", 1}});
      p.gradient_bytes =
          map.choice_or<std::int64_t>("gradients", p.gradient_bytes, {{"fp32", 4}, {"bf16", 2}});
      p.gradient_sync_bytes = map.choice_or<std::int64_t>("gradient_sync", p.gradient_sync_bytes,
                                                          {{"fp32", 4}, {"bf16", 2}});
      p.master_bytes = map.choice_or<std::int64_t>("master", p.master_bytes,
                                                   {{"fp32", 4}, {"bf16", 2}, {"none", 0}});
      p.moment_bytes = 2 * map.choice_or<std::int64_t>("moments", p.moment_bytes / 2,
                                                       {{"fp32", 4}, {"bf16", 2}, {"fp8", 1}});
      map.finish();
      if (!is_fp8(p.linear) && p.linear != p.activations) {
        problems_.add(
            where(map, "linear"),
            fmt::format("linear layers read {}, but activations are {}, and no kernel "
                        "converts them",
                        name_of(p.linear), name_of(p.activations)),
            fmt::format("linear: {} goes with them, or an FP8 format", name_of(p.activations)));
      }
    }
    if (device_ != nullptr) report(check_precision(p, *device_));
  }

  void read_recompute() {
    Recompute& r = plan_.recompute;
    const Node value = reader_.at("recompute");
    if (value.kind() == Node::Kind::sequence) {
      for (std::size_t i = 0; i < value.size(); ++i) read_recompute_part(value[i]);
    } else if (reader_.has("recompute")) {
      enum class Preset { none, selective, full, deepseek };
      switch (reader_.choice<Preset>("recompute", {{"none", Preset::none},
                                                   {"selective", Preset::selective},
                                                   {"full", Preset::full},
                                                   {"deepseek", Preset::deepseek}})) {
        case Preset::none:
          break;
        case Preset::selective:  // Korthikanti et al. 2022, arXiv 2205.05198, section 5
          r.attention_core = true;
          break;
        case Preset::full:
          r.full = true;
          break;
        case Preset::deepseek:  // V3 report 3.2.3
          r.norms = r.mla_up_projection = r.activation = true;
          break;
      }
    }
    if (model_ != nullptr) report(check_recompute(r, *model_));
  }

  void read_recompute_part(const Node& node) {
    std::vector<std::string> words;
    for (const RecomputeWord& part : kRecomputeParts) {
      if (node.kind() == Node::Kind::scalar && node.text() == part.word) {
        plan_.recompute.*part.what = true;
        return;
      }
      words.emplace_back(part.word);
    }
    std::string hint;
    if (node.kind() == Node::Kind::scalar) {
      const auto near = nearest(node.text(), words);
      if (near) hint = fmt::format("did you mean '{}'?", *near);
      for (const std::string_view preset : {"none", "selective", "full", "deepseek"}) {
        if (node.text() == preset) hint = fmt::format("'{}' stands alone, not in a list", preset);
      }
    }
    problems_.add(
        node, fmt::format("an element of 'recompute' must be one of {}", fmt::join(words, ", ")),
        hint);
  }

  void read_communication_sms() {
    plan_.communication_sms =
        static_cast<int>(reader_.integer_or("communication_sms", 0, 0, 1 << 16));
    if (device_ != nullptr) report(check_communication_sms(plan_.communication_sms, *device_));
  }

  void read_checkpoint() {
    if (!reader_.has("checkpoint")) return;
    MapReader map(reader_.at("checkpoint"), problems_, "checkpoint");
    Checkpoint checkpoint;
    checkpoint.bytes_per_s = map.quantity("bandwidth", Dimension::bytes_per_s);
    checkpoint.own_network = map.choice_or("network", false, {{"shared", false}, {"own", true}});
    map.finish();
    plan_.checkpoint = checkpoint;
  }

  void read_routing() {
    if (reader_.has("expert_imbalance")) {
      const Node value = reader_.at("expert_imbalance");
      problems_.add(where(reader_, "expert_imbalance"), "expert_imbalance is a kind of routing",
                    fmt::format("routing: {{imbalance: {}}}",
                                value.kind() == Node::Kind::scalar ? value.text() : "1.2"));
    }
    if (!reader_.has("routing")) return;
    const Node node = reader_.at("routing");
    if (model_ == nullptr) return;
    if (!model_->moe) {
      problems_.add(where(reader_, "routing"),
                    fmt::format("routing, but {} has no experts", model_->name));
      return;
    }
    if (node.kind() != Node::Kind::map) {
      if (node.kind() == Node::Kind::scalar && node.text() == "balanced") return;
      problems_.add(
          where(reader_, "routing"),
          "routing must be balanced, or a map with imbalance, popularity, counts or router",
          "routing: {popularity: zipf, exponent: 0.2}");
      return;
    }
    MapReader map(node, problems_, "plan.routing");
    int kinds = 0;
    for (const std::string_view key : {"imbalance", "popularity", "counts", "router"}) {
      kinds += map.has(key);
    }
    if (kinds != 1) {
      problems_.add(node, "routing has one of imbalance, popularity, counts and router");
      return;
    }
    Routing& routing = plan_.routing;
    if (map.has("imbalance")) {
      routing.kind = StatedImbalance{
          map.number("imbalance", 1, static_cast<double>(model_->moe->routed_experts))};
    } else {
      if (map.has("popularity")) {
        map.choice<int>("popularity", {{"zipf", 0}});
        routing.kind = ZipfPopularity{map.number("exponent", 0, 10)};
      } else if (map.has("counts")) {
        routing.kind = read_recorded(map);
      } else {
        routing.kind = read_router(map.at("router"));
      }
      if (map.has("independent_tokens")) {
        const Node tokens = map.at("independent_tokens");
        const bool all = tokens.kind() == Node::Kind::scalar && tokens.text() == "all";
        routing.independent_tokens =
            all ? kAllTokens : map.integer("independent_tokens", 0, kAllTokens);
      }
    }
    map.finish();
  }

  RecordedCounts read_recorded(MapReader& map) {
    RecordedCounts counts;
    const std::string file = map.text("counts");
    if (file.empty()) return counts;
    const auto path = find_named(map.at("counts"), "counts", problems_);
    if (!path) return counts;
    std::vector<std::int64_t> layers;
    std::vector<std::int64_t> mtp;
    for (std::int64_t l = 0; l < model_->layers; ++l) {
      if (model_->is_moe(l)) layers.push_back(l);
    }
    for (std::int64_t i = 0; i < model_->mtp_modules; ++i) {
      if (model_->is_moe(model_->layers - 1)) mtp.push_back(model_->layers + i);
    }
    counts = read_counts(*path, *model_->moe, layers, mtp, problems_);
    counts.file = file;
    return counts;
  }

  RouterDynamics read_router(const Node& node) {
    RouterDynamics d;
    MapReader map(node, problems_, "plan.routing.router");
    if (!model_->moe->router_bias) d.bias_step = 0;
    d.steps = map.integer_or("steps", d.steps, 0, 1'000'000);
    d.sequences = map.integer_or("sequences", d.sequences, 2, 1 << 20);
    d.tokens = map.integer_or("tokens", d.tokens, 2, 1 << 20);
    d.offset_spread = map.number_or("offset_spread", d.offset_spread, 0, 100);
    d.sequence_spread = map.number_or("sequence_spread", d.sequence_spread, 0, 100);
    d.token_spread = map.number_or("token_spread", d.token_spread, 0, 100);
    d.bias_step = map.number_or("bias_step", d.bias_step, 0, 1);
    d.sequence_loss = map.number_or("sequence_loss", d.sequence_loss, 0, 1000);
    d.loss_rate = map.number_or("loss_rate", d.loss_rate, 0, 1e6);
    map.finish();
    if (d.bias_step > 0 && !model_->moe->router_bias) {
      problems_.add(node.find("bias_step").value_or(node),
                    fmt::format("bias_step, but the router of {} has no bias", model_->name));
    }
    constexpr std::int64_t kMostTokens = 1'000'000'000;  // minutes
    const std::int64_t batch = d.sequences * d.tokens;
    if (batch > kMostTokens / std::max<std::int64_t>(d.steps + 16, 1)) {
      problems_.add(node,
                    fmt::format("steps x sequences x tokens = {} x {} x {} is more than can be "
                                "simulated ({} tokens)",
                                d.steps, d.sequences, d.tokens, kMostTokens));
    }
    return d;
  }

  void read_stage_keys() {
    if (reader_.has("layers_per_stage")) {
      layers_per_stage_ = reader_.integers("layers_per_stage", 0, kMaxGpus);
    }
    if (reader_.has("mtp_stage")) mtp_stage_ = reader_.integer("mtp_stage", 0, kMaxGpus);
  }

  // --- checking ----------------------------------------------------------------------------------

  /// What a rule says, each reason at its key.
  void report(const WhyImpossible& reasons) {
    for (const Impossible& reason : reasons) {
      problems_.add(node_of(reason.key), reason.why, reason.hint);
    }
  }

  Node node_of(PlanKey key) {
    switch (key) {
      case PlanKey::layout:
        return layout_reader_.node();
      case PlanKey::tp:
        return where(layout_reader_, "tp");
      case PlanKey::cp:
        return where(layout_reader_, "cp");
      case PlanKey::pp:
        return where(layout_reader_, "pp");
      case PlanKey::ep:
        return where(layout_reader_, "ep");
      case PlanKey::expert_tp:
        return where(layout_reader_, "expert_tp");
      case PlanKey::zero:
        return where(layout_reader_, "zero");
      case PlanKey::schedule:
        return where(reader_, "schedule");
      case PlanKey::layers_per_stage:
        return where(reader_, "layers_per_stage");
      case PlanKey::mtp_stage:
        return where(reader_, "mtp_stage");
      case PlanKey::micro_batch:
        return where(reader_, "micro_batch");
      case PlanKey::global_batch:
        return where(reader_, "global_batch");
      case PlanKey::precision:
        return where(reader_, "precision");
      case PlanKey::recompute:
        return where(reader_, "recompute");
      case PlanKey::communication_sms:
        return where(reader_, "communication_sms");
    }
    return reader_.node();
  }

  void note_unused_gpus() {
    const std::int64_t world = plan_.parallelism.world();
    if (world >= cluster_->gpus()) return;
    note(fmt::format("the layout uses {} of the {} GPUs of cluster '{}'", world, cluster_->gpus(),
                     cluster_->name));
  }

  void note_split_of_model() {
    const Parallelism& p = plan_.parallelism;
    const Attention& attention = model_->attention;
    if (!attention.mla && p.tp > attention.kv_heads && p.tp % attention.kv_heads == 0) {
      note(fmt::format("tp {} is more than the {} key-value heads of {}: each is kept {} times",
                       p.tp, attention.kv_heads, model_->name, p.tp / attention.kv_heads));
    }
    if (model_->vocabulary % p.tp != 0) {
      note(fmt::format("tp {} does not divide the vocabulary of {} ({}): it is padded", p.tp,
                       model_->name, model_->vocabulary));
    }
    if (model_->moe) note_group_limit();
  }

  /// Group-limited routing bounds the nodes a token goes to only if groups of experts are nodes.
  void note_group_limit() {
    const Parallelism& p = plan_.parallelism;
    const Moe& moe = *model_->moe;
    if (cluster_ == nullptr || moe.group_limit >= moe.groups) return;
    const std::int64_t ranks = p.ep * p.expert_tp;
    const std::int64_t nodes = (ranks + cluster_->gpus_per_node - 1) / cluster_->gpus_per_node;
    if (nodes <= 1 || nodes == moe.groups) return;
    note(fmt::format(
        "{} routes to {} of {} expert groups, but ep {} spans {} nodes: a token's nodes are "
        "not bounded by its groups alone",
        model_->name, moe.group_limit, moe.groups, p.ep, nodes));
  }

  void note_positions() {
    if (model_ != nullptr && model_->max_positions > 0 &&
        plan_.sequence_length > model_->max_positions) {
      note(fmt::format("sequence_length {} is beyond the {} positions {} was made for",
                       plan_.sequence_length, model_->max_positions, model_->name));
    }
  }

  void fill_stages() {
    if (!reader_.has("layers_per_stage")) {
      const WhyImpossible why = check_even_split(plan_, *model_);
      report(why);
      if (!why.empty()) return;
      layers_per_stage_ = even_split(model_->layers, stage_count(plan_));
      note_uneven_split();
    }
    report(check_stages(plan_, layers_per_stage_, mtp_stage_, *model_, plan_.stages));
  }

  void note_uneven_split() {
    const std::int64_t stages = stage_count(plan_);
    const std::int64_t fewer = model_->layers / stages;
    const std::int64_t longer_stages = model_->layers % stages;
    if (longer_stages == 0) return;
    note(fmt::format("{} layers over {} stages: {} on the first {}, {} on the other {}",
                     model_->layers, stages, fewer + 1, longer_stages, fewer,
                     stages - longer_stages));
  }

  MapReader reader_;
  MapReader layout_reader_;
  const Model* model_;
  const Cluster* cluster_;
  const Device* device_;
  Problems& problems_;
  std::vector<std::string>& notes_;

  Plan plan_;
  std::vector<std::int64_t> layers_per_stage_;
  std::int64_t mtp_stage_ = -1;
  bool dp_given_ = false;
  bool layout_ok_ = false;
  bool schedule_ok_ = false;
  bool batch_ok_ = false;
};

// --- the files a scenario names
// ---------------------------------------------------------------------

/// Opens the file that `node` names; says at `node` if there is none.
Node read_named(const Node& node, std::string_view what, Problems& problems) {
  const std::optional<std::string> path = find_named(node, what, problems);
  return path ? read_named_document(node, *path, problems) : Node{};
}

/// The map under `key`, or the document at the path given in its place; unlocated if there is
/// neither.
Node inline_or_named(MapReader& reader, std::string_view key, Problems& problems) {
  Node value = reader.require(key);
  if (value.kind() == Node::Kind::scalar) return read_named(value, key, problems);
  return value;
}

bool is_located(const Node& node) {
  return !node.at().file.empty();
}

/// What the scenario, or else its cluster, says under `key`; unlocated where neither has it.
Node scenarios_or_clusters(MapReader& reader, const Node& cluster_node, std::string_view key) {
  return reader.has(key) ? reader.at(key) : cluster_node.find(key).value_or(Node{});
}

/// The file under `key` of the scenario, or else of its cluster, and `path` (the cluster's) as it
/// then reads; unlocated where neither names one, or none that is there.
Node read_scenarios_or_clusters(MapReader& reader, const Node& cluster_node, std::string_view key,
                                std::string& path, Problems& problems) {
  if (reader.has(key)) {
    const std::string named = reader.text(key);
    if (named.empty()) return {};
    path = resolve(reader.at(key).folder(), named);
    return read_named(reader.at(key), key, problems);
  }
  if (path.empty()) return {};
  const Node named = cluster_node.find(key).value_or(cluster_node);
  if (named.kind() != Node::Kind::scalar) return {};
  return read_named(named, key, problems);
}

Profile read_device_profile(MapReader& reader, const Node& cluster_node, Cluster& cluster,
                            Problems& problems) {
  const Node document =
      read_scenarios_or_clusters(reader, cluster_node, "profile", cluster.profile, problems);
  if (!reader.has("profile") && cluster.profile.empty() && is_located(cluster_node)) {
    problems.add(reader.node(),
                 fmt::format("no profile: neither the scenario nor its cluster names one"),
                 "add profile: profiles/NAME.yaml");
  }
  if (!is_located(document)) return {};
  Profile profile = read_profile(document, problems);
  profile.file = cluster.profile;
  return profile;
}

/// Null where none is named, or it has problems.
std::shared_ptr<const Fabric> read_clusters_fabric(MapReader& reader, const Node& cluster_node,
                                                   bool cluster_ok, Cluster& cluster,
                                                   Problems& problems) {
  const Node document =
      read_scenarios_or_clusters(reader, cluster_node, "fabric", cluster.fabric, problems);
  if (!is_located(document)) return nullptr;
  const Node named = reader.has("fabric") ? reader.at("fabric")
                                          : cluster_node.find("fabric").value_or(cluster_node);
  return cluster_ok ? read_fabric_of(cluster, named, document, problems) : nullptr;
}

/// Of the overrides those that changed a file that the resolved scenario names.
void keep_overrides(MapReader& reader, const Node& cluster_node, Scenario& scenario) {
  for (const char* key : {"profile", "fabric"}) {
    for (const std::string& rest :
         overrides_below(scenarios_or_clusters(reader, cluster_node, key))) {
      scenario.overrides.push_back(fmt::format("{}{}{}", key, rest[0] == '[' ? "" : ".", rest));
    }
  }
}

}  // namespace

IntactParts read_parts(MapReader& reader, Scenario& scenario) {
  Problems& problems = reader.problems();
  IntactParts parts;
  scenario.name = reader.text("name");
  scenario.seed = static_cast<std::uint64_t>(
      reader.integer_or("seed", 0, 0, std::numeric_limits<std::int64_t>::max()));

  const auto intact = [&](std::size_t problems_before, const Node& node) {
    return is_located(node) && problems.size() == problems_before;
  };
  std::size_t before = problems.size();
  const Node model = inline_or_named(reader, "model", problems);
  if (is_located(model)) scenario.model = read_model(model, problems, &scenario.notes);
  parts.model = intact(before, model);

  before = problems.size();
  const Node cluster = inline_or_named(reader, "cluster", problems);
  if (is_located(cluster)) scenario.cluster = read_cluster(cluster, problems);
  parts.cluster = intact(before, cluster);

  before = problems.size();
  scenario.profile = read_device_profile(reader, cluster, scenario.cluster, problems);
  parts.device = problems.size() == before && !scenario.profile.file.empty();
  scenario.fabric =
      read_clusters_fabric(reader, cluster, parts.cluster, scenario.cluster, problems);
  keep_overrides(reader, cluster, scenario);
  return parts;
}

Node with_scenario_overrides(const Node& document, const Overrides& given, Problems& problems) {
  Overrides overrides;
  if (const auto own = document.find("set")) overrides = read_overrides(*own, problems);
  overrides.insert(overrides.end(), given.begin(), given.end());
  static constexpr PathAlias kAliases[] = {{"profile", "cluster"}, {"fabric", "cluster"}};
  return with_overrides(document, overrides, problems, kAliases);
}

namespace {

Scenario read(const Node& document, const std::string& file, const Overrides& given,
              Problems& problems) {
  Scenario scenario;
  scenario.file = file;
  if (!is_located(document)) return scenario;  // and the problem is known
  const Node root = with_scenario_overrides(document, given, problems);
  MapReader reader(root, problems, "the scenario");
  if (root.kind() != Node::Kind::map) return scenario;
  reader.allow("set");
  const IntactParts intact = read_parts(reader, scenario);
  if (intact.model && scenario.model.attention.mla && scenario.model.attention.mla->indexer) {
    scenario.notes.emplace_back("a training step has full attention in the place of sparse attention");
  }
  scenario.plan = PlanReader(reader.require("plan"), intact.model ? &scenario.model : nullptr,
                             intact.cluster ? &scenario.cluster : nullptr,
                             intact.device ? &scenario.profile.device : nullptr, problems,
                             scenario.notes)
                      .read();
  scenario.search = reader.at("search");  // for reports/search/space.hpp
  const Node stragglers = reader.at("stragglers");
  if (reader.has("stragglers")) {
    scenario.stragglers = read_stragglers(stragglers, problems);
    if (problems.empty()) {
      check_stragglers(scenario.stragglers, stragglers, scenario.plan.parallelism.world(),
                       scenario.cluster.gpus_per_node, problems);
    }
  }
  if (reader.has("reliability")) {
    const Node node = inline_or_named(reader, "reliability", problems);
    if (is_located(node)) scenario.reliability = read_reliability(node, problems);
  }
  if (reader.has("training")) {
    scenario.training = read_training(reader.at("training"), problems);
  }
  reader.allow("generation");
  reader.finish();
  if (problems.empty()) report_without_effect(root, problems);
  return scenario;
}

// --- writing
// ----------------------------------------------------------------------------------------

std::string indented(const std::string& text) {
  std::string out;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    if (end > begin) out += "  " + text.substr(begin, end - begin);
    out += '\n';
    begin = end + 1;
  }
  return out;
}

std::string layout_yaml(const Parallelism& p) {
  return fmt::format(
      "{{tp: {}, cp: {}, pp: {}, dp: {}, ep: {}, expert_tp: {}, zero: {}, sequence_parallel: {}}}",
      p.tp, p.cp, p.pp, p.dp, p.ep, p.expert_tp, p.zero_stage, p.sequence_parallel);
}

std::string precision_yaml(const Precision& p) {
  const auto bytes = [](std::int64_t b) { return word_for(kStateBytes, b); };
  return fmt::format(
      "\n    recipe: {}\n    activations: {}\n    linear: {}\n    saved: {}\n    saved_attention: "
      "{}\n    dispatch: {}\n"
      "    combine: {}\n    parameters: {}\n    gradients: {}\n    gradient_sync: {}\n    master: "
      "{}\n"
      "    moments: {}",
      word_for(kRecipes, p.kind), word_for(kActivationFormats, p.activations),
      word_for(kLinearFormats, p.linear), word_for(kStoredFormats, p.saved),
      word_for(kStoredFormats, p.saved_attention), word_for(kLinearFormats, p.dispatch),
      word_for(kLinearFormats, p.combine), bytes(p.parameter_bytes), bytes(p.gradient_bytes),
      bytes(p.gradient_sync_bytes), bytes(p.master_bytes), bytes(p.moment_bytes / 2));
}

std::string recompute_yaml(const Recompute& r) {
  if (r.full) return "full";
  std::vector<std::string_view> words;
  for (const RecomputeWord& part : kRecomputeParts) {
    if (r.*part.what) words.push_back(part.word);
  }
  return words.empty() ? "none" : fmt::format("[{}]", fmt::join(words, ", "));
}

/// As flow maps, with the line's end; empty if balanced.
std::string routing_yaml(const Routing& routing) {
  std::string kind;
  if (const auto* stated = std::get_if<StatedImbalance>(&routing.kind)) {
    kind = fmt::format("imbalance: {}", stated->busiest);
  } else if (const auto* zipf = std::get_if<ZipfPopularity>(&routing.kind)) {
    kind = fmt::format("popularity: zipf, exponent: {}", zipf->exponent);
  } else if (const auto* recorded = std::get_if<RecordedCounts>(&routing.kind)) {
    kind = fmt::format("counts: {}", in_quotes(recorded->file));
  } else if (const auto* r = std::get_if<RouterDynamics>(&routing.kind)) {
    kind = fmt::format(
        "router: {{steps: {}, sequences: {}, tokens: {}, offset_spread: {}, sequence_spread: {}, "
        "token_spread: {}, bias_step: {}, sequence_loss: {}, loss_rate: {}}}",
        r->steps, r->sequences, r->tokens, r->offset_spread, r->sequence_spread, r->token_spread,
        r->bias_step, r->sequence_loss, r->loss_rate);
  } else {
    return "";
  }
  if (routing.independent_tokens) {
    kind += *routing.independent_tokens == kAllTokens
                ? ", independent_tokens: all"
                : fmt::format(", independent_tokens: {}", *routing.independent_tokens);
  }
  return fmt::format("routing: {{{}}}\n", kind);
}

std::string checkpoint_yaml(const std::optional<Checkpoint>& checkpoint) {
  if (!checkpoint) return "";
  return fmt::format("checkpoint: {{bandwidth: {} B/s, network: {}}}\n", checkpoint->bytes_per_s,
                     checkpoint->own_network ? "own" : "shared");
}

std::string plan_yaml(const Plan& plan) {
  std::vector<std::int64_t> layers;
  std::string mtp;
  for (std::size_t s = 0; s < plan.stages.size(); ++s) {
    layers.push_back(plan.stages[s].layers);
    if (plan.stages[s].mtp_modules > 0) mtp = fmt::format("mtp_stage: {}\n", s);
  }
  const std::string virtual_stages = plan.schedule == ScheduleKind::interleaved_1f1b
                                         ? fmt::format("virtual_stages: {}\n", plan.chunks)
                                         : "";
  return fmt::format(
      "layout: {}\nschedule: {}\n{}layers_per_stage: [{}]\n{}sequence_length: {}\nmicro_batch: {}\n"
      "global_batch: {}\nprecision: {}\nrecompute: {}\ncommunication_sms: {}\n{}{}",
      layout_yaml(plan.parallelism), name_of(plan.schedule), virtual_stages,
      fmt::join(layers, ", "), mtp, plan.sequence_length, plan.micro_batch_sequences,
      plan.global_batch_sequences, precision_yaml(plan.precision), recompute_yaml(plan.recompute),
      plan.communication_sms, checkpoint_yaml(plan.checkpoint), routing_yaml(plan.routing));
}

std::string overrides_yaml(const std::vector<std::string>& overrides) {
  if (overrides.empty()) return "";
  std::string out = "set:\n";
  for (const std::string& text : overrides) out += fmt::format("  - {}\n", in_quotes(text));
  return out;
}

}  // namespace

Scenario read_scenario_text(std::string text, const std::string& name, const std::string& directory,
                            const Overrides& overrides) {
  Problems problems;
  const Node root = read_document_text(std::move(text), name, problems, directory);
  Scenario scenario = read(root, name, overrides, problems);
  problems.throw_if_any();
  return scenario;
}

Scenario read_scenario(const std::string& path, const Overrides& overrides) {
  return ScenarioFile(path).read(overrides);
}

ScenarioFile::ScenarioFile(std::string path)
    : path_(std::move(path)), documents_(make_document_cache()) {}

Scenario ScenarioFile::read(const Overrides& overrides) const {
  Problems problems;
  const Node root = read_document(path_, problems, documents_);
  Scenario scenario = ::orrery::read(root, path_, overrides, problems);
  problems.throw_if_any();
  return scenario;
}

std::string to_yaml(const Scenario& scenario) {
  const std::string folder = fs::path(scenario.file).parent_path().string();
  return fmt::format(
      "name: {}\nseed: {}\nmodel:\n{}cluster:\n{}plan:\n{}{}{}{}{}", in_quotes(scenario.name),
      scenario.seed, indented(to_yaml(scenario.model)), indented(to_yaml(scenario.cluster, folder)),
      indented(plan_yaml(scenario.plan)),
      scenario.stragglers.empty() ? ""
                                  : fmt::format("stragglers: {}\n", to_yaml(scenario.stragglers)),
      scenario.reliability
          ? fmt::format("reliability:\n{}", indented(to_yaml(*scenario.reliability)))
          : "",
      scenario.training == Training()
          ? ""
          : fmt::format("training: {}\n", to_yaml(scenario.training, folder)),
      overrides_yaml(scenario.overrides));
}

}  // namespace orrery
