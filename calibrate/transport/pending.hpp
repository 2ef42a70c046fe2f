#pragma once
// One rank's requests under way, and whether the rank is still well: what carriers share.

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <unordered_map>

#include "calibrate/transport/transport.hpp"

namespace orrery {

enum class Direction : std::uint8_t { send, receive };

/// Who failed, and why.
struct Failure {
  int rank = 0;
  std::string why;
};

/// All members may be called by any thread.
class PendingRequests {
 public:
  explicit PendingRequests(int rank) : rank_(rank) {}

  int rank() const { return rank_; }

  /// Once the rank has failed, waiting for it fails.
  Request add(Direction direction, int peer);

  /// Bytes are about to be moved from or to the request's memory. False: the rank has failed or
  /// left, hands off.
  bool begin(Request request);
  /// Nothing was moved after all.
  void undo_begin(Request request);
  /// They have been moved, and the request is done.
  void finish(Request request);
  /// Done without anybody touching its memory any more (a send that was copied); unless the rank
  /// has failed.
  void finish_at_once(Request request);

  /// Returns nothing when all are done, and forgets them. Otherwise the rank has failed: returns
  /// why, as the text of a TransportError.
  struct Failed {
    std::string text;
    bool is_echo = false;
  };
  std::optional<Failed> wait_all(std::span<const Request> requests, OpName op,
                                 std::chrono::nanoseconds timeout);

  /// The same without requests: fails if the rank has failed, or one of the peers has left.
  std::optional<Failed> look(std::span<const int> peers, OpName op);

  /// Only the first failure, own or another's, counts: true if it was this one. Every wait returns
  /// at once.
  bool fail(Failure failure);
  std::optional<Failure> failure() const;
  void peer_left(int peer);

  /// No begin() succeeds from now on.
  void leave();
  /// Until all that has begun is finished.
  void wait_until_still();

 private:
  struct Pending {
    Direction direction{};
    int peer = 0;
    bool moving = false;
    bool done = false;
  };
  std::string waiting_for(std::span<const Request> requests, bool only_left) const;

  const int rank_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t last_id_ = 0;
  std::unordered_map<std::uint64_t, Pending> requests_;
  std::size_t moving_ = 0;
  std::set<int> left_;
  bool leaving_ = false;
  std::optional<Failure> failure_;
};

}  // namespace orrery
