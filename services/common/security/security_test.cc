// Who may call whom, with which certificate or key, and which files end the start.
#include "services/common/security/security.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "gtest/gtest.h"
#include "services/common/channel.h"
#include "services/common/health.h"
#include "services/common/security/access.h"
#include "services/common/security/security_fixture.h"
#include "tests/testing/certificates.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::ReplaceFile;
using ::rwkv::testing::StatusIs;
using ::rwkv::testing::TestAuthority;
using ::rwkv::testing::TlsFolder;
using ::testing::HasSubstr;
using ::testing::Not;

// printf abc | sha256sum
constexpr char kAbc[] = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

TEST_F(SecurityTest, EveryRoleReachesItsMethodsAndNoOthers) {
  Serve("router");
  const std::vector<std::string> methods = {
      kGetStatus,
      "/grpc.health.v1.Health/Check",
      "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
      "/rwkv.v1.Generation/Generate",
      "/rwkv.v1.Generation/Logits",
      "/rwkv.v1.Sessions/Get",
      "/rwkv.v1.Worker/Execute",
      "/rwkv.v1.Worker/Describe",
      "/rwkv.v1.Link/Transfer",
      "/rwkv.v1.StateCatalog/AcquireLease",
      "/rwkv.v1.StateRecords/PutRecord",
      "/rwkv.v1.StateRecords/GetRecord",
      "/rwkv.v1.StateRecords/PutRecords",
      "/rwkv.v1.StateRecords/GetRecords",
      "/rwkv.v1.Nothing/Here",
  };
  for (const Role role : AllRoles()) {
    const std::shared_ptr<grpc::Channel> channel = DialAs(std::string(RoleName(role)));
    for (const std::string& method : methods) {
      const absl::Status status = Call(channel, method);
      if (AllowedRoles(method).Has(role)) {
        // Through the door. What is behind it is another matter: most methods are not here.
        EXPECT_FALSE(absl::IsPermissionDenied(status) || absl::IsUnauthenticated(status))
            << RoleName(role) << " " << method << ": " << status;
      } else {
        EXPECT_THAT(status, StatusIs(absl::StatusCode::kPermissionDenied)) << RoleName(role) << " " << method;
      }
    }
  }
  EXPECT_THAT(Call(DialAs("operator"), kGetStatus), IsOk());
  EXPECT_THAT(CheckHealth(DialAs("worker"), absl::Now() + kPatience), IsOkAndHolds(true));
}

TEST_F(SecurityTest, CertificatesThatAreNotOursOpenNoConnection) {
  Serve("router");
  TestAuthority other("ours");  // The same name, another key.
  TestAuthority::Subject expired, early;
  expired.alternative_names = early.alternative_names = "URI:spiffe://test/rwkv/operator";
  expired.starts_in = -absl::Hours(2);
  expired.ends_in = -absl::Hours(1);
  early.starts_in = absl::Hours(1);
  early.ends_in = absl::Hours(2);
  const struct {
    const char* what;
    TestAuthority::Pair pair;
  } cases[] = {
      {"none", {}},
      {"another authority's", other.IssueRole("operator")},
      {"expired", authority_.Issue(expired)},
      {"not yet valid", authority_.Issue(early)},
  };
  for (const auto& c : cases) {
    const absl::Status status = Call(DialWith(c.pair), kGetStatus, kRefusal);
    EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) << c.what << ": " << status;
  }
  EXPECT_FALSE(Call(MakeChannel(server_->address()), kGetStatus, kRefusal).ok()) << "plaintext";
  // The control: the same client with a good one.
  EXPECT_THAT(Call(DialWith(authority_.IssueRole("operator")), kGetStatus), IsOk());
}

TEST_F(SecurityTest, ACertificateWithoutARoleIsNobody) {
  Serve("router");
  TestAuthority::Subject subject;
  subject.alternative_names = "URI:spiffe://test/rwkv/root,DNS:operator,DNS:localhost";
  EXPECT_THAT(Call(DialWith(authority_.Issue(subject)), kGetStatus), StatusIs(absl::StatusCode::kUnauthenticated));
  EXPECT_THAT(Call(DialWith(authority_.Issue(subject)), "/grpc.health.v1.Health/Check"),
              StatusIs(absl::StatusCode::kUnauthenticated));
  subject.alternative_names = "DNS:operator.rwkv.internal,DNS:localhost";
  EXPECT_THAT(Call(DialWith(authority_.Issue(subject)), kGetStatus), IsOk());
  EXPECT_THAT(Scrape(), HasSubstr("rwkv_server_refused_calls_total cause=unauthenticated 2"));
}

