#include "kernels/cuda/cudnn_attention.hpp"

#include <limits>
#include <stdexcept>
#include <utility>

namespace orrery::kernels::cuda {
namespace {

void check(cudnnStatus_t status, const char* what) {
  if (status == CUDNN_STATUS_SUCCESS) return;
  std::array<char, 512> message{};
  cudnnGetLastErrorString(message.data(), message.size());
  throw std::runtime_error(std::string("cuDNN, ") + what + ": " + cudnnGetErrorString(status) +
                           " (" + message.data() + ")");
}

}  // namespace

Descriptor::Descriptor(cudnnBackendDescriptorType_t type) {
  check(cudnnBackendCreateDescriptor(type, &handle_), "create descriptor");
}
Descriptor::Descriptor(Descriptor&& other) noexcept
    : handle_(std::exchange(other.handle_, nullptr)) {}
Descriptor& Descriptor::operator=(Descriptor&& other) noexcept {
  std::swap(handle_, other.handle_);
  return *this;
}
Descriptor::~Descriptor() {
  if (handle_ != nullptr) cudnnBackendDestroyDescriptor(handle_);
}

void Descriptor::set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
                     std::int64_t count, const void* values) {
  check(cudnnBackendSetAttribute(handle_, name, type, count, values),
        ("set attribute " + std::to_string(static_cast<int>(name))).c_str());
}
void Descriptor::set(cudnnBackendAttributeName_t name, std::int64_t value) {
  set(name, CUDNN_TYPE_INT64, 1, &value);
}
void Descriptor::set(cudnnBackendAttributeName_t name, cudnnDataType_t value) {
  set(name, CUDNN_TYPE_DATA_TYPE, 1, &value);
}
void Descriptor::set(cudnnBackendAttributeName_t name, bool value) {
  set(name, CUDNN_TYPE_BOOLEAN, 1, &value);
}
void Descriptor::set(cudnnBackendAttributeName_t name, const Descriptor& value) {
  cudnnBackendDescriptor_t handle = value.get();
  set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, static_cast<const void*>(&handle));
}
void Descriptor::finalize() {
  check(cudnnBackendFinalize(handle_), "finalize");
}

bool AttentionGraphShape::operator==(const AttentionGraphShape& other) const {
  const AttentionShape& a = shape;
  const AttentionShape& b = other.shape;
  return a.batch == b.batch && a.heads == b.heads && a.kv_heads == b.kv_heads &&
         a.q_len == b.q_len && a.kv_len == b.kv_len && a.d_qk == b.d_qk && a.d_v == b.d_v &&
         a.causal == b.causal && pitches == other.pitches &&
         gradient_pitches == other.gradient_pitches && lse_heads == other.lse_heads &&
         backward == other.backward;
}

/// Writes operations and tensors into a graph. Tensors are named by their place in parts_.
class GraphBuilder {
 public:
  using Size = std::array<std::int64_t, 4>;
  struct Tensor {
    std::size_t part;
    Size dims;
    Size strides;
  };

  explicit GraphBuilder(AttentionGraph& graph) : graph_(graph) {}

  Tensor bound(AttentionTensor name, const Size& dims, const Size& strides, cudnnDataType_t type) {
    graph_.bound_.push_back(name);
    return tensor(static_cast<std::int64_t>(name), dims, strides, type, false, false);
  }
  Tensor number(AttentionTensor name, cudnnDataType_t type) {
    graph_.bound_.push_back(name);
    return tensor(static_cast<std::int64_t>(name), {1, 1, 1, 1}, {1, 1, 1, 1}, type, false, true);
  }
  Tensor virtual_tensor(const Size& dims, cudnnDataType_t type = CUDNN_DATA_FLOAT) {
    return tensor(next_id_++, dims, packed(dims), type, true, false);
  }

