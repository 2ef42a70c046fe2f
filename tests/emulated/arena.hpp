#pragma once
// Operands of one call side by side in one piece of memory, so that running the call twice on
// copies of it and comparing all bytes shows every stray write.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/call.hpp"
#include "kernels/format.hpp"

namespace orrery::kernels::streaming {

/// How far an output may be off.
struct Tolerance {
  double relative = 0;
  double absolute = 0;
};

/// One rounding to the format, where the sum before it is good to some 1e-6.
inline Tolerance rounding_of(Format format) {
  switch (format) {
    case Format::fp32:
      return {1e-5, 1e-6};
    case Format::bf16:
      return {0x1p-7, 1e-6};
    case Format::e4m3:
      return {0x1p-3, 0x1p-9};
    case Format::e5m6:
      return {0x1p-6, 0x1p-20};
  }
  return {};
}

class Arena {
 public:
  static constexpr std::size_t kBytes = std::size_t{6} << 20U;

  explicit Arena(std::uint32_t seed) : generator_(seed) {
    memory_.resize(kBytes / 256);
    for (auto& line : memory_) {
      for (auto& word : line.words) {
        word = static_cast<std::uint32_t>(generator_()) | 0x7f800001U;  // NaN
      }
    }
  }

  /// An arena with the same bytes, whose operands are made again by the same calls and then left as
  /// they are. `base`: where the bytes are for who runs the call, kBytes at a multiple of 256;
  /// null: here.
  Arena copy(void* base = nullptr) const {
    Arena other = *this;
    other.filled_ = true;
    other.base_ = static_cast<std::byte*>(base);
    other.used_ = 0;
    other.outputs_.clear();
    return other;
  }

  std::byte* data() { return reinterpret_cast<std::byte*>(memory_.data()); }
  const std::byte* data() const { return reinterpret_cast<const std::byte*>(memory_.data()); }

  /// 256 bytes from what was there before, at a multiple of 256 plus `offset`.
  void* bytes(std::size_t size, std::size_t offset = 0) {
    void* const begin = base() + used_ + 256 + offset;
    used_ = (used_ + 256 + offset + size + 255) / 256 * 256;
    if (used_ > kBytes) throw std::length_error("the arena is full");
    return begin;
  }

  template <class T, class Value>
  T* array(std::int64_t elements, const Value& value) {
    T* const begin = static_cast<T*>(bytes(static_cast<std::size_t>(elements) * sizeof(T)));
    if (!filled_) {
      for (std::int64_t i = 0; i < elements; ++i) begin[i] = static_cast<T>(value(i));
    }
    return begin;
  }
  template <class T>
  T* array(std::int64_t elements) {
    return static_cast<T*>(bytes(static_cast<std::size_t>(elements) * sizeof(T)));
  }
  template <class T>
  const T* one(T value) {
    return array<T>(1, [&](std::int64_t) { return value; });
  }

  /// Normal numbers, or value(index); those of the gaps between rows too. `offset` in elements.
  Matrix matrix(std::int64_t rows, std::int64_t columns, Format format,
                Scaling scaling = Scaling::none, std::int64_t gap = 0, std::int64_t offset = 0,
                const std::function<float(std::int64_t)>& value = {}) {
    Matrix m{.rows = rows, .columns = columns, .pitch = columns + gap, .format = format};
    const std::int64_t elements = rows * m.pitch;
    const auto size = [&](std::int64_t n) {
      return static_cast<std::size_t>(n * bits_of(format) / 8);
    };
    m.data = bytes(size(elements), size(offset));
    if (!filled_) {
      for (std::int64_t i = 0; i < elements; ++i) put(m, i, value ? value(i) : normal());
    }
    if (scaling != Scaling::none) {
      m.scaling = scaling;
      m.scale_pitch = scale_pitch_of(rows, columns, scaling) + (scaling == Scaling::rows ? 3 : 0);
      const std::int64_t lines = ((scaling == Scaling::rows ? columns : rows) + kTile - 1) / kTile;
      m.scales =
          array<float>(lines * m.scale_pitch, [&](std::int64_t) { return std::exp(normal()); });
    }
    return m;
  }

  float normal() { return normal_(generator_); }
  std::int64_t below(std::int64_t end) {
    return static_cast<std::int64_t>(generator_() % static_cast<std::uint64_t>(end));
  }
  float uniform() { return static_cast<float>(below(1 << 20)) * 0x1p-20F; }

