#include "models/training.hpp"

#include <fmt/core.h>

#include <filesystem>
#include <utility>

namespace orrery {
namespace {

namespace fs = std::filesystem;

struct Key {
  const char* name;
  double Training::*value;
  double min;
  double max;
};
constexpr Key kKeys[] = {
    {"norm_epsilon", &Training::norm_epsilon, 0, 1},
    {"rope_theta", &Training::rope_theta, 1, 1e12},
    {"routed_scale", &Training::routed_scale, 1e-6, 1e6},
    {"mtp_weight", &Training::mtp_weight, 0, 1e6},
    {"initial_deviation", &Training::initial_deviation, 0, 1e3},
    {"learning_rate", &Training::learning_rate, 0, 1e3},
    {"beta1", &Training::beta1, 0, 0.999999},
    {"beta2", &Training::beta2, 0, 0.999999},
    {"weight_decay", &Training::weight_decay, 0, 1e3},
    {"clip_norm", &Training::clip_norm, 0, 1e12},
    {"adam_epsilon", &Training::adam_epsilon, 0, 1},
};

}  // namespace

Training read_training(const Node& node, Problems& problems) {
  Training training;
  MapReader map(node, problems, "training");
  training.text = map.text_or("text", "");
  if (!training.text.empty()) {
    training.text = (fs::path(map.at("text").folder()) / training.text).lexically_normal().string();
    std::error_code ignored;
    if (!fs::is_regular_file(training.text, ignored)) {
      problems.add(map.at("text"), fmt::format("there is no file {}", training.text),
                   "paths are relative to the scenario's folder");
    }
  }
  for (const Key& key : kKeys) {
    training.*key.value = map.number_or(key.name, training.*key.value, key.min, key.max);
  }
  map.finish();
  return training;
}

std::string to_yaml(const Training& training, const std::string& directory) {
  std::string out;
  if (!training.text.empty()) {
    out = fmt::format(
        "text: {}, ",
        in_quotes(fs::path(training.text).lexically_proximate(directory).string()));
  }
  for (const Key& key : kKeys) out += fmt::format("{}: {}, ", key.name, training.*key.value);
  out.resize(out.size() - 2);
  return "{" + out + "}";
}

}  // namespace orrery
