#pragma once
// The ranks of a search that runs as several processes: messages between rank 0 and the others.

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

namespace orrery {

struct Message {
  enum class Kind : std::uint8_t {
    sent,
    left,  ///< that rank's end is gone, in order
    lost   ///< it has said nothing for too long, not even that it is there
  };
  int from = 0;
  Kind kind = Kind::sent;
  std::string bytes;  ///< of `sent`
};

/// One rank's end. Rank 0 talks with all others, these with rank 0 only. Messages of one sender
/// come in their order; after `left` or `lost` none comes of it. Calls are made by one thread at a
/// time. The destructor leaves: the other side is told, after what was sent.
class Peers {
 public:
  Peers(int rank, int ranks) : rank_(rank), ranks_(ranks) {}
  Peers(const Peers&) = delete;
  Peers& operator=(const Peers&) = delete;
  virtual ~Peers() = default;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  /// How many of them share this machine, this one included.
  virtual int ranks_here() const = 0;

  /// Returns at once. What is sent to a rank that left or is lost is dropped.
  virtual void send(int to, std::string bytes) = 0;
  /// The next message, waiting for it for so long at most.
  virtual std::optional<Message> receive(std::chrono::milliseconds at_most) = 0;

 private:
  int rank_;
  int ranks_;
};

/// The processes that a launcher of MPI started with this one; a rank that says nothing for so long
/// is lost. At most once in a process. `launcher` names what started it ("mpirun
/// (OMPI_COMM_WORLD_SIZE=4)"), for errors: std::runtime_error where the program is built without
/// MPI, or MPI sees this process alone.
std::unique_ptr<Peers> open_mpi_peers(const std::string& launcher,
                                      std::chrono::milliseconds silence);

}  // namespace orrery
