// 1F1B with a flush (PipeDream-flush; Narayanan et al. 2021, arXiv 2104.04473, 2.2.1).
// Bubble (P-1)(F+B) as GPipe's, but rank r holds at most P-r micro-batches.

#include <algorithm>

#include "models/schedule/script.hpp"

namespace orrery {

void write_one_f_one_b(const ScheduleShape& shape, int rank, Script& script) {
  const int warmup = std::min(shape.ranks - rank - 1, shape.micro_batches);
  Lane lane(rank, 0);

  // 1. Warm-up: one forward for every rank behind this one.
  for (int i = 0; i < warmup; ++i) script.forward(lane);
  // 2. Steady: one forward, one backward.
  for (int i = warmup; i < shape.micro_batches; ++i) {
    script.forward(lane);
    script.backward(lane);
  }
  // 3. Cool-down: the backwards still owed.
  for (int i = 0; i < warmup; ++i) script.backward(lane);
}

}  // namespace orrery
