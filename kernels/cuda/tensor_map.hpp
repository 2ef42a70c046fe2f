#pragma once
// Descriptions of matrices for the copy engine (TMA). Made by the driver, whose function is looked
// up at run time, so that nothing links with libcuda.

#include <cuda.h>

#include <cstdint>

namespace orrery::kernels::cuda {

enum class MapElement { byte, bf16, fp32 };

/// A row-major matrix of which boxes are loaded; what a box has outside of it reads as zero.
/// `swizzled`: rows of a box are 128 bytes and stored with the 128-byte swizzle. `data` and
/// `pitch_bytes` are multiples of 16, a box has at most 256 rows and columns. Throws
/// std::runtime_error.
struct MapRequest {
  const void* data = nullptr;
  MapElement element = MapElement::byte;
  std::int64_t rows = 0, columns = 0, pitch_bytes = 0;
  int box_rows = 0, box_columns = 0;
  bool swizzled = true;
};
CUtensorMap make_map(const MapRequest& request);

/// BF16 of four dimensions, the fastest first (`strides` in elements, the first is 1), of which
/// boxes are loaded, swizzled. Throws std::runtime_error.
CUtensorMap make_map(const void* data, const std::int64_t (&sizes)[4],
                     const std::int64_t (&strides)[4], const int (&box)[4]);

}  // namespace orrery::kernels::cuda
