#include "kernels/cuda/tensor_map.hpp"

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "kernels/cuda/launch.hpp"

namespace orrery::kernels::cuda {

namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const PFN_cuTensorMapEncodeTiled_v12000 function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cudaGetDriverEntryPointByVersion(cuTensorMapEncodeTiled)");
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
      throw std::runtime_error(
          "the driver has no cuTensorMapEncodeTiled: it is older than CUDA 12.0");
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return function;
}

}  // namespace

CUtensorMap make_map(const MapRequest& r) {
  const CUtensorMapDataType type = r.element == MapElement::byte ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                                   : r.element == MapElement::bf16
                                       ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                       : CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(r.columns), static_cast<cuuint64_t>(r.rows)};
  const cuuint64_t pitches[1] = {static_cast<cuuint64_t>(r.pitch_bytes)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(r.box_columns),
                             static_cast<cuuint32_t>(r.box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, type, 2, const_cast<void*>(r.data), sizes, pitches, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE,
                r.swizzled ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result) + " for " +
                             std::to_string(r.rows) + "x" + std::to_string(r.columns) + ", rows " +
                             std::to_string(r.pitch_bytes) + " bytes apart, boxes of " +
                             std::to_string(r.box_rows) + "x" + std::to_string(r.box_columns));
  }
  return map;
}

CUtensorMap make_map(const void* data, const std::int64_t (&sizes)[4],
                     const std::int64_t (&strides)[4], const int (&box)[4]) {
  cuuint64_t extents[4];
  cuuint64_t pitches[3];
  cuuint32_t boxes[4];
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    extents[i] = static_cast<cuuint64_t>(sizes[i]);
    boxes[i] = static_cast<cuuint32_t>(box[i]);
    if (i > 0) pitches[i - 1] = static_cast<cuuint64_t>(strides[i]) * 2;
  }
  CUtensorMap map;
  const CUresult result =
      encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<void*>(data), extents,
                pitches, boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    std::string text = "cuTensorMapEncodeTiled: error " + std::to_string(result) + " for";
    for (int i = 0; i < 4; ++i) {
      text += i == 0 ? " " : " x ";
      text += std::to_string(sizes[i]);
      text += " (strides " + std::to_string(strides[i]) + ", boxes " + std::to_string(box[i]) + ")";
    }
    throw std::runtime_error(text);
  }
  return map;
}

}  // namespace orrery::kernels::cuda
