#include "kernels/reference/elements.hpp"

#include <bit>
#include <cmath>

namespace orrery::kernels::reference {
namespace {

/// The float on the side of zero, with its last bit set where anything was lost: rounding that
/// again, to at most 22 bits, gives what rounding the double at once gives (Boldo and Melquiond,
/// "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008).
float odd_float_of(double value) {
  const auto nearest = static_cast<float>(value);
  if (static_cast<double>(nearest) == value || !std::isfinite(nearest)) return nearest;
  const float below = std::fabs(static_cast<double>(nearest)) > std::fabs(value)
                          ? std::nextafter(nearest, 0.0F)
                          : nearest;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(below) | 1U);
}

}  // namespace

void set_element(const Matrix& m, std::int64_t row, std::int64_t column, double value) {
  const std::int64_t index = row * m.pitch + column;
  if (m.format == Format::fp32) {
    static_cast<float*>(m.data)[index] = static_cast<float>(value);
  } else {
    static_cast<std::uint16_t*>(m.data)[index] = bf16_of(odd_float_of(value));
  }
}

}  // namespace orrery::kernels::reference
