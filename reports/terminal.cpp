#include "reports/terminal.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "sim/units.hpp"

namespace orrery {

namespace {

constexpr std::size_t kColumns = 100;
constexpr std::size_t kMemoryRows = 10;
constexpr std::size_t kPriceRows = 5;
constexpr std::size_t kWarnings = 3;

constexpr std::string_view kMemoryLetters = "pgoawc";
static_assert(kMemoryLetters.size() == kMemoryKinds);

std::string paint(std::string text, std::string_view code, const TerminalOptions& options) {
  return options.colour ? fmt::format("\x1b[{}m{}\x1b[0m", code, text) : std::move(text);
}
constexpr std::string_view kBold = "1";
constexpr std::string_view kRed = "31";
constexpr std::string_view kYellow = "33";

std::string head(const Report& r, const TerminalOptions& options) {
  std::string text = paint(shorten(r.scenario, kColumns), kBold, options) + "\n";
  text += shorten(fmt::format("{} x {}, {}", r.gpus, r.device, r.plan), kColumns) + "\n";
  if (!r.executed_on.empty()) text += shorten("executed on " + r.executed_on, kColumns) + "\n";
  text += "\n";
  text += fmt::format("  {:<16}{:<16}{:<18}{:<16}{}\n", "step time", format_seconds(r.step_time_s),
                      "tokens/day", format_count(r.tokens_per_day),
                      fmt::format("{} tokens a step", format_count(r.tokens_per_step)));
  text += fmt::format(
      "  {:<16}{:<16}{:<18}{}\n", "tokens/s/GPU", fmt::format("{:.1f}", r.tokens_per_s_per_gpu),
      "GPU-hours/10^12",
      fmt::format("{} for a trillion tokens", format_count(r.gpu_hours_per_trillion_tokens)));
  text += fmt::format(
      "  {:<16}{:.1f} causal (MFU {:.1f} %), {:.1f} non-causal (MFU {:.1f} %) of {:.1f} dense "
      "BF16\n",
      "TFLOPS/GPU", r.tflops_per_gpu_causal, 100 * r.mfu_causal, r.tflops_per_gpu_noncausal,
      100 * r.mfu_noncausal, r.peak_flops_per_s * 1e-12);
  return text;
}

/// The first and the last steps of many.
std::string training(const Report& r) {
  if (r.training.empty()) return "";
  const bool mtp = r.training.front().mtp_loss != 0;
  std::vector<std::vector<std::string>> rows = {{"step", "loss", "gradient norm", "s"}};
  if (mtp) rows[0].insert(rows[0].begin() + 2, "MTP loss");
  constexpr std::size_t kShown = 4;
  for (std::size_t i = 0; i < r.training.size(); ++i) {
    if (i == kShown && r.training.size() > 2 * kShown) {
      i = r.training.size() - kShown;
      rows.push_back(std::vector<std::string>(rows[0].size(), ".."));
    }
    const TrainedStep& s = r.training[i];
    rows.push_back({fmt::format("{}", s.number), fmt::format("{:.4f}", s.loss),
                    fmt::format("{:.3f}", s.gradient_norm), fmt::format("{:.3f}", s.seconds)});
    if (mtp) rows.back().insert(rows.back().begin() + 2, fmt::format("{:.4f}", s.mtp_loss));
  }
  return format_table(rows, mtp ? "rrrrr" : "rrrr", "  ") + "\n";
}

std::string phases(const Report& r, const TerminalOptions& options) {
  struct Row {
    const char* name;
    double time_s;
    const char* cell;
    double cell_s;
  };
  const PhaseTimes& p = r.phases_s;
  const CellTimes& c = r.cells_s;
  const Row rows[] = {
      {"forward", p.forward, "1F", c.forward},
      {"backward", p.backward, "1B", c.backward},
      {"weight gradients", p.weight, "1W", c.weight},
      {"overlapped F&B", p.overlapped, "1F1B", c.overlapped},
      {"exposed communication", p.exposed_communication, "", 0},
      {"optimizer", p.optimizer, "opt", c.optimizer},
      {"bubble", p.bubble, "bubble", c.bubble},
      {"step", p.sum(), "step", c.sum()},
  };
  std::string text =
      paint(fmt::format("{:<28}{:>8}{:>9}    {:<34}{:>8}", "Where the step goes, mean of GPUs", "s",
                        "%", "in whole cells (ISCA'25 Table 4)", "s"),
            kBold, options) +
      "\n";
  for (const Row& row : rows) {
    std::string line = fmt::format("  {:<26}{:>13.3f}{:>9.1f}", row.name, row.time_s,
                                   100 * row.time_s / r.step_time_s);
    if (row.cell[0] != '\0') line += fmt::format("    {:<34}{:>8.3f}", row.cell, row.cell_s);
    text += line + "\n";
  }
  return text;
}

/// One letter per slice of capacity; what goes beyond it is drawn beyond the bar's end.
std::string memory_bar(const RankReport& rank, double capacity, std::size_t width) {
  std::string bar;
  double until = 0;
  for (std::size_t k = 0; k < kMemoryKinds; ++k) {
    until += static_cast<double>(rank.memory_at_peak[k]);
    const double cells = until / capacity * static_cast<double>(width);
    const auto end =
        static_cast<std::size_t>(std::min(std::round(cells), static_cast<double>(2 * width)));
    if (end > bar.size()) bar.append(end - bar.size(), kMemoryLetters[k]);
  }
  if (bar.size() < width) bar.append(width - bar.size(), '.');
  return bar;
}

std::string stages_of(const RankReport& rank) {
  return fmt::format("{}", fmt::join(rank.stages, ","));
}

/// Neighbouring positions whose memory looks the same.
struct MemoryLine {
  const RankReport* first = nullptr;
  int last = 0;
  std::string peak;
  std::string bar;
};

std::string memory(const Report& r, const TerminalOptions& options) {
  // One rank per position: the fullest, with all ranks simulated.
  std::vector<const RankReport*> ranks;
  for (const RankReport& rank : r.ranks) {
    if (ranks.empty() || ranks.back()->position != rank.position) {
      ranks.push_back(&rank);
    } else if (rank.memory_peak_bytes > ranks.back()->memory_peak_bytes) {
      ranks.back() = &rank;
    }
  }
  constexpr std::size_t kBar = 64;
  std::vector<MemoryLine> lines;
  for (const RankReport* rank : ranks) {
    MemoryLine line{rank, rank->position,
                    format_bytes(static_cast<double>(rank->memory_peak_bytes)),
                    memory_bar(*rank, r.memory_capacity_bytes, kBar)};
    if (!lines.empty() && lines.back().peak == line.peak && lines.back().bar == line.bar) {
      lines.back().last = line.last;
    } else {
      lines.push_back(std::move(line));
    }
  }
  std::string of_all;
  if (lines.size() > kMemoryRows) {
    of_all = fmt::format(" (the {} fullest of {} lines)", kMemoryRows, lines.size());
    std::stable_sort(lines.begin(), lines.end(), [](const MemoryLine& a, const MemoryLine& b) {
      return a.first->memory_peak_bytes > b.first->memory_peak_bytes;
    });
    lines.resize(kMemoryRows);
    std::stable_sort(lines.begin(), lines.end(), [](const MemoryLine& a, const MemoryLine& b) {
      return a.first->position < b.first->position;
    });
  }
  std::string text = paint(fmt::format("Memory at its peak, of {}{}",
                                       format_bytes(r.memory_capacity_bytes), of_all),
                           kBold, options) +
                     "   parameters gradients optimizer activations workspace communic.\n";
  for (const MemoryLine& line : lines) {
    const RankReport& rank = *line.first;
    const bool one = line.last == rank.position;
    const bool too_large = static_cast<double>(rank.memory_peak_bytes) > r.memory_capacity_bytes;
    const std::string shown = fmt::format(
        " {:>5} {:<8}{:>9} |{}|{}",
        one ? fmt::format("{}", rank.position) : fmt::format("{}-{}", rank.position, line.last),
        shorten(stages_of(rank) + (one ? "" : " .."), 8), line.peak, line.bar.substr(0, kBar),
        too_large ? " too much" : "");
    text += (too_large ? paint(shown, kRed, options) : shown) + "\n";
  }
  return text;
}

/// What the network cost: which way it was simulated, how full it was, and where it was short.
std::string network(const Report& r, const TerminalOptions& options) {
  const NetworkReport& n = r.network;
  const auto title = [&](std::string text) {
    return paint(std::move(text), kBold, options) + "\n";
  };
  std::string text;
  if (n.flows) {
    text += title(fmt::format("{:<20}{:>8}{:>8}{:>11}{:>13}  {}", "Network, as flows", "links",
                              "use %", "busiest %", "held up s", "most at"));
    for (const TierReport& tier : n.tiers) {
      text += fmt::format("  {:<18}{:>8}{:>8.1f}{:>11.1f}", tier.tier, tier.links,
                          100 * tier.mean_use, 100 * tier.busiest_use);
      if (tier.held_back_s >= 0.0005) {
        text += fmt::format("{:>13.3f}  {}", tier.held_back_s, shorten(tier.limiting, 36));
      }
      text += "\n";
    }
    text += fmt::format("  on {}; ops lost {:.3f} s per GPU to sharing\n", shorten(n.fabric, 54),
                        n.stretched_s);
  } else {
    text += title("Network, by formula: each transfer alone");
  }
  std::string causes;
  const auto cause = [&](const char* name, double time_s) {
    if (time_s < 0.0005 * r.step_time_s) return;
    causes += fmt::format("{}{} {:.3f} s", causes.empty() ? "" : ", ", name, time_s);
  };
  cause("expert exchange", r.exposed_s.expert);
  cause("tensor parallel", r.exposed_s.tensor);
  cause("gradients and parameters", r.exposed_s.data);
  cause("pipeline", r.exposed_s.pipeline);
  if (!causes.empty()) text += "  exposed: " + causes + "\n";
  return text;
}

std::string costliest(const Report& r, const TerminalOptions& options) {
  std::string text = paint(fmt::format("{:<68}{:>6}{:>10}  {}",
                                       "Costliest shapes, per GPU and step", "%", "s", "price is"),
                           kBold, options) +
                     "\n";
  for (std::size_t i = 0; i < std::min(kPriceRows, r.prices.size()); ++i) {
    const PriceRow& row = r.prices[i];
    text += fmt::format("  {:<18} {:<47}{:>6.1f}{:>10.3f}  {}{}\n", shorten(row.label, 18),
                        shorten(row.shape, 46), 100 * row.share, row.per_gpu_s, name_of(row.source),
                        row.extrapolated ? "*" : "");
  }
  return text;
}

std::string warnings(const Report& r, const TerminalOptions& options) {
  std::string text;
  for (std::size_t i = 0; i < std::min(kWarnings, r.warnings.size()); ++i) {
    text += paint("warning: ", kYellow, options) +
            shorten(r.warnings[i], kColumns - sizeof("warning: ") + 1) + "\n";
  }
  if (r.warnings.size() > kWarnings) {
    text += fmt::format("and {} more warnings (see --json)\n", r.warnings.size() - kWarnings);
  }
  return text;
}

}  // namespace

std::string to_terminal(const Report& r, const TerminalOptions& options) {
  std::string text = head(r, options) + "\n" + training(r) + phases(r, options) + "\n" + memory(r, options) +
                     "\n" + network(r, options) + "\n" + costliest(r, options);
  if (r.uncertainty) text += fmt::format("\n{}", to_terminal(*r.uncertainty));
  text += warnings(r, options);
  if (options.timing) {
    text += fmt::format("{} operations, {} ranks, simulated in {}\n", r.engine.operations,
                        r.engine.ranks_simulated, format_seconds(r.engine.wall_s));
  }
  return text;
}

std::string format_count(double value) {
  static constexpr std::string_view kPrefixes[] = {"", " K", " M", " B", " T", " P"};
  std::size_t prefix = 0;
  // 999.5 would print as 1000 with three digits.
  while (std::abs(value) >= 999.5 && prefix + 1 < std::size(kPrefixes)) {
    value /= 1000;
    ++prefix;
  }
  const int decimals = std::abs(value) >= 99.95 ? 0 : std::abs(value) >= 9.995 ? 1 : 2;
  return fmt::format("{:.{}f}{}", value, decimals, kPrefixes[prefix]);
}

std::string format_table(const std::vector<std::vector<std::string>>& rows, std::string_view align,
                         std::string_view indent) {
  std::vector<std::size_t> width(align.size(), 0);
  for (const auto& row : rows) {
    for (std::size_t c = 0; c < row.size(); ++c) width[c] = std::max(width[c], row[c].size());
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line(indent);
    for (std::size_t c = 0; c < row.size(); ++c) {
      if (c > 0) line += "  ";
      line += align[c] == 'r' ? fmt::format("{:>{}}", row[c], width[c])
                              : fmt::format("{:<{}}", row[c], width[c]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string shorten(std::string_view text, std::size_t width) {
  if (text.size() <= width) return std::string(text);
  return std::string(text.substr(0, width - 2)) + "..";
}

}  // namespace orrery
