#include "kernels/choose_streaming.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace orrery::kernels {

namespace {

std::int64_t divide_up(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace

RowPlan choose_rows(std::int64_t units, std::int64_t width, int sms, int block, int max_octets) {
  RowPlan plan;
  plan.block = block;
  const std::int64_t octets = divide_up(width, kOctet);
  plan.threads_per_row = block;
  plan.octets = 0;
  for (const int threads : {32, 128, 256, 512, 1024}) {
    if (threads > block) break;
    const std::int64_t each = divide_up(octets, threads);
    if (each > max_octets) continue;
    plan.threads_per_row = threads;
    plan.octets = each <= 1 ? 1 : each <= 2 ? 2 : 4;
    break;
  }
  const std::int64_t blocks = divide_up(units, block / plan.threads_per_row);
  plan.grid = static_cast<int>(std::clamp<std::int64_t>(blocks, 1, sms));
  return plan;
}

int choose_grid(std::int64_t threads, int sms, int block, int blocks_per_sm) {
  return static_cast<int>(
      std::clamp<std::int64_t>(divide_up(threads, block), 1, std::int64_t{sms} * blocks_per_sm));
}

int warps_that_fit(std::int64_t bytes_per_warp, std::int64_t shared_bytes) {
  const std::int64_t warps = shared_bytes / std::max<std::int64_t>(bytes_per_warp, 1);
  if (warps == 0) {
    throw std::runtime_error(std::to_string(bytes_per_warp) +
                             " bytes of shared memory for each warp, but a block has only " +
                             std::to_string(shared_bytes));
  }
  return static_cast<int>(std::min<std::int64_t>(warps, 32));
}

ChunkPlan choose_chunks(std::int64_t pairs, std::int64_t counters, std::int64_t workspace_bytes) {
  // 32 rounds of a warp hide what a chunk costs by itself; more of them where the counters would
  // not fit.
  ChunkPlan plan{.pairs_per_chunk = 1024};
  const std::int64_t room = workspace_bytes / 4 / std::max<std::int64_t>(counters, 1);
  while (divide_up(pairs, plan.pairs_per_chunk) > std::max<std::int64_t>(room, 1)) {
    plan.pairs_per_chunk *= 2;
  }
  plan.chunks = std::max<std::int64_t>(divide_up(pairs, plan.pairs_per_chunk), 1);
  return plan;
}

}  // namespace orrery::kernels
