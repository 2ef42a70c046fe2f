#pragma once
// How the ranks of a Program talk while it is executed: messages between numbered ranks, matched by
// (peer, tag). Two carriers: threads of one process (make_in_process_transports) and processes
// started by mpirun or srun (open_mpi_transport).
//
// Nothing is recovered: once a rank has failed, all that wait fail with its name and its own words.

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "sim/ids.hpp"

namespace orrery {

/// What an operation is called in errors. Refers to a text, or to a callable that makes one, and
/// formats nothing until asked; the referred-to must live as long as the call it is passed to.
class OpName {
 public:
  OpName(const char* text)  // NOLINT(google-explicit-constructor): stands for a name
      : object_(text),
        format_([](const void* o) { return std::string(static_cast<const char*>(o)); }) {}
  OpName(const std::string& text)  // NOLINT(google-explicit-constructor)
      : object_(&text),
        format_([](const void* o) { return *static_cast<const std::string*>(o); }) {}
  template <class Format>
  requires std::is_invocable_r_v<std::string, const Format&> OpName(
      const Format& format)  // NOLINT(google-explicit-constructor)
      : object_(&format),
        format_([](const void* o) -> std::string { return (*static_cast<const Format*>(o))(); }) {}
  std::string str() const { return format_(object_); }

 private:
  const void* object_;
  std::string (*format_)(const void*);
};

/// What a message belongs to: the step (modulo 2^15), the op, and a part of it (16 bits). The
/// highest bit stays clear; tags with it set are the transport's own.
constexpr std::uint64_t tag_of(std::uint64_t step, OpId op, std::uint32_t part = 0) {
  return (step & 0x7FFF) << 48 | std::uint64_t{op.value} << 16 | (part & 0xFFFF);
}
inline constexpr std::uint64_t kOwnTags = std::uint64_t{1} << 63;

/// A message under way: to be waited for exactly once.
struct Request {
  std::uint64_t id = 0;
};

/// A wait that failed: "rank 1: all_reduce of op 7: nothing from ranks 2, 3 within 1 s".
class TransportError : public std::runtime_error {
 public:
  TransportError(const std::string& what, bool is_echo)
      : std::runtime_error(what), is_echo_(is_echo) {}
  /// Another rank failed first, and said so: its error is the one to look at.
  bool is_echo() const { return is_echo_; }

 private:
  bool is_echo_;
};

/// One rank's end. Posting and waiting may be done by several threads at once; barrier, gather,
/// roll_call and the destructor by one thread at a time. A rank may send to itself.
class Transport {
 public:
  /// `timeout`: what a single wait may take.
  Transport(int rank, int ranks, std::chrono::nanoseconds timeout)
      : rank_(rank), ranks_(ranks), timeout_(timeout) {}
  Transport(const Transport&) = delete;
  Transport& operator=(const Transport&) = delete;
  /// Leaves: who still waits for this rank fails at once. Over MPI it waits, `timeout` at most, for
  /// the others to leave too; end a run with barrier(), so that this takes no time.
  virtual ~Transport() = default;

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  std::chrono::nanoseconds timeout() const { return timeout_; }

  /// Messages of one (sender, receiver, tag) are received in the order in which they were posted.
  /// The bytes must stay as they are until the request has been waited for. Up to kCopiedBytes are
  /// copied: waiting for such a send does not wait for its receiver. Larger ones go from the
  /// sender's memory to the receiver's when both are posted: post both before waiting for either.
  virtual Request post_send(int to, std::uint64_t tag, std::span<const std::byte> bytes) = 0;
  /// The message must have this very size; else this rank fails when it comes.
  virtual Request post_receive(int from, std::uint64_t tag, std::span<std::byte> bytes) = 0;
  static constexpr std::size_t kCopiedBytes = 2048;

  /// Returns when all are done. Otherwise throws TransportError: on time-out, naming the peers that
  /// have not delivered; at once when any rank has failed, or one of these peers has left. Then
  /// this rank has failed too and has told the others, nothing reads or writes the memory of any of
  /// its requests any more, and waiting for what is still under way, or posted later, throws as
  /// well.
  virtual void wait_all(std::span<const Request> requests, OpName op) = 0;
  void wait(Request request, OpName op) { wait_all({&request, 1}, op); }

  /// For who waits for peers by other means than messages: returns at once, or throws what a wait
  /// for them would throw at once.
  virtual void check(std::span<const int> peers, OpName op) = 0;

  /// This rank has failed: the others' waits throw `why` with its number. For what is thrown while
  /// a step runs; waits that threw have done it themselves. Only a rank's first failure counts.
  virtual void abort(const std::string& why) = 0;

  /// Returns when all ranks have called it.
  void barrier(OpName op = "barrier");
  /// On rank 0 what every rank gave, by rank; on others nothing. Of any sizes.
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> bytes,
                                             OpName op = "gather");
  /// What every rank says, by rank. Who does not answer is named by the time-out.
  std::vector<std::uint64_t> roll_call(std::uint64_t own, OpName op = "roll call");

 private:
  int rank_;
  int ranks_;
  std::chrono::nanoseconds timeout_;
};

/// Ranks 0 .. n-1, to be used by a thread (or several) each.
std::vector<std::unique_ptr<Transport>> make_in_process_transports(
    int ranks, std::chrono::nanoseconds timeout);

/// Runs `body` as ranks 0 .. n-1, a thread each, and returns when all have returned. What a body
/// throws aborts its rank; the error of the rank that failed first is thrown again. A body that
/// goes on for longer than `timeout` after that hangs, and threads cannot be ended: then the
/// process says which rank it is and exits with 1.
void run_in_process(int ranks, std::chrono::nanoseconds timeout,
                    const std::function<void(Transport&)>& body);

/// This process's end among those that mpirun or srun started with it; null where it was started
/// alone. At most once in a process. Throws std::runtime_error where it was started among others,
/// but the program is built without MPI, or MPI does not see them.
std::unique_ptr<Transport> open_mpi_transport(std::chrono::nanoseconds timeout);
/// Configured with MPI.
bool built_with_mpi();

/// "rank 3", "ranks 1, 2 and 5".
std::string list_ranks(std::span<const int> ranks);

}  // namespace orrery
