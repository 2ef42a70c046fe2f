#include <fmt/core.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <mutex>
#include <set>
#include <thread>

#include "calibrate/transport/matcher.hpp"
#include "calibrate/transport/pending.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

/// What one rank knows and others may touch.
struct Post {
  explicit Post(int rank) : pending(rank) {}

  struct Arrival {
    std::size_t size = 0;
    std::vector<std::byte> copied;      ///< the message, or
    const std::byte* held = nullptr;    ///< where it is
    PendingRequests* sender = nullptr;  ///< and whose
    Request request;
  };
  struct Receive {
    std::span<std::byte> into;
    Request request;
  };

  PendingRequests pending;
  std::mutex mutex;  // of the matcher; never held while bytes are copied
  Matcher<Arrival, Receive> matcher;
};

using Posts = std::vector<std::unique_ptr<Post>>;

class InProcessTransport final : public Transport {
 public:
  InProcessTransport(int rank, std::shared_ptr<const Posts> posts, std::chrono::nanoseconds timeout)
      : Transport(rank, static_cast<int>(posts->size()), timeout), posts_(std::move(posts)) {}

  InProcessTransport(const InProcessTransport&) = delete;
  InProcessTransport& operator=(const InProcessTransport&) = delete;

  ~InProcessTransport() override {
    own().pending.leave();
    // Who leaves because somebody failed passes that on: it may get here before that rank's own word.
    const auto failure = own().pending.failure();
    for (const auto& post : *posts_) {
      if (post.get() == &own()) continue;
      if (failure) post->pending.fail(*failure);
      post->pending.peer_left(rank());
    }
    own().pending.wait_until_still();
  }

  Request post_send(int to, std::uint64_t tag, std::span<const std::byte> bytes) override {
    const Request request = own().pending.add(Direction::send, to);
    Post::Arrival arrival{.size = bytes.size()};
    if (bytes.size() <= kCopiedBytes) {
      arrival.copied.assign(bytes.begin(), bytes.end());
      own().pending.finish_at_once(request);
    } else {
      arrival.held = bytes.data();
      arrival.sender = &own().pending;
      arrival.request = request;
    }
    Post& receiver = at(to);
    std::optional<Post::Receive> receive;
    {
      const std::lock_guard lock(receiver.mutex);
      receive = receiver.matcher.arrive(rank(), tag, arrival);
    }
    if (receive) deliver(arrival, rank(), *receive, receiver);
    return request;
  }

  Request post_receive(int from, std::uint64_t tag, std::span<std::byte> bytes) override {
    at(from);
    Post::Receive receive{.into = bytes, .request = own().pending.add(Direction::receive, from)};
    std::optional<Post::Arrival> arrival;
    {
      const std::lock_guard lock(own().mutex);
      arrival = own().matcher.receive(from, tag, receive);
    }
    if (arrival) deliver(*arrival, from, receive, own());
    return receive.request;
  }

  void wait_all(std::span<const Request> requests, OpName op) override {
    throw_if(own().pending.wait_all(requests, op, timeout()));
  }

  void check(std::span<const int> peers, OpName op) override {
    throw_if(own().pending.look(peers, op));
  }

  void abort(const std::string& why) override {
    own().pending.fail({.rank = rank(), .why = why});
    tell_others();
    own().pending.wait_until_still();
  }

 private:
  Post& at(int rank) const {
    ORRERY_CHECK(rank >= 0 && rank < ranks(), "rank {} of {}", rank, ranks());
    return *(*posts_)[static_cast<std::size_t>(rank)];
  }
  Post& own() const { return at(rank()); }

  void throw_if(const std::optional<PendingRequests::Failed>& failed) {
    if (!failed) return;
    tell_others();
    own().pending.wait_until_still();
    throw TransportError(failed->text, failed->is_echo);
  }

  /// Of this rank's own failure; those of others they know.
  void tell_others() {
    const auto failure = own().pending.failure();
    if (!failure || failure->rank != rank()) return;
    for (const auto& post : *posts_) post->pending.fail(*failure);
  }

