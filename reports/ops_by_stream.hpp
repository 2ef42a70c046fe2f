#pragma once
// The ops of some ranks, stream by stream.

#include <cstddef>
#include <span>
#include <vector>

#include "sim/program.hpp"

namespace orrery {

struct OpsByStream {
  std::vector<std::size_t> begin;
  std::vector<OpId> ops;
  /// In the order in which they run.
  std::span<const OpId> of(StreamId s) const {
    return {ops.data() + begin[s.value], ops.data() + begin[s.value + 1]};
  }
};

/// Of the ranks whose entry in `chosen` is true; the other streams have none.
OpsByStream group_ops(const Program& program, const std::vector<bool>& chosen);

}  // namespace orrery
