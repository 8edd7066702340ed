#include "services/common/address.h"

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

TEST(AddressTest, HostAndPortComeApartAndBack) {
  for (const char* text : {"127.0.0.1:0", "localhost:65535", "[::1]:4711", "worker-0.rwkv.svc:80"}) {
    ASSERT_OK_AND_ASSIGN(const HostPort address, ParseHostPort(text));
    EXPECT_EQ(FormatHostPort(address), text);
  }
  ASSERT_OK_AND_ASSIGN(const HostPort address, ParseHostPort("[::1]:4711"));
  EXPECT_EQ(address.host, "::1");
  EXPECT_EQ(address.port, 4711);
}

TEST(AddressTest, WhatIsNoAddressIsRefusedAndQuoted) {
  for (const char* text :
       {"", "localhost", ":80", "localhost:", "localhost:65536", "localhost:-1", "localhost:+1", "localhost:8o",
        "::1:80", "[]:80", "a b:80", "a/b:80", "a,b:80", "localhost: 80", "localhost:99999999999999999999"}) {
    EXPECT_THAT(ParseHostPort(text), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text))) << text;
  }
}

}  // namespace
}  // namespace rwkv::common
