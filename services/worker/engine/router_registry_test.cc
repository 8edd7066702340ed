#include "services/worker/engine/router_registry.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "tests/testing/fake_clock.h"

namespace rwkv::worker {
namespace {

v1::RouterAnnouncement Router(const std::string& name) {
  v1::RouterAnnouncement router;
  router.set_name(name);
  router.set_address("host:1");
  return router;
}

std::vector<std::string> Names(const RouterRegistry& registry) {
  std::vector<std::string> names;
  for (const v1::RouterAnnouncement& router : registry.Lately()) names.push_back(router.name());
  return names;
}

TEST(RouterRegistryTest, KnowsThoseHeardOfLately) {
  testing::FakeClock clock;
  RouterRegistry registry(&clock);
  registry.Heard(Router("b"));
  clock.Advance(RouterRegistry::kLately);
  registry.Heard(Router("a"));
  registry.Heard(Router(""));
  EXPECT_THAT(Names(registry), ::testing::ElementsAre("a", "b"));
  clock.Advance(absl::Milliseconds(1));
  EXPECT_THAT(Names(registry), ::testing::ElementsAre("a"));
}

TEST(RouterRegistryTest, OneThatNeverAnnouncedItselfIsNotSilent) {
  testing::FakeClock clock;
  RouterRegistry registry(&clock);
  registry.Heard(Router("a"));
  clock.Advance(RouterRegistry::kSilence);
  EXPECT_FALSE(registry.IsSilent("a"));
  clock.Advance(absl::Milliseconds(1));
  EXPECT_TRUE(registry.IsSilent("a"));
  EXPECT_FALSE(registry.IsSilent("b"));
  registry.Heard(Router("a"));
  EXPECT_FALSE(registry.IsSilent("a"));
}

TEST(RouterRegistryTest, IsBounded) {
  testing::FakeClock clock;
  RouterRegistry registry(&clock);
  for (size_t i = 0; i < 2 * RouterRegistry::kMaxRouters; ++i) registry.Heard(Router(absl::StrCat("router-", i)));
  EXPECT_EQ(Names(registry).size(), RouterRegistry::kMaxRouters);
  v1::RouterAnnouncement long_address = Router("router-0");
  long_address.set_address(std::string(100000, 'x'));
  for (int i = 0; i < 2 * RouterRegistry::kMaxTenants; ++i) {
    long_address.add_tenants()->set_tenant(std::string(1000, 'x'));
  }
  registry.Heard(long_address);
  EXPECT_EQ(registry.Lately().front().tenants_size(), RouterRegistry::kMaxTenants);
  EXPECT_EQ(registry.Lately().front().tenants(0).tenant().size(), RouterRegistry::kMaxTextBytes);
  EXPECT_EQ(registry.Lately().front().address().size(), RouterRegistry::kMaxTextBytes);
  clock.Advance(absl::Seconds(4));  // Now those are forgotten that nobody hears of.
  registry.Heard(Router("new"));
  EXPECT_THAT(Names(registry), ::testing::ElementsAre("new"));
}

}  // namespace
}  // namespace rwkv::worker
