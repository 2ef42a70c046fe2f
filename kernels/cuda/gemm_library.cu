// Products by cuBLASLt. It counts columns first: its D^T (n, m) = B A^T, so its A is our B.

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels/choose_gemm.hpp"
#include "kernels/cuda/gemm_parts.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/libraries.hpp"

namespace orrery::kernels::cuda {

namespace {

void check(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(what) + ": " + cublasLtGetStatusString(status));
}

struct DestroyDescriptor {
  void operator()(cublasLtMatmulDesc_t x) const { cublasLtMatmulDescDestroy(x); }
};
struct DestroyLayout {
  void operator()(cublasLtMatrixLayout_t x) const { cublasLtMatrixLayoutDestroy(x); }
};
struct DestroyPreference {
  void operator()(cublasLtMatmulPreference_t x) const { cublasLtMatmulPreferenceDestroy(x); }
};
using Descriptor = std::unique_ptr<cublasLtMatmulDescOpaque_t, DestroyDescriptor>;
using Layout = std::unique_ptr<cublasLtMatrixLayoutOpaque_t, DestroyLayout>;
using Preference = std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, DestroyPreference>;

cudaDataType_t type_of(Format format) {
  switch (format) {
    case Format::fp32:
      return CUDA_R_32F;
    case Format::bf16:
      return CUDA_R_16BF;
    case Format::e4m3:
      return CUDA_R_8F_E4M3;
    case Format::e5m6:
      break;
  }
  throw std::logic_error("cuBLASLt does not have e5m6");
}

cublasLtMatmulMatrixScale_t scale_mode_of(Scaling scaling) {
  return scaling == Scaling::rows ? CUBLASLT_MATMUL_MATRIX_SCALE_VEC128_32F
                                  : CUBLASLT_MATMUL_MATRIX_SCALE_BLK128x128_32F;
}

template <class T>
void set(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check(cublasLtMatmulDescSetAttribute(d, attribute, &value, sizeof value),
        "cublasLtMatmulDescSetAttribute");
}
template <class T>
void set(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t attribute,
         const T& value) {
  check(cublasLtMatmulPreferenceSetAttribute(p, attribute, &value, sizeof value),
        "cublasLtMatmulPreferenceSetAttribute");
}

Layout layout_of(const Matrix& x) {
  cublasLtMatrixLayout_t layout = nullptr;
  check(
      cublasLtMatrixLayoutCreate(&layout, type_of(x.format), static_cast<std::uint64_t>(x.columns),
                                 static_cast<std::uint64_t>(x.rows), x.pitch),
      "cublasLtMatrixLayoutCreate");
  return Layout(layout);
}

/// The largest power of two up to 256 that the address is a multiple of.
std::uint32_t alignment_of(const void* pointer) {
  const auto address = reinterpret_cast<std::uintptr_t>(pointer) | 256U;
  return static_cast<std::uint32_t>(address & (~address + 1));
}

/// What an algorithm is chosen for, and descriptors that stay the same but for the scales'
/// addresses.
struct Prepared {
  Descriptor descriptor;
  Layout a, b, d;
  std::optional<cublasLtMatmulAlgo_t> algorithm;  ///< empty: there is none
};

using Key = std::array<std::int64_t, 18>;

Key key_of(const Gemm& call, const LaunchContext& context) {
  const GemmSizes s = sizes_of(call);
  return {s.m,
          s.n,
          s.k,
          call.a.pitch,
          call.b.pitch,
          call.d.pitch,
          static_cast<std::int64_t>(call.a.format),
          static_cast<std::int64_t>(call.b.format),
          static_cast<std::int64_t>(call.d.format),
          static_cast<std::int64_t>(call.a.scaling),
          static_cast<std::int64_t>(call.b.scaling),
          call.a_transposed + 2 * call.b_transposed + 4 * call.accumulate,
          context.sms,
          static_cast<std::int64_t>(context.workspace_bytes),
          alignment_of(call.a.data),
          alignment_of(call.b.data),
          alignment_of(call.d.data),
          alignment_of(context.workspace)};
}

/// cuBLASLt's handle, and what was prepared for the shapes that were seen.
class Blas {
 public:
  Blas() { check(cublasLtCreate(&handle_), "cublasLtCreate"); }
  ~Blas() { cublasLtDestroy(handle_); }
  Blas(const Blas&) = delete;
  Blas& operator=(const Blas&) = delete;

