#pragma once
// A Profile as a file of scenarios/profiles.

#include <span>
#include <string>
#include <string_view>

#include "calibrate/fit_gemm.hpp"
#include "sim/profile.hpp"

namespace orrery {

/// YAML that read_profile reads back. `comment`: what the file says at its top, without '#', lines
/// apart; `errors` follow it. `expert_exchange`: the file with the profile's exchange table, empty:
/// none.
std::string profile_yaml(const Profile& profile, std::string_view comment,
                         std::span<const HeldOutError> errors,
                         const std::string& expert_exchange = "");

}  // namespace orrery
