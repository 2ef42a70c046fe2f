#include <algorithm>
#include <cmath>
#include <limits>

#include <fmt/core.h>

#include "kernels/reference/reference.hpp"
#include "tests/kernels/call_cases.hpp"

namespace orrery::kernels {
namespace {

constexpr std::int64_t kGuard = 512;  // bytes before and behind
constexpr std::byte kGuardByte{0xA5};
constexpr std::int32_t kIntPoison = -88;

template <class T>
T load(const std::byte* first, std::int64_t element) {
  T value;
  std::memcpy(&value, first + element * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
  return value;
}

}  // namespace

CaseMemory::CaseMemory(std::uint64_t seed, Layout layout, DeviceTolerance tolerance, Device* device)
    : random_(seed), layout_(layout), tolerance_(tolerance), device_(device) {}

CaseMemory::~CaseMemory() {
  if (device_ == nullptr) return;
  for (const Buffer& b : buffers_) device_->release(b.memory);
}

CaseMemory::Kind CaseMemory::kind_of(Format format) {
  switch (format) {
    case Format::fp32:
      return Kind::fp32;
    case Format::bf16:
      return Kind::bf16;
    case Format::e4m3:
      return Kind::e4m3;
    case Format::e5m6:
      return Kind::e5m6;
  }
  return Kind::bytes;
}

std::int64_t CaseMemory::bytes_of(Kind kind, std::int64_t elements) {
  switch (kind) {
    case Kind::fp64:
      return 8 * elements;
    case Kind::fp32:
    case Kind::int32:
      return 4 * elements;
    case Kind::bf16:
      return 2 * elements;
    case Kind::e5m6:
      return elements / 2 * 3;
    case Kind::e4m3:
    case Kind::bytes:
      return elements;
  }
  return 0;
}

double CaseMemory::value_of(Kind kind, const std::byte* first, std::int64_t element) {
  switch (kind) {
    case Kind::fp64:
      return load<double>(first, element);
    case Kind::fp32:
      return load<float>(first, element);
    case Kind::int32:
      return load<std::int32_t>(first, element);
    case Kind::bf16:
      return float_of_bf16(load<std::uint16_t>(first, element));
    case Kind::e5m6:
      return float_of_e5m6(load_e5m6(first, element));
    case Kind::e4m3:
      return float_of_e4m3(load<std::uint8_t>(first, element));
    case Kind::bytes:
      return load<std::uint8_t>(first, element);
  }
  return 0;
}

std::uint64_t CaseMemory::bits_of(Kind kind, const std::byte* first, std::int64_t element) {
  switch (kind) {
    case Kind::fp64:
      return load<std::uint64_t>(first, element);
    case Kind::fp32:
    case Kind::int32:
      return load<std::uint32_t>(first, element);
    case Kind::bf16:
      return load<std::uint16_t>(first, element);
    case Kind::e5m6:
      return load_e5m6(first, element);
    case Kind::e4m3:
    case Kind::bytes:
      return load<std::uint8_t>(first, element);
  }
  return 0;
}

/// From a value to the next of the format.
double CaseMemory::step_of(Kind kind, double value) {
  const auto step = [&](int bits, int smallest) {
    const int exponent = value == 0 ? smallest : std::max(std::ilogb(value), smallest);
    return std::ldexp(1.0, exponent - bits);
  };
  switch (kind) {
    case Kind::fp32:
      return step(23, -126);
    case Kind::bf16:
      return step(7, -126);
    case Kind::e4m3:
      return step(3, -6);
    case Kind::e5m6:
      return step(6, -14);
    case Kind::fp64:
    case Kind::int32:
    case Kind::bytes:
      return 0;
  }
  return 0;
}

void* CaseMemory::add(Role role, Kind kind, std::int64_t rows, std::int64_t columns,
                      std::int64_t pitch, std::int64_t skew, const void* values, Tolerance t) {
  Buffer b{.role = role, .kind = kind, .rows = rows, .columns = columns, .pitch = pitch};
  b.tolerance = t;
  b.offset = kGuard + bytes_of(kind, skew);
  b.before.assign(static_cast<std::size_t>(b.offset + bytes_of(kind, rows * pitch) + kGuard),
                  kGuardByte);
  for (std::int64_t r = 0; r < rows; ++r) {
    std::byte* row = b.before.data() + b.offset + bytes_of(kind, r * pitch);
    const std::int64_t bytes = bytes_of(kind, columns);
    if (values != nullptr) {
      if (bytes > 0) {
        std::memcpy(row, static_cast<const std::byte*>(values) + bytes_of(kind, r * columns),
                    static_cast<std::size_t>(bytes));
      }
    } else if (kind == Kind::int32) {
      for (std::int64_t c = 0; c < columns; ++c) std::memcpy(row + 4 * c, &kIntPoison, 4);
    } else {
      std::fill_n(row, bytes, std::byte{0xFF});  // NaN in all formats that have it
    }
  }
  b.now = b.before;
  buffers_.push_back(std::move(b));
  Buffer& added = buffers_.back();
  added.memory = device_ == nullptr ? added.now.data()
                                    : static_cast<std::byte*>(device_->allocate(added.now.size()));
  return added.memory + added.offset;
}

float* CaseMemory::out_floats(std::int64_t count, Tolerance t) {
  return static_cast<float*>(add(Role::output, Kind::fp32, 1, count, count, 0, nullptr, t));
}
std::int32_t* CaseMemory::out_ints(std::int64_t count) {
  return static_cast<std::int32_t*>(
      add(Role::output, Kind::int32, 1, count, count, 0, nullptr, {}));
}
std::uint8_t* CaseMemory::out_bytes(std::int64_t count) {
  return static_cast<std::uint8_t*>(
      add(Role::output, Kind::bytes, 1, count, count, 0, nullptr, {}));
}
void* CaseMemory::scratch(std::int64_t bytes) {
  return add(Role::scratch, Kind::bytes, 1, bytes, bytes, 0, nullptr, {});
}

Matrix CaseMemory::matrix(Role role, std::int64_t rows, std::int64_t columns, Format format,
                          Scaling scaling, const void* elements, const std::vector<float>& scales,
                          Tolerance t) {
  const std::int64_t unit = format == Format::e5m6 ? 2 : 1;
  Matrix m{.rows = rows, .columns = columns, .format = format, .scaling = scaling};
  m.pitch = columns + unit * layout_.gap;
  m.data = add(role, kind_of(format), rows, columns, m.pitch, unit * layout_.skew, elements, t);
  if (scaling == Scaling::none) return m;
  m.scale_pitch = scale_pitch_of(rows, columns, scaling);
  const std::int64_t tiles = (columns + kTile - 1) / kTile;
  const void* values = scales.empty() ? nullptr : scales.data();
  if (scaling == Scaling::rows) {
    m.scale_pitch += layout_.gap;
    m.scales = static_cast<float*>(
        add(role, Kind::fp32, tiles, rows, m.scale_pitch, layout_.skew, values, t));
  } else {
    const std::int64_t blocks = (rows + kTile - 1) / kTile;
    m.scales = static_cast<float*>(
        add(role, Kind::fp32, blocks, tiles, m.scale_pitch, layout_.skew, values, t));
  }
  return m;
}

std::vector<std::byte> CaseMemory::elements_of(const std::vector<float>& values,
                                               Format format) const {
  const auto count = static_cast<std::int64_t>(values.size());
  std::vector<std::byte> bytes(static_cast<std::size_t>(bytes_of(kind_of(format), count)));
  for (std::int64_t i = 0; i < count; ++i) {
    const float value = values[static_cast<std::size_t>(i)];
    switch (format) {
      case Format::fp32:
        std::memcpy(bytes.data() + 4 * i, &value, 4);
        break;
      case Format::bf16: {
        const std::uint16_t code = bf16_of(value);
        std::memcpy(bytes.data() + 2 * i, &code, 2);
        break;
      }
      case Format::e4m3:
        bytes[static_cast<std::size_t>(i)] = std::byte{e4m3_of(value)};
        break;
      case Format::e5m6:
        store_e5m6(bytes.data(), i, e5m6_of(value));
        break;
    }
  }
  return bytes;
}

Matrix CaseMemory::in(std::int64_t rows, std::int64_t columns, Format format, Scaling scaling,
                      double amplitude) {
  if (scaling == Scaling::none) {
    return in(rows, columns, format, floats(rows * columns, 0.05 * amplitude, amplitude));
  }
  const double largest = format == Format::e4m3 ? 448 : 1;
  const std::vector<float> codes = floats(rows * columns, largest / 64, largest);
  std::vector<float> scales;
  const std::int64_t tiles = (columns + kTile - 1) / kTile;
  const std::int64_t count = tiles * (scaling == Scaling::rows ? rows : (rows + kTile - 1) / kTile);
  for (std::int64_t i = 0; i < count; ++i) {
    const double power = format == Format::e4m3 ? uniform(-3, 0) : std::floor(uniform(-3, 1));
    scales.push_back(static_cast<float>(amplitude / largest * std::exp2(power)));
  }
  return matrix(Role::input, rows, columns, format, scaling, elements_of(codes, format).data(),
                scales, {});
}
Matrix CaseMemory::in(std::int64_t rows, std::int64_t columns, Format format,
                      const std::vector<float>& values) {
  return matrix(Role::input, rows, columns, format, Scaling::none,
                elements_of(values, format).data(), {}, {});
}
Matrix CaseMemory::update(std::int64_t rows, std::int64_t columns, Format format, Tolerance t,
                          double amplitude) {
  return update(rows, columns, format, floats(rows * columns, 0.05 * amplitude, amplitude), t);
}
Matrix CaseMemory::update(std::int64_t rows, std::int64_t columns, Format format,
                          const std::vector<float>& values, Tolerance t) {
  return matrix(Role::update, rows, columns, format, Scaling::none,
                elements_of(values, format).data(), {}, t);
}
Matrix CaseMemory::out(std::int64_t rows, std::int64_t columns, Format format, Tolerance t,
                       Scaling scaling) {
  return matrix(Role::output, rows, columns, format, scaling, nullptr, {}, t);
}

CaseMemory::Buffer& CaseMemory::buffer_of(const Matrix& m) {
  return *std::find_if(buffers_.begin(), buffers_.end(),
                       [&](const Buffer& b) { return b.memory + b.offset == m.data; });
}

void CaseMemory::set_rows(const Matrix& m, std::int64_t first, std::int64_t count, float value) {
  const std::vector<std::byte> row =
      elements_of(std::vector<float>(static_cast<std::size_t>(m.columns), value), m.format);
  Buffer& b = buffer_of(m);
  for (std::int64_t r = first; r < first + count; ++r) {
    const std::int64_t at = b.offset + bytes_of(b.kind, r * b.pitch);
    std::copy(row.begin(), row.end(), b.before.begin() + at);
  }
  std::copy(b.before.begin(), b.before.end(), b.now.begin());  // not to other memory
}

void CaseMemory::clear_columns(const Matrix& m, std::int64_t first, std::int64_t count) {
  Buffer& b = buffer_of(m);
  for (std::int64_t r = 0; r < m.rows; ++r) {
    std::fill_n(b.before.begin() + b.offset + r * b.pitch + first, count, std::byte{0});
  }
  std::copy(b.before.begin(), b.before.end(), b.now.begin());
}

double CaseMemory::uniform(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_);
}
std::int64_t CaseMemory::integer(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(random_);
}
std::vector<float> CaseMemory::floats(std::int64_t count, double low, double high) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& v : values) {
    const double magnitude = uniform(low, high);
    v = static_cast<float>((random_() & 1) != 0 ? magnitude : -magnitude);
  }
  return values;
}