  cublasLtHandle_t handle() const { return handle_; }

  Prepared& prepared(const Gemm& call, const LaunchContext& context) {
    const auto [at, is_new] = prepared_.try_emplace(key_of(call, context));
    if (is_new) at->second = prepare(call, context);
    return at->second;
  }

 private:
  Prepared prepare(const Gemm& call, const LaunchContext& context) const {
    Prepared p;
    // FP32 is multiplied as FP32, never as TF32.
    cublasLtMatmulDesc_t descriptor = nullptr;
    check(cublasLtMatmulDescCreate(&descriptor, CUBLAS_COMPUTE_32F, CUDA_R_32F),
          "cublasLtMatmulDescCreate");
    p.descriptor.reset(descriptor);
    set(descriptor, CUBLASLT_MATMUL_DESC_TRANSA, call.b_transposed ? CUBLAS_OP_N : CUBLAS_OP_T);
    set(descriptor, CUBLASLT_MATMUL_DESC_TRANSB, call.a_transposed ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(descriptor, CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, static_cast<std::int32_t>(context.sms));
    if (call.a.format == Format::e4m3) {
      set(descriptor, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, scale_mode_of(call.b.scaling));
      set(descriptor, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, scale_mode_of(call.a.scaling));
      set_scales(descriptor, call);
      set(descriptor, CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<std::int8_t>(0));
    }
    p.a = layout_of(call.b);
    p.b = layout_of(call.a);
    p.d = layout_of(call.d);

    cublasLtMatmulPreference_t raw = nullptr;
    check(cublasLtMatmulPreferenceCreate(&raw), "cublasLtMatmulPreferenceCreate");
    const Preference preference(raw);
    set(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
        static_cast<std::uint64_t>(context.workspace_bytes));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment_of(call.b.data));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment_of(call.a.data));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment_of(call.d.data));
    set(raw, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment_of(call.d.data));
    // Partial sums stay in FP32, and their order is always the same.
    set(raw, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));

    cublasLtMatmulHeuristicResult_t found{};
    int count = 0;
    const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
        handle_, descriptor, p.a.get(), p.b.get(), p.d.get(), p.d.get(), raw, 1, &found, &count);
    if (status == CUBLAS_STATUS_SUCCESS && count > 0) {
      p.algorithm = found.algo;
    } else if (status != CUBLAS_STATUS_SUCCESS && status != CUBLAS_STATUS_NOT_SUPPORTED) {
      check(status, "cublasLtMatmulAlgoGetHeuristic");
    }
    return p;
  }

 public:
  static void set_scales(cublasLtMatmulDesc_t descriptor, const Gemm& call) {
    set(descriptor, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, static_cast<const void*>(call.b.scales));
    set(descriptor, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, static_cast<const void*>(call.a.scales));
  }

 private:
  cublasLtHandle_t handle_ = nullptr;
  std::map<Key, Prepared> prepared_;
};

}  // namespace

bool launch_library(const Gemm& call, const LaunchContext& context) {
  Blas& blas = static_cast<Libraries*>(context.libraries)->get<Blas>();
  Prepared& p = blas.prepared(call, context);
  if (!p.algorithm) return false;
  if (call.a.format == Format::e4m3) Blas::set_scales(p.descriptor.get(), call);
  const float alpha = 1, beta = call.accumulate ? 1 : 0;
  check(
      cublasLtMatmul(blas.handle(), p.descriptor.get(), &alpha, call.b.data, p.a.get(), call.a.data,
                     p.b.get(), &beta, call.d.data, p.d.get(), call.d.data, p.d.get(),
                     &*p.algorithm, context.workspace, context.workspace_bytes, context.stream),
      "cublasLtMatmul");
  return true;
}

}  // namespace orrery::kernels::cuda
