#include "models/routing.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <string_view>
#include <system_error>
#include <utility>

#include "sim/check.hpp"
#include "sim/random.hpp"

namespace orrery {
namespace {

// --- recorded counts -----------------------------------------------------------------------------

constexpr std::uintmax_t kMaxFileBytes = 64u << 20;
constexpr std::int64_t kMaxCount = std::int64_t{1} << 40;
constexpr std::int64_t kMaxRecordedMicroBatches = 1 << 16;
constexpr std::size_t kMaxProblems = 60;  // more than are printed

/// Recorded tokens of one expert, and where they stand.
struct Count {
  std::int64_t tokens = -1;  ///< none yet
  int line = 0;
};
using Block = std::vector<Count>;  ///< by expert

class CountsReader {
 public:
  CountsReader(std::string path, const Moe& moe, Problems& problems)
      : path_(std::move(path)), moe_(moe), problems_(problems), before_(problems.size()) {}

  RecordedCounts read(std::span<const std::int64_t> layers, std::span<const std::int64_t> also) {
    RecordedCounts counts;
    if (!read_text()) return counts;
    std::set<std::int64_t> known(layers.begin(), layers.end());
    known.insert(also.begin(), also.end());
    if (!read_header()) return counts;
    for (std::size_t i = 1; i < lines_.size() && !too_many(); ++i) {
      if (!lines_[i].empty()) read_row(i, known);
    }
    if (problems_.size() == before_) check_complete(layers);
    if (problems_.size() == before_) check_sums();
    if (problems_.size() != before_) return counts;
    counts.by_micro_batch = by_micro_batch_;
    for (const auto& [key, block] : blocks_) {
      std::vector<std::int64_t>& tokens = counts.layers[key.first].emplace_back();
      for (const Count& count : block) tokens.push_back(count.tokens);
    }
    return counts;
  }

 private:
  using Key = std::pair<std::int64_t, std::int64_t>;  // layer, micro-batch

  bool too_many() const { return problems_.size() >= before_ + kMaxProblems; }

  void report(std::size_t index, std::size_t column, std::string message, std::string hint = "") {
    problems_.add(Problem{{path_, static_cast<int>(index + 1), static_cast<int>(column + 1)},
                          std::move(message),
                          std::move(hint),
                          index < lines_.size() ? lines_[index] : ""});
  }

  bool read_text() {
    std::error_code error;
    const std::uintmax_t bytes = std::filesystem::file_size(path_, error);
    if (error || bytes > kMaxFileBytes) {
      problems_.add(Location{path_},
                    error ? "cannot be read: " + error.message() : "is larger than 64 MiB");
      return false;
    }
    std::ifstream in(path_, std::ios::binary);
    for (std::string line; std::getline(in, line);) {
      if (!line.empty() && line.back() == '\r') line.pop_back();
      lines_.push_back(std::move(line));
    }
    return true;
  }

  struct Field {
    std::string_view text;
    std::size_t column = 0;
  };

  std::vector<Field> fields(std::size_t index) const {
    std::vector<Field> out;
    const std::string_view line = lines_[index];
    for (std::size_t begin = 0;;) {
      const std::size_t end = std::min(line.find(',', begin), line.size());
      std::size_t from = begin;
      std::size_t to = end;
      while (from < to && line[from] == ' ') ++from;
      while (to > from && line[to - 1] == ' ') --to;
      out.push_back({line.substr(from, to - from), from});
      if (end == line.size()) return out;
      begin = end + 1;
    }
  }

  bool read_header() {
    if (lines_.empty()) {
      problems_.add(Location{path_}, "is empty", "the first line is: layer,expert,tokens");
      return false;
    }
    std::vector<std::string_view> names;
    for (const Field& field : fields(0)) names.push_back(field.text);
    by_micro_batch_ =
        names == std::vector<std::string_view>{"layer", "micro_batch", "expert", "tokens"};
    if (!by_micro_batch_ && names != std::vector<std::string_view>{"layer", "expert", "tokens"}) {
      report(0, 0,
             "the first line must be 'layer,expert,tokens' or 'layer,micro_batch,expert,tokens'");
      return false;
    }
    return true;
  }

