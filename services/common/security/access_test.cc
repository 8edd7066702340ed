#include "services/common/security/access.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "google/protobuf/descriptor.h"
#include "gtest/gtest.h"
#include "rwkv/v1/cluster.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

std::vector<std::string> MethodsOf(const google::protobuf::FileDescriptor* file) {
  std::vector<std::string> methods;
  for (int s = 0; s < file->service_count(); ++s) {
    for (int m = 0; m < file->service(s)->method_count(); ++m) {
      methods.push_back(absl::StrCat("/", file->service(s)->full_name(), "/", file->service(s)->method(m)->name()));
    }
  }
  return methods;
}

std::vector<std::string> Public() {
  std::vector<std::string> methods = MethodsOf(v1::GenerateRequest::descriptor()->file());
  for (const std::string& method : MethodsOf(v1::SessionsGetRequest::descriptor()->file())) methods.push_back(method);
  return methods;
}

std::vector<std::string> Internal() {
  std::vector<std::string> methods = MethodsOf(v1::ExecuteRequest::descriptor()->file());
  for (const std::string& method : MethodsOf(v1::GetRecordRequest::descriptor()->file())) methods.push_back(method);
  return methods;
}

TEST(AccessTest, EveryMethodHasALine) {
  for (const auto& methods : {Public(), Internal(), MethodsOf(v1::GetStatusRequest::descriptor()->file())}) {
    ASSERT_FALSE(methods.empty());
    for (const std::string& method : methods) {
      EXPECT_FALSE(AllowedRoles(method).empty()) << method << " is nobody's: say in access.cc who may call it";
    }
  }
}

TEST(AccessTest, ClientsReachThePublicCallsAndNothingElse) {
  for (const std::string& method : Public()) {
    EXPECT_EQ(AllowedRoles(method).Has(Role::kClient), method != "/rwkv.v1.Generation/Logits") << method;
    EXPECT_TRUE(AllowedRoles(method).Has(Role::kOperator)) << method;
    for (const Role role : {Role::kRouter, Role::kWorker, Role::kStore}) {
      EXPECT_FALSE(AllowedRoles(method).Has(role)) << method << " by " << RoleName(role);
    }
  }
  for (const std::string& method : Internal()) {
    EXPECT_FALSE(AllowedRoles(method).Has(Role::kClient)) << method;
    EXPECT_FALSE(AllowedRoles(method).Has(Role::kGateway)) << method;
    EXPECT_FALSE(AllowedRoles(method).Has(Role::kStore)) << method;
  }
}

TEST(AccessTest, OnlyRoutersDriveWorkersAndTheCatalog) {
  for (const std::string& method : Internal()) {
    const bool link = method == "/rwkv.v1.Link/Transfer";
    const bool record = absl::string_view(method).find("/rwkv.v1.StateRecords/") == 0;
    EXPECT_EQ(AllowedRoles(method).Has(Role::kRouter), !link) << method;
    EXPECT_EQ(AllowedRoles(method).Has(Role::kWorker), link || record) << method;
  }
}

TEST(AccessTest, WhatNobodyListedIsNobodys) {
  for (const char* method : {"", "/", "/rwkv.v1.Generation/", "/rwkv.v1.Generation/generate",
                             "rwkv.v1.Generation/Generate", "/rwkv.v1.Generation/Generate/", "/rwkv.v1.New/Call",
                             "//rwkv.v1.Generation/Generate", "/grpc.channelz.v1.Channelz/GetServers"}) {
    RoleSet all;
    for (const Role role : AllRoles()) all.Add(role);
    EXPECT_THAT(CheckAccess(all, method), StatusIs(absl::StatusCode::kPermissionDenied)) << method;
  }
  EXPECT_THAT(CheckAccess({}, "/rwkv.v1.Generation/Generate"), StatusIs(absl::StatusCode::kUnauthenticated));
  EXPECT_THAT(CheckAccess({Role::kWorker, Role::kClient}, "/rwkv.v1.Generation/Generate"), IsOk());
  EXPECT_THAT(CheckAccess({Role::kWorker}, "/rwkv.v1.Generation/Generate"),
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("the role worker may not call")));
}

TEST(AccessTest, RolesComeFromWholeNamesOnly) {
  const auto of_uri = [](const char* uri) {
    RoleSet roles;
    AddRoleOfUri(uri, &roles);
    return roles.ToString();
  };
  EXPECT_EQ(of_uri("spiffe://cluster.local/rwkv/router"), "router");
  EXPECT_EQ(of_uri("spiffe://a/rwkv/store"), "store");
  for (const char* uri :
       {"", "spiffe:///rwkv/router", "spiffe://a/rwkv/router/", "spiffe://a/rwkv/router/x", "spiffe://a/b/rwkv/router",
        "https://a/rwkv/router", "spiffe://a/rwkv/", "spiffe://a/rwkv", "spiffe://rwkv/router",
        "spiffe://a/rwkv/Router", "spiffe://a/rwkv/root", "xspiffe://a/rwkv/router", "spiffe://a/rwkv/router?x"}) {
    EXPECT_EQ(of_uri(uri), "none") << uri;
  }
  const auto of_name = [](const char* name) {
    RoleSet roles;
    AddRoleOfDnsName(name, &roles);
    return roles.ToString();
  };
  EXPECT_EQ(of_name("worker.rwkv.internal"), "worker");
  for (const char* name : {"", ".rwkv.internal", "a.worker.rwkv.internal", "worker.rwkv.internal.", "worker", "*",
                           "*.rwkv.internal", "worker.rwkv.internal.example.org", "worker-rwkv.internal"}) {
    EXPECT_EQ(of_name(name), "none") << name;
  }
}

TEST(AccessTest, RolesHaveNames) {
  for (const Role role : AllRoles()) EXPECT_THAT(ParseRole(RoleName(role)), IsOkAndHolds(role));
  EXPECT_THAT(ParseRole("root"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("router, worker, store")));
}

TEST(AccessTest, AUriMayNameTheTenantOfAClient) {
  RoleSet roles;
  AddRoleOfUri("spiffe://any/rwkv/client/acme", &roles);
  EXPECT_TRUE(roles.Has(Role::kClient));
  EXPECT_EQ(TenantOfUri("spiffe://any/rwkv/client/acme"), "acme");
  EXPECT_EQ(TenantOfUri("spiffe://any/rwkv/gateway/acme.eu"), "acme.eu");
  EXPECT_EQ(TenantOfUri("spiffe://any/rwkv/client"), "");
  for (const char* uri :
       {"spiffe://any/rwkv/router/acme", "spiffe://any/rwkv/operator/acme", "spiffe://any/rwkv/client/",
        "spiffe://any/rwkv/client/a@b", "spiffe://any/rwkv/client/acme/more"}) {
    RoleSet none;
    AddRoleOfUri(uri, &none);
    EXPECT_TRUE(none.empty()) << uri;
    EXPECT_EQ(TenantOfUri(uri), "") << uri;
  }
}

}  // namespace
}  // namespace rwkv::common
