// What CUPTI does on the host: metrics of a chip become a configuration. No GPU is needed.

#include "kernels/cuda/counters.hpp"

#include <gtest/gtest.h>

#include <stdexcept>

namespace orrery::kernels::cuda {
namespace {

TEST(Counters, OfMemoryAndTensorCoresAreKnownForHopper) {
  for (const char* metric :
       {"dram__bytes_read.sum", "dram__bytes_write.sum",
        "sm__inst_executed_pipe_tensor_op_gmma.sum", "gpu__time_duration.sum"}) {
    const CounterConfig config = counter_config("GH100", {}, {metric});
    EXPECT_FALSE(config.image.empty()) << metric;
    EXPECT_EQ(config.passes, 1U) << metric;
  }
}

TEST(Counters, ThatDoNotFitIntoOnePassTakeMore) {
  EXPECT_GT(
      counter_config("GH100", {}, {"sm__throughput.avg.pct_of_peak_sustained_elapsed"}).passes, 1U);
}

TEST(Counters, ThatTheChipDoesNotHaveAreNamed) {
  try {
    counter_config("GH100", {}, {"dram__bytes_read.sum", "dram__bites_read.sum"});
    FAIL() << "no error";
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find("the counter dram__bites_read.sum: CUPTI_ERROR"),
              std::string::npos)
        << e.what();
  }
}

// Hides all GPUs, so that it passes anywhere.
TEST(Counters, AreRefusedWithoutAGpu) {
  setenv("CUDA_VISIBLE_DEVICES", "", 1);
  bool ran = false;
  EXPECT_THROW(count_on_this_device({"dram__bytes_read.sum"}, [&] { ran = true; }),
               std::runtime_error);
  EXPECT_FALSE(ran);
}

}  // namespace
}  // namespace orrery::kernels::cuda
