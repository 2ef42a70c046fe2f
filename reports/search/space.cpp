#include "reports/search/space.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <map>
#include <optional>
#include <string_view>
#include <utility>

#include "models/plan_rules.hpp"
#include "sim/overrides.hpp"

namespace orrery {
namespace {

template <class E>
using Words = std::initializer_list<std::pair<std::string_view, E>>;

const Words<ScheduleKind> kSchedules = {{"gpipe", ScheduleKind::gpipe},
                                        {"1f1b", ScheduleKind::one_f_one_b},
                                        {"interleaved_1f1b", ScheduleKind::interleaved_1f1b},
                                        {"zb_h1", ScheduleKind::zb_h1},
                                        {"zb_v", ScheduleKind::zb_v},
                                        {"dual_pipe", ScheduleKind::dual_pipe},
                                        {"dual_pipe_v", ScheduleKind::dual_pipe_v}};
const Words<PrecisionKind> kRecipes = {{"fp32", PrecisionKind::fp32},
                                       {"bf16", PrecisionKind::bf16},
                                       {"fp8_tensor", PrecisionKind::fp8_tensor},
                                       {"fp8_deepseek", PrecisionKind::fp8_deepseek}};
constexpr Recompute kSelective = {.attention_core = true};
constexpr Recompute kFull = {.full = true};
constexpr Recompute kDeepSeek = {.norms = true, .mla_up_projection = true, .activation = true};
const Words<Recompute> kRecomputes = {
    {"none", {}}, {"selective", kSelective}, {"full", kFull}, {"deepseek", kDeepSeek}};

std::vector<std::int64_t> powers_of_two(std::int64_t up_to) {
  std::vector<std::int64_t> powers;
  for (std::int64_t n = 1; n <= up_to; n *= 2) powers.push_back(n);
  return powers;
}

std::vector<std::int64_t> divisors(std::int64_t n, std::int64_t up_to) {
  std::vector<std::int64_t> all;
  for (std::int64_t d = 1; d <= std::min(n, up_to); ++d) {
    if (n % d == 0) all.push_back(d);
  }
  return all;
}

/// Sorted, each once.
template <class T>
void canonical(std::vector<T>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

/// In order of first appearance, each once.
template <class T>
std::vector<T> distinct(std::vector<T> values) {
  std::vector<T> kept;
  for (T& value : values) {
    if (std::find(kept.begin(), kept.end(), value) == kept.end()) kept.push_back(std::move(value));
  }
  return kept;
}

/// A word or a list of words as values, in order of appearance.
template <class E>
std::vector<E> read_words(MapReader& reader, std::string_view key, Words<E> words) {
  std::vector<E> values;
  std::vector<Node> nodes;
  const Node value = reader.at(key);
  if (value.kind() == Node::Kind::sequence) {
    for (std::size_t i = 0; i < value.size(); ++i) nodes.push_back(value[i]);
  } else {
    nodes.push_back(value);
  }
  std::vector<std::string> names;
  for (const auto& word : words) names.emplace_back(word.first);
  for (const Node& node : nodes) {
    const std::string text = node.kind() == Node::Kind::scalar ? node.text() : "";
    const auto known = std::find(names.begin(), names.end(), text);
    if (known != names.end()) {
      values.push_back((words.begin() + (known - names.begin()))->second);
      continue;
    }
    const auto near = nearest(text, names);
    reader.problems().add(node, fmt::format("'{}' lists words of {}", key, fmt::join(names, ", ")),
                          near ? fmt::format("did you mean '{}'?", *near) : "");
  }
  if (values.empty() && nodes.empty()) {
    reader.problems().add(value, fmt::format("'{}' is empty: nothing to choose from", key));
  }
  return distinct(std::move(values));
}

SearchSpace read_map(const Node& node, const Scenario& scenario, Problems& problems) {
  SearchSpace space = default_space(scenario);
  MapReader reader(node, problems, "search");
  const auto numbers = [&](std::string_view key, std::int64_t min, std::int64_t max,
                           std::vector<std::int64_t>& values) {
    if (!reader.has(key)) return;
    const std::size_t before = problems.size();
    std::vector<std::int64_t> read = reader.at(key).kind() == Node::Kind::scalar
                                         ? std::vector{reader.integer(key, min, max)}
                                         : reader.integers(key, min, max);
    if (problems.size() > before) return;
    if (read.empty()) {
      problems.add(reader.at(key), fmt::format("'{}' is empty: nothing to choose from", key));
      return;
    }
    canonical(read);
    values = std::move(read);
  };
  numbers("nodes", 1, kMaxGpus / scenario.cluster.gpus_per_node, space.nodes);
  if (reader.has("nodes")) {  // what else follows from the GPUs
    space.pp.clear();
    for (const std::int64_t nodes : space.nodes) {
      const auto more = divisors(nodes * scenario.cluster.gpus_per_node, scenario.model.layers);
      space.pp.insert(space.pp.end(), more.begin(), more.end());
    }
    canonical(space.pp);
    if (space.nodes.back() > 1 && scenario.cluster.nic_peak_bytes_per_s == 0) {
      problems.add(reader.at("nodes"), fmt::format("several nodes, but cluster '{}' has no nic",
                                                   scenario.cluster.name));
    }
  }
  numbers("tp", 1, kMaxGpus, space.tp);
  numbers("cp", 1, kMaxGpus, space.cp);
  numbers("pp", 1, kMaxGpus, space.pp);
  numbers("ep", 1, kMaxGpus, space.ep);
  numbers("expert_tp", 1, kMaxGpus, space.expert_tp);
  numbers("zero", 0, 3, space.zero);
  numbers("micro_batch", 1, kMaxMicroBatchTokens, space.micro_batch);
  numbers("virtual_stages", 2, kMaxVirtualStages, space.virtual_stages);
  numbers("lighter_last", 0, kMaxVirtualStages, space.lighter_last);
  numbers("communication_sms", 0, 1 << 16, space.communication_sms);
  if (reader.has("schedule")) space.schedules = read_words(reader, "schedule", kSchedules);
  if (reader.has("precision")) {
    space.precisions.clear();
    for (const PrecisionKind kind : read_words(reader, "precision", kRecipes)) {
      // The scenario's own may differ in single formats.
      const Precision& own = scenario.plan.precision;
      space.precisions.push_back(own.kind == kind ? own : make_precision(kind));
      for (const Impossible& i :
           check_precision(space.precisions.back(), scenario.profile.device)) {
        problems.add(reader.at("precision"), i.why, i.hint);
      }
    }
  }
  if (reader.has("recompute")) {
    space.recomputes = read_words(reader, "recompute", kRecomputes);
    for (const Recompute& recompute : space.recomputes) {
      for (const Impossible& i : check_recompute(recompute, scenario.model)) {
        problems.add(reader.at("recompute"), i.why, i.hint);
      }
    }
  }
  if (reader.has("communication_sms") && !space.communication_sms.empty()) {
    for (const Impossible& i : check_communication_sms(
             static_cast<int>(space.communication_sms.back()), scenario.profile.device)) {
      problems.add(reader.at("communication_sms"), i.why, i.hint);
    }
  }
  reader.finish();
  return space;
}

std::string split_text(const std::vector<StageContents>& stages) {
  std::string text;
  for (std::size_t s = 0; s < stages.size();) {
    std::size_t end = s;
    while (end < stages.size() && stages[end].layers == stages[s].layers) ++end;
    if (!text.empty()) text += ',';
    text += end - s > 1 ? fmt::format("{}x{}", end - s, stages[s].layers)
                        : fmt::format("{}", stages[s].layers);
    s = end;
  }
  for (std::size_t s = 0; s + 1 < stages.size(); ++s) {
    if (stages[s].mtp_modules > 0) text += fmt::format(" mtp{}", s);
  }
  return text;
}

std::string recompute_text(const Recompute& r) {
  if (r.full) return "full";
  if (r == kDeepSeek) return "deepseek";
  if (r == kSelective) return "selective";
  std::string text;
  const auto add = [&](bool on, std::string_view word) {
    if (on) text += fmt::format("{}{}", text.empty() ? "" : "+", word);
  };
  add(r.norms, "norms");
  add(r.mla_up_projection, "mla_up_projection");
  add(r.activation, "activation");
  add(r.attention_core, "attention_core");
  return text.empty() ? "none" : text;
}

/// The recipe, and what differs from it.
std::string precision_text(const Precision& p) {
  const Precision recipe = make_precision(p.kind);
  std::string text(name_of(p.kind));
  const auto add = [&](std::string_view name, NumberFormat format, NumberFormat usual) {
    if (format != usual) text += fmt::format("+{}={}", name, name_of(format));
  };
  const auto add_bytes = [&](std::string_view name, std::int64_t bytes, std::int64_t usual) {
    if (bytes != usual) text += fmt::format("+{}={}B", name, bytes);
  };
  add("activations", p.activations, recipe.activations);
  add("linear", p.linear, recipe.linear);
  add("saved", p.saved, recipe.saved);
  add("saved_attention", p.saved_attention, recipe.saved_attention);
  add("dispatch", p.dispatch, recipe.dispatch);
  add("combine", p.combine, recipe.combine);
  add_bytes("parameters", p.parameter_bytes, recipe.parameter_bytes);
  add_bytes("gradients", p.gradient_bytes, recipe.gradient_bytes);
  add_bytes("gradient_sync", p.gradient_sync_bytes, recipe.gradient_sync_bytes);
  add_bytes("master", p.master_bytes, recipe.master_bytes);
  add_bytes("moments", p.moment_bytes, recipe.moment_bytes);
  return text;
}

int chunks_of(ScheduleKind schedule) {
  switch (schedule) {
    case ScheduleKind::zb_v:
    case ScheduleKind::dual_pipe:
    case ScheduleKind::dual_pipe_v:
      return 2;
    default:
      return 1;
  }
}

/// The scenario's `search:` section, which may be the name of a file; null if there is none.
Node search_section(const Scenario& scenario, Problems& problems) {
  const Node& section = scenario.search;
  if (section.kind() != Node::Kind::scalar) return section;
  const std::filesystem::path folder = std::filesystem::path(scenario.file).parent_path();
  return read_named_document(section, (folder / section.text()).lexically_normal().string(),
                             problems);
}

}  // namespace

SearchSpace default_space(const Scenario& scenario) {
  const Model& model = scenario.model;
  const Plan& plan = scenario.plan;
  const std::int64_t gpus = scenario.cluster.gpus();
  SearchSpace space;
  space.nodes = {scenario.cluster.nodes};
  space.tp = powers_of_two(scenario.cluster.gpus_per_node);
  space.cp = powers_of_two(std::max<std::int64_t>(1, plan.sequence_length / 8192));
  space.pp = divisors(gpus, model.layers);
  space.ep = {1};
  if (model.moe) {
    space.ep = powers_of_two(model.moe->routed_experts);
    space.ep.push_back(model.moe->routed_experts);
    canonical(space.ep);
  }
  space.expert_tp = {1};
  space.zero = {1, 2, 3};
  space.micro_batch = powers_of_two(8);
  for (const auto& [word, kind] : kSchedules) space.schedules.push_back(kind);
  space.virtual_stages = powers_of_two(model.layers);
  space.virtual_stages.erase(space.virtual_stages.begin());
  if (space.virtual_stages.empty()) space.virtual_stages = {2};
  space.lighter_last = {0, 1, 2, 3};
  space.precisions = {plan.precision};
  space.recomputes = distinct<Recompute>({{}, kSelective, kFull, plan.recompute});
  if (model.attention.mla) {
    space.recomputes.push_back(kDeepSeek);
    space.recomputes = distinct(std::move(space.recomputes));
  }
  // DeepEP's default (deepseek-ai/DeepEP@ebfe47e4, Buffer.num_sms) leaves 24 to its kernels. With
  // 0, exchanges beside computation would have all SMs, and the computation as well.
  const bool needs_some = model.moe && plan.communication_sms == 0;
  space.communication_sms = {needs_some ? 24 : plan.communication_sms};
  return space;
}

SearchSpace read_search_space(const Scenario& scenario) {
  Problems problems;
  const Node section = search_section(scenario, problems);
  SearchSpace space = section.kind() == Node::Kind::null && problems.empty()
                          ? default_space(scenario)
                          : read_map(section, scenario, problems);
  problems.throw_if_any();
  return space;
}

SearchSpace read_search_space(const std::string& path, const Scenario& scenario) {
  Problems problems;
  SearchSpace space = read_map(read_document(path, problems), scenario, problems);
  problems.throw_if_any();
  return space;
}

std::string key_of(const Candidate& candidate) {
  const Plan& plan = candidate.plan;
  const Parallelism& p = plan.parallelism;
  return fmt::format(
      "n{} tp{}{} cp{} pp{} dp{} ep{} etp{} z{} mb{} {}{} L{} {} r={} sms{}", candidate.nodes, p.tp,
      p.sequence_parallel ? "" : "-nosp", p.cp, p.pp, p.dp, p.ep, p.expert_tp, p.zero_stage,
      plan.micro_batch_sequences, name_of(plan.schedule),
      plan.schedule == ScheduleKind::interleaved_1f1b ? fmt::format(" v{}", plan.chunks) : "",
      split_text(plan.stages), precision_text(plan.precision), recompute_text(plan.recompute),
      plan.communication_sms);
}

Scenario with_candidate(const Scenario& scenario, const Candidate& candidate) {
  Scenario changed = scenario;
  changed.plan = candidate.plan;
  if (candidate.nodes != scenario.cluster.nodes) {
    changed.cluster.nodes = candidate.nodes;
    // A fabric has the nodes of its cluster or more.
    if (candidate.nodes > scenario.cluster.nodes) changed.fabric = nullptr;
  }
  return changed;
}

/// Fills `choices` and `splits`, decision by decision: each is checked as soon as all that a rule
/// compares is there.
class Candidates::Enumeration {
 public:
  explicit Enumeration(Candidates& to)
      : to_(to), scenario_(to.scenario_), space_(to.space_), plan_(scenario_.plan) {}

