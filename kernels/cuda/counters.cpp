#include "kernels/cuda/counters.hpp"

#include <cuda_runtime_api.h>
#include <cupti_profiler_host.h>
#include <cupti_profiler_target.h>
#include <cupti_range_profiler.h>
#include <cupti_target.h>

#include <stdexcept>

namespace orrery::kernels::cuda {

void check(CUptiResult result, const char* what) {
  if (result == CUPTI_SUCCESS) return;
  const char* name = nullptr;
  cuptiGetResultString(result, &name);
  std::string message = std::string(what) + ": " + (name == nullptr ? "unknown error" : name);
  if (result == CUPTI_ERROR_INSUFFICIENT_PRIVILEGES) {
    message +=
        ": the driver lets only the administrator profile on this machine (module parameter "
        "NVreg_RestrictProfilingToAdminUsers of nvidia)";
  }
  throw std::runtime_error(message);
}

namespace {

/// Parameters of a CUPTI call: zero but for their size.
template <class Parameters>
Parameters sized(std::size_t bytes) {
  Parameters parameters{};
  parameters.structSize = bytes;
  return parameters;
}

std::vector<const char*> pointers_to(const std::vector<std::string>& names) {
  std::vector<const char*> pointers;
  for (const std::string& name : names) pointers.push_back(name.c_str());
  return pointers;
}

/// What turns names of metrics into raw counters and back.
class Host {
 public:
  Host(const std::string& chip, const std::vector<std::uint8_t>& availability) {
    auto p = sized<CUpti_Profiler_Host_Initialize_Params>(
        CUpti_Profiler_Host_Initialize_Params_STRUCT_SIZE);
    p.profilerType = CUPTI_PROFILER_TYPE_RANGE_PROFILER;
    p.pChipName = chip.c_str();
    p.pCounterAvailabilityImage = availability.empty() ? nullptr : availability.data();
    check(cuptiProfilerHostInitialize(&p), ("CUPTI's counters of " + chip).c_str());
    object_ = p.pHostObject;
  }
  ~Host() {
    auto p = sized<CUpti_Profiler_Host_Deinitialize_Params>(
        CUpti_Profiler_Host_Deinitialize_Params_STRUCT_SIZE);
    p.pHostObject = object_;
    cuptiProfilerHostDeinitialize(&p);
  }
  Host(const Host&) = delete;
  Host& operator=(const Host&) = delete;

  void add(const std::string& metric) {
    const char* name = metric.c_str();
    auto p = sized<CUpti_Profiler_Host_ConfigAddMetrics_Params>(
        CUpti_Profiler_Host_ConfigAddMetrics_Params_STRUCT_SIZE);
    p.pHostObject = object_;
    p.ppMetricNames = &name;
    p.numMetrics = 1;
    check(cuptiProfilerHostConfigAddMetrics(&p), ("the counter " + metric).c_str());
  }

  std::vector<std::uint8_t> image() const {
    auto size = sized<CUpti_Profiler_Host_GetConfigImageSize_Params>(
        CUpti_Profiler_Host_GetConfigImageSize_Params_STRUCT_SIZE);
    size.pHostObject = object_;
    check(cuptiProfilerHostGetConfigImageSize(&size), "cuptiProfilerHostGetConfigImageSize");
    std::vector<std::uint8_t> bytes(size.configImageSize);
    auto p = sized<CUpti_Profiler_Host_GetConfigImage_Params>(
        CUpti_Profiler_Host_GetConfigImage_Params_STRUCT_SIZE);
    p.pHostObject = object_;
    p.configImageSize = bytes.size();
    p.pConfigImage = bytes.data();
    check(cuptiProfilerHostGetConfigImage(&p), "cuptiProfilerHostGetConfigImage");
    return bytes;
  }

  std::vector<double> values(const std::vector<std::uint8_t>& counters,
                             std::vector<const char*> metrics) const {
    std::vector<double> result(metrics.size());
    auto p = sized<CUpti_Profiler_Host_EvaluateToGpuValues_Params>(
        CUpti_Profiler_Host_EvaluateToGpuValues_Params_STRUCT_SIZE);
    p.pHostObject = object_;
    p.pCounterDataImage = counters.data();
    p.counterDataImageSize = counters.size();
    p.rangeIndex = 0;
    p.ppMetricNames = metrics.data();
    p.numMetrics = metrics.size();
    p.pMetricValues = result.data();
    check(cuptiProfilerHostEvaluateToGpuValues(&p), "reading the counters");
    return result;
  }

