// orrery_derive TABLES OUTPUT: reads the public tables in TABLES, writes OUTPUT/*.yaml, and prints
// how far the profiles are from points they were not made of.

#include <fmt/core.h>

#include <cstdio>
#include <fstream>
#include <string>

#include "calibrate/derive_profiles.hpp"
#include "calibrate/fit_cached.hpp"
#include "sim/config.hpp"

namespace {

bool write(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  if (file.flush()) return true;
  fmt::print(stderr, "cannot write {}\n", path);
  return false;
}

void print_error(const std::string& of, const orrery::HeldOutError& e) {
  fmt::print("{:<22} {:<34} {:>5} points  median {:5.1f} %  90 % {:5.1f} %  bias {:+5.1f} %\n", of,
             e.family, e.points, 100 * e.median, 100 * e.percentile_90, 100 * e.bias);
}

}  // namespace

int main(int argc, char** argv) {
  using namespace orrery;
  if (argc != 3) {
    fmt::print(stderr, "usage: orrery_derive TABLES OUTPUT\n");
    return 2;
  }
  const std::string tables = argv[1];
  const std::string output = argv[2];
  try {
    std::vector<DerivedProfile> all = derive_profiles(tables);
    fmt::print("{}\n", compare_with_trace(tables, all.front().profile));
    all.push_back(derive_trace_profile(tables, all.front().profile));
    // Bookkeeping: what was made from the trace gives the trace back.
    fmt::print("{}\n", compare_with_trace(tables, all.back().profile));
    for (const DerivedProfile& d : all) {
      for (const HeldOutError& e : d.errors) {
        print_error(d.profile.name, e);
      }
      if (!write(output + "/" + d.profile.name + ".yaml", write_profile(d))) return 1;
    }
    const LowLatencyFit low_latency = fit_low_latency(tables);
    for (const HeldOutError& e : low_latency.errors) print_error("low latency", e);
    if (!write(output + "/" + kLowLatencyFile, to_yaml(low_latency))) return 1;
  } catch (const InputError& error) {
    fmt::print(stderr, "{}", format_problems(error.problems()));
    return 2;
  }
  return 0;
}
