// Measuring between devices: what is run on which group, and rates that are known.

#include "calibrate/measure_devices.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <set>

#include "tests/calibrate/known_device.hpp"
#include "tests/calibrate/measured_points.hpp"
#include "tests/nccl/fake.hpp"
#include "tests/nccl/host_stream_device.hpp"

namespace orrery {
namespace {

using testing::HasSubstr;
using namespace std::chrono_literals;

TEST(MeasureDevices, EveryOperationOnEveryGroupOnRankZero) {
  const auto nccl = fake_nccl();
  run_in_process(4, 60s, [&](Transport& t) {
    HostStreamDevice device;
    DeviceOperations operations(t, device, nccl, 1024);
    const auto points = measure_network(t, quick_measurement(), operations);
    t.barrier("end");
    expect_all_of_four_ranks(t, points);
  });
}

/// One device takes a while before each operation begins on it: a member that comes late.
class Late final : public HostStreamDevice {
 public:
  explicit Late(std::chrono::nanoseconds delay) : delay_(delay) {}
  void record(kernels::StreamHandle stream, kernels::EventHandle event) override {
    if (delay_ > 0ns) enqueue_host(stream, [this] { std::this_thread::sleep_for(delay_); });
    HostStreamDevice::record(stream, event);
  }

 private:
  std::chrono::nanoseconds delay_;
};

// From the last member's begin to the last one's end: 20 ms between the late one's two events, and
// not the 20 ms more that the other waits for it.
TEST(MeasureDevices, AnOperationBeginsWithItsLastMember) {
  const auto nccl = fake_nccl();
  run_in_process(2, 60s, [&](Transport& t) {
    Late device(t.rank() == 1 ? 20ms : 0ms);
    DeviceOperations operations(t, device, nccl, 256);
    auto options = quick_measurement();
    options.most_bytes = 256;
    for (const NetworkPoint& point : measure_network(t, options, operations)) {
      EXPECT_GE(point.seconds.median, 19.5e-3) << name_of(point.op);
      EXPECT_LE(point.seconds.median, 35e-3) << name_of(point.op);
    }
    t.barrier("end");
  });
}

TEST(MeasureDevices, ARankThatFailsEndsTheOthersMeasuring) {
  const auto nccl = fake_nccl();
  try {
    run_in_process(2, 60s, [&](Transport& t) {
      HostStreamDevice device;
      DeviceOperations operations(t, device, nccl, 256);
      operations.prepare(NcclOp::all_reduce, 2, 256);
      if (t.rank() == 1) throw std::runtime_error("GPU 1 has fallen off the bus");
      operations.run();
    });
    FAIL() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr("GPU 1 has fallen off the bus"));
  }
}

/// Copies take the time that a rate says; its peers are as fast as it is.
class Linked final : public KnownDevice {
 public:
  double link_bytes_per_s = 0;
  std::vector<const kernels::Device*> copied_from;
  void enqueue_copy_from(kernels::StreamHandle, void* to, const kernels::Device& peer,
                         const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
    copied_from.push_back(&peer);
    wait_ns(static_cast<double>(bytes) * 1e9 / link_bytes_per_s);
  }
};

TEST(PeerCopies, AreOfAllPairsAndAsFastAsTheReceiversLink) {
  Linked a;
  Linked b;
  Linked c;
  a.link_bytes_per_s = 100e9;
  b.link_bytes_per_s = 200e9;
  c.link_bytes_per_s = 400e9;
  const std::vector<kernels::Device*> devices{&a, &b, &c};
  const std::vector<PeerCopy> copies = measure_peer_copies(devices, 1 << 20);
  ASSERT_EQ(copies.size(), 6U);
  const double rates[] = {100e9, 200e9, 400e9};
  for (const PeerCopy& copy : copies) {
    EXPECT_NE(copy.from, copy.to);
    EXPECT_NEAR(copy.bytes_per_s, rates[copy.to], 0.01 * rates[copy.to]);
  }
  EXPECT_EQ(std::set<const kernels::Device*>(a.copied_from.begin(), a.copied_from.end()),
            (std::set<const kernels::Device*>{&b, &c}));
  EXPECT_THAT(peer_copy_report(copies), HasSubstr("0 -> 1"));
}

TEST(PeerCopies, OfCpusMoveTheBytes) {
  HostStreamDevice a;
  HostStreamDevice b;
  std::vector<int> from(1000, 7);
  std::vector<int> to(1000, 0);
  b.enqueue_copy_from(b.create_stream(), to.data(), a, from.data(), 4000);
  b.synchronize();
  EXPECT_EQ(to, from);
  const std::vector<kernels::Device*> devices{&a, &b};
  for (const PeerCopy& copy : measure_peer_copies(devices, 1 << 20)) {
    EXPECT_GT(copy.bytes_per_s, 0);
    EXPECT_GT(copy.both_ways_bytes_per_s, 0);
  }
  EXPECT_GT(measure_own_copies(a, 1 << 20), 0);
}

}  // namespace
}  // namespace orrery
