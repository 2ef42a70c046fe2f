#pragma once
// A whole decoder model in double precision: loss and gradients of a batch, and AdamW. The second
// implementation that executed steps are compared with; it shares no code with kernels/ and means
// the same mathematics. Parameters and their layouts: calibrate/initial_parameters.hpp.
//
//   x = embedding[tokens]; per layer x += attention(norm(x)), x += ffn(norm(x)); logits = head
//   norm(x).
//   y = x W^T; norm(x) = gain * x / sqrt(mean(x^2) + epsilon)  (arXiv 1910.07467)
//   Rotary positions (arXiv 2104.09864) turn columns (2i, 2i + 1) by position * theta^(-2i / dim),
//   of whole heads or, with MLA (arXiv 2405.04434, 2.1), of the last columns of each query head and
//   of one key that all heads share. Scores are scaled by 1 / sqrt(d_qk), causal.
//   ffn: down (silu(gate x) * up x). MoE: shared + sum of weight * expert over the chosen experts.
//   Router (V3 report 2.1.2): scores are a sigmoid of the logits, or their softmax over all
//   experts; chosen by score + bias; with group_limit < groups only within the best groups, by the
//   sum of their two best biased scores where the model has a router bias, else by their best;
//   weights are scores over the sum of the chosen ones, times routed_scale.
//   MTP module k (V3 report 2.2; k from 1): x = projection [norm hidden_i ; norm embedding of
//   token i + k], a block, its own norm and the model's head; predicts token i + k + 1. hidden is
//   what the last layer, or the module before, gives before its final norm.
//   loss = mean over predicted tokens + mtp_weight / modules * sum of the modules' means.

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "models/model.hpp"

namespace orrery::reference {

using Tensors = std::map<std::string, std::vector<double>>;

struct Options {
  double rope_theta = 10000;
  double epsilon = 1e-6;  ///< of norms
  double routed_scale = 1;
  double mtp_weight = 0.3;
};

/// Tokens sequence_length + 1 + mtp_modules; all sequences of a batch have the same length.
using Sequence = std::vector<std::int32_t>;

struct Evaluation {
  double loss = 0;             ///< what gradients are of
  double next_token_loss = 0;  ///< mean of token_losses
  std::vector<double> mtp_losses;
  std::vector<double> token_losses;  ///< of the next token, (sequences, sequence_length)
  /// By MoE layer, (sequences, sequence_length, top_k): the chosen experts, best biased score
  /// first.
  std::map<std::int64_t, std::vector<std::int32_t>> experts;
  Tensors gradients;  ///< differentiate only: of every parameter but router biases
};

/// `parameters`: all that parameters_of(model) names.
Evaluation evaluate(const Model& model, const Options& options, const Tensors& parameters,
                    std::span<const Sequence> batch);
Evaluation differentiate(const Model& model, const Options& options, const Tensors& parameters,
                         std::span<const Sequence> batch);

struct AdamOptions {
  double learning_rate = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.95;
  double epsilon = 1e-8;
  double weight_decay = 0.1;  ///< not of norms
  double max_norm = 0;        ///< gradients are scaled to at most this norm together; 0: never
};

struct AdamState {
  std::int64_t steps = 0;
  Tensors first, second;
};

/// One step of AdamW (arXiv 1711.05101) with corrected moments; returns the norm of all gradients
/// before clipping.
double adam_step(const AdamOptions& options, const Tensors& gradients, Tensors& parameters,
                 AdamState& state);

}  // namespace orrery::reference