  /// The field as a whole number from 0 to `most`; -1 and a problem if it is none.
  std::int64_t number(std::size_t index, const Field& field, std::string_view what,
                      std::int64_t most) {
    std::int64_t value = -1;
    const char* end = field.text.data() + field.text.size();
    const auto [stop, error] = std::from_chars(field.text.data(), end, value);
    if (error == std::errc() && stop == end && value >= 0 && value <= most) return value;
    report(index, field.column,
           fmt::format("{} must be a whole number from 0 to {}, not '{}'", what, most, field.text));
    return -1;
  }

  void read_row(std::size_t index, const std::set<std::int64_t>& known) {
    const std::vector<Field> row = fields(index);
    const std::size_t wanted = by_micro_batch_ ? 4 : 3;
    if (row.size() != wanted) {
      report(index, 0, fmt::format("{} fields, the first line has {}", row.size(), wanted));
      return;
    }
    const Field& expert_field = row[wanted - 2];
    const std::int64_t layer = number(index, row[0], "layer", 1 << 20);
    const std::int64_t micro_batch =
        by_micro_batch_ ? number(index, row[1], "micro_batch", kMaxRecordedMicroBatches) : 0;
    const std::int64_t expert = number(index, expert_field, "expert", moe_.routed_experts - 1);
    const std::int64_t tokens = number(index, row[wanted - 1], "tokens", kMaxCount);
    if (layer < 0 || micro_batch < 0 || expert < 0 || tokens < 0) return;
    if (!known.contains(layer)) {
      report(index, row[0].column, fmt::format("layer {} has no experts in this model", layer));
      return;
    }
    Block& block = blocks_[{layer, micro_batch}];
    block.resize(static_cast<std::size_t>(moe_.routed_experts));
    Count& count = block[static_cast<std::size_t>(expert)];
    if (count.tokens >= 0) {
      report(index, expert_field.column,
             fmt::format("{} has expert {} twice, first in line {}", name({layer, micro_batch}),
                         expert, count.line));
      return;
    }
    count = {tokens, static_cast<int>(index + 1)};
  }

  std::string name(const Key& key) const {
    return by_micro_batch_ ? fmt::format("layer {}, micro-batch {}", key.first, key.second)
                           : fmt::format("layer {}", key.first);
  }

  /// Line index of the first row of a block.
  std::size_t first_row(const Block& block) const {
    int line = 0;
    for (const Count& count : block) {
      if (count.tokens >= 0 && (line == 0 || count.line < line)) line = count.line;
    }
    return static_cast<std::size_t>(std::max(line - 1, 0));
  }

  void check_complete(std::span<const std::int64_t> layers) {
    std::int64_t micro_batches = 0;
    for (const auto& [key, block] : blocks_)
      micro_batches = std::max(micro_batches, key.second + 1);
    std::set<std::int64_t> wanted(layers.begin(), layers.end());
    for (const auto& [key, block] : blocks_) wanted.insert(key.first);
    for (const std::int64_t layer : wanted) {
      for (std::int64_t m = 0; m < micro_batches; ++m) {
        if (too_many()) return;
        if (!blocks_.contains({layer, m})) {
          report(0, 0, fmt::format("there is no row for {}", name({layer, m})));
        }
      }
    }
    if (micro_batches == 0) report(0, 0, "there are no counts behind the first line");
    for (const auto& [key, block] : blocks_) {
      std::vector<std::size_t> missing;
      for (std::size_t e = 0; e < block.size(); ++e) {
        if (block[e].tokens < 0) missing.push_back(e);
      }
      if (missing.empty()) continue;
      report(first_row(block), 0,
             missing.size() == 1 ? fmt::format("{} has no row for expert {}", name(key), missing[0])
                                 : fmt::format("{} has no row for expert {} and {} others",
                                               name(key), missing[0], missing.size() - 1),
             "an expert that was not chosen has a row with 0 tokens");
    }
  }

