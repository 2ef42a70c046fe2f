#pragma once
// What launchers keep between calls on one device: handles of libraries, plans by shape. Each
// family of kernels has a type of its own, made when first asked for, so that none knows the
// others.

#include <memory>
#include <typeindex>
#include <unordered_map>

namespace orrery::kernels::cuda {

class Libraries {
 public:
  /// The device's T, default-constructed the first time. One thread at a time.
  template <class T>
  T& get() {
    std::shared_ptr<void>& entry = entries_[std::type_index(typeid(T))];
    if (!entry) entry = std::make_shared<T>();
    return *static_cast<T*>(entry.get());
  }

 private:
  std::unordered_map<std::type_index, std::shared_ptr<void>> entries_;
};

}  // namespace orrery::kernels::cuda
