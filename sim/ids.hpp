#pragma once
// Typed indices. An Id<Tag> is a 32-bit index that cannot be mixed up with an index of another kind;
// an IdVector<Id, T> is a vector that only that kind of id can index: `timeline.start_ps[op]`.

#include <compare>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace orrery {

template <class Tag>
struct Id {
  std::uint32_t value = 0;

  constexpr Id() = default;
  constexpr explicit Id(std::size_t v) : value(static_cast<std::uint32_t>(v)) {}
  constexpr auto operator<=>(const Id&) const = default;
  constexpr Id& operator++() {
    ++value;
    return *this;
  }
};

using OpId = Id<struct OpTag>;          ///< an operation of a Program
using ShapeId = Id<struct ShapeTag>;    ///< a distinct priced shape
using StreamId = Id<struct StreamTag>;  ///< an in-order queue of one rank
using RankId = Id<struct RankTag>;      ///< a simulated rank (a class representative or a real rank)

template <class IdType, class T>
class IdVector : public std::vector<T> {
 public:
  using std::vector<T>::vector;
  decltype(auto) operator[](IdType id) { return std::vector<T>::operator[](id.value); }
  decltype(auto) operator[](IdType id) const { return std::vector<T>::operator[](id.value); }
};

}  // namespace orrery
