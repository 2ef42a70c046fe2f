#pragma once
// The parameters of a model that is executed: their names and shapes, and their values before the
// first step, which are the same in every layout.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "models/model.hpp"

namespace orrery {

enum class ParameterKind : std::uint8_t {
  matrix,         ///< trained, with weight decay
  gain,           ///< of a norm; trained without weight decay
  selection_bias  ///< of a router; has no gradient, moved by load (V3 report 2.1.2) or left alone
};

/// A weight of y = x W^T is (out, in), row-major; `matrices` of them stand below each other, one an
/// expert. Gains and biases are one row.
struct Parameter {
  std::string name;
  ParameterKind kind{};
  std::int64_t matrices = 1;
  std::int64_t rows = 0;  ///< of one matrix
  std::int64_t columns = 0;

  std::int64_t elements() const { return matrices * rows * columns; }

  friend bool operator==(const Parameter&, const Parameter&) = default;
};

/// All parameters in the model's order. N is a layer; the block of MTP module M is layer
/// layers + M.
///   embedding (vocabulary, hidden), final_norm, head (vocabulary, hidden; none if tied)
///   layers.N.attention_norm, layers.N.ffn_norm
///   MLA:  layers.N.{q_a, q_norm} (with q_lora_rank), layers.N.{q_b, kv_a, kv_norm, kv_b, o}.
///         Columns of q_b's output: per head [nope | rope]; of kv_a's: [latent | rotary key]; of
///         kv_b's: per head [nope key | value].
///   else: layers.N.qkv, output columns [all queries | all keys | all values], each head by head;
///         layers.N.{query_norm, key_norm} (with qk_norm), layers.N.o
///   dense: layers.N.ffn_up (2 intermediate, hidden), rows [gate; up]; layers.N.ffn_down
///   MoE:  layers.N.gate (experts, hidden), layers.N.router_bias (with router_bias),
///         layers.N.{shared_up, shared_down} (with shared experts, all of them in one),
///         layers.N.{routed_up, routed_down} (one matrix an expert, each like ffn_*)
///   mtp.M.{norm_hidden, norm_embedding}, mtp.M.projection (hidden, 2 hidden), input columns
///         [hidden | embedding]; mtp.M.final_norm
/// The model has to be executable (why_not_executable is empty).
std::vector<Parameter> parameters_of(const Model& model);

/// Why a model, though it can be simulated, cannot be executed, in one sentence each; empty if it
/// can: RMSNorm, SwiGLU, no biases, rotary positions over an even number of columns.
std::vector<std::string> why_not_executable(const Model& model);

/// What a model starts from: N(0, deviation^2) for matrices, 1 for gains, 0 for selection biases.
/// V3 has a deviation of 0.006 (report 4.2); of small models 0.02 (GPT-2's) is usual.
struct InitialValues {
  std::uint64_t seed = 0;
  double deviation = 0.02;
};

/// A rectangle of a parameter whose matrices stand below each other.
struct ParameterPart {
  std::int64_t first_row = 0;
  std::int64_t rows = 0;
  std::int64_t first_column = 0;
  std::int64_t columns = 0;
};

/// Writes the part to out[row * pitch + column]. An element depends on the seed, the parameter's
/// name and the element's place in the whole parameter only, so parts can be made anywhere.
void fill_initial_values(const InitialValues& values, const Parameter& parameter,
                         const ParameterPart& part, float* out, std::int64_t pitch);

/// The whole parameter.
std::vector<float> initial_values(const InitialValues& values, const Parameter& parameter);

}  // namespace orrery
