#include "calibrate/transport.hpp"

#include <fmt/core.h>

#include <cstring>
#include <ctime>
#include <fstream>
#include <limits>

#include "sim/check.hpp"

namespace orrery {

void Mailbox::put(int from, std::uint64_t tag, std::vector<std::byte> message) {
  {
    const std::lock_guard lock(mutex_);
    const bool added = messages_.emplace(Key{from, tag}, std::move(message)).second;
    ORRERY_CHECK(added, "two messages from rank {} with tag {}", from, tag);
  }
  changed_.notify_all();
}

void Mailbox::fail(std::string why) {
  {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = std::move(why);
  }
  changed_.notify_all();
}

std::vector<std::byte> Mailbox::take(int from, std::uint64_t tag, double timeout_s,
                                     const std::string& who, const std::string& what) {
  std::unique_lock lock(mutex_);
  const auto found = [&] { return messages_.find({from, tag}); };
  const bool in_time = changed_.wait_for(lock, std::chrono::duration<double>(timeout_s), [&] {
    return found() != messages_.end() || !failure_.empty();
  });
  const auto message = found();
  if (message == messages_.end()) {
    if (!failure_.empty()) throw PeerError(failure_);
    ORRERY_CHECK(!in_time, "woken without a message");
    throw PeerError(fmt::format("{} waited {} s for rank {} ({})", who, timeout_s, from, what));
  }
  std::vector<std::byte> data = std::move(message->second);
  messages_.erase(message);
  return data;
}

std::string Transport::name() const {
  return fmt::format("rank {}", rank_);
}

std::vector<std::byte> Transport::receive(int from, std::uint64_t tag, const std::string& what) {
  return mailbox_.take(from, tag, timeout_s_, name(), what);
}

void Transport::receive(int from, std::uint64_t tag, std::span<std::byte> data,
                        const std::string& what) {
  const std::vector<std::byte> message = receive(from, tag, what);
  ORRERY_CHECK(message.size() == data.size(), "{}: {} bytes from rank {}, not {}", what,
               message.size(), from, data.size());
  if (!data.empty()) std::memcpy(data.data(), message.data(), data.size());
}

std::uint64_t Transport::next_own_tag() {
  return kOwnTags + own_tags_++;
}

std::vector<std::vector<std::byte>> Transport::gather(std::span<const std::byte> data) {
  const std::uint64_t tag = next_own_tag();
  if (rank_ != 0) {
    send(0, tag, data);
    return {};
  }
  std::vector<std::vector<std::byte>> all;
  all.emplace_back(data.begin(), data.end());
  for (int r = 1; r < ranks_; ++r) all.push_back(receive(r, tag, "results"));
  return all;
}

void Transport::barrier() {
  gather({});
  const std::uint64_t tag = next_own_tag();
  if (rank_ != 0) {
    receive(0, tag, "a barrier");
    return;
  }
  for (int r = 1; r < ranks_; ++r) send(r, tag, {});
}

namespace {

std::int64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

/// Tells machines apart, and boots of one: CLOCK_MONOTONIC starts at boot.
std::string boot_id() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string id;
  std::getline(file, id);
  return id;
}

constexpr int kRoundTrips = 32;

}  // namespace

std::int64_t Transport::clock_offset_ns() {
  const std::string own = boot_id();
  const std::vector<std::vector<std::byte>> ids = gather(std::as_bytes(std::span(own)));
  const std::uint64_t tag = next_own_tag();
  own_tags_ += 2 * kRoundTrips;
  std::int64_t offset = 0;
  if (rank_ != 0) {
    for (int i = 0; i < kRoundTrips; ++i) {
      receive(0, tag + static_cast<std::uint64_t>(i), "the clock");
      const std::int64_t now = monotonic_ns();
      send(0, tag + static_cast<std::uint64_t>(i), std::as_bytes(std::span(&now, 1)));
    }
    receive(0, tag + kRoundTrips, std::as_writable_bytes(std::span(&offset, 1)), "the clock");
    return offset;
  }
  for (int r = 1; r < ranks_; ++r) {
    std::int64_t quickest = std::numeric_limits<std::int64_t>::max();
    for (int i = 0; i < kRoundTrips; ++i) {
      const std::int64_t before = monotonic_ns();
      send(r, tag + static_cast<std::uint64_t>(i), {});
      std::int64_t theirs = 0;
      receive(r, tag + static_cast<std::uint64_t>(i),
              std::as_writable_bytes(std::span(&theirs, 1)), "the clock");
      const std::int64_t after = monotonic_ns();
      if (after - before >= quickest) continue;
      quickest = after - before;
      offset = before + quickest / 2 - theirs;
    }
    if (ids[static_cast<std::size_t>(r)] == ids[0]) offset = 0;
    send(r, tag + kRoundTrips, std::as_bytes(std::span(&offset, 1)));
  }
  return 0;
}

class InProcessTransport final : public Transport {
 public:
  using Peers = std::vector<InProcessTransport*>;

  InProcessTransport(int rank, int ranks, std::shared_ptr<Peers> peers)
      : Transport(rank, ranks), peers_(std::move(peers)) {}

  void send(int to, std::uint64_t tag, std::span<const std::byte> data) override {
    peer(to).mailbox().put(rank(), tag, {data.begin(), data.end()});
  }

  void abort(const std::string& why) override {
    for (int r = 0; r < ranks(); ++r) {
      if (r != rank()) peer(r).mailbox().fail(fmt::format("{} failed: {}", name(), why));
    }
  }

 private:
  InProcessTransport& peer(int rank) { return *(*peers_)[static_cast<std::size_t>(rank)]; }
  std::shared_ptr<Peers> peers_;
};

std::vector<std::unique_ptr<Transport>> make_in_process_transports(int ranks) {
  const auto peers = std::make_shared<InProcessTransport::Peers>();
  std::vector<std::unique_ptr<Transport>> all;
  for (int r = 0; r < ranks; ++r) {
    auto transport = std::make_unique<InProcessTransport>(r, ranks, peers);
    peers->push_back(transport.get());
    all.push_back(std::move(transport));
  }
  return all;
}

}  // namespace orrery