TEST_F(SecurityTest, AServerOfAnotherRoleIsNotTalkedTo) {
  Serve("store");
  const std::unique_ptr<Security> client =
      Make(Files("client", authority_.IssueRole("operator"), authority_.certificate()));
  const absl::Status status = Call(Dial(*client, Role::kRouter), kGetStatus, kRefusal);
  EXPECT_FALSE(status.ok());
  EXPECT_FALSE(absl::IsPermissionDenied(status)) << "the call got there: " << status;
  EXPECT_THAT(Call(Dial(*client, Role::kStore), kGetStatus), IsOk());
}

TEST_F(SecurityTest, AServerOfAnotherAuthorityIsNotTalkedTo) {
  TestAuthority other("other");
  const std::string both = authority_.certificate() + other.certificate();
  ServeWith(Files("server", authority_.IssueRole("router"), both));
  // The server would believe the client, the client does not believe the server.
  const std::unique_ptr<Security> client = Make(Files("client", other.IssueRole("operator"), other.certificate()));
  EXPECT_FALSE(Call(Dial(*client), kGetStatus, kRefusal).ok());
  // The control: one that believes both.
  const std::unique_ptr<Security> wiser = Make(Files("wiser", other.IssueRole("operator"), both));
  EXPECT_THAT(Call(Dial(*wiser), kGetStatus), IsOk());
}

TEST_F(SecurityTest, FilesThatAreWrongEndTheStart) {
  const auto create = [&](const Security::Options& options) {
    return Security::Create(options, metrics_.get()).status();
  };
  const TestAuthority::Pair pair = authority_.IssueRole("router");
  const std::string authorities = authority_.certificate();
  EXPECT_THAT(create({}), IsOk());
  EXPECT_THAT(create(Files("a", pair, authorities)), IsOk());
  const auto invalid = [](const char* why) { return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(why)); };
  Security::Options options = Files("a", pair, authorities);
  options.key.clear();
  EXPECT_THAT(create(options), invalid("all three or none"));
  options = {};
  options.api_keys = "/some/file";
  EXPECT_THAT(create(options), invalid("API keys want TLS"));
  // Swapped: the key of another certificate.
  EXPECT_THAT(create(Files("b", {pair.certificate, authority_.IssueRole("router").key}, authorities)),
              invalid("is not the key of"));
  EXPECT_THAT(create(Files("c", {pair.key, pair.certificate}, authorities)), invalid("no certificate in PEM"));
  EXPECT_THAT(create(Files("d", pair, "")), invalid("no certificate in PEM"));
  TestAuthority::Subject expired;
  expired.starts_in = -absl::Hours(2);
  expired.ends_in = -absl::Hours(1);
  EXPECT_THAT(create(Files("e", authority_.Issue(expired), authorities)), invalid("not now"));
  // Swapped: the certificate of another process.
  options = Files("g", authority_.IssueRole("worker"), authorities);
  EXPECT_THAT(create(options), IsOk()) << "no role is wanted";
  options.role = Role::kRouter;
  EXPECT_THAT(create(options), invalid("is of the role worker, this process is a router"));
  options.role = Role::kWorker;
  EXPECT_THAT(create(options), IsOk());
  options = Files("h", authority_.Issue({}), authorities);
  options.role = Role::kStore;
  EXPECT_THAT(create(options), invalid("is of the role none"));
  options = Files("f", pair, authorities);
  options.certificate = "/nonexistent/tls.crt";
  EXPECT_THAT(create(options), StatusIs(absl::StatusCode::kNotFound, HasSubstr("/nonexistent/tls.crt")));
}

