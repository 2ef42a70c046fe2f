// Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473, 2.2.2; Megatron-LM's virtual
// pipeline): rank r holds v stages r, P+r, 2P+r, ... and takes micro-batches in groups of P through
// all of them. With F and B of one stage (1/v of a rank) the bubble is (P-1)(F+B): 1/v of 1F1B's.

#include <algorithm>

#include "models/schedule/script.hpp"

namespace orrery {

void write_interleaved_1f1b(const ScheduleShape& shape, int rank, Script& script) {
  const int ranks = shape.ranks;
  const int group = ranks * shape.chunks;  // P micro-batches through each of the v chunks
  const int total = shape.micro_batches * shape.chunks;
  const auto chunk_of = [&](int step) { return step % group / ranks; };
  const auto micro_batch_of = [&](int step) { return step / group * ranks + step % ranks; };
  const auto forward = [&](int step) {
    script.forward(chunk_of(step) * ranks + rank, micro_batch_of(step));
  };
  const auto backward = [&](int step) {  // the same walk with the chunks from the last to the first
    const int chunk = shape.chunks - 1 - chunk_of(step);
    script.backward(chunk * ranks + rank, micro_batch_of(step));
  };

  // 1. Warm-up: all chunks but the last of the first group, and two forwards for every rank behind
  //    this one: the last chunk's way down and the first backward's way up.
  const int warmup = std::min((shape.chunks - 1) * ranks + 2 * (ranks - rank - 1), total);
  for (int step = 0; step < warmup; ++step) forward(step);
  // 2. Steady: one forward, one backward.
  for (int step = warmup; step < total; ++step) {
    forward(step);
    backward(step - warmup);
  }
  // 3. Cool-down: the backwards still owed.
  for (int step = total - warmup; step < total; ++step) backward(step);
}

}  // namespace orrery