  // From what cells depend on (layout inside a position, kernels, micro-batch) to what they do not
  // (schedule, split), so that neighbours share most of their work.
  void run() {
    Parallelism& p = plan_.parallelism;
    for (const std::int64_t nodes : space_.nodes) {
      cluster_ = scenario_.cluster;
      cluster_.nodes = choice_.nodes = nodes;
      for (const std::int64_t tp : space_.tp) {
        for (const std::int64_t cp : space_.cp) {
          for (const std::int64_t ep : space_.ep) {
            for (const std::int64_t expert_tp : space_.expert_tp) {
              p.tp = tp;
              p.cp = cp;
              p.ep = ep;
              p.expert_tp = expert_tp;
              if (check_split_of_model(p, scenario_.model).empty()) add_kernels();
            }
          }
        }
      }
    }
  }

 private:
  void add_kernels() {
    // Without an exchange there is nothing to give SMs to.
    const bool exchanges = plan_.parallelism.ep > 1;
    const std::vector<std::int64_t> none = {0};
    for (const std::int64_t sms : exchanges ? space_.communication_sms : none) {
      plan_.communication_sms = static_cast<int>(sms);
      for (std::size_t i = 0; i < space_.precisions.size(); ++i) {
        choice_.precision = static_cast<std::int16_t>(i);
        for (std::size_t r = 0; r < space_.recomputes.size(); ++r) {
          choice_.recompute = static_cast<std::int16_t>(r);
          for (const std::int64_t micro_batch : space_.micro_batch) {
            plan_.micro_batch_sequences = micro_batch;
            if (!check_tokens(plan_).empty()) continue;
            for (const std::int64_t zero : space_.zero) {
              plan_.parallelism.zero_stage = static_cast<int>(zero);
              add_pipelines();
            }
          }
        }
      }
    }
  }

