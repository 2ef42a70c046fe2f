#pragma once
// Prices of kernels: GEMM, attention core, streaming kernels. Each family has a skeleton, a formula
// with the physics that makes times jump (tiles, waves of tiles over SMs, memory bandwidth), and
// what is left over, the residual of measured points against the skeleton, is smooth enough to be
// averaged locally.

#include <optional>
#include <string_view>

#include "sim/price.hpp"

namespace orrery {

/// `sms`: SMs the kernel may use; 0 means all of the device.
Price price_gemm(const Gemm& gemm, int sms, const Profile& profile);
Price price_attention(const AttentionCore& core, int sms, const Profile& profile);
Price price_cached_attention(const CachedAttention& attention, int sms, const Profile& profile);
/// `label`: the op in the model; two ops of one kind with the same bytes can differ.
Price price_streaming(const Streaming& streaming, std::string_view label, int sms,
                      const Profile& profile);

/// The shape that a table's point measured.
Gemm gemm_of(const GemmTable& table, const GemmPoint& point);

/// The skeleton's time in seconds on `sms` SMs, of which the memory bandwidth reaches
/// `bandwidth_share`.
double gemm_skeleton_s(const GemmModel& model, const Gemm& gemm, int sms, double bandwidth_share);
double attention_skeleton_s(const AttentionModel& model, const AttentionCore& core, int sms);
double cached_skeleton_s(const CachedModel& model, const CachedAttention& attention, int sms,
                         const Profile& profile);
/// From the start of the first launch to the end of the last, by `profile`'s rate for the kind.
double streaming_skeleton_s(const StreamingRate& rate, const Streaming& streaming, int sms,
                            const Profile& profile);

/// The table's own estimate in seconds, the launch gap not included: skeleton times local residual.
double table_seconds(const GemmTable& table, const Gemm& gemm, int sms, double bandwidth_share);
double table_seconds(const AttentionTable& table, const AttentionCore& core, int sms);
double table_seconds(const CachedTable& table, const CachedAttention& attention, int sms,
                     const Profile& profile);
/// None where no point of this kind is near (a factor of two beyond the bytes measured).
std::optional<double> table_seconds(const StreamingRate& rate, const Streaming& streaming,
                                    std::string_view label, int sms, const Profile& profile);

/// Dense rate of GEMMs and attention on operands of this format.
double peak_flops_per_s(NumberFormat format, const Device& device);

/// Share of the memory bandwidth that `sms` SMs reach.
double bandwidth_share(const Profile& profile, int sms);

void prepare(GemmTable& table, const Profile& profile);
void prepare(AttentionTable& table);
void prepare(CachedTable& table, const Profile& profile);
void prepare(StreamingKind kind, StreamingRate& rate, const Profile& profile);

}  // namespace orrery
