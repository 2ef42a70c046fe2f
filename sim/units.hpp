#pragma once
// Units. Inside the program every quantity is SI: seconds as int64 picoseconds, bytes, FLOP,
// bytes/s. Words with units ("400 GB/s", "80 GiB") exist only in files, and are read by
// parse_quantity.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace orrery {

using Picoseconds = std::int64_t;

inline constexpr Picoseconds kPsPerNs = 1'000;
inline constexpr Picoseconds kPsPerUs = 1'000'000;
inline constexpr Picoseconds kPsPerMs = 1'000'000'000;
inline constexpr Picoseconds kPsPerS = 1'000'000'000'000;

constexpr double seconds(Picoseconds t) {
  return static_cast<double>(t) / 1e12;
}
constexpr double milliseconds(Picoseconds t) {
  return static_cast<double>(t) / 1e9;
}

/// Rounds half up; the caller guarantees 0 <= s < 9.2e6 seconds.
constexpr Picoseconds from_seconds(double s) {
  // std::llround is not constexpr, and the argument is never negative.
  return static_cast<Picoseconds>(s * 1e12 + 0.5);  // NOLINT(bugprone-incorrect-roundings)
}

/// The dimension a quantity in a file must have.
enum class Dimension { scalar, bytes, bytes_per_s, flops_per_s, seconds, hertz, watts, dollars };

/// Parses "80 GiB", "400 GB/s", "3.35TB/s", "400 Gb/s" (bits), "2 us", "1830 MHz", "1e3", "4_096",
/// "15 %" (scalar only: 0.15) into SI units, rounded once. K/M/G/T/P are decimal, Ki/Mi/Gi/Ti
/// binary; 'b' is bits, 'B' bytes. A bare number is taken in the SI unit. Returns nullopt where the
/// text is no number, has an unknown unit or one of another dimension; `why` (if given) then says
/// which, in words for the user.
std::optional<double> parse_quantity(std::string_view text, Dimension dimension,
                                     std::string* why = nullptr);

/// One plain decimal number and nothing else: "12", "-0.5", "4_096", "15e3", "1e-06". Not "010",
/// hexadecimal, octal, infinity or nan: `why` (if given) then says which, and is left alone for
/// text that is simply no number.
std::optional<double> parse_number(std::string_view text, std::string* why = nullptr);
/// The same grammar where the value is whole ("15e3" is 15000, "1.5" is not) and fits int64; exact.
std::optional<std::int64_t> parse_whole_number(std::string_view text, std::string* why = nullptr);

/// "12.3 GB", "1.50 ms", "19.9 s": three significant digits, for people. Decimal prefixes; whole
/// bytes below 1 kB; minutes, hours and days from 2 of them on.
std::string format_bytes(double bytes);
std::string format_seconds(double s);

}  // namespace orrery
