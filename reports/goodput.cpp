#include "reports/goodput.hpp"

#include <fmt/format.h>
#include <tbb/parallel_for.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <queue>
#include <stdexcept>

#include "models/model.hpp"
#include "models/step.hpp"
#include "reports/json_object.hpp"
#include "reports/renewal.hpp"
#include "reports/study.hpp"
#include "reports/terminal.hpp"
#include "sim/check.hpp"
#include "sim/random.hpp"

namespace orrery {

namespace {

/// What a trial draws, each from a generator of its own: what is drawn for one purpose does not
/// depend on how often another was asked.
enum class Stream : std::uint64_t {
  rates = 0x72617465,
  failures = 0x6661696c,
  kinds = 0x6b696e64,
  detection = 0x64657465,
  repair = 0x72657061,
  restart = 0x72657374,
  maintenance = 0x6d61696e,
};

Random generator(std::uint64_t seed, std::uint64_t trial, Stream stream) {
  return Random::of({0x676f6f64, seed, trial, static_cast<std::uint64_t>(stream)});
}

double draw(const RandomTime& time, Random& random) {
  const double sigma = time.sigma();
  return sigma == 0 ? time.median_s : time.median_s * std::exp(sigma * random.normal());
}

/// Less than this is not simulated to its end.
constexpr double kLeastGoodput = 0.01;

bool stops(const FailureKind& kind) {
  return kind.slowdown <= 1;
}

double rate_of(const FailureKind& kind, const Job& job) {
  return static_cast<double>(parts_of(job, kind.of)) / kind.mtbf_s();
}

/// What a trial is about; the same for all.
struct Run {
  const Reliability& reliability;
  const Job& job;
  CheckpointTimes checkpoint;
  double useful_s = 0;
};

struct TrialResult {
  TimeParts parts;
  double interruptions = 0;
  std::vector<double> events;  ///< by kind
};

/// One run of the job, event by event.
class Trial {
 public:
  Trial(const Run& run, std::uint64_t seed, std::uint64_t number)
      : run_(run),
        r_(run.reliability),
        failures_(generator(seed, number, Stream::failures)),
        kinds_(generator(seed, number, Stream::kinds)),
        detection_(generator(seed, number, Stream::detection)),
        repair_(generator(seed, number, Stream::repair)),
        restart_(generator(seed, number, Stream::restart)),
        maintenance_(generator(seed, number, Stream::maintenance)) {
    result_.events.assign(r_.failures.size(), 0);
    // A count of n in a time T leaves the rate known as a gamma variable of shape n over T (the
    // prior 1 / rate), whose mean is n / T; and clusters differ by more than counts tell.
    Random rates = generator(seed, number, Stream::rates);
    const double cluster = std::exp(r_.rate_spread * rates.normal());
    for (const FailureKind& kind : r_.failures) {
      double rate = cluster * rate_of(kind, run.job);
      if (kind.events > 0) rate *= rates.gamma(kind.events) / kind.events;
      rates_.push_back(rate);
      rate_ += rate;
    }
    draw_failure();
    if (r_.maintenance) maintenance_due_s_ = r_.maintenance->every_s;
  }

  TrialResult run() {
    const double give_up_s = run_.useful_s / kLeastGoodput;
    while (saved_s_ < run_.useful_s - tolerance_s() && now_s_ < give_up_s) advance();
    lose();  // nothing, unless it was given up
    return std::move(result_);
  }

 private:
  /// What has been done since a checkpoint, lost if there is a failure before the next is written.
  struct Open {
    double useful_s = 0;
    double checkpoint_s = 0;
    double slow_s = 0;
    double sum() const { return useful_s + checkpoint_s + slow_s; }
  };
  struct SlowPart {
    double until_s = 0;
    double slowdown = 1;
    std::size_t kind = 0;
  };

  // ---- the clock ----

  void draw_failure() {
    until_failure_s_ =
        rate_ > 0 ? failures_.exponential() / rate_ : std::numeric_limits<double>::infinity();
  }

  std::size_t draw_kind() {
    double left = kinds_.uniform() * rate_;
    for (std::size_t k = 0; k + 1 < rates_.size(); ++k) {
      if (left < rates_[k]) return k;
      left -= rates_[k];
    }
    return rates_.size() - 1;
  }

