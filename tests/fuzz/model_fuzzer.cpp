// Any bytes as a model: problems, or a Model that can be counted without overflow and survives
// being written and read again.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "models/model.hpp"
#include "sim/check.hpp"
#include "sim/config.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
  using namespace orrery;
  Problems problems;
  const std::string text(reinterpret_cast<const char*>(bytes), size);
  const Node node = read_document_text(text, "fuzz", problems);
  std::vector<std::string> notes;
  const Model model = read_model(node, problems, &notes);
  if (!problems.empty()) {
    ORRERY_CHECK(!format_problems(problems.list()).empty(), "a problem without words");
    return 0;
  }
  const ParameterCount count = count_parameters(model);
  ORRERY_CHECK(count.total() > 0 && count.mtp >= 0, "{} parameters, {} of MTP", count.total(),
               count.mtp);
  const ActiveParameters active = count_active_parameters(model);
  ORRERY_CHECK(active.body > 0 && active.with_head_and_embedding <= count.total(),
               "{} active of {}", active.with_head_and_embedding, count.total());
  ORRERY_CHECK(training_flops_per_token(model, model.max_positions).causal > 0, "no work");
  Problems again;
  const std::string yaml = to_yaml(model);
  const Model copy = read_model(read_document_text(yaml, "copy", again), again);
  ORRERY_CHECK(again.empty(), "{}\n{}", yaml, format_problems(again.list()));
  ORRERY_CHECK(copy == model, "{}\nbecame\n{}", yaml, to_yaml(copy));
  return 0;
}
