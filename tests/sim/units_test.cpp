#include "sim/units.hpp"

#include <gtest/gtest.h>
#include <rapidcheck.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <string>

namespace orrery {
namespace {

std::string why_not(std::string_view text, Dimension dimension) {
  std::string why;
  EXPECT_FALSE(parse_quantity(text, dimension, &why)) << text;
  return why;
}

TEST(Quantity, ReadsBytesBitsDecimalAndBinary) {
  EXPECT_EQ(parse_quantity("80 GiB", Dimension::bytes), 85'899'345'920.0);  // 80 * 2^30
  EXPECT_EQ(parse_quantity("80 GB", Dimension::bytes), 80e9);
  EXPECT_EQ(parse_quantity("1 KiB", Dimension::bytes), 1024.0);
  EXPECT_EQ(parse_quantity("1 kB", Dimension::bytes), 1000.0);
  EXPECT_EQ(parse_quantity("8 Mb", Dimension::bytes), 1e6);
  EXPECT_EQ(parse_quantity("1EB", Dimension::bytes), 1e18);  // a unit, not an exponent
  EXPECT_EQ(parse_quantity("2E3B", Dimension::bytes), 2000.0);
  EXPECT_EQ(parse_quantity("4_096", Dimension::bytes), 4096.0);
}

TEST(Quantity, ReadsRates) {
  // NDR InfiniBand: 400 Gb/s is 50 GB/s.
  EXPECT_EQ(parse_quantity("400 Gb/s", Dimension::bytes_per_s), 50e9);
  EXPECT_EQ(parse_quantity("400Gbps", Dimension::bytes_per_s), 50e9);
  EXPECT_EQ(parse_quantity("400 GBps", Dimension::bytes_per_s), 400e9);
  EXPECT_EQ(parse_quantity("3.35TB/s", Dimension::bytes_per_s), 3.35e12);  // rounded once
  EXPECT_EQ(parse_quantity("1 GiB/s", Dimension::bytes_per_s), 1'073'741'824.0);
  EXPECT_EQ(parse_quantity("989.5 TFLOPS", Dimension::flops_per_s), 989.5e12);
  EXPECT_EQ(parse_quantity("1.979 PFLOP/s", Dimension::flops_per_s), 1.979e15);
}

TEST(Quantity, ReadsTimesFrequenciesPowerMoneyShares) {
  EXPECT_EQ(parse_quantity("2 us", Dimension::seconds), 2e-6);
  EXPECT_EQ(parse_quantity("2 \xC2\xB5s", Dimension::seconds), 2e-6);
  EXPECT_EQ(parse_quantity("2 \xCE\xBCs", Dimension::seconds), 2e-6);
  EXPECT_EQ(parse_quantity("0.7ns", Dimension::seconds), 0.7e-9);
  EXPECT_EQ(parse_quantity("25 ms", Dimension::seconds), 0.025);
  EXPECT_EQ(parse_quantity("3 ps", Dimension::seconds), 3e-12);
  EXPECT_EQ(parse_quantity("1.5 s", Dimension::seconds), 1.5);
  EXPECT_EQ(parse_quantity("2 min", Dimension::seconds), 120.0);
  EXPECT_EQ(parse_quantity("2 h", Dimension::seconds), 7200.0);
  EXPECT_EQ(parse_quantity("2 days", Dimension::seconds), 172'800.0);
  EXPECT_EQ(parse_quantity("1830 MHz", Dimension::hertz), 1.83e9);
  EXPECT_EQ(parse_quantity("1.83GHz", Dimension::hertz), 1.83e9);
  EXPECT_EQ(parse_quantity("700 W", Dimension::watts), 700.0);
  EXPECT_EQ(parse_quantity("10.2 kW", Dimension::watts), 10'200.0);
  EXPECT_EQ(parse_quantity("2 USD", Dimension::dollars), 2.0);
  EXPECT_EQ(parse_quantity("2.5 $", Dimension::dollars), 2.5);
  EXPECT_EQ(parse_quantity("$2.5", Dimension::dollars), 2.5);
  EXPECT_EQ(parse_quantity("15 %", Dimension::scalar), 0.15);
  EXPECT_EQ(parse_quantity(" 1e3 ", Dimension::scalar), 1000.0);
}

TEST(Quantity, SaysWhatIsWrong) {
  EXPECT_EQ(why_not("400 GB", Dimension::bytes_per_s), "'GB' measures bytes");
  EXPECT_EQ(why_not("400 GB/s", Dimension::bytes), "'GB/s' measures bytes per second");
  EXPECT_EQ(why_not("3 s", Dimension::bytes), "'s' measures time");
  EXPECT_EQ(why_not("3 GHz", Dimension::seconds), "'GHz' measures frequency");
  EXPECT_EQ(why_not("3 %", Dimension::seconds), "'%' measures a share");
  EXPECT_EQ(why_not("400 gb/s", Dimension::bytes_per_s),
            "unknown unit 'gb/s'; units: B/s, MB/s, GB/s, TB/s, GiB/s; Gb/s and Gbps are bits");
  EXPECT_EQ(why_not("3 sec", Dimension::seconds),
            "unknown unit 'sec'; units: ps, ns, us, ms, s, min, h, days");
  EXPECT_EQ(why_not("10 TFLOPs", Dimension::flops_per_s),
            "unknown unit 'TFLOPs'; units: FLOP/s, GFLOP/s, TFLOP/s, PFLOP/s");
  EXPECT_EQ(why_not("3 XiB", Dimension::bytes),
            "unknown unit 'XiB'; units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB; Gb is bits");
  EXPECT_EQ(why_not("$2 USD", Dimension::dollars), "unknown unit '$ USD'; units: USD, $");
  EXPECT_EQ(why_not("fast", Dimension::hertz), "no number at the start");
  EXPECT_EQ(why_not("", Dimension::hertz), "no number at the start");
  EXPECT_EQ(why_not("-", Dimension::hertz), "no number at the start");
  EXPECT_EQ(why_not("1e999 B", Dimension::bytes), "the number is too large");
  EXPECT_EQ(why_not("1e308 GB", Dimension::bytes), "the number is too large");
  EXPECT_EQ(why_not("1e308 KiB", Dimension::bytes), "the number is too large");
  EXPECT_EQ(why_not("1e-999 s", Dimension::seconds), "the number is too small");
  EXPECT_EQ(why_not("0x10 B", Dimension::bytes),
            "write the number in decimal; hexadecimal, octal and binary are not read");
  EXPECT_EQ(why_not("010 GB", Dimension::bytes),
            "a leading zero is not accepted (is it octal?); write 10");
}

TEST(Number, ReadsPlainDecimal) {
  EXPECT_EQ(parse_number("-0.5"), -0.5);
  EXPECT_EQ(parse_number("+.5"), 0.5);
  EXPECT_EQ(parse_number("1e-06"), 1e-6);
  EXPECT_EQ(parse_number("671_000.5"), 671000.5);
  EXPECT_EQ(parse_number("0"), 0.0);
  EXPECT_EQ(parse_number("0e5"), 0.0);
  EXPECT_EQ(parse_number("5."), 5.0);
  EXPECT_EQ(parse_whole_number("15e3"), 15000);
  EXPECT_EQ(parse_whole_number("1.5e3"), 1500);
  EXPECT_EQ(parse_whole_number("4_096"), 4096);
  EXPECT_EQ(parse_whole_number("12000e-3"), 12);
  EXPECT_EQ(parse_whole_number("-0"), 0);
  // Beyond 2^53: a reader that goes through double gives ...992 here.
  EXPECT_EQ(parse_whole_number("9007199254740993"), 9007199254740993);
  EXPECT_EQ(parse_whole_number("9223372036854775807"), std::numeric_limits<std::int64_t>::max());
  EXPECT_EQ(parse_whole_number("-9223372036854775808"), std::numeric_limits<std::int64_t>::min());
}

TEST(Number, RefusesWhatReadersDisagreeAbout) {
  for (const char* text :
       {"",    " ",    "-",   ".",  "e3",   "1 2",  "1,5",  "1e",  "1e+", "12 ",
        "abc", "--1",  "010", "00", "-07",  "0x1F", "0o17", "0b1", "inf", "-.inf",
        "NaN", ".nan", "_1",  "1_", "1__0", "1_.5", "1._5", "1:30"}) {
    EXPECT_FALSE(parse_number(text)) << text;
    EXPECT_FALSE(parse_whole_number(text)) << text;
  }
  for (const char* text : {"1.5", "15e-1", "1e19", "9223372036854775808", "1e999999999999"}) {
    EXPECT_FALSE(parse_whole_number(text)) << text;
  }
  std::string why;
  EXPECT_FALSE(parse_number("nan", &why));
  EXPECT_EQ(why, "infinity and nan are not accepted; write a finite number");
  EXPECT_FALSE(parse_number("1__0", &why));
  EXPECT_EQ(why, "an underscore may stand only between two digits");
  EXPECT_FALSE(parse_whole_number("1e30", &why));
  EXPECT_EQ(why, "the number is too large");
}

TEST(Number, ReadsBackWhatTheStandardLibraryWrites) {
  EXPECT_TRUE(rc::check("whole numbers", [](std::int64_t n) {
    RC_ASSERT(parse_whole_number(std::to_string(n)) == std::optional<std::int64_t>(n));
  }));
  EXPECT_TRUE(rc::check("doubles with the 17 digits that identify them", [] {
    const auto mantissa = *rc::gen::arbitrary<std::int64_t>();
    const int exponent = *rc::gen::inRange(-900, 900);
    const double value = std::ldexp(static_cast<double>(mantissa), exponent);
    char text[64];
    std::snprintf(text, sizeof text, "%.17g", value);
    RC_ASSERT(parse_number(text) == std::optional<double>(value));
  }));
}

TEST(Format, ShowsThreeSignificantDigits) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(999), "999 B");
  EXPECT_EQ(format_bytes(999.6), "1.00 kB");
  EXPECT_EQ(format_bytes(12'345'000'000.0), "12.3 GB");
  EXPECT_EQ(format_bytes(999'500.0), "1.00 MB");
  EXPECT_EQ(format_bytes(999'499.0), "999 kB");
  EXPECT_EQ(format_bytes(-2.5e12), "-2.50 TB");
  EXPECT_EQ(format_seconds(0), "0 s");
  EXPECT_EQ(format_seconds(1.5e-3), "1.50 ms");
  EXPECT_EQ(format_seconds(19.94), "19.9 s");
  EXPECT_EQ(format_seconds(0.99951), "1.00 s");
  EXPECT_EQ(format_seconds(2e-6), "2.00 us");
  EXPECT_EQ(format_seconds(999.6e-9), "1.00 us");
  EXPECT_EQ(format_seconds(3e-12), "3.00 ps");
  EXPECT_EQ(format_seconds(119), "119 s");
  EXPECT_EQ(format_seconds(1200), "20.0 min");
  EXPECT_EQ(format_seconds(10 * 3600), "10.0 h");
  EXPECT_EQ(format_seconds(56.5 * 86400), "56.5 days");
}

}  // namespace
}  // namespace orrery
