#include "calibrate/transport/clock_offset.hpp"

#include <unistd.h>

#include <array>
#include <ctime>
#include <fstream>
#include <limits>

namespace orrery {
namespace {

constexpr std::uint64_t kTag = kOwnTags | 0x100;
constexpr int kRoundTrips = 64;
constexpr const char* kName = "comparing clocks";

void send_number(Transport& t, int to, std::int64_t number) {
  t.wait(t.post_send(to, kTag, std::as_bytes(std::span(&number, 1))), kName);
}

std::int64_t receive_number(Transport& t, int from) {
  std::int64_t number = 0;
  t.wait(t.post_receive(from, kTag, std::as_writable_bytes(std::span(&number, 1))), kName);
  return number;
}

/// Rank 0's side: one rank after the other, so that they do not delay each other.
void answer(Transport& transport, const MachineClock& clock) {
  const auto identities = transport.gather(std::as_bytes(std::span(clock.identity)), kName);
  for (int rank = 1; rank < transport.ranks(); ++rank) {
    const bool same = identities[static_cast<std::size_t>(rank)] == identities[0];
    send_number(transport, rank, same ? 0 : kRoundTrips);
    for (int i = 0; !same && i < kRoundTrips; ++i) {
      receive_number(transport, rank);
      send_number(transport, rank, clock.now_ns());
    }
  }
}

}  // namespace

MachineClock monotonic_clock() {
  std::string identity;
  std::getline(std::ifstream("/proc/sys/kernel/random/boot_id"), identity);
  std::array<char, 64> name{};
  const ssize_t length = readlink("/proc/self/ns/time", name.data(), name.size());
  if (length > 0) identity.append(name.data(), static_cast<std::size_t>(length));
  return {.identity = identity, .now_ns = [] {
            timespec now{};
            clock_gettime(CLOCK_MONOTONIC, &now);
            return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
          }};
}

std::int64_t clock_offset_ns(Transport& transport, const MachineClock& clock) {
  if (transport.rank() == 0) {
    answer(transport, clock);
    return 0;
  }
  transport.gather(std::as_bytes(std::span(clock.identity)), kName);
  std::int64_t offset = 0;
  std::int64_t quickest = std::numeric_limits<std::int64_t>::max();
  for (auto left = receive_number(transport, 0); left > 0; --left) {
    const std::int64_t before = clock.now_ns();
    send_number(transport, 0, 0);
    const std::int64_t theirs = receive_number(transport, 0);
    const std::int64_t took = clock.now_ns() - before;
    if (took >= quickest) continue;
    quickest = took;
    offset = theirs - (before + took / 2);
  }
  return offset;
}

}  // namespace orrery
