// Two GPUs of this machine and NCCL between them. Each test skips itself, with the reason, where
// there are fewer or there is no NCCL.

#include <gtest/gtest.h>

#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <variant>
#include <vector>

#include "kernels/communicator.hpp"
#include "kernels/device.hpp"

namespace orrery::kernels {
namespace {

using namespace std::chrono_literals;

constexpr int kGpus = 2;

class Peers : public testing::Test {
 protected:
  void SetUp() override {
    auto loaded = Nccl::load();
    if (auto* why = std::get_if<std::string>(&loaded)) GTEST_SKIP() << *why;
    nccl_ = std::get<0>(loaded);
    if (const int gpus = count_cuda_devices(); gpus < kGpus) GTEST_SKIP() << gpus << " GPUs";
    for (int gpu = 0; gpu < kGpus; ++gpu) {
      auto opened = open_cuda_device(gpu);
      if (auto* why = std::get_if<std::string>(&opened)) GTEST_SKIP() << *why;
      devices_.push_back(std::move(std::get<0>(opened)));
    }
  }

  /// A thread for each GPU, with a communicator of both; what a thread throws fails the test.
  template <class Body>
  void on_both(const Body& body) {
    const Nccl::Id id = nccl_->make_id();
    std::mutex mutex;
    std::string error;
    std::vector<std::thread> threads;
    for (int member = 0; member < kGpus; ++member) {
      threads.emplace_back([&, member] {
        try {
          Device& device = *devices_[static_cast<std::size_t>(member)];
          const StreamHandle stream = device.create_stream();
          const auto until = std::chrono::steady_clock::now() + 60s;
          Communicator both(nccl_, device, stream,
                            {.id = id,
                             .member = member,
                             .members = kGpus,
                             .max_ctas = 8,
                             .while_waiting = [until] {
                               if (std::chrono::steady_clock::now() < until) return;
                               throw std::runtime_error("NCCL is not ready within a minute");
                             }});
          body(member, device, stream, both);
          device.synchronize();
        } catch (const std::exception& e) {
          const std::lock_guard lock(mutex);
          error += e.what();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(error, "");
  }

  std::shared_ptr<const Nccl> nccl_;
  std::vector<std::unique_ptr<Device>> devices_;
};

/// A device's memory with these values, until the end.
class OnDevice {
 public:
  OnDevice(Device& device, const std::vector<float>& values)
      : device_(device), count_(values.size()), data_(device.allocate(bytes())) {
    device_.upload(data_, values.data(), bytes());
  }
  ~OnDevice() { device_.release(data_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;
  float* data() const { return static_cast<float*>(data_); }
  std::vector<float> values() const {
    std::vector<float> values(count_);
    device_.download(values.data(), data_, bytes());
    return values;
  }

 private:
  std::size_t bytes() const { return count_ * sizeof(float); }
  Device& device_;
  std::size_t count_;
  void* data_;
};

std::vector<float> numbers(int member, std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    values[i] = static_cast<float>((i * 3 + static_cast<std::size_t>(member) * 7) % 1000);
  }
  return values;
}

TEST_F(Peers, CopyFromEachOther) {
  constexpr std::size_t kCount = 3'000'001;
  const OnDevice from(*devices_[0], numbers(0, kCount));
  const OnDevice to(*devices_[1], numbers(1, kCount));
  const StreamHandle stream = devices_[1]->create_stream();
  devices_[1]->enqueue_copy_from(stream, to.data(), *devices_[0], from.data(),
                                 kCount * sizeof(float));
  devices_[1]->synchronize();
  EXPECT_EQ(to.values(), numbers(0, kCount));
}

TEST_F(Peers, SumGatherAndExchange) {
  constexpr std::size_t kCount = 1'000'000;
  on_both([&](int member, Device& device, StreamHandle, Communicator& both) {
    std::vector<float> sum = numbers(0, kCount);
    const std::vector<float> other = numbers(1, kCount);
    for (std::size_t i = 0; i < kCount; ++i) sum[i] += other[i];

    const OnDevice buffer(device, numbers(member, kCount));
    both.all_reduce(ElementType::fp32, buffer.data(), kCount);
    device.synchronize();
    EXPECT_EQ(buffer.values(), sum);

    // A part of the sum, and back to all.
    const OnDevice whole(device, numbers(member, kCount));
    float* const own = whole.data() + static_cast<std::size_t>(member) * kCount / 2;
    both.reduce_scatter(ElementType::fp32, whole.data(), own, kCount / 2);
    both.all_gather(own, whole.data(), kCount / 2 * sizeof(float));
    device.synchronize();
    EXPECT_EQ(whole.values(), sum);

    // Uneven, and to itself: member 0 keeps 1000 and sends 500'000, member 1 sends 7 and keeps
    // none.
    const auto bytes = [](int from, int to) -> std::size_t {
      constexpr std::size_t kElements[kGpus][kGpus] = {{1000, 500'000}, {7, 0}};
      return kElements[from][to] * sizeof(float);
    };
    const OnDevice sent(device, numbers(member, kCount));
    const OnDevice received(device, std::vector<float>(kCount));
    std::vector<Piece> to;
    std::vector<Piece> from;
    std::vector<float> expected;
    for (int peer = 0; peer < kGpus; ++peer) {
      const std::size_t offset = peer == 0 ? 0 : bytes(member, 0) / sizeof(float);
      to.push_back({peer, sent.data() + offset, bytes(member, peer)});
      from.push_back({peer, received.data() + expected.size(), bytes(peer, member)});
      const std::vector<float> theirs = numbers(peer, kCount);
      const std::size_t first = member == 0 ? 0 : bytes(peer, 0) / sizeof(float);
      for (std::size_t i = 0; i < bytes(peer, member) / sizeof(float); ++i) {
        expected.push_back(theirs[first + i]);
      }
    }
    both.exchange(to, from);
    device.synchronize();
    std::vector<float> got = received.values();
    got.resize(expected.size());
    EXPECT_EQ(got, expected);
  });
}

// The host learns of it by asking, never by waiting.
TEST_F(Peers, AMemberThatDoesNotComeIsLetGo) {
  on_both([&](int member, Device& device, StreamHandle stream, Communicator& both) {
    const OnDevice buffer(device, numbers(member, 1000));
    both.all_reduce(ElementType::fp32, buffer.data(), 1000);
    device.synchronize();
    if (member == 1) return std::this_thread::sleep_for(500ms);
    const EventHandle end = device.create_event();
    both.all_reduce(ElementType::fp32, buffer.data(), 1000);
    device.record(stream, end);
    std::this_thread::sleep_for(200ms);
    EXPECT_FALSE(device.reached(end));
    both.abort();
    device.synchronize();
  });
}

}  // namespace
}  // namespace orrery::kernels
