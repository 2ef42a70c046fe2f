// open_cuda_device(): looks for the module, loads it and asks it for a device. Nothing here or in
// what links it needs CUDA to build or to start.

#include "kernels/cuda_module.hpp"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <system_error>

#include "kernels/device.hpp"

namespace orrery::kernels {

namespace {

std::string last_error() {
  const char* const message = dlerror();
  return message == nullptr ? "unknown error" : message;
}

/// The module's file, or why there is none.
std::variant<std::filesystem::path, std::string> find_module() {
  std::error_code error;
  if (const char* const named = std::getenv("ORRERY_CUDA_MODULE");
      named != nullptr && *named != '\0') {
    if (std::filesystem::exists(named, error)) return std::filesystem::path(named);
    return "ORRERY_CUDA_MODULE names " + std::string(named) + ", which does not exist";
  }
  const auto program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) {
    auto beside = program.parent_path() / kCudaModuleFile;
    if (std::filesystem::exists(beside, error)) return beside;
  }
#ifdef ORRERY_CUDA
  return std::string(kCudaModuleFile) + " not found beside the program (" +
         program.parent_path().string() + "): build the target orrery_cuda, or name the file in " +
         "ORRERY_CUDA_MODULE";
#else
  return "built without CUDA: configure with the preset cuda, or name " +
         std::string(kCudaModuleFile) + " of such a build in ORRERY_CUDA_MODULE";
#endif
}

/// Function `name` of a loaded module; null if it has none.
template <class Function>
Function* function_of(void* module, const char* name) {
  return reinterpret_cast<Function*>(dlsym(module, name));
}

struct Module {
  CudaModuleCount* count = nullptr;
  CudaModuleOpen* open = nullptr;
};

/// The module's functions, or why there are none.
std::variant<Module, std::string> load_module() {
  const auto found = find_module();
  if (const auto* reason = std::get_if<std::string>(&found)) return *reason;
  const std::string file = std::get<std::filesystem::path>(found).string();

  // First, since its absence is the most common reason, and clear.
  if (dlopen("libcuda.so.1", RTLD_NOW | RTLD_GLOBAL) == nullptr) {
    return "no NVIDIA driver on this machine: " + last_error();
  }
  // Never closed: threads of the driver may be inside.
  void* const module = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (module == nullptr) return "cannot load " + file + ": " + last_error();
  auto* const version = function_of<CudaModuleVersion>(module, kCudaModuleVersionSymbol);
  const Module functions{.count = function_of<CudaModuleCount>(module, kCudaModuleCountSymbol),
                         .open = function_of<CudaModuleOpen>(module, kCudaModuleOpenSymbol)};
  if (version == nullptr) return file + " is not a CUDA module of orrery";
  if (version() != kCudaModuleVersion) {
    return file + " is of another version of orrery (" + std::to_string(version()) + ", not " +
           std::to_string(kCudaModuleVersion) + "): build it again";
  }
  if (functions.count == nullptr || functions.open == nullptr) {
    return file + " is not a CUDA module of orrery";
  }
  return functions;
}

}  // namespace

std::variant<std::unique_ptr<Device>, std::string> open_cuda_device(int ordinal) {
  const auto loaded = load_module();
  if (const auto* reason = std::get_if<std::string>(&loaded)) return *reason;
  std::array<char, 1024> reason{};
  if (Device* const device = std::get<Module>(loaded).open(ordinal, reason.data(), reason.size())) {
    return std::unique_ptr<Device>(device);
  }
  return std::string(reason.data());
}

int count_cuda_devices() {
  const auto loaded = load_module();
  return std::holds_alternative<Module>(loaded) ? std::get<Module>(loaded).count() : 0;
}

}  // namespace orrery::kernels
