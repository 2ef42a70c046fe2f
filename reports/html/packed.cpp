#include "reports/html/packed.hpp"

#include <zlib.h>

#include <stdexcept>

namespace orrery {

std::string gzip(std::string_view bytes) {
  constexpr int kLevel = 6;
  constexpr int kGzipWindow = 15 + 16;  // +16: a gzip header
  z_stream stream{};
  if (deflateInit2(&stream, kLevel, Z_DEFLATED, kGzipWindow, 9, Z_DEFAULT_STRATEGY) != Z_OK) {
    throw std::runtime_error("zlib: no memory");
  }
  std::string out(deflateBound(&stream, static_cast<uLong>(bytes.size())), '\0');
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(bytes.data()));
  stream.avail_in = static_cast<uInt>(bytes.size());
  stream.next_out = reinterpret_cast<Bytef*>(out.data());
  stream.avail_out = static_cast<uInt>(out.size());
  const int status = deflate(&stream, Z_FINISH);
  out.resize(out.size() - stream.avail_out);
  deflateEnd(&stream);
  if (status != Z_STREAM_END) throw std::runtime_error("zlib: cannot compress a column");
  return out;
}

std::string base64(std::string_view bytes) {
  static constexpr char kLetters[] =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  out.reserve((bytes.size() + 2) / 3 * 4);
  for (std::size_t i = 0; i < bytes.size(); i += 3) {
    const auto byte = [&](std::size_t k) -> std::uint32_t {
      return i + k < bytes.size() ? static_cast<unsigned char>(bytes[i + k]) : 0U;
    };
    const std::uint32_t three = byte(0) << 16 | byte(1) << 8 | byte(2);
    out.push_back(kLetters[three >> 18]);
    out.push_back(kLetters[three >> 12 & 63]);
    out.push_back(i + 1 < bytes.size() ? kLetters[three >> 6 & 63] : '=');
    out.push_back(i + 2 < bytes.size() ? kLetters[three & 63] : '=');
  }
  return out;
}

std::string PackedColumn::text() const {
  return base64(gzip(bytes_));
}

}  // namespace orrery
