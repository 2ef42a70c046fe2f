#include "reports/ops_by_stream.hpp"

#include <numeric>

namespace orrery {

OpsByStream group_ops(const Program& program, const std::vector<bool>& chosen) {
  OpsByStream grouped;
  grouped.begin.assign(program.streams() + 1, 0);
  for (OpId op{}; op.value < program.size(); ++op) {
    for (const StreamId s : program.streams_of(op)) {
      if (chosen[rank_of(s).value]) ++grouped.begin[s.value + 1];
    }
  }
  std::partial_sum(grouped.begin.begin(), grouped.begin.end(), grouped.begin.begin());
  grouped.ops.resize(grouped.begin.back());
  std::vector<std::size_t> next(grouped.begin.begin(), grouped.begin.end() - 1);
  for (OpId op{}; op.value < program.size(); ++op) {
    for (const StreamId s : program.streams_of(op)) {
      if (chosen[rank_of(s).value]) grouped.ops[next[s.value]++] = op;
    }
  }
  return grouped;
}

}  // namespace orrery
