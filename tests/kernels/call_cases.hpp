#pragma once
// Cases of every Call, for any Device: fresh random operands, outputs full of NaN, guards around
// and inside of every buffer, and kernels/reference on copies of the same bytes to compare with.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/device.hpp"

namespace orrery::kernels {

/// How far a result may be from the reference's: `absolute + relative * |reference|` before it is
/// rounded to its format, and then one step of the format (fp32: 2^-23; fp64: none). `may_differ`:
/// the share of elements of bf16, e4m3 and e5m6 that may differ at all, so that rounding down
/// shows; negative: none of any format. Integers are equal.
struct Tolerance {
  double absolute = 0;
  double relative = 0;
  double may_differ = 0.03;
};
/// Copies of elements are equal.
inline constexpr Tolerance kExact{0, 0, -1};

/// What a device may do worse than FP32 sums in an order of its own.
struct DeviceTolerance {
  /// Error of a product of e4m3 for each unit of the sum of its terms' magnitudes. Hopper's tensor
  /// cores keep some 14 bits within a sum of 128 (DeepSeek-V3 report 3.3.2): 2^-13 for these.
  double e4m3_product = 0x1p-20;
  /// The same of attention with bf16 operands; 2^-8 where probabilities are rounded to bf16.
  double bf16_attention = 0x1p-20;
};

/// Operands of one call. Built twice from the same seed: in this process's memory, for the
/// reference, and on the device. Both have the same bytes.
class CaseMemory {
 public:
  /// `gap`: elements between rows, and behind rows of scales; `skew`: elements that the first is
  /// off the buffer's alignment of 256 bytes. (Both are doubled for e5m6, to be even.)
  struct Layout {
    std::int64_t gap = 0;
    std::int64_t skew = 0;
  };

  /// Without a device: in this process's memory.
  CaseMemory(std::uint64_t seed, Layout layout, DeviceTolerance tolerance, Device* device);
  ~CaseMemory();
  CaseMemory(const CaseMemory&) = delete;
  CaseMemory& operator=(const CaseMemory&) = delete;

  const DeviceTolerance& tolerance() const { return tolerance_; }

  /// Arrays without gaps. Inputs have to stay as they are; outputs hold NaN (integers: -88) before.
  template <class Element>
  const Element* in(const std::vector<Element>& values) {
    return static_cast<const Element*>(array_of(values, Role::input, {}));
  }
  template <class Element>
  Element* update(const std::vector<Element>& values, Tolerance t = {}) {
    return static_cast<Element*>(array_of(values, Role::update, t));
  }
  float* out_floats(std::int64_t count, Tolerance t);
  std::int32_t* out_ints(std::int64_t count);
  std::uint8_t* out_bytes(std::int64_t count);
  /// Whatever is in there afterwards.
  void* scratch(std::int64_t bytes);

  /// Elements are random with magnitudes of 0.05 to 1 times `amplitude`; codes and scales of e4m3
  /// and e5m6 are random with scales of 2^-4 to 2^-8 (times amplitude).
  Matrix in(std::int64_t rows, std::int64_t columns, Format format = Format::bf16,
            Scaling scaling = Scaling::none, double amplitude = 1);
  Matrix in(std::int64_t rows, std::int64_t columns, Format format,
            const std::vector<float>& values);
  Matrix update(std::int64_t rows, std::int64_t columns, Format format, Tolerance t,
                double amplitude = 1);
  Matrix update(std::int64_t rows, std::int64_t columns, Format format,
                const std::vector<float>& values, Tolerance t);
  Matrix out(std::int64_t rows, std::int64_t columns, Format format, Tolerance t,
             Scaling scaling = Scaling::none);
  /// Elements of these rows of an input become `value`.
  void set_rows(const Matrix& m, std::int64_t first, std::int64_t count, float value);
  /// Of e4m3.
  void clear_columns(const Matrix& m, std::int64_t first, std::int64_t count);

