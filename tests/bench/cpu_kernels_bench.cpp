// Calls that stream through memory, on the CPU: bytes that have to move once a second, beside a
// memcpy of as many. Sizes are those of DeepSeek-V3 with enough rows to leave the caches.

#include <benchmark/benchmark.h>

#include <cstring>
#include <random>
#include <vector>

#include "kernels/device.hpp"

namespace orrery::kernels {
namespace {

constexpr std::int64_t kHidden = 7168, kRows = 1024, kExperts = 256, kTopK = 8;

/// Memory of one benchmark; random FP32 of magnitude 0.1 to 1, or BF16, or codes of both.
class Operands {
 public:
  explicit Operands(int threads) : device_(open_cpu_device(threads)) {}

  Device& device() { return *device_; }

  template <class Element>
  Element* array(const std::vector<Element>& values) {
    auto* memory = static_cast<Element*>(device_->allocate(values.size() * sizeof(Element)));
    device_->upload(memory, values.data(), values.size() * sizeof(Element));
    return memory;
  }
  float* floats(std::int64_t count) {
    std::vector<float> values(static_cast<std::size_t>(count));
    for (float& v : values) v = uniform();
    return array(values);
  }
  std::int32_t* ints(std::int64_t count, std::int32_t below) {
    std::vector<std::int32_t> values(static_cast<std::size_t>(count));
    for (auto& v : values) v = static_cast<std::int32_t>(random_() % static_cast<unsigned>(below));
    return array(values);
  }
  Matrix matrix(std::int64_t rows, std::int64_t columns, Format format = Format::bf16,
                Scaling scaling = Scaling::none) {
    Matrix m{.rows = rows, .columns = columns, .pitch = columns, .format = format};
    m.scaling = scaling;
    if (format == Format::fp32) {
      m.data = floats(rows * columns);
    } else if (format == Format::bf16) {
      std::vector<std::uint16_t> values(static_cast<std::size_t>(rows * columns));
      for (auto& v : values) v = bf16_of(uniform());
      m.data = array(values);
    } else {
      std::vector<std::uint8_t> bytes(
          static_cast<std::size_t>(element_bytes(rows, columns, format)));
      for (auto& b : bytes) b = static_cast<std::uint8_t>(random_() % 0x7F);
      m.data = array(bytes);
    }
    if (scaling != Scaling::none) {
      m.scales = floats(scale_elements(rows, columns, scaling));
      m.scale_pitch = scale_pitch_of(rows, columns, scaling);
    }
    return m;
  }
  float uniform() { return 0.1F + 0.9F * static_cast<float>(random_() % 65536) / 65536; }

