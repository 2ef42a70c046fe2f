#include "models/generation_scenario.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <utility>

#include "models/scenario.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kMostGpus = std::int64_t{1} << 20;
constexpr std::int64_t kMostTokens = std::int64_t{1} << 30;
constexpr std::int64_t kMostSequences = std::int64_t{1} << 20;

/// Reads the `generation` map. What other parts of the file say is null where it has problems.
class GenerationReader {
 public:
  GenerationReader(const Node& node, const Model* model, const Cluster* cluster,
                   const Device* device, Problems& problems)
      : reader_(node, problems, "generation"),
        model_(model),
        cluster_(cluster),
        device_(device),
        problems_(problems) {}

  void read(GenerationScenario& scenario) {
    if (reader_.node().kind() != Node::Kind::map) return;
    before_ = problems_.size();
    ServingPlan& plan = scenario.instance.plan;
    Workload& work = scenario.workload;
    read_phase(work);
    read_layout(plan);
    read_precision(plan);
    read_exchange(plan, work);
    read_speculation(plan);
    plan.usable_memory = share("usable_memory", 0.9);
    read_workload(work);
    if (reader_.has("rollout")) read_rollout(scenario);
    reader_.finish();
    if (problems_.size() > before_ || model_ == nullptr || cluster_ == nullptr) return;
    check_layout(plan);
    check_precision(plan);
    check_lengths(work);
    if (scenario.rollout) check_rollout(scenario);
  }

 private:
  Node place(std::string_view key) {
    const auto node = reader_.node().find(key);
    return node ? *node : reader_.node();
  }
  Node place(std::string_view map, std::string_view key) {
    const Node outer = place(map);
    const auto node = outer.find(key);
    return node ? *node : outer;
  }

  double share(std::string_view key, double fallback) {
    if (!reader_.has(key)) return fallback;
    const double value = reader_.quantity(key, Dimension::scalar);
    if (value > 1)
      problems_.add(reader_.at(key), fmt::format("a share of {:g} is more than all", value));
    return value;
  }

  void read_phase(Workload& work) {
    enum class Word { prefill, decode, both };
    const Word word = reader_.choice_or<Word>(
        "phase", Word::both,
        {{"prefill", Word::prefill}, {"decode", Word::decode}, {"both", Word::both}});
    work.prefill = word != Word::decode;
    work.decode = word != Word::prefill;
  }

  void read_layout(ServingPlan& plan) {
    if (!reader_.has("layout")) return;
    MapReader map(reader_.at("layout"), problems_, "generation.layout");
    plan.tp = map.integer_or("tp", 1, 1, kMostGpus);
    plan.ep = map.integer_or("ep", 1, 1, kMostGpus);
    plan.dp = map.integer_or("dp", std::max<std::int64_t>(1, plan.ep / plan.tp), 1, kMostGpus);
    plan.redundant_experts = map.integer_or("redundant_experts", 0, 0, kMostGpus);
    map.finish();
  }

  void read_precision(ServingPlan& plan) {
    if (!reader_.has("precision")) return;
    const Node node = reader_.at("precision");
    if (node.kind() == Node::Kind::scalar) {
      const bool fp8 = reader_.choice<bool>("precision", {{"bf16", false}, {"fp8", true}});
      if (fp8) plan.linear = plan.dispatch = NumberFormat::fp8_block;
      return;
    }
    MapReader map(node, problems_, "generation.precision");
    const auto format = [&](const char* key) {
      return map.choice_or<NumberFormat>(key, NumberFormat::bf16,
                                         {{"bf16", NumberFormat::bf16},
                                          {"fp8_tensor", NumberFormat::fp8_tensor},
                                          {"fp8_block", NumberFormat::fp8_block}});
    };
    plan.linear = format("linear");
    plan.cache = format("cache");
    plan.dispatch = format("dispatch");
    map.finish();
  }

