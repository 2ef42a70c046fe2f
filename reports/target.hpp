#pragma once
// What a plan must reach, in words, and whether it does:
//
//   QUANTITY >= or <= VALUE [for N tokens] [at X USD]
//
//   tokens/day >= 250G               tokens/s/gpu >= 1500        mfu >= 40 %
//   step time <= 20 s                memory <= 70 GB
//   days <= 60 for 14.8T tokens      gpu-hours <= 3M for 14.8T tokens
//   cost <= 6M USD for 14.8T tokens at 2 USD                     (a GPU-hour)
//
// K, M, G or B, T and P are decimal prefixes. Without "for" and "at", what the report was given
// (--tokens, --usd-per-gpu-hour, a budget's total) is taken.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "reports/report.hpp"
#include "sim/config.hpp"

namespace orrery {

enum class TargetQuantity : std::uint8_t {
  tokens_per_day,
  tokens_per_s_per_gpu,
  step_time_s,
  mfu,
  memory_bytes,
  gpu_hours,
  days,
  cost_usd,
};
std::string_view name_of(TargetQuantity quantity);  ///< "tokens/day"

struct Target {
  std::string text;
  TargetQuantity quantity{};
  bool at_least = true;  ///< else at most
  double value = 0;      ///< SI; MFU as a fraction, days as days
  double tokens = 0;     ///< of the run; 0: not said
  double usd_per_gpu_hour = 0;
};

/// One "2.5 T" or "250G" (tokens), as in targets; nothing where it is no such number.
std::optional<double> parse_tokens(std::string_view text);

/// Problems are located in `text`, as a file named "--target".
std::optional<Target> parse_target(const std::string& text, Problems& problems);

/// What is known beside the step itself.
struct TargetContext {
  double tokens = 0;  ///< of the run; 0: unknown
  double usd_per_gpu_hour = 0;
  /// Relative standard deviation of the step's time.
  double spread = 0;
  /// By what factor published steps were longer than predicted ones, the least and the most; 1:
  /// none is known.
  double published_least = 1, published_most = 1;
  /// Useful over calendar time: middle, and the lowest and highest that are to be expected.
  double goodput = 1, goodput_low = 1, goodput_high = 1;
  /// The whole programme's, of a budget; 0: none.
  double budget_gpu_hours = 0, budget_days = 0, budget_cost_usd = 0;
  bool budget_has_goodput = false;  ///< in these figures
};

enum class Verdict : std::uint8_t { met, met_closely, missed_closely, missed };
std::string_view name_of(Verdict verdict);

struct Judgement {
  Target target;
  double value = 0;
  /// Two standard deviations of the step, or what published ones were off by if that is more; and
  /// goodput's range.
  double low = 0, high = 0;
  /// Closely: the other end of the range is on the other side of the target.
  Verdict verdict{};
  double margin = 0;  ///< over the target, relative; above 0: on the good side
};

/// Throws InputError where the target needs a number of tokens or a price that nobody said.
Judgement judge(const Target& target, const Report& report, const TargetContext& context);

/// "310 G tokens/day", "47.7 days", "5.6 M USD".
std::string format_target_value(TargetQuantity quantity, double value);

}  // namespace orrery
