#pragma once
// Makes scenarios/profiles/*.yaml from public tables of measured kernels. The tables themselves are
// not part of the project; the profiles hold a few hundred of their points, with the citation.

#include <string>
#include <vector>

#include "calibrate/fit_gemm.hpp"
#include "sim/profile.hpp"

namespace orrery {

struct DerivedProfile {
  Profile profile;
  std::string comment;  ///< what the file says at its top, without '#'
  std::vector<HeldOutError> errors;
  std::string expert_exchange;  ///< file with the profile's exchange table, empty: none
  std::string low_latency_exchange;  ///< and with that of the low-latency form
};

/// Where orrery_derive puts the low-latency exchange, beside the profiles that name it.
inline constexpr const char* kLowLatencyFile = "low_latency_exchange_hopper.yaml";

/// Profiles made of public kernel benchmarks: h800, h800_deepgemm_2025_04, h100, h200, b200, a100.
/// Nothing in them comes from DeepSeek's training trace. `folder` holds kernels/ and deepseek/.
std::vector<DerivedProfile> derive_profiles(const std::string& folder);

/// The H800 profile with the kernel times of DeepSeek's training trace in the place of benchmarks,
/// so that the error of composing a step can be told from the error of its kernels. `base` is the
/// h800 profile.
DerivedProfile derive_trace_profile(const std::string& folder, const Profile& base);

/// Every GEMM and attention core of the trace, measured beside predicted: a check, never an input.
std::string compare_with_trace(const std::string& folder, const Profile& profile);

/// YAML that read_profile reads back.
std::string write_profile(const DerivedProfile& derived);

}  // namespace orrery
