// What ops of one rank do to each other through memory. An op is ordered behind another if a chain
// of streams and waits leads there; whether it does is told by a clock for every stream (Fidge
// 1988, Mattern 1989): how much of it is done for certain when an op begins.

#include <algorithm>
#include <array>
#include <unordered_map>

#include <fmt/core.h>

#include "calibrate/execute/lowering.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

using Clock = std::array<std::uint32_t, kStreamsPerRank>;

struct Access {
  kernels::Touch touch;
  std::size_t op = 0;  ///< index
};

const std::byte* begin_of(const kernels::Touch& t) {
  return static_cast<const std::byte*>(t.begin);
}

const std::byte* end_of(const kernels::Touch& t) {
  return begin_of(t) + (t.rows - 1) * t.pitch_bytes + t.row_bytes;
}

/// Whether they have a byte in common; of rows with different pitches, whether they might.
bool overlap(const kernels::Touch& a, const kernels::Touch& b) {
  if (a.rows <= 0 || b.rows <= 0 || a.row_bytes <= 0 || b.row_bytes <= 0) return false;
  if (end_of(a) <= begin_of(b) || end_of(b) <= begin_of(a)) return false;
  if (a.pitch_bytes != b.pitch_bytes || a.rows == 1 || b.rows == 1) return true;
  const std::int64_t pitch = a.pitch_bytes;
  const std::int64_t shift = ((begin_of(b) - begin_of(a)) % pitch + pitch) % pitch;
  return shift < a.row_bytes || shift + b.row_bytes > pitch;
}

bool same_place(const kernels::Touch& a, const kernels::Touch& b) {
  return a.begin == b.begin && a.rows == b.rows && a.row_bytes == b.row_bytes &&
         (a.rows == 1 || a.pitch_bytes == b.pitch_bytes);
}

std::vector<kernels::Touch> touches_of(const LoweredOp& op) {
  std::vector<kernels::Touch> all;
  const auto add = [&](const std::vector<kernels::Touch>& some) {
    all.insert(all.end(), some.begin(), some.end());
  };
  for (const kernels::Call& call : op.calls) add(kernels::touches_of(call));
  if (op.communication) add(op.communication->touches());
  for (const kernels::Call& call : op.then) add(kernels::touches_of(call));
  return all;
}

class MemoryOrder {
 public:
  MemoryOrder(std::vector<LoweredOp>& ops, const Program& program, const Tensors& tensors)
      : ops_(ops), program_(program), tensors_(tensors) {
    for (std::size_t i = 0; i < ops.size(); ++i) index_[ops[i].op.value] = i;
    last_.fill(kNone);
  }

  std::int64_t run() {
    std::int64_t added = 0;
    clocks_.resize(ops_.size());
    for (std::size_t i = 0; i < ops_.size(); ++i) {
      LoweredOp& op = ops_[i];
      Clock& clock = clocks_[i];
      clock.fill(0);
      for (const StreamKind stream : op.streams) {
        if (last_[at(stream)] != kNone) see(clock, last_[at(stream)]);
      }
      for (const OpId wait : op.waits) see(clock, index_.at(wait.value));
      const std::vector<kernels::Touch> touches = touches_of(op);
      // Reads first: what an op writes and then reads is its own.
      std::vector<kernels::Touch> written;
      for (const kernels::Touch& touch : touches) {
        const bool own = std::any_of(written.begin(), written.end(),
                                     [&](const auto& w) { return overlap(w, touch); });
        if (!own || touch.written) added += order(i, touch);
        if (touch.written) written.push_back(touch);
      }
      for (const StreamKind stream : op.streams) {
        clock[at(stream)] = ++issued_[at(stream)];
        last_[at(stream)] = i;
      }
      for (const kernels::Touch& touch : touches) remember(i, touch);
    }
    return added;
  }

 private:
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  static std::size_t at(StreamKind stream) { return static_cast<std::size_t>(stream); }

  void see(Clock& clock, std::size_t done) const {
    for (std::size_t s = 0; s < clock.size(); ++s) {
      clock[s] = std::max(clock[s], clocks_[done][s]);
    }
  }

  bool ordered(std::size_t before, std::size_t after) const {
    const std::size_t stream = at(ops_[before].streams.front());
    return clocks_[after][stream] >= clocks_[before][stream];
  }

  /// Of memory that no tensor has (routes of exchanges), the address is the piece.
  std::vector<Access>& accesses(const kernels::Touch& touch) {
    const auto piece = tensors_.piece_of(touch.begin);
    return piece ? pieces_[*piece] : host_[touch.begin];
  }

  std::int64_t order(std::size_t op, const kernels::Touch& touch) {
    std::int64_t added = 0;
    for (const Access& access : accesses(touch)) {
      if (!touch.written && !access.touch.written) continue;
      if (access.op == op || ordered(access.op, op) || !overlap(access.touch, touch)) continue;
      const auto piece = tensors_.piece_of(touch.begin);
      ORRERY_CHECK(touch.written || !access.touch.written,
                   "{} reads what {} writes ({}), and nothing orders them",
                   program_.name(ops_[op].op), program_.name(ops_[access.op].op),
                   piece ? tensors_.name_of_piece(*piece) : "a route");
      ops_[op].waits.push_back(ops_[access.op].op);
      see(clocks_[op], access.op);
      ++added;
    }
    return added;
  }

  void remember(std::size_t op, const kernels::Touch& touch) {
    std::vector<Access>& list = accesses(touch);
    // A write stands for all before it that it covers, since it is ordered behind them; a read for
    // an earlier one of its stream.
    list.erase(std::remove_if(list.begin(), list.end(),
                              [&](const Access& earlier) {
                                if (!same_place(earlier.touch, touch) || earlier.op == op)
                                  return false;
                                if (touch.written) return true;
                                return !earlier.touch.written &&
                                       ops_[earlier.op].streams == ops_[op].streams;
                              }),
               list.end());
    list.push_back({touch, op});
  }

  std::vector<LoweredOp>& ops_;
  const Program& program_;
  const Tensors& tensors_;
  std::unordered_map<std::uint64_t, std::size_t> index_;  ///< by op id
  std::vector<Clock> clocks_;
  Clock issued_{};
  std::array<std::size_t, kStreamsPerRank> last_{};
  std::unordered_map<std::size_t, std::vector<Access>> pieces_;
  std::unordered_map<const void*, std::vector<Access>> host_;
};

}  // namespace

std::int64_t order_memory(std::vector<LoweredOp>& ops, const Program& program,
                          const Tensors& tensors) {
  return MemoryOrder(ops, program, tensors).run();
}

}  // namespace orrery
