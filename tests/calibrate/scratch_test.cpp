#include "calibrate/scratch.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>

#include "calibrate/device_timer.hpp"
#include "tests/calibrate/known_device.hpp"

namespace orrery {
namespace {

using kernels::Format;
using kernels::Matrix;
using kernels::Scaling;
using Content = Scratch::Content;

constexpr std::int64_t kMega = std::int64_t{1} << 20;

struct Moments {
  double mean = 0;
  double deviation = 0;
};
Moments moments(const std::vector<float>& values) {
  double sum = 0;
  double squares = 0;
  for (const float v : values) {
    sum += static_cast<double>(v);
    squares += static_cast<double>(v) * static_cast<double>(v);
  }
  const auto n = static_cast<double>(values.size());
  return {sum / n, std::sqrt(squares / n - sum / n * (sum / n))};
}

std::vector<float> values_of(const Matrix& m) {
  std::vector<float> values;
  for (std::int64_t i = 0; i < m.rows * m.columns; ++i) {
    if (m.format == Format::fp32) {
      values.push_back(static_cast<const float*>(m.data)[i]);
    } else if (m.format == Format::bf16) {
      values.push_back(kernels::float_of_bf16(static_cast<const std::uint16_t*>(m.data)[i]));
    } else {
      values.push_back(kernels::float_of_e4m3(static_cast<const std::uint8_t*>(m.data)[i]));
    }
  }
  return values;
}

TEST(Scratch, HoldsRandomValuesOfTheKind) {
  KnownDevice device;
  Scratch scratch(device, kMega, 100 * kMega, 1);
  scratch.begin_op();
  for (const Format format : {Format::fp32, Format::bf16}) {
    // 100,000 draws: mean and deviation are known to 1.3 %.
    const Moments a = moments(values_of(scratch.matrix(100, 1000, format, Content::activations)));
    EXPECT_NEAR(a.mean, 0, 0.013);
    EXPECT_NEAR(a.deviation, 1, 0.013);
    const Moments w = moments(values_of(scratch.matrix(100, 1000, format, Content::weights)));
    EXPECT_NEAR(w.deviation, 0.02, 0.02 * 0.013);
  }
  const Matrix q = scratch.matrix(256, 256, Format::e4m3, Content::activations, Scaling::rows);
  const Moments codes = moments(values_of(q));
  EXPECT_NEAR(codes.mean, 0, 3);
  EXPECT_NEAR(codes.deviation, 448 / 2.7, 5);
  for (std::int64_t i = 0; i < kernels::scale_elements(256, 256, Scaling::rows); ++i) {
    EXPECT_GT(q.scales[i], 0);
  }
}

TEST(Scratch, SameSeedSameValues) {
  KnownDevice device;
  const auto first = [&](std::uint64_t seed) {
    Scratch scratch(device, kMega, 100 * kMega, seed);
    return values_of(scratch.matrix(10, 10, Format::fp32, Content::activations));
  };
  EXPECT_EQ(first(1), first(1));
  EXPECT_NE(first(1), first(2));
}

/// [begin, end) of the operands of one slot.
using Pieces = std::vector<std::pair<const std::byte*, const std::byte*>>;

void expect_apart(const Pieces& a, const Pieces& b, bool same) {
  for (std::size_t i = 0; i < a.size(); ++i) {
    for (std::size_t j = same ? i + 1 : 0; j < b.size(); ++j) {
      EXPECT_TRUE(a[i].second <= b[j].first || b[j].second <= a[i].first) << i << " " << j;
    }
  }
}

TEST(Scratch, OperandsOfASlotNeverOverlapWhateverTheirSizes) {
  KnownDevice device;
  device.copies = false;
  Scratch scratch(device, 4 * kMega, 4000 * kMega, 1);
  std::mt19937_64 random(5);
  for (int op = 0; op < 30; ++op) {
    scratch.begin_op();
    for (int slot = 0; slot < 4; ++slot) {
      scratch.begin_slot();
      Pieces pieces;
      std::int64_t bytes = 0;
      for (int i = 0; i < 5; ++i) {
        const auto count = static_cast<std::int64_t>(
            std::exp(std::uniform_real_distribution<double>(3, 16)(random)));
        const auto content = static_cast<Content>(std::uniform_int_distribution<int>(0, 4)(random));
        const auto* begin = reinterpret_cast<const std::byte*>(scratch.floats(count, content));
        pieces.emplace_back(begin, begin + 4 * count);
        bytes += 4 * count;
      }
      expect_apart(pieces, pieces, true);
      EXPECT_GE(scratch.slot_bytes(), bytes);
      EXPECT_LE(scratch.slot_bytes(), bytes + 5 * 256);
      for (const auto& [begin, end] : pieces) {
        bool inside = false;
        for (const auto& [memory, size] : device.allocated) {
          const auto* m = static_cast<const std::byte*>(memory);
          inside = inside || (begin >= m && end <= m + size);
        }
        EXPECT_TRUE(inside);
      }
    }
  }
}

TEST(Scratch, SlotsTakeTurnsThroughTheWholeRotation) {
  KnownDevice device;
  Scratch scratch(device, 4 * kMega, 100 * kMega, 1);
  scratch.begin_op();
  // 1 MB each: four of them before the first comes again.
  std::vector<float*> seen;
  for (int i = 0; i < 8; ++i) {
    scratch.begin_slot();
    seen.push_back(scratch.floats(kMega / 4, Content::activations));
  }
  EXPECT_EQ(std::set<float*>(seen.begin(), seen.begin() + 4).size(), 4u);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(seen[i], seen[i + 4]);
}

TEST(Scratch, EqualConstantsAreOne) {
  KnownDevice device;
  Scratch scratch(device, kMega, 100 * kMega, 1);
  scratch.begin_op();
  const std::int32_t* a = scratch.indices({1, 2, 3});
  EXPECT_EQ(scratch.indices({1, 2, 3}), a);
  EXPECT_NE(scratch.indices({1, 2, 4}), a);
  EXPECT_EQ(a[2], 3);
  const std::size_t allocated = device.allocated.size();
  scratch.begin_op();
  EXPECT_EQ(device.allocated.size(), allocated - 2);
}

TEST(Scratch, StopsAtItsLimitAndGivesEverythingBack) {
  KnownDevice device;
  {
    Scratch scratch(device, kMega, 10 * kMega, 1);
    scratch.begin_op();
    EXPECT_NO_THROW(scratch.bytes(8 * kMega));
    EXPECT_THROW(scratch.floats(kMega, Content::activations), std::bad_alloc);
    scratch.clear();
    EXPECT_EQ(device.allocated_bytes, 0u);
    EXPECT_NO_THROW(scratch.floats(kMega, Content::activations));
  }
  EXPECT_EQ(device.allocated_bytes, 0u);
}

kernels::Call fill(Scratch& scratch, std::int64_t bytes) {
  return kernels::Fill{.data = scratch.bytes(bytes), .bytes = bytes};
}

TEST(DeviceTimer, TimesFromBeginToBeginOnSlotsInTurn) {
  KnownDevice device;
  Scratch scratch(device, kMega, 100 * kMega, 1);
  std::vector<OpCalls> slots;
  for (int i = 0; i < 3; ++i) {
    scratch.begin_slot();
    slots.push_back({fill(scratch, 1000 * (i + 1)), fill(scratch, 64)});
  }
  std::vector<const void*> touched;
  device.seen = [&](const kernels::Call& call) {
    touched.push_back(std::get<kernels::Fill>(call).data);
  };
  DeviceTimer timer(device, make_timing_stream(device), slots, 0, {fill(scratch, 4)}, false);
  const auto s = [&](std::size_t slot) {
    return device.seconds_of(slots[slot][0], 0) + device.seconds_of(slots[slot][1], 0);
  };
  EXPECT_NEAR(timer.run(4), 2 * s(0) + s(1) + s(2), 2e-9);
  EXPECT_NEAR(timer.run(1), s(1), 2e-9);
  ASSERT_EQ(touched.size(), 10u);
  EXPECT_EQ(touched[6], touched[0]);
  EXPECT_EQ(touched[8], touched[2]);
  EXPECT_EQ(device.flushes, 0u);
  EXPECT_NEAR(timer.reference(), device.launch_s, 2e-9);
}

TEST(DeviceTimer, FlushesBeforeASampleAndNotWithinIt) {
  KnownDevice device;
  Scratch scratch(device, kMega, 100 * kMega, 1);
  const OpCalls op{fill(scratch, 1 << 16)};
  DeviceTimer timer(device, make_timing_stream(device), {op}, 4, op, true);
  EXPECT_NEAR(timer.run(5), 5 * device.seconds_of(op[0], 4), 2e-9);
  EXPECT_EQ(device.flushes, 1u);
}

TEST(DeviceTimer, PlaysRecordedSamplesWithoutTheHostsTime) {
  KnownDevice device;
  device.enqueue_s = 50e-6;
  Scratch scratch(device, kMega, 100 * kMega, 1);
  std::vector<OpCalls> slots;
  for (int i = 0; i < 4; ++i) {
    scratch.begin_slot();
    slots.push_back({fill(scratch, 1000 * (i + 1))});
  }
  double four = 0;
  for (const OpCalls& slot : slots) four += device.seconds_of(slot[0], 0);
  {
    DeviceTimer eager(device, make_timing_stream(device), slots, 0, slots[0], true);
    EXPECT_NEAR(eager.run(4), four + 4 * 50e-6, 2e-9);
  }
  device.has_recorder = true;
  DeviceTimer played(device, make_timing_stream(device), slots, 0, slots[0], true);
  EXPECT_NEAR(played.run(4), four, 2e-9);
  EXPECT_NEAR(played.run(4), four, 2e-9);
  EXPECT_NEAR(played.run(8), 2 * four, 2e-9);
}

}  // namespace
}  // namespace orrery
