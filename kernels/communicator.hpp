#pragma once
// A group of ranks that exchange memory of their devices, in the order of a stream of each: NCCL's
// communicator. NCCL is loaded when it is asked for, so that the program builds and starts without
// it.
//
// Why nothing here can deadlock, if its user
//   (a) gives every communicator one stream of its device, for good,
//   (b) enqueues, on all ranks, in one total order of all operations of all communicators (a
//       Program's ids), from one thread of each rank, never an operation before what it waits for,
//   (c) keeps the max_ctas of all that may run at once on a device within its SMs together:
// Of one communicator, all members' calls then come in the same order, in one stream, as NCCL
// demands. Of several, a kernel waits for (1) its stream and the events before it, which are
// enqueued earlier; (2) the same operation on other ranks; (3) where two streams share a hardware
// queue, what was enqueued there earlier; (4) SMs, which by (c) no other communication keeps from
// it, and which computation gives back, since it waits for nobody. Of all operations that have not
// ended take the first in the total order: (1) and (3) are before it and so done, on every member,
// (4) comes, and so its kernels on all members run, and (2) ends. So something always moves. Where
// a thread waits (for NCCL, which connects members when they first meet, or for sizes), it waits
// for the same or for what it has enqueued, and what others have not enqueued yet comes later.
// NCCL's guide asks for just that, operations of several communicators in the same order on all
// ranks (user guide, "Using multiple NCCL communicators concurrently").

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "kernels/device.hpp"

namespace orrery::kernels {

/// What sums are taken of.
enum class ElementType : std::uint8_t { fp32, bf16, fp64 };
std::size_t bytes_of(ElementType type);
std::string_view name_of(ElementType type);

/// NCCL's own words.
class NcclError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

struct NcclFunctions;  // kernels/nccl_abi.hpp

/// A loaded NCCL.
class Nccl {
 public:
  /// libnccl.so.2 as the loader finds it, or the file that the environment variable
  /// ORRERY_NCCL_LIBRARY names; or why there is none. Before any GPU is opened: it tells CUDA to
  /// load all kernels at once.
  static std::variant<std::shared_ptr<const Nccl>, std::string> load();

  Nccl(std::shared_ptr<const NcclFunctions> functions, int version)
      : functions_(std::move(functions)), version_(version) {}

  /// "NCCL 2.28.9"
  std::string name() const;
  /// What the members of a new communicator have in common: one of them makes it.
  using Id = std::array<std::byte, 128>;
  Id make_id() const;

  const NcclFunctions& functions() const { return *functions_; }

 private:
  std::shared_ptr<const NcclFunctions> functions_;
  int version_ = 0;
};

/// So many bytes that go to a member, or come from it, by its index. In one exchange, what is sent
/// from a member to another is matched in the order in which both list it.
struct Piece {
  int member = 0;
  void* data = nullptr;
  std::size_t bytes = 0;
};

struct CommunicatorOptions {
  Nccl::Id id{};
  int member = 0;  ///< this rank's index
  int members = 1;
  /// SMs that its kernels may take; 0: NCCL's choice.
  int max_ctas = 0;
  /// Called again and again while NCCL is not ready; what it throws ends the communicator.
  std::function<void()> while_waiting = [] {};
};

/// Calls enqueue behind what is in the stream, and return when NCCL has taken them, not when they
/// are done. Memory is of the stream's device. Of all members, the same calls in the same order.
/// After an NcclError, or one of while_waiting, the communicator is to be aborted.
class Communicator {
 public:
  /// Returns when all members are there. `device` outlives it.
  Communicator(std::shared_ptr<const Nccl> nccl, Device& device, StreamHandle stream,
               CommunicatorOptions options);
  /// The stream is idle, or abort() was called.
  ~Communicator();
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  /// Every member's buffer becomes the sum of all.
  void all_reduce(ElementType type, void* buffer, std::size_t elements);
  /// `own` becomes this member's part of the sum of all `whole`, which have one part of
  /// `part_elements` a member. `own` may be that part of `whole`.
  void reduce_scatter(ElementType type, const void* whole, void* own, std::size_t part_elements);
  /// `whole` becomes all members' `own`, by member. `own` may be its part of `whole`.
  void all_gather(const void* own, void* whole, std::size_t part_bytes);
  /// All at once: no member has to be first. Pieces of 0 bytes are left out, on both sides.
  void exchange(std::span<const Piece> sent, std::span<const Piece> received);

  /// Throws if something has failed since, on this rank or another, as far as NCCL knows.
  void check();
  /// What is enqueued ends, with anything as its result; nothing else may be called after it.
  void abort();

 private:
  void settle(int result, const char* what);

  std::shared_ptr<const Nccl> nccl_;
  Device& device_;
  StreamHandle stream_;
  CommunicatorOptions options_;
  void* comm_ = nullptr;
};

}  // namespace orrery::kernels
