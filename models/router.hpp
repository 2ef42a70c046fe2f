#pragma once
// The dynamics of an expert router: what its selection bias and its balance loss make of tokens
// that prefer some experts. A pure function of its arguments and a seed.
//
// A token t of a sequence q has the affinity
//   x[t, e] = offset[e] + sequence_spread * u[q, e] + token_spread * v[t, e]
// to expert e, with u and v standard normal and offset[e] drawn once with the standard deviation
// offset_spread. Its score is sigmoid(x) or softmax(x) over the experts, and it selects top_k
// experts by score + bias (DeepSeek-V3 report 2.1.2; arXiv 2408.15664, section 3). What a real
// router does and this one does not: the model's own gradient moves the offsets, and experts
// resemble each other.

#include <cstdint>
#include <span>
#include <vector>

#include "models/model.hpp"
#include "sim/random.hpp"

namespace orrery {

/// The spreads are in units of affinity, before the sigmoid. None of them is published for any
/// model: the defaults are round numbers, not measurements.
struct RouterDynamics {
  std::int64_t steps = 300;      ///< training steps simulated
  std::int64_t sequences = 256;  ///< of each step's batch
  std::int64_t tokens = 16;      ///< of each sequence
  double offset_spread = 0.5;
  double sequence_spread = 0.5;
  double token_spread = 1;
  double bias_step = 0.001;  ///< V3 report 4.2: 0.001, and 0 for the last 500 B tokens
  double sequence_loss = 0;  ///< its factor alpha (V3 report 2.1.2, eq. 17 to 20; 4.2: 0.0001)
  /// What a gradient descent step moves an offset by, over the loss's gradient with respect to it.
  /// An offset is the product of the expert's vector with the mean hidden state; with a normalised
  /// state of n elements, plain descent at rate r moves it by r n, which is about 1.6 for V3's
  /// peak rate 2.2e-4 and n = 7168. (It trains with AdamW, which this does not imitate.)
  double loss_rate = 1;

  friend bool operator==(const RouterDynamics&, const RouterDynamics&) = default;
};

/// Selects a token's experts: of `groups` equal groups of consecutive experts the `group_limit`
/// with the greatest sum of their two best biased scores, and in them the top_k greatest biased
/// scores. (Groups of one expert are scored by it alone.) Of equal scores the lower index wins.
class ExpertSelection {
 public:
  explicit ExpertSelection(const Moe& moe);
  /// `biased`: a score and bias for each expert. Returns top_k indices, greatest score first; valid
  /// until the next call.
  std::span<const std::int32_t> operator()(std::span<const float> biased);

 private:
  std::int32_t experts_, top_k_, groups_, group_limit_, per_group_;
  std::vector<float> group_score_;
  std::vector<std::int32_t> group_order_;
  std::vector<std::int32_t> chosen_;
};

/// max load / mean load - 1 (arXiv 2408.15664, eq. 4).
double max_violation(std::span<const std::int64_t> loads);

/// Adds to `gradient` that of one sequence's balance loss sum_e f_e P_e (V3 report, eq. 17 to 20)
/// with respect to the offset of each expert. f_e = experts / (top_k tokens) x selections of e,
/// taken as constant; P_e the mean over the tokens of score_e / sum of scores. `scores`: tokens x
/// experts.
void add_balance_gradient(const Moe& moe, std::span<const float> scores,
                          std::span<const std::int64_t> selections, std::span<double> gradient);

struct RouterOutcome {
  std::vector<double> max_violation;             ///< of each step's batch
  std::vector<std::vector<std::int64_t>> loads;  ///< by step: tokens of each expert
  std::vector<double> bias;                      ///< at the end
  /// Of each expert at the end, over 262,144 tokens or more that are not trained on; adds up to 1.
  std::vector<double> popularity;
  /// How alike the choices of one sequence's tokens are (intra-class correlation, over the same
  /// batches): the variance of an expert's share between sequences over p (1 - p). T tokens of one
  /// sequence vary as T / (1 + (T - 1) correlation) independent ones do (Kish's design effect).
  double correlation = 0;
};

/// After each step bias[e] += bias_step * sign(mean load - load[e]), and the offsets descend along
/// the mean gradient of the sequences' balance losses times sequence_loss and loss_rate.
RouterOutcome simulate_router(const Moe& moe, const RouterDynamics& dynamics, std::uint64_t seed);

}  // namespace orrery
