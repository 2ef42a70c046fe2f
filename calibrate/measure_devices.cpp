#include "calibrate/measure_devices.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <thread>

#include "calibrate/transport/open_communicator.hpp"
#include "kernels/statistics.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

using kernels::Piece;

/// Twice a GPU's largest cache: small buffers come from memory, as in a step.
constexpr std::size_t kStretch = std::size_t{128} << 20;
constexpr std::size_t kStep = std::size_t{64} << 10;

/// A device's memory, until the end.
class Buffer {
 public:
  Buffer(kernels::Device& device, std::int64_t bytes)
      : device_(device), data_(device.allocate(static_cast<std::size_t>(bytes))) {}
  ~Buffer() { device_.release(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void* data() const { return data_; }

 private:
  kernels::Device& device_;
  void* data_;
};

/// What is timed on one device: a stream and its events.
struct Lane {
  explicit Lane(kernels::Device& d)
      : device(d), stream(d.create_stream()), begin(d.create_event()), end(d.create_event()) {}
  kernels::Device& device;
  kernels::StreamHandle stream;
  kernels::EventHandle begin, end;
};

constexpr int kRuns = 9;

}  // namespace

DeviceOperations::DeviceOperations(Transport& transport, kernels::Device& device,
                                   std::shared_ptr<const kernels::Nccl> nccl,
                                   std::int64_t most_bytes)
    : transport_(transport),
      device_(device),
      stream_(device.create_stream()),
      begin_(device.create_event()),
      end_(device.create_event()) {
  const std::vector<int> all = group_of(0, transport.ranks());
  transport.barrier("opening communicators");
  for (int members = 2; members <= transport.ranks(); ++members) {
    if (transport.ranks() % members != 0) continue;
    since_ = Clock::now();
    // One operation at a time on each device, so that NCCL may take as many SMs as it likes.
    by_members_.emplace_back(
        members,
        open_communicator(transport, nccl, device, stream_, group_of(transport.rank(), members),
                          static_cast<std::uint64_t>(members), 0, "measuring",
                          [this] { look("communicating"); }));
  }
  memory_bytes_ = std::max(kStretch, 2 * static_cast<std::size_t>(most_bytes));
  memory_ = static_cast<std::byte*>(device.allocate(memory_bytes_));
}

DeviceOperations::~DeviceOperations() {
  if (memory_ != nullptr) device_.release(memory_);
}

void DeviceOperations::prepare(NcclOp op, int members, std::size_t bytes) {
  op_ = op;
  group_ = group_of(transport_.rank(), members);
  bytes_ = bytes;
  at_ = 0;
  const auto found = std::find_if(by_members_.begin(), by_members_.end(),
                                  [&](const auto& entry) { return entry.first == members; });
  ORRERY_CHECK(found != by_members_.end(), "groups of {}", members);
  communicator_ = found->second.get();
}

std::byte* DeviceOperations::next_buffer() {
  if (at_ + bytes_ > memory_bytes_) at_ = 0;
  std::byte* const buffer = memory_ + at_;
  at_ += (bytes_ + kStep - 1) / kStep * kStep;
  return buffer;
}

RunSpan DeviceOperations::run() {
  since_ = Clock::now();
  try {
    device_.record(stream_, begin_);
    enqueue();
    device_.record(stream_, end_);
    while (!device_.reached(end_)) {
      look("an operation");
      communicator_->check();
      std::this_thread::yield();
    }
  } catch (const std::exception& error) {
    transport_.abort(error.what());
    for (const auto& [members, communicator] : by_members_) communicator->abort();
    throw;
  }
  device_.synchronize();
  return {.begin_ns = device_.reached_ns(begin_), .end_ns = device_.reached_ns(end_)};
}

void DeviceOperations::look(const char* what) {
  transport_.check(group_, "measuring");
  if (Clock::now() - since_ < transport_.timeout()) return;
  throw std::runtime_error(
      fmt::format("rank {}: measuring: {} not done within {:.3g} s", transport_.rank(), what,
                  std::chrono::duration<double>(transport_.timeout()).count()));
}

void DeviceOperations::enqueue() {
  const auto members = group_.size();
  const auto place = static_cast<std::size_t>(transport_.rank() - group_.front());
  const std::size_t part = bytes_ / members;
  std::byte* const whole = next_buffer();
  std::byte* const own = whole + place * part;
  switch (op_) {
    case NcclOp::all_reduce:
      return communicator_->all_reduce(kernels::ElementType::fp32, whole, bytes_ / sizeof(float));
    case NcclOp::all_gather:
      return communicator_->all_gather(own, whole, part);
    case NcclOp::reduce_scatter:
      return communicator_->reduce_scatter(kernels::ElementType::fp32, whole, own,
                                           part / sizeof(float));
    case NcclOp::alltoall: {
      std::byte* const other = next_buffer();
      std::vector<Piece> sent;
      std::vector<Piece> received;
      for (std::size_t m = 0; m < members; ++m) {
        sent.push_back({static_cast<int>(m), whole + m * part, part});
        received.push_back({static_cast<int>(m), other + m * part, part});
      }
      return communicator_->exchange(sent, received);
    }
    case NcclOp::sendrecv: {
      const Piece sent{static_cast<int>((place + 1) % members), whole, bytes_};
      const Piece received{static_cast<int>((place + members - 1) % members), next_buffer(),
                           bytes_};
      return communicator_->exchange({&sent, 1}, {&received, 1});
    }
    default:
      ORRERY_CHECK(false, "{} is not measured", name_of(op_));
  }
}

std::vector<PeerCopy> measure_peer_copies(std::span<kernels::Device* const> devices,
                                          std::int64_t bytes) {
  std::vector<std::unique_ptr<Lane>> lanes;
  std::vector<std::unique_ptr<Buffer>> sources;
  std::vector<std::unique_ptr<Buffer>> targets;
  for (kernels::Device* device : devices) {
    lanes.push_back(std::make_unique<Lane>(*device));
    sources.push_back(std::make_unique<Buffer>(*device, bytes));
    targets.push_back(std::make_unique<Buffer>(*device, bytes));
  }
  const auto size = static_cast<std::size_t>(bytes);
  const auto copy = [&](std::size_t from, std::size_t to) {
    Lane& lane = *lanes[to];
    lane.device.record(lane.stream, lane.begin);
    lane.device.enqueue_copy_from(lane.stream, targets[to]->data(), lanes[from]->device,
                                  sources[from]->data(), size);
    lane.device.record(lane.stream, lane.end);
  };
  const auto seconds = [&](std::initializer_list<std::size_t> ends) {
    std::int64_t first_ns = std::numeric_limits<std::int64_t>::max();
    std::int64_t last_ns = 0;
    for (const std::size_t end : ends) {
      Lane& lane = *lanes[end];
      lane.device.synchronize();
      first_ns = std::min(first_ns, lane.device.reached_ns(lane.begin));
      last_ns = std::max(last_ns, lane.device.reached_ns(lane.end));
    }
    return static_cast<double>(last_ns - first_ns) * 1e-9;
  };
  const auto rate = [&](const auto& run) {
    run();  // the first one opens the way
    std::vector<double> rates;
    for (int i = 0; i < kRuns; ++i) rates.push_back(static_cast<double>(bytes) / run());
    return median(rates);
  };
  std::vector<PeerCopy> copies;
  for (std::size_t from = 0; from < devices.size(); ++from) {
    for (std::size_t to = 0; to < devices.size(); ++to) {
      if (from == to) continue;
      const double alone = rate([&] {
        copy(from, to);
        return seconds({to});
      });
      const double both = rate([&] {
        copy(from, to);
        copy(to, from);
        return seconds({from, to});
      });
      copies.push_back({.from = static_cast<int>(from),
                        .to = static_cast<int>(to),
                        .bytes_per_s = alone,
                        .both_ways_bytes_per_s = both});
    }
  }
  return copies;
}

double measure_own_copies(kernels::Device& device, std::int64_t bytes) {
  Lane lane(device);
  const Buffer from(device, bytes);
  const Buffer to(device, bytes);
  std::vector<double> rates;
  for (int i = 0; i <= kRuns; ++i) {
    device.record(lane.stream, lane.begin);
    device.enqueue(lane.stream,
                   kernels::Loopback{.from = from.data(), .to = to.data(), .bytes = bytes});
    device.record(lane.stream, lane.end);
    device.synchronize();
    const std::int64_t ns = device.reached_ns(lane.end) - device.reached_ns(lane.begin);
    if (i > 0) rates.push_back(static_cast<double>(bytes) * 1e9 / static_cast<double>(ns));
  }
  return median(rates);
}

namespace {

/// The median of what all ranks say, on rank 0.
double median_of_all(Transport& transport, double own) {
  std::vector<double> all;
  for (const auto& bytes : transport.gather(std::as_bytes(std::span(&own, 1)))) {
    all.emplace_back();
    std::memcpy(&all.back(), bytes.data(), sizeof own);
  }
  return all.empty() ? 0 : median(all);
}

std::unique_ptr<kernels::Device> open_gpu(int ordinal) {
  auto opened = kernels::open_cuda_device(ordinal);
  if (auto* why = std::get_if<std::string>(&opened)) throw std::runtime_error("no GPU: " + *why);
  return std::move(std::get<std::unique_ptr<kernels::Device>>(opened));
}

/// Of all GPUs of the ranks, by rank 0, which has one of them open; none where it sees no other.
std::vector<PeerCopy> measure_gpu_pairs(kernels::Device& own, int ranks, std::int64_t bytes) {
  const int gpus = std::min(ranks, kernels::count_cuda_devices());
  std::vector<std::unique_ptr<kernels::Device>> others;
  std::vector<kernels::Device*> all{&own};
  for (int gpu = 1; gpu < gpus; ++gpu) {
    others.push_back(open_gpu(gpu));
    all.push_back(others.back().get());
  }
  return measure_peer_copies(all, bytes);
}

}  // namespace

GpuNetwork measure_gpu_network(Transport& transport, std::shared_ptr<const kernels::Nccl> nccl,
                               const NetworkMeasureOptions& options) {
  const LocalPlace place = local_place(transport);
  const int gpus = kernels::count_cuda_devices();
  if (gpus == 0) open_gpu(0);  // says why
  const char* const instead =
      ". Measured elsewhere, with nccl-tests: orrery calibrate --nccl OUTPUT --cluster FILE";
  if (place.ranks < transport.ranks()) {
    throw std::runtime_error(
        fmt::format("{} ranks on several machines: --ranks writes a cluster of one{}",
                    transport.ranks(), instead));
  }
  if (gpus == 1 && place.ranks > 1 && std::getenv("CUDA_VISIBLE_DEVICES") == nullptr) {
    throw std::runtime_error(fmt::format(
        "one GPU, and {} ranks: collectives (NCCL) and copies between GPUs (NVLink, PCIe) need one "
        "for each{}",
        transport.ranks(), instead));
  }
  const std::unique_ptr<kernels::Device> device = open_gpu(gpu_of(place, gpus));
  GpuNetwork network;
  {
    DeviceOperations operations(transport, *device, nccl, options.most_bytes);
    network.points = measure_network(transport, options, operations);
  }
  network.device = device->name();
  constexpr std::int64_t kCopied = std::int64_t{256} << 20;
  transport.barrier("copies");
  network.copy_bytes_per_s = median_of_all(transport, measure_own_copies(*device, kCopied));
  transport.barrier("copies between GPUs");
  if (transport.rank() == 0) {
    network.peers = measure_gpu_pairs(*device, transport.ranks(), kCopied);
  }
  transport.barrier("end of measuring");
  return network;
}

std::string peer_copy_report(std::span<const PeerCopy> copies) {
  std::string out =
      fmt::format("{:<16} {:>14} {:>20}\n", "copies of GPUs", "one way", "both ways, each");
  for (const PeerCopy& c : copies) {
    out +=
        fmt::format("{:<16} {:>9.3f} GB/s {:>15.3f} GB/s\n", fmt::format("{} -> {}", c.from, c.to),
                    c.bytes_per_s * 1e-9, c.both_ways_bytes_per_s * 1e-9);
  }
  return out;
}

}  // namespace orrery