 private:
  std::unique_ptr<Device> device_;
  std::mt19937 random_{1};
};

using Make = Call (*)(Operands&);

void run(benchmark::State& state, Make make) {
  Operands operands(static_cast<int>(state.range(0)));
  const Call call = make(operands);
  const StreamHandle stream = operands.device().create_stream();
  for (auto _ : state) {
    operands.device().enqueue(stream, call);
    operands.device().synchronize();
  }
  state.SetBytesProcessed(
      static_cast<std::int64_t>(static_cast<double>(state.iterations()) * cost_of(call).bytes));
}

#define ORRERY_CALL(name, ...)                                                   \
  void name(benchmark::State& state) {                                           \
    run(state, [](Operands & o) -> Call __VA_ARGS__);                            \
  }                                                                              \
  BENCHMARK(name)->Arg(1)->Arg(2)->MeasureProcessCPUTime()->UseRealTime()->Unit( \
      benchmark::kMicrosecond)

// Half are read, half written.
ORRERY_CALL(memcpy_of_30_mb, {
  return Loopback{.from = o.floats(kRows * kHidden / 2),
                  .to = o.floats(kRows * kHidden / 2),
                  .bytes = 2 * kRows * kHidden};
});
ORRERY_CALL(norm_forward, {
  return NormForward{.terms = {o.matrix(kRows, kHidden), o.matrix(kRows, kHidden)},
                     .sum = o.matrix(kRows, kHidden),
                     .gain = o.matrix(1, kHidden),
                     .y = o.matrix(kRows, kHidden)};
});
ORRERY_CALL(norm_backward, {
  return NormBackward{.d_y = o.matrix(kRows, kHidden),
                      .x = o.matrix(kRows, kHidden),
                      .gain = o.matrix(1, kHidden),
                      .d_x = o.matrix(kRows, kHidden),
                      .d_gain = o.floats(kHidden)};
});
ORRERY_CALL(rope, {
  return Rope{.x = o.matrix(kRows / 4, 128 * 192),
              .heads = 128,
              .head_dim = 192,
              .offset = 128,
              .dim = 64,
              .positions = o.ints(kRows / 4, 4096)};
});
ORRERY_CALL(head_copy, {
  return HeadCopy{.from = o.matrix(kRows / 4, 128 * 256),
                  .to = o.matrix(kRows / 4, 128 * 192),
                  .heads = 128,
                  .width = 128,
                  .from_stride = 256,
                  .to_stride = 192};
});
ORRERY_CALL(swiglu_forward, {
  return ActivationForward{.in = o.matrix(kRows, 2 * 2048), .out = o.matrix(kRows, 2048)};
});
ORRERY_CALL(swiglu_forward_e4m3, {
  return ActivationForward{.in = o.matrix(kRows, 2 * 2048),
                           .out = o.matrix(kRows, 2048, Format::e4m3, Scaling::rows)};
});
ORRERY_CALL(swiglu_backward, {
  return ActivationBackward{.in = o.matrix(kRows, 2 * 2048),
                            .d_out = o.matrix(kRows, 2048),
                            .d_in = o.matrix(kRows, 2 * 2048)};
});
ORRERY_CALL(row_dot, {
  return RowDot{.a = o.matrix(kRows, 2048),
                .b = o.matrix(kRows, 2048),
                .row_weight = o.floats(kRows),
                .out = o.floats(kRows)};
});
ORRERY_CALL(quantize_e4m3_rows, {
  return Quantize{.from = o.matrix(kRows, kHidden),
                  .to = o.matrix(kRows, kHidden, Format::e4m3, Scaling::rows)};
});
ORRERY_CALL(quantize_e4m3_blocks, {
  return Quantize{.from = o.matrix(kRows, kHidden),
                  .to = o.matrix(kRows, kHidden, Format::e4m3, Scaling::blocks)};
});
ORRERY_CALL(quantize_e5m6, {
  return Quantize{.from = o.matrix(kRows, kHidden),
                  .to = o.matrix(kRows, kHidden, Format::e5m6, Scaling::rows)};
});
ORRERY_CALL(dequantize_e4m3, {
  return Dequantize{.from = o.matrix(kRows, kHidden, Format::e4m3, Scaling::rows),
                    .to = o.matrix(kRows, kHidden)};
});
ORRERY_CALL(dequantize_e5m6, {
  return Dequantize{.from = o.matrix(kRows, kHidden, Format::e5m6, Scaling::rows),
                    .to = o.matrix(kRows, kHidden)};
});
ORRERY_CALL(transpose_rows, {
  return Transpose{.from = o.matrix(kRows, kHidden, Format::e4m3, Scaling::rows),
                   .to = o.matrix(kHidden, kRows, Format::e4m3, Scaling::rows)};
});
ORRERY_CALL(transpose_blocks, {
  return Transpose{.from = o.matrix(kRows, kHidden, Format::e4m3, Scaling::blocks),
                   .to = o.matrix(kHidden, kRows, Format::e4m3, Scaling::blocks)};
});
ORRERY_CALL(add, {
  return Add{.terms = {o.matrix(kRows, kHidden), o.matrix(kRows, kHidden)},
             .out = o.matrix(kRows, kHidden)};
});
ORRERY_CALL(copy_fp32_to_bf16, {
  return Copy{.from = o.matrix(kRows, kHidden, Format::fp32), .to = o.matrix(kRows, kHidden)};
});
ORRERY_CALL(router, {
  return Router{.logits = o.matrix(4 * kRows, kExperts),
                .bias = o.floats(kExperts),
                .groups = 8,
                .group_limit = 4,
                .top_k = kTopK,
                .scores = o.floats(4 * kRows * kExperts),
                .experts = o.ints(4 * kRows * kTopK, 1),
                .weights = o.floats(4 * kRows * kTopK)};
});
ORRERY_CALL(router_backward, {
  std::vector<std::int32_t> experts;
  for (std::int64_t i = 0; i < 4 * kRows * kTopK; ++i) {
    experts.push_back(static_cast<std::int32_t>(i * 37 % kExperts));
  }
  return RouterBackward{.top_k = kTopK,
                        .scores = o.floats(4 * kRows * kExperts),
                        .experts = o.array(experts),
                        .d_weights = o.floats(4 * kRows * kTopK),
                        .d_logits = o.matrix(4 * kRows, kExperts)};
});
ORRERY_CALL(routing_map, {
  return RoutingMap{.experts = o.ints(4 * kRows * kTopK, kExperts),
                    .weights = o.floats(4 * kRows * kTopK),
                    .max_tokens = 4 * kRows,
                    .top_k = kTopK,
                    .local_experts = kExperts,
                    .alignment = 128,
                    .capacity = 4 * kRows * kTopK + kExperts * 128,
                    .group_begin = o.ints(kExperts + 1, 1),
                    .group_rows = o.ints(kExperts, 1),
                    .used_rows = o.ints(1, 1),
                    .row_source = o.ints(4 * kRows * kTopK + kExperts * 128, 1),
                    .row_weight = o.floats(4 * kRows * kTopK + kExperts * 128),
                    .slot_row = o.ints(4 * kRows * kTopK, 1),
                    .overflow = o.ints(1, 1)};
});
ORRERY_CALL(permute, {
  return Permute{.from = o.matrix(kRows, kHidden),
                 .to = o.matrix(kRows, kHidden),
                 .row_source = o.ints(kRows, kRows)};
});
ORRERY_CALL(unpermute, {
  return Unpermute{.from = o.matrix(kRows, kHidden),
                   .to = o.matrix(kRows / kTopK, kHidden),
                   .slot_row = o.ints(kRows, kRows),
                   .top_k = kTopK};
});
ORRERY_CALL(embedding, {
  return Embedding{.table = o.matrix(4 * kRows, kHidden),
                   .out = o.matrix(kRows, kHidden),
                   .tokens = o.ints(kRows, 4 * kRows)};
});
ORRERY_CALL(embedding_backward, {
  return EmbeddingBackward{.d_out = o.matrix(kRows, kHidden),
                           .d_table = o.matrix(2 * kRows, kHidden, Format::fp32),
                           .tokens = o.ints(kRows, 2 * kRows)};
});
ORRERY_CALL(cross_entropy_partial, {
  return CrossEntropyPartial{.logits = o.matrix(128, 129'280),
                             .targets = o.ints(128, 129'280),
                             .partial = o.floats(3 * 128)};
});
ORRERY_CALL(cross_entropy_backward, {
  return CrossEntropyBackward{.logits = o.matrix(128, 129'280),
                              .targets = o.ints(128, 129'280),
                              .lse = o.floats(128),
                              .scale = 1e-3F};
});
ORRERY_CALL(adamw, {
  constexpr std::int64_t kElements = 4 << 20;
  return AdamW{.elements = kElements,
               .gradient = o.floats(kElements),
               .master = o.floats(kElements),
               .first_moment = o.matrix(1, kElements).data,
               .second_moment = o.matrix(1, kElements).data,
               .moments = Format::bf16,
               .parameter = o.matrix(1, kElements).data,
               .parameters = Format::bf16,
               .scalars = o.array(std::vector<AdamScalars>{
                   {.learning_rate = 1e-6F, .beta1_power = 0.5F, .beta2_power = 0.5F}})};
});
ORRERY_CALL(square_sum, {
  return SquareSum{
      .values = o.floats(8 << 20), .elements = 8 << 20, .out = o.array(std::vector<double>{0})};
});
ORRERY_CALL(fill, { return Fill{.data = o.floats(8 << 20), .bytes = 32 << 20}; });

}  // namespace
}  // namespace orrery::kernels
