// Ranks as processes of MPI. One thread makes all calls of MPI, from MPI_Init_thread to
// MPI_Finalize (MPI_THREAD_FUNNELED suffices); the others leave posts with it and sleep until it is
// done with them.
//
// MPI's tags are ints, ours have 64 bits. So every message begins with a control message, which
// carries our tag, on one tag of MPI's. Up to kCopiedBytes travel in it. Larger ones follow as a
// message of their own, on a tag of MPI's that the header names; it is received straight into the
// memory of the receive that matches, once there is one: MPI itself holds back large messages until
// then. Control messages of one sender come in order, and so the messages of one (sender, tag) do.

#include <fmt/core.h>
#include <mpi.h>
#include <sys/prctl.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <deque>
#include <thread>
#include <utility>

#include "calibrate/transport/launched.hpp"
#include "calibrate/transport/matcher.hpp"
#include "calibrate/transport/pending.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

enum class ControlKind : std::int32_t { copied, held, failed, left };

struct Header {
  std::uint64_t tag = 0;
  std::uint64_t size = 0;
  ControlKind kind{};
  std::int32_t data_tag = 0;  ///< of `held`
};

constexpr int kControlTag = 0;
constexpr std::size_t kControlBytes = sizeof(Header) + Transport::kCopiedBytes;
/// MPI counts bytes in an int: larger messages go in parts of this size.
constexpr std::size_t kPartBytes = std::size_t{1} << 30;

std::vector<std::byte> control_message(const Header& header, std::span<const std::byte> bytes) {
  std::vector<std::byte> message(sizeof header + bytes.size());
  std::memcpy(message.data(), &header, sizeof header);
  if (!bytes.empty()) std::memcpy(message.data() + sizeof header, bytes.data(), bytes.size());
  return message;
}

void check(int code) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw std::runtime_error(std::string("MPI: ") +
                           std::string(text, static_cast<std::size_t>(length)));
}

/// What the thread that speaks MPI is given to do.
struct Post {
  Direction direction{};
  int peer = 0;
  std::uint64_t tag = 0;
  Request request;
  std::vector<std::byte> control;   ///< of a send; where it holds all there is, `sent` is empty
  std::span<const std::byte> sent;  ///< of a send that was not copied
  std::span<std::byte> received;    ///< of a receive
};

class Progress {
 public:
  // ---- for the transport's threads

  /// Starts MPI; returns when it is there.
  static std::shared_ptr<Progress> start(std::chrono::nanoseconds timeout) {
    auto progress = std::make_shared<Progress>(timeout);
    // The thread keeps Progress alive: where it hangs in MPI, it outlives the transport.
    progress->thread_ = std::thread([progress] { progress->run(); });
    std::unique_lock lock(progress->mutex_);
    progress->changed_.wait(lock, [&] { return progress->ready_ || progress->stopped_; });
    if (!progress->ready_) {
      lock.unlock();
      progress->thread_.join();
      throw std::runtime_error(progress->start_error_);
    }
    return progress;
  }

  explicit Progress(std::chrono::nanoseconds timeout) : timeout_(timeout) {}

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  PendingRequests& pending() { return *pending_; }

  void post(Post post) {
    const std::lock_guard lock(mutex_);
    posts_.push_back(std::move(post));
    changed_.notify_all();
  }

  /// Somebody looks at pending() without posting anything: for a second, what others say is heard.
  void listen_in() {
    const auto now = Clock::now();
    const std::lock_guard lock(mutex_);
    const bool asleep = now >= heard_until_;
    heard_until_ = now + 1s;
    if (asleep) changed_.notify_all();
  }

  enum class Order : std::uint8_t {
    run,
    leave,  ///< say so, wait for the others to leave, finalise
    stop    ///< tell the others why, if it is this rank's own failure; do not finalise
  };

  /// Returns when the thread makes no call of MPI any more, or is taken to hang in one.
  void order(Order order, std::chrono::nanoseconds at_most) {
    std::unique_lock lock(mutex_);
    if (order_ != Order::stop) order_ = order;
    changed_.notify_all();
    changed_.wait_for(lock, at_most, [&] { return stopped_; });
  }