  Tensor matmul(const Tensor& a, const Tensor& b, const Tensor& c) {
    Descriptor product(CUDNN_BACKEND_MATMUL_DESCRIPTOR);
    product.set(CUDNN_ATTR_MATMUL_COMP_TYPE, CUDNN_DATA_FLOAT);
    product.finalize();
    Descriptor operation(CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR);
    operation.set(CUDNN_ATTR_OPERATION_MATMUL_ADESC, at(a));
    operation.set(CUDNN_ATTR_OPERATION_MATMUL_BDESC, at(b));
    operation.set(CUDNN_ATTR_OPERATION_MATMUL_CDESC, at(c));
    operation.set(CUDNN_ATTR_OPERATION_MATMUL_DESC, product);
    keep(std::move(product));
    add(std::move(operation));
    return c;
  }

  struct Pointwise {
    cudnnDataType_t compute = CUDNN_DATA_FLOAT;
    std::int64_t axis = -1;
    const Tensor* select = nullptr;
  };
  Tensor pointwise(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor* b, const Tensor& y,
                   const Pointwise& how) {
    Descriptor kind(CUDNN_BACKEND_POINTWISE_DESCRIPTOR);
    kind.set(CUDNN_ATTR_POINTWISE_MODE, CUDNN_TYPE_POINTWISE_MODE, 1, &mode);
    kind.set(CUDNN_ATTR_POINTWISE_MATH_PREC, how.compute);
    if (how.axis >= 0) kind.set(CUDNN_ATTR_POINTWISE_AXIS, how.axis);
    kind.finalize();
    Descriptor operation(CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR);
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_PW_DESCRIPTOR, kind);
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_XDESC, at(x));
    if (b != nullptr) operation.set(CUDNN_ATTR_OPERATION_POINTWISE_BDESC, at(*b));
    if (how.select != nullptr) operation.set(CUDNN_ATTR_OPERATION_POINTWISE_TDESC, at(*how.select));
    operation.set(CUDNN_ATTR_OPERATION_POINTWISE_YDESC, at(y));
    keep(std::move(kind));
    add(std::move(operation));
    return y;
  }
  Tensor unary(cudnnPointwiseMode_t mode, const Tensor& x) {
    return pointwise(mode, x, nullptr, virtual_tensor(x.dims), {});
  }
  Tensor binary(cudnnPointwiseMode_t mode, const Tensor& x, const Tensor& b) {
    return pointwise(mode, x, &b, virtual_tensor(x.dims), {});
  }

  Tensor reduction(cudnnReduceTensorOp_t kind, const Tensor& x, const Tensor& y) {
    Descriptor reduce(CUDNN_BACKEND_REDUCTION_DESCRIPTOR);
    reduce.set(CUDNN_ATTR_REDUCTION_OPERATOR, CUDNN_TYPE_REDUCTION_OPERATOR_TYPE, 1, &kind);
    reduce.set(CUDNN_ATTR_REDUCTION_COMP_TYPE, CUDNN_DATA_FLOAT);
    reduce.finalize();
    Descriptor operation(CUDNN_BACKEND_OPERATION_REDUCTION_DESCRIPTOR);
    operation.set(CUDNN_ATTR_OPERATION_REDUCTION_XDESC, at(x));
    operation.set(CUDNN_ATTR_OPERATION_REDUCTION_YDESC, at(y));
    operation.set(CUDNN_ATTR_OPERATION_REDUCTION_DESC, reduce);
    keep(std::move(reduce));
    add(std::move(operation));
    return y;
  }

  /// The same elements with the last two dimensions exchanged.
  Tensor transposed(const Tensor& x, cudnnDataType_t type) {
    const Tensor y =
        tensor(next_id_++, {x.dims[0], x.dims[1], x.dims[3], x.dims[2]},
               {x.strides[0], x.strides[1], x.strides[3], x.strides[2]}, type, true, false);
    Descriptor operation(CUDNN_BACKEND_OPERATION_RESHAPE_DESCRIPTOR);
    operation.set(CUDNN_ATTR_OPERATION_RESHAPE_XDESC, at(x));
    operation.set(CUDNN_ATTR_OPERATION_RESHAPE_YDESC, at(y));
    add(std::move(operation));
    return y;
  }

  /// Keeps score (i, j) where i + kv_len - q_len >= j, else minus infinity.
  Tensor causal(const Tensor& scores, bool same_length) {
    Tensor row = pointwise(CUDNN_POINTWISE_GEN_INDEX, scores, nullptr,
                           virtual_tensor(scores.dims, CUDNN_DATA_INT32), {.axis = 2});
    const Tensor column = pointwise(CUDNN_POINTWISE_GEN_INDEX, scores, nullptr,
                                    virtual_tensor(scores.dims, CUDNN_DATA_INT32), {.axis = 3});
    if (!same_length) {
      const Tensor kv_len = number(AttentionTensor::kv_len, CUDNN_DATA_INT32);
      row = pointwise(CUDNN_POINTWISE_ADD, row, &kv_len,
                      virtual_tensor(scores.dims, CUDNN_DATA_INT32), {.compute = CUDNN_DATA_INT32});
      const Tensor q_len = number(AttentionTensor::q_len, CUDNN_DATA_INT32);
      row = pointwise(CUDNN_POINTWISE_SUB, row, &q_len,
                      virtual_tensor(scores.dims, CUDNN_DATA_INT32), {.compute = CUDNN_DATA_INT32});
    }
    const Tensor seen =
        pointwise(CUDNN_POINTWISE_CMP_GE, row, &column,
                  virtual_tensor(scores.dims, CUDNN_DATA_BOOLEAN), {.compute = CUDNN_DATA_BOOLEAN});
    const Tensor hidden = number(AttentionTensor::minus_infinity, CUDNN_DATA_FLOAT);
    return pointwise(CUDNN_POINTWISE_BINARY_SELECT, scores, &hidden, virtual_tensor(scores.dims),
                     {.select = &seen});
  }

  void finish(cudnnHandle_t handle) {
    std::vector<cudnnBackendDescriptor_t> operations;
    for (std::size_t part : operations_) operations.push_back(graph_.parts_[part].get());
    graph_.graph_ = Descriptor(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
    graph_.graph_.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR,
                      static_cast<std::int64_t>(operations.size()), operations.data());
    if (handle != nullptr) {
      graph_.graph_.set(CUDNN_ATTR_OPERATIONGRAPH_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
    }
    graph_.graph_.finalize();
  }

 private:
  static Size packed(const Size& dims) {
    return {dims[1] * dims[2] * dims[3], dims[2] * dims[3], dims[3], 1};
  }
  const Descriptor& at(const Tensor& tensor) const { return graph_.parts_[tensor.part]; }
  void keep(Descriptor descriptor) { graph_.parts_.push_back(std::move(descriptor)); }
  void add(Descriptor operation) {
    operation.finalize();
    operations_.push_back(graph_.parts_.size());
    keep(std::move(operation));
  }
  Tensor tensor(std::int64_t id, const Size& dims, const Size& strides, cudnnDataType_t type,
                bool is_virtual, bool by_value) {
    Descriptor descriptor(CUDNN_BACKEND_TENSOR_DESCRIPTOR);
    descriptor.set(CUDNN_ATTR_TENSOR_UNIQUE_ID, id);
    descriptor.set(CUDNN_ATTR_TENSOR_DATA_TYPE, type);
    // Pieces of heads begin anywhere in lse.
    descriptor.set(CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT,
                   std::int64_t{type == CUDNN_DATA_FLOAT && !is_virtual ? 4 : 16});
    descriptor.set(CUDNN_ATTR_TENSOR_DIMENSIONS, CUDNN_TYPE_INT64, 4, dims.data());
    descriptor.set(CUDNN_ATTR_TENSOR_STRIDES, CUDNN_TYPE_INT64, 4, strides.data());
    descriptor.set(CUDNN_ATTR_TENSOR_IS_VIRTUAL, is_virtual);
    descriptor.set(CUDNN_ATTR_TENSOR_IS_BY_VALUE, by_value);
    descriptor.finalize();
    keep(std::move(descriptor));
    return {graph_.parts_.size() - 1, dims, strides};
  }

  AttentionGraph& graph_;
  std::vector<std::size_t> operations_;
  std::int64_t next_id_ = 100;
};

