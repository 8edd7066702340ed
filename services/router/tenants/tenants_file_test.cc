#include "services/router/tenants/tenants_file.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(TenantsFileTest, EveryFieldIsRead) {
  ASSERT_OK_AND_ASSIGN(
      const std::vector<TenantLimits> tenants,
      ParseTenants("# who pays\n\n name=acme weight=2.5 requests_per_minute=600\ttokens_per_minute=100000 "
                   "concurrent_turns=8 stored_bytes=20GiB max_tokens=4096 models=a,b-2\r\nname=free\n"));
  ASSERT_EQ(tenants.size(), 2u);
  EXPECT_EQ(tenants[0].name, "acme");
  EXPECT_EQ(tenants[0].weight, 2.5);
  EXPECT_EQ(tenants[0].requests_per_minute, 600);
  EXPECT_EQ(tenants[0].tokens_per_minute, 100000);
  EXPECT_EQ(tenants[0].concurrent_turns, 8);
  EXPECT_EQ(tenants[0].stored_bytes, int64_t{20} << 30);
  EXPECT_EQ(tenants[0].max_tokens, 4096);
  EXPECT_THAT(tenants[0].models, ElementsAre("a", "b-2"));
  EXPECT_EQ(tenants[1].name, "free");
  EXPECT_EQ(tenants[1].weight, 1);
  EXPECT_EQ(tenants[1].requests_per_minute, 0);
  EXPECT_THAT(tenants[1].models, IsEmpty());
  ASSERT_OK_AND_ASSIGN(const std::vector<TenantLimits> bytes, ParseTenants("name=a stored_bytes=123"));
  EXPECT_EQ(bytes[0].stored_bytes, 123);
}

TEST(TenantsFileTest, WhatIsWrongIsNamedWithLineTenantFieldAndValue) {
  struct Case {
    std::string line;
    std::vector<std::string> says;
  };
  for (const Case& c : std::vector<Case>{
           {"name=acme weight=0", {"tenant acme", "weight", "\"0\""}},
           {"name=acme weight=-1", {"weight", "\"-1\""}},
           {"name=acme weight=nan", {"weight", "\"nan\""}},
           {"name=acme weight=1001", {"weight", "1000"}},
           {"name=acme tokens_per_minute=many", {"tenant acme", "tokens_per_minute", "\"many\""}},
           {"name=acme requests_per_minute=-5", {"requests_per_minute", "\"-5\""}},
           {"name=acme concurrent_turns=1.5", {"concurrent_turns", "\"1.5\""}},
           {"name=acme max_tokens=99999999999999999999", {"max_tokens"}},
           {"name=acme stored_bytes=5GB", {"stored_bytes", "\"5GB\"", "GiB"}},
           {"name=acme stored_bytes=2000TiB", {"stored_bytes"}},
           {"name=acme models=a,,b", {"models", "\"a,,b\""}},
           {"name=acme token_per_minute=5", {"no field \"token_per_minute\"", "tokens_per_minute"}},
           {"name=acme weight=1 weight=2", {"weight stands there twice"}},
           {"name=acme fast", {"\"fast\"", "FIELD=VALUE"}},
           {"name=a@b", {"name", "\"a@b\""}},
           {"weight=1", {"name is missing"}},
           {"name=one", {"tenant one", "its name stands there twice"}},
       }) {
    for (const std::string& words : c.says) {
      EXPECT_THAT(ParseTenants(absl::StrCat("name=one\n", c.line, "\n")).status(),
                  StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("line 2"), HasSubstr(words))))
          << c.line;
    }
  }
}

}  // namespace
}  // namespace rwkv::router
