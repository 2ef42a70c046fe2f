#include "models/plan_rules.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>
#include <string_view>
#include <tuple>
#include <utility>

namespace orrery {

namespace {

bool is_fp8(NumberFormat format) {
  return format == NumberFormat::fp8_tensor || format == NumberFormat::fp8_block;
}

}  // namespace

WhyImpossible check_precision(const Precision& precision, const Device& device) {
  if (!is_fp8(precision.linear) || device.fp8_flops_per_s != 0) return {};
  return {{PlanKey::precision,
           fmt::format("{} has no FP8 arithmetic, which the linear layers of this precision need",
                       device.name),
           "precision: bf16 would run"}};
}

WhyImpossible check_recompute(const Recompute& recompute, const Model& model) {
  if (!recompute.mla_up_projection || model.attention.mla) return {};
  return {{PlanKey::recompute,
           fmt::format("mla_up_projection cannot be recomputed: {} has no latent attention",
                       model.name),
           ""}};
}

WhyImpossible check_communication_sms(int communication_sms, const Device& device) {
  if (communication_sms < device.sms) return {};
  return {{PlanKey::communication_sms,
           fmt::format("communication_sms {} leaves no SM to compute: {} has {}", communication_sms,
                       device.name, device.sms),
           ""}};
}

WhyImpossible check_world(Parallelism& p, bool dp_given, const Cluster& cluster) {
  const std::int64_t gpus = cluster.gpus();
  std::int64_t model_copy = 1;  // GPUs of one; bounded before each product
  for (const std::int64_t degree : {p.tp, p.cp, p.pp}) {
    if (model_copy <= kMaxGpus) model_copy *= degree;
  }
  if (model_copy > kMaxGpus) {
    return {{PlanKey::layout,
             fmt::format("tp x cp x pp = {} x {} x {} is more than {} GPUs, cluster '{}' has {}",
                         p.tp, p.cp, p.pp, kMaxGpus, cluster.name, gpus),
             ""}};
  }
  if (!dp_given) {
    if (gpus % model_copy != 0) {
      return {{PlanKey::layout,
               fmt::format("no dp uses all GPUs of cluster '{}': {} / (tp x cp x pp = {} x {} x {} "
                           "= {}) is not a whole number",
                           cluster.name, gpus, p.tp, p.cp, p.pp, model_copy),
               "give dp to use fewer GPUs, or change a degree"}};
    }
    p.dp = gpus / model_copy;
  }
  const std::int64_t world = model_copy * p.dp;  // at most 2^40
  if (world > gpus || world > kMaxGpus) {
    std::string hint;
    if (gpus >= model_copy) hint = fmt::format("dp: {} is the most that fits", gpus / model_copy);
    return {{PlanKey::layout,
             fmt::format("layout needs tp x cp x pp x dp = {} x {} x {} x {} = {} GPUs, cluster "
                         "'{}' has {}",
                         p.tp, p.cp, p.pp, p.dp, world, cluster.name, gpus),
             std::move(hint)}};
  }
  return {};
}

WhyImpossible check_expert_block(const Parallelism& p) {
  const std::int64_t slots = p.ranks_per_position();
  const std::int64_t block = p.ep * p.expert_tp;  // at most 2^40
  if (slots % block == 0) return {};
  return {{p.ep > 1 ? PlanKey::ep : PlanKey::expert_tp,
           fmt::format("ep x expert_tp = {} x {} = {} does not divide the tp x cp x dp = {} x {} "
                       "x {} = {} GPUs of a pipeline position",
                       p.ep, p.expert_tp, block, p.tp, p.cp, p.dp, slots),
           ""}};
}

WhyImpossible check_split_of_model(const Parallelism& p, const Model& model) {
  WhyImpossible all;
  const auto must_divide = [&](PlanKey key, std::string_view name, std::int64_t degree,
                               std::int64_t whole, std::string_view what) {
    if (whole % degree == 0) return;
    all.push_back({key,
                   fmt::format("{} {} does not divide the {} {} of {}", name, degree, whole, what,
                               model.name),
                   ""});
  };
  const Attention& attention = model.attention;
  must_divide(PlanKey::tp, "tp", p.tp, attention.heads, "heads");
  // Beyond the key-value heads each is kept several times.
  const bool kept_again = p.tp > attention.kv_heads && p.tp % attention.kv_heads == 0;
  if (!attention.mla && !kept_again) {
    must_divide(PlanKey::tp, "tp", p.tp, attention.kv_heads, "key-value heads");
  }
  if (model.moe_layers() < model.layers) {
    must_divide(PlanKey::tp, "tp", p.tp, model.intermediate, "columns of the feed-forward layers");
  }
  if (!model.moe) {
    for (const auto& [key, name, degree] :
         {std::tuple<PlanKey, std::string_view, std::int64_t>{PlanKey::ep, "ep", p.ep},
          {PlanKey::expert_tp, "expert_tp", p.expert_tp}}) {
      if (degree == 1) continue;
      all.push_back(
          {key,
           fmt::format("{} {} needs a model with experts, {} has none", name, degree, model.name),
           ""});
    }
    return all;
  }
  const Moe& moe = *model.moe;
  must_divide(PlanKey::ep, "ep", p.ep, moe.routed_experts, "routed experts");
  must_divide(PlanKey::expert_tp, "expert_tp", p.expert_tp, moe.expert_intermediate,
              "columns of an expert");
  if (moe.shared_experts > 0) {
    must_divide(PlanKey::tp, "tp", p.tp, moe.shared_intermediate, "columns of the shared experts");
  }
  return all;
}

WhyImpossible check_tokens(const Plan& plan) {
  const std::int64_t tokens = plan.micro_batch_sequences * plan.sequence_length;  // <= 2^52
  if (tokens <= kMaxMicroBatchTokens) return {};
  return {
      {PlanKey::micro_batch,
       fmt::format("micro_batch x sequence_length = {} x {} = {} tokens, more than {}",
                   plan.micro_batch_sequences, plan.sequence_length, tokens, kMaxMicroBatchTokens),
       ""}};
}

WhyImpossible check_batch(const Plan& plan) {
  const std::int64_t dp = plan.parallelism.dp;
  const std::int64_t unit = plan.micro_batch_sequences * dp;  // <= 2^48
  const std::int64_t global = plan.global_batch_sequences;
  const std::int64_t count = global / unit;
  if (global % unit != 0) {
    return {{PlanKey::global_batch,
             fmt::format("global_batch {} is not a whole number of micro-batches: micro_batch x dp "
                         "= {} x {} = {}, and {} = {} x {} + {}",
                         global, plan.micro_batch_sequences, dp, unit, global, count, unit,
                         global % unit),
             count == 0 ? fmt::format("global_batch: {} would be", unit)
                        : fmt::format("global_batch: {} or {} would be", count * unit,
                                      (count + 1) * unit)}};
  }
  if (count > kMaxMicroBatches) {
    return {{PlanKey::global_batch,
             fmt::format("global_batch / (micro_batch x dp) = {} / ({} x {}) = {} micro-batches, "
                         "more than {}",
                         global, plan.micro_batch_sequences, dp, count, kMaxMicroBatches),
             ""}};
  }
  return {};
}

WhyImpossible check_sequence_split(const Plan& plan) {
  const Parallelism& p = plan.parallelism;
  const std::int64_t length = plan.sequence_length;
  if (p.cp > 1 && length % (2 * p.cp) != 0) {
    return {{PlanKey::cp,
             fmt::format("cp {} needs a sequence_length that 2 x cp = {} divides, got {}", p.cp,
                         2 * p.cp, length),
             ""}};
  }
  if (p.sequence_parallel && p.tp > 1 && length % (p.cp * p.tp) != 0) {
    return {{PlanKey::tp,
             fmt::format("sequence parallelism needs a sequence_length that cp x tp = {} x {} = {} "
                         "divides, got {}",
                         p.cp, p.tp, p.cp * p.tp, length),
             ""}};
  }
  return {};
}

ScheduleShape schedule_shape(const Plan& plan) {
  return {.kind = plan.schedule,
          .ranks = static_cast<int>(plan.parallelism.pp),
          .chunks = plan.chunks,
          .micro_batches = static_cast<int>(plan.micro_batches())};
}

WhyImpossible check_schedule(const Plan& plan) {
  WhyImpossible all;
  const ScheduleShape wanted = schedule_shape(plan);
  if (plan.schedule == ScheduleKind::dual_pipe && plan.parallelism.zero_stage >= 2) {
    all.push_back({PlanKey::zero,
                   fmt::format("zero {} keeps each gradient in shards of one pipeline position, "
                               "but dual_pipe holds every stage at two",
                               plan.parallelism.zero_stage),
                   "zero 1, or dual_pipe_v, which holds every stage once"});
  }
  std::string why = why_impossible(wanted);
  if (!why.empty()) all.push_back({PlanKey::schedule, std::move(why), ""});
  const std::int64_t actions = std::int64_t{wanted.stages()} * wanted.micro_batches;
  if (actions > kMaxActions) {
    all.push_back({PlanKey::schedule,
                   fmt::format("{} stages x {} micro-batches = {} is more than can be simulated "
                               "({})",
                               wanted.stages(), wanted.micro_batches, actions, kMaxActions),
                   ""});
  }
  return all;
}

std::string describe_pipeline(const Plan& plan) {
  return fmt::format("{} on {} pipeline rank{}", name_of(plan.schedule), plan.parallelism.pp,
                     plan.parallelism.pp == 1 ? "" : "s");
}

std::int64_t stage_count(const Plan& plan) {
  ScheduleShape without_batch;
  without_batch.kind = plan.schedule;
  without_batch.ranks = static_cast<int>(plan.parallelism.pp);
  without_batch.chunks = plan.chunks;
  return without_batch.stages();
}

std::vector<std::int64_t> even_split(std::int64_t layers, std::int64_t stages) {
  std::vector<std::int64_t> split(static_cast<std::size_t>(stages), layers / stages);
  for (std::int64_t s = 0; s < layers % stages; ++s) ++split[static_cast<std::size_t>(s)];
  return split;
}

WhyImpossible check_even_split(const Plan& plan, const Model& model) {
  const std::int64_t stages = stage_count(plan);
  if (stages <= model.layers) return {};
  return {{PlanKey::pp,
           fmt::format("{} has {} stages, {} has only {} layers", describe_pipeline(plan), stages,
                       model.name, model.layers),
           ""}};
}

WhyImpossible check_stages(const Plan& plan, const std::vector<std::int64_t>& layers_per_stage,
                           std::int64_t mtp_stage, const Model& model,
                           std::vector<StageContents>& stages) {
  const std::int64_t count = stage_count(plan);
  if (static_cast<std::int64_t>(layers_per_stage.size()) != count) {
    return {{PlanKey::layers_per_stage,
             fmt::format("layers_per_stage has {} entries, {} has {} stages",
                         layers_per_stage.size(), describe_pipeline(plan), count),
             ""}};
  }
  const std::int64_t sum =
      std::accumulate(layers_per_stage.begin(), layers_per_stage.end(), std::int64_t{0});
  if (sum != model.layers) {
    return {{PlanKey::layers_per_stage,
             fmt::format("layers_per_stage adds up to {}, {} has {} layers", sum, model.name,
                         model.layers),
             ""}};
  }
  if (mtp_stage >= count) {
    return {{PlanKey::mtp_stage,
             fmt::format("mtp_stage {} does not exist: {} has stages 0 to {}", mtp_stage,
                         describe_pipeline(plan), count - 1),
             ""}};
  }
  if (mtp_stage >= 0 && model.mtp_modules == 0) {
    return {{PlanKey::mtp_stage,
             fmt::format("mtp_stage is given, but {} has no MTP modules", model.name),
             "remove the key"}};
  }
  WhyImpossible all;
  const std::int64_t with_mtp = mtp_stage >= 0 ? mtp_stage : count - 1;
  std::int64_t next_layer = 0;
  stages.clear();
  for (std::int64_t s = 0; s < count; ++s) {
    StageContents stage;
    stage.first_layer = next_layer;
    stage.layers = layers_per_stage[static_cast<std::size_t>(s)];
    stage.embedding = s == 0;
    stage.head = s == count - 1;
    stage.mtp_modules = s == with_mtp ? model.mtp_modules : 0;
    next_layer += stage.layers;
    if (stage.layers == 0 && !stage.embedding && !stage.head && stage.mtp_modules == 0) {
      all.push_back({PlanKey::layers_per_stage,
                     fmt::format("stage {} would hold nothing: only a stage with embedding, head "
                                 "or MTP modules can have 0 layers",
                                 s),
                     ""});
    }
    stages.push_back(stage);
  }
  return all;
}

}  // namespace orrery
