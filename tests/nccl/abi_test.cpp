// kernels/nccl_abi.hpp against NVIDIA's nccl.h, by the compiler, and against a libnccl.so.2 by
// loading it: neither needs a GPU. Built where CMake finds nccl.h.

#include "kernels/nccl_abi.hpp"

#include <gtest/gtest.h>
#include <nccl.h>

#include <cstddef>
#include <cstdlib>
#include <type_traits>

#include "kernels/communicator.hpp"

namespace orrery::kernels {
namespace {

static_assert(sizeof(nccl::UniqueId) == sizeof(ncclUniqueId));
static_assert(nccl::success == int{ncclSuccess} && nccl::invalid_usage == int{ncclInvalidUsage});
static_assert(nccl::remote_error == int{ncclRemoteError});
static_assert(nccl::in_progress == int{ncclInProgress});
static_assert(nccl::int8 == int{ncclInt8} && nccl::float32 == int{ncclFloat32});
static_assert(nccl::float64 == int{ncclFloat64} && nccl::bfloat16 == int{ncclBfloat16});
static_assert(nccl::sum == int{ncclSum});
static_assert(sizeof(nccl::Result) == sizeof(ncclResult_t));
static_assert(sizeof(nccl::DataType) == sizeof(ncclDataType_t));
static_assert(sizeof(nccl::RedOp) == sizeof(ncclRedOp_t));

static_assert(offsetof(nccl::Config, size) == offsetof(ncclConfig_t, size));
static_assert(offsetof(nccl::Config, magic) == offsetof(ncclConfig_t, magic));
static_assert(offsetof(nccl::Config, version) == offsetof(ncclConfig_t, version));
static_assert(offsetof(nccl::Config, blocking) == offsetof(ncclConfig_t, blocking));
static_assert(offsetof(nccl::Config, cga_cluster_size) == offsetof(ncclConfig_t, cgaClusterSize));
static_assert(offsetof(nccl::Config, min_ctas) == offsetof(ncclConfig_t, minCTAs));
static_assert(offsetof(nccl::Config, max_ctas) == offsetof(ncclConfig_t, maxCTAs));
static_assert(offsetof(nccl::Config, net_name) == offsetof(ncclConfig_t, netName));
static_assert(offsetof(nccl::Config, split_share) == offsetof(ncclConfig_t, splitShare));

/// How a type of nccl.h is passed here: pointers to its structs as void*, its own enums as ours.
template <class T>
struct Ours {
  using type = T;
};
template <>
struct Ours<ncclResult_t> {
  using type = nccl::Result;
};
template <>
struct Ours<ncclDataType_t> {
  using type = nccl::DataType;
};
template <>
struct Ours<ncclRedOp_t> {
  using type = nccl::RedOp;
};
template <>
struct Ours<ncclUniqueId> {
  using type = nccl::UniqueId;
};
template <>
struct Ours<ncclUniqueId*> {
  using type = nccl::UniqueId*;
};
template <>
struct Ours<ncclResult_t*> {
  using type = nccl::Result*;
};
template <>
struct Ours<ncclConfig_t*> {
  using type = nccl::Config*;
};
template <>
struct Ours<ncclComm_t> {
  using type = void*;
};
template <>
struct Ours<ncclComm_t*> {
  using type = void**;
};
template <>
struct Ours<cudaStream_t> {
  using type = void*;
};

template <class R, class... Args>
auto ours(R (*)(Args...)) -> typename Ours<R>::type (*)(typename Ours<Args>::type...);

#define ORRERY_SAME(name) \
  static_assert(std::is_same_v<decltype(ours(&::name)), decltype(NcclFunctions::name)>, #name)
ORRERY_SAME(ncclGetVersion);
ORRERY_SAME(ncclGetUniqueId);
ORRERY_SAME(ncclCommInitRankConfig);
ORRERY_SAME(ncclCommFinalize);
ORRERY_SAME(ncclCommDestroy);
ORRERY_SAME(ncclCommAbort);
ORRERY_SAME(ncclCommGetAsyncError);
ORRERY_SAME(ncclGetErrorString);
ORRERY_SAME(ncclGetLastError);
ORRERY_SAME(ncclAllReduce);
ORRERY_SAME(ncclReduceScatter);
ORRERY_SAME(ncclAllGather);
ORRERY_SAME(ncclSend);
ORRERY_SAME(ncclRecv);
ORRERY_SAME(ncclGroupStart);
ORRERY_SAME(ncclGroupEnd);

TEST(NcclAbi, ConfigurationBeginsAsNcclsOwnInitializer) {
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  const nccl::Config ours;
  EXPECT_EQ(ours.magic, theirs.magic);
  EXPECT_EQ(ours.blocking, theirs.blocking);
  EXPECT_EQ(ours.cga_cluster_size, theirs.cgaClusterSize);
  EXPECT_EQ(ours.min_ctas, theirs.minCTAs);
  EXPECT_EQ(ours.max_ctas, theirs.maxCTAs);
  EXPECT_EQ(ours.net_name, theirs.netName);
  EXPECT_EQ(ours.split_share, theirs.splitShare);
  EXPECT_EQ(static_cast<int>(ours.version), NCCL_VERSION(2, 18, 0));
}

// NVIDIA's library itself, where it lies beside its header or is installed.
TEST(NcclAbi, NvidiasLibraryHasAllFunctions) {
  if (std::string(ORRERY_NCCL_FILE).empty()) GTEST_SKIP() << "no libnccl.so.2";
  setenv("ORRERY_NCCL_LIBRARY", ORRERY_NCCL_FILE, 1);
  const auto loaded = Nccl::load();
  const auto* why = std::get_if<std::string>(&loaded);
  ASSERT_EQ(why, nullptr) << *why;
  EXPECT_EQ(std::get<0>(loaded)->name().substr(0, 5), "NCCL ");
}

}  // namespace
}  // namespace orrery::kernels
