#pragma once
// What an executed model is trained on: sequences of tokens, of which each rank can make its own.

#include <cstdint>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "sim/config.hpp"

namespace orrery {

/// The sequences of a training run.
struct SequencePlan {
  std::int64_t vocabulary = 0;
  std::int64_t tokens = 0;    ///< of a sequence: sequence_length + 1 + mtp_modules
  std::int64_t per_step = 1;  ///< sequences of the global batch
  std::uint64_t seed = 0;
};

/// Windows of a text, one after the other without overlap (what is left at the end is not used); a
/// byte is a token. Each pass over the text has an order of its own, drawn from the seed.
struct TextTokens {
  SequencePlan plan;
  std::string text;

  std::int64_t windows() const { return static_cast<std::int64_t>(text.size()) / plan.tokens; }
};

/// Independent tokens, token r (from 0) in proportion to (r + 1)^-exponent.
struct ZipfTokens {
  SequencePlan plan;
  std::vector<double> up_to;  ///< by token: the probability of it and those before
};

using TokenSource = std::variant<TextTokens, ZipfTokens>;

/// Reads a text. Problems: no such file; shorter than one sequence; a byte that the vocabulary does
/// not have (at its line and column). What is wrong with the whole file is said at `where`, the
/// value of the scenario that names it, if that has a location.
std::optional<TokenSource> read_text_tokens(const SequencePlan& plan, const std::string& path,
                                            const Node& where, Problems& problems);

TokenSource zipf_tokens(const SequencePlan& plan, double exponent = 1);

/// Sequence `index` (0 .. per_step - 1 of the global batch) of step `step` (from 0): plan.tokens
/// tokens. Depends on the source, the step and the index only.
std::vector<std::int32_t> sequence_of(const TokenSource& source, std::int64_t step,
                                      std::int64_t index);

}  // namespace orrery