  double uniform(double low, double high);
  std::int64_t integer(std::int64_t low, std::int64_t high);  ///< both included
  /// Of random sign, magnitudes in [low, high).
  std::vector<float> floats(std::int64_t count, double low = 0.05, double high = 1);
  std::mt19937_64& random() { return random_; }

  /// Copies all to the device.
  void upload();
  /// Copies all from the device.
  void download();
  /// What differs between this, after the call, and `reference`, after its own.
  std::vector<std::string> compare(const CaseMemory& reference) const;
  /// All that the call could write, for comparison bit by bit.
  std::vector<std::byte> results() const;

 private:
  enum class Role : std::uint8_t { input, update, output, scratch };
  enum class Kind : std::uint8_t { fp32, bf16, e4m3, e5m6, fp64, int32, bytes };

  /// rows x columns elements with a pitch, between guards.
  struct Buffer {
    Role role{};
    Kind kind{};
    std::int64_t rows = 0, columns = 0, pitch = 0;
    std::int64_t offset = 0;  ///< of the first element, in bytes
    Tolerance tolerance;
    std::vector<std::byte> before, now;
    std::byte* memory = nullptr;  ///< on the device, or now.data()
  };

  Buffer& buffer_of(const Matrix& m);
  static Kind kind_of(Format format);
  static Kind kind_of(float /*of*/) { return Kind::fp32; }
  static Kind kind_of(double /*of*/) { return Kind::fp64; }
  static Kind kind_of(std::int32_t /*of*/) { return Kind::int32; }
  static Kind kind_of(std::uint16_t /*of*/) { return Kind::bf16; }
  static Kind kind_of(std::uint8_t /*of*/) { return Kind::bytes; }
  static std::int64_t bytes_of(Kind kind, std::int64_t elements);
  static double value_of(Kind kind, const std::byte* first, std::int64_t element);
  static std::uint64_t bits_of(Kind kind, const std::byte* first, std::int64_t element);
  static double step_of(Kind kind, double value);

  /// Elements of `values` stand without gaps; empty: poison.
  void* add(Role role, Kind kind, std::int64_t rows, std::int64_t columns, std::int64_t pitch,
            std::int64_t skew, const void* values, Tolerance t);
  template <class Element>
  void* array_of(const std::vector<Element>& values, Role role, Tolerance t) {
    const auto count = static_cast<std::int64_t>(values.size());
    if constexpr (std::is_trivially_copyable_v<Element> && !std::is_arithmetic_v<Element>) {
      const auto bytes = count * static_cast<std::int64_t>(sizeof(Element));
      return add(role, Kind::bytes, 1, bytes, bytes, 0, values.data(), t);
    } else {
      return add(role, kind_of(Element{}), 1, count, count, 0, values.data(), t);
    }
  }
  Matrix matrix(Role role, std::int64_t rows, std::int64_t columns, Format format, Scaling scaling,
                const void* elements, const std::vector<float>& scales, Tolerance t);
  std::vector<std::byte> elements_of(const std::vector<float>& values, Format format) const;
  std::vector<std::byte> mask_of(const Buffer& b) const;
  std::string compare(const Buffer& mine, const Buffer& reference) const;

  std::mt19937_64 random_;
  Layout layout_;
  DeviceTolerance tolerance_;
  Device* device_;
  std::deque<Buffer> buffers_;
};

struct CallCase {
  std::string name;  ///< "gemm e4m3 33x130x7168 ..."
  CaseMemory::Layout layout;
  std::function<Call(CaseMemory&)> make;
};

/// Of all Calls, with the formats and options that the executor uses.
std::vector<CallCase> call_cases();

struct CaseResult {
  std::vector<std::string> problems;  ///< empty: all is as it should be
  std::vector<std::byte> results;
};
/// What the device throws is thrown.
CaseResult run_case(const CallCase& test, Device& device, StreamHandle stream, std::uint64_t seed,
                    DeviceTolerance tolerance = {}, int sms = 0);

}  // namespace orrery::kernels