  void read_exchange(ServingPlan& plan, const Workload& work) {
    plan.decode_exchange = reader_.choice_or<ExchangeMode>(
        "exchange", plan.ep > 1 ? ExchangeMode::low_latency : ExchangeMode::normal,
        {{"normal", ExchangeMode::normal}, {"low_latency", ExchangeMode::low_latency}});
    const bool normal = work.prefill || plan.decode_exchange == ExchangeMode::normal;
    const bool holds = plan.ep > 1 && normal;
    plan.communication_sms =
        static_cast<int>(reader_.integer_or("communication_sms", holds ? 20 : 0, 1, 1024));
    for (const char* key : {"exchange", "communication_sms"}) {
      if (plan.ep == 1 && reader_.has(key)) {
        problems_.add(reader_.at(key), fmt::format("'{}' needs experts on other GPUs", key),
                      "say ep in layout");
      }
    }
    if (!normal && plan.ep > 1 && reader_.has("communication_sms")) {
      problems_.add(reader_.at("communication_sms"), "low-latency exchanges hold no SMs");
    }
    if (device_ != nullptr && plan.communication_sms >= device_->sms) {
      problems_.add(place("communication_sms"),
                    fmt::format("communication_sms {} leaves none of the {} SMs of {}",
                                plan.communication_sms, device_->sms, device_->name));
    }
    plan.micro_batches = reader_.integer_or("micro_batches", 1, 1, 2);
    plan.busiest = reader_.number_or("busiest", 1, 1, 1000);
  }

  void read_speculation(ServingPlan& plan) {
    if (!reader_.has("mtp")) return;
    MapReader map(reader_.at("mtp"), problems_, "generation.mtp");
    plan.speculation.drafts = map.integer_or("drafts", 1, 1, 16);
    plan.speculation.acceptance = map.quantity("acceptance", Dimension::scalar);
    map.finish();
    if (plan.speculation.acceptance > 1) {
      problems_.add(map.at("acceptance"), fmt::format("a probability of {:g} is more than 1",
                                                      plan.speculation.acceptance));
    }
    if (model_ != nullptr && model_->mtp_modules == 0) {
      problems_.add(reader_.at("mtp"),
                    fmt::format("{} has no MTP module to draft with", model_->name));
    }
  }

  void read_workload(Workload& work) {
    work.prompt = reader_.integer("prompt", 1, kMostTokens);
    work.cached = reader_.integer_or("cached", 0, 0, kMostTokens);
    work.output = work.decode ? reader_.integer("output", 1, kMostTokens)
                              : reader_.integer_or("output", 1, 1, kMostTokens);
    if (reader_.has("context")) work.context = reader_.integer("context", 1, kMostTokens);
    work.prompts = reader_.integer_or("prompts", 1, 1, kMostSequences);
    if (reader_.has("batch")) {
      const Node batch = reader_.at("batch");
      const bool most = batch.kind() == Node::Kind::scalar && batch.text() == "max";
      if (!most) work.batch = reader_.integer("batch", 1, kMostSequences);
    }
    if (reader_.has("contexts")) work.contexts = reader_.integers("contexts", 0, kMostTokens);
    work.dollars_per_gpu_hour = reader_.quantity_or("dollars_per_gpu_hour", 0, Dimension::dollars);
    if (work.cached >= work.prompt && reader_.has("cached") && reader_.has("prompt")) {
      problems_.add(
          reader_.at("cached"),
          fmt::format("{} of {} tokens cached leave none to prefill", work.cached, work.prompt),
          "the last token's logits are always computed");
    }
  }

  // ---- rollout

  std::optional<LengthDistribution> read_lengths(MapReader& map) {
    const Node node = map.require("output");
    if (node.kind() == Node::Kind::scalar) {
      return fixed_length(map.integer("output", 1, kMostTokens));
    }
    if (node.kind() == Node::Kind::map) {
      MapReader lengths(node, problems_, "generation.rollout.output");
      const std::size_t before = problems_.size();
      const auto mean = lengths.integer("mean", 1, kMostTokens);
      const auto p95 = lengths.integer("p95", 1, kMostTokens);
      const auto most = lengths.integer("most", 1, kMostTokens);
      lengths.finish();
      if (problems_.size() > before) return std::nullopt;
      const double ratio = static_cast<double>(p95) / static_cast<double>(mean);
      if (ratio < 1 || ratio > kMostSkewed) {
        problems_.add(
            lengths.at("p95"),
            fmt::format("no log-normal distribution of mean {} has a 95th percentile of {}", mean,
                        p95),
            fmt::format("it lies between the mean and {:.2f} times the mean; or list "
                        "[[tokens, share], ...]",
                        kMostSkewed));
        return std::nullopt;
      }
      if (most < p95) {
        problems_.add(lengths.at("most"), fmt::format("most {} is below p95 {}", most, p95));
        return std::nullopt;
      }
      return log_normal_length(static_cast<double>(mean), static_cast<double>(p95), most);
    }
    return read_histogram(node);
  }

