#include "calibrate/execute/watch.hpp"

#include <fmt/core.h>

#include <algorithm>

#include "calibrate/transport/transport.hpp"

namespace orrery {

void Watch::begin() {
  enqueued_.clear();
  first_ = 0;
  timed_ = false;
}

void Watch::add(OpId op, std::optional<kernels::EventHandle> talks, kernels::EventHandle ended) {
  enqueued_.push_back({op, talks, ended});
}

void Watch::advance() {
  while (first_ < enqueued_.size() && device_.reached(enqueued_[first_].ended)) {
    ++first_;
    timed_ = false;
  }
}

bool Watch::all_done() {
  advance();
  return first_ == enqueued_.size();
}

void Watch::look() {
  advance();
  if (first_ == enqueued_.size()) {
    transport_.check({}, "waiting");
    return;
  }
  // What comes before an op in id order never waits for it, so the first one is the one to time.
  const Enqueued& first = enqueued_[first_];
  std::vector<int> peers;
  if (first.talks) {
    for (const StreamId stream : program_.streams_of(first.op)) {
      if (rank_of(stream) != rank_) peers.push_back(static_cast<int>(rank_of(stream).value));
    }
  }
  transport_.check(peers, [&] { return program_.name(first.op); });
  if (!first.talks || !device_.reached(*first.talks)) return;
  const auto now = Clock::now();
  if (!timed_) since_ = now;
  timed_ = true;
  if (now - since_ > transport_.timeout()) time_out(first.op);
}

/// Who waits says for what. A rank that hangs says nothing, nor does one whose device does before
/// it talks; one whose device hangs behind that is at an op that all others have behind them.
void Watch::time_out(OpId op) {
  const auto name = [&] { return program_.name(op); };
  const std::vector<std::uint64_t> at = transport_.roll_call(op.value, name);
  const auto least = std::min_element(at.begin(), at.end());
  std::string why = fmt::format("{}: not done within {:.3g} s", name(),
                                std::chrono::duration<double>(transport_.timeout()).count());
  if (*least < op.value) {
    why += fmt::format("; rank {} is still in {}", least - at.begin(),
                       program_.name(OpId(static_cast<std::size_t>(*least))));
  } else {
    why += ", and all ranks are in it or wait for it";
  }
  transport_.abort(why);
  throw std::runtime_error(fmt::format("rank {}: {}", rank_.value, why));
}

}  // namespace orrery
