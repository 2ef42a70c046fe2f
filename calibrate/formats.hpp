#pragma once
// Number formats of plans as kernels know them.

#include <optional>

#include "kernels/format.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// None for FP8 with one scale per tensor, for which there are no kernels.
inline std::optional<kernels::Format> format_of(NumberFormat format) {
  switch (format) {
    case NumberFormat::fp32:
      return kernels::Format::fp32;
    case NumberFormat::bf16:
      return kernels::Format::bf16;
    case NumberFormat::fp8_block:
      return kernels::Format::e4m3;
    case NumberFormat::e5m6:
      return kernels::Format::e5m6;
    case NumberFormat::fp8_tensor:
      return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace orrery