  /// After order(). Where the thread hangs, it is let go.
  void finish() {
    std::unique_lock lock(mutex_);
    const bool stopped = stopped_;
    lock.unlock();
    if (stopped) {
      thread_.join();
    } else {
      thread_.detach();
      std::fprintf(stderr, "orrery: rank %d: MPI does not come to an end\n", rank_);
    }
  }

 private:
  // ---- the thread that speaks MPI

  struct Arrival {
    std::size_t size = 0;
    std::vector<std::byte> copied;
    int data_tag = 0;  ///< 0: all is in `copied`
  };
  struct Receive {
    std::span<std::byte> into;
    Request request;
  };
  /// A message in the hands of MPI, in one or several parts.
  struct Moving {
    Request request;
    int parts = 0;
  };
  /// What belongs to one of active_.
  struct Slot {
    std::vector<std::byte> control;
    std::shared_ptr<Moving> moving;
  };

  void run() {
    try {
      initialise();
      work();
    } catch (const std::exception& error) {
      start_error_ = error.what();
      if (pending_) {
        pending_->fail({.rank = rank_, .why = error.what()});
        try_to_tell_failure();
      }
    }
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
  }

  void try_to_tell_failure() noexcept {
    try {
      tell_failure();
    } catch (const std::exception&) {
      // MPI itself has failed: the others find out by time-out, or from the launcher.
    }
  }

