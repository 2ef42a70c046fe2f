// A libnccl.so.2 whose devices are CPUs, for tests without GPUs: NCCL's functions as
// kernels/nccl_abi.hpp declares them, over shared memory between threads and processes of one
// machine. Streams are HostStreams. It is as asynchronous as NCCL and stricter: an init returns
// before it is done, and members that call different things, or things of different sizes, get an
// error instead of hanging.
//
// A communicator is a file in /dev/shm with a mailbox for each (sender, receiver), through which a
// message goes in parts. A collective is messages from all to all, its sums in the order of
// members.

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "kernels/format.hpp"
#include "kernels/nccl_abi.hpp"
#include "tests/nccl/host_stream.hpp"

namespace {

using namespace orrery::kernels::nccl;
using orrery::HostStream;

constexpr int kMostMembers = 16;
constexpr std::size_t kPartBytes = std::size_t{16} << 10;

/// One part of a message under way. Zero is empty, as a new file is.
struct Mailbox {
  std::atomic<std::uint64_t> full;  ///< bytes + 1 of what is in there; 0: free
  std::uint64_t call;               ///< what the sender is in: kind, number and size
  std::byte part[kPartBytes];
};

struct Shared {
  std::atomic<int> joined;
  std::atomic<int> aborted;  ///< members that gave up
  Mailbox mailboxes[kMostMembers][kMostMembers];
};

struct Message {
  int peer = 0;
  std::byte* data = nullptr;
  std::size_t bytes = 0;
  bool received = false;
  std::uint64_t call = 0;
  std::size_t moved = 0;
};

struct Comm {
  Shared* shared = nullptr;
  int rank = 0;
  int ranks = 0;
  std::string file;
  std::atomic<int> state{in_progress};
  std::atomic<bool> abort = false;
  std::atomic<bool> finalizing = false;
  std::atomic<int> enqueued = 0;  ///< and not done
  std::thread joining;
  std::string error;
  std::uint64_t calls = 0;
};

struct GroupCall {
  Comm* comm = nullptr;
  const HostStream* stream = nullptr;
  Message message;
};
thread_local int group_depth = 0;
thread_local std::vector<GroupCall> group;

std::atomic<int> ids_made = 0;
thread_local std::string last_error;

void fail(Comm& comm, Result result, const std::string& why) {
  comm.error = why;
  comm.state = result;
}

/// All messages, side by side, each peer's in their order.
void move_all(Comm& comm, std::vector<Message>& messages) {
  const auto step = [&](Message& m) {
    Mailbox& box = m.received ? comm.shared->mailboxes[m.peer][comm.rank]
                              : comm.shared->mailboxes[comm.rank][m.peer];
    const std::uint64_t full = box.full.load(std::memory_order_acquire);
    if (m.received == (full == 0)) return false;
    const std::size_t part = std::min(kPartBytes, m.bytes - m.moved);
    if (m.received) {
      if (box.call != m.call || full != part + 1) {
        fail(comm, invalid_usage,
             "members " + std::to_string(m.peer) + " and " + std::to_string(comm.rank) +
                 " do different things");
        return false;
      }
      std::memcpy(m.data + m.moved, box.part, part);
      box.full.store(0, std::memory_order_release);
    } else {
      std::memcpy(box.part, m.data + m.moved, part);
      box.call = m.call;
      box.full.store(part + 1, std::memory_order_release);
    }
    m.moved += part;
    return true;
  };
  std::vector<std::vector<Message*>> lanes;  // one direction of one peer each
  for (const bool received : {false, true}) {
    for (int peer = 0; peer < comm.ranks; ++peer) {
      lanes.emplace_back();
      for (Message& m : messages) {
        if (m.peer == peer && m.received == received) lanes.back().push_back(&m);
      }
      std::reverse(lanes.back().begin(), lanes.back().end());
    }
  }
  for (int idle = 0; comm.state == success;) {
    bool moved = false;
    bool left = false;
    for (auto& lane : lanes) {
      while (!lane.empty()) {
        if (!step(*lane.back())) break;
        moved = true;
        if (lane.back()->moved == lane.back()->bytes) lane.pop_back();
      }
      left |= !lane.empty();
    }
    if (!left) return;
    if (comm.abort) return fail(comm, remote_error, "aborted");
    if (comm.shared->aborted > 0) return fail(comm, remote_error, "a member has aborted");
    idle = moved ? 0 : idle + 1;
    if (idle > 100) {
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    } else if (idle > 0) {
      std::this_thread::yield();
    }
  }
}

/// Work of a stream. Its call returns "in progress", as NCCL's may, and the caller has to ask.
Result enqueue(Comm& comm, const HostStream* stream, std::function<void()> work) {
  if (comm.state != success) {
    last_error = "the communicator is not ready: " + comm.error;
    return invalid_usage;
  }
  // Counted down also where a stream that has failed drops it.
  ++comm.enqueued;
  const std::shared_ptr<Comm> counted(&comm, [](Comm* c) { --c->enqueued; });
  stream->run([counted, work = std::move(work)] {
    if (counted->state == success) work();
  });
  return in_progress;
}

std::size_t size_of(DataType type) {
  switch (type) {
    case int8:
      return 1;
    case float32:
      return 4;
    case float64:
      return 8;
    case bfloat16:
      return 2;
  }
  return 0;
}

template <class T>
void add(const std::byte* from, std::byte* to, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    T a;
    T b;
    std::memcpy(&a, to + i * sizeof a, sizeof a);
    std::memcpy(&b, from + i * sizeof b, sizeof b);
    a += b;
    std::memcpy(to + i * sizeof a, &a, sizeof a);
  }
}

