#include "reports/html/packed.hpp"

#include <gtest/gtest.h>
#include <zlib.h>

#include <limits>
#include <vector>

#include "unpacked.hpp"

namespace orrery {
namespace {

TEST(Base64, IsTheOneOfRfc4648) {
  // Section 10.
  EXPECT_EQ(base64(""), "");
  EXPECT_EQ(base64("f"), "Zg==");
  EXPECT_EQ(base64("fo"), "Zm8=");
  EXPECT_EQ(base64("foo"), "Zm9v");
  EXPECT_EQ(base64("foob"), "Zm9vYg==");
  EXPECT_EQ(base64("fooba"), "Zm9vYmE=");
  EXPECT_EQ(base64("foobar"), "Zm9vYmFy");
  EXPECT_EQ(base64("\xff\xfe\xfd"), "//79");
}

TEST(PackedColumn, HoldsWhatWasPushed) {
  const std::vector<std::int64_t> values = {0,
                                            -1,
                                            1,
                                            63,
                                            -64,
                                            64,
                                            1'753'800'000,
                                            -5,
                                            std::numeric_limits<std::int64_t>::max(),
                                            std::numeric_limits<std::int64_t>::min()};
  PackedColumn column;
  for (const std::int64_t value : values) column.push(value);
  // Protocol Buffers' zigzag and varint examples: -1 is 1, 1 is 2, 150 of an unsigned is 96 01.
  EXPECT_EQ(column.bytes().substr(0, 5), std::string("\x00\x01\x02\x7e\x7f", 5));
  EXPECT_EQ(test::unpacked(column.text()), values);
}

TEST(PackedColumn, OfEqualNeighboursIsSmall) {
  PackedColumn column;
  for (int i = 0; i < 100'000; ++i) column.push(123'456);
  EXPECT_LT(column.text().size(), 2000u);
  EXPECT_EQ(test::unpacked(column.text()).size(), 100'000u);
}

TEST(PackedColumn, HasTheSameBytesEveryTime) {
  const auto text = [] {
    PackedColumn column;
    for (int i = 0; i < 1000; ++i) column.push(i * i % 97);
    return column.text();
  };
  EXPECT_EQ(text(), text());
  // A gzip header without a time and a name: RFC 1952.
  EXPECT_EQ(gzip("x").substr(0, 8), std::string("\x1f\x8b\x08\x00\x00\x00\x00\x00", 8));
}

}  // namespace
}  // namespace orrery