  void add_pipelines() {
    Parallelism& p = plan_.parallelism;
    for (const std::int64_t pp : space_.pp) {
      p.pp = pp;
      if (!check_world(p, false, cluster_).empty() || !check_expert_block(p).empty() ||
          !check_batch(plan_).empty() || !check_sequence_split(plan_).empty()) {
        continue;
      }
      for (const ScheduleKind schedule : space_.schedules) {
        plan_.schedule = schedule;
        plan_.chunks = chunks_of(schedule);
        if (schedule != ScheduleKind::interleaved_1f1b) {
          add_splits();
          continue;
        }
        for (const std::int64_t chunks : space_.virtual_stages) {
          plan_.chunks = static_cast<int>(chunks);
          add_splits();
        }
      }
    }
  }

  void add_splits() {
    const Model& model = scenario_.model;
    if (!check_schedule(plan_).empty() || !check_even_split(plan_, model).empty()) return;
    if (same_as_less_zero()) return;
    const std::int64_t stages = stage_count(plan_);
    for (const std::int64_t lighter : space_.lighter_last) {
      const std::int64_t last = model.layers / stages - lighter;
      if (lighter > 0 && (last < 0 || stages == 1)) continue;
      const std::pair key{stages, lighter};
      const auto [known, inserted] = split_of_.try_emplace(key, -1);
      if (inserted) {
        std::vector<std::int64_t> layers = even_split(model.layers, stages);
        if (lighter > 0) {
          layers = even_split(model.layers - last, stages - 1);
          layers.push_back(last);
        }
        std::vector<StageContents> split;
        if (check_stages(plan_, layers, -1, model, split).empty()) {
          known->second = static_cast<std::int32_t>(to_.splits_.size());
          to_.splits_.push_back(std::move(split));
        }
      }
      if (known->second >= 0) add(known->second);
    }
  }

