// A rank of mpirun, which does what its argument says; check_mpi.cmake looks at what comes of it.
//
//   check    collectives on all ranks, messages of many sizes, gather, clocks; rank 0 prints "fine"
//   throw    rank 2 throws in the middle of a collective
//   hang     rank 2 stops (SIGSTOP) in the middle of a collective; waits end after a second
//   kill     rank 2 is killed (SIGKILL) in the middle of a collective; waits would last a minute
//   sizes    rank 1 expects another size than rank 0 sends
//   leave    rank 1 returns while the others wait for it

#include <array>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <string>
#include <thread>

#include "calibrate/transport/clock_offset.hpp"
#include "calibrate/transport/collectives.hpp"
#include "tests/calibrate/collective_checks.hpp"
#include "tests/mpi/rank_main.hpp"

namespace {

using namespace orrery;
using namespace std::chrono_literals;

/// Of several threads at once, all pairs, both sides of what MPI copies.
void check_messages(Transport& t) {
  std::vector<std::thread> threads;
  std::array<std::string, 3> errors;
  for (std::size_t thread = 0; thread < errors.size(); ++thread) {
    threads.emplace_back([&, thread] {
      try {
        for (std::uint64_t i = 0; i < 30; ++i) {
          const std::size_t size = i * i * i * 40;
          const auto fill = [&](int from, int to) {
            return std::vector<std::byte>(size, static_cast<std::byte>(i + 16 * from + 64 * to));
          };
          std::vector<std::vector<std::byte>> sent;
          std::vector<std::vector<std::byte>> got;
          std::vector<Request> requests;
          for (int peer = 0; peer < t.ranks(); ++peer) {
            sent.push_back(fill(t.rank(), peer));
            got.emplace_back(size);
          }
          for (std::size_t peer = 0; peer < sent.size(); ++peer) {
            const std::uint64_t tag = tag_of(i, OpId(thread));
            requests.push_back(t.post_receive(static_cast<int>(peer), tag, got[peer]));
            requests.push_back(t.post_send(static_cast<int>(peer), tag, sent[peer]));
          }
          t.wait_all(requests, "messages");
          for (std::size_t peer = 0; peer < sent.size(); ++peer) {
            if (got[peer] != fill(static_cast<int>(peer), t.rank())) errors[thread] = "wrong bytes";
          }
        }
      } catch (const std::exception& error) {
        errors[thread] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& error : errors) {
    if (!error.empty()) throw std::runtime_error(error);
  }
}

void check(Transport& t) {
  collective_checks::check_all(t, {0, 1, 7, 513, 5003, 300'001});
  check_messages(t);
  const std::vector<int> own(static_cast<std::size_t>(1000 * t.rank()), t.rank());
  const auto all = t.gather(std::as_bytes(std::span(own)));
  for (std::size_t r = 0; r < all.size(); ++r) {
    const std::vector<int> theirs(1000 * r, static_cast<int>(r));
    if (all[r].size() != theirs.size() * sizeof(int) ||
        (r > 0 && std::memcmp(all[r].data(), theirs.data(), all[r].size()) != 0)) {
      throw std::runtime_error("gather");
    }
  }
  if (clock_offset_ns(t) != 0) throw std::runtime_error("one machine, two clocks");
  t.barrier("end");
  if (t.rank() == 0) std::printf("fine on %d ranks\n", t.ranks());
}

void reduce(Transport& t, const char* name) {
  std::vector<int> group(static_cast<std::size_t>(t.ranks()));
  std::iota(group.begin(), group.end(), 0);
  std::vector<float> buffer(1'000'000, 1);
  all_reduce({.transport = t, .group = group, .tag = 1, .name = name}, ElementType::fp32,
             std::as_writable_bytes(std::span(buffer)));
}

void run(Transport& t, const std::string& what) {
  if (what == "check") return check(t);
  reduce(t, "first");
  if (what == "sizes") {
    std::vector<std::byte> bytes(t.rank() == 1 ? 9000 : 5000);
    if (t.rank() == 0) send(t, 1, 7, bytes, "pipeline");
    if (t.rank() == 1) receive(t, 0, 7, bytes, "pipeline");
    t.barrier();
    return;
  }
  if (what == "leave") {
    if (t.rank() != 1) reduce(t, "gradients of layer 4");
    return;
  }
  if (t.rank() == 2) {
    // Within the collective: the others have posted what they send and receive.
    std::this_thread::sleep_for(200ms);
    if (what == "throw") throw std::runtime_error("GEMM: not a number in row 5");
    std::raise(what == "hang" ? SIGSTOP : SIGKILL);
  }
  reduce(t, "gradients of layer 4");
}

}  // namespace

int main(int argc, char** argv) {
  return rank_main(argc, argv, run);
}