  /// Elements that the call writes, and how exactly. All that is no output has to stay, or be
  /// written, bit for bit as by the reference.
  void output(const Matrix& m, Tolerance tolerance) {
    outputs_.push_back({m, static_cast<const std::byte*>(m.data) - base(), tolerance});
  }
  void output(const Matrix& m) { output(m, rounding_of(m.format)); }
  void output(float* values, std::int64_t elements, Tolerance tolerance = {1e-5, 1e-6}) {
    output({.data = values, .rows = 1, .columns = elements, .pitch = elements}, tolerance);
  }

  /// One number in double.
  void output(double* value, Tolerance tolerance) {
    outputs_.push_back({{.rows = 1, .columns = 1, .pitch = 1},
                        reinterpret_cast<const std::byte*>(value) - base(),
                        tolerance,
                        true});
  }

  /// The first differences of `other`, for people; empty if there is none.
  std::string differences(const Arena& other) const {
    std::string text;
    int count = 0;
    const auto tell = [&](const std::string& line) {
      if (++count <= 5) text += line + "\n";
    };
    std::vector<bool> compared(kBytes);
    for (std::size_t o = 0; o < outputs_.size(); ++o) {
      const Output& output = outputs_[o];
      const Matrix& m = output.matrix;
      const std::int64_t bits = output.wide ? 64 : bits_of(m.format);
      for (std::int64_t r = 0; r < m.rows; ++r) {
        for (std::int64_t c = 0; c < m.columns; ++c) {
          const std::int64_t i = r * m.pitch + c;
          for (std::int64_t b = i * bits / 8; b * 8 < (i + 1) * bits; ++b) {
            compared[static_cast<std::size_t>(output.offset + b)] = true;
          }
          const double want = value_of(output, i);
          const double got = other.value_of(other.outputs_[o], i);
          const Tolerance& t = output.tolerance;
          const bool same = std::isnan(want)
                                ? std::isnan(got)
                                : std::abs(want - got) <= t.absolute + t.relative * std::abs(want);
          if (!same) {
            tell("output " + std::to_string(o) + " (" + std::to_string(r) + ", " +
                 std::to_string(c) + ") is " + std::to_string(got) + ", not " +
                 std::to_string(want));
          }
        }
      }
    }
    for (std::size_t i = 0; i < kBytes; ++i) {
      if (!compared[i] && data()[i] != other.data()[i]) {
        tell("byte " + std::to_string(i) + " of the arena differs");
      }
    }
    if (count > 5) text += "and " + std::to_string(count - 5) + " more\n";
    return text;
  }

  bool same_bytes(const Arena& other) const {
    return std::memcmp(data(), other.data(), kBytes) == 0;
  }

 private:
  struct alignas(256) Line {
    std::uint32_t words[64];
  };
  struct Output {
    Matrix matrix;
    std::ptrdiff_t offset = 0;
    Tolerance tolerance;
    bool wide = false;  ///< double
  };

  std::byte* base() { return base_ != nullptr ? base_ : data(); }

  double value_of(const Output& output, std::int64_t i) const {
    const std::byte* const at = data() + output.offset;
    if (output.wide) return *reinterpret_cast<const double*>(at);
    switch (output.matrix.format) {
      case Format::fp32:
        return reinterpret_cast<const float*>(at)[i];
      case Format::bf16:
        return float_of_bf16(reinterpret_cast<const std::uint16_t*>(at)[i]);
      case Format::e4m3:
        return float_of_e4m3(reinterpret_cast<const std::uint8_t*>(at)[i]);
      case Format::e5m6:
        return float_of_e5m6(load_e5m6(at, i));
    }
    return 0;
  }
  static void put(const Matrix& m, std::int64_t i, float x) {
    switch (m.format) {
      case Format::fp32:
        static_cast<float*>(m.data)[i] = x;
        break;
      case Format::bf16:
        static_cast<std::uint16_t*>(m.data)[i] = bf16_of(x);
        break;
      case Format::e4m3:
        static_cast<std::uint8_t*>(m.data)[i] = e4m3_of(100 * x);
        break;
      case Format::e5m6:
        store_e5m6(m.data, i, e5m6_of(x));
        break;
    }
  }

  std::vector<Line> memory_;
  std::byte* base_ = nullptr;
  std::size_t used_ = 0;
  bool filled_ = false;
  std::vector<Output> outputs_;
  std::mt19937 generator_;
  std::normal_distribution<float> normal_;
};

}  // namespace orrery::kernels::streaming
