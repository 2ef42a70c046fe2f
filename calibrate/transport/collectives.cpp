#include "calibrate/transport/collectives.hpp"

#include <algorithm>
#include <cstring>
#include <memory>

#include "sim/check.hpp"

namespace orrery {
namespace {

std::size_t member_of(const GroupOp& op) {
  const auto found = std::find(op.group.begin(), op.group.end(), op.transport.rank());
  ORRERY_CHECK(found != op.group.end(), "rank {} is no member of {}", op.transport.rank(),
               op.name.str());
  return static_cast<std::size_t>(found - op.group.begin());
}

/// The others, each member beginning with the next one, so that not all send to the same at once.
template <class Visit>
void for_others(std::size_t member, std::size_t members, Visit visit) {
  for (std::size_t i = 1; i < members; ++i) visit((member + i) % members);
}

/// A GroupOp's requests. Nothing is sent where there is nothing to send: both sides know the sizes.
class Messages {
 public:
  explicit Messages(const GroupOp& op) : op_(op) {}
  void send(std::size_t to, std::span<const std::byte> bytes) {
    if (!bytes.empty()) {
      requests_.push_back(op_.transport.post_send(op_.group[to], op_.tag, bytes));
    }
  }
  void receive(std::size_t from, std::span<std::byte> bytes) {
    if (!bytes.empty()) {
      requests_.push_back(op_.transport.post_receive(op_.group[from], op_.tag, bytes));
    }
  }
  void wait() {
    op_.transport.wait_all(requests_, op_.name);
    requests_.clear();
  }

 private:
  const GroupOp& op_;
  std::vector<Request> requests_;
};

/// What a member sums at a time: so much of every other one's shard is held beside the shards.
constexpr std::size_t kChunkBytes = std::size_t{1} << 20;

/// In chunks, two under way: while one is summed, the next one comes.
class ReduceScatter {
 public:
  ReduceScatter(const GroupOp& op, ElementType type, std::span<const std::byte> whole)
      : op_(op),
        type_(type),
        size_(bytes_of(type)),
        whole_(whole),
        member_(member_of(op)),
        chunk_(std::min(kChunkBytes / size_, longest())) {
    for (Half& half : halves_) {
      half.received =
          std::make_unique_for_overwrite<std::byte[]>(chunk_ * size_ * (op.group.size() - 1));
    }
  }

  void run(std::span<std::byte> own) {
    const std::size_t chunks = chunk_ == 0 ? 0 : (longest() + chunk_ - 1) / chunk_;
    if (chunks > 0) post(0);
    for (std::size_t c = 0; c < chunks; ++c) {
      if (c + 1 < chunks) post(c + 1);
      halves_[c % 2].messages.wait();
      sum(c, own);
    }
  }

 private:
  struct Half {
    Messages messages;
    std::unique_ptr<std::byte[]> received;  // (others, chunk), in the group's order
  };

  std::size_t elements() const { return whole_.size() / size_; }
  std::size_t longest() const {
    const Part first = part_of(elements(), 0, op_.group.size());
    return std::max(first.end - first.begin, elements() > 0 ? std::size_t{1} : 0);
  }
  Part chunk_of(std::size_t member, std::size_t chunk) const {
    const Part shard = part_of(elements(), member, op_.group.size());
    return {std::min(shard.begin + chunk * chunk_, shard.end),
            std::min(shard.begin + (chunk + 1) * chunk_, shard.end)};
  }
  std::size_t place_of(std::size_t other) const { return other < member_ ? other : other - 1; }

  void post(std::size_t chunk) {
    Half& half = halves_[chunk % 2];
    const Part mine = chunk_of(member_, chunk);
    for_others(member_, op_.group.size(), [&](std::size_t other) {
      half.messages.receive(other, {half.received.get() + place_of(other) * chunk_ * size_,
                                    (mine.end - mine.begin) * size_});
      const Part theirs = chunk_of(other, chunk);
      half.messages.send(other,
                         whole_.subspan(theirs.begin * size_, (theirs.end - theirs.begin) * size_));
    });
  }

  void sum(std::size_t chunk, std::span<std::byte> own) {
    const Half& half = halves_[chunk % 2];
    const Part mine = chunk_of(member_, chunk);
    std::vector<const std::byte*> terms;
    for (std::size_t m = 0; m < op_.group.size(); ++m) {
      terms.push_back(m == member_ ? whole_.data() + mine.begin * size_
                                   : half.received.get() + place_of(m) * chunk_ * size_);
    }
    const std::size_t shard_begin = part_of(elements(), member_, op_.group.size()).begin;
    sum_in_order(type_, terms, own.data() + (mine.begin - shard_begin) * size_,
                 mine.end - mine.begin);
  }

