// NVIDIA's own conversions, which cuda_fp8.h and cuda_bf16.h also have for the host. Only where
// CMake finds the headers.
#if defined(ORRERY_CUDA_HEADERS)

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "kernels/format.hpp"

namespace orrery::kernels {
namespace {

TEST(FormatCuda, AllE4m3Values) {
  for (int code = 0; code < 256; ++code) {
    __nv_fp8_e4m3 theirs;
    theirs.__x = static_cast<__nv_fp8_storage_t>(code);
    const float ours = float_of_e4m3(static_cast<std::uint8_t>(code));
    if (std::isnan(ours)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(theirs))) << code;
    } else {
      EXPECT_EQ(std::bit_cast<std::uint32_t>(static_cast<float>(theirs)),
                std::bit_cast<std::uint32_t>(ours))
          << code;
    }
  }
}

TEST(FormatCuda, RoundingOfFloats) {
  // An odd step: every exponent, and all patterns of the low bits.
  std::uint32_t bits = 0;
  do {
    const auto x = std::bit_cast<float>(bits);
    if (std::isnan(x)) {
      ASSERT_EQ(e4m3_of(x) & 0x7F, __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3) & 0x7F);
    } else {
      ASSERT_EQ(e4m3_of(x), __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3)) << x;
      ASSERT_EQ(bf16_of(x), __nv_bfloat16_raw(__float2bfloat16_rn(x)).x) << x;
    }
    bits += 257;
  } while (bits >= 257);
}

}  // namespace
}  // namespace orrery::kernels

#endif