  /// Passes time in which parts may fail, up to `most_s`; a part that does is returned.
  std::optional<std::size_t> pass(double most_s, double& passed_s) {
    passed_s = std::min(most_s, until_failure_s_);
    now_s_ += passed_s;
    until_failure_s_ -= passed_s;
    if (until_failure_s_ > 0) return std::nullopt;
    const std::size_t kind = draw_kind();
    draw_failure();
    ++result_.events[kind];
    if (!stops(r_.failures[kind])) {
      slow_.push_back({now_s_ + draw(r_.failures[kind].detection, detection_),
                       r_.failures[kind].slowdown, kind});
    }
    return kind;
  }

  /// As pass(), where it does not matter how fast the job computes: only failures that stop it.
  std::optional<std::size_t> pass_at_rest(double most_s, double& part_s) {
    while (true) {
      double passed_s = 0;
      const auto failed = pass(most_s, passed_s);
      part_s += passed_s;
      most_s -= passed_s;
      if (!failed) return std::nullopt;
      if (stops(r_.failures[*failed])) return failed;
    }
  }

  // ---- running ----

  double slowdown() const {
    double slowest = 1;
    for (const SlowPart& part : slow_) slowest = std::max(slowest, part.slowdown);
    return slowest;
  }

  /// What sums of times may be off by.
  double tolerance_s() const { return 1e-6 * run_.checkpoint.interval_s; }

  /// Useful time left of the interval that is being computed.
  double left_s() const {
    const double to_do_s = run_.useful_s - saved_s_ - pending_.useful_s;
    return std::min(run_.checkpoint.interval_s, to_do_s) - current_.useful_s;
  }

  /// On to whatever comes first: the end of an interval, of a write, a failure, a planned stop.
  void advance() {
    double found_s = std::numeric_limits<double>::infinity();
    for (const SlowPart& part : slow_) found_s = std::min(found_s, part.until_s);
    const double planned_s = std::min(found_s, maintenance_due_s_);
    if (planned_s <= now_s_) return stop_as_planned();

    const double slower = slowdown();
    const double left = left_s();
    const bool computed = left <= tolerance_s();
    if (computed && current_.useful_s > 0) return begin_checkpoint();
    double most_s = std::min(planned_s - now_s_, write_left_s_);
    if (!computed) most_s = std::min(most_s, left * slower);
    double passed_s = 0;
    const auto failed = pass(most_s, passed_s);
    if (computed) {
      pending_.checkpoint_s += passed_s;  // the last one is waited for
    } else {
      current_.useful_s += passed_s / slower;
      current_.slow_s += passed_s - passed_s / slower;
    }
    write_left_s_ -= passed_s;
    if (write_left_s_ <= 0) written();
    if (failed && stops(r_.failures[*failed])) fail(*failed);
  }

  /// Stands still for the blocking part; the rest is written meanwhile. What was pending has been
  /// written: intervals are no shorter than writes.
  void begin_checkpoint() {
    if (pending_.sum() > 0) written();
    const auto failed = pass_at_rest(run_.checkpoint.blocking_s, current_.checkpoint_s);
    if (failed) return fail(*failed);
    pending_ = current_;
    current_ = {};
    write_left_s_ = run_.checkpoint.write_s - run_.checkpoint.blocking_s;
    if (write_left_s_ <= 0) written();
  }

  void written() {
    saved_s_ += pending_.useful_s;
    result_.parts.useful += pending_.useful_s;
    result_.parts.checkpoint += pending_.checkpoint_s;
    result_.parts.slow += pending_.slow_s;
    pending_ = {};
    write_left_s_ = std::numeric_limits<double>::infinity();
  }

  // ---- stopping ----

  void lose() {
    result_.parts.rework += pending_.sum() + current_.sum();
    pending_ = current_ = {};
    write_left_s_ = std::numeric_limits<double>::infinity();
  }

  void fail(std::size_t kind) {
    lose();
    stop(kind);
    restart();
  }

  /// The job is down: the failure is noticed, and its host goes to repair.
  void stop(std::size_t kind) {
    ++result_.interruptions;
    const double detection_s = draw(r_.failures[kind].detection, detection_);
    result_.parts.detection += detection_s;
    now_s_ += detection_s;
    send_to_repair(kind);
  }

