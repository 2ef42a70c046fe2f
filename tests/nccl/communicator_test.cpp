// Communicators against the same operations written out here, on devices that are CPUs.

#include "kernels/communicator.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>
#include <numeric>
#include <thread>

#include "calibrate/transport/open_communicator.hpp"
#include "kernels/format.hpp"
#include "tests/nccl/fake.hpp"
#include "tests/nccl/host_stream_device.hpp"

namespace orrery {
namespace {

using kernels::Communicator;
using kernels::ElementType;
using kernels::Piece;
using testing::HasSubstr;
using namespace std::chrono_literals;

/// One rank of some, with a device and a communicator of all.
struct Member {
  Transport& transport;
  HostStreamDevice device{1};
  kernels::StreamHandle stream = device.create_stream();
  std::unique_ptr<Communicator> all;
};

void run_members(int ranks, const std::function<void(Member&)>& body) {
  const auto nccl = fake_nccl();
  std::vector<int> members(static_cast<std::size_t>(ranks));
  std::iota(members.begin(), members.end(), 0);
  run_in_process(ranks, 30s, [&](Transport& transport) {
    Member member{.transport = transport};
    member.all = open_communicator(transport, nccl, member.device, member.stream, members, 1, 4,
                                   "test", [&] { transport.check(members, "test"); });
    body(member);
    member.device.synchronize();
    if (member.all) member.all->check();
    transport.barrier("end");
  });
}

/// A value for each rank and element: small integers, so that all sums are exact in any format.
float value(int rank, std::size_t i) {
  return static_cast<float>((static_cast<std::size_t>(rank) * 7 + i * 3) % 11) - 5;
}

float sum_at(int ranks, std::size_t i) {
  float sum = 0;
  for (int r = 0; r < ranks; ++r) sum += value(r, i);
  return sum;
}

class Members : public testing::TestWithParam<int> {};

TEST_P(Members, AllHaveTheSumOfAll) {
  run_members(GetParam(), [](Member& m) {
    const int ranks = m.transport.ranks();
    for (const std::size_t elements : {std::size_t{0}, std::size_t{1}, std::size_t{50'001}}) {
      std::vector<float> floats(elements);
      std::vector<double> doubles(elements);
      std::vector<std::uint16_t> halves(elements);
      for (std::size_t i = 0; i < elements; ++i) {
        floats[i] = value(m.transport.rank(), i);
        doubles[i] = std::ldexp(double{value(m.transport.rank(), i)}, -1000);  // no float holds it
        halves[i] = kernels::bf16_of(floats[i]);
      }
      m.all->all_reduce(ElementType::fp32, floats.data(), elements);
      m.all->all_reduce(ElementType::fp64, doubles.data(), elements);
      m.all->all_reduce(ElementType::bf16, halves.data(), elements);
      m.device.synchronize();
      for (std::size_t i = 0; i < elements; ++i) {
        ASSERT_EQ(floats[i], sum_at(ranks, i)) << i;
        ASSERT_EQ(doubles[i], std::ldexp(double{sum_at(ranks, i)}, -1000)) << i;
        ASSERT_EQ(kernels::float_of_bf16(halves[i]), sum_at(ranks, i)) << i;
      }
    }
  });
}

TEST_P(Members, HaveTheirPartOfTheSumAndGatherAllParts) {
  run_members(GetParam(), [](Member& m) {
    const auto ranks = static_cast<std::size_t>(m.transport.ranks());
    const auto rank = static_cast<std::size_t>(m.transport.rank());
    constexpr std::size_t kPart = 20'011;
    for (const bool in_place : {false, true}) {
      std::vector<float> whole(kPart * ranks);
      for (std::size_t i = 0; i < whole.size(); ++i) whole[i] = value(m.transport.rank(), i);
      std::vector<float> apart(kPart);
      float* const own = in_place ? whole.data() + rank * kPart : apart.data();
      m.all->reduce_scatter(ElementType::fp32, whole.data(), own, kPart);
      m.device.synchronize();
      for (std::size_t i = 0; i < kPart; ++i) {
        ASSERT_EQ(own[i], sum_at(m.transport.ranks(), rank * kPart + i)) << i;
      }
      m.all->all_gather(own, whole.data(), kPart * sizeof(float));
      m.device.synchronize();
      for (std::size_t i = 0; i < whole.size(); ++i) {
        ASSERT_EQ(whole[i], sum_at(m.transport.ranks(), i)) << i;
      }
    }
  });
}

/// Bytes from one member to another: some of them nothing, some more than a mailbox holds.
std::size_t bytes_between(int from, int to) {
  return static_cast<std::size_t>((from * 5 + to * 3) % 4) * 20'001;
}
std::byte byte_between(int from, int to, std::size_t i) {
  return static_cast<std::byte>(static_cast<std::size_t>(from * 16 + to) + i / 1000);
}

TEST_P(Members, ExchangePiecesOfAnySizesTwicePerPairAndWithThemselves) {
  run_members(GetParam(), [](Member& m) {
    const int self = m.transport.rank();
    std::vector<std::vector<std::byte>> sent;
    std::vector<std::vector<std::byte>> received;
    std::vector<Piece> to;
    std::vector<Piece> from;
    for (int other = 0; other < m.transport.ranks(); ++other) {
      for (const std::size_t first : {std::size_t{0}, std::size_t{7}}) {
        sent.emplace_back(bytes_between(self, other) + first);
        for (std::size_t i = 0; i < sent.back().size(); ++i) {
          sent.back()[i] = byte_between(self, other, first + i);
        }
        received.emplace_back(bytes_between(other, self) + first);
      }
    }
    for (std::size_t i = 0; i < sent.size(); ++i) {
      to.push_back({static_cast<int>(i / 2), sent[i].data(), sent[i].size()});
      from.push_back({static_cast<int>(i / 2), received[i].data(), received[i].size()});
    }
    m.all->exchange(to, from);
    m.device.synchronize();
    for (std::size_t k = 0; k < received.size(); ++k) {
      const std::size_t first = k % 2 == 0 ? 0 : 7;
      for (std::size_t i = 0; i < received[k].size(); ++i) {
        ASSERT_EQ(received[k][i], byte_between(static_cast<int>(k / 2), self, first + i));
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Fake, Members, testing::Values(1, 2, 3, 4));

// What a stream does before and after is in order with it.
TEST(Communicators, WorkInTheOrderOfTheirStream) {
  run_members(2, [](Member& m) {
    float term = 0;
    m.device.enqueue_host(m.stream, [&] {
      std::this_thread::sleep_for(5ms);
      term = static_cast<float>(m.transport.rank() + 1);
    });
    m.all->all_reduce(ElementType::fp32, &term, 1);
    float seen = 0;
    m.device.enqueue_host(m.stream, [&] { seen = term; });
    m.device.synchronize();
    EXPECT_EQ(seen, 3);
  });
}

TEST(Communicators, MembersThatCallDifferentThingsGetAnError) {
  const auto run = [] {
    run_members(2, [](Member& m) {
      std::vector<float> buffer(64);
      const std::size_t elements = m.transport.rank() == 0 ? 64 : 32;
      m.all->all_reduce(ElementType::fp32, buffer.data(), elements);
      m.device.synchronize();
      m.all->check();
    });
  };
  try {
    run();
    FAIL() << "no error";
  } catch (const std::runtime_error& error) {
    EXPECT_THAT(error.what(), HasSubstr("do different things"));
  }
}

TEST(Communicators, WhoAbortsLetsTheOthersGo) {
  run_members(2, [](Member& m) {
    if (m.transport.rank() == 0) {
      float value = 1;
      m.all->all_reduce(ElementType::fp32, &value, 1);
      m.transport.barrier("enqueued");
      m.device.synchronize();
      EXPECT_THROW(m.all->check(), std::runtime_error);
    } else {
      m.transport.barrier("enqueued");
    }
    m.all->abort();
    m.all = nullptr;
  });
}

TEST(Communicators, AMemberThatDoesNotComeIsWaitedForOnlyAsLongAsTheCallerLooks) {
  const auto nccl = fake_nccl();
  HostStreamDevice device;
  const kernels::StreamHandle stream = device.create_stream();
  int looked = 0;
  kernels::CommunicatorOptions options{
      .id = nccl->make_id(), .member = 0, .members = 2, .max_ctas = 1, .while_waiting = [&] {
        if (++looked == 20) throw std::runtime_error("enough");
      }};
  EXPECT_THROW(Communicator(nccl, device, stream, options), std::runtime_error);
  EXPECT_EQ(looked, 20);
}

TEST(Communicators, ADeviceWithoutStreamsOfCudaHasNone) {
  const auto nccl = fake_nccl();
  const auto device = kernels::open_cpu_device(1);
  EXPECT_THROW(Communicator(nccl, *device, device->create_stream(), {.id = nccl->make_id()}),
               std::runtime_error);
}

TEST(NcclLibrary, SaysWhichFileCannotBeLoadedOrIsNone) {
  const auto why = [](const char* file) {
    setenv("ORRERY_NCCL_LIBRARY", file, 1);
    const auto loaded = kernels::Nccl::load();
    const auto* text = std::get_if<std::string>(&loaded);
    return text == nullptr ? "" : *text;
  };
  EXPECT_THAT(why("/nowhere/libnccl.so.2"),
              HasSubstr("cannot load NCCL: /nowhere/libnccl.so.2: cannot open shared object"));
  EXPECT_EQ(why("libm.so.6"), "libm.so.6 is no NCCL; 2.18 or later is needed");
  EXPECT_EQ(fake_nccl()->name(), "NCCL 2.28.9");
}

TEST(Gpus, OneForEachRankOfAMachine) {
  EXPECT_EQ(gpu_of({.index = 3, .ranks = 8}, 8), 3);
  EXPECT_EQ(gpu_of({.index = 1, .ranks = 2}, 8), 1);
  EXPECT_EQ(gpu_of({.index = 5, .ranks = 8}, 1), 0);  // the launcher gave each its own
  EXPECT_THROW(gpu_of({.index = 0, .ranks = 8}, 4), std::runtime_error);
  run_in_process(3, 30s, [](Transport& t) {
    const LocalPlace place = local_place(t);
    EXPECT_EQ(place.index, t.rank());
    EXPECT_EQ(place.ranks, 3);
  });
}

}  // namespace
}  // namespace orrery