TEST_F(SecurityTest, AClientsCertificateThatIsWrongIsToldBeforeItIsShown) {
  TestAuthority::Subject expired;
  expired.starts_in = -absl::Hours(2);
  expired.ends_in = -absl::Hours(1);
  const auto make = [&](const Security::Options& files) {
    ClientSecurityOptions client;
    client.authorities = files.authorities;
    client.certificate = files.certificate;
    client.key = files.key;
    return MakeClientCredentials(client).status();
  };
  const std::string authorities = authority_.certificate();
  EXPECT_THAT(make(Files("a", authority_.IssueRole("client"), authorities)), IsOk());
  EXPECT_THAT(make(Files("b", authority_.Issue(expired), authorities)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not now")));
  EXPECT_THAT(
      make(Files("c", {authority_.IssueRole("client").certificate, authority_.IssueRole("client").key}, authorities)),
      StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("is not the key of")));
}

TEST_F(SecurityTest, ApiKeysOpenWhatTheirRoleMay) {
  Serve("router", absl::StrCat(kAbc, " name=alice\n"));
  const std::shared_ptr<grpc::Channel> nobody = DialWith({});
  EXPECT_THAT(Call(nobody, "/rwkv.v1.Generation/Generate"), StatusIs(absl::StatusCode::kUnauthenticated));
  const auto with = [&](const char* header, const char* method) { return Call(nobody, method, kPatience, header); };
  // Behind the door there is no such method.
  EXPECT_THAT(with("Bearer abc", "/rwkv.v1.Generation/Generate"), StatusIs(absl::StatusCode::kUnimplemented));
  EXPECT_THAT(with("bearer abc", "/rwkv.v1.Sessions/Get"), StatusIs(absl::StatusCode::kUnimplemented));
  EXPECT_THAT(with("Bearer abc", kGetStatus), StatusIs(absl::StatusCode::kPermissionDenied));
  EXPECT_THAT(with("Bearer abc", "/rwkv.v1.Generation/Logits"), StatusIs(absl::StatusCode::kPermissionDenied));
  for (const char* header : {"Bearer abd", "Bearer ", "Bearer", "abc", "Basic abc", "Bearer abc "}) {
    EXPECT_THAT(with(header, "/rwkv.v1.Generation/Generate"), StatusIs(absl::StatusCode::kUnauthenticated)) << header;
  }
  // Two calls of one connection are two people.
  EXPECT_THAT(with("Bearer abc", "/rwkv.v1.Generation/Generate"), StatusIs(absl::StatusCode::kUnimplemented));
  EXPECT_THAT(Call(nobody, "/rwkv.v1.Generation/Generate"), StatusIs(absl::StatusCode::kUnauthenticated));
  // Whoever has a certificate needs no key; one of another authority is still no certificate.
  EXPECT_THAT(Call(DialAs("operator"), kGetStatus), IsOk());
  TestAuthority other("other");
  EXPECT_FALSE(Call(DialWith(other.IssueRole("operator")), kGetStatus, kRefusal).ok());
  // A key is taken away while the connection lives.
  ReplaceFile(::testing::TempDir() + "/api_keys", "");
  const absl::Time limit = absl::Now() + kPatience;
  absl::Status status;
  do {
    status = with("Bearer abc", "/rwkv.v1.Generation/Generate");
  } while (!absl::IsUnauthenticated(status) && absl::Now() < limit);
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kUnauthenticated));
}

TEST_F(SecurityTest, ClientsFromOutsideCheckTheNameAndShowTheirKey) {
  Serve("router", absl::StrCat(kAbc, " name=ops role=operator\n"));
  ClientSecurityOptions options;
  options.authorities = ::testing::TempDir() + "/server/ca.crt";
  options.api_key_file = ::testing::TempDir() + "/my_key";
  ReplaceFile(options.api_key_file, "abc\n");
  const auto call = [&](const ClientSecurityOptions& how) {
    const absl::StatusOr<ClientCredentials> made = MakeClientCredentials(how);
    if (!made.ok()) return made.status();
    ChannelOptions channel;
    channel.credentials = made->credentials;
    channel.server_name = made->server_name;
    return Call(MakeChannel(server_->address(), channel), kGetStatus, kRefusal);
  };
  EXPECT_THAT(call(options), IsOk()) << "127.0.0.1 is in the certificate";
  options.server_name = "localhost";
  EXPECT_THAT(call(options), IsOk());
  options.server_name = "router.example.org";
  EXPECT_FALSE(call(options).ok());
  options.server_name.clear();
  ReplaceFile(options.api_key_file, "abc abc");
  EXPECT_THAT(call(options), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("wants one API key")));
  options.api_key_file.clear();
  EXPECT_THAT(call(options), StatusIs(absl::StatusCode::kUnauthenticated));
  const TestAuthority::Pair pair = authority_.IssueRole("operator");
  options.certificate = ::testing::TempDir() + "/my_certificate";
  options.key = ::testing::TempDir() + "/my_certificate_key";
  ReplaceFile(options.certificate, pair.certificate);
  ReplaceFile(options.key, pair.key);
  EXPECT_THAT(call(options), IsOk());
}

TEST_F(SecurityTest, TheHealthListenerAnswersHealthAlone) {
  Serve("router");
  const std::shared_ptr<grpc::Channel> plain = MakeChannel(server_->health_address());
  EXPECT_THAT(CheckHealth(plain, absl::Now() + kPatience), IsOkAndHolds(true));
  server_->SetServing(false);
  EXPECT_THAT(CheckHealth(plain, absl::Now() + kPatience), IsOkAndHolds(false));
  EXPECT_THAT(CheckHealth(plain, absl::Now() + kPatience, "rwkv.v1.Cluster"), IsOkAndHolds(false));
  EXPECT_THAT(CheckHealth(plain, absl::Now() + kPatience, "live"), IsOkAndHolds(true));
  for (const char* method :
       {kGetStatus, "/rwkv.v1.Generation/Generate", "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}) {
    EXPECT_THAT(Call(plain, method), StatusIs(absl::StatusCode::kUnimplemented)) << method;
  }
}

}  // namespace
}  // namespace rwkv::common
