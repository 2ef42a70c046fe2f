// Peers as processes of MPI. One thread makes all calls of MPI, from MPI_Init_thread to
// MPI_Finalize (MPI_THREAD_FUNNELED suffices), and tells the others once in a while that this
// process is there: whoever computes for an hour is not taken to be lost, whoever is killed is,
// where MPI goes on without it (Open MPI: mpirun --enable-recovery; else the launcher ends all
// ranks).

#include <fmt/core.h>
#include <mpi.h>

#include <algorithm>
#include <condition_variable>
#include <deque>
#include <list>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "reports/search/peers.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

/// What a message is: its tag. kPart: the beginning of one that is too long, more follows.
enum Tag : int { kSent = 1, kAlive = 2, kLeft = 3, kPart = 4 };

/// MPI copies messages of so many bytes. Longer ones it would read from the sender's memory, and
/// where the sender is killed in the middle of that, Open MPI's receiver does not come back either.
constexpr std::size_t kCopiedBytes = 2048;

/// How often to look for messages: MPI cannot be slept on.
constexpr auto kLook = 500us;

void check(int code) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw std::runtime_error("MPI: " + std::string(text, static_cast<std::size_t>(length)));
}

class MpiThread {
 public:
  explicit MpiThread(std::chrono::milliseconds silence) : silence_(silence) {
    thread_ = std::thread([this] { run(); });
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ready_ || ended_; });
    if (ready_) return;
    lock.unlock();
    thread_.join();
    throw std::runtime_error(error_);
  }

  ~MpiThread() {
    {
      const std::lock_guard lock(mutex_);
      leave_ = true;
    }
    changed_.notify_all();
    thread_.join();
  }
  MpiThread(const MpiThread&) = delete;
  MpiThread& operator=(const MpiThread&) = delete;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  int ranks_here() const { return ranks_here_; }

  void send(int to, std::string bytes) {
    {
      const std::lock_guard lock(mutex_);
      outbox_.emplace_back(to, std::move(bytes));
    }
    changed_.notify_all();
  }

  std::optional<Message> receive(std::chrono::milliseconds at_most) {
    std::unique_lock lock(mutex_);
    arrived_.wait_for(lock, at_most, [&] { return !inbox_.empty() || ended_; });
    if (inbox_.empty()) {
      if (ended_) throw std::runtime_error(error_);
      return std::nullopt;
    }
    Message message = std::move(inbox_.front());
    inbox_.pop_front();
    return message;
  }

 private:
  // ---- the thread that speaks MPI

  struct Peer {
    int rank = 0;
    Clock::time_point heard;
    bool gone = false;        ///< left or lost
    std::string begun;        ///< parts of a message whose end is to come
    int alive_under_way = 0;  ///< a rank that takes none needs no more of them
  };
  struct Sending {
    std::string bytes;
    MPI_Request request{};
    int to = 0;
    Tag tag{};
  };

  void run() {
    try {
      initialise();
      work();
    } catch (const std::exception& error) {
      const std::lock_guard lock(mutex_);
      error_ = error.what();
    }
    const std::lock_guard lock(mutex_);
    ended_ = true;
    changed_.notify_all();
    arrived_.notify_all();
  }

  void initialise() {
    int provided = 0;
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided));
    check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN));
    check(MPI_Comm_rank(MPI_COMM_WORLD, &rank_));
    check(MPI_Comm_size(MPI_COMM_WORLD, &ranks_));
    if (provided < MPI_THREAD_FUNNELED) {
      throw std::runtime_error("this MPI allows no threads (MPI_THREAD_FUNNELED)");
    }
    MPI_Comm here = MPI_COMM_NULL;
    check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &here));
    check(MPI_Comm_size(here, &ranks_here_));
    check(MPI_Comm_free(&here));
    for (int r = 0; r < ranks_; ++r) {
      if (r != rank_ && (rank_ == 0 || r == 0))
        peers_.push_back({.rank = r, .heard = Clock::now()});
    }
    const std::lock_guard lock(mutex_);
    ready_ = true;
    changed_.notify_all();
  }

  void work() {
    auto told = Clock::now();
    for (;;) {
      const bool leave = take_outbox();
      test_sends();
      hear();
      const auto now = Clock::now();
      if (now - told > silence_ / 8) {
        told = now;
        for (Peer& peer : peers_) {
          if (!peer.gone && peer.alive_under_way == 0) {
            ++peer.alive_under_way;
            start(peer.rank, kAlive, {});
          }
        }
      }
      for (Peer& peer : peers_) {
        if (!peer.gone && now - peer.heard > silence_) lose(peer);
      }
      if (leave && leave_or_go_on()) return;
      std::unique_lock lock(mutex_);
      changed_.wait_for(lock, kLook, [&] { return !outbox_.empty(); });
    }
  }

  /// True when leaving, and all was taken.
  bool take_outbox() {
    std::unique_lock lock(mutex_);
    auto taken = std::exchange(outbox_, {});
    const bool leave = leave_;
    lock.unlock();
    for (auto& [to, bytes] : taken) {
      if (peer_of(to).gone) continue;
      std::size_t begin = 0;
      for (; bytes.size() - begin > kCopiedBytes; begin += kCopiedBytes) {
        start(to, kPart, bytes.substr(begin, kCopiedBytes));
      }
      start(to, kSent, bytes.substr(begin));
    }
    return leave;
  }

  void start(int to, Tag tag, std::string bytes) {
    Sending& sending = sends_.emplace_back(
        Sending{.bytes = std::move(bytes), .request = MPI_REQUEST_NULL, .to = to, .tag = tag});
    check(MPI_Isend(sending.bytes.data(), static_cast<int>(sending.bytes.size()), MPI_BYTE, to, tag,
                    MPI_COMM_WORLD, &sending.request));
  }

  void test_sends() {
    for (auto it = sends_.begin(); it != sends_.end();) {
      int done = 0;
      check(MPI_Test(&it->request, &done, MPI_STATUS_IGNORE));
      if (done != 0 && it->tag == kAlive) --peer_of(it->to).alive_under_way;
      it = done != 0 ? sends_.erase(it) : std::next(it);
    }
  }

  void hear() {
    for (;;) {
      int there = 0;
      MPI_Status status;
      check(MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, MPI_COMM_WORLD, &there, &status));
      if (there == 0) return;
      int size = 0;
      check(MPI_Get_count(&status, MPI_BYTE, &size));
      std::string bytes(static_cast<std::size_t>(size), '\0');
      check(MPI_Recv(bytes.data(), size, MPI_BYTE, status.MPI_SOURCE, status.MPI_TAG,
                     MPI_COMM_WORLD, MPI_STATUS_IGNORE));
      Peer& peer = peer_of(status.MPI_SOURCE);
      peer.heard = Clock::now();
      if (peer.gone || status.MPI_TAG == kAlive) continue;
      peer.begun += bytes;
      if (status.MPI_TAG == kPart) continue;
      peer.gone = status.MPI_TAG == kLeft;
      any_lost_ = any_lost_ || (peer.gone && !peer.begun.empty());
      deliver({.from = peer.rank,
               .kind = peer.gone ? Message::Kind::left : Message::Kind::sent,
               .bytes = std::exchange(peer.begun, {})});
    }
  }

  void lose(Peer& peer) {
    peer.gone = true;
    any_lost_ = true;
    deliver({.from = peer.rank, .kind = Message::Kind::lost, .bytes = {}});
  }

  void deliver(Message message) {
    const std::lock_guard lock(mutex_);
    inbox_.push_back(std::move(message));
    arrived_.notify_all();
  }

  /// True when there is no more to do.
  bool leave_or_go_on() {
    if (!said_left_) {
      said_left_ = true;
      // With the word that MPI cannot be finalised: only rank 0 knows of lost ranks.
      for (const Peer& peer : peers_) start(peer.rank, kLeft, any_lost_ ? "lost" : "");
    }
    // Who is lost takes no message and does not leave.
    const bool all_gone =
        std::all_of(peers_.begin(), peers_.end(), [](const Peer& peer) { return peer.gone; });
    const bool all_told = std::all_of(sends_.begin(), sends_.end(), [&](const Sending& sending) {
      return peer_of(sending.to).gone;
    });
    if (!all_gone || !all_told) return false;
    // Finalising waits for all ranks, and the lost ones will not come.
    if (!any_lost_) {
      for (Sending& sending : sends_) check(MPI_Wait(&sending.request, MPI_STATUS_IGNORE));
      check(MPI_Finalize());
    }
    return true;
  }

  Peer& peer_of(int rank) {
    const auto it = std::find_if(peers_.begin(), peers_.end(),
                                 [&](const Peer& peer) { return peer.rank == rank; });
    ORRERY_CHECK(it != peers_.end(), "rank {} does not talk with rank {}", rank_, rank);
    return *it;
  }

  const std::chrono::milliseconds silence_;
  std::thread thread_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable arrived_;
  std::deque<std::pair<int, std::string>> outbox_;
  std::deque<Message> inbox_;
  bool leave_ = false;
  bool ready_ = false;
  bool ended_ = false;
  std::string error_;

  // Set before ready_.
  int rank_ = 0;
  int ranks_ = 1;
  int ranks_here_ = 1;

  // The thread's own.
  std::vector<Peer> peers_;
  std::list<Sending> sends_;  // MPI keeps their addresses
  bool said_left_ = false;
  bool any_lost_ = false;
};

class MpiPeers final : public Peers {
 public:
  explicit MpiPeers(std::unique_ptr<MpiThread> thread)
      : Peers(thread->rank(), thread->ranks()), thread_(std::move(thread)) {}

  int ranks_here() const override { return thread_->ranks_here(); }
  void send(int to, std::string bytes) override { thread_->send(to, std::move(bytes)); }
  std::optional<Message> receive(std::chrono::milliseconds at_most) override {
    return thread_->receive(at_most);
  }

 private:
  std::unique_ptr<MpiThread> thread_;
};

}  // namespace

std::unique_ptr<Peers> open_mpi_peers(const std::string& launcher,
                                      std::chrono::milliseconds silence) {
  auto thread = std::make_unique<MpiThread>(silence);
  if (thread->ranks() == 1) {
    throw std::runtime_error("started by " + launcher +
                             " with others, but MPI sees this process alone (srun: --mpi=pmix)");
  }
  return std::make_unique<MpiPeers>(std::move(thread));
}

}  // namespace orrery
