// A model with our operator, compiled by AOTInductor, runs from C++ without Python.
#include <gtest/gtest.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/script.h>

#include <cstdlib>
#include <string>

namespace {

std::string from_environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

TEST(AotInductor, AModelWithTheLossRuns) {
  const std::string model_path = from_environment("OE_EXT_MODEL");
  const std::string inputs_path = from_environment("OE_EXT_INPUTS");
  ASSERT_FALSE(model_path.empty() || inputs_path.empty()) << "export_model.py writes them";
  const auto tensors = torch::jit::load(inputs_path);
  const at::Tensor features = tensors.attr("features").toTensor();
  const at::Tensor expected = tensors.attr("expected").toTensor();

  torch::inductor::AOTIModelPackageLoader loader(model_path);
  const std::vector<at::Tensor> outputs = loader.run({features});
  ASSERT_EQ(outputs.size(), 1U);
  EXPECT_EQ(outputs[0].sizes(), expected.sizes());
  EXPECT_TRUE(at::allclose(outputs[0], expected, 1e-5, 1e-6));
}

}  // namespace
