#include "services/common/reloaded_file.h"

#include <stdlib.h>

#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ReloadedFileTest : public ::testing::Test {
 protected:
  ReloadedFileTest()
      : path_(absl::StrCat(::testing::TempDir(), "/file_",
                           ::testing::UnitTest::GetInstance()->current_test_info()->name())) {}
  // Replaces it as an operator should: another file under its name.
  void Write(const std::string& text) {
    std::ofstream(path_ + ".new") << text;
    ASSERT_EQ(rename((path_ + ".new").c_str(), path_.c_str()), 0);
  }
  absl::StatusOr<std::unique_ptr<ReloadedFile>> Open() {
    const auto use = [this](const std::string& text) {
      if (text == "wrong") return absl::InvalidArgumentError("line 1: wrong");
      used_.push_back(text);
      return absl::OkStatus();
    };
    return ReloadedFile::Open(path_, "test", 100, absl::Seconds(1), use, metrics_.get());
  }

  double Unusable() { return metrics_->Gauge("rwkv_server_file_unusable", "", {{"file", "test"}}).Value(); }

  const std::string path_;
  const std::unique_ptr<Metrics> metrics_ = *Metrics::Create("");
  std::vector<std::string> used_;
};

TEST_F(ReloadedFileTest, ChangesAreTakenUpAndWrongOnesAreNot) {
  Write("one");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ReloadedFile> file, Open());
  absl::Time now = absl::Now();
  Write("two");
  EXPECT_FALSE(file->Look(now));  // Too early.
  EXPECT_TRUE(file->Look(now += absl::Seconds(2)));
  EXPECT_FALSE(file->Look(now += absl::Seconds(2)));
  EXPECT_EQ(Unusable(), 0);
  Write("wrong");
  EXPECT_TRUE(file->Look(now += absl::Seconds(2)));
  EXPECT_EQ(Unusable(), 1);
  EXPECT_FALSE(file->Look(now += absl::Seconds(2)));  // Said once.
  std::remove(path_.c_str());
  EXPECT_TRUE(file->Look(now += absl::Seconds(2)));
  EXPECT_FALSE(file->Look(now += absl::Seconds(2)));
  EXPECT_THAT(used_, ElementsAre("one", "two"));
  EXPECT_EQ(Unusable(), 1);
  Write("three");
  EXPECT_TRUE(file->Look(now += absl::Seconds(2)));
  EXPECT_EQ(Unusable(), 0);
  EXPECT_THAT(used_, ElementsAre("one", "two", "three"));
}

TEST_F(ReloadedFileTest, OneThatIsOfNoUseAtTheStartIsAnError) {
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kNotFound, HasSubstr(path_)));
  Write("wrong");
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(path_), HasSubstr("line 1"))));
  Write(std::string(101, 'x'));
  EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("larger than 100")));
}

}  // namespace
}  // namespace rwkv::common
