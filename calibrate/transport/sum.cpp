#include <algorithm>
#include <bit>
#include <cstring>

#include "calibrate/transport/collectives.hpp"

namespace orrery {
namespace {

// As kernels/format.hpp rounds, in a form that the compiler turns into vector instructions.
float float_of(std::uint16_t code) {
  return std::bit_cast<float>(std::uint32_t{code} << 16);
}

std::uint16_t bf16_of(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = bits + 0x7FFF + ((bits >> 16) & 1);
  const std::uint32_t quiet_nan = bits | 0x400000;
  return static_cast<std::uint16_t>(((bits & 0x7FFFFFFF) > 0x7F800000 ? quiet_nan : rounded) >> 16);
}

/// Elements at a time: sums stay in the first level cache while the terms come by.
constexpr std::size_t kBlock = 2048;

template <class Stored, class Sum, class Load, class Store>
void sum_blocks(std::span<const std::byte* const> terms, std::byte* to, std::size_t elements,
                Load load, Store store) {
  Sum sums[kBlock];
  Stored stored[kBlock];
  for (std::size_t begin = 0; begin < elements; begin += kBlock) {
    const std::size_t count = std::min(kBlock, elements - begin);
    for (std::size_t term = 0; term < terms.size(); ++term) {
      // Through memory of the right type: buffers are bytes of any alignment.
      std::memcpy(stored, terms[term] + begin * sizeof(Stored), count * sizeof(Stored));
      if (term == 0) {
        for (std::size_t i = 0; i < count; ++i) sums[i] = load(stored[i]);
      } else {
        for (std::size_t i = 0; i < count; ++i) sums[i] += load(stored[i]);
      }
    }
    for (std::size_t i = 0; i < count; ++i) stored[i] = store(sums[i]);
    std::memcpy(to + begin * sizeof(Stored), stored, count * sizeof(Stored));
  }
}

}  // namespace

void sum_in_order(ElementType type, std::span<const std::byte* const> terms, std::byte* to,
                  std::size_t elements) {
  const auto same = [](auto value) { return value; };
  switch (type) {
    case ElementType::fp32:
      return sum_blocks<float, float>(terms, to, elements, same, same);
    case ElementType::bf16:
      return sum_blocks<std::uint16_t, float>(terms, to, elements, float_of, bf16_of);
    case ElementType::fp64:
      return sum_blocks<double, double>(terms, to, elements, same, same);
  }
}

}  // namespace orrery