  const GroupOp& op_;
  const ElementType type_;
  const std::size_t size_;
  const std::span<const std::byte> whole_;
  const std::size_t member_;
  const std::size_t chunk_;  // elements
  Half halves_[2] = {{Messages(op_), nullptr}, {Messages(op_), nullptr}};
};

/// Every member's part of `whole`, as part_of splits it, to all others.
void gather_parts(const GroupOp& op, std::size_t element_bytes, std::span<std::byte> whole) {
  const std::size_t members = op.group.size();
  const std::size_t member = member_of(op);
  const auto part = [&](std::size_t m) {
    const Part p = part_of(whole.size() / element_bytes, m, members);
    return whole.subspan(p.begin * element_bytes, (p.end - p.begin) * element_bytes);
  };
  Messages messages(op);
  for_others(member, members, [&](std::size_t other) {
    messages.receive(other, part(other));
    messages.send(other, part(member));
  });
  messages.wait();
}

}  // namespace

Part part_of(std::size_t elements, std::size_t member, std::size_t members) {
  const std::size_t each = elements / members;
  const std::size_t longer = elements % members;  // the first so many have one more
  const std::size_t begin = member * each + std::min(member, longer);
  return {begin, begin + each + (member < longer ? 1 : 0)};
}

void all_reduce(const GroupOp& op, ElementType type, std::span<std::byte> buffer) {
  const std::size_t size = bytes_of(type);
  ORRERY_CHECK(buffer.size() % size == 0, "{} bytes of {}", buffer.size(), name_of(type));
  const Part own = part_of(buffer.size() / size, member_of(op), op.group.size());
  ReduceScatter(op, type, buffer)
      .run(buffer.subspan(own.begin * size, (own.end - own.begin) * size));
  gather_parts(op, size, buffer);
}

void reduce_scatter(const GroupOp& op, ElementType type, std::span<const std::byte> whole,
                    std::span<std::byte> own) {
  ORRERY_CHECK(own.size() % bytes_of(type) == 0 && whole.size() == own.size() * op.group.size(),
               "{} bytes of {} from {} on {} members", own.size(), name_of(type), whole.size(),
               op.group.size());
  ReduceScatter(op, type, whole).run(own);
}

void all_gather(const GroupOp& op, std::span<const std::byte> own, std::span<std::byte> whole) {
  ORRERY_CHECK(whole.size() == own.size() * op.group.size(), "{} bytes into {} on {} members",
               own.size(), whole.size(), op.group.size());
  if (own.empty()) return;
  std::byte* place = whole.data() + member_of(op) * own.size();
  if (place != own.data()) std::memcpy(place, own.data(), own.size());
  gather_parts(op, own.size(), whole);
}

/// Small ones directly; else the root deals out parts, and all gather them.
void broadcast(const GroupOp& op, std::size_t root, std::span<std::byte> buffer) {
  const std::size_t members = op.group.size();
  const std::size_t member = member_of(op);
  const bool direct = buffer.size() <= Transport::kCopiedBytes;
  const auto part = [&](std::size_t m) {
    const Part p = direct ? Part{0, buffer.size()} : part_of(buffer.size(), m, members);
    return buffer.subspan(p.begin, p.end - p.begin);
  };
  Messages messages(op);
  if (member == root) {
    for_others(member, members, [&](std::size_t other) { messages.send(other, part(other)); });
  } else {
    messages.receive(root, part(member));
  }
  messages.wait();
  if (direct) return;
  for_others(member, members, [&](std::size_t other) {
    if (member != root) messages.receive(other, part(other));
    if (other != root) messages.send(other, part(member));
  });
  messages.wait();
}

std::vector<std::uint64_t> exchange_counts(const GroupOp& op,
                                           std::span<const std::uint64_t> sent_counts) {
  ORRERY_CHECK(sent_counts.size() == op.group.size(), "{} counts for {} members",
               sent_counts.size(), op.group.size());
  const std::size_t member = member_of(op);
  std::vector<std::uint64_t> received(sent_counts.size());
  received[member] = sent_counts[member];
  Messages messages(op);
  for_others(member, op.group.size(), [&](std::size_t other) {
    messages.receive(other, std::as_writable_bytes(std::span(&received[other], 1)));
    messages.send(other, std::as_bytes(sent_counts.subspan(other, 1)));
  });
  messages.wait();
  return received;
}

void all_to_all(const GroupOp& op, std::span<const std::byte> sent,
                std::span<const std::uint64_t> sent_bytes, std::span<std::byte> received,
                std::span<const std::uint64_t> received_bytes) {
  const std::size_t members = op.group.size();
  const std::size_t member = member_of(op);
  ORRERY_CHECK(sent_bytes.size() == members && received_bytes.size() == members,
               "{} and {} sizes for {} members", sent_bytes.size(), received_bytes.size(), members);
  std::vector<std::span<const std::byte>> to;
  std::vector<std::span<std::byte>> from;
  for (std::size_t m = 0; m < members; ++m) {
    ORRERY_CHECK(sent_bytes[m] <= sent.size() && received_bytes[m] <= received.size(),
                 "{}: {} of {} bytes to, {} of {} from member {}", op.name.str(), sent_bytes[m],
                 sent.size(), received_bytes[m], received.size(), m);
    to.push_back(sent.first(sent_bytes[m]));
    from.push_back(received.first(received_bytes[m]));
    sent = sent.subspan(sent_bytes[m]);
    received = received.subspan(received_bytes[m]);
  }
  ORRERY_CHECK(to[member].size() == from[member].size(), "{}: {} bytes to itself, {} from itself",
               op.name.str(), to[member].size(), from[member].size());
  Messages messages(op);
  for_others(member, members, [&](std::size_t other) {
    messages.receive(other, from[other]);
    messages.send(other, to[other]);
  });
  if (!to[member].empty()) {
    std::memcpy(from[member].data(), to[member].data(), to[member].size());
  }
  messages.wait();
}

void send(Transport& transport, int to, std::uint64_t tag, std::span<const std::byte> bytes,
          OpName name) {
  transport.wait(transport.post_send(to, tag, bytes), name);
}

void receive(Transport& transport, int from, std::uint64_t tag, std::span<std::byte> bytes,
             OpName name) {
  transport.wait(transport.post_receive(from, tag, bytes), name);
}

}  // namespace orrery