/// to += from, rounded each time, as a ring does.
void add(DataType type, const std::byte* from, std::byte* to, std::size_t count) {
  if (type == float32) return add<float>(from, to, count);
  if (type == float64) return add<double>(from, to, count);
  for (std::size_t i = 0; i < count; ++i) {
    std::uint16_t a;
    std::uint16_t b;
    std::memcpy(&a, to + 2 * i, 2);
    std::memcpy(&b, from + 2 * i, 2);
    a = orrery::kernels::bf16_of(orrery::kernels::float_of_bf16(a) +
                                 orrery::kernels::float_of_bf16(b));
    std::memcpy(to + 2 * i, &a, 2);
  }
}

enum class Kind : std::uint64_t { all_reduce = 1, reduce_scatter, all_gather, point_to_point };

std::uint64_t call_of(Kind kind, std::uint64_t number, std::size_t bytes) {
  return static_cast<std::uint64_t>(kind) << 60 | (number & 0xFFFFF) << 40 | (bytes & 0xFFFFFFFFFF);
}

/// `part(m)` of this member's to each member m, and from each into `into`, by member.
void all_to_all(Comm& comm, std::uint64_t call, std::size_t bytes,
                const std::function<std::byte*(int)>& part,
                const std::function<std::byte*(int)>& into) {
  std::vector<Message> messages;
  for (int m = 0; m < comm.ranks; ++m) {
    messages.push_back({.peer = m, .data = part(m), .bytes = bytes, .call = call});
    messages.push_back(
        {.peer = m, .data = into(m), .bytes = bytes, .received = true, .call = call});
  }
  move_all(comm, messages);
}

Comm& at(void* comm) {
  return *static_cast<Comm*>(comm);
}
const HostStream* at_stream(void* stream) {
  return static_cast<const HostStream*>(stream);
}

void let_go(Comm* comm) {
  if (comm->joining.joinable()) comm->joining.join();
  while (comm->enqueued > 0) std::this_thread::yield();
  munmap(comm->shared, sizeof(Shared));
  delete comm;
}

}  // namespace

