#include "calibrate/scratch.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <random>
#include <string>

#include "sim/check.hpp"

namespace orrery {
namespace {

using kernels::Format;

constexpr std::int64_t kAlignment = 256;
/// Elements of the random block that fills a pool again and again.
constexpr std::int64_t kBlockElements = std::int64_t{1} << 20;

std::int64_t aligned(std::int64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

float draw(Scratch::Content content, std::mt19937_64& random) {
  if (content == Scratch::Content::positive) {
    return std::uniform_real_distribution<float>(0.001F, 0.01F)(random);
  }
  const float deviation = content == Scratch::Content::weights ? 0.02F : 1.0F;
  return std::normal_distribution<float>(0, deviation)(random);
}

/// kBlockElements values of this kind as they lie in memory.
std::vector<std::byte> random_block(Scratch::Content content, Format format, std::uint64_t seed) {
  std::mt19937_64 random(seed + 97 * static_cast<std::uint64_t>(content) +
                         static_cast<std::uint64_t>(format));
  std::vector<std::byte> block(
      static_cast<std::size_t>(kBlockElements * kernels::bits_of(format) / 8));
  for (std::int64_t i = 0; i < kBlockElements; ++i) {
    const float value = draw(content, random);
    std::byte* const at = block.data() + i * kernels::bits_of(format) / 8;
    switch (format) {
      case Format::fp32:
        std::memcpy(at, &value, sizeof value);
        break;
      case Format::bf16: {
        const std::uint16_t code = kernels::bf16_of(value);
        std::memcpy(at, &code, sizeof code);
        break;
      }
      case Format::e4m3: {
        // Scaled as quantising does: of 128 normal values the largest is about 2.7 deviations.
        const float deviation = content == Scratch::Content::weights ? 0.02F : 1.0F;
        const std::uint8_t code = kernels::e4m3_of(value / deviation * (kernels::kE4m3Max / 2.7F));
        std::memcpy(at, &code, sizeof code);
        break;
      }
      case Format::e5m6: {
        // Two codes in three bytes, the first in the low bits.
        const std::uint32_t code = kernels::e5m6_of(value / 4) & kernels::kE5m6Mask;
        if (i % 2 == 0) {
          at[0] = static_cast<std::byte>(code & 0xFF);
          at[1] = static_cast<std::byte>(code >> 8);
        } else {
          at[0] |= static_cast<std::byte>((code & 0xF) << 4);
          at[1] = static_cast<std::byte>(code >> 4);
        }
        break;
      }
    }
  }
  return block;
}

}  // namespace

Scratch::Scratch(kernels::Device& device, std::int64_t rotation_bytes, std::int64_t limit_bytes,
                 std::uint64_t seed)
    : device_(device),
      rotation_bytes_(aligned(rotation_bytes)),
      limit_bytes_(limit_bytes),
      seed_(seed) {}

Scratch::~Scratch() {
  clear();
}

std::byte* Scratch::allocate(std::int64_t bytes) {
  if (bytes > limit_bytes_ - allocated_bytes_) throw std::bad_alloc();
  auto* memory = static_cast<std::byte*>(device_.allocate(static_cast<std::size_t>(bytes)));
  allocated_bytes_ += bytes;
  return memory;
}

void Scratch::release(std::byte* memory, std::int64_t bytes) {
  device_.release(memory);
  allocated_bytes_ -= bytes;
}

void Scratch::release_retired() {
  for (const auto& [memory, bytes] : retired_) release(memory, bytes);
  retired_.clear();
}

void Scratch::make(Pool& pool, Key key, std::int64_t bytes) {
  if (pool.memory != nullptr) retired_.emplace_back(pool.memory, pool.bytes);
  pool = {};
  pool.memory = allocate(bytes);  // throws: then the pool is empty
  pool.bytes = bytes;
  const auto [content, format] = key;
  if (content == Content::outputs) return;
  std::vector<std::byte>& block = blocks_[key];
  if (block.empty()) block = random_block(content, format, seed_);
  const auto size = static_cast<std::int64_t>(block.size());
  for (std::int64_t at = 0; at < bytes; at += size) {
    device_.upload(pool.memory + at, block.data(),
                   static_cast<std::size_t>(std::min(size, bytes - at)));
  }
}

std::byte* Scratch::take(Key key, std::int64_t count) {
  const std::int64_t bytes = aligned(std::max<std::int64_t>(count, 1));
  Pool& pool = pools_[key];
  // At the end it goes on at the front, unless this slot's operands are there.
  const bool fits = pool.next + bytes <= (pool.wrapped ? pool.slot_begin : pool.bytes);
  const bool fits_in_front = !pool.wrapped && bytes <= pool.slot_begin;
  if (!fits && !fits_in_front) {
    // What the slot has of the old pool stays valid until the op is done; the next slot finds room
    // for all of it in the new one.
    const std::int64_t used =
        pool.wrapped ? pool.bytes - pool.slot_begin + pool.next : pool.next - pool.slot_begin;
    make(pool, key, std::max(rotation_bytes_, used + bytes));
  } else if (!fits) {
    pool.next = 0;
    pool.wrapped = true;
  }
  std::byte* const memory = pool.memory + pool.next;
  pool.next += bytes;
  slot_bytes_ += bytes;
  return memory;
}

kernels::Matrix Scratch::matrix(std::int64_t rows, std::int64_t columns, Format format,
                                Content content, kernels::Scaling scaling) {
  kernels::Matrix m{
      .rows = rows, .columns = columns, .pitch = columns, .format = format, .scaling = scaling};
  // Outputs are of no kind: one pool serves all formats.
  const Format kind = content == Content::outputs ? Format::fp32 : format;
  m.data = take({content, kind}, kernels::element_bytes(rows, columns, format));
  if (scaling != kernels::Scaling::none) {
    m.scales = floats(kernels::scale_elements(rows, columns, scaling),
                      content == Content::outputs ? content : Content::positive);
    m.scale_pitch = kernels::scale_pitch_of(rows, columns, scaling);
  }
  return m;
}

float* Scratch::floats(std::int64_t count, Content content) {
  return reinterpret_cast<float*>(
      take({content, Format::fp32}, count * static_cast<std::int64_t>(sizeof(float))));
}

void* Scratch::bytes(std::int64_t count) {
  return take({Content::outputs, Format::fp32}, count);
}

const std::int32_t* Scratch::indices(const std::vector<std::int32_t>& values) {
  return static_cast<const std::int32_t*>(
      constant(values.data(), values.size() * sizeof(std::int32_t)));
}

const void* Scratch::constant(const void* data, std::size_t bytes) {
  std::string value(static_cast<const char*>(data), bytes);
  const auto known = constants_.find(value);
  if (known != constants_.end()) return known->second;
  std::byte* const memory = allocate(static_cast<std::int64_t>(std::max<std::size_t>(bytes, 1)));
  device_.upload(memory, data, bytes);
  return constants_.emplace(std::move(value), memory).first->second;
}

void Scratch::begin_op() {
  for (const auto& [value, memory] : constants_) {
    release(memory, static_cast<std::int64_t>(std::max<std::size_t>(value.size(), 1)));
  }
  constants_.clear();
  release_retired();
  for (auto& [key, pool] : pools_) pool.op_begin = pool.next;
  begin_slot();
}

void Scratch::repeat_weights() {
  for (auto& [key, pool] : pools_) {
    if (key.first == Content::weights) pool.next = pool.op_begin;
  }
}

void Scratch::clear() {
  begin_op();
  for (auto& [key, pool] : pools_) {
    if (pool.memory != nullptr) release(pool.memory, pool.bytes);
  }
  pools_.clear();
}

void Scratch::begin_slot() {
  slot_bytes_ = 0;
  for (auto& [key, pool] : pools_) {
    pool.slot_begin = pool.next;
    pool.wrapped = false;
  }
}

}  // namespace orrery
