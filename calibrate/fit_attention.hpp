#pragma once
// Constants of the attention skeleton from measured cores, and how well it foretells others.

#include <string>

#include "calibrate/fit_gemm.hpp"
#include "sim/profile.hpp"

namespace orrery {

/// Minimises mean(min(|ln(measured / skeleton)|, 2)) over the three constants, by the simplex
/// method of Nelder and Mead on their logarithms, and prepares the table. No fit may need
/// arithmetic faster than `peak_flops_per_s_per_sm`, nor more than 0.2 ms to start.
void fit_attention(AttentionTable& table, double peak_flops_per_s_per_sm);

/// Error of each point when the others predict it (for tables of a dozen points).
HeldOutError leave_one_out(const AttentionTable& table, const std::string& family);

}  // namespace orrery