extern "C" {

Result ncclGetVersion(int* version) {
  *version = 22809;
  return success;
}

Result ncclGetUniqueId(UniqueId* id) {
  const auto now = std::chrono::steady_clock::now().time_since_epoch().count();
  const std::string name = "/orrery-nccl-" + std::to_string(getpid()) + "-" +
                           std::to_string(ids_made++) + "-" + std::to_string(now);
  std::memset(id->internal, 0, sizeof id->internal);
  std::memcpy(id->internal, name.c_str(), name.size());
  return success;
}

Result ncclCommInitRankConfig(void** made, int ranks, UniqueId id, int rank, Config* config) {
  if (config->magic != 0xcafebeef || config->size < sizeof(Config) || config->blocking != 0 ||
      ranks > kMostMembers) {
    last_error = "no configuration of a communicator that does not block";
    return invalid_usage;
  }
  auto comm = std::make_unique<Comm>();
  comm->file = id.internal;
  comm->rank = rank;
  comm->ranks = ranks;
  const int fd = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
  if (fd < 0 || ftruncate(fd, sizeof(Shared)) != 0) {
    last_error = "no shared memory";
    return invalid_usage;
  }
  void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (memory == MAP_FAILED) {
    last_error = "no shared memory";
    return invalid_usage;
  }
  comm->shared = static_cast<Shared*>(memory);
  comm->joining = std::thread([c = comm.get()] {
    ++c->shared->joined;
    while (c->shared->joined < c->ranks) {
      if (c->abort) return fail(*c, remote_error, "aborted");
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
    shm_unlink(c->file.c_str());
    c->state = success;
  });
  *made = comm.release();
  return in_progress;
}

Result ncclCommFinalize(void* comm) {
  at(comm).finalizing = true;
  return in_progress;
}

Result ncclCommDestroy(void* comm) {
  let_go(&at(comm));
  return success;
}

Result ncclCommAbort(void* comm) {
  Comm& c = at(comm);
  c.abort = true;
  ++c.shared->aborted;
  shm_unlink(c.file.c_str());
  let_go(&c);
  return success;
}

Result ncclCommGetAsyncError(void* comm, Result* error) {
  *error = static_cast<Result>(at(comm).state.load());
  if (*error == success && at(comm).finalizing && at(comm).enqueued > 0) *error = in_progress;
  if (*error != success && *error != in_progress) last_error = at(comm).error;
  return success;
}

const char* ncclGetErrorString(Result result) {
  switch (result) {
    case success:
      return "no error";
    case in_progress:
      return "in progress";
    case remote_error:
      return "remote process exited or there was a network error";
    default:
      return "invalid usage";
  }
}

const char* ncclGetLastError(void*) {
  return last_error.c_str();
}

Result ncclAllReduce(const void* from, void* to, std::size_t count, DataType type, RedOp,
                     void* comm, void* stream) {
  Comm& c = at(comm);
  const std::size_t bytes = count * size_of(type);
  const std::uint64_t call = call_of(Kind::all_reduce, c.calls++, bytes);
  return enqueue(c, at_stream(stream), [=, &c] {
    std::vector<std::byte> own(bytes);
    std::memcpy(own.data(), from, bytes);
    std::vector<std::byte> terms(bytes * static_cast<std::size_t>(c.ranks));
    all_to_all(
        c, call, bytes, [&](int) { return own.data(); },
        [&](int m) { return terms.data() + static_cast<std::size_t>(m) * bytes; });
    for (int m = 1; m < c.ranks; ++m) {
      add(type, terms.data() + static_cast<std::size_t>(m) * bytes, terms.data(), count);
    }
    std::memcpy(to, terms.data(), bytes);
  });
}

Result ncclReduceScatter(const void* from, void* to, std::size_t count, DataType type, RedOp,
                         void* comm, void* stream) {
  Comm& c = at(comm);
  const std::size_t bytes = count * size_of(type);
  const std::uint64_t call = call_of(Kind::reduce_scatter, c.calls++, bytes);
  return enqueue(c, at_stream(stream), [=, &c] {
    const auto members = static_cast<std::size_t>(c.ranks);
    std::vector<std::byte> whole(bytes * members);
    std::memcpy(whole.data(), from, whole.size());
    std::vector<std::byte> terms(whole.size());
    all_to_all(
        c, call, bytes, [&](int m) { return whole.data() + static_cast<std::size_t>(m) * bytes; },
        [&](int m) { return terms.data() + static_cast<std::size_t>(m) * bytes; });
    for (std::size_t m = 1; m < members; ++m) {
      add(type, terms.data() + m * bytes, terms.data(), count);
    }
    std::memcpy(to, terms.data(), bytes);
  });
}

Result ncclAllGather(const void* from, void* to, std::size_t count, DataType type, void* comm,
                     void* stream) {
  Comm& c = at(comm);
  const std::size_t bytes = count * size_of(type);
  const std::uint64_t call = call_of(Kind::all_gather, c.calls++, bytes);
  return enqueue(c, at_stream(stream), [=, &c] {
    std::vector<std::byte> own(bytes);
    std::memcpy(own.data(), from, bytes);
    all_to_all(
        c, call, bytes, [&](int) { return own.data(); },
        [&](int m) { return static_cast<std::byte*>(to) + static_cast<std::size_t>(m) * bytes; });
  });
}

Result ncclGroupStart() {
  ++group_depth;
  return success;
}

Result ncclGroupEnd() {
  if (--group_depth > 0) return success;
  std::vector<GroupCall> calls;
  calls.swap(group);
  if (calls.empty()) return success;
  Comm& c = *calls.front().comm;
  std::vector<Message> messages;
  for (GroupCall& call : calls) {
    if (call.comm != &c || call.stream != calls.front().stream) {
      last_error = "several communicators or streams in a group";
      return invalid_usage;
    }
    messages.push_back(call.message);
  }
  return enqueue(c, calls.front().stream, [&c, messages]() mutable { move_all(c, messages); });
}

Result ncclSend(const void* from, std::size_t count, DataType type, int peer, void* comm,
                void* stream) {
  const std::size_t bytes = count * size_of(type);
  ncclGroupStart();
  group.push_back({&at(comm),
                   at_stream(stream),
                   {.peer = peer,
                    .data = static_cast<std::byte*>(const_cast<void*>(from)),
                    .bytes = bytes,
                    .call = call_of(Kind::point_to_point, 0, bytes)}});
  return ncclGroupEnd();
}

Result ncclRecv(void* to, std::size_t count, DataType type, int peer, void* comm, void* stream) {
  const std::size_t bytes = count * size_of(type);
  ncclGroupStart();
  group.push_back({&at(comm),
                   at_stream(stream),
                   {.peer = peer,
                    .data = static_cast<std::byte*>(to),
                    .bytes = bytes,
                    .received = true,
                    .call = call_of(Kind::point_to_point, 0, bytes)}});
  return ncclGroupEnd();
}
}
