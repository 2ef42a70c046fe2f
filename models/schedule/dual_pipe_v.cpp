// DualPipeV (deepseek-ai/DualPipe; Sea AI Lab's "cut in half" note): DualPipe folded at its middle.
// Device r holds stages r and 2P-1-r of 2P; the two directions become the two arms of a V through
// which every micro-batch goes, so no stage is held twice. The eight phases are those of rank r of
// a DualPipe of 2P ranks, and so are the bubble and the 2P+1 chunk activations in flight. Like the
// reference it asks for M of at least 2P.

#include "models/schedule/script.hpp"

namespace orrery {

void write_dual_pipe_v(const ScheduleShape& shape, int rank, Script& script) {
  const Lane down(rank, 0);
  const Lane up(2 * shape.ranks - 1 - rank, 0);
  write_dual_pipe_phases(rank, shape.ranks, shape.micro_batches, down, up, script);
}

}  // namespace orrery