  void initialise() {
    prctl(PR_SET_TIMERSLACK, 1000);  // of this thread: 50 us are longer than many a message
    int provided = 0;
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided));
    check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    check(MPI_Comm_rank(MPI_COMM_WORLD, &rank_));
    check(MPI_Comm_size(MPI_COMM_WORLD, &ranks_));
    if (provided < MPI_THREAD_FUNNELED) {
      throw std::runtime_error("this MPI allows no threads (MPI_THREAD_FUNNELED)");
    }
    void* bound = nullptr;
    int found = 0;
    check(MPI_Comm_get_attr(MPI_COMM_WORLD, MPI_TAG_UB, static_cast<void*>(&bound), &found));
    if (found != 0) last_data_tag_ = *static_cast<int*>(bound);
    data_tags_.assign(static_cast<std::size_t>(ranks_), 0);
    pending_ = std::make_unique<PendingRequests>(rank_);
    active_.push_back(MPI_REQUEST_NULL);
    slots_.emplace_back();
    listen();
    const std::lock_guard lock(mutex_);
    ready_ = true;
    changed_.notify_all();
  }

  void work() {
    int idle = 0;
    for (;;) {
      const auto [posts, order] = take();
      if (order == Order::stop) {
        try_to_tell_failure();
        return;
      }
      for (Post& post : *posts) start_post(post);
      if (order == Order::leave && leave_or_go_on()) return;
      idle = test() || !posts->empty() ? 0 : idle + 1;
      if (idle > 0) rest(idle, order);
    }
  }

  std::pair<std::unique_ptr<std::deque<Post>>, Order> take() {
    auto posts = std::make_unique<std::deque<Post>>();
    const std::lock_guard lock(mutex_);
    posts->swap(posts_);
    return {std::move(posts), order_};
  }

  /// Without anything to wait for, until there is. Else the core is left to others: as long as
  /// messages usually take, at once back if nobody wants it; then for a sixteenth of the time that
  /// nothing has happened for, which is little beside it.
  void rest(int idle, Order order) {
    constexpr auto kUsual = 100us;  // a sleep takes about as long as this to end
    std::unique_lock lock(mutex_);
    const auto called = [&] { return !posts_.empty() || order_ != order; };
    if (idle == 1) idle_since_ = Clock::now();
    const auto heard = [&] { return Clock::now() < heard_until_; };
    if (active_.size() == 1 && !matcher_.has_receives() && order == Order::run && !heard()) {
      changed_.wait(lock, [&] { return called() || heard(); });
      return;
    }
    const std::chrono::nanoseconds idle_for = Clock::now() - idle_since_;
    if (idle_for < kUsual) {
      lock.unlock();
      std::this_thread::yield();
    } else {
      changed_.wait_for(lock, std::min<std::chrono::nanoseconds>(idle_for / 16, 1ms), called);
    }
  }

  void start_post(Post& post) {
    if (post.direction == Direction::receive) {
      Receive receive{.into = post.received, .request = post.request};
      if (auto arrival = matcher_.receive(post.peer, post.tag, receive)) {
        deliver(*arrival, post.peer, receive);
      }
      return;
    }
    if (post.sent.empty()) {
      send_control(post.peer, std::move(post.control));
      return;
    }
    if (!pending_->begin(post.request)) return;
    int& data_tag = data_tags_[static_cast<std::size_t>(post.peer)];
    data_tag = data_tag == last_data_tag_ ? kControlTag + 1 : data_tag + 1;
    const Header header{
        .tag = post.tag, .size = post.sent.size(), .kind = ControlKind::held, .data_tag = data_tag};
    send_control(post.peer, control_message(header, {}));
    const auto moving = std::make_shared<Moving>(Moving{.request = post.request});
    for_parts(post.sent.size(), [&](std::size_t begin, int size) {
      MPI_Request& request = activate({.control = {}, .moving = moving});
      check(MPI_Isend(post.sent.data() + begin, size, MPI_BYTE, post.peer, data_tag, MPI_COMM_WORLD,
                      &request));
    });
  }

  void send_control(int to, std::vector<std::byte> control) {
    MPI_Request& request = activate({.control = std::move(control), .moving = nullptr});
    const std::vector<std::byte>& bytes = slots_.back().control;
    check(MPI_Isend(bytes.data(), static_cast<int>(bytes.size()), MPI_BYTE, to, kControlTag,
                    MPI_COMM_WORLD, &request));
  }

  template <class Part>
  static void for_parts(std::size_t size, Part part) {
    for (std::size_t begin = 0; begin < size; begin += kPartBytes) {
      part(begin, static_cast<int>(std::min(kPartBytes, size - begin)));
    }
  }

  MPI_Request& activate(Slot slot) {
    if (slot.moving) ++slot.moving->parts;
    slots_.push_back(std::move(slot));
    return active_.emplace_back(MPI_REQUEST_NULL);
  }

  void listen() {
    check(MPI_Irecv(control_.data(), static_cast<int>(control_.size()), MPI_BYTE, MPI_ANY_SOURCE,
                    kControlTag, MPI_COMM_WORLD, active_.data()));
  }

  /// Whether anything was done.
  bool test() {
    int done = 0;
    indices_.resize(active_.size());
    statuses_.resize(active_.size());
    const int code = MPI_Testsome(static_cast<int>(active_.size()), active_.data(), &done,
                                  indices_.data(), statuses_.data());
    for (int i = 0; code == MPI_ERR_IN_STATUS && i < done; ++i) {
      check(statuses_[static_cast<std::size_t>(i)].MPI_ERROR);
    }
    check(code);
    bool heard = false;
    for (int i = 0; i < done; ++i) {
      const auto index = static_cast<std::size_t>(indices_[static_cast<std::size_t>(i)]);
      if (index == 0) {
        heard = true;
        control_source_ = statuses_[static_cast<std::size_t>(i)].MPI_SOURCE;
        check(MPI_Get_count(&statuses_[static_cast<std::size_t>(i)], MPI_BYTE, &control_size_));
        continue;
      }
      if (const auto& moving = slots_[index].moving; moving && --moving->parts == 0) {
        pending_->finish(moving->request);
      }
      slots_[index] = {};
    }
    if (heard) {
      hear();
      listen();
    }
    if (done > 0) drop_inactive();
    return done > 0;
  }

  void drop_inactive() {
    std::size_t kept = 1;
    for (std::size_t i = 1; i < active_.size(); ++i) {
      if (active_[i] == MPI_REQUEST_NULL) continue;
      if (kept != i) {
        active_[kept] = active_[i];
        slots_[kept] = std::move(slots_[i]);
      }
      ++kept;
    }
    active_.resize(kept);
    slots_.resize(kept);
  }

  void hear() {
    Header header;
    ORRERY_CHECK(static_cast<std::size_t>(control_size_) >= sizeof header, "{} bytes",
                 control_size_);
    std::memcpy(&header, control_.data(), sizeof header);
    const std::span<const std::byte> rest(control_.data() + sizeof header,
                                          static_cast<std::size_t>(control_size_) - sizeof header);
    switch (header.kind) {
      case ControlKind::failed:
        pending_->fail(
            {.rank = control_source_,
             .why = std::string(reinterpret_cast<const char*>(rest.data()), rest.size())});
        return;
      case ControlKind::left:
        pending_->peer_left(control_source_);
        ++left_;
        return;
      case ControlKind::copied:
      case ControlKind::held:
        break;
    }
    Arrival arrival{.size = header.size, .copied = {}, .data_tag = header.data_tag};
    arrival.copied.assign(rest.begin(), rest.end());
    if (const auto receive = matcher_.arrive(control_source_, header.tag, arrival)) {
      deliver(arrival, control_source_, *receive);
    }
  }

  void deliver(const Arrival& arrival, int from, const Receive& receive) {
    if (arrival.size != receive.into.size()) {
      throw std::runtime_error(fmt::format("rank {} sent {} bytes where {} were expected", from,
                                           arrival.size, receive.into.size()));
    }
    if (!pending_->begin(receive.request)) return;
    if (arrival.data_tag == 0) {
      if (arrival.size > 0) {
        std::memcpy(receive.into.data(), arrival.copied.data(), arrival.size);
      }
      pending_->finish(receive.request);
      return;
    }
    const auto moving = std::make_shared<Moving>(Moving{.request = receive.request});
    for_parts(arrival.size, [&](std::size_t begin, int size) {
      MPI_Request& request = activate({.control = {}, .moving = moving});
      check(MPI_Irecv(receive.into.data() + begin, size, MPI_BYTE, from, arrival.data_tag,
                      MPI_COMM_WORLD, &request));
    });
  }

  void send_to_others(ControlKind kind, std::span<const std::byte> bytes) {
    for (int to = 0; to < ranks_; ++to) {
      if (to != rank_)
        send_control(to, control_message({.size = bytes.size(), .kind = kind}, bytes));
    }
  }

  /// A second is enough for messages that MPI copies; who does not take them has failed as well.
  void tell_failure() {
    const auto failure = pending_->failure();
    if (!failure || failure->rank != rank_) return;
    const auto text = std::as_bytes(std::span(failure->why));
    send_to_others(ControlKind::failed, text.first(std::min(text.size(), Transport::kCopiedBytes)));
    const auto told = [&] {
      return std::none_of(slots_.begin(), slots_.end(),
                          [](const Slot& slot) { return !slot.control.empty(); });
    };
    for (const auto until = Clock::now() + 1s; !told() && Clock::now() < until;) {
      if (!test()) std::this_thread::sleep_for(100us);
    }
  }

  /// True when finalised, or not to be.
  bool leave_or_go_on() {
    if (!said_left_) {
      said_left_ = true;
      leave_by_ = Clock::now() + timeout_;
      send_to_others(ControlKind::left, {});
    }
    if (pending_->failure() || Clock::now() > leave_by_) return true;
    if (left_ < ranks_ - 1 || active_.size() > 1) return false;
    check(MPI_Cancel(active_.data()));
    check(MPI_Wait(active_.data(), MPI_STATUS_IGNORE));
    check(MPI_Finalize());
    return true;
  }

  const std::chrono::nanoseconds timeout_;
  std::thread thread_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Post> posts_;
  Order order_ = Order::run;
  Clock::time_point heard_until_;
  bool ready_ = false;
  bool stopped_ = false;
  std::string start_error_;

  // Set before ready_.
  int rank_ = 0;
  int ranks_ = 1;
  std::unique_ptr<PendingRequests> pending_;

  // The thread's own.
  int last_data_tag_ = 32767;        // the least that MPI allows
  std::vector<int> data_tags_;       // used last, by receiver
  std::vector<MPI_Request> active_;  // [0]: the next control message
  std::vector<Slot> slots_;
  std::vector<int> indices_;
  std::vector<MPI_Status> statuses_;
  std::vector<std::byte> control_ = std::vector<std::byte>(kControlBytes);
  int control_source_ = 0;
  int control_size_ = 0;
  Matcher<Arrival, Receive> matcher_;
  int left_ = 0;
  bool said_left_ = false;
  Clock::time_point idle_since_;
  Clock::time_point leave_by_;
};

