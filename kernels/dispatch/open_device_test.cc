#include "kernels/dispatch/open_device.h"

#include <memory>
#include <set>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

TEST(OpenDeviceTest, AutoOpensTheFastest) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> cpu, OpenDevice("cpu"));
  EXPECT_THAT(std::string(cpu->name()), StartsWith("cpu/"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> device, OpenDevice("auto"));
  EXPECT_EQ(device->name(), WhyNoGpu().empty() ? "cuda:0" : cpu->name());
}

TEST(OpenDeviceTest, EveryAvailableDeviceIsOpenedByItsName) {
  std::set<std::string> names;
  for (const std::string& name : AvailableDevices()) {
    EXPECT_TRUE(names.insert(name).second) << name;
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> device, OpenDevice(name));
    EXPECT_EQ(device->name(), name);
    EXPECT_FALSE(device->numeric_family().empty()) << name;
  }
  EXPECT_EQ(names.count("reference"), 1u);
  EXPECT_EQ(names.count("cpu/portable"), 1u);
}

TEST(OpenDeviceTest, ThreadsAreAsManyAsAskedFor) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> three, OpenDevice("cpu", 3));
  EXPECT_EQ(three->threads(), 3);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> all, OpenDevice("cpu"));
  EXPECT_GE(all->threads(), 1);
  EXPECT_THAT(OpenDevice("cpu", -1), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("threads is -1")));
}

#if defined(__aarch64__)
constexpr const char* kBackends[] = {"cpu/portable", "cpu/neon"};
#else
constexpr const char* kBackends[] = {"cpu/portable",   "cpu/avx2",     "cpu/avx512", "cpu/avx512/bf16",
                                     "cpu/avx512vnni", "cpu/amx/bf16", "cpu/amx"};
#endif

TEST(OpenDeviceTest, DeviceOfAnotherProcessorIsUnimplemented) {
  for (const char* name : kBackends) {
    if (absl::EndsWith(name, "/bf16")) continue;  // Never listed: they round more than they must.
    bool available = false;
    for (const std::string& device : AvailableDevices()) available = available || device == name;
    if (!available) EXPECT_THAT(OpenDevice(name), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr(name)));
  }
}

// The same program runs with and without a GPU, and says what it lacks.
TEST(OpenDeviceTest, GpuThatIsNotThereIsUnimplementedInWords) {
  EXPECT_THAT(OpenDevice("cuda:99"), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("cuda:99")));
  if (WhyNoGpu().empty()) return;
  EXPECT_THAT(WhyNoGpu(), HasSubstr("cuda:0"));
  EXPECT_THAT(OpenDevice("cuda:0"), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr(WhyNoGpu())));
}

TEST(OpenDeviceTest, UnknownNameIsInvalidAndTheMessageListsTheOthers) {
  EXPECT_THAT(OpenDevice("gpu/wish"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("gpu/wish"),
                             HasSubstr("auto, reference, cpu, " + absl::StrJoin(kBackends, ", ") + ", cuda:"))));
  EXPECT_THAT(OpenDevice("cuda:"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("\"cuda:\"")));
  EXPECT_THAT(OpenDevice(""), StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace rwkv::kernels
