#include "calibrate/execute/execution.hpp"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <thread>
#include <unordered_map>

#include <fmt/core.h>

#include "calibrate/execute/communicate.hpp"
#include "calibrate/execute/communicate_on_device.hpp"
#include "calibrate/execute/watch.hpp"
#include "calibrate/transport/transport.hpp"
#include "sim/check.hpp"

namespace orrery {

Execution::Execution(const Scenario& scenario, const Program& program, RankId rank,
                     kernels::Device& device, Transport* transport,
                     std::shared_ptr<const kernels::Nccl> nccl)
    : scenario_(scenario),
      program_(program),
      device_(device),
      transport_(transport),
      tensors_(device),
      lowered_(lower(scenario, program, rank, tensors_)) {
  prepare(std::move(nccl));
}

Execution::Execution(const Scenario& scenario, const Program& program, RankId world_rank,
                     kernels::Device& device)
    : scenario_(scenario),
      program_(program),
      device_(device),
      transport_(nullptr),
      tensors_(device),
      lowered_(lower_alone(scenario, program, world_rank, tensors_)) {
  prepare(nullptr);
}

/// Streams, events and waits, and what has to be done before the first step.
void Execution::prepare(std::shared_ptr<const kernels::Nccl> nccl) {
  streams_.resize(kStreamsPerRank, {-1});
  std::unordered_map<std::uint64_t, std::size_t> index;
  events_.reserve(lowered_.ops.size());
  waits_.resize(lowered_.ops.size());
  for (std::size_t i = 0; i < lowered_.ops.size(); ++i) {
    const LoweredOp& op = lowered_.ops[i];
    ORRERY_CHECK(!op.communication || transport_ != nullptr, "{} without a transport",
                 program_.name(op.op));
    index[op.op.value] = i;
    Events events{device_.create_event(), device_.create_event(), {}};
    for (const StreamKind kind : op.streams) {
      kernels::StreamHandle& stream = streams_[static_cast<std::size_t>(kind)];
      if (stream.index < 0) stream = device_.create_stream();
      if (kind != op.streams.front()) events.joined.push_back(device_.create_event());
    }
    events_.push_back(std::move(events));
    // Of ops on this op's own stream, order is a matter of course.
    for (const OpId wait : op.waits) {
      const std::size_t before = index.at(wait.value);
      const auto& theirs = lowered_.ops[before].streams;
      if (std::find(theirs.begin(), theirs.end(), op.streams.front()) == theirs.end()) {
        waits_[i].push_back(before);
      }
    }
  }
  for (const kernels::Call& call : lowered_.prepare) {
    device_.enqueue(streams_[static_cast<std::size_t>(lowered_.ops.front().streams.front())], call);
  }
  device_.synchronize();
  if (nccl == nullptr || transport_ == nullptr) return;
  watch_ = std::make_unique<Watch>(*transport_, device_, program_, lowered_.rank);
  communication_ = std::make_unique<DeviceCommunication>(
      *transport_, device_, std::move(nccl), program_, lowered_, tensors_, *watch_, streams_);
}

Execution::~Execution() = default;

void Execution::load(std::int64_t number, const Tokens& tokens) {
  const Plan& plan = scenario_.plan;
  const Layout layout(plan.parallelism, scenario_.cluster.gpus_per_node);
  const Coordinates at = layout.coordinates(lowered_.rank.value);
  const std::int64_t length = plan.sequence_length;
  const auto rows = static_cast<std::size_t>(plan.micro_batch_tokens());
  std::vector<std::int32_t> shifted(rows);
  for (std::size_t m = 0; m < lowered_.inputs.size(); ++m) {
    std::vector<std::vector<std::int32_t>> sequences;
    for (std::int64_t s = 0; s < plan.micro_batch_sequences; ++s) {
      const std::int64_t first =
          (static_cast<std::int64_t>(m) * plan.parallelism.dp + at.dp) * plan.micro_batch_sequences;
      sequences.push_back(tokens(number, first + s));
      ORRERY_CHECK(static_cast<std::int64_t>(sequences.back().size()) >=
                       length + 1 + scenario_.model.mtp_modules,
                   "{} tokens for a sequence of {}", sequences.back().size(), length);
    }
    const auto upload = [&](std::int32_t* to, std::int64_t shift) {
      std::size_t row = 0;
      for (const auto& sequence : sequences) {
        for (std::int64_t i = 0; i < length; ++i) {
          shifted[row++] = sequence[static_cast<std::size_t>(i + shift)];
        }
      }
      device_.upload(to, shifted.data(), shifted.size() * sizeof(std::int32_t));
    };
    const MicroBatchInput& input = lowered_.inputs[m];
    upload(input.tokens, 0);
    upload(input.targets, 1);
    for (std::size_t k = 0; k < input.mtp_tokens.size(); ++k) {
      upload(input.mtp_tokens[k], static_cast<std::int64_t>(k) + 1);
      upload(input.mtp_targets[k], static_cast<std::int64_t>(k) + 2);
    }
  }
}

void Execution::enqueue(const LoweredOp& op, std::int64_t number) {
  const auto index = static_cast<std::size_t>(&op - lowered_.ops.data());
  const auto stream_of_kind = [&](StreamKind kind) {
    return streams_[static_cast<std::size_t>(kind)];
  };
  const kernels::StreamHandle stream = stream_of_kind(op.streams.front());
  const Events& events = events_[index];
  for (std::size_t i = 1; i < op.streams.size(); ++i) {
    device_.record(stream_of_kind(op.streams[i]), events.joined[i - 1]);
    device_.wait(stream, events.joined[i - 1]);
  }
  for (const std::size_t before : waits_[index]) device_.wait(stream, events_[before].end);
  device_.record(stream, events.begin);
  const int sms = program_.shapes()[program_.shape(op.op)].sms;
  for (const kernels::Call& call : op.calls) device_.enqueue(stream, call, sms);
  std::optional<kernels::EventHandle> talks;
  if (op.communication && communication_) {
    talks = communication_->enqueue(op, number);
  } else if (op.communication) {
    device_.enqueue_host(stream, [this, &op, number] {
      communicate(*op.communication, *transport_, number, op.op, program_);
    });
  }
  for (const kernels::Call& call : op.then) device_.enqueue(stream, call, sms);
  device_.record(stream, events.end);
  if (watch_) watch_->add(op.op, talks, events.end);
  for (std::size_t i = 1; i < op.streams.size(); ++i) {
    device_.wait(stream_of_kind(op.streams[i]), events.end);
  }
}

RankStep Execution::step(std::int64_t number, const Tokens& tokens) {
  return run(number, tokens, true);
}

RankStep Execution::gradients(std::int64_t number, const Tokens& tokens) {
  return run(number, tokens, false);
}

/// Ops of a step, and how many they are.
std::size_t Execution::enqueue_all(std::int64_t number, bool update) {
  if (watch_) watch_->begin();
  std::size_t ran = 0;
  for (const LoweredOp& op : lowered_.ops) {
    const Shape& shape = program_.shapes()[program_.shape(op.op)];
    const auto* streaming = std::get_if<Streaming>(&shape.work);
    // Behind AdamW only its own results are passed on.
    if (!update && streaming != nullptr && streaming->kind == StreamingKind::optimizer) break;
    enqueue(op, number);
    ++ran;
  }
  return ran;
}

/// Until the device is done, or somebody has failed.
void Execution::wait_for_peers() {
  if (!communication_) return;
  while (!watch_->all_done()) {
    watch_->look();
    communication_->check();
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

/// Or the device waits for ever for a rank that does not come. The others first hear from this rank
/// why, and then from NCCL that.
void Execution::stop(const std::string& why) noexcept {
  try {
    transport_->abort(why);
    communication_->abort();
    device_.synchronize();
  } catch (const std::exception&) {
    // What has gone wrong before is the one to tell.
  }
}

RankStep Execution::run(std::int64_t number, const Tokens& tokens, bool update) {
  load(number, tokens);
  const Training& training = scenario_.training;
  const auto single = [](double value) { return static_cast<float>(value); };
  const double step_number = static_cast<double>(number) + 1;
  const kernels::AdamScalars scalars{.learning_rate = single(training.learning_rate),
                                     .beta1 = single(training.beta1),
                                     .beta2 = single(training.beta2),
                                     .beta1_power = single(std::pow(training.beta1, step_number)),
                                     .beta2_power = single(std::pow(training.beta2, step_number)),
                                     .epsilon = single(training.adam_epsilon),
                                     .weight_decay = single(training.weight_decay),
                                     .max_norm = single(training.clip_norm)};
  device_.upload(lowered_.scalars, &scalars, sizeof scalars);
  const double zero = 0;
  for (double* loss : {lowered_.loss, lowered_.mtp_loss}) {
    if (loss != nullptr) device_.upload(loss, &zero, sizeof zero);
  }
  std::size_t ran = 0;
  try {
    ran = enqueue_all(number, update);
    wait_for_peers();
  } catch (const std::exception& error) {
    if (communication_) stop(error.what());
    throw;
  }
  device_.synchronize();
  if (lowered_.overflow != nullptr) {
    std::int32_t left_out = 0;
    device_.download(&left_out, lowered_.overflow, sizeof left_out);
    if (left_out != 0) {
      throw std::runtime_error(
          fmt::format("rank {}: {} rows found no room among those of its experts",
                      lowered_.rank.value, left_out));
    }
  }
  RankStep step;
  const auto read = [&](const double* value) {
    double result = 0;
    if (value != nullptr) device_.download(&result, value, sizeof result);
    return result;
  };
  step.loss_sum = read(lowered_.loss);
  step.mtp_loss_sum = read(lowered_.mtp_loss);
  step.gradient_norm = std::sqrt(read(lowered_.square_sum));
  step.times.reserve(ran);
  for (std::size_t i = 0; i < ran; ++i) {
    step.times.push_back({lowered_.ops[i].op, device_.reached_ns(events_[i].begin),
                          device_.reached_ns(events_[i].end)});
  }
  return step;
}

Timeline merge_times(const Program& program, std::span<const std::vector<OpTimes>> ranks) {
  std::int64_t first_ns = std::numeric_limits<std::int64_t>::max();
  for (const auto& rank : ranks) {
    for (const OpTimes& t : rank) first_ns = std::min(first_ns, t.begin_ns);
  }
  Timeline timeline;
  timeline.start_ps.resize(program.size());
  timeline.end_ps.resize(program.size());
  constexpr std::int64_t kPicosecondsPerNanosecond = 1000;
  for (const auto& rank : ranks) {
    for (const OpTimes& t : rank) {
      Picoseconds& start = timeline.start_ps[t.op];
      Picoseconds& end = timeline.end_ps[t.op];
      start = std::max<Picoseconds>(start, (t.begin_ns - first_ns) * kPicosecondsPerNanosecond);
      end = std::max<Picoseconds>(end, (t.end_ns - first_ns) * kPicosecondsPerNanosecond);
      ++timeline.events;
    }
  }
  return timeline;
}

}  // namespace orrery
