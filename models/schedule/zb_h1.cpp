// ZB-H1 (Qi et al. 2024, arXiv 2401.10241, 2.1; "ZB1P" in the DeepSeek-V3 report): 1F1B with the
// backward split. Rank r lags its weight gradients r micro-batches behind, so that every rank holds
// at most the P micro-batches of 1F1B's first rank, and spends the debt where 1F1B would idle.
// Bubble (P-1)(F + B_input - W), which is (P-1)(F + B - 2W) with B the full backward; exact while
// W <= min(F, B_input). A longer W fills no more than that of a gap.

#include <algorithm>

#include "models/schedule/script.hpp"

namespace orrery {

void write_zb_h1(const ScheduleShape& shape, int rank, Script& script) {
  const int micro_batches = shape.micro_batches;
  const int warmup = std::min(shape.ranks - rank - 1, micro_batches);
  const int lag = std::min(rank, micro_batches);
  Lane lane(rank, 0);

  // 1. Warm-up: as in 1F1B.
  for (int i = 0; i < warmup; ++i) script.forward(lane);
  // 2. Steady and cool-down: as in 1F1B, with a weight gradient once the lag is built up.
  for (int i = 0; i < micro_batches; ++i) {
    if (i < micro_batches - warmup) script.forward(lane);
    script.backward_input(lane);
    if (i >= lag) script.weight();
  }
  // 3. The lagging weight gradients, while the ranks before this one cool down.
  for (int i = 0; i < lag; ++i) script.weight();
}

}  // namespace orrery