class MpiTransport final : public Transport {
 public:
  MpiTransport(std::shared_ptr<Progress> progress, std::chrono::nanoseconds timeout)
      : Transport(progress->rank(), progress->ranks(), timeout), progress_(std::move(progress)) {}
  MpiTransport(const MpiTransport&) = delete;
  MpiTransport& operator=(const MpiTransport&) = delete;

  ~MpiTransport() override {
    const bool failed = progress_->pending().failure().has_value();
    // Finalising gets a few seconds on top of what leaving may take.
    progress_->order(failed ? Progress::Order::stop : Progress::Order::leave, timeout() + kGrace);
    progress_->finish();
  }

  Request post_send(int to, std::uint64_t tag, std::span<const std::byte> bytes) override {
    const Request request = progress_->pending().add(Direction::send, checked(to));
    Post post{.direction = Direction::send, .peer = to, .tag = tag, .request = request};
    if (bytes.size() <= kCopiedBytes) {
      post.control =
          control_message({.tag = tag, .size = bytes.size(), .kind = ControlKind::copied}, bytes);
      progress_->pending().finish_at_once(request);
    } else {
      post.sent = bytes;
    }
    progress_->post(std::move(post));
    return request;
  }

  Request post_receive(int from, std::uint64_t tag, std::span<std::byte> bytes) override {
    const Request request = progress_->pending().add(Direction::receive, checked(from));
    progress_->post({.direction = Direction::receive,
                     .peer = from,
                     .tag = tag,
                     .request = request,
                     .control = {},
                     .sent = {},
                     .received = bytes});
    return request;
  }

