#include "calibrate/calibrate.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <cctype>
#include <cmath>
#include <map>
#include <new>
#include <stdexcept>
#include <utility>

#include "calibrate/calibration_plan.hpp"
#include "calibrate/device_timer.hpp"
#include "calibrate/journal.hpp"
#include "calibrate/write_profile.hpp"

namespace orrery {
namespace {

constexpr std::int64_t kMaxSlots = 512;

/// A product of matrices: bound by arithmetic, so its time follows the clock, and by nothing that
/// other programs' memory traffic slows.
kernels::Call reference_product(kernels::Device& device, Scratch& scratch) {
  scratch.begin_op();
  // A GPU does 4096^3 in the time a CPU does 256^3.
  const bool many_cores = device.sms() >= 64;
  const std::int64_t n = many_cores ? 2048 : 256;
  const kernels::Format format = many_cores ? kernels::Format::bf16 : kernels::Format::fp32;
  kernels::Gemm gemm;
  gemm.a = scratch.matrix(n, n, format, Scratch::Content::activations);
  gemm.b = scratch.matrix(n, n, format, Scratch::Content::weights);
  gemm.d = scratch.matrix(n, n, format, Scratch::Content::outputs);
  return gemm;
}

/// That product as often as it takes to fill half a millisecond: of less, a clock tells little.
OpCalls reference_work(kernels::Device& device, const TimingStream& stream, Scratch& scratch) {
  const OpCalls once{reference_product(device, scratch)};
  DeviceTimer timer(device, stream, {once}, 0, once, false);
  timer.run(1);
  const double times = std::ceil(0.5e-3 / std::max(timer.run(1), 1e-7));
  return OpCalls(static_cast<std::size_t>(std::clamp(times, 1.0, 1000.0)), once[0]);
}

/// What keeps an op from being measured; empty: nothing.
std::string obstacle(const OpCalls& calls) {
  for (const kernels::Call& call : calls) {
    const std::string why = kernels::why_impossible(call);
    if (!why.empty()) return fmt::format("{}: {}", kernels::name_of(call), why);
  }
  return "";
}

/// The best rates seen so far: how long a shape takes at least, before it is measured.
class Foresight {
 public:
  void add(const Shape& shape, double seconds) {
    flops_per_s_ = std::max(flops_per_s_, flops_of(shape) / seconds);
    bytes_per_s_ = std::max(bytes_per_s_, bytes_of(shape) / seconds);
  }
  double least_s(const Shape& shape) const {
    const double by_flops = flops_per_s_ > 0 ? flops_of(shape) / flops_per_s_ : 0;
    const double by_bytes = bytes_per_s_ > 0 ? bytes_of(shape) / bytes_per_s_ : 0;
    return std::max(by_flops, by_bytes);
  }

 private:
  double flops_per_s_ = 0;
  double bytes_per_s_ = 0;
};

class Session {
 public:
  Session(kernels::Device& device, const CalibrationOptions& options, std::int64_t rotation_bytes)
      : device_(device),
        options_(options),
        stream_(make_timing_stream(device)),
        reference_scratch_(device, 1, std::int64_t{1} << 30, options.seed),
        reference_(reference_work(device, stream_, reference_scratch_)),
        scratch_(device, rotation_bytes, static_cast<std::int64_t>(options.scratch_bytes),
                 options.seed),
        begin_s_(steady_now_s()) {}

  double elapsed_s() const { return steady_now_s() - begin_s_; }
  /// Of one product, sorted.
  std::vector<double> references() const {
    std::vector<double> once = references_;
    for (double& s : once) s /= static_cast<double>(reference_.size());
    std::sort(once.begin(), once.end());
    return once;
  }
  void release_operands() { scratch_.clear(); }

  struct Result {
    std::optional<Measurement> measurement;
    std::string obstacle;  ///< why there is none
  };

  Result measure_item(const CalibrationItem& item, double limit_s) {
    return try_twice([&](Scratch& scratch) { return calls_of(item.shape, item.setting, scratch); },
                     item.shape.sms, limit_s);
  }

  /// Bytes a second, read plus written, of a copy on so many SMs; none where it cannot be measured.
  std::optional<double> copy_bytes_per_s(int sms) {
    const std::int64_t bytes = scratch_.rotation_bytes() / 4;
    const Result r = try_twice(
        [&](Scratch& scratch) -> std::optional<OpCalls> {
          const void* from =
              scratch.matrix(1, bytes / 4, kernels::Format::fp32, Scratch::Content::activations)
                  .data;
          return OpCalls{
              kernels::Loopback{.from = from, .to = scratch.bytes(bytes), .bytes = bytes}};
        },
        sms, 1);
    if (!r.measurement) return std::nullopt;
    return 2 * static_cast<double>(bytes) / r.measurement->seconds;
  }

