#pragma once
// The memory of one rank while it executes a Program: named tensors, allocated when first asked
// for.

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/device.hpp"

namespace orrery {

/// Owns what it hands out, on a device, until it is destroyed.
class Tensors {
 public:
  explicit Tensors(kernels::Device& device) : device_(device) {}
  ~Tensors();
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;

  kernels::Device& device() const { return device_; }

  /// The memory of this name; all requests for a name must ask for the same size. New memory is
  /// zero.
  /// std::runtime_error where the device has none left.
  void* bytes(const std::string& name, std::int64_t count);
  template <class T>
  T* array(const std::string& name, std::int64_t count) {
    return static_cast<T*>(bytes(name, count * static_cast<std::int64_t>(sizeof(T))));
  }
  /// Contiguous, with scales behind the elements.
  kernels::Matrix matrix(const std::string& name, std::int64_t rows, std::int64_t columns,
                         kernels::Format format, kernels::Scaling scaling = kernels::Scaling::none);

  /// Which piece of memory an address lies in; none if it is not from here.
  std::optional<std::size_t> piece_of(const void* address) const;
  std::size_t pieces() const { return names_.size(); }
  const std::string& name_of_piece(std::size_t piece) const { return names_[piece]; }
  std::int64_t total_bytes() const { return total_bytes_; }

 private:
  struct Piece {
    std::byte* begin = nullptr;
    std::int64_t bytes = 0;
    std::size_t index = 0;
  };
  kernels::Device& device_;
  std::map<std::string, Piece> by_name_;
  std::map<const std::byte*, const Piece*> by_begin_;
  std::vector<std::string> names_;
  std::int64_t total_bytes_ = 0;
};

/// The columns [first, first + count) of a matrix without scales.
kernels::Matrix columns_of(const kernels::Matrix& m, std::int64_t first, std::int64_t count);
/// The rows [first, first + count); with block scales `first` is a multiple of 128.
kernels::Matrix rows_of(const kernels::Matrix& m, std::int64_t first, std::int64_t count);

}  // namespace orrery
