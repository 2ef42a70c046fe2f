#include "calibrate/execute/train.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

#include "calibrate/execute/execution.hpp"
#include "calibrate/token_source.hpp"
#include "calibrate/transport/clock_offset.hpp"
#include "calibrate/transport/open_communicator.hpp"
#include "calibrate/transport/transport.hpp"
#include "models/step.hpp"
#include "sim/check.hpp"
#include "sim/one_rank.hpp"

namespace orrery {
namespace {

void check_executable(const Scenario& scenario) {
  Problems problems;
  for (const std::string& why : why_not_executable(scenario)) {
    problems.add({scenario.file, 0, 0}, fmt::format("this cannot be executed: {}", why), "");
  }
  problems.throw_if_any();
}

Tokens tokens_of(const Scenario& scenario) {
  const SequencePlan plan{.vocabulary = scenario.model.vocabulary,
                          .tokens = scenario.plan.sequence_length + 1 + scenario.model.mtp_modules,
                          .per_step = scenario.plan.global_batch_sequences,
                          .seed = scenario.seed};
  TokenSource source = zipf_tokens(plan);
  if (!scenario.training.text.empty()) {
    Problems problems;
    std::optional<TokenSource> text =
        read_text_tokens(plan, scenario.training.text, Node(), problems);
    problems.throw_if_any();
    source = std::move(*text);
  }
  return [source = std::move(source)](std::int64_t step, std::int64_t sequence) {
    return sequence_of(source, step, sequence);
  };
}

std::unique_ptr<kernels::Device> open_device(const TrainOptions& options, int threads,
                                             int gpu = 0) {
  if (options.device == DeviceKind::cpu) return kernels::open_cpu_device(threads);
  auto opened = kernels::open_cuda_device(gpu);
  if (auto* why = std::get_if<std::string>(&opened)) throw std::runtime_error("no GPU: " + *why);
  return std::move(std::get<std::unique_ptr<kernels::Device>>(opened));
}

/// How GPUs of several ranks talk; null for CPUs, whose memory is the host's, and for one rank.
std::shared_ptr<const kernels::Nccl> load_nccl(const TrainOptions& options, int ranks) {
  if (options.device == DeviceKind::cpu || ranks == 1) return nullptr;
  auto loaded = kernels::Nccl::load();
  if (const auto* why = std::get_if<std::string>(&loaded)) {
    throw std::runtime_error(
        fmt::format("{} ranks with a GPU each talk over NCCL: {}; --alone 0 executes one of them",
                    ranks, *why));
  }
  return std::get<std::shared_ptr<const kernels::Nccl>>(loaded);
}

/// This rank's device among those of all ranks, which all call it.
std::unique_ptr<kernels::Device> open_device_of(Transport& transport, const TrainOptions& options,
                                                int threads) {
  if (options.device == DeviceKind::cpu) return open_device(options, threads);
  const LocalPlace place = local_place(transport);
  const int gpus = kernels::count_cuda_devices();
  // Without any, opening one says why.
  return open_device(options, threads, gpus == 0 ? 0 : gpu_of(place, gpus));
}

/// What all ranks together came to, step by step.
class Ledger {
 public:
  Ledger(const Scenario& scenario, const Program& program, int ranks, const TrainOptions& options)
      : scenario_(scenario),
        program_(program),
        options_(options),
        times_(static_cast<std::size_t>(ranks)) {}

  /// One rank's step; the last rank of a step closes it.
  void add(std::int64_t number, int rank, RankStep step) {
    const std::lock_guard lock(mutex_);
    const double tokens =
        static_cast<double>(scenario_.plan.global_batch_sequences) *
        static_cast<double>(scenario_.plan.sequence_length) *
        static_cast<double>(scenario_.plan.parallelism.tp);  // all of them have it
    const double modules =
        static_cast<double>(std::max<std::int64_t>(1, scenario_.model.mtp_modules));
    open_.number = number;
    open_.loss += step.loss_sum / tokens;
    open_.mtp_loss += step.mtp_loss_sum / tokens / modules;
    open_.gradient_norm = step.gradient_norm;
    times_[static_cast<std::size_t>(rank)] = std::move(step.times);
    if (++arrived_ < times_.size()) return;
    timelines_.push_back(merge_times(program_, times_));
    open_.seconds = seconds(timelines_.back().makespan_ps());
    // The first step touches memory for the first time; and long runs must not keep all.
    if (steps_.size() == 1 || timelines_.size() > kTimelinesKept) timelines_.pop_front();
    steps_.push_back(open_);
    if (options_.progress) options_.progress(open_);
    open_ = {};
    arrived_ = 0;
  }