 private:
  template <class MakeCalls>
  Result try_twice(const MakeCalls& make_calls, int sms, double limit_s) {
    try {
      return time(make_calls, sms, limit_s);
    } catch (const std::bad_alloc&) {
      // Room that ops before it took may be enough.
      scratch_.clear();
    }
    try {
      return time(make_calls, sms, limit_s);
    } catch (const std::bad_alloc&) {
      scratch_.clear();
      return {std::nullopt, "its operands find no room"};
    }
  }

  template <class MakeCalls>
  Result time(const MakeCalls& make_calls, int sms, double limit_s) {
    scratch_.begin_op();
    std::vector<OpCalls> slots;
    std::int64_t wanted = 1;
    for (std::int64_t i = 0; i < wanted; ++i) {
      if (i > 0 && i == wanted / 2) scratch_.repeat_weights();
      scratch_.begin_slot();
      std::optional<OpCalls> calls = make_calls(scratch_);
      if (!calls) return {std::nullopt, "there is no kernel for it"};
      if (i == 0) {
        if (std::string why = obstacle(*calls); !why.empty()) return {std::nullopt, why};
        const std::int64_t used = std::max<std::int64_t>(1, scratch_.slot_bytes());
        // One that uses more than comes between its executions, as the optimizer does, has still
        // not its own operands before it: once a step means after all else.
        const std::int64_t least = used <= options_.most_rotation_bytes ? 2 : 1;
        wanted = std::clamp<std::int64_t>((scratch_.rotation_bytes() + used - 1) / used, least,
                                          kMaxSlots);
      }
      slots.push_back(std::move(*calls));
    }
    DeviceTimer timer(device_, stream_, std::move(slots), sms, reference_, options_.flush);
    MeasureOptions measure_options = options_.measure;
    measure_options.limit_s = limit_s;
    return {measure(timer, measure_options, references_), ""};
  }

