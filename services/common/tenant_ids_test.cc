#include "services/common/tenant_ids.h"

#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"

namespace rwkv::common {
namespace {

TEST(TenantIdsTest, AnIdComesApartAsItWasPutTogether) {
  EXPECT_EQ(ScopedId("acme", "chat-1:a"), "acme@chat-1:a");
  EXPECT_EQ(ScopedId("", "chat-1"), "chat-1");
  EXPECT_EQ(SplitScopedId("acme@chat-1:a").tenant, "acme");
  EXPECT_EQ(SplitScopedId("acme@chat-1:a").id, "chat-1:a");
  EXPECT_EQ(SplitScopedId("chat-1").tenant, "");
  EXPECT_EQ(SplitScopedId("chat-1").id, "chat-1");
}

TEST(TenantIdsTest, NamesOfTenantsHoldNothingThatMeansSomething) {
  EXPECT_TRUE(IsTenantName("a"));
  EXPECT_TRUE(IsTenantName("Acme_Corp-2.eu"));
  EXPECT_TRUE(IsTenantName(std::string(64, 'x')));
  for (const char* wrong : {"", "a@b", "a/b", "a b", "a:b", "\xc3\xa4"}) EXPECT_FALSE(IsTenantName(wrong)) << wrong;
  EXPECT_FALSE(IsTenantName(std::string(65, 'x')));
}

TEST(TenantIdsTest, WhoAskedReadsItsOwnIdAndKeepsTheDetails) {
  const absl::Status status =
      WithRetryInfo(absl::AbortedError("session acme@one: taken by acme@one"), absl::Seconds(2));
  const absl::Status said = WithoutTenant("acme", status);
  EXPECT_EQ(said.message(), "session one: taken by one");
  EXPECT_EQ(said.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(GetRetryDelay(said), absl::Seconds(2));
  EXPECT_EQ(WithoutTenant("", status), status);
  EXPECT_EQ(WithoutTenant("other", status), status);
  EXPECT_TRUE(WithoutTenant("acme", absl::OkStatus()).ok());
}

}  // namespace
}  // namespace rwkv::common
