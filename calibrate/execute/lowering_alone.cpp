// A rank whose peers are not there: what it would exchange with them is copied on its own device.

#include <fmt/core.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "calibrate/execute/rank_lowering.hpp"
#include "sim/check.hpp"
#include "sim/exchange.hpp"
#include "sim/random.hpp"

namespace orrery {

using kernels::Matrix;
using Kind = Communication::Kind;

void RankLowering::find_mean_received() {
  mean_received_ = local_tokens_;
  for (const Shape& shape : program_.shapes()) {
    const auto* exchange = std::get_if<ExpertExchange>(&shape.work);
    if (exchange == nullptr) continue;
    mean_received_ =
        std::llround(static_cast<double>(local_tokens_) * mean_gpus_per_token(*exchange));
    return;
  }
}

/// Tokens of all ranks of the group, as many as come to a rank on average; they want its experts in
/// turn, and all of them together as many rows as they do on average.
void RankLowering::make_received() {
  const std::int64_t top_k = model_.moe->top_k;
  const std::int64_t local = model_.moe->routed_experts / plan_.parallelism.ep;
  const std::int64_t received = received_capacity(), rows = local_tokens_ * top_k;
  std::vector<std::int32_t> experts(static_cast<std::size_t>(received * top_k), -1);
  std::vector<float> weights(experts.size(), 0.0F);
  for (std::int64_t row = 0; row < rows; ++row) {
    const std::int64_t token = row % received, choice = row / received;
    if (choice >= std::min(local, top_k)) break;
    const auto at = static_cast<std::size_t>(token * top_k + choice);
    experts[at] = static_cast<std::int32_t>((token + choice) % local);
    weights[at] = 1 / static_cast<float>(top_k);
  }
  kernels::Device& device = tensors_.device();
  device.upload(kept_array<std::int32_t>("received experts", received * top_k), experts.data(),
                experts.size() * sizeof(std::int32_t));
  device.upload(kept_array<float>("received weights", received * top_k), weights.data(),
                weights.size() * sizeof(float));
  const auto count = static_cast<std::int32_t>(received);
  device.upload(kept_array<std::int32_t>("received tokens", 1), &count, sizeof count);
}

void RankLowering::copy_instead(OpId op) {
  const Communication c = *std::exchange(lowered_op_.communication, std::nullopt);
  const Shape& shape = program_.shapes()[program_.shape(op)];
  const auto bytes_of_matrix = [](const Matrix& m) {
    return m.rows * m.columns * kernels::bits_of(m.format) / 8;
  };
  /// Copies a share of a tensor to where a peer's would be.
  const auto copy = [&](const Matrix& from, std::int64_t numerator, std::int64_t denominator) {
    const std::int64_t bytes = bytes_of_matrix(from) / denominator * numerator;
    if (bytes == 0) return;
    call(kernels::Loopback{.from = from.data,
                           .to = tensors_.bytes(fmt::format("peer {}", bytes), bytes),
                           .bytes = bytes});
  };
  const auto* collective = std::get_if<Collective>(&shape.work);
  const std::int64_t ranks = collective != nullptr ? collective->ranks : 1;
  switch (c.kind) {
    case Kind::send:
      return copy(c.in, 1, 1);
    case Kind::receive: {
      const std::int64_t bytes = bytes_of_matrix(c.out);
      call(kernels::Loopback{
          .from = made_up(c.out, program_.tag(op).phase == Phase::pipeline_backward),
          .to = c.out.data,
          .bytes = bytes});
      return;
    }
    case Kind::all_reduce:  // in a ring each rank sends nearly all of it twice
      copy(c.out, ranks - 1, ranks);
      return copy(c.out, ranks - 1, ranks);
    case Kind::reduce_scatter:
      return copy(c.in, ranks - 1, ranks);
    case Kind::all_gather:
      return copy(c.out, ranks - 1, ranks);
    case Kind::sum_of_squares:
      return;
    case Kind::dispatch: {
      if (c.new_route) make_received();
      const std::int64_t received = received_capacity();
      auto* used = tensors_.array<std::int32_t>("tokens from peers", 1);
      auto* source = tensors_.array<std::int32_t>("sources of peers' tokens", received);
      std::vector<std::int32_t> sources(static_cast<std::size_t>(received));
      for (std::int64_t r = 0; r < received; ++r) {
        sources[static_cast<std::size_t>(r)] = static_cast<std::int32_t>(r % local_tokens_);
      }
      const auto count = static_cast<std::int32_t>(received);
      tensors_.device().upload(source, sources.data(), sources.size() * sizeof(std::int32_t));
      tensors_.device().upload(used, &count, sizeof count);
      call(kernels::Permute{.from = c.in, .to = c.out, .row_source = source, .used_rows = used});
      return;
    }
    case Kind::combine: {
      const std::int64_t received = received_capacity();
      const std::int64_t copies = (received + local_tokens_ - 1) / local_tokens_;
      auto* rows = tensors_.array<std::int32_t>("rows of tokens at peers", local_tokens_ * copies);
      std::vector<std::int32_t> of_token(static_cast<std::size_t>(local_tokens_ * copies), -1);
      for (std::int64_t r = 0; r < received; ++r) {
        of_token[static_cast<std::size_t>(r % local_tokens_ * copies + r / local_tokens_)] =
            static_cast<std::int32_t>(r);
      }
      tensors_.device().upload(rows, of_token.data(), of_token.size() * sizeof(std::int32_t));
      call(kernels::Unpermute{.from = c.in, .to = c.out, .slot_row = rows, .top_k = copies});
      if (c.token_values != nullptr) {
        call(kernels::Loopback{
            .from = c.slot_values, .to = c.token_values, .bytes = 4 * local_tokens_ * c.top_k});
      }
      return;
    }
  }
}

/// Activations (normal, deviation 1) or gradients (as small as a mean over the batch makes them).
const void* RankLowering::made_up(const Matrix& like, bool gradient) {
  const std::int64_t elements = like.rows * like.columns;
  const std::string name = gradient ? "gradients from peers" : "activations from peers";
  const std::size_t before = tensors_.pieces();
  const Matrix m = tensors_.matrix(name, like.rows, like.columns, like.format);
  if (tensors_.pieces() == before) return m.data;
  Random random(scenario_.seed);
  const double deviation = gradient ? 1e-6 : 1;
  std::vector<float> values(static_cast<std::size_t>(elements));
  for (float& v : values) v = static_cast<float>(deviation * random.normal());
  if (like.format == kernels::Format::fp32) {
    tensors_.device().upload(m.data, values.data(), values.size() * sizeof(float));
  } else {
    std::vector<std::uint16_t> rounded(values.size());
    std::transform(values.begin(), values.end(), rounded.begin(), kernels::bf16_of);
    tensors_.device().upload(m.data, rounded.data(), rounded.size() * sizeof(std::uint16_t));
  }
  return m.data;
}

}  // namespace orrery
