#include "kernels/cuda_module.hpp"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>
#include <variant>

#include "kernels/device.hpp"

namespace orrery::kernels {
namespace {

/// An environment variable for as long as this lives.
class Environment {
 public:
  Environment(const char* name, const std::string& value) : name_(name) {
    if (const char* const old = std::getenv(name)) old_ = old;
    setenv(name, value.c_str(), 1);
  }
  ~Environment() {
    if (old_.empty()) {
      unsetenv(name_);
    } else {
      setenv(name_, old_.c_str(), 1);
    }
  }
  Environment(const Environment&) = delete;
  Environment& operator=(const Environment&) = delete;

 private:
  const char* name_;
  std::string old_;
};

std::string reason(const std::variant<std::unique_ptr<Device>, std::string>& opened) {
  const auto* text = std::get_if<std::string>(&opened);
  return text == nullptr ? "" : *text;
}

// The module is built beside the program, which this test is not.
TEST(CudaModule, SaysThatThereIsNone) {
  const Environment none("ORRERY_CUDA_MODULE", "");
  const std::string text = reason(open_cuda_device());
  EXPECT_TRUE(text.starts_with("built without CUDA: configure with the preset cuda") ||
              text.starts_with("liborrery_cuda.so not found beside the program"))
      << text;
}

TEST(CudaModule, SaysWhichFileDoesNotExist) {
  const Environment named("ORRERY_CUDA_MODULE", "/nowhere/liborrery_cuda.so");
  EXPECT_EQ(reason(open_cuda_device()),
            "ORRERY_CUDA_MODULE names /nowhere/liborrery_cuda.so, which does not exist");
}

TEST(CudaModule, DoesNotLoadWhatIsNoModule) {
  const std::string file = testing::TempDir() + "no_module.so";
  std::ofstream(file) << "not a shared object\n";
  const Environment named("ORRERY_CUDA_MODULE", file);
  const std::string text = reason(open_cuda_device());
  EXPECT_TRUE(text.starts_with("no NVIDIA driver on this machine: ") ||
              text.starts_with("cannot load " + file))
      << text;
}

}  // namespace
}  // namespace orrery::kernels
