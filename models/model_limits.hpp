#pragma once
// What both readers of models hold dimensions to. Each bound is far above any model that exists;
// together they keep every count of one layer within int64, and check_dimensions the counts of all
// layers.

#include <cstdint>

#include "models/model.hpp"

namespace orrery::limits {

inline constexpr std::int64_t kHidden = std::int64_t{1} << 17;
inline constexpr std::int64_t kVocabulary = std::int64_t{1} << 24;
inline constexpr std::int64_t kLayers = 10'000;
inline constexpr std::int64_t kPositions = std::int64_t{1} << 30;
inline constexpr std::int64_t kHeads = 4096;
inline constexpr std::int64_t kHeadDim = 4096;
inline constexpr std::int64_t kRank = std::int64_t{1} << 16;
inline constexpr std::int64_t kIntermediate = std::int64_t{1} << 22;
inline constexpr std::int64_t kExperts = std::int64_t{1} << 16;
inline constexpr std::int64_t kMtpModules = 64;

}  // namespace orrery::limits

namespace orrery {

/// Reports what no single key can show: heads that do not divide, experts that cannot be routed,
/// more than kMaxParameters. `root` is the document, in either form; it gives the places.
void check_dimensions(const Model& model, const Node& root, Problems& problems);

}  // namespace orrery
