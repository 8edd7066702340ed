#include "services/checkpoint/fingerprint.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/formats/element_type.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::checkpoint {
namespace {

using testing::RawTensor;
using testing::StatusIs;

std::string FingerprintOf(const std::string& bytes) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/model");
  EXPECT_OK(testing::WriteFileAtomically(path, bytes));
  const auto checkpoint = Checkpoint::Open(path);
  EXPECT_OK(checkpoint);
  if (!checkpoint.ok()) return "";
  const absl::StatusOr<std::string> fingerprint = Fingerprint(**checkpoint);
  EXPECT_OK(fingerprint);
  return fingerprint.value_or("");
}

std::string FingerprintOf(const std::vector<RawTensor>& tensors) {
  return FingerprintOf(testing::SafetensorsBytes(tensors));
}

std::vector<RawTensor> BaseModel() { return *testing::MakeRandomModel({}); }

// Snapshots in a state store name their model by it: it must never change for a file that exists.
TEST(FingerprintTest, TheFingerprintOfAFileStaysWhatItWas) {
  ASSERT_OK_AND_ASSIGN(const auto small, Checkpoint::Open("services/checkpoint/testdata/torch_zip.pth"));
  EXPECT_EQ(Fingerprint(*small).value(), "91615d520fdd79042eebfa9c18931153");
  std::string counted(3 << 20, '\0');
  for (size_t i = 0; i < counted.size(); ++i) counted[i] = static_cast<char>(i * i >> 8);
  EXPECT_EQ(FingerprintOf(std::vector<RawTensor>{{{"large", ElementType::kBFloat16, {3, 1 << 19}}, counted}}),
            "0be2222d9cc8723788ca25b9b5f2588d");
}

TEST(FingerprintTest, IsIndependentOfTheDialect) {
  ASSERT_OK_AND_ASSIGN(const auto original, Checkpoint::Open("services/checkpoint/testdata/v6.safetensors"));
  ASSERT_OK_AND_ASSIGN(const auto web_rwkv, Checkpoint::Open("services/checkpoint/testdata/v6.st"));
  EXPECT_EQ(Fingerprint(*web_rwkv).value(), Fingerprint(*original).value());
}

TEST(FingerprintTest, IsIndependentOfTheContainer) {
  std::vector<RawTensor> tensors = BaseModel();
  const std::string expected = FingerprintOf(tensors);
  EXPECT_THAT(expected, testing::MatchesRegex("[0-9a-f]+"));
  EXPECT_EQ(expected.size(), 32);
  EXPECT_EQ(FingerprintOf(testing::TorchZipBytes(tensors)), expected);
  EXPECT_EQ(FingerprintOf(testing::TorchLegacyBytes(tensors)), expected);
  EXPECT_EQ(FingerprintOf(testing::SafetensorsBytes(tensors, {{"origin", "elsewhere"}})), expected);

  std::reverse(tensors.begin(), tensors.end());
  EXPECT_EQ(FingerprintOf(tensors), expected) << "order";
  for (RawTensor& tensor : tensors) {
    tensor.spec.name = absl::StrCat("model.", tensor.spec.name);
    if (tensor.spec.shape.size() == 3) tensor.spec.shape = {tensor.spec.shape[2]};
  }
  EXPECT_EQ(FingerprintOf(tensors), expected) << "prefix and unit dimensions";
}

TEST(FingerprintTest, AStridedTensorHasTheFingerprintOfItsContent) {
  const std::string folder = "services/checkpoint/testdata/";
  ASSERT_OK_AND_ASSIGN(const auto strided, Checkpoint::Open(folder + "torch_zip.pth"));
  ASSERT_OK_AND_ASSIGN(const auto plain, Checkpoint::Open(folder + "safetensors.safetensors"));
  EXPECT_EQ(Fingerprint(*strided).value(), Fingerprint(*plain).value());
}

TEST(FingerprintTest, AnyChangeOfASmallTensorShows) {
  const std::string expected = FingerprintOf(BaseModel());
  const struct {
    const char* name;
    std::function<void(std::vector<RawTensor>*)> change;
  } kCases[] = {
      {"the first bit", [](auto* t) { t->front().data.front() ^= 1; }},
      {"the last bit", [](auto* t) { t->back().data.back() ^= 1; }},
      {"a name", [](auto* t) { t->back().spec.name += "x"; }},
      {"a type of equal size", [](auto* t) { t->back().spec.type = ElementType::kFloat16; }},
      {"a shape of equal size",
       [](auto* t) {
         for (RawTensor& tensor : *t) {
           if (tensor.spec.name == "head.weight") std::swap(tensor.spec.shape[0], tensor.spec.shape[1]);
         }
       }},
      {"one tensor less", [](auto* t) { t->pop_back(); }},
      {"an empty tensor more",
       [](auto* t) {
         t->push_back({{"zzz", ElementType::kUint8, {0}}, ""});
       }},
      {"contents exchanged", [](auto* t) { std::swap((*t)[1].data, (*t)[2].data); }},
  };
  for (const auto& test : kCases) {
    std::vector<RawTensor> tensors = BaseModel();
    test.change(&tensors);
    EXPECT_NE(FingerprintOf(tensors), expected) << test.name;
  }
}

TEST(FingerprintTest, ALargeTensorIsSampledAtBothEndsAndBetween) {
  constexpr size_t kBytes = 5'000'001;
  std::vector<RawTensor> tensors = {{{"large", ElementType::kUint8, {kBytes}}, std::string(kBytes, 'x')}};
  const std::string expected = FingerprintOf(tensors);
  int seen = 0;
  for (size_t at : {size_t{0}, size_t{4095}, (kBytes - 4096) / 15, kBytes - 4096, kBytes - 1}) {
    tensors[0].data[at] = 'y';
    EXPECT_NE(FingerprintOf(tensors), expected) << "byte " << at;
    tensors[0].data[at] = 'x';
    ++seen;
  }
  EXPECT_EQ(seen, 5);
  tensors[0].data[100'000] = 'y';
  EXPECT_EQ(FingerprintOf(tensors), expected) << "byte 100000 is in no window, so that no stage need read it";
}

TEST(FingerprintTest, AnOptionMakesAnotherModel) {
  const std::string plain(32, 'a');
  const std::string with = FingerprintWith(plain, "epsilon=1e-5");
  EXPECT_EQ(with.size(), plain.size());
  EXPECT_NE(with, plain);
  EXPECT_EQ(with, FingerprintWith(plain, "epsilon=1e-5"));
  EXPECT_NE(with, FingerprintWith(plain, "epsilon=1e-4"));
  EXPECT_NE(with, FingerprintWith(std::string(32, 'b'), "epsilon=1e-5"));
}

TEST(FingerprintTest, AFileCutWhileOpenIsDataLoss) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/cut");
  ASSERT_OK(testing::WriteFileAtomically(path, testing::SafetensorsBytes(BaseModel())));
  ASSERT_OK_AND_ASSIGN(const auto checkpoint, Checkpoint::Open(path));
  ASSERT_EQ(truncate(path.c_str(), 20'000), 0);
  EXPECT_THAT(Fingerprint(*checkpoint), StatusIs(absl::StatusCode::kDataLoss, testing::HasSubstr("cut: tensor ")));
}

}  // namespace
}  // namespace rwkv::checkpoint