  /// With one copy of all parameters every ZeRO stage is the same.
  bool same_as_less_zero() const {
    const Parallelism& p = plan_.parallelism;
    const std::int64_t expert_copies = p.ranks_per_position() / (p.ep * p.expert_tp);
    return p.zero_stage > space_.zero.front() && p.dp * p.cp == 1 && expert_copies == 1 &&
           plan_.schedule != ScheduleKind::dual_pipe;
  }

  void add(std::int32_t split) {
    const Parallelism& p = plan_.parallelism;
    Choice choice = choice_;
    choice.tp = static_cast<std::int32_t>(p.tp);
    choice.cp = static_cast<std::int32_t>(p.cp);
    choice.pp = static_cast<std::int32_t>(p.pp);
    choice.dp = static_cast<std::int32_t>(p.dp);
    choice.ep = static_cast<std::int32_t>(p.ep);
    choice.expert_tp = static_cast<std::int32_t>(p.expert_tp);
    choice.micro_batch = static_cast<std::int32_t>(plan_.micro_batch_sequences);
    choice.split = split;
    choice.zero = static_cast<std::int8_t>(p.zero_stage);
    choice.schedule = plan_.schedule;
    choice.chunks = static_cast<std::int16_t>(plan_.chunks);
    choice.communication_sms = static_cast<std::int16_t>(plan_.communication_sms);
    if (is_own(choice)) return;
    to_.choices_.push_back(choice);
  }

