#include "calibrate/measure_network.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>

#include "calibrate/transport/clock_offset.hpp"
#include "calibrate/transport/collectives.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

constexpr std::uint64_t kTag = 0;  // of all messages here: they come in order
constexpr std::size_t kBatch = 10;

/// Buffers of one size after the other in a stretch of memory that no cache holds: a step comes
/// back to the same memory only after it has touched much else.
class Rotation {
 public:
  explicit Rotation(std::int64_t most_bytes)
      : memory_(std::max(kStretch, static_cast<std::size_t>(most_bytes)), std::byte{0}) {}

  void begin(std::size_t bytes) {
    bytes_ = bytes;
    step_ = (bytes + kStep - 1) / kStep * kStep;
    at_ = 0;
  }
  std::span<std::byte> next() {
    if (at_ + bytes_ > memory_.size()) at_ = 0;
    const std::span<std::byte> buffer = std::span(memory_).subspan(at_, bytes_);
    at_ += step_;
    return buffer;
  }

 private:
  static constexpr std::size_t kStretch = std::size_t{64} << 20;
  static constexpr std::size_t kStep = std::size_t{64} << 10;  // small ones do not share pages

  std::vector<std::byte> memory_;
  std::size_t bytes_ = 0;
  std::size_t step_ = 0;
  std::size_t at_ = 0;
};

class HostOperations final : public GroupOperations {
 public:
  HostOperations(Transport& transport, std::int64_t most_bytes)
      : transport_(transport), clock_(monotonic_clock()), buffers_(2 * most_bytes) {}

  void prepare(NcclOp op, int members, std::size_t bytes) override {
    op_ = op;
    group_ = group_of(transport_.rank(), members);
    each_ = bytes / group_.size();
    even_.assign(group_.size(), each_);
    buffers_.begin(bytes);
  }

  RunSpan run() override {
    RunSpan span;
    span.begin_ns = clock_.now_ns();
    take_part();
    span.end_ns = clock_.now_ns();
    return span;
  }

 private:
  void take_part() {
    const GroupOp op{.transport = transport_, .group = group_, .tag = kTag, .name = "measuring"};
    const std::span<std::byte> whole = buffers_.next();
    const std::span<std::byte> own = whole.subspan(place() * each_, each_);
    switch (op_) {
      case NcclOp::all_reduce:
        return all_reduce(op, ElementType::fp32, whole);
      case NcclOp::all_gather:
        return all_gather(op, own, whole);
      case NcclOp::reduce_scatter:
        return reduce_scatter(op, ElementType::fp32, whole, own);
      case NcclOp::alltoall:
        return all_to_all(op, whole, even_, buffers_.next(), even_);
      case NcclOp::sendrecv: {
        const std::size_t n = group_.size();
        const std::array requests{
            transport_.post_receive(group_[(place() + n - 1) % n], kTag, buffers_.next()),
            transport_.post_send(group_[(place() + 1) % n], kTag, whole)};
        return transport_.wait_all(requests, "measuring");
      }
      default:
        ORRERY_CHECK(false, "{} is not measured", name_of(op_));
    }
  }

  std::size_t place() const { return static_cast<std::size_t>(transport_.rank() - group_.front()); }

  Transport& transport_;
  const MachineClock clock_;
  Rotation buffers_;
  NcclOp op_ = NcclOp::other;
  std::vector<int> group_;
  std::size_t each_ = 0;
  std::vector<std::uint64_t> even_;
};

/// The batch's spans of all ranks, on rank 0.
std::vector<std::vector<RunSpan>> gather_spans(Transport& transport,
                                               const std::vector<RunSpan>& own) {
  std::vector<std::vector<RunSpan>> all;
  for (const auto& bytes : transport.gather(std::as_bytes(std::span(own)))) {
    all.emplace_back(own.size());
    std::memcpy(all.back().data(), bytes.data(), bytes.size());
  }
  return all;
}

/// Rank 0's answer to a question, on all ranks.
bool agree(Transport& transport, bool answer) {
  const std::vector<int> all = group_of(0, transport.ranks());
  std::byte byte{answer ? std::uint8_t{1} : std::uint8_t{0}};
  broadcast({.transport = transport, .group = all, .tag = kTag, .name = "measuring"}, 0,
            std::span(&byte, 1));
  return byte != std::byte{0};
}

/// Of each group in each run: from the last member's begin to the last one's end.
void add_samples(const std::vector<std::vector<RunSpan>>& spans, std::size_t members,
                 std::vector<double>& samples) {
  for (std::size_t first = 0; first < spans.size(); first += members) {
    for (std::size_t run = 0; run < spans[first].size(); ++run) {
      RunSpan last = spans[first][run];
      for (std::size_t rank = first; rank < first + members; ++rank) {
        last.begin_ns = std::max(last.begin_ns, spans[rank][run].begin_ns);
        last.end_ns = std::max(last.end_ns, spans[rank][run].end_ns);
      }
      samples.push_back(static_cast<double>(last.end_ns - last.begin_ns) * 1e-9);
    }
  }
}

