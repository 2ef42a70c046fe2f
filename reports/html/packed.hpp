#pragma once
// Columns of whole numbers, small enough to be part of a page.

#include <cstdint>
#include <string>
#include <string_view>

namespace orrery {

/// Numbers one after another as zigzag LEB128 (7 bits a byte, least first, the top bit set on all
/// but the last), gzip'd, in base64. Neighbours that are alike cost next to nothing. The reader is
/// unpack() of report.js.
class PackedColumn {
 public:
  void push(std::int64_t value) {
    auto bits = (static_cast<std::uint64_t>(value) << 1) ^ static_cast<std::uint64_t>(value >> 63);
    while (bits >= 0x80) {
      bytes_.push_back(static_cast<char>(bits | 0x80));
      bits >>= 7;
    }
    bytes_.push_back(static_cast<char>(bits));
  }
  const std::string& bytes() const { return bytes_; }
  std::string text() const;

 private:
  std::string bytes_;
};

/// The same bytes give the same bytes: the header holds neither time nor name.
std::string gzip(std::string_view bytes);

std::string base64(std::string_view bytes);

}  // namespace orrery