namespace {

using Builder = GraphBuilder;
using Tensor = GraphBuilder::Tensor;

/// (batch, heads, length, d) of a matrix with rows batch * length and columns heads * d.
Tensor rows(Builder& build, AttentionTensor name, std::int64_t batch, std::int64_t heads,
            std::int64_t length, std::int64_t d, std::int64_t pitch) {
  return build.bound(name, {batch, heads, length, d}, {length * pitch, d, pitch, 1},
                     CUDNN_DATA_BFLOAT16);
}
/// The same as (batch, heads, d, length).
Tensor columns(Builder& build, AttentionTensor name, std::int64_t batch, std::int64_t heads,
               std::int64_t length, std::int64_t d, std::int64_t pitch) {
  return build.bound(name, {batch, heads, d, length}, {length * pitch, d, 1, pitch},
                     CUDNN_DATA_BFLOAT16);
}

/// S = scale Q K^T, masked; lse = max + log(sum exp(S - max)); O = softmax(S) V.
void write_forward(Builder& build, const AttentionGraphShape& graph) {
  const AttentionShape& s = graph.shape;
  const Tensor q =
      rows(build, AttentionTensor::q, s.batch, s.heads, s.q_len, s.d_qk, graph.pitches[0]);
  const Tensor k =
      columns(build, AttentionTensor::k, s.batch, s.kv_heads, s.kv_len, s.d_qk, graph.pitches[1]);
  const Tensor v =
      rows(build, AttentionTensor::v, s.batch, s.kv_heads, s.kv_len, s.d_v, graph.pitches[2]);
  const Tensor out =
      rows(build, AttentionTensor::out, s.batch, s.heads, s.q_len, s.d_v, graph.pitches[3]);
  const Tensor lse = build.bound(AttentionTensor::lse, {s.batch, s.heads, s.q_len, 1},
                                 {graph.lse_heads * s.q_len, s.q_len, 1, 1}, CUDNN_DATA_FLOAT);

  Tensor scores = build.matmul(q, k, build.virtual_tensor({s.batch, s.heads, s.q_len, s.kv_len}));
  scores = build.binary(CUDNN_POINTWISE_MUL, scores,
                        build.number(AttentionTensor::scale, CUDNN_DATA_FLOAT));
  if (s.causal) scores = build.causal(scores, s.q_len == s.kv_len);
  const GraphBuilder::Size row = {s.batch, s.heads, s.q_len, 1};
  const Tensor largest =
      build.reduction(CUDNN_REDUCE_TENSOR_MAX, scores, build.virtual_tensor(row));
  const Tensor exponentials =
      build.unary(CUDNN_POINTWISE_EXP, build.binary(CUDNN_POINTWISE_SUB, scores, largest));
  const Tensor sum =
      build.reduction(CUDNN_REDUCE_TENSOR_ADD, exponentials, build.virtual_tensor(row));
  const Tensor log = build.unary(CUDNN_POINTWISE_LOG, sum);
  build.pointwise(CUDNN_POINTWISE_ADD, largest, &log, lse, {});
  const Tensor probabilities =
      build.pointwise(CUDNN_POINTWISE_DIV, exponentials, &sum,
                      build.virtual_tensor(scores.dims, CUDNN_DATA_BFLOAT16), {});
  build.matmul(probabilities, v, out);
}

/// D = row sums of dO * O; P = exp(scale Q K^T - lse), masked; dV = P^T dO; dS = scale P (dO V^T -
/// D); dK = dS^T Q; dQ = dS K. With dQ a plain product and no FP32 accumulator of its own, engines
/// add it up in a fixed order.
void write_backward(Builder& build, const AttentionGraphShape& graph) {
  const AttentionShape& s = graph.shape;
  const auto gradient = graph.gradient_pitches;
  const Tensor q =
      rows(build, AttentionTensor::q, s.batch, s.heads, s.q_len, s.d_qk, graph.pitches[0]);
  const Tensor k =
      columns(build, AttentionTensor::k, s.batch, s.kv_heads, s.kv_len, s.d_qk, graph.pitches[1]);
  const Tensor v =
      columns(build, AttentionTensor::v, s.batch, s.kv_heads, s.kv_len, s.d_v, graph.pitches[2]);
  const Tensor out =
      rows(build, AttentionTensor::out, s.batch, s.heads, s.q_len, s.d_v, graph.pitches[3]);
  const Tensor lse = build.bound(AttentionTensor::lse, {s.batch, s.heads, s.q_len, 1},
                                 {graph.lse_heads * s.q_len, s.q_len, 1, 1}, CUDNN_DATA_FLOAT);
  const Tensor d_out =
      rows(build, AttentionTensor::d_out, s.batch, s.heads, s.q_len, s.d_v, gradient[0]);
  const Tensor d_q =
      rows(build, AttentionTensor::d_q, s.batch, s.heads, s.q_len, s.d_qk, gradient[1]);
  const Tensor d_k =
      rows(build, AttentionTensor::d_k, s.batch, s.kv_heads, s.kv_len, s.d_qk, gradient[2]);
  const Tensor d_v =
      rows(build, AttentionTensor::d_v, s.batch, s.kv_heads, s.kv_len, s.d_v, gradient[3]);

  const GraphBuilder::Size row = {s.batch, s.heads, s.q_len, 1};
  const Tensor row_sum =
      build.reduction(CUDNN_REDUCE_TENSOR_ADD, build.binary(CUDNN_POINTWISE_MUL, d_out, out),
                      build.virtual_tensor(row));
  // cuDNN's pattern has the factor of dropout here; without dropout it is 1.
  const Tensor one = build.number(AttentionTensor::one, CUDNN_DATA_FLOAT);
  const Tensor row_sums = build.bound(AttentionTensor::row_sums, row,
                                      {s.heads * s.q_len, s.q_len, 1, 1}, CUDNN_DATA_FLOAT);
  build.pointwise(CUDNN_POINTWISE_MUL, row_sum, &one, row_sums, {});

  const Tensor scale = build.number(AttentionTensor::scale, CUDNN_DATA_FLOAT);
  Tensor scores = build.matmul(q, k, build.virtual_tensor({s.batch, s.heads, s.q_len, s.kv_len}));
  scores = build.binary(CUDNN_POINTWISE_MUL, scores, scale);
  scores = build.binary(CUDNN_POINTWISE_SUB, scores, lse);
  if (s.causal) scores = build.causal(scores, s.q_len == s.kv_len);
  const Tensor probabilities = build.unary(CUDNN_POINTWISE_EXP, scores);

  // Sums over the query heads of a key-value head come after products of all heads.
  const auto into_heads = [&](const Tensor& a, const Tensor& b, const Tensor& to, std::int64_t d) {
    if (s.heads == s.kv_heads) {
      build.matmul(a, b, to);
      return;
    }
    const Tensor all = build.matmul(
        a, b, build.virtual_tensor({s.batch, s.heads, s.kv_len, d}, CUDNN_DATA_BFLOAT16));
    build.reduction(CUDNN_REDUCE_TENSOR_ADD, all, to);
  };
  into_heads(build.transposed(probabilities, CUDNN_DATA_BFLOAT16), d_out, d_v, s.d_v);

  Tensor d_scores =
      build.matmul(d_out, v, build.virtual_tensor({s.batch, s.heads, s.q_len, s.kv_len}));
  d_scores = build.binary(CUDNN_POINTWISE_SUB, d_scores, row_sums);
  d_scores = build.binary(CUDNN_POINTWISE_MUL, d_scores, probabilities);
  d_scores = build.pointwise(CUDNN_POINTWISE_MUL, d_scores, &scale,
                             build.virtual_tensor(d_scores.dims, CUDNN_DATA_BFLOAT16), {});
  into_heads(build.transposed(d_scores, CUDNN_DATA_BFLOAT16), q, d_k, s.d_qk);
  build.matmul(d_scores, build.transposed(k, CUDNN_DATA_BFLOAT16), d_q);
}

}  // namespace

