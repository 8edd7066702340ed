#include "services/common/security/api_keys.h"

#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/gauge.h"
#include "services/common/metrics.h"
#include "services/common/security/access.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

// printf abc | sha256sum, from FIPS 180-2.
constexpr char kAbc[] = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
// printf '' | sha256sum
constexpr char kNothing[] = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

std::string Line(const char* hash, const std::string& rest) { return absl::StrCat("sha256:", hash, " ", rest, "\n"); }

TEST(ApiKeysTest, ParsesLines) {
  ASSERT_OK_AND_ASSIGN(const std::vector<ApiKey> keys,
                       ParseApiKeys(absl::StrCat("# people\n\n  ", Line(kAbc, "name=alice tenant=acme"),
                                                 Line(kNothing, "\trole=operator   name=ops@host"))));
  ASSERT_THAT(keys, SizeIs(2));
  EXPECT_EQ(keys[0].name, "alice");
  EXPECT_EQ(keys[0].role, Role::kClient);
  EXPECT_EQ(keys[0].tenant, "acme");
  EXPECT_THAT(keys[0].sha256, SizeIs(32));
  EXPECT_EQ(keys[1].role, Role::kOperator);
  EXPECT_THAT(ParseApiKeys(""), IsOkAndHolds(IsEmpty()));
}

TEST(ApiKeysTest, RefusesWhatItDoesNotKnowWithoutSayingTheHash) {
  struct Case {
    std::string text;
    std::string why;
  };
  for (const Case& c : std::vector<Case>{
           {"name=alice", "no sha256"},
           {Line(kAbc, ""), "no name"},
           {"sha256:abc name=a", "64 hex digits"},
           {absl::StrReplaceAll(Line(kAbc, "name=a"), {{"ba78", "xy78"}}), "64 hex digits"},
           {Line(kAbc, "name=a role=root"), "no role \"root\""},
           {Line(kAbc, "name=a role=router"), "client, gateway or operator"},
           {Line(kAbc, "name=a role=worker"), "client, gateway or operator"},
           {Line(kAbc, "name=a role=client role=operator"), "role= is once"},
           {Line(kAbc, "name=a name=b"), "one name"},
           {Line(kAbc, "name=a tenants=b"), "none of"},
           {Line(kAbc, "name=a requests_per_minute=5"), "none of"},
           {Line(kAbc, "name=a/b"), "A-Za-z0-9"},
           {Line(kAbc, "name=a") + Line(kNothing, "name=a"), "line 2: its name"},
           {Line(kAbc, "name=a") + Line(kAbc, "name=b"), "line 2: its key"},
       }) {
    EXPECT_THAT(ParseApiKeys(c.text).status(),
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(c.why), Not(HasSubstr("ba78")))))
        << c.text;
  }
}

class ApiKeysFileTest : public ::testing::Test {
 protected:
  void Write(const std::string& text) {
    std::ofstream(path_ + ".new") << text;
    ASSERT_EQ(std::rename((path_ + ".new").c_str(), path_.c_str()), 0);
  }
  const std::string path_ = ::testing::TempDir() + "/api_keys";
  const std::unique_ptr<Metrics> metrics_ = *Metrics::Create("");
};

TEST_F(ApiKeysFileTest, FindsByTheKeyItself) {
  Write(Line(kAbc, "name=alice tenant=acme role=gateway"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ApiKeys> keys, ApiKeys::Open(path_, absl::ZeroDuration(), metrics_.get()));
  const auto found = keys->Find("abc");
  ASSERT_TRUE(found.has_value());
  EXPECT_EQ(found->name, "alice");
  EXPECT_EQ(found->tenant, "acme");
  EXPECT_EQ(found->role, Role::kGateway);
  for (const std::string& wrong : std::vector<std::string>{"", "ab", "abcd", "ABC", kAbc}) {
    EXPECT_FALSE(keys->Find(wrong).has_value()) << wrong;
  }
}

TEST_F(ApiKeysFileTest, IsReadAgainWhenItChanges) {
  Write(Line(kAbc, "name=alice"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ApiKeys> keys, ApiKeys::Open(path_, absl::ZeroDuration(), metrics_.get()));
  Write(Line(kAbc, "name=bobby"));  // As long as before, within the same second.
  ASSERT_TRUE(keys->Find("abc").has_value());
  EXPECT_EQ(keys->Find("abc")->name, "bobby");
  prometheus::Gauge& unusable = metrics_->Gauge("rwkv_server_file_unusable", "", {{"file", "api_keys"}});
  EXPECT_EQ(unusable.Value(), 0);
  Write("sha256:broken");
  keys->Look();  // Also while nobody calls.
  EXPECT_EQ(unusable.Value(), 1);
  EXPECT_TRUE(keys->Find("abc").has_value()) << "a broken file takes no key away";
  ASSERT_EQ(std::remove(path_.c_str()), 0);
  EXPECT_TRUE(keys->Find("abc").has_value()) << "a lost file takes no key away";
  Write("# nobody\n");
  EXPECT_FALSE(keys->Find("abc").has_value());
  Write(Line(kAbc, "name=carol"));
  EXPECT_TRUE(keys->Find("abc").has_value());
}

TEST_F(ApiKeysFileTest, MustBeThereAndRightAtTheStart) {
  EXPECT_THAT(ApiKeys::Open("/nonexistent/keys", absl::ZeroDuration(), metrics_.get()).status(),
              StatusIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(ApiKeys::Open(::testing::TempDir(), absl::ZeroDuration(), metrics_.get()).status(),
              StatusIs(absl::StatusCode::kUnavailable));
  Write("key=abc");
  EXPECT_THAT(ApiKeys::Open(path_, absl::ZeroDuration(), metrics_.get()).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("line 1")));
}

}  // namespace
}  // namespace rwkv::common