  std::vector<TrainedStep> steps() const { return steps_; }

  /// Of the step whose duration is the median of the last ones, without the first of all.
  Timeline median() {
    const auto shorter = [](const Timeline& a, const Timeline& b) {
      return a.makespan_ps() < b.makespan_ps();
    };
    std::stable_sort(timelines_.begin(), timelines_.end(), shorter);
    return std::move(timelines_[(timelines_.size() - 1) / 2]);
  }

 private:
  const Scenario& scenario_;
  const Program& program_;
  const TrainOptions& options_;
  std::mutex mutex_;
  std::vector<std::vector<OpTimes>> times_;
  std::size_t arrived_ = 0;
  TrainedStep open_;
  std::vector<TrainedStep> steps_;
  static constexpr std::size_t kTimelinesKept = 33;
  std::deque<Timeline> timelines_;
};

int threads_per_rank(const TrainOptions& options, int ranks) {
  if (options.threads > 0) return options.threads;
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()) / ranks);
}

TrainingRun train_alone(const Scenario& scenario, const TrainOptions& options) {
  const Layout layout(scenario.plan.parallelism, scenario.cluster.gpus_per_node);
  if (*options.alone < 0 || *options.alone >= layout.world()) {
    throw std::runtime_error(
        fmt::format("there is no rank {} of {}", *options.alone, layout.world()));
  }
  const RankId rank(static_cast<std::size_t>(*options.alone));
  const Coordinates at = layout.coordinates(rank.value);
  TrainingRun run;
  run.program = one_rank_of(build_step(scenario), RankId(static_cast<std::size_t>(at.pp)));
  const auto device = open_device(options, options.threads);
  Execution execution(scenario, run.program, rank, *device);
  Ledger ledger(scenario, run.program, 1, options);
  const Tokens tokens = tokens_of(scenario);
  for (int s = 0; s < options.steps; ++s) ledger.add(s, 0, execution.step(s, tokens));
  run.steps = ledger.steps();
  run.timeline = ledger.median();
  run.device = fmt::format("{}; rank {} of {} alone", device->name(), rank.value, layout.world());
  run.memory_bytes = execution.tensors().total_bytes();
  run.reuse_waits = execution.lowered().reuse_waits;
  return run;
}

std::chrono::nanoseconds timeout_of(const TrainOptions& options) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
      std::chrono::duration<double>(options.timeout_s));
}

/// Each has a thread for every stream.
constexpr std::int64_t kMostRanksOfAProcess = 64;

/// Ranks as threads of this process.
TrainingRun train_in_threads(const Scenario& scenario, const TrainOptions& options) {
  const std::int64_t world = scenario.plan.parallelism.world();
  if (world > kMostRanksOfAProcess) {
    Problems problems;
    problems.add(
        {scenario.file, 0, 0},
        fmt::format("this has {} ranks, and one process executes {} at most", world,
                    kMostRanksOfAProcess),
        fmt::format("mpirun -n {} gives each a process; --alone 0 executes one of them", world));
    problems.throw_if_any();
  }
  TrainingRun run;
  run.program = build_step(scenario, {.all_ranks = true});
  const auto ranks = static_cast<int>(world);
  const int threads = threads_per_rank(options, ranks);
  Ledger ledger(scenario, run.program, ranks, options);
  const Tokens tokens = tokens_of(scenario);
  const auto nccl = load_nccl(options, ranks);
  std::mutex mutex;
  run_in_process(ranks, timeout_of(options), [&](Transport& transport) {
    const std::unique_ptr<kernels::Device> device = open_device_of(transport, options, threads);
    Execution execution(scenario, run.program, RankId(static_cast<std::size_t>(transport.rank())),
                        *device, &transport, nccl);
    {
      const std::lock_guard lock(mutex);
      run.device = device->name();
      run.memory_bytes = std::max(run.memory_bytes, execution.tensors().total_bytes());
      run.reuse_waits += execution.lowered().reuse_waits;
    }
    transport.barrier("start of training");
    for (int s = 0; s < options.steps; ++s) {
      ledger.add(s, transport.rank(), execution.step(s, tokens));
      transport.barrier("end of a step");
    }
  });
  run.steps = ledger.steps();
  run.timeline = ledger.median();
  if (ranks > 1) run.device += fmt::format("; {} ranks in one process", ranks);
  if (nccl != nullptr) run.device += ", " + nccl->name();
  return run;
}