  void wait_all(std::span<const Request> requests, OpName op) override {
    throw_if(progress_->pending().wait_all(requests, op, timeout()));
  }

  void check(std::span<const int> peers, OpName op) override {
    progress_->listen_in();
    throw_if(progress_->pending().look(peers, op));
  }

  void abort(const std::string& why) override {
    progress_->pending().fail({.rank = rank(), .why = why});
    progress_->order(Progress::Order::stop, kGrace);
  }

 private:
  static constexpr auto kGrace = 5s;

  void throw_if(const std::optional<PendingRequests::Failed>& failed) {
    if (!failed) return;
    progress_->order(Progress::Order::stop, kGrace);
    throw TransportError(failed->text, failed->is_echo);
  }

  int checked(int peer) const {
    ORRERY_CHECK(peer >= 0 && peer < ranks(), "rank {} of {}", peer, ranks());
    return peer;
  }

  std::shared_ptr<Progress> progress_;
};

}  // namespace

std::unique_ptr<Transport> open_mpi_transport(std::chrono::nanoseconds timeout) {
  const auto launched = launched_by();
  if (!launched) return nullptr;
  auto progress = Progress::start(timeout);
  if (progress->ranks() == 1) {
    throw std::runtime_error("started by " + *launched +
                             " with others, but MPI sees this process alone (srun: --mpi=pmix)");
  }
  return std::make_unique<MpiTransport>(std::move(progress), timeout);
}

bool built_with_mpi() {
  return true;
}

}  // namespace orrery
