#pragma once
// Collectives against closed forms and plain loops, on any Transport. All ranks call check_all();
// what is wrong is thrown.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "calibrate/transport/collectives.hpp"
#include "kernels/format.hpp"

namespace orrery::collective_checks {

template <class T>
std::span<std::byte> bytes(std::vector<T>& v) {
  return std::as_writable_bytes(std::span(v));
}
template <class T>
std::span<const std::byte> bytes(const std::vector<T>& v) {
  return std::as_bytes(std::span(v));
}

template <class T>
void expect(const std::vector<T>& got, const std::vector<T>& wanted, const std::string& what) {
  if (got.size() == wanted.size() &&
      (got.empty() || std::memcmp(got.data(), wanted.data(), got.size() * sizeof(T)) == 0)) {
    return;
  }
  for (std::size_t i = 0; i < std::min(got.size(), wanted.size()); ++i) {
    if (std::memcmp(&got[i], &wanted[i], sizeof(T)) == 0) continue;
    throw std::runtime_error(what + ": element " + std::to_string(i) + " of " +
                             std::to_string(got.size()) + " is " + std::to_string(got[i]) +
                             ", not " + std::to_string(wanted[i]));
  }
  throw std::runtime_error(what + ": sizes differ");
}

struct Fp32 {
  using Stored = float;
  static constexpr ElementType type = ElementType::fp32;
  static float of(double value) { return static_cast<float>(value); }
  static double value(float stored) { return stored; }
  static float sum(const std::vector<float>& terms) {
    float total = terms[0];
    for (std::size_t i = 1; i < terms.size(); ++i) total += terms[i];
    return total;
  }
};
struct Fp64 {
  using Stored = double;
  static constexpr ElementType type = ElementType::fp64;
  static double of(double value) { return value; }
  static double value(double stored) { return stored; }
  static double sum(const std::vector<double>& terms) {
    double total = terms[0];
    for (std::size_t i = 1; i < terms.size(); ++i) total += terms[i];
    return total;
  }
};
struct Bf16 {
  using Stored = std::uint16_t;
  static constexpr ElementType type = ElementType::bf16;
  static std::uint16_t of(double value) { return kernels::bf16_of(static_cast<float>(value)); }
  static double value(std::uint16_t stored) { return kernels::float_of_bf16(stored); }
  static std::uint16_t sum(const std::vector<std::uint16_t>& terms) {
    float total = kernels::float_of_bf16(terms[0]);
    for (std::size_t i = 1; i < terms.size(); ++i) total += kernels::float_of_bf16(terms[i]);
    return kernels::bf16_of(total);
  }
};

/// What member m holds at element i: of mixed magnitudes, so that the order of a sum shows.
template <class F>
typename F::Stored term(std::size_t m, std::size_t i) {
  const std::uint64_t h = (m * 1'000'003 + i * 7919 + 17) * 0x9E3779B97F4A7C15;
  const double mantissa = static_cast<double>(h >> 40) / (1 << 24) - 0.5;
  return F::of(std::ldexp(mantissa, static_cast<int>(h & 15)));
}

template <class F>
std::vector<typename F::Stored> terms_of(std::size_t member, std::size_t elements) {
  std::vector<typename F::Stored> terms(elements);
  for (std::size_t i = 0; i < elements; ++i) terms[i] = term<F>(member, i);
  return terms;
}

template <class F>
std::vector<typename F::Stored> sums_of(std::size_t members, std::size_t elements) {
  std::vector<typename F::Stored> sums(elements);
  std::vector<typename F::Stored> terms(members);
  for (std::size_t i = 0; i < elements; ++i) {
    for (std::size_t m = 0; m < members; ++m) terms[m] = term<F>(m, i);
    sums[i] = F::sum(terms);
  }
  return sums;
}

template <class F>
void check_sums(const GroupOp& op, std::size_t member, std::size_t elements) {
  const std::size_t members = op.group.size();
  const std::string on = " of " + std::to_string(elements) + " " + std::string(name_of(F::type)) +
                         " on " + std::to_string(members);

  auto buffer = terms_of<F>(member, elements);
  all_reduce(op, F::type, bytes(buffer));
  expect(buffer, sums_of<F>(members, elements), "all_reduce" + on);

  // Whole numbers, which no order changes: i (1 + 2 + ... + n), within bf16's 8 bits.
  std::vector<typename F::Stored> whole(elements);
  std::vector<typename F::Stored> wanted(elements);
  for (std::size_t i = 0; i < elements; ++i) {
    const auto v = static_cast<double>(i % 7);
    whole[i] = F::of(v * static_cast<double>(member + 1));
    wanted[i] = F::of(v * static_cast<double>(members * (members + 1) / 2));
  }
  all_reduce(op, F::type, bytes(whole));
  expect(whole, wanted, "all_reduce of whole numbers" + on);

  auto shards = terms_of<F>(member, elements * members);
  const auto sums = sums_of<F>(members, elements * members);
  const auto begin = static_cast<std::ptrdiff_t>(member * elements);
  const auto end = static_cast<std::ptrdiff_t>((member + 1) * elements);
  const std::vector own_sums(sums.begin() + begin, sums.begin() + end);
  std::vector<typename F::Stored> own(elements);
  reduce_scatter(op, F::type, bytes(shards), bytes(own));
  expect(own, own_sums, "reduce_scatter" + on);
  reduce_scatter(
      op, F::type, bytes(shards),
      bytes(shards).subspan(member * elements * sizeof(own[0]), elements * sizeof(own[0])));
  expect({shards.begin() + begin, shards.begin() + end}, own_sums, "reduce_scatter in place" + on);
}

inline void check_copies(const GroupOp& op, std::size_t member, std::size_t elements) {
  using F = Fp32;
  const std::size_t members = op.group.size();
  const std::string on = " of " + std::to_string(elements) + " on " + std::to_string(members);

  std::vector<float> all;
  for (std::size_t m = 0; m < members; ++m) {
    const auto theirs = terms_of<F>(m, elements);
    all.insert(all.end(), theirs.begin(), theirs.end());
  }
  std::vector<float> whole(all.size());
  all_gather(op, bytes(terms_of<F>(member, elements)), bytes(whole));
  expect(whole, all, "all_gather" + on);

  for (std::size_t root = 0; root < members; ++root) {
    auto buffer = terms_of<F>(member, elements);
    broadcast(op, root, bytes(buffer));
    expect(buffer, terms_of<F>(root, elements), "broadcast" + on);
  }
}

/// m sends (m + 2 k) % 5 * `elements` elements to k, of values that tell both.
inline void check_all_to_all(const GroupOp& op, std::size_t member, std::size_t elements) {
  const std::size_t members = op.group.size();
  const auto count = [&](std::size_t from, std::size_t to) {
    return (from + 2 * to) % 5 * elements;
  };
  const auto value = [](std::size_t from, std::size_t to, std::size_t i) {
    return from * 1'000'000'000 + to * 1'000'000 + i;
  };
  std::vector<std::uint64_t> counts;
  std::vector<std::uint64_t> sent;
  std::vector<std::uint64_t> sent_bytes;
  for (std::size_t to = 0; to < members; ++to) {
    counts.push_back(count(member, to));
    sent_bytes.push_back(counts.back() * sizeof(std::uint64_t));
    for (std::size_t i = 0; i < counts.back(); ++i) sent.push_back(value(member, to, i));
  }
  const std::vector<std::uint64_t> coming = exchange_counts(op, counts);
  std::vector<std::uint64_t> coming_wanted;
  std::vector<std::uint64_t> wanted;
  std::vector<std::uint64_t> received_bytes;
  for (std::size_t from = 0; from < members; ++from) {
    coming_wanted.push_back(count(from, member));
    received_bytes.push_back(coming[from] * sizeof(std::uint64_t));
    for (std::size_t i = 0; i < coming_wanted.back(); ++i) {
      wanted.push_back(value(from, member, i));
    }
  }
  expect(coming, coming_wanted, "exchange_counts");
  // Room for the most there can be, of which only what came is written.
  wanted.push_back(7);
  std::vector<std::uint64_t> received(wanted.size(), 7);
  all_to_all(op, bytes(sent), sent_bytes, bytes(received), received_bytes);
  expect(received, wanted, "all_to_all of " + std::to_string(elements));
}

inline void check_group(Transport& transport, const std::vector<int>& group,
                        const std::vector<std::size_t>& sizes) {
  std::size_t member = 0;
  while (member < group.size() && group[member] != transport.rank()) ++member;
  if (member == group.size()) return;
  std::uint64_t tag = 0;
  for (const std::size_t elements : sizes) {
    const auto op = [&] {
      return GroupOp{.transport = transport, .group = group, .tag = ++tag, .name = "check"};
    };
    check_sums<Fp32>(op(), member, elements);
    check_sums<Fp64>(op(), member, elements);
    check_sums<Bf16>(op(), member, elements);
    check_copies(op(), member, elements);
    check_all_to_all(op(), member, elements);
  }
}

/// All ranks, the even ones, and the odd ones backwards.
inline void check_all(Transport& transport, const std::vector<std::size_t>& sizes) {
  std::vector<int> all(static_cast<std::size_t>(transport.ranks()));
  std::iota(all.begin(), all.end(), 0);
  std::vector<int> even;
  std::vector<int> odd;
  for (const int rank : all) (rank % 2 == 0 ? even : odd).push_back(rank);
  check_group(transport, all, sizes);
  check_group(transport, even, sizes);
  check_group(transport, {odd.rbegin(), odd.rend()}, sizes);
}

}  // namespace orrery::collective_checks
