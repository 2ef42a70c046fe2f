#include "models/rollout.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "sim/check.hpp"
#include "sim/units.hpp"

namespace orrery {
namespace {

double real(std::int64_t value) {
  return static_cast<double>(value);
}

double normal_cdf(double z) {
  return 0.5 * std::erfc(-z / std::sqrt(2.0));
}

/// By bisection; 0 < p < 1.
double normal_quantile(double p) {
  double low = -40;
  double high = 40;
  for (int i = 0; i < 100; ++i) {
    const double middle = (low + high) / 2;
    (normal_cdf(middle) < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

/// How long sequences last, in slices of decode steps of equal width.
struct Durations {
  double steps_per_slice = 1;
  std::vector<double> ends;   ///< [k]: share that lasts k slices
  std::vector<double> alive;  ///< [k]: share that is alive in slice k, counted from its start
};

/// A length between two whole numbers of slices is split between them, so that the mean is kept.
Durations slices_of(const LengthDistribution& output, double tokens_per_step) {
  constexpr double kSlices = 512;
  const double longest = real(output.longest()) / tokens_per_step;
  Durations d;
  d.steps_per_slice = std::max(1.0, longest / kSlices);
  d.ends.assign(static_cast<std::size_t>(std::ceil(longest / d.steps_per_slice)) + 2, 0.0);
  for (const auto& bin : output.bins) {
    const double lasts = std::max(1.0, real(bin.tokens) / tokens_per_step / d.steps_per_slice);
    const double whole = std::floor(lasts);
    d.ends[static_cast<std::size_t>(whole)] += bin.share * (1 - (lasts - whole));
    d.ends[static_cast<std::size_t>(whole) + 1] += bin.share * (lasts - whole);
  }
  d.alive.resize(d.ends.size());
  double left = 1;
  for (std::size_t k = 0; k < d.ends.size(); ++k) {
    left -= d.ends[k];
    d.alive[k] = std::max(0.0, left);
  }
  return d;
}

/// Mean of the largest of so many standard normal numbers (Blom, Statistical Estimates and
/// Transformed Beta-Variables, 1958).
double mean_largest(double count) {
  return count < 2 ? 0 : normal_quantile((count - 0.375) / (count + 0.25));
}

/// Seconds in which a replica prefills so many prompts, as many at once as a step takes.
double prefill_seconds(const Instance& instance, const RolloutWork& work, double prompts) {
  const std::int64_t tokens = work.prompt_tokens;
  if (tokens <= work.prefill_tokens) {
    const std::int64_t at_once = std::max<std::int64_t>(1, work.prefill_tokens / tokens);
    const auto seconds_of = [&](std::int64_t sequences) {
      if (sequences == 0) return 0.0;
      return step_cost(instance, {.prefill = true, .sequences = sequences, .new_tokens = tokens})
          .seconds;
    };
    // Whole steps, and one with what is left: replicas step together, so one prompt is a step.
    const double whole = std::floor(prompts / real(at_once));
    const auto rest = static_cast<std::int64_t>(std::ceil(prompts - whole * real(at_once)));
    return whole * (whole > 0 ? seconds_of(at_once) : 0) + seconds_of(rest);
  }
  double seconds = 0;
  for (std::int64_t done = 0; done < tokens; done += work.prefill_tokens) {
    seconds += step_cost(instance, {.prefill = true,
                                    .new_tokens = std::min(work.prefill_tokens, tokens - done),
                                    .context = done})
                   .seconds;
  }
  return std::ceil(prompts) * seconds;
}

/// What is under way in one slice, on all replicas together, and what still waits.
struct Slice {
  double alive = 0;
  double context = 0;  ///< mean tokens of a sequence, prompt included
  double waiting = 0;
};

/// From the start of the first to the end of the last of so many sequences in so many slots.
std::vector<Slice> course_of(const Durations& d, double slots, double sequences, double prompt,
                             double tokens_per_slice) {
  std::vector<Slice> course;
  std::vector<double> starts;
  double waiting = sequences;
  for (std::size_t n = 0;; ++n) {
    double alive = 0;
    double age = 0;
    double ended = 0;
    for (std::size_t k = std::min(n, d.alive.size() - 1); k >= 1; --k) {
      const double started = starts[n - k];
      alive += started * d.alive[k];
      age += started * d.alive[k] * (static_cast<double>(k) + 0.5);
      ended += started * d.ends[k];
    }
    const double started = std::min(waiting, n == 0 ? slots : ended);
    starts.push_back(started);
    waiting -= started;
    alive += started;
    age += 0.5 * started;
    if (alive < 1e-3) return course;
    course.push_back({alive, prompt + age / alive * tokens_per_slice, waiting});
  }
}

/// The most sequences of a replica whose caches fit at every moment of the course that they take; 0
/// where not even one does.
std::int64_t slots_that_fit(const Instance& instance, const RolloutWork& work, const Durations& d,
                            double replicas, double tokens_per_slice) {
  const double prompt = real(work.prompt_tokens);
  const double sequences = real(work.sequences());
  std::int64_t most = std::llround(std::ceil(sequences / replicas));
  if (work.most_sequences > 0) most = std::min(most, work.most_sequences);
  const auto fits = [&](std::int64_t slots) {
    double peak = 0;
    for (const Slice& s :
         course_of(d, real(slots) * replicas, sequences, prompt, tokens_per_slice)) {
      peak = std::max(peak, s.alive * s.context);
    }
    return most_sequences(instance, peak / (real(slots) * replicas), work.prefill_tokens) >= slots;
  };
  std::int64_t low = 0;  // fits
  std::int64_t high = most + 1;
  while (high - low > 1) {
    const std::int64_t middle = low + (high - low) / 2;
    (fits(middle) ? low : high) = middle;
  }
  return low;
}

}  // namespace

double LengthDistribution::mean() const {
  double sum = 0;
  for (const Bin& bin : bins) sum += bin.share * real(bin.tokens);
  return sum;
}

double LengthDistribution::mean_square() const {
  double sum = 0;
  for (const Bin& bin : bins) sum += bin.share * real(bin.tokens) * real(bin.tokens);
  return sum;
}

LengthDistribution fixed_length(std::int64_t tokens) {
  return {{{tokens, 1.0}}};
}

LengthDistribution log_normal_length(double mean, double p95, std::int64_t most, int bins) {
  const double z95 = normal_quantile(0.95);
  ORRERY_CHECK(mean > 0 && p95 >= mean && p95 <= mean * std::exp(z95 * z95 / 2) * (1 + 1e-9) &&
                   real(most) >= p95 && bins > 0,
               "log-normal lengths of mean {}, p95 {}, most {}", mean, p95, most);
  // p95 / mean = exp(z95 sigma - sigma^2 / 2).
  const double square = std::max(0.0, z95 * z95 - 2 * std::log(p95 / mean));
  const double sigma = z95 - std::sqrt(square);
  if (sigma < 1e-9) return fixed_length(std::llround(mean));
  const double mu = std::log(mean) - sigma * sigma / 2;
  // Sum of min(x, most) over the probabilities below that of z: what is below the cut by the
  // log-normal's partial mean, the rest at the cut.
  const double cut = (std::log(real(most)) - mu) / sigma;
  const auto partial = [&](double z) {
    const double below = mean * normal_cdf(std::min(z, cut) - sigma);
    return below + (z > cut ? real(most) * (normal_cdf(z) - normal_cdf(cut)) : 0);
  };
  LengthDistribution lengths;
  const double share = 1.0 / bins;
  double before = 0;
  for (int i = 0; i < bins; ++i) {
    const double z = i + 1 < bins ? normal_quantile((i + 1) * share) : 40.0;
    const double until = partial(z);
    const std::int64_t tokens =
        std::clamp<std::int64_t>(std::llround((until - before) / share), 1, most);
    before = until;
    if (!lengths.bins.empty() && lengths.bins.back().tokens >= tokens) {
      lengths.bins.back().share += share;
    } else {
      lengths.bins.push_back({tokens, share});
    }
  }
  return lengths;
}

RolloutEstimate estimate_rollout(const Instance& instance, std::int64_t instances,
                                 const RolloutWork& work) {
  ORRERY_CHECK(instances >= 1 && work.sequences() >= 1 && !work.output.bins.empty() &&
                   work.prompt_tokens >= 1 && work.prefill_tokens >= 1,
               "{} instances, {} sequences", instances, work.sequences());
  const ServingPlan& plan = instance.plan;
  const double per_step = plan.speculation.tokens_per_step();
  RolloutEstimate e;
  e.replicas = instances * plan.dp;
  const double replicas = real(e.replicas);
  const double prompt = real(work.prompt_tokens);
  const Durations d = slices_of(work.output, per_step);
  const double tokens_per_slice = d.steps_per_slice * per_step;
  e.slots = slots_that_fit(instance, work, d, replicas, tokens_per_slice);
  if (e.slots == 0) {
    const ServingMemory memory =
        serving_memory(instance, {.prefill_tokens = work.prefill_tokens, .decode_tokens = 1});
    throw std::runtime_error(
        fmt::format("a GPU's {} do not hold weights ({}), buffers ({}) and the cache of one "
                    "sequence of {} tokens",
                    format_bytes(memory.usable_bytes), format_bytes(memory.weights_bytes),
                    format_bytes(memory.buffer_bytes), work.prompt_tokens + work.output.longest()));
  }

  const double prompts = real(work.share_prompts ? work.prompts : work.sequences());
  e.prefill_s = prefill_seconds(instance, work, prompts / replicas);

  DecodeTimes times(instance);
  double occupied = 0;  // sequences of a replica x seconds
  double decode_s = 0;
  double until_last_start = 0;
  for (const Slice& slice :
       course_of(d, real(e.slots) * replicas, real(work.sequences()), prompt, tokens_per_slice)) {
    // With few left on an instance, it still steps as long as there is any; likewise all instances.
    const double of_instance = slice.alive / real(instances);
    const double any_here = -std::expm1(-of_instance);
    const double any = -std::expm1(-slice.alive);
    // Full replicas are alike. Once nothing follows, what is left on each is a binomial number, and
    // the one with the most sets the pace of its instance.
    double sequences = of_instance / any_here / real(plan.dp);
    if (slice.waiting <= 0) {
      const double left = std::min(1.0, sequences / real(e.slots));
      sequences += mean_largest(real(plan.dp)) * std::sqrt(sequences * (1 - left));
    }
    sequences = std::clamp(sequences, 1.0, real(e.slots));
    const double slice_s = d.steps_per_slice * times.seconds(sequences, slice.context) * any;
    decode_s += slice_s;
    occupied += slice.alive / replicas * slice_s;
    if (slice.waiting > 0) until_last_start = decode_s;
  }
  e.seconds = e.prefill_s + decode_s;
  e.gpu_seconds = e.seconds * real(instances * plan.gpus());
  e.tail_s = decode_s - (work.sequences() > e.slots * e.replicas ? until_last_start : 0);
  e.output_tokens = real(work.sequences()) * work.output.mean();
  e.mean_sequences = occupied / decode_s;
  return e;
}

}  // namespace orrery
