#pragma once
// What the program uses of NCCL's C interface, declared here so that it builds without nccl.h: as
// of NCCL 2.18 (struct ncclConfig_t, communicators that do not block), which later versions keep.
// tests/kernels/nccl_abi_test.cpp holds all of it to nccl.h where that is installed.

#include <climits>
#include <cstddef>

namespace orrery::kernels::nccl {

inline constexpr int kLeastVersion = 21800;  ///< NCCL_VERSION_CODE of 2.18.0

struct UniqueId {
  char internal[128];
};

enum Result : int { success = 0, invalid_usage = 5, remote_error = 6, in_progress = 7 };
enum DataType : int { int8 = 0, float32 = 7, float64 = 8, bfloat16 = 9 };
enum RedOp : int { sum = 0 };

/// ncclConfig_t of 2.18. NCCL takes the fields that `size` covers and its own defaults for the rest
/// (nccl@v2.28.9-1, src/init.cc, parseCommConfig).
struct Config {
  std::size_t size = sizeof(Config);
  unsigned int magic = 0xcafebeef;
  unsigned int version = kLeastVersion;
  int blocking = INT_MIN;  ///< undefined, as all below
  int cga_cluster_size = INT_MIN;
  int min_ctas = INT_MIN;
  int max_ctas = INT_MIN;
  const char* net_name = nullptr;
  int split_share = INT_MIN;
};

}  // namespace orrery::kernels::nccl

namespace orrery::kernels {

/// ncclComm_t and cudaStream_t are void* here.
struct NcclFunctions {
  nccl::Result (*ncclGetVersion)(int* version) = nullptr;
  nccl::Result (*ncclGetUniqueId)(nccl::UniqueId* id) = nullptr;
  nccl::Result (*ncclCommInitRankConfig)(void** comm, int ranks, nccl::UniqueId id, int rank,
                                         nccl::Config* config) = nullptr;
  nccl::Result (*ncclCommFinalize)(void* comm) = nullptr;
  nccl::Result (*ncclCommDestroy)(void* comm) = nullptr;
  nccl::Result (*ncclCommAbort)(void* comm) = nullptr;
  nccl::Result (*ncclCommGetAsyncError)(void* comm, nccl::Result* error) = nullptr;
  const char* (*ncclGetErrorString)(nccl::Result result) = nullptr;
  const char* (*ncclGetLastError)(void* comm) = nullptr;
  nccl::Result (*ncclAllReduce)(const void* from, void* to, std::size_t count, nccl::DataType type,
                                nccl::RedOp op, void* comm, void* stream) = nullptr;
  nccl::Result (*ncclReduceScatter)(const void* from, void* to, std::size_t received_count,
                                    nccl::DataType type, nccl::RedOp op, void* comm,
                                    void* stream) = nullptr;
  nccl::Result (*ncclAllGather)(const void* from, void* to, std::size_t sent_count,
                                nccl::DataType type, void* comm, void* stream) = nullptr;
  nccl::Result (*ncclSend)(const void* from, std::size_t count, nccl::DataType type, int peer,
                           void* comm, void* stream) = nullptr;
  nccl::Result (*ncclRecv)(void* to, std::size_t count, nccl::DataType type, int peer, void* comm,
                           void* stream) = nullptr;
  nccl::Result (*ncclGroupStart)() = nullptr;
  nccl::Result (*ncclGroupEnd)() = nullptr;
};

}  // namespace orrery::kernels