  void send_to_repair(std::size_t kind) {
    const auto& repair = r_.failures[kind].repair;
    if (!repair || !r_.spare_hosts) return;
    in_repair_.push(now_s_ + draw(*repair, repair_));
  }

  /// For a host, if there are too few.
  void wait_for_hosts() {
    while (!in_repair_.empty() && in_repair_.top() <= now_s_) in_repair_.pop();
    if (!r_.spare_hosts) return;
    while (static_cast<std::int64_t>(in_repair_.size()) > *r_.spare_hosts) {
      result_.parts.waiting += in_repair_.top() - now_s_;
      now_s_ = in_repair_.top();
      in_repair_.pop();
    }
  }

  /// Until the job computes again; failures strike here as well.
  void restart() {
    while (true) {
      if (maintenance_due_s_ <= now_s_) maintain();
      wait_for_hosts();
      const double restart_s = draw(r_.restart, restart_) + run_.checkpoint.read_s;
      const auto failed = pass_at_rest(restart_s, result_.parts.restart);
      if (!failed) return;
      stop(*failed);
    }
  }

  void maintain() {
    const double takes_s = draw(r_.maintenance->takes, maintenance_);
    result_.parts.maintenance += takes_s;
    now_s_ += takes_s;
    maintenance_due_s_ = now_s_ + r_.maintenance->every_s;
  }

  /// For maintenance, or to get rid of a slow part: after a checkpoint, which a failure can spoil.
  void stop_as_planned() {
    const auto failed = pass_at_rest(run_.checkpoint.write_s, current_.checkpoint_s);
    if (failed) return fail(*failed);
    if (pending_.sum() > 0) written();
    pending_ = current_;
    current_ = {};
    written();
    ++result_.interruptions;
    const auto found = std::stable_partition(
        slow_.begin(), slow_.end(), [&](const SlowPart& part) { return part.until_s > now_s_; });
    for (auto part = found; part != slow_.end(); ++part) send_to_repair(part->kind);
    slow_.erase(found, slow_.end());
    restart();
  }

  const Run& run_;
  const Reliability& r_;
  Random failures_, kinds_, detection_, repair_, restart_, maintenance_;
  std::vector<double> rates_;  // of the job, by kind
  double rate_ = 0;
  TrialResult result_;

