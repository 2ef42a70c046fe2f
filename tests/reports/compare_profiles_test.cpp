#include "reports/compare_profiles.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>

namespace orrery {
namespace {

const std::string kProfiles = std::string(ORRERY_SOURCE_DIR) + "/scenarios/profiles/";

Profile read(const std::string& name) {
  Problems problems;
  const Profile p = read_profile(read_document(kProfiles + name + ".yaml", problems), problems);
  problems.throw_if_any();
  return p;
}

const ProfileError& of(const std::vector<ProfileError>& errors, const std::string& kernel) {
  const auto found = std::find_if(errors.begin(), errors.end(),
                                  [&](const ProfileError& e) { return e.kernel == kernel; });
  EXPECT_NE(found, errors.end()) << kernel;
  return found == errors.end() ? errors.front() : *found;
}

TEST(CompareProfiles, AProfilePricesItsOwnPointsAsMeasured) {
  const Profile h100 = read("h100");
  const std::vector<ProfileError> errors = profile_errors(h100, h100);
  EXPECT_GT(errors.size(), 8u);
  for (const ProfileError& e : errors) {
    // An attention core in two tables of one profile has the first one's time.
    EXPECT_LT(e.median, 1e-6) << e.kernel;
    EXPECT_LT(std::abs(e.bias), 0.02) << e.kernel;
  }
}

// aiconfigurator measured the same kernels on both GPUs (scenarios/profiles cite the tables).
// Scaling by the data sheets' bandwidths must take the memory bound ones, which an H100 runs 17 %
// slower, where they were measured, and leave the others.
TEST(CompareProfiles, AnH100KnownFromAnH200IsNearWhatWasMeasured) {
  const Profile h100 = read("h100");
  const auto scaled = profile_errors(h100, read("h100_from_h200"));
  const auto unscaled = profile_errors(h100, read("h200"));
  for (const char* kernel : {"GEMM bf16", "GEMM fp8_block"}) {
    const std::string memory_bound = std::string(kernel) + ", memory bound";
    EXPECT_LT(of(unscaled, memory_bound).bias, -0.14) << kernel;
    EXPECT_LT(std::abs(of(scaled, memory_bound).bias), 0.05) << kernel;
    EXPECT_LT(of(scaled, memory_bound).median, 0.5 * of(unscaled, memory_bound).median) << kernel;
    EXPECT_LT(of(scaled, kernel).median, 0.07) << kernel;
    EXPECT_LT(of(scaled, kernel).percentile_90, of(unscaled, kernel).percentile_90) << kernel;
    EXPECT_EQ(of(scaled, kernel).points, of(unscaled, kernel).points);
  }
}

TEST(CompareProfiles, TellsProfilesFromScenarios) {
  EXPECT_TRUE(is_profile(kProfiles + "h100.yaml"));
  EXPECT_TRUE(is_profile(kProfiles + "h100_from_h200.yaml"));
  EXPECT_FALSE(is_profile(kProfiles + "../deepseek_v3_2048_h800.yaml"));
  EXPECT_FALSE(is_profile(kProfiles + "none.yaml"));
  const std::string files[] = {kProfiles + "h100.yaml",
                               kProfiles + "../deepseek_v3_2048_h800.yaml"};
  EXPECT_THROW(compare_profiles(files), InputError);
}

}  // namespace
}  // namespace orrery
