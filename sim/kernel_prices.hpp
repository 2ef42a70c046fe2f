#pragma once
// Prices of kernels: GEMM, attention core, streaming kernels.

#include "sim/price.hpp"

namespace orrery {

/// `sms`: SMs the kernel may use; 0 means all of the device.
Price price_gemm(const Gemm& gemm, int sms, const Profile& profile);
Price price_attention(const AttentionCore& core, int sms, const Profile& profile);
Price price_streaming(const Streaming& streaming, int sms, const Profile& profile);

}  // namespace orrery
