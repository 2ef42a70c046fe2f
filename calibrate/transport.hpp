#pragma once
// How the ranks of an executed step talk: messages of bytes, told apart by who sent them and a tag.

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace orrery {

/// A rank that failed, or was silent for too long. The message names it.
class PeerError : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Messages that came and have not been asked for yet. Threads of one rank wait for different ones.
class Mailbox {
 public:
  using Key = std::pair<int, std::uint64_t>;  ///< sender and tag

  void put(int from, std::uint64_t tag, std::vector<std::byte> message);
  /// Everybody who waits, now or later, throws PeerError with this.
  void fail(std::string why);
  /// Waits until it is there. PeerError after `timeout_s`, naming `who` waited for whom and for
  /// what.
  std::vector<std::byte> take(int from, std::uint64_t tag, double timeout_s, const std::string& who,
                              const std::string& what);

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<Key, std::vector<std::byte>> messages_;
  std::string failure_;
};

/// One rank's end. Threads may call it at the same time.
class Transport {
 public:
  virtual ~Transport() = default;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  void set_timeout(double seconds) { timeout_s_ = seconds; }

  /// The message is copied: `data` may change at once. A tag is used once between two ranks until
  /// its message has been received.
  virtual void send(int to, std::uint64_t tag, std::span<const std::byte> data) = 0;

  /// Waits for the message, which has this many bytes. `what` says what for, in errors: "combine(F)
  /// of layer 3".
  void receive(int from, std::uint64_t tag, std::span<std::byte> data, const std::string& what);
  std::vector<std::byte> receive(int from, std::uint64_t tag, const std::string& what);

  /// Tells all other ranks that this one gives up and why: what they wait for fails.
  virtual void abort(const std::string& why) = 0;

  /// What every rank has, on rank 0; nothing elsewhere. All ranks call it in the same order.
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> data);
  /// Returns when all ranks have called it.
  void barrier();
  /// What has to be added to this rank's CLOCK_MONOTONIC to get rank 0's: 0 on one machine, else from
  /// the quickest of some round trips, half of which is the error. All ranks call it.
  std::int64_t clock_offset_ns();

 protected:
  Transport(int rank, int ranks) : rank_(rank), ranks_(ranks) {}
  std::string name() const;
  Mailbox& mailbox() { return mailbox_; }
  friend class InProcessTransport;

 private:
  std::uint64_t next_own_tag();

  int rank_;
  int ranks_;
  double timeout_s_ = 120;
  std::uint64_t own_tags_ = 0;  ///< of gather and barrier
  Mailbox mailbox_;
};

/// Tags from here on are the transport's own.
inline constexpr std::uint64_t kOwnTags = std::uint64_t{1} << 63;

/// Ranks that are threads of this process. All live as long as any is used.
std::vector<std::unique_ptr<Transport>> make_in_process_transports(int ranks);

/// This process's rank among those that mpirun or srun started with it; null if it was started
/// alone, or built without MPI. Call once.
std::unique_ptr<Transport> open_mpi_transport();

}  // namespace orrery
