#include "calibrate/execute/tensors.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <new>
#include <stdexcept>
#include <vector>

#include "sim/check.hpp"

namespace orrery {

using kernels::Matrix;

Tensors::~Tensors() {
  for (const auto& [name, piece] : by_name_) device_.release(piece.begin);
}

void* Tensors::bytes(const std::string& name, std::int64_t count) {
  const auto known = by_name_.find(name);
  if (known != by_name_.end()) {
    ORRERY_CHECK(known->second.bytes == count, "{} has {} bytes, not {}", name, known->second.bytes,
                 count);
    return known->second.begin;
  }
  Piece piece;
  piece.bytes = count;
  piece.index = names_.size();
  try {
    piece.begin = static_cast<std::byte*>(
        device_.allocate(static_cast<std::size_t>(std::max<std::int64_t>(count, 1))));
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(fmt::format(
        "{} has no room for {} ({:.2f} GB) beside {:.2f} GB of a rank's tensors", device_.name(),
        name, static_cast<double>(count) * 1e-9, static_cast<double>(total_bytes_) * 1e-9));
  }
  const std::vector<std::byte> zeros(
      static_cast<std::size_t>(std::min<std::int64_t>(count, 1 << 20)));
  for (std::int64_t at = 0; at < count; at += 1 << 20) {
    device_.upload(piece.begin + at, zeros.data(),
                   static_cast<std::size_t>(std::min<std::int64_t>(count - at, 1 << 20)));
  }
  names_.push_back(name);
  total_bytes_ += count;
  const auto added = by_name_.emplace(name, piece).first;
  by_begin_.emplace(piece.begin, &added->second);
  return piece.begin;
}

Matrix Tensors::matrix(const std::string& name, std::int64_t rows, std::int64_t columns,
                       kernels::Format format, kernels::Scaling scaling) {
  Matrix m;
  m.rows = rows;
  m.columns = columns;
  m.pitch = columns;
  m.format = format;
  m.scaling = scaling;
  const std::int64_t elements = (kernels::element_bytes(rows, columns, format) + 255) / 256 * 256;
  const std::int64_t scales = kernels::scale_elements(rows, columns, scaling);
  auto* memory = static_cast<std::byte*>(bytes(name, elements + 4 * scales));
  m.data = memory;
  if (scales > 0) {
    m.scales = reinterpret_cast<float*>(memory + elements);
    m.scale_pitch = kernels::scale_pitch_of(rows, columns, scaling);
  }
  return m;
}

std::optional<std::size_t> Tensors::piece_of(const void* address) const {
  const auto* at = static_cast<const std::byte*>(address);
  auto after = by_begin_.upper_bound(at);
  if (after == by_begin_.begin()) return std::nullopt;
  const Piece& piece = *std::prev(after)->second;
  if (at >= piece.begin + std::max<std::int64_t>(piece.bytes, 1)) return std::nullopt;
  return piece.index;
}

Matrix columns_of(const Matrix& m, std::int64_t first, std::int64_t count) {
  ORRERY_CHECK(m.scales == nullptr && first >= 0 && first + count <= m.columns,
               "columns {} to {} of {}", first, first + count, m.columns);
  Matrix view = m;
  view.data = static_cast<std::byte*>(m.data) + first * kernels::bits_of(m.format) / 8;
  view.columns = count;
  return view;
}

Matrix rows_of(const Matrix& m, std::int64_t first, std::int64_t count) {
  ORRERY_CHECK(first >= 0 && first + count <= m.rows, "rows {} to {} of {}", first, first + count,
               m.rows);
  Matrix view = m;
  view.data = static_cast<std::byte*>(m.data) + first * m.pitch * kernels::bits_of(m.format) / 8;
  view.rows = count;
  if (m.scaling == kernels::Scaling::rows) view.scales += first;
  if (m.scaling == kernels::Scaling::blocks) {
    ORRERY_CHECK(first % kernels::kTile == 0, "row {} cuts a block of scales", first);
    view.scales += first / kernels::kTile * m.scale_pitch;
  }
  return view;
}

}  // namespace orrery
