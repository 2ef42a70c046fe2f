#pragma once
// Units. Inside the program every quantity is SI: seconds as int64 picoseconds, bytes, FLOP, bytes/s.
// Words with units ("400 GB/s", "80 GiB") exist only in files, and are read by parse_quantity.

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

constexpr double seconds(Picoseconds t) { return static_cast<double>(t) * 1e-12; }
constexpr double milliseconds(Picoseconds t) { return static_cast<double>(t) * 1e-9; }

/// Rounds half up; the caller guarantees 0 <= s < 9.2e6 seconds.
constexpr Picoseconds from_seconds(double s) { return static_cast<Picoseconds>(s * 1e12 + 0.5); }

/// The dimension a quantity in a file must have.
enum class Dimension { scalar, bytes, bytes_per_s, flops_per_s, seconds, hertz, watts, dollars };

/// Parses "80 GiB", "400 GB/s", "3.35TB/s", "400 Gb/s" (bits), "2 us", "1830 MHz", "1e3", "4_096", "15 %"
/// (scalar only) into SI units. K/M/G/T/P are decimal, Ki/Mi/Gi/Ti binary; 'b' is bits, 'B' bytes.
/// A bare number is taken in the SI unit. Returns nullopt where the text is no number, has an unknown
/// unit or one of another dimension; `why` (if given) then says which, in words for the user.
std::optional<double> parse_quantity(std::string_view text, Dimension dimension,
                                     std::string* why = nullptr);

/// "12.3 GB", "1.50 ms", "19.9 s": three significant digits, for people.
std::string format_bytes(double bytes);
std::string format_seconds(double s);

}  // namespace orrery