  std::optional<LengthDistribution> read_histogram(const Node& node) {
    if (node.kind() == Node::Kind::null) return std::nullopt;
    if (node.kind() != Node::Kind::sequence || node.size() == 0) {
      problems_.add(node, "output must be tokens, {mean, p95, most}, or a list of [tokens, share]");
      return std::nullopt;
    }
    LengthDistribution lengths;
    double sum = 0;
    const std::size_t before = problems_.size();
    for (std::size_t i = 0; i < node.size(); ++i) {
      if (node[i].kind() != Node::Kind::sequence || node[i].size() != 2) {
        problems_.add(node[i], "expected [tokens, share]");
        continue;
      }
      const auto tokens = read_integer(node[i][0], problems_, 1, kMostTokens);
      const auto share = read_quantity(node[i][1], problems_, Dimension::scalar);
      if (!tokens || !share) continue;
      if (!lengths.bins.empty() && *tokens <= lengths.bins.back().tokens) {
        problems_.add(node[i], "lengths must ascend");
      }
      lengths.bins.push_back({*tokens, *share});
      sum += *share;
    }
    if (problems_.size() > before) return std::nullopt;
    if (std::abs(sum - 1) > 1e-3) {
      problems_.add(node, fmt::format("the shares sum up to {:g}, not 1", sum));
      return std::nullopt;
    }
    for (auto& bin : lengths.bins) bin.share /= sum;
    return lengths;
  }

  void read_rollout(GenerationScenario& scenario) {
    MapReader map(reader_.at("rollout"), problems_, "generation.rollout");
    RolloutWork work;
    work.prompts = map.integer("prompts", 1, kMostSequences);
    work.outputs_per_prompt = map.integer_or("outputs_per_prompt", 1, 1, kMostSequences);
    work.prompt_tokens = scenario.workload.prompt;
    scenario.rollout_instances = map.integer_or("instances", 0, 1, kMostGpus);
    const auto lengths = read_lengths(map);
    map.finish();
    if (lengths) work.output = *lengths;
    if (scenario.workload.batch) work.most_sequences = *scenario.workload.batch;
    scenario.rollout = work;
  }

  // ---- what no single key shows

  void divides(const Node& where, const char* what, std::int64_t parts, const char* of,
               std::int64_t whole) {
    if (whole % parts == 0) return;
    problems_.add(where, fmt::format("{} {} does not divide {} {}", what, parts, of, whole));
  }

  void check_layout(const ServingPlan& plan) {
    const Node layout = place("layout");
    const Attention& a = model_->attention;
    const Node tp = place("layout", "tp");
    divides(tp, "tp", plan.tp, "heads", a.heads);
    if (!a.mla && plan.tp <= a.kv_heads) {
      divides(tp, "tp", plan.tp, "key-value heads", a.kv_heads);
    } else if (!a.mla && plan.tp % a.kv_heads != 0) {
      problems_.add(tp,
                    fmt::format("tp {} is no multiple of {} key-value heads", plan.tp, a.kv_heads));
    }
    if (model_->intermediate > 0) divides(tp, "tp", plan.tp, "intermediate", model_->intermediate);
    const Node ep = place("layout", "ep");
    if (!model_->moe) {
      if (plan.ep > 1)
        problems_.add(ep, fmt::format("ep {}, but {} has no experts", plan.ep, model_->name));
      if (plan.redundant_experts > 0) {
        problems_.add(place("layout", "redundant_experts"),
                      fmt::format("{} has no experts", model_->name));
      }
    } else {
      const std::int64_t copies = model_->moe->routed_experts + plan.redundant_experts;
      if (plan.ep == 1 && plan.redundant_experts > 0) {
        problems_.add(place("layout", "redundant_experts"),
                      "with all experts on every GPU there is nothing to copy", "say ep in layout");
      }
      if (plan.ep == 1)
        divides(tp, "tp", plan.tp, "expert_intermediate", model_->moe->expert_intermediate);
      if (copies % plan.ep != 0) {
        problems_.add(
            ep, fmt::format("ep {} does not divide {} experts and {} redundant ones ({})", plan.ep,
                            model_->moe->routed_experts, plan.redundant_experts, copies));
      }
      if (plan.gpus() % plan.ep != 0) {
        problems_.add(ep, fmt::format("ep {} does not divide tp {} x dp {} = {} GPUs", plan.ep,
                                      plan.tp, plan.dp, plan.gpus()));
      }
    }
    if (plan.gpus() > cluster_->gpus()) {
      problems_.add(layout, fmt::format("tp {} x dp {} = {} GPUs, but {} has {}", plan.tp, plan.dp,
                                        plan.gpus(), cluster_->name, cluster_->gpus()));
    }
    if (plan.gpus() > cluster_->gpus_per_node && plan.gpus() % cluster_->gpus_per_node != 0) {
      problems_.add(layout, fmt::format("{} GPUs are no whole nodes of {}", plan.gpus(),
                                        cluster_->gpus_per_node));
    }
  }

