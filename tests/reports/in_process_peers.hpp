#pragma once
// Ranks as threads of one process, for tests of what talks through Peers; ranks can be made to
// vanish.

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "reports/search/peers.hpp"

namespace orrery {

class InProcessPeers final : public Peers {
 public:
  static std::vector<std::unique_ptr<InProcessPeers>> make(int ranks) {
    auto hub = std::make_shared<Hub>(ranks);
    std::vector<std::unique_ptr<InProcessPeers>> all;
    for (int r = 0; r < ranks; ++r) all.emplace_back(new InProcessPeers(hub, r, ranks));
    return all;
  }
  ~InProcessPeers() override { end(Message::Kind::left); }

  int ranks_here() const override { return ranks(); }

  void send(int to, std::string bytes) override {
    deliver(to, {.from = rank(), .kind = Message::Kind::sent, .bytes = std::move(bytes)});
  }

  std::optional<Message> receive(std::chrono::milliseconds at_most) override {
    std::unique_lock lock(hub_->mutex);
    auto& box = hub_->boxes[static_cast<std::size_t>(rank())];
    hub_->changed.wait_for(lock, at_most, [&] { return !box.empty(); });
    if (box.empty()) return std::nullopt;
    Message message = std::move(box.front());
    box.pop_front();
    return message;
  }

  /// Nothing more comes of this rank, and the others find out.
  void vanish() { end(Message::Kind::lost); }

 private:
  struct Hub {
    explicit Hub(int ranks)
        : boxes(static_cast<std::size_t>(ranks)), gone(static_cast<std::size_t>(ranks)) {}
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::deque<Message>> boxes;
    std::vector<char> gone;
  };

  InProcessPeers(std::shared_ptr<Hub> hub, int rank, int ranks)
      : Peers(rank, ranks), hub_(std::move(hub)) {}

  void end(Message::Kind kind) {
    for (int r = 0; r < ranks(); ++r) {
      if (r != rank() && (rank() == 0 || r == 0)) {
        deliver(r, {.from = rank(), .kind = kind, .bytes = {}});
      }
    }
    const std::lock_guard lock(hub_->mutex);
    hub_->gone[static_cast<std::size_t>(rank())] = 1;
  }

  void deliver(int to, Message message) {
    const std::lock_guard lock(hub_->mutex);
    if (hub_->gone[static_cast<std::size_t>(rank())] != 0) return;
    hub_->boxes[static_cast<std::size_t>(to)].push_back(std::move(message));
    hub_->changed.notify_all();
  }

  std::shared_ptr<Hub> hub_;
};

}  // namespace orrery
