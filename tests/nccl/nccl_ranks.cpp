// A rank of mpirun that trains a small model over the fake NCCL; check_mpi.cmake looks at what
// comes of it.
//
//   check    three steps; losses are those of messages of the host, rank 0 prints "fine"
//   throw    rank 2 throws in the middle of the second step
//   hang     rank 2 stops (SIGSTOP) there; waits end after a second
//   kill     rank 2 is killed (SIGKILL) there; waits would last a minute

#include <chrono>
#include <csignal>
#include <cstdio>
#include <string>

#include "calibrate/execute/execution.hpp"
#include "calibrate/transport/transport.hpp"
#include "models/step.hpp"
#include "tests/calibrate/small_training.hpp"
#include "tests/mpi/rank_main.hpp"
#include "tests/nccl/fake.hpp"
#include "tests/nccl/host_stream_device.hpp"

namespace {

using namespace orrery;
using namespace std::chrono_literals;

void run(Transport& transport, const std::string& what) {
  const Scenario scenario = small_scenario(kTinyDeepSeek, R"(
  layout: {dp: 4, ep: 4}
  schedule: 1f1b
  sequence_length: 16
  micro_batch: 1
  global_batch: 8
  precision: fp32
)");
  const Program program = build_step(scenario, {.all_ranks = true});
  const RankId rank(static_cast<std::size_t>(transport.rank()));
  const Tokens tokens = [&](std::int64_t step, std::int64_t sequence) {
    if (what != "check" && step == 1 && transport.rank() == 2) {
      if (what == "throw") throw std::runtime_error("no tokens in row 5");
      std::raise(what == "hang" ? SIGSTOP : SIGKILL);
    }
    return random_tokens(scenario, step, sequence);
  };
  const auto losses = [&](const std::shared_ptr<const kernels::Nccl>& nccl) {
    HostStreamDevice device;
    Execution execution(scenario, program, rank, device, &transport, nccl);
    std::vector<double> all;
    for (int s = 0; s < 3; ++s) {
      const RankStep step = execution.step(s, tokens);
      all.push_back(step.loss_sum);
      all.push_back(step.gradient_norm);
    }
    transport.barrier("end of training");
    return all;
  };
  const std::vector<double> over_nccl = losses(fake_nccl());
  if (losses(nullptr) != over_nccl) throw std::runtime_error("other losses than of the host");
  if (transport.rank() == 0) std::printf("fine on %d ranks\n", transport.ranks());
}

}  // namespace

int main(int argc, char** argv) {
  return rank_main(argc, argv, run);
}
