// GPipe (Huang et al. 2019, arXiv 1811.06965, Figure 2c): all forwards, a flush, all backwards.
// Bubble (P-1)(F+B); every micro-batch is in flight at the flush.

#include "models/schedule/script.hpp"

namespace orrery {

void write_gpipe(const ScheduleShape& shape, int rank, Script& script) {
  // 1. Every micro-batch forward.
  for (int m = 0; m < shape.micro_batches; ++m) script.forward(rank, m);
  // 2. Every micro-batch backward, last in first out: the newest activations are at hand first.
  for (int m = shape.micro_batches - 1; m >= 0; --m) script.backward(rank, m);
}

}  // namespace orrery