  double now_s_ = 0;
  double until_failure_s_ = 0;  // of time in which parts may fail
  double maintenance_due_s_ = std::numeric_limits<double>::infinity();
  double saved_s_ = 0;  // useful time in the last checkpoint that is written
  Open pending_;        // up to the checkpoint that is being written
  Open current_;        // since then
  double write_left_s_ = std::numeric_limits<double>::infinity();
  std::vector<SlowPart> slow_;
  std::priority_queue<double, std::vector<double>, std::greater<>> in_repair_;  // back at
};

Renewal renewal_of(const Reliability& r, const Job& job, const CheckpointTimes& times) {
  Renewal renewal{.restart = r.restart,
                  .read_s = times.read_s,
                  .blocking_s = times.blocking_s,
                  .write_s = times.write_s};
  double detection = 0;
  for (const FailureKind& kind : r.failures) {
    if (!stops(kind)) continue;
    const double rate = rate_of(kind, job);
    renewal.failures_per_s += rate;
    detection += rate * kind.detection.mean_s;
  }
  if (renewal.failures_per_s > 0) renewal.detection_s = detection / renewal.failures_per_s;
  return renewal;
}

CheckpointTimes checkpoint_times(const Reliability& r, const Job& job, double useful_s) {
  const CheckpointPolicy& policy = r.checkpoint;
  CheckpointTimes times;
  times.read_s = job.checkpoint_bytes / policy.read_bytes_per_s;
  times.write_s = job.checkpoint_bytes / policy.write_bytes_per_s;
  times.blocking_s = policy.blocking_s.value_or(times.write_s);
  times.write_s = std::max(times.write_s, times.blocking_s);
  const Renewal renewal = renewal_of(r, job, times);
  times.optimum_s = optimum_interval_s(renewal, useful_s);
  if (renewal.failures_per_s > 0) {
    times.young_s = young_interval_s(times.blocking_s, 1 / renewal.failures_per_s);
    times.daly_s = daly_interval_s(times.blocking_s, 1 / renewal.failures_per_s);
  }
  const double wanted_s = std::min(policy.interval_s.value_or(times.optimum_s), useful_s);
  // As many equal intervals as there are of the wanted length, the last not a shorter one.
  times.interval_s = useful_s / std::max(1.0, std::floor(useful_s / wanted_s + 1e-9));
  const double background_s = times.write_s - times.blocking_s;
  if (times.interval_s < background_s && times.interval_s < useful_s) {
    throw std::runtime_error(fmt::format(
        "a checkpoint takes {} to write beside training, longer than the interval of {}",
        format_seconds(background_s), format_seconds(times.interval_s)));
  }
  return times;
}

void add(TimeParts& sum, const TimeParts& parts, double weight) {
  sum.useful += weight * parts.useful;
  sum.checkpoint += weight * parts.checkpoint;
  sum.rework += weight * parts.rework;
  sum.detection += weight * parts.detection;
  sum.restart += weight * parts.restart;
  sum.waiting += weight * parts.waiting;
  sum.maintenance += weight * parts.maintenance;
  sum.slow += weight * parts.slow;
}

}  // namespace

double checkpoint_bytes(const Scenario& scenario) {
  const Precision& precision = scenario.plan.precision;
  const ParameterCount parameters = count_parameters(scenario.model);
  const std::int64_t weight =
      precision.master_bytes > 0 ? precision.master_bytes : precision.parameter_bytes;
  return static_cast<double>(parameters.total() + parameters.mtp) *
         static_cast<double>(weight + precision.moment_bytes);
}

Job job_of(const Scenario& scenario, const Reliability& reliability) {
  const auto parts = [](std::int64_t gpus, std::int64_t each) { return (gpus + each - 1) / each; };
  Job job;
  job.gpus = scenario.plan.parallelism.world();
  job.hosts = parts(job.gpus, scenario.cluster.gpus_per_node);
  if (reliability.gpus_per_switch > 0) {
    job.switches = parts(job.gpus, reliability.gpus_per_switch);
  } else if (scenario.fabric != nullptr) {
    // Of a cluster that is larger than the job, its share.
    job.switches = parts(scenario.fabric->counts().switches * job.gpus, scenario.cluster.gpus());
  }
  const bool switches_fail =
      std::any_of(reliability.failures.begin(), reliability.failures.end(),
                  [](const FailureKind& kind) { return kind.of == FailingPart::network_switch; });
  if (switches_fail && job.switches == 0) {
    Problems problems;
    problems.add(
        {scenario.file, 0, 0},
        fmt::format("switches of '{}' fail, but how many there are is not said", reliability.name),
        "add gpus_per_switch to the reliability, or a fabric to the cluster");
    problems.throw_if_any();
  }
  job.checkpoint_bytes = reliability.checkpoint.bytes.value_or(checkpoint_bytes(scenario));
  return job;
}

std::int64_t parts_of(const Job& job, FailingPart part) {
  switch (part) {
    case FailingPart::gpu:
    case FailingPart::nic:
      return job.gpus;
    case FailingPart::host:
      return job.hosts;
    case FailingPart::network_switch:
      return job.switches;
    case FailingPart::job:
      return 1;
  }
  return 0;
}

Goodput goodput(const Reliability& reliability, const Job& job, double useful_s,
                const GoodputOptions& options) {
  ORRERY_CHECK(useful_s > 0 && options.trials > 0, "{} s, {} trials", useful_s, options.trials);
  Goodput out{.job = job, .useful_s = useful_s};
  out.checkpoint = checkpoint_times(reliability, job, useful_s);
  const Renewal renewal = renewal_of(reliability, job, out.checkpoint);
  out.mtbf_s = renewal.failures_per_s > 0 ? 1 / renewal.failures_per_s
                                          : std::numeric_limits<double>::infinity();
  const double intervals = std::round(useful_s / out.checkpoint.interval_s);
  out.expected_calendar_s = renewal.total_s(out.checkpoint.interval_s, intervals);
  out.expected_goodput = useful_s / out.expected_calendar_s;
  if (!(out.expected_goodput >= kLeastGoodput)) {
    throw std::runtime_error(
        fmt::format("the job would hardly get on: a failure every {} on average, checkpoints every "
                    "{}, restarts "
                    "of {}",
                    format_seconds(out.mtbf_s), format_seconds(out.checkpoint.interval_s),
                    format_seconds(reliability.restart.mean_s + out.checkpoint.read_s)));
  }

  const Run run{reliability, job, out.checkpoint, useful_s};
  std::vector<TrialResult> results(static_cast<std::size_t>(options.trials));
  tbb::parallel_for(std::size_t{0}, results.size(),
                    [&](std::size_t i) { results[i] = Trial(run, options.seed, i).run(); });

  std::vector<double> calendars;
  std::vector<double> interruptions;
  const double weight = 1 / static_cast<double>(options.trials);
  std::vector<double> events(reliability.failures.size(), 0);
  for (const TrialResult& result : results) {
    // Given up: as it would have gone on.
    out.goodputs.push_back(result.parts.useful / result.parts.sum());
    calendars.push_back(useful_s / out.goodputs.back());
    interruptions.push_back(result.interruptions);
    add(out.mean_s, result.parts, weight);
    for (std::size_t k = 0; k < events.size(); ++k) events[k] += weight * result.events[k];
  }
  out.goodput = interval_of(out.goodputs);
  out.calendar_s = interval_of(std::move(calendars));
  out.interruptions = interval_of(std::move(interruptions));
  for (std::size_t k = 0; k < events.size(); ++k) {
    const FailureKind& kind = reliability.failures[k];
    out.kinds.push_back({kind.what, 1 / rate_of(kind, job), events[k]});
  }
  std::stable_sort(
      out.kinds.begin(), out.kinds.end(),
      [](const KindOfFailure& a, const KindOfFailure& b) { return a.events > b.events; });
  return out;
}

Goodput ask_goodput(const GoodputQuestion& question) {
  Scenario scenario = read_scenario(question.file);
  Problems problems;
  if (!question.reliability.empty()) {
    scenario.reliability =
        read_reliability(read_document(question.reliability, problems), problems);
  } else if (!scenario.reliability) {
    problems.add({scenario.file, 0, 0}, "the scenario does not say what fails",
                 "add reliability: reliability/h100_llama3.yaml, or use --with FILE");
  }
  if (question.tokens <= 0 && question.useful_s <= 0) {
    problems.add({"command line", 0, 0}, "how long the run is, is not said",
                 "--tokens 14.8e12, or --time \"54 days\"");
  }
  problems.throw_if_any();
  const Job job = job_of(scenario, *scenario.reliability);
  const Reliability reliability = *scenario.reliability;
  GoodputOptions options = question.options;
  options.seed = scenario.seed;
  double useful_s = question.useful_s;
  if (question.tokens > 0) {
    const Report report = study_step(std::move(scenario)).report;
    useful_s = question.tokens / report.tokens_per_step * report.step_time_s;
  }
  return goodput(reliability, job, useful_s, options);
}

namespace {

std::string percent(double share) {
  return fmt::format("{:.1f} %", 100 * share);
}

/// A share of calendar time, with the digits that small ones need.
std::string share_of(double part_s, double all_s) {
  const double share = 100 * part_s / all_s;
  return share == 0 ? "0" : fmt::format("{:.{}f}", share, share < 0.095 ? 3 : 1);
}

struct NamedPart {
  const char* key;
  const char* words;
  double TimeParts::*part;
};
constexpr NamedPart kTimeParts[] = {
    {"useful", "useful training", &TimeParts::useful},
    {"checkpoint", "standing still for checkpoints", &TimeParts::checkpoint},
    {"rework", "work lost since a checkpoint", &TimeParts::rework},
    {"detection", "until a failure is noticed", &TimeParts::detection},
    {"restart", "restarting, reading the checkpoint", &TimeParts::restart},
    {"waiting", "waiting for a host", &TimeParts::waiting},
    {"maintenance", "maintenance", &TimeParts::maintenance},
    {"slow", "beside slow parts", &TimeParts::slow},
};

}  // namespace

std::string to_terminal(const Goodput& g) {
  const CheckpointTimes& c = g.checkpoint;
  std::string text =
      fmt::format("{} GPUs, {} hosts; {} of training; {} trials, P10 to P90\n\n", g.job.gpus,
                  g.job.hosts, format_seconds(g.useful_s), g.goodputs.size());
  text +=
      fmt::format("  {:<15}{:<9}({} to {}), closed form {}\n", "goodput", percent(g.goodput.p50),
                  percent(g.goodput.p10), percent(g.goodput.p90), percent(g.expected_goodput));
  text +=
      fmt::format("  {:<15}{:<9}({} to {})\n", "calendar time", format_seconds(g.calendar_s.p50),
                  format_seconds(g.calendar_s.p10), format_seconds(g.calendar_s.p90));
  text += fmt::format("  {:<15}{:<9.0f}({:.0f} to {:.0f}){}\n", "interruptions",
                      g.interruptions.p50, g.interruptions.p10, g.interruptions.p90,
                      std::isfinite(g.mtbf_s)
                          ? fmt::format(", a failure every {} on average", format_seconds(g.mtbf_s))
                          : "");
  text += fmt::format("  {:<15}{} in {}, training stops for {}; read in {}\n", "checkpoint",
                      format_bytes(g.job.checkpoint_bytes), format_seconds(c.write_s),
                      format_seconds(c.blocking_s), format_seconds(c.read_s));
  text += fmt::format("  {:<15}every {} (optimum {}; Young {}, Daly {})\n\n", "",
                      format_seconds(c.interval_s), format_seconds(c.optimum_s),
                      format_seconds(c.young_s), format_seconds(c.daly_s));
  std::vector<std::vector<std::string>> rows{{"Where calendar time goes", "%", "mean"}};
  for (const NamedPart& part : kTimeParts) {
    const double part_s = g.mean_s.*part.part;
    if (part_s == 0) continue;
    rows.push_back(
        {fmt::format("  {}", part.words), share_of(part_s, g.mean_s.sum()), format_seconds(part_s)});
  }
  text += format_table(rows, "lrr");
  if (g.kinds.empty()) return text;
  rows.assign(1, {"Failures", "one every", "in the run"});
  constexpr std::size_t kShown = 10;
  double rest = 0;
  for (std::size_t k = 0; k < g.kinds.size(); ++k) {
    if (k < kShown || g.kinds.size() == kShown + 1) {
      rows.push_back({fmt::format("  {}", shorten(g.kinds[k].what, 60)), format_seconds(g.kinds[k].mtbf_s),
                      fmt::format("{:.1f}", g.kinds[k].events)});
    } else {
      rest += g.kinds[k].events;
    }
  }
  if (g.kinds.size() > kShown + 1) {
    rows.push_back({fmt::format("  {} other kinds", g.kinds.size() - kShown), "",
                    fmt::format("{:.1f}", rest)});
  }
  return fmt::format("{}\n{}", text, format_table(rows, "lrr"));
}

void write_goodput(JsonObject& o, const Goodput& g) {
  o("gpus", g.job.gpus);
  o("hosts", g.job.hosts);
  o("switches", g.job.switches);
  o("useful_s", g.useful_s);
  o("mtbf_s", g.mtbf_s);
  o("trials", static_cast<std::int64_t>(g.goodputs.size()));
  write_interval(o, "goodput", g.goodput);
  write_interval(o, "calendar_s", g.calendar_s);
  write_interval(o, "interruptions", g.interruptions);
  o("expected_goodput", g.expected_goodput);
  o("expected_calendar_s", g.expected_calendar_s);
  {
    JsonObject c(o.name("checkpoint"));
    c("bytes", g.job.checkpoint_bytes);
    c("write_s", g.checkpoint.write_s);
    c("blocking_s", g.checkpoint.blocking_s);
    c("read_s", g.checkpoint.read_s);
    c("interval_s", g.checkpoint.interval_s);
    c("optimum_s", g.checkpoint.optimum_s);
    c("young_s", g.checkpoint.young_s);
    c("daly_s", g.checkpoint.daly_s);
  }
  {
    JsonObject parts(o.name("mean_s"));
    for (const NamedPart& part : kTimeParts) parts(part.key, g.mean_s.*part.part);
  }
  o.array("failures", g.kinds, [&](const KindOfFailure& kind) {
    JsonObject k(o.writer());
    k("what", kind.what);
    k("mtbf_s", kind.mtbf_s);
    k("events", kind.events);
  });
}

std::string to_json(const Goodput& g) {
  return json_document([&](JsonObject& o) { write_goodput(o, g); });
}

}  // namespace orrery