AttentionGraph::AttentionGraph(const AttentionGraphShape& shape, cudnnHandle_t handle) {
  GraphBuilder build(*this);
  if (shape.backward) {
    write_backward(build, shape);
  } else {
    write_forward(build, shape);
  }
  build.finish(handle);
}

Descriptor described_device(int multiprocessors) {
  // The keys are those that libcudnn_graph reads; the values are an H100 SXM's (CUDA C++
  // Programming Guide, compute capability 9.0; clocks of the H100 data sheet). A driver of
  // CUDA 13.0.
  const std::string json =
      R"({"deviceName":"NVIDIA H100 80GB HBM3","deviceVer":900,"driverVer":13000,"cudaDeviceId":0,"pciDeviceId":0,"warpSize":32,)"
      R"("multiProcessorCount":)" +
      std::to_string(multiprocessors) +
      R"(,"maxSharedMemoryPerBlock":49152,"maxSharedMemoryPerBlockOptin":232448,)"
      R"("reservedSharedMemoryPerBlock":1024,"maxRegistersPerSM":65536,"regsPerBlock":65536,)"
      R"("maxCtasPerSM":32,"maxThreadsPerBlock":1024,"maxThreadsPerSM":2048,)"
      R"("maxBlockSize":[1024,1024,64],"maxGridSize":[2147483647,65535,65535],)"
      R"("l2CacheSize":52428800,"totalGlobalMem":85899345920,"memClockRateKHz":2619000,)"
      R"("smClockRateKHz":1980000,"isTccDriver":0,"supportCoopLaunch":1})";
  Descriptor device(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
  device.set(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR,
             static_cast<std::int64_t>(json.size()), json.data());
  device.finalize();
  return device;
}

namespace {

bool adds_in_any_order(const Descriptor& engine_config) {
  Descriptor engine(CUDNN_BACKEND_ENGINE_DESCRIPTOR);
  cudnnBackendDescriptor_t handle = engine.get();
  std::int64_t count = 0;
  check(cudnnBackendGetAttribute(engine_config.get(), CUDNN_ATTR_ENGINECFG_ENGINE,
                                 CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &count,
                                 static_cast<void*>(&handle)),
        "engine of a configuration");
  std::array<cudnnBackendNumericalNote_t, CUDNN_NUMERICAL_NOTE_TYPE_COUNT> notes{};
  check(cudnnBackendGetAttribute(engine.get(), CUDNN_ATTR_ENGINE_NUMERICAL_NOTE,
                                 CUDNN_TYPE_NUMERICAL_NOTE, CUDNN_NUMERICAL_NOTE_TYPE_COUNT, &count,
                                 notes.data()),
        "numerical notes of an engine");
  for (std::int64_t i = 0; i < count; ++i) {
    if (notes[static_cast<std::size_t>(i)] == CUDNN_NUMERICAL_NOTE_NONDETERMINISTIC) return true;
  }
  return false;
}

}  // namespace

std::vector<Descriptor> engine_configs(const AttentionGraph& graph, const Descriptor* device) {
  std::vector<Descriptor> configs;
  for (const cudnnBackendHeurMode_t mode : {CUDNN_HEUR_MODE_A, CUDNN_HEUR_MODE_FALLBACK}) {
    Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph.graph());
    heuristics.set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode);
    if (device != nullptr) heuristics.set(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, *device);
    // What no engine can run is an error here, and no reason to look no further.
    if (cudnnBackendFinalize(heuristics.get()) != CUDNN_STATUS_SUCCESS) continue;
    std::int64_t count = 0;
    check(cudnnBackendGetAttribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                   CUDNN_TYPE_BACKEND_DESCRIPTOR, 0, &count, nullptr),
          "number of engine configurations");
    std::vector<Descriptor> found;
    std::vector<cudnnBackendDescriptor_t> handles;
    for (std::int64_t i = 0; i < count; ++i) {
      handles.push_back(found.emplace_back(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR).get());
    }
    check(cudnnBackendGetAttribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                   CUDNN_TYPE_BACKEND_DESCRIPTOR, count, &count,
                                   static_cast<void*>(handles.data())),
          "engine configurations");
    found.erase(found.begin() + count, found.end());
    for (Descriptor& config : found) {
      if (!adds_in_any_order(config)) configs.push_back(std::move(config));
    }
  }
  return configs;
}