  /// By whoever posted later, one copy. A side that has failed or left is let be.
  void deliver(const Post::Arrival& arrival, int from, const Post::Receive& receive,
               Post& receiver) {
    if (arrival.size != receive.into.size()) {
      const Failure failure{.rank = receiver.pending.rank(),
                            .why = fmt::format("rank {} sent {} bytes where {} were expected", from,
                                               arrival.size, receive.into.size())};
      for (const auto& post : *posts_) post->pending.fail(failure);
      return;
    }
    if (!receiver.pending.begin(receive.request)) return;
    const bool held = arrival.sender != nullptr;
    if (held && !arrival.sender->begin(arrival.request)) {
      receiver.pending.undo_begin(receive.request);
      return;
    }
    const std::byte* bytes = held ? arrival.held : arrival.copied.data();
    if (arrival.size > 0) std::memcpy(receive.into.data(), bytes, arrival.size);
    if (held) arrival.sender->finish(arrival.request);
    receiver.pending.finish(receive.request);
  }

  std::shared_ptr<const Posts> posts_;
};

}  // namespace

std::vector<std::unique_ptr<Transport>> make_in_process_transports(
    int ranks, std::chrono::nanoseconds timeout) {
  auto posts = std::make_shared<Posts>();
  posts->reserve(static_cast<std::size_t>(ranks));
  for (int rank = 0; rank < ranks; ++rank) posts->push_back(std::make_unique<Post>(rank));
  std::vector<std::unique_ptr<Transport>> transports;
  transports.reserve(posts->size());
  for (int rank = 0; rank < ranks; ++rank) {
    transports.push_back(std::make_unique<InProcessTransport>(rank, posts, timeout));
  }
  return transports;
}

namespace {

/// What became of the bodies of run_in_process.
struct Outcome {
  std::mutex mutex;
  std::condition_variable changed;
  std::set<int> running;
  std::exception_ptr first;  // in time
  std::exception_ptr first_echo;

  std::exception_ptr error() const { return first ? first : first_echo; }
};

void run_rank(Transport& transport, const std::function<void(Transport&)>& body, Outcome& outcome) {
  try {
    body(transport);
  } catch (const std::exception& error) {
    {
      const auto* failed = dynamic_cast<const TransportError*>(&error);
      const std::lock_guard lock(outcome.mutex);
      auto& slot = failed != nullptr && failed->is_echo() ? outcome.first_echo : outcome.first;
      if (!slot) slot = std::current_exception();
    }
    transport.abort(error.what());
  }
  const std::lock_guard lock(outcome.mutex);
  outcome.running.erase(transport.rank());
  outcome.changed.notify_all();
}

/// Until all have returned; when one has failed, for `patience` more.
void wait_for_all(Outcome& outcome, std::chrono::nanoseconds patience) {
  std::unique_lock lock(outcome.mutex);
  outcome.changed.wait(lock, [&] { return outcome.running.empty() || outcome.error(); });
  if (outcome.changed.wait_for(lock, patience, [&] { return outcome.running.empty(); })) return;
  try {
    std::rethrow_exception(outcome.error());
  } catch (const std::exception& error) {
    const std::vector<int> hung(outcome.running.begin(), outcome.running.end());
    fmt::print(stderr, "orrery: error: {}\norrery: {} did not end: giving up\n", error.what(),
               list_ranks(hung));
  }
  std::fflush(nullptr);
  std::_Exit(1);
}

}  // namespace

void run_in_process(int ranks, std::chrono::nanoseconds timeout,
                    const std::function<void(Transport&)>& body) {
  std::vector<std::unique_ptr<Transport>> transports = make_in_process_transports(ranks, timeout);
  Outcome outcome;
  for (int rank = 0; rank < ranks; ++rank) outcome.running.insert(rank);
  std::vector<std::thread> threads;
  threads.reserve(transports.size());
  for (auto& transport : transports) {
    // A rank has left when its body returns, not when all have.
    threads.emplace_back([&, mine = std::move(transport)] { run_rank(*mine, body, outcome); });
  }
  wait_for_all(outcome, timeout + std::chrono::seconds(1));
  for (std::thread& thread : threads) thread.join();
  if (outcome.error()) std::rethrow_exception(outcome.error());
}

}  // namespace orrery