  void check_precision(const ServingPlan& plan) {
    if (device_ == nullptr || device_->fp8_flops_per_s > 0) return;
    if (plan.linear != NumberFormat::bf16) {
      problems_.add(place("precision"), fmt::format("{} has no FP8", device_->name));
    }
  }

  void check_lengths(const Workload& work) {
    const std::int64_t longest = work.prompt + (work.decode ? work.output : 0);
    if (longest > model_->max_positions) {
      problems_.add(place("prompt"),
                    fmt::format("{} tokens of prompt and output, but {} has {} positions", longest,
                                model_->name, model_->max_positions));
    }
  }

  void check_rollout(GenerationScenario& scenario) {
    RolloutWork& work = *scenario.rollout;
    const std::int64_t fit = cluster_->gpus() / scenario.instance.plan.gpus();
    if (scenario.rollout_instances == 0) scenario.rollout_instances = fit;
    if (scenario.rollout_instances > fit) {
      problems_.add(
          place("rollout", "instances"),
          fmt::format("{} instances of {} GPUs, but {} has {}", scenario.rollout_instances,
                      scenario.instance.plan.gpus(), cluster_->name, cluster_->gpus()));
    }
    if (work.prompt_tokens + work.output.longest() > model_->max_positions) {
      problems_.add(place("rollout", "output"),
                    fmt::format("prompt {} and the longest output {} exceed the {} positions of {}",
                                work.prompt_tokens, work.output.longest(), model_->max_positions,
                                model_->name));
    }
  }

  MapReader reader_;
  const Model* model_;
  const Cluster* cluster_;
  const Device* device_;
  Problems& problems_;
  std::size_t before_ = 0;
};

GenerationScenario read(const Node& document, const std::string& file, const Overrides& given,
                        Problems& problems) {
  GenerationScenario scenario;
  scenario.file = file;
  if (document.at().file.empty()) return scenario;  // and the problem is known
  const Node root = with_scenario_overrides(document, given, problems);
  MapReader reader(root, problems, "the scenario");
  if (root.kind() != Node::Kind::map) return scenario;
  Scenario parts;
  const IntactParts intact = read_parts(reader, parts);
  GenerationReader(reader.require("generation"), intact.model ? &parts.model : nullptr,
                   intact.cluster ? &parts.cluster : nullptr,
                   intact.device ? &parts.profile.device : nullptr, problems)
      .read(scenario);
  for (const char* key : {"plan", "stragglers", "training", "reliability", "search", "set"}) reader.allow(key);
  reader.finish();
  if (problems.empty()) report_without_effect(root, problems);
  scenario.name = std::move(parts.name);
  scenario.notes = std::move(parts.notes);
  scenario.instance.model = std::move(parts.model);
  scenario.instance.cluster = std::move(parts.cluster);
  scenario.instance.profile = std::move(parts.profile);
  return scenario;
}

}  // namespace

GenerationScenario read_generation(const std::string& path, const Overrides& overrides) {
  Problems problems;
  GenerationScenario scenario = read(read_document(path, problems), path, overrides, problems);
  problems.throw_if_any();
  return scenario;
}

GenerationScenario read_generation(const Node& root, const Overrides& overrides,
                                   Problems& problems) {
  return read(root, root.at().file, overrides, problems);
}

GenerationScenario read_generation_text(std::string text, const std::string& name,
                                        const std::string& directory) {
  Problems problems;
  GenerationScenario scenario =
      read(read_document_text(std::move(text), name, problems, directory), name, {}, problems);
  problems.throw_if_any();
  return scenario;
}

}  // namespace orrery
