#include "kernels/dispatch/open_device.h"

#include <memory>
#include <set>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(OpenDeviceTest, AutoOpensTheFastest) {
  for (const char* request : {"auto", "cpu"}) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Device> device, OpenDevice(request));
    EXPECT_EQ(device->name(), AvailableDevices().back());
    EXPECT_NE(device->name(), "reference");
  }
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

TEST(OpenDeviceTest, DeviceOfAnotherProcessorIsUnimplemented) {
  for (const char* name : {"cpu/avx2", "cpu/avx512", "cpu/avx512vnni"}) {
    bool available = false;
    for (const std::string& device : AvailableDevices()) available = available || device == name;
    if (!available) EXPECT_THAT(OpenDevice(name), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr(name)));
  }
}

TEST(OpenDeviceTest, UnknownNameIsInvalidAndTheMessageListsTheOthers) {
  EXPECT_THAT(
      OpenDevice("gpu/wish"),
      StatusIs(absl::StatusCode::kInvalidArgument,
               AllOf(HasSubstr("gpu/wish"), HasSubstr("auto, reference, cpu, cpu/portable, cpu/avx2, cpu/avx512, cpu/avx512vnni"))));
  EXPECT_THAT(OpenDevice(""), StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace rwkv::kernels