class Measuring {
 public:
  Measuring(Transport& transport, const NetworkMeasureOptions& options, GroupOperations& operations)
      : transport_(transport),
        options_(options),
        operations_(operations),
        clock_(monotonic_clock()) {
    offset_ns_ = clock_offset_ns(transport, clock_);
    began_ns_ = clock_.now_ns();
  }

  double elapsed_s() const { return static_cast<double>(clock_.now_ns() - began_ns_) * 1e-9; }

  /// On all ranks; what it returns is right on rank 0.
  NetworkPoint point(NcclOp op, int members, std::int64_t bytes, double share_s) {
    operations_.prepare(op, members, static_cast<std::size_t>(bytes));
    operations_.run();
    std::vector<double> samples;
    const std::int64_t began_ns = clock_.now_ns();
    const auto go_on = [&] {
      if (samples.size() < options_.rule.min_samples) return true;
      return !enough_samples(samples, options_.rule) &&
             static_cast<double>(clock_.now_ns() - began_ns) < share_s * 1e9;
    };
    while (agree(transport_, go_on())) {
      std::vector<RunSpan> spans(kBatch);
      for (RunSpan& span : spans) {
        transport_.barrier("measuring");
        span = operations_.run();
        span.begin_ns += offset_ns_;
        span.end_ns += offset_ns_;
      }
      add_samples(gather_spans(transport_, spans), static_cast<std::size_t>(members), samples);
    }
    NetworkPoint point{.op = op, .members = members, .bytes = bytes, .seconds = {}};
    if (transport_.rank() == 0) {
      point.seconds = summarise_samples(samples);
      if (options_.progress) options_.progress(point);
    }
    return point;
  }

 private:
  Transport& transport_;
  const NetworkMeasureOptions& options_;
  GroupOperations& operations_;
  const MachineClock clock_;
  std::int64_t offset_ns_ = 0;
  std::int64_t began_ns_ = 0;
};

}  // namespace

std::vector<int> group_of(int rank, int members) {
  std::vector<int> group(static_cast<std::size_t>(members));
  std::iota(group.begin(), group.end(), rank / members * members);
  return group;
}

std::vector<NetworkPoint> measure_network(Transport& transport,
                                          const NetworkMeasureOptions& options) {
  HostOperations operations(transport, options.most_bytes);
  return measure_network(transport, options, operations);
}

std::vector<NetworkPoint> measure_network(Transport& transport,
                                          const NetworkMeasureOptions& options,
                                          GroupOperations& operations) {
  struct Wanted {
    NcclOp op;
    int members;
    std::int64_t bytes;
  };
  std::vector<Wanted> wanted;
  for (int members = 2; members <= transport.ranks(); ++members) {
    if (transport.ranks() % members != 0) continue;
    const std::int64_t unit = std::int64_t{16} * members;
    for (const NcclOp op : {NcclOp::all_reduce, NcclOp::all_gather, NcclOp::reduce_scatter,
                            NcclOp::alltoall, NcclOp::sendrecv}) {
      for (std::int64_t bytes = options.least_bytes; bytes <= options.most_bytes; bytes *= 2) {
        if (bytes >= unit) wanted.push_back({op, members, bytes / unit * unit});
      }
    }
  }
  std::vector<NetworkPoint> points;
  Measuring measuring(transport, options, operations);
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const double share_s =
        (options.limit_s - measuring.elapsed_s()) / static_cast<double>(wanted.size() - i);
    const auto& [op, members, bytes] = wanted[i];
    const NetworkPoint point = measuring.point(op, members, bytes, share_s);
    if (transport.rank() == 0) points.push_back(point);
  }
  return points;
}

double measure_copy_rate(Transport& transport) {
  constexpr std::size_t kBytes = std::size_t{32} << 20;
  constexpr int kRuns = 10;
  std::vector<std::byte> from(kBytes, std::byte{1});
  std::vector<std::byte> to(kBytes, std::byte{2});
  const MachineClock clock = monotonic_clock();
  std::vector<double> rates;
  for (int run = 0; run < kRuns; ++run) {
    transport.barrier("measuring");
    const std::int64_t began_ns = clock.now_ns();
    std::memcpy(to.data(), from.data(), kBytes);
    rates.push_back(static_cast<double>(kBytes) * 1e9 /
                    static_cast<double>(clock.now_ns() - began_ns));
  }
  std::vector<double> all;
  for (const auto& bytes : transport.gather(std::as_bytes(std::span(rates)))) {
    std::vector<double> theirs(rates.size());
    std::memcpy(theirs.data(), bytes.data(), bytes.size());
    all.insert(all.end(), theirs.begin(), theirs.end());
  }
  return all.empty() ? 0 : median(all);
}

}  // namespace orrery