void CaseMemory::upload() {
  if (device_ == nullptr) return;
  for (Buffer& b : buffers_) device_->upload(b.memory, b.before.data(), b.before.size());
}
void CaseMemory::download() {
  if (device_ == nullptr) return;
  for (Buffer& b : buffers_) device_->download(b.now.data(), b.memory, b.now.size());
}

/// 1 for the bytes of elements.
std::vector<std::byte> CaseMemory::mask_of(const Buffer& b) const {
  std::vector<std::byte> mask(b.now.size());
  for (std::int64_t r = 0; r < b.rows; ++r) {
    std::fill_n(mask.begin() + b.offset + bytes_of(b.kind, r * b.pitch),
                bytes_of(b.kind, b.columns), std::byte{1});
  }
  return mask;
}

std::vector<std::byte> CaseMemory::results() const {
  std::vector<std::byte> all;
  for (const Buffer& b : buffers_) {
    if (b.role == Role::update || b.role == Role::output) {
      all.insert(all.end(), b.now.begin(), b.now.end());
    }
  }
  return all;
}

std::string CaseMemory::compare(const Buffer& mine, const Buffer& reference) const {
  if (mine.before != reference.before) return "the case is not the same when made again";
  const std::vector<std::byte> mask = mask_of(mine);
  for (std::size_t i = 0; i < mask.size(); ++i) {
    if (mask[i] != std::byte{1} && mine.now[i] != mine.before[i]) {
      return fmt::format("byte {} of {}, which is outside of its elements, was written",
                         static_cast<std::int64_t>(i) - mine.offset, mine.now.size());
    }
  }
  if (mine.role == Role::scratch) return {};
  const std::byte* now = mine.now.data() + mine.offset;
  const std::byte* before = mine.before.data() + mine.offset;
  const std::byte* wanted = reference.now.data() + reference.offset;
  std::int64_t differ = 0, written = 0;
  for (std::int64_t r = 0; r < mine.rows; ++r) {
    const std::int64_t row = bytes_of(mine.kind, r * mine.pitch);
    const std::int64_t row_bytes = bytes_of(mine.kind, mine.columns);
    const bool row_stays = std::equal(wanted + row, wanted + row + row_bytes, before + row);
    for (std::int64_t c = 0; c < mine.columns; ++c) {
      const std::int64_t i = r * mine.pitch + c;
      const std::uint64_t bits = bits_of(mine.kind, now, i);
      const std::uint64_t wanted_bits = bits_of(mine.kind, wanted, i);
      const bool stays =
          mine.role == Role::update ? row_stays : wanted_bits == bits_of(mine.kind, before, i);
      if (!stays) ++written;
      if (bits == wanted_bits) continue;
      const double value = value_of(mine.kind, now, i), want = value_of(mine.kind, wanted, i);
      const auto problem = [&](const char* what) {
        return fmt::format("[{}, {}] of {}x{} is {} ({:#x}), {} ({:#x}) expected: {}", r, c,
                           mine.rows, mine.columns, value, bits, want, wanted_bits, what);
      };
      // A sum of what is not a number has no sign to agree on.
      if (std::isnan(value) && std::isnan(want)) continue;
      if (stays) return problem("it should not have been written");
      const Tolerance& t = mine.tolerance;
      if (t.may_differ < 0) return problem("has to be equal");
      const double exact = t.absolute + t.relative * std::abs(want);
      // Where the exact value may be in the next binade, steps are larger.
      const double allowed = exact + step_of(mine.kind, std::max(std::abs(want), std::abs(value)));
      // Not a number passes no comparison.
      if (!(std::abs(value - want) <= allowed * (1 + 1e-9))) {
        return problem(
            fmt::format("{:.3g} apart, {:.3g} allowed", std::abs(value - want), allowed).c_str());
      }
      ++differ;
    }
  }
  const bool rounded =
      mine.kind == Kind::bf16 || mine.kind == Kind::e4m3 || mine.kind == Kind::e5m6;
  const double may = mine.tolerance.may_differ * static_cast<double>(written) + 4;
  if (rounded && mine.tolerance.may_differ >= 0 && static_cast<double>(differ) > may) {
    return fmt::format("{} of {} elements differ, {:.0f} may", differ, written, may);
  }
  return {};
}

std::vector<std::string> CaseMemory::compare(const CaseMemory& reference) const {
  std::vector<std::string> problems;
  for (std::size_t i = 0; i < buffers_.size(); ++i) {
    const std::string problem = compare(buffers_[i], reference.buffers_[i]);
    if (!problem.empty()) problems.push_back(fmt::format("operand {}: {}", i, problem));
  }
  return problems;
}

CaseResult run_case(const CallCase& test, Device& device, StreamHandle stream, std::uint64_t seed,
                    DeviceTolerance tolerance, int sms) {
  CaseMemory host(seed, test.layout, tolerance, nullptr);
  CaseMemory mine(seed, test.layout, tolerance, &device);
  const Call on_host = test.make(host);
  const Call call = test.make(mine);
  const std::string why = why_impossible(call);
  if (!why.empty()) return {{"impossible: " + why}, {}};
  reference::run(on_host);
  mine.upload();
  device.enqueue(stream, call, sms);
  device.synchronize();
  mine.download();
  return {mine.compare(host), mine.results()};
}

}  // namespace orrery::kernels