  bool is_own(const Choice& choice) const {
    const Parallelism& own = scenario_.plan.parallelism;
    return choice.pp == own.pp && choice.tp == own.tp && choice.ep == own.ep &&
           to_.candidate(choice) == to_.at(0);
  }

  Candidates& to_;
  const Scenario& scenario_;
  const SearchSpace& space_;
  Plan plan_;
  Cluster cluster_;
  Choice choice_;
  std::map<std::pair<std::int64_t, std::int64_t>, std::int32_t> split_of_;
};

Candidates::Candidates(const Scenario& scenario, const SearchSpace& space)
    : scenario_(scenario), space_(space) {
  const auto count = [](const auto& values) { return static_cast<std::uint64_t>(values.size()); };
  std::uint64_t schedules = 0;  // with their virtual stages
  for (const ScheduleKind s : space_.schedules) {
    schedules += s == ScheduleKind::interleaved_1f1b ? count(space_.virtual_stages) : 1;
  }
  combinations_ = count(space_.nodes) * count(space_.tp) * count(space_.cp) * count(space_.pp) *
                  count(space_.ep) * count(space_.expert_tp) * count(space_.zero) *
                  count(space_.micro_batch) * schedules * count(space_.lighter_last) *
                  count(space_.precisions) * count(space_.recomputes) *
                  count(space_.communication_sms);
  Enumeration(*this).run();
}

bool Candidates::own_is_in_space() const {
  return std::find(space_.nodes.begin(), space_.nodes.end(), scenario_.cluster.nodes) !=
         space_.nodes.end();
}

Candidate Candidates::at(std::size_t index) const {
  if (index == 0) return {.nodes = scenario_.cluster.nodes, .plan = scenario_.plan};
  return candidate(choices_[index - 1]);
}

Candidate Candidates::candidate(const Choice& choice) const {
  Candidate made{.nodes = choice.nodes, .plan = scenario_.plan};
  Plan& plan = made.plan;
  plan.parallelism.tp = choice.tp;
  plan.parallelism.cp = choice.cp;
  plan.parallelism.pp = choice.pp;
  plan.parallelism.dp = choice.dp;
  plan.parallelism.ep = choice.ep;
  plan.parallelism.expert_tp = choice.expert_tp;
  plan.parallelism.zero_stage = choice.zero;
  plan.schedule = choice.schedule;
  plan.chunks = choice.chunks;
  plan.stages = splits_[static_cast<std::size_t>(choice.split)];
  plan.micro_batch_sequences = choice.micro_batch;
  plan.precision = space_.precisions[static_cast<std::size_t>(choice.precision)];
  plan.recompute = space_.recomputes[static_cast<std::size_t>(choice.recompute)];
  plan.communication_sms = choice.communication_sms;
  return made;
}

}  // namespace orrery
