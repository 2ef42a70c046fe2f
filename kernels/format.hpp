#pragma once
// Number formats of tensors in memory, and their conversions, bit for bit. Plain C++.

#include <cstdint>
#include <string_view>

namespace orrery::kernels {

/// bf16: the upper half of an fp32. e4m3: 1-4-3 bits, bias 7, no infinities, 0x7F and 0xFF are NaN,
/// largest 448 (OCP 8-bit Floating Point Specification, revision 1.0). e5m6: 1-5-6 bits, bias 15,
/// with no infinities and no NaN, 12 bits an element, two in three bytes (DeepSeek-V3 report, arXiv
/// 2412.19437, 3.3.3, which gives the widths only: bias, the use of all codes and the packing are
/// ours). Packing: elements 2i and 2i + 1 are the low and the high 12 bits of the little-endian
/// number of 24 bits at bytes 3i to 3i + 2 (load_e5m6, store_e5m6).
enum class Format : std::uint8_t { fp32, bf16, e4m3, e5m6 };
std::string_view name_of(Format format);

/// Bits of one element, without scales.
constexpr int bits_of(Format format) {
  switch (format) {
    case Format::fp32:
      return 32;
    case Format::bf16:
      return 16;
    case Format::e4m3:
      return 8;
    case Format::e5m6:
      return 12;
  }
  return 0;
}

inline constexpr float kE4m3Max = 448.0F;
inline constexpr float kE5m6Max = 131072.0F - 1024.0F;  ///< 2^16 * (1 + 63/64)
inline constexpr std::uint16_t kE5m6Mask = 0xFFF;

/// To the nearest, ties to even; NaN stays NaN; infinities stay.
std::uint16_t bf16_of(float value);
float float_of_bf16(std::uint16_t code);

/// To the nearest, ties to even; values beyond +-448 and infinities saturate; NaN gives 0x7F (sign
/// kept).
std::uint8_t e4m3_of(float value);
float float_of_e4m3(std::uint8_t code);

/// To the nearest, ties to even; saturates. The argument must not be NaN. The low 12 bits are used.
std::uint16_t e5m6_of(float value);
float float_of_e5m6(std::uint16_t code);

/// Code of element `index` of packed e5m6 at `packed`. Storing leaves the other element of its
/// three bytes as it is.
inline std::uint16_t load_e5m6(const void* packed, std::int64_t index) {
  const auto* byte = static_cast<const std::uint8_t*>(packed) + index / 2 * 3;
  return static_cast<std::uint16_t>(index % 2 == 0 ? byte[0] | (byte[1] & 0xF) << 8
                                                   : byte[1] >> 4 | byte[2] << 4);
}
inline void store_e5m6(void* packed, std::int64_t index, std::uint16_t code) {
  auto* byte = static_cast<std::uint8_t*>(packed) + index / 2 * 3;
  if (index % 2 == 0) {
    byte[0] = static_cast<std::uint8_t>(code);
    byte[1] = static_cast<std::uint8_t>((byte[1] & 0xF0) | (code >> 8 & 0xF));
  } else {
    byte[1] = static_cast<std::uint8_t>((byte[1] & 0xF) | (code & 0xF) << 4);
    byte[2] = static_cast<std::uint8_t>(code >> 4);
  }
}

}  // namespace orrery::kernels