 private:
  CUpti_Profiler_Host_Object* object_ = nullptr;
};

CounterConfig config_of(Host& host, const std::vector<std::string>& metrics) {
  for (const std::string& metric : metrics) host.add(metric);
  CounterConfig config{.image = host.image()};
  auto p = sized<CUpti_Profiler_Host_GetNumOfPasses_Params>(
      CUpti_Profiler_Host_GetNumOfPasses_Params_STRUCT_SIZE);
  p.configImageSize = config.image.size();
  p.pConfigImage = config.image.data();
  check(cuptiProfilerHostGetNumOfPasses(&p), "cuptiProfilerHostGetNumOfPasses");
  config.passes = p.numOfPasses;
  return config;
}

/// CUPTI's connection to the driver.
class Session {
 public:
  Session() {
    auto p = sized<CUpti_Profiler_Initialize_Params>(CUpti_Profiler_Initialize_Params_STRUCT_SIZE);
    check(cuptiProfilerInitialize(&p), "cuptiProfilerInitialize");
  }
  ~Session() {
    auto p =
        sized<CUpti_Profiler_DeInitialize_Params>(CUpti_Profiler_DeInitialize_Params_STRUCT_SIZE);
    cuptiProfilerDeInitialize(&p);
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

/// Counting on one context, one range at a time, repeated by the caller for each pass.
class Ranges {
 public:
  explicit Ranges(CUcontext context) {
    auto p =
        sized<CUpti_RangeProfiler_Enable_Params>(CUpti_RangeProfiler_Enable_Params_STRUCT_SIZE);
    p.ctx = context;
    check(cuptiRangeProfilerEnable(&p), "reading hardware counters");
    object_ = p.pRangeProfilerObject;
  }
  ~Ranges() {
    auto p =
        sized<CUpti_RangeProfiler_Disable_Params>(CUpti_RangeProfiler_Disable_Params_STRUCT_SIZE);
    p.pRangeProfilerObject = object_;
    cuptiRangeProfilerDisable(&p);
  }
  Ranges(const Ranges&) = delete;
  Ranges& operator=(const Ranges&) = delete;

  /// Room for the counters of one range.
  std::vector<std::uint8_t> room_for(std::vector<const char*> metrics) const {
    auto size = sized<CUpti_RangeProfiler_GetCounterDataSize_Params>(
        CUpti_RangeProfiler_GetCounterDataSize_Params_STRUCT_SIZE);
    size.pRangeProfilerObject = object_;
    size.pMetricNames = metrics.data();
    size.numMetrics = metrics.size();
    size.maxNumOfRanges = 1;
    size.maxNumRangeTreeNodes = 1;
    check(cuptiRangeProfilerGetCounterDataSize(&size), "cuptiRangeProfilerGetCounterDataSize");
    std::vector<std::uint8_t> counters(size.counterDataSize);
    auto p = sized<CUpti_RangeProfiler_CounterDataImage_Initialize_Params>(
        CUpti_RangeProfiler_CounterDataImage_Initialize_Params_STRUCT_SIZE);
    p.pRangeProfilerObject = object_;
    p.counterDataSize = counters.size();
    p.pCounterData = counters.data();
    check(cuptiRangeProfilerCounterDataImageInitialize(&p),
          "cuptiRangeProfilerCounterDataImageInitialize");
    return counters;
  }

  void configure(const std::vector<std::uint8_t>& image, std::vector<std::uint8_t>& counters) {
    auto p = sized<CUpti_RangeProfiler_SetConfig_Params>(
        CUpti_RangeProfiler_SetConfig_Params_STRUCT_SIZE);
    p.pRangeProfilerObject = object_;
    p.configSize = image.size();
    p.pConfig = image.data();
    p.counterDataImageSize = counters.size();
    p.pCounterDataImage = counters.data();
    p.range = CUPTI_UserRange;
    p.replayMode = CUPTI_UserReplay;
    p.maxRangesPerPass = 1;
    p.numNestingLevels = 1;
    p.minNestingLevel = 1;
    p.targetNestingLevel = 1;
    check(cuptiRangeProfilerSetConfig(&p), "cuptiRangeProfilerSetConfig");
  }

  /// One pass; whether it was the last.
  bool pass(const std::function<void()>& work) {
    auto start =
        sized<CUpti_RangeProfiler_Start_Params>(CUpti_RangeProfiler_Start_Params_STRUCT_SIZE);
    start.pRangeProfilerObject = object_;
    check(cuptiRangeProfilerStart(&start), "cuptiRangeProfilerStart");
    auto push = sized<CUpti_RangeProfiler_PushRange_Params>(
        CUpti_RangeProfiler_PushRange_Params_STRUCT_SIZE);
    push.pRangeProfilerObject = object_;
    push.pRangeName = "work";
    check(cuptiRangeProfilerPushRange(&push), "cuptiRangeProfilerPushRange");
    work();
    const cudaError_t synchronised = cudaDeviceSynchronize();
    auto pop =
        sized<CUpti_RangeProfiler_PopRange_Params>(CUpti_RangeProfiler_PopRange_Params_STRUCT_SIZE);
    pop.pRangeProfilerObject = object_;
    check(cuptiRangeProfilerPopRange(&pop), "cuptiRangeProfilerPopRange");
    auto stop = sized<CUpti_RangeProfiler_Stop_Params>(CUpti_RangeProfiler_Stop_Params_STRUCT_SIZE);
    stop.pRangeProfilerObject = object_;
    check(cuptiRangeProfilerStop(&stop), "cuptiRangeProfilerStop");
    if (synchronised != cudaSuccess) {
      throw std::runtime_error(std::string("a kernel failed while counters were read: ") +
                               cudaGetErrorString(synchronised));
    }
    return stop.isAllPassSubmitted != 0;
  }

  void decode() {
    auto p = sized<CUpti_RangeProfiler_DecodeData_Params>(
        CUpti_RangeProfiler_DecodeData_Params_STRUCT_SIZE);
    p.pRangeProfilerObject = object_;
    check(cuptiRangeProfilerDecodeData(&p), "cuptiRangeProfilerDecodeData");
    if (p.numOfRangeDropped > 0) throw std::runtime_error("CUPTI dropped the counters of a pass");
  }

 private:
  CUpti_RangeProfiler_Object* object_ = nullptr;
};

std::string chip_of_this_device() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) throw std::runtime_error("no GPU is in use");
  auto p = sized<CUpti_Device_GetChipName_Params>(CUpti_Device_GetChipName_Params_STRUCT_SIZE);
  p.deviceIndex = static_cast<std::size_t>(device);
  check(cuptiDeviceGetChipName(&p), "the name of the GPU's chip");
  return p.pChipName;
}

/// The context that this thread's calls go to. By way of the runtime, so that nothing needs libcuda
/// before there is a driver.
CUcontext this_context() {
  using GetCurrent = CUresult(CUcontext*);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status{};
  CUcontext context = nullptr;
  if (cudaGetDriverEntryPointByVersion("cuCtxGetCurrent", &function, 12000, cudaEnableDefault,
                                       &status) != cudaSuccess ||
      function == nullptr || reinterpret_cast<GetCurrent*>(function)(&context) != CUDA_SUCCESS ||
      context == nullptr) {
    throw std::runtime_error("this thread has no CUDA context to read counters of");
  }
  return context;
}

std::vector<std::uint8_t> availability_on(CUcontext context) {
  auto p = sized<CUpti_Profiler_GetCounterAvailability_Params>(
      CUpti_Profiler_GetCounterAvailability_Params_STRUCT_SIZE);
  p.ctx = context;
  check(cuptiProfilerGetCounterAvailability(&p), "reading hardware counters");
  std::vector<std::uint8_t> image(p.counterAvailabilityImageSize);
  p.pCounterAvailabilityImage = image.data();
  check(cuptiProfilerGetCounterAvailability(&p), "reading hardware counters");
  return image;
}

}  // namespace

CounterConfig counter_config(const std::string& chip, const std::vector<std::uint8_t>& availability,
                             const std::vector<std::string>& metrics) {
  Host host(chip, availability);
  return config_of(host, metrics);
}

std::vector<double> count_on_this_device(const std::vector<std::string>& metrics,
                                         const std::function<void()>& work) {
  const Session session;
  const CUcontext context = this_context();
  Host host(chip_of_this_device(), availability_on(context));
  const CounterConfig config = config_of(host, metrics);
  const std::vector<const char*> names = pointers_to(metrics);

  Ranges ranges(context);
  std::vector<std::uint8_t> counters = ranges.room_for(names);
  ranges.configure(config.image, counters);
  // CUPTI says which pass is the last; more than it announced would be a loop without end.
  std::size_t passes = 0;
  while (!ranges.pass(work)) {
    if (++passes > config.passes) throw std::runtime_error("CUPTI wants ever more passes");
  }
  ranges.decode();
  return host.values(counters, names);
}

}  // namespace orrery::kernels::cuda
