#pragma once
// A Program cut down to one of its ranks.

#include "sim/program.hpp"

namespace orrery {

/// The ops of one rank as a Program of that rank alone: those it shares with others stay, with
/// their shapes, and wait for this rank only. It is what a rank does whose peers are always ready.
Program one_rank_of(const Program& program, RankId rank);

}  // namespace orrery
