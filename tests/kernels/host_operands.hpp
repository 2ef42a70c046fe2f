#pragma once
// Operands in this process's memory, for calls of kernels/reference.

#include <cstring>
#include <deque>
#include <random>
#include <vector>

#include "kernels/call.hpp"

namespace orrery::kernels {

/// Memory that lives as long as this, at addresses that stay.
class HostOperands {
 public:
  explicit HostOperands(unsigned seed = 1) : random_(seed) {}

  template <class Element>
  Element* array(std::vector<Element> values) {
    auto& bytes = memory_.emplace_back(values.size() * sizeof(Element) + 1);
    std::memcpy(bytes.data(), values.data(), values.size() * sizeof(Element));
    return reinterpret_cast<Element*>(bytes.data());
  }
  template <class Element>
  Element* filled(std::int64_t elements, Element value = {}) {
    return array(std::vector<Element>(static_cast<std::size_t>(elements), value));
  }

  /// Bytes of elements are 0xFF, scales -7.
  Matrix matrix(std::int64_t rows, std::int64_t columns, Format format = Format::fp32,
                Scaling scaling = Scaling::none) {
    Matrix m;
    m.data = filled<std::uint8_t>(element_bytes(rows, columns, format), 0xFF);
    m.rows = rows;
    m.columns = m.pitch = columns;
    m.format = format;
    m.scaling = scaling;
    if (scaling != Scaling::none) {
      m.scales = filled<float>(scale_elements(rows, columns, scaling), -7);
      m.scale_pitch = scale_pitch_of(rows, columns, scaling);
    }
    return m;
  }
  Matrix matrix(std::int64_t rows, std::int64_t columns, const std::vector<float>& values) {
    Matrix m = matrix(rows, columns);
    std::memcpy(m.data, values.data(), values.size() * sizeof(float));
    return m;
  }

  double uniform(double low, double high) {
    return std::uniform_real_distribution<double>(low, high)(random_);
  }
  std::vector<float> uniform(std::int64_t count, double low, double high) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& v : values) v = static_cast<float>(uniform(low, high));
    return values;
  }
  std::mt19937_64& random() { return random_; }

 private:
  std::mt19937_64 random_;
  std::deque<std::vector<std::uint8_t>> memory_;
};

/// Of an FP32 matrix without gaps.
inline std::vector<float> floats_of(const Matrix& m) {
  const auto* data = static_cast<const float*>(m.data);
  return {data, data + m.rows * m.columns};
}

}  // namespace orrery::kernels