std::int64_t workspace_of(const Descriptor& engine_config) {
  std::int64_t bytes = 0;
  std::int64_t count = 0;
  check(cudnnBackendGetAttribute(engine_config.get(), CUDNN_ATTR_ENGINECFG_WORKSPACE_SIZE,
                                 CUDNN_TYPE_INT64, 1, &count, &bytes),
        "workspace of a configuration");
  return bytes;
}

AttentionPlan::AttentionPlan(const AttentionGraphShape& shape, cudnnHandle_t handle)
    : shape_(shape), graph_(shape, handle) {
  std::string why = "no engine of cuDNN takes this attention";
  for (const Descriptor& config : engine_configs(graph_, nullptr)) {
    Descriptor plan(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
    try {
      plan.set(CUDNN_ATTR_EXECUTION_PLAN_HANDLE, CUDNN_TYPE_HANDLE, 1, &handle);
      plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, config);
      plan.finalize();
    } catch (const std::runtime_error& error) {
      why = error.what();
      continue;
    }
    std::int64_t count = 0;
    check(cudnnBackendGetAttribute(plan.get(), CUDNN_ATTR_EXECUTION_PLAN_WORKSPACE_SIZE,
                                   CUDNN_TYPE_INT64, 1, &count, &workspace_bytes_),
          "workspace of a plan");
    plan_ = std::move(plan);
    return;
  }
  throw std::runtime_error(why);
}