  kernels::Device& device_;
  const CalibrationOptions& options_;
  TimingStream stream_;
  Scratch reference_scratch_;
  OpCalls reference_;
  Scratch scratch_;
  double begin_s_;
  std::vector<double> references_;
};

/// Same letters and digits that name a chip ("H100" in "NVIDIA H100 80GB HBM3").
std::string chip_of(const std::string& device_name) {
  std::size_t begin = 0;
  while (begin < device_name.size()) {
    const std::size_t end = std::min(device_name.find(' ', begin), device_name.size());
    const std::string word = device_name.substr(begin, end - begin);
    if (word.size() >= 3 && std::isupper(static_cast<unsigned char>(word[0])) != 0 &&
        std::isdigit(static_cast<unsigned char>(word.back())) != 0) {
      return word;
    }
    begin = end + 1;
  }
  return "";
}

/// The data sheet of this device, if one of the scenarios is about it.
std::optional<Device> data_sheet_of(std::span<const Scenario> scenarios,
                                    const kernels::Device& device) {
  const std::string chip = chip_of(device.name());
  for (const Scenario& s : scenarios) {
    const Device& d = s.profile.device;
    if (!chip.empty() && chip_of(d.name) == chip && d.sms == device.sms()) return d;
  }
  return std::nullopt;
}

/// The most that can be allocated, to 64 MiB. Of a device that nobody else uses, nearly its memory.
double largest_allocation(kernels::Device& device) {
  const auto fits = [&](std::int64_t bytes) {
    try {
      device.release(device.allocate(static_cast<std::size_t>(bytes)));
      return true;
    } catch (const std::bad_alloc&) {
      return false;
    }
  };
  std::int64_t low = 0;
  std::int64_t high = std::int64_t{1} << 40;
  while (high - low > std::int64_t{64} << 20) {
    const std::int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return static_cast<double>(low);
}

std::vector<int> sms_to_measure(int all) {
  std::vector<int> sms;
  if (all <= 8) {
    for (int i = 1; i < all; ++i) sms.push_back(i);
  } else {
    for (int i = 8; i < all; i = i + std::max(4, i / 4)) sms.push_back(i);
  }
  sms.push_back(all);
  return sms;
}

}  // namespace

double reference_seconds(kernels::Device& device) {
  Scratch scratch(device, 1, std::int64_t{1} << 30, 1);
  const TimingStream stream = make_timing_stream(device);
  const OpCalls work = reference_work(device, stream, scratch);
  DeviceTimer timer(device, stream, {work}, 0, work, false);
  std::vector<double> samples;
  constexpr int kSamples = 101;  // some 50 ms
  for (int i = 0; i < kSamples; ++i) samples.push_back(timer.reference());
  return median(samples) / static_cast<double>(work.size());
}

Calibration calibrate(std::span<const Scenario> scenarios, kernels::Device& device,
                      const CalibrationOptions& options,
                      const std::function<void(const CalibrationProgress&)>& progress) {
  const CalibrationPlan plan = plan_calibration(scenarios, device.sms());
  const std::int64_t rotation =
      std::clamp(plan.pass_bytes, options.least_rotation_bytes, options.most_rotation_bytes);
  const std::string subject = fmt::format("{}, {} SMs, operands in {} bytes in turns",
                                          device.name(), device.sms(), rotation);
  Journal journal(options.journal, subject, options.resume);
  Session session(device, options, rotation);

  Calibration result;
  if (journal.damaged() > 0) {
    result.notes.push_back(
        fmt::format("lines of {} that were cut short or damaged, and are measured again: {}",
                    options.journal, journal.damaged()));
  }
  std::vector<MeasuredShape> shapes;
  std::map<std::string, std::pair<std::size_t, std::string>> obstacles;  // count and an example
  std::size_t unsteady = 0;
  double worst_drift = 0;
  Foresight foresight;
  double steps_share = 0;
  for (std::size_t i = 0; i < plan.items.size(); ++i) {
    const CalibrationItem& item = plan.items[i];
    const std::string key = measured_key(item.shape);
    std::optional<Measurement> m = journal.find(key);
    if (m) {
      ++result.from_journal;
    } else {
      const double left_s = options.time_limit_s - session.elapsed_s();
      // Warming up and one sample are three runs.
      if (left_s <= 0 || 3 * foresight.least_s(item.shape) > left_s) {
        ++result.out_of_time;
      } else {
        // Most shapes need less than their share, so each may take more.
        const double fair_s = left_s / static_cast<double>(plan.items.size() - i);
        const double limit_s = std::clamp(3 * fair_s, 0.05, options.measure.limit_s);
        Session::Result r = session.measure_item(item, std::min(limit_s, left_s));
        if (r.measurement) {
          journal.add(key, *r.measurement);
        } else {
          auto& [count, example] = obstacles[r.obstacle];
          if (count++ == 0) example = key;
        }
        m = r.measurement;
      }
    }
    if (m) {
      shapes.push_back({item.shape, m->seconds});
      foresight.add(item.shape, m->seconds);
      steps_share += item.share;
      unsteady += m->steady ? 0 : 1;
      worst_drift = std::max(worst_drift, m->drift);
    }
    if (progress) {
      progress({i + 1, plan.items.size(), key, m ? &*m : nullptr, session.elapsed_s()});
    }
  }
  for (const auto& [why, what] : obstacles) {
    result.notes.push_back(
        fmt::format("{} shapes left out ({}), the first {}", what.first, why, what.second));
  }
  if (result.out_of_time > 0) {
    result.notes.push_back(
        fmt::format("{} of {} shapes left out after {:.0f} s; --resume goes on with them",
                    result.out_of_time, plan.items.size(), session.elapsed_s()));
  }
  if (unsteady > 0) {
    result.notes.push_back(fmt::format(
        "{} shapes were measured while the machine changed its speed, by up to {:.0f} %", unsteady,
        100 * worst_drift));
  }
  if (shapes.empty()) {
    std::string why = "nothing could be measured";
    for (const std::string& note : result.notes) why += "; " + note;
    throw std::runtime_error(why);
  }

  std::vector<std::pair<int, double>> bandwidth;
  const auto whole = session.copy_bytes_per_s(device.sms());
  for (const int sms : sms_to_measure(device.sms())) {
    if (!whole) break;
    const auto part = sms == device.sms() ? whole : session.copy_bytes_per_s(sms);
    if (part) bandwidth.emplace_back(sms, std::min(1.0, *part / *whole));
  }

  session.release_operands();
  const double memory_bytes =
      options.memory_bytes > 0 ? options.memory_bytes : largest_allocation(device);
  const MeasuredDevice measured{.name = device.name(),
                                .sms = device.sms(),
                                .memory_bytes = memory_bytes,
                                .data_sheet = data_sheet_of(scenarios, device)};
  const std::string source = fmt::format("{}, on {}", options.provenance, device.name());
  result.measured = make_profile(options.name, measured, shapes, std::move(bandwidth), source);
  result.shapes = shapes.size();
  result.share = steps_share;

  std::string comment = fmt::format(
      "Measured: {}.\n"
      "{} shapes, {:.1f} % of the time of the steps' compute ops (by the scenarios' own profiles), "
      "each from begin to begin,\nwith operands used in turns out of {:.0f} MB, weights out of "
      "half of "
      "that.\n",
      source, result.shapes, 100 * result.share, static_cast<double>(rotation) / 1e6);
  const std::vector<double> references = session.references();
  if (!references.empty()) {
    result.reference_s = median(references);
    comment += fmt::format(
        "The same product of matrices took {:.4g} us (median), from {:.4g} to {:.4g} us, in "
        "between.\n",
        1e6 * result.reference_s, 1e6 * references.front(), 1e6 * references.back());
  }
  for (const std::string& note : result.notes) comment += note + ".\n";
  result.yaml = profile_yaml(result.measured.profile, comment, result.measured.errors);
  if (result.out_of_time == 0) journal.remove();
  return result;
}

}  // namespace orrery