/// A step as bytes, for the first rank.
std::vector<std::byte> packed(const RankStep& step, std::int64_t offset_ns) {
  std::vector<std::byte> bytes(3 * sizeof(double) + step.times.size() * sizeof(OpTimes));
  const double sums[] = {step.loss_sum, step.mtp_loss_sum, step.gradient_norm};
  std::memcpy(bytes.data(), sums, sizeof sums);
  std::vector<OpTimes> times = step.times;
  for (OpTimes& t : times) {
    t.begin_ns += offset_ns;
    t.end_ns += offset_ns;
  }
  std::memcpy(bytes.data() + sizeof sums, times.data(), times.size() * sizeof(OpTimes));
  return bytes;
}

RankStep unpacked(const std::vector<std::byte>& bytes) {
  RankStep step;
  double sums[3];
  std::memcpy(sums, bytes.data(), sizeof sums);
  step.loss_sum = sums[0];
  step.mtp_loss_sum = sums[1];
  step.gradient_norm = sums[2];
  step.times.resize((bytes.size() - sizeof sums) / sizeof(OpTimes));
  std::memcpy(step.times.data(), bytes.data() + sizeof sums, step.times.size() * sizeof(OpTimes));
  return step;
}

/// This process's rank of those that MPI started.
TrainingRun train_with_peers(const Scenario& scenario, const TrainOptions& options,
                             Transport& transport) {
  if (transport.ranks() != scenario.plan.parallelism.world()) {
    throw std::runtime_error(fmt::format("the plan has {} ranks, and MPI started {}: mpirun -n {}",
                                         scenario.plan.parallelism.world(), transport.ranks(),
                                         scenario.plan.parallelism.world()));
  }
  TrainingRun run;
  run.first_rank = transport.rank() == 0;
  run.program = build_step(scenario, {.all_ranks = true});
  try {
    const auto nccl = load_nccl(options, transport.ranks());
    const auto device =
        open_device_of(transport, options, threads_per_rank(options, transport.ranks()));
    Execution execution(scenario, run.program, RankId(static_cast<std::size_t>(transport.rank())),
                        *device, &transport, nccl);
    const std::int64_t offset_ns = clock_offset_ns(transport);
    Ledger ledger(scenario, run.program, transport.ranks(), options);
    const Tokens tokens = tokens_of(scenario);
    for (int s = 0; s < options.steps; ++s) {
      transport.barrier();
      const auto steps = transport.gather(packed(execution.step(s, tokens), offset_ns));
      for (std::size_t r = 0; r < steps.size(); ++r) {
        ledger.add(s, static_cast<int>(r), unpacked(steps[r]));
      }
    }
    transport.barrier();
    if (!run.first_rank) return run;
    run.steps = ledger.steps();
    run.timeline = ledger.median();
    run.device = fmt::format("{}; {} MPI processes", device->name(), transport.ranks());
    if (nccl != nullptr) run.device += ", " + nccl->name();
    run.memory_bytes = execution.tensors().total_bytes();
    run.reuse_waits = execution.lowered().reuse_waits;
    return run;
  } catch (const std::exception& error) {
    transport.abort(error.what());
    throw;
  }
}

}  // namespace

TrainingRun train(const Scenario& scenario, const TrainOptions& options) {
  check_executable(scenario);
  if (options.alone) return train_alone(scenario, options);
  if (const auto transport = open_mpi_transport(timeout_of(options))) {
    return train_with_peers(scenario, options, *transport);
  }
  return train_in_threads(scenario, options);
}

}  // namespace orrery
