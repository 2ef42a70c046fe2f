#pragma once
// Which message goes to which receive: by (sender, tag), in the order of each side.

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <utility>

namespace orrery {

/// One rank's arrivals without a receive, and receives without an arrival; of any (sender, tag)
/// there are only ever some of one of the two. Not synchronised.
template <class Arrival, class Receive>
class Matcher {
 public:
  /// The receive that takes this arrival, or nothing: then it is moved from and kept.
  std::optional<Receive> arrive(int from, std::uint64_t tag, Arrival& arrival) {
    return meet(receives_, arrivals_, {from, tag}, arrival);
  }
  std::optional<Arrival> receive(int from, std::uint64_t tag, Receive& receive) {
    return meet(arrivals_, receives_, {from, tag}, receive);
  }
  bool has_receives() const { return !receives_.empty(); }

 private:
  using Key = std::pair<int, std::uint64_t>;

  template <class Waiting, class Coming>
  static std::optional<Waiting> meet(std::map<Key, std::deque<Waiting>>& waiting,
                                     std::map<Key, std::deque<Coming>>& others, Key key,
                                     Coming& coming) {
    const auto found = waiting.find(key);
    if (found == waiting.end()) {
      others[key].push_back(std::move(coming));
      return std::nullopt;
    }
    Waiting first = std::move(found->second.front());
    found->second.pop_front();
    if (found->second.empty()) waiting.erase(found);
    return first;
  }

  std::map<Key, std::deque<Arrival>> arrivals_;
  std::map<Key, std::deque<Receive>> receives_;
};

}  // namespace orrery
