#include "tests/testing/random_model.h"

#include <cmath>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/dtype.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/files.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::testing {
namespace {

std::vector<RawTensor> Model(const RandomModelOptions& options) { return *MakeRandomModel(options); }

TEST(RandomModelTest, TheFileHoldsTheModel) {
  const std::string path = absl::StrCat(TempDir(), "/model.safetensors");
  ASSERT_OK(WriteRandomModel({}, path));
  EXPECT_EQ(ReadFile(path),
            SafetensorsBytes(*MakeRandomModel({}), {{"format", "pt"}, {"origin", "random RWKV-7, seed 1"}}));
}

TEST(RandomModelTest, ATensorDependsOnSeedAndNameAlone) {
  std::map<std::string, std::string> base;
  for (const RawTensor& tensor : Model({})) base[tensor.spec.name] = tensor.data;
  RandomModelOptions options;
  options.layers = 3;
  options.time_state = true;
  int found = 0;
  for (const RawTensor& tensor : Model(options)) {
    if (base.count(tensor.spec.name) == 0) continue;
    EXPECT_EQ(tensor.data, base[tensor.spec.name]) << tensor.spec.name;
    ++found;
  }
  EXPECT_EQ(found, static_cast<int>(base.size()));
  options.seed = 2;
  for (const RawTensor& tensor : Model(options)) EXPECT_NE(tensor.data, base[tensor.spec.name]) << tensor.spec.name;
}

TEST(RandomModelTest, TheScalesAreThoseAskedFor) {
  RandomModelOptions options;
  options.dtype = kernels::DType::kFloat32;
  options.vocab_size = 1000;
  for (const RawTensor& tensor : Model(options)) {
    const bool is_uniform = tensor.spec.name == "blocks.1.att.w0";
    if (tensor.spec.name != "emb.weight" && !is_uniform) continue;
    std::vector<float> values(ElementsOf(tensor.spec));
    kernels::WidenToFloat(kernels::DType::kFloat32, tensor.data.data(), static_cast<int64_t>(values.size()),
                          values.data());
    double sum = 0, squares = 0;
    for (float value : values) {
      sum += value;
      squares += double{value} * value;
      if (is_uniform) {
        EXPECT_GE(value, -7);
        EXPECT_LT(value, 1);
      }
    }
    const double n = static_cast<double>(values.size());
    const double deviation = std::sqrt(squares / n - sum * sum / n / n);
    // Six standard errors of the mean; w0 is uniform on [-7, 1), emb normal with deviation 0.5.
    EXPECT_NEAR(sum / n, is_uniform ? -3 : 0, 6 * deviation / std::sqrt(n));
    EXPECT_NEAR(deviation, is_uniform ? 8 / std::sqrt(12.0) : 0.5, is_uniform ? 0.8 : 0.01);
  }
}

TEST(RandomModelTest, SizesThatMakeNoModelAreRefused) {
  RandomModelOptions options;
  options.head_size = 7;
  EXPECT_THAT(MakeRandomModel(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("head size 7")));
  options = {};
  options.layers = 0;
  EXPECT_THAT(MakeRandomModel(options), StatusIs(absl::StatusCode::kInvalidArgument));
  options = {};
  options.vocab_size = int64_t{1} << 40;
  EXPECT_THAT(MakeRandomModel(options), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST(RandomModelTest, AFailedWriteLeavesNothingBehind) {
  EXPECT_THAT(WriteRandomModel({}, "/no/such/folder/model"), StatusIs(absl::StatusCode::kNotFound));
  const std::string path = absl::StrCat(TempDir(), "/half");
  EXPECT_THAT(WriteFileAtomically(path,
                                  [](const AppendFunction& append) {
                                    EXPECT_OK(append("half of it"));
                                    return absl::ResourceExhaustedError("disk full");
                                  }),
              StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_FALSE(std::ifstream(path).good());
}

}  // namespace
}  // namespace rwkv::testing
