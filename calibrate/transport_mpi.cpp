// Ranks as MPI processes. One thread of each process calls MPI: it sends what is queued, and puts
// what comes into the mailbox. All messages have one MPI tag, and their own tag in front of their
// bytes.

#ifdef ORRERY_HAS_MPI
#define OMPI_SKIP_MPICXX  // its C++ bindings, which nobody wants
#include <fmt/core.h>
#include <mpi.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <thread>
#endif

#include "calibrate/transport.hpp"
#include "sim/check.hpp"

namespace orrery {

#ifdef ORRERY_HAS_MPI
namespace {

constexpr int kMpiTag = 1;
/// Own tag of a message whose bytes say why its sender gave up.
constexpr std::uint64_t kAbort = ~std::uint64_t{0};
constexpr auto kShortestNap = std::chrono::microseconds(20);
constexpr auto kLongestNap = std::chrono::microseconds(500);

class MpiTransport final : public Transport {
 public:
  MpiTransport(int rank, int ranks) : Transport(rank, ranks), progress_([this] { run(); }) {}

  ~MpiTransport() override {
    stop_ = true;
    progress_.join();
    // A rank that failed must not wait for others in MPI_Finalize, which would never come.
    if (aborted_) MPI_Abort(MPI_COMM_WORLD, 1);
    MPI_Finalize();
  }

  void send(int to, std::uint64_t tag, std::span<const std::byte> data) override {
    // MPI counts bytes in an int.
    ORRERY_CHECK(data.size() + sizeof tag < std::size_t{1} << 31, "{} bytes in one message",
                 data.size());
    Outgoing message;
    message.to = to;
    message.bytes.resize(sizeof tag + data.size());
    std::memcpy(message.bytes.data(), &tag, sizeof tag);
    if (!data.empty()) std::memcpy(message.bytes.data() + sizeof tag, data.data(), data.size());
    const std::lock_guard lock(mutex_);
    queue_.push_back(std::move(message));
  }

  void abort(const std::string& why) override {
    for (int r = 0; r < ranks(); ++r) {
      if (r != rank()) send(r, kAbort, std::as_bytes(std::span(why)));
    }
    aborted_ = true;
  }

 private:
  struct Outgoing {
    int to = 0;
    std::vector<std::byte> bytes;
    MPI_Request request = MPI_REQUEST_NULL;
  };

  /// Two cores may have many ranks, so a thread that finds nothing to do sleeps, longer and longer.
  void run() {
    auto nap = kShortestNap;
    while (true) {
      const bool busy = start_sends() | finish_sends() | receive_one();
      if (busy) {
        nap = kShortestNap;
        continue;
      }
      if (stop_ && sending_.empty() && queue_is_empty()) return;
      std::this_thread::sleep_for(nap);
      nap = std::min<std::chrono::microseconds>(nap * 2, kLongestNap);
    }
  }

  bool queue_is_empty() {
    const std::lock_guard lock(mutex_);
    return queue_.empty();
  }

  bool start_sends() {
    std::deque<Outgoing> queue;
    {
      const std::lock_guard lock(mutex_);
      queue.swap(queue_);
    }
    for (Outgoing& message : queue) {
      sending_.push_back(std::move(message));
      Outgoing& m = sending_.back();
      MPI_Isend(m.bytes.data(), static_cast<int>(m.bytes.size()), MPI_BYTE, m.to, kMpiTag,
                MPI_COMM_WORLD, &m.request);
    }
    return !queue.empty();
  }

  bool finish_sends() {
    bool any = false;
    for (auto m = sending_.begin(); m != sending_.end();) {
      int done = 0;
      MPI_Test(&m->request, &done, MPI_STATUS_IGNORE);
      any |= done != 0;
      m = done != 0 ? sending_.erase(m) : std::next(m);
    }
    return any;
  }

  bool receive_one() {
    int there = 0;
    MPI_Message handle;
    MPI_Status status;
    MPI_Improbe(MPI_ANY_SOURCE, kMpiTag, MPI_COMM_WORLD, &there, &handle, &status);
    if (there == 0) return false;
    int count = 0;
    MPI_Get_count(&status, MPI_BYTE, &count);
    std::vector<std::byte> bytes(static_cast<std::size_t>(count));
    MPI_Mrecv(bytes.data(), count, MPI_BYTE, &handle, MPI_STATUS_IGNORE);
    std::uint64_t tag = 0;
    ORRERY_CHECK(bytes.size() >= sizeof tag, "a message of {} bytes", bytes.size());
    std::memcpy(&tag, bytes.data(), sizeof tag);
    bytes.erase(bytes.begin(), bytes.begin() + sizeof tag);
    if (tag == kAbort) {
      const std::string why(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      mailbox().fail(fmt::format("rank {} failed: {}", status.MPI_SOURCE, why));
    } else {
      mailbox().put(status.MPI_SOURCE, tag, std::move(bytes));
    }
    return true;
  }

  std::mutex mutex_;
  std::deque<Outgoing> queue_;
  std::list<Outgoing> sending_;
  std::atomic<bool> stop_ = false;
  std::atomic<bool> aborted_ = false;
  std::thread progress_;
};

/// Whether a launcher started this process with others: MPI must not be initialised in a process
/// that was started alone, where it would look for a daemon.
bool started_with_others() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK"}) {
    const char* value = std::getenv(name);
    if (value != nullptr && (std::strcmp(name, "PMIX_RANK") == 0 || std::atoi(value) > 1))
      return true;
  }
  return false;
}

}  // namespace

std::unique_ptr<Transport> open_mpi_transport() {
  if (!started_with_others()) return nullptr;
  int provided = MPI_THREAD_SINGLE;
  MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided);
  int rank = 0, ranks = 1;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  if (provided < MPI_THREAD_SERIALIZED) {
    MPI_Finalize();
    throw std::runtime_error("this MPI lets only its first thread call it");
  }
  if (ranks == 1) {
    MPI_Finalize();
    return nullptr;
  }
  return std::make_unique<MpiTransport>(rank, ranks);
}

#else

std::unique_ptr<Transport> open_mpi_transport() {
  return nullptr;
}

#endif

}  // namespace orrery
