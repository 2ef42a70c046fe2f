// DualPipe (DeepSeek-V3 report 3.2.1 and Figure 5, arXiv 2412.19437; phases as in
// deepseek-ai/DualPipe): micro-batches enter the pipeline at both ends, so every rank holds two
// stages, and the forward of one direction is overlapped with the backward of the other.
//
// Bubble (P/2-1)(F&B + B - 3W), exact where F = B_input >= W and F&B = F + B; P+1 activations in
// flight. The reference asks for an even P and an even M of at least 2P.

#include <algorithm>

#include "models/schedule/script.hpp"

namespace orrery {

void write_dual_pipe_phases(int depth, int half, int micro_batches_per_lane, Lane near, Lane far,
                            Script& script) {
  const int inward = half - 1 - depth;  // ranks between this one and the middle
  const bool middle = inward == 0;
  const auto times = [](int n, auto&& step) {
    for (int i = 0; i < n; ++i) step(i);
  };

  // 1. F of the near lane, while the far one's first micro-batch is on its way.
  times(2 * inward, [&](int) { script.forward(near); });
  // 2. F of both.
  times(depth + 1, [&](int) {
    script.forward(near);
    script.forward(far);
  });
  // 3. The far lane's backwards arrive; their weight halves fill the gap at once.
  times(inward, [&](int) {
    script.backward_input(far);
    script.weight();
    script.forward(far);
  });
  // 4. Steady: F near & B far, F far & B near.
  times(micro_batches_per_lane - 2 * half + depth + 1, [&](int i) {
    if (i == 0 && middle) {  // the reference leaves this one pair apart: its halves come too late
      script.forward(near);
      script.backward(far);
    } else {
      script.pair(near, far);
    }
    script.pair(far, near);
  });
  // 5. The near lane is out of forwards.
  times(inward, [&](int) {
    script.backward(far);
    script.pair(far, near);
  });
  // 6. B of both; the second half of them input only.
  times(2 * (depth + 1), [&](int i) {
    Lane& lane = i % 2 == 0 ? far : near;
    if (i <= depth) {
      script.backward(lane);
    } else {
      script.backward_input(lane);
    }
  });
  // 7. Weight halves fill the gaps between the near lane's last backwards.
  times(inward, [&](int) {
    script.weight();
    script.backward_input(near);
  });
  // 8. The weight halves still owed.
  times(depth + 1, [&](int) { script.weight(); });
}

void write_dual_pipe(const ScheduleShape& shape, int rank, Script& script) {
  const int per_direction = shape.micro_batches / 2;
  const int mirror = shape.ranks - 1 - rank;
  const Lane downward(rank, 0);
  const Lane upward(mirror, per_direction);
  const bool first_half = rank < mirror;
  write_dual_pipe_phases(std::min(rank, mirror), shape.ranks / 2, per_direction,
                         first_half ? downward : upward, first_half ? upward : downward, script);
}

}  // namespace orrery