  void check_sums() {
    std::int64_t first_sum = -1;
    const Key first = blocks_.begin()->first;
    for (const auto& [key, block] : blocks_) {
      std::int64_t sum = 0;
      for (const Count& count : block) sum += count.tokens;
      if (first_sum < 0) {
        first_sum = sum;
        if (sum == 0 || sum % moe_.top_k != 0) {
          report(first_row(block), 0,
                 fmt::format("the counts of {} add up to {}, which is not a number of tokens times "
                             "top_k = {}",
                             name(key), sum, moe_.top_k));
          return;
        }
      } else if (sum != first_sum) {
        report(first_row(block), 0,
               fmt::format("the counts of {} add up to {}, those of {} to {}: every layer routes "
                           "the same {} tokens to top_k = {} experts each",
                           name(key), sum, name(first), first_sum, first_sum / moe_.top_k,
                           moe_.top_k));
        continue;
      }
      for (const Count& count : block) {
        if (count.tokens <= sum / moe_.top_k) continue;
        report(static_cast<std::size_t>(count.line - 1), 0,
               fmt::format("{} tokens for one expert, but there are only {} / top_k = {} tokens",
                           count.tokens, sum, sum / moe_.top_k));
      }
    }
  }

  std::string path_;
  const Moe& moe_;
  Problems& problems_;
  std::size_t before_;
  std::vector<std::string> lines_;
  bool by_micro_batch_ = false;
  std::map<Key, Block> blocks_;
};

// --- drawing -------------------------------------------------------------------------------------

// Streams of random numbers, so that no two draws share one.
constexpr std::uint64_t kPopularityStream = 0x706F70;
constexpr std::uint64_t kTokensStream = 0x746F6B;
constexpr std::uint64_t kRouterStream = 0x726F75;

template <class T>
void shuffle(std::span<T> items, Random& random) {
  for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random.below(i)]);
}

/// Shares that add up to 1, none above `most`: what is cut off goes to the others in proportion.
void cut_off(std::vector<double>& shares, double most) {
  std::vector<char> full(shares.size(), 0);
  for (bool again = true; again;) {
    again = false;
    double rest = 0;
    double fixed = 0;
    for (std::size_t e = 0; e < shares.size(); ++e) (full[e] != 0 ? fixed : rest) += shares[e];
    if (rest <= 0) break;
    const double scale = (1 - fixed) / rest;
    for (std::size_t e = 0; e < shares.size(); ++e) {
      if (full[e] != 0) continue;
      shares[e] *= scale;
      if (shares[e] > most) {
        shares[e] = most;
        full[e] = 1;
        again = true;
      }
    }
  }
}

/// Whole numbers in proportion to `weights` that add up to `total`, none above `most` (which leaves
/// room for all): largest remainders first, then lower indices.
std::vector<std::int64_t> apportion(std::span<const double> weights, std::int64_t total,
                                    std::int64_t most) {
  std::vector<double> shares(weights.begin(), weights.end());
  cut_off(shares, static_cast<double>(most) / static_cast<double>(total));
  std::vector<std::int64_t> whole(shares.size());
  std::vector<std::pair<double, std::size_t>> remainders;
  std::int64_t left = total;
  for (std::size_t e = 0; e < shares.size(); ++e) {
    const double exact = shares[e] * static_cast<double>(total);
    whole[e] = std::min(most, static_cast<std::int64_t>(exact));
    left -= whole[e];
    remainders.emplace_back(static_cast<double>(whole[e]) - exact, e);
  }
  std::sort(remainders.begin(), remainders.end());
  for (std::size_t i = 0; left > 0; i = (i + 1) % remainders.size()) {
    std::int64_t& tokens = whole[remainders[i].second];
    if (tokens == most) continue;
    ++tokens;
    --left;
  }
  return whole;
}

LoadLevel level_of(std::int64_t part, std::int64_t all, std::int64_t parts) {
  const double load =
      static_cast<double>(part) * static_cast<double>(parts) / static_cast<double>(all);
  return static_cast<LoadLevel>(std::min<long>(std::lround(load * kLoadLevels), 0xFFFF));
}

}  // namespace

std::optional<double> stated_load(const Routing& routing) {
  if (std::holds_alternative<BalancedRouting>(routing.kind)) return 1;
  if (const auto* stated = std::get_if<StatedImbalance>(&routing.kind)) return stated->busiest;
  return std::nullopt;
}

RecordedCounts read_counts(const std::string& path, const Moe& moe,
                           std::span<const std::int64_t> layers, std::span<const std::int64_t> also,
                           Problems& problems) {
  return CountsReader(path, moe, problems).read(layers, also);
}

