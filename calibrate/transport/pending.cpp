#include "calibrate/transport/pending.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <vector>

#include "sim/check.hpp"

namespace orrery {
namespace {

/// "rank 2 failed: why", or the rank's own words.
std::string told_by(int rank, const Failure& failure) {
  return failure.rank == rank ? failure.why
                              : fmt::format("rank {} failed: {}", failure.rank, failure.why);
}

}  // namespace

Request PendingRequests::add(Direction direction, int peer) {
  const std::lock_guard lock(mutex_);
  requests_[++last_id_] = {.direction = direction, .peer = peer};
  return {last_id_};
}

bool PendingRequests::begin(Request request) {
  const std::lock_guard lock(mutex_);
  if (failure_ || leaving_) return false;
  requests_.at(request.id).moving = true;
  ++moving_;
  return true;
}

void PendingRequests::undo_begin(Request request) {
  const std::lock_guard lock(mutex_);
  requests_.at(request.id).moving = false;
  --moving_;
  changed_.notify_all();
}

void PendingRequests::finish(Request request) {
  const std::lock_guard lock(mutex_);
  Pending& pending = requests_.at(request.id);
  pending.moving = false;
  pending.done = true;
  --moving_;
  changed_.notify_all();
}

void PendingRequests::finish_at_once(Request request) {
  const std::lock_guard lock(mutex_);
  if (failure_) return;
  requests_.at(request.id).done = true;
  changed_.notify_all();
}

/// "nothing from ranks 2 and 3", "rank 4 has not taken what was sent", or both; `only_left`: of
/// those that have left.
std::string PendingRequests::waiting_for(std::span<const Request> requests, bool only_left) const {
  std::set<int> from;
  std::set<int> to;
  for (const Request request : requests) {
    const Pending& pending = requests_.at(request.id);
    if (pending.done || (only_left && left_.count(pending.peer) == 0)) continue;
    (pending.direction == Direction::receive ? from : to).insert(pending.peer);
  }
  const auto listed = [](const std::set<int>& ranks) {
    return list_ranks(std::vector<int>(ranks.begin(), ranks.end()));
  };
  std::string text;
  if (!from.empty()) text = "nothing from " + listed(from);
  if (!to.empty()) {
    text += fmt::format("{}{} {} not taken what was sent", text.empty() ? "" : ", and ", listed(to),
                        to.size() == 1 ? "has" : "have");
  }
  return text;
}

std::optional<PendingRequests::Failed> PendingRequests::wait_all(std::span<const Request> requests,
                                                                 OpName op,
                                                                 std::chrono::nanoseconds timeout) {
  const auto deadline = std::chrono::steady_clock::now() + timeout;
  std::unique_lock lock(mutex_);
  const bool failed_before = failure_.has_value();
  for (const Request request : requests) {
    ORRERY_CHECK(requests_.count(request.id) > 0, "rank {}: request {} was waited for already",
                 rank_, request.id);
  }
  const auto all_done = [&] {
    return std::all_of(requests.begin(), requests.end(),
                       [&](Request r) { return requests_.at(r.id).done; });
  };
  const auto peer_is_gone = [&] {
    return !left_.empty() && std::any_of(requests.begin(), requests.end(), [&](Request r) {
      const Pending& pending = requests_.at(r.id);
      return !pending.done && !pending.moving && left_.count(pending.peer) > 0;
    });
  };
  changed_.wait_until(lock, deadline, [&] { return failure_ || all_done() || peer_is_gone(); });
  if (all_done()) {
    for (const Request request : requests) requests_.erase(request.id);
    return std::nullopt;
  }
  const std::string where = fmt::format("rank {}: {}: ", rank_, op.str());
  if (failure_) {
    // Of several ranks that wait in a circle, or in a chain, the one that nobody hears from is the
    // one to look at: so say whom this one was waiting for.
    const bool is_echo = failure_->rank != rank_;
    const std::string also =
        is_echo && !failed_before ? "; here: " + waiting_for(requests, false) : "";
    return Failed{.text = where + told_by(rank_, *failure_) + also, .is_echo = is_echo};
  }
  const std::string why = peer_is_gone()
                              ? waiting_for(requests, true) + ": left before"
                              : fmt::format("{} within {:.3g} s", waiting_for(requests, false),
                                            std::chrono::duration<double>(timeout).count());
  // Its own words go without its name: who reads them is told whose they are.
  failure_ = Failure{.rank = rank_, .why = fmt::format("{}: {}", op.str(), why)};
  changed_.notify_all();
  return Failed{.text = where + why, .is_echo = false};
}

std::optional<PendingRequests::Failed> PendingRequests::look(std::span<const int> peers,
                                                             OpName op) {
  const std::lock_guard lock(mutex_);
  const auto where = [&] { return fmt::format("rank {}: {}: ", rank_, op.str()); };
  if (failure_) {
    return Failed{.text = where() + told_by(rank_, *failure_), .is_echo = failure_->rank != rank_};
  }
  std::vector<int> gone;
  for (const int peer : peers) {
    if (left_.count(peer) > 0) gone.push_back(peer);
  }
  if (gone.empty()) return std::nullopt;
  const std::string why = list_ranks(gone) + " left before";
  failure_ = Failure{.rank = rank_, .why = fmt::format("{}: {}", op.str(), why)};
  changed_.notify_all();
  return Failed{.text = where() + why, .is_echo = false};
}

bool PendingRequests::fail(Failure failure) {
  const std::lock_guard lock(mutex_);
  if (failure_) return false;
  failure_ = std::move(failure);
  changed_.notify_all();
  return true;
}

std::optional<Failure> PendingRequests::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

void PendingRequests::peer_left(int peer) {
  const std::lock_guard lock(mutex_);
  left_.insert(peer);
  changed_.notify_all();
}

void PendingRequests::leave() {
  const std::lock_guard lock(mutex_);
  leaving_ = true;
}

void PendingRequests::wait_until_still() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return moving_ == 0; });
}

}  // namespace orrery