void AttentionPlan::run(cudnnHandle_t handle, const std::array<void*, 16>& pointers, float scale,
                        void* workspace) const {
  // Numbers are read when the plan is enqueued.
  float one = 1;
  float minus_infinity = -std::numeric_limits<float>::infinity();
  auto q_len = static_cast<std::int32_t>(shape_.shape.q_len);
  auto kv_len = static_cast<std::int32_t>(shape_.shape.kv_len);
  std::vector<std::int64_t> ids;
  std::vector<void*> data;
  for (const AttentionTensor tensor : graph_.bound()) {
    ids.push_back(static_cast<std::int64_t>(tensor));
    switch (tensor) {
      case AttentionTensor::scale:
        data.push_back(&scale);
        break;
      case AttentionTensor::one:
        data.push_back(&one);
        break;
      case AttentionTensor::minus_infinity:
        data.push_back(&minus_infinity);
        break;
      case AttentionTensor::q_len:
        data.push_back(&q_len);
        break;
      case AttentionTensor::kv_len:
        data.push_back(&kv_len);
        break;
      default:
        data.push_back(pointers[static_cast<std::size_t>(tensor)]);
    }
  }
  Descriptor pack(CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR);
  const auto count = static_cast<std::int64_t>(ids.size());
  pack.set(CUDNN_ATTR_VARIANT_PACK_UNIQUE_IDS, CUDNN_TYPE_INT64, count, ids.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_DATA_POINTERS, CUDNN_TYPE_VOID_PTR, count, data.data());
  pack.set(CUDNN_ATTR_VARIANT_PACK_WORKSPACE, CUDNN_TYPE_VOID_PTR, 1, &workspace);
  pack.finalize();
  check(cudnnBackendExecute(handle, plan_.get(), pack.get()), "run attention");
}

}  // namespace orrery::kernels::cuda
