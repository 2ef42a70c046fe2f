// ZB-V (Qi et al. 2024, arXiv 2401.10241, 6, and V-ZB of arXiv 2405.15362): two chunks per rank in
// a V, stages r and 2P-1-r, so that the rank that runs a micro-batch's first forward also runs its
// loss and its first backward. This is the handcrafted variant, which fixes the order for F =
// B_input = W instead of searching one for measured times: then no rank idles between its first and
// its last action (M >= 2P-1), and none ever holds more than 2P chunks' activations, as much as
// 1F1B's P whole ones. With other times it is valid but bubbles.

#include <algorithm>

#include "models/schedule/script.hpp"

namespace orrery {

void write_zb_v(const ScheduleShape& shape, int rank, Script& script) {
  const int behind = shape.ranks - rank;  // ranks from here to the turn of the V
  // The phases need 2P-1 micro-batches to stand on; those the shape lacks are dropped.
  const int micro_batches = std::max(shape.micro_batches, 2 * shape.ranks - 1);
  Lane down(rank, 0);
  Lane up(2 * shape.ranks - 1 - rank, 0);
  const auto backward_and_weight = [&](Lane& lane) {
    script.backward_input(lane);
    script.weight();
  };

  // 1. Fill the way down to the turn and back.
  for (int i = 0; i < 2 * behind - 1; ++i) script.forward(down);
  // 2. Forwards of both arms.
  for (int i = 0; i < rank; ++i) {
    script.forward(up);
    script.forward(down);
  }
  // 3. The first losses come up the V: forwards and backwards of the upward arm.
  for (int i = 0; i < behind; ++i) {
    script.forward(up);
    backward_and_weight(up);
  }
  // 4. Steady: F B W of one arm, F B W of the other, until the forwards run out.
  while (up.next_forward < micro_batches) {
    if (down.next_forward < micro_batches) script.forward(down);
    backward_and_weight(down);
    script.forward(up);
    backward_and_weight(up);
  }
  // 5. Drain: backwards first, since the ranks before this one wait for them.
  for (int i = 0; i < rank; ++i) {
    script.backward_input(down);
    script.backward_input(up);
  }
  // 6. The last backwards come one step apart; weight gradients in between.
  for (int i = 0; i < behind; ++i) backward_and_weight(down);
  // 7. The weight gradients still owed.
  for (int i = 0; i < 2 * rank; ++i) script.weight();

  script.drop_from(shape.micro_batches);
}

}  // namespace orrery