namespace {

/// simulate_router, which takes about a second, once for the several Programs of one scenario.
std::shared_ptr<const RouterOutcome> simulated(const Moe& moe, const RouterDynamics& dynamics,
                                               std::uint64_t seed) {
  struct Last {
    Moe moe;
    RouterDynamics dynamics;
    std::uint64_t seed = 0;
    std::shared_ptr<const RouterOutcome> outcome;
  };
  static std::mutex mutex;
  static Last last;  // of a pure function: whoever asks gets the same
  const std::lock_guard lock(mutex);
  if (last.outcome == nullptr || !(last.moe == moe) || !(last.dynamics == dynamics) ||
      last.seed != seed) {
    auto outcome = std::make_shared<const RouterOutcome>(simulate_router(moe, dynamics, seed));
    last = {moe, dynamics, seed, std::move(outcome)};
  }
  return last.outcome;
}

}  // namespace

ExpertLoads::ExpertLoads(const Routing& routing, const Moe& moe, const ExpertGroupShape& shape,
                         std::int64_t last_moe_layer, std::uint64_t seed)
    : routing_(routing), moe_(moe), shape_(shape), last_moe_layer_(last_moe_layer), seed_(seed) {
  ORRERY_CHECK(shape.gpus >= 1 && shape.gpus_per_node >= 1 && shape.tokens >= 1 &&
                   shape.tokens == shape.gpus * shape.tokens_per_gpu &&
                   moe.routed_experts % shape.gpus == 0,
               "{} experts on {} GPUs, {} a node, {} tokens", moe.routed_experts, shape.gpus,
               shape.gpus_per_node, shape.tokens);
  const auto* recorded = std::get_if<RecordedCounts>(&routing.kind);
  if (const auto* dynamics = std::get_if<RouterDynamics>(&routing.kind)) {
    router_ = simulated(moe, *dynamics, Random::of({seed, kRouterStream}).next());
  }
  const auto tokens = static_cast<double>(shape.tokens_per_gpu);
  if (routing.independent_tokens) {
    independent_tokens_ = std::min(*routing.independent_tokens, shape.tokens_per_gpu);
  } else if (router_) {
    independent_tokens_ =
        std::max<std::int64_t>(1, std::llround(tokens / (1 + (tokens - 1) * router_->correlation)));
  } else if (recorded == nullptr || !recorded->by_micro_batch) {
    independent_tokens_ = shape.tokens_per_gpu;
  }
}

std::vector<double> ExpertLoads::popularity(std::int64_t layer) const {
  const auto found = popularity_.find(layer);
  if (found != popularity_.end()) return found->second;
  const auto experts = static_cast<std::size_t>(moe_.routed_experts);
  std::vector<double> shares(experts, 1 / static_cast<double>(experts));
  Random random = Random::of({seed_, kPopularityStream, static_cast<std::uint64_t>(layer)});
  if (const auto* zipf = std::get_if<ZipfPopularity>(&routing_.kind)) {
    double sum = 0;
    for (std::size_t r = 0; r < experts; ++r) {
      sum += shares[r] = std::pow(static_cast<double>(r + 1), -zipf->exponent);
    }
    for (double& share : shares) share /= sum;
    shuffle<double>(shares, random);
  } else if (router_) {
    // The layers' routers are alike but for which expert is which: groups change places, and
    // experts within their group.
    const auto groups = static_cast<std::size_t>(moe_.groups);
    const std::size_t per_group = experts / groups;
    std::vector<std::size_t> order(groups);
    std::iota(order.begin(), order.end(), std::size_t{0});
    shuffle<std::size_t>(order, random);
    for (std::size_t g = 0; g < groups; ++g) {
      const std::span<double> to(shares.data() + g * per_group, per_group);
      std::copy_n(router_->popularity.begin() + static_cast<std::ptrdiff_t>(order[g] * per_group),
                  per_group, to.begin());
      shuffle(to, random);
    }
  } else if (const auto* recorded = std::get_if<RecordedCounts>(&routing_.kind)) {
    const auto own = recorded->layers.find(layer);
    const auto& blocks =
        own != recorded->layers.end() ? own->second : recorded->layers.at(last_moe_layer_);
    double sum = 0;
    std::fill(shares.begin(), shares.end(), 0);
    for (const std::vector<std::int64_t>& block : blocks) {
      for (std::size_t e = 0; e < experts; ++e) {
        shares[e] += static_cast<double>(block[e]);
        sum += static_cast<double>(block[e]);
      }
    }
    for (double& share : shares) share /= sum;
  }
  cut_off(shares, 1 / static_cast<double>(moe_.top_k));
  popularity_.emplace(layer, shares);
  return shares;
}

/// Choices of the independent tokens of all GPUs of the group.
std::vector<std::int64_t> ExpertLoads::draw(std::span<const double> popularity, std::uint64_t layer,
                                            std::uint64_t micro_batch, std::uint64_t group) const {
  Random random = Random::of({seed_, kTokensStream, layer, micro_batch, group});
  // As many choices as tokens have, each drawn by itself: that a token does not choose an expert
  // twice would make loads vary less by a factor of (1 - top_k p) / (1 - p), 0.97 for V3's mean
  // expert.
  std::int64_t left = shape_.gpus * independent_tokens_ * moe_.top_k;
  double rest = 1;
  std::vector<std::int64_t> choices(popularity.size());
  for (std::size_t e = 0; e < popularity.size(); ++e) {
    const bool last = e + 1 == popularity.size();
    choices[e] = last ? left : random.binomial(left, std::min(1.0, popularity[e] / rest));
    left -= choices[e];
    rest = std::max(rest - popularity[e], 1e-300);
  }
  return choices;
}

std::vector<std::int64_t> ExpertLoads::tokens_of_experts(std::int64_t layer,
                                                         std::int64_t micro_batch,
                                                         std::int64_t group) const {
  const std::int64_t total = shape_.tokens * moe_.top_k;
  std::vector<double> weights;
  const auto* recorded = std::get_if<RecordedCounts>(&routing_.kind);
  if (recorded != nullptr && recorded->by_micro_batch && independent_tokens_ == 0) {
    const auto own = recorded->layers.find(layer);
    const auto& blocks =
        own != recorded->layers.end() ? own->second : recorded->layers.at(last_moe_layer_);
    const auto& block = blocks[static_cast<std::size_t>((micro_batch * shape_.groups + group) %
                                                        static_cast<std::int64_t>(blocks.size()))];
    weights.assign(block.begin(), block.end());
  } else {
    weights = popularity(layer);
    if (independent_tokens_ > 0) {
      std::vector<std::int64_t> choices =
          draw(weights, static_cast<std::uint64_t>(layer), static_cast<std::uint64_t>(micro_batch),
               static_cast<std::uint64_t>(group));
      const bool all = independent_tokens_ == shape_.tokens_per_gpu;
      if (all && *std::max_element(choices.begin(), choices.end()) <= shape_.tokens) {
        return choices;
      }
      weights.assign(choices.begin(), choices.end());
    }
  }
  double sum = 0;
  for (const double w : weights) sum += w;
  for (double& w : weights) w /= sum;
  return apportion(weights, total, shape_.tokens);
}

GroupLoad ExpertLoads::group_load(std::int64_t layer, std::int64_t micro_batch,
                                  std::int64_t group) const {
  const std::vector<std::int64_t> tokens = tokens_of_experts(layer, micro_batch, group);
  const auto gpus = static_cast<std::size_t>(shape_.gpus);
  const std::size_t per_gpu = tokens.size() / gpus;
  const auto per_node = static_cast<std::size_t>(std::min(shape_.gpus_per_node, shape_.gpus));
  const std::int64_t all = shape_.tokens * moe_.top_k;
  GroupLoad load;
  std::vector<std::int64_t> node(gpus / per_node, 0);
  for (std::size_t g = 0; g < gpus; ++g) {
    const auto first = tokens.begin() + static_cast<std::ptrdiff_t>(g * per_gpu);
    const std::int64_t rows =
        std::accumulate(first, first + static_cast<std::ptrdiff_t>(per_gpu), std::int64_t{0});
    load.gpu.push_back(level_of(rows, all, shape_.gpus));
    if (g / per_node < node.size()) node[g / per_node] += rows;
  }
  load.busiest_gpu = *std::max_element(load.gpu.begin(), load.gpu.end());
  load.busiest_node = level_of(*std::max_element(node.begin(), node.end()), all,
                               static_cast<std::int64_t>(node.size()));
  return load;
}

}  // namespace orrery
