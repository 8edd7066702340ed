// Files that are right, wrong, half written and swapped, while a process runs on what they held before.
#include "services/common/security/tls_files.h"

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/security/access.h"
#include "services/common/security/certificates.h"
#include "tests/testing/certificates.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::rwkv::testing::TestAuthority;
using ::rwkv::testing::TlsFolder;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kRouter[] = "URI:spiffe://test/rwkv/router";

std::string Half(const std::string& text) { return text.substr(0, text.size() / 2); }

class TlsFilesTest : public ::testing::Test {
 protected:
  // A certificate that ends in so many hours, by which it is known again.
  static TestAuthority::Pair Issue(TestAuthority& authority, int hours, const char* names = kRouter) {
    TestAuthority::Subject subject;
    subject.alternative_names = names;
    subject.ends_in = absl::Hours(hours);
    return authority.Issue(subject);
  }
  void Write(const TestAuthority::Pair& pair, const std::string& authorities) {
    folder_.Write(pair);
    folder_.WriteAuthorities(authorities);
  }
  absl::StatusOr<std::unique_ptr<TlsFiles>> Open() {
    TlsFiles::Options options;
    options.certificate = folder_.certificate();
    options.key = folder_.key();
    options.authorities = folder_.authorities();
    options.role = Role::kRouter;
    return TlsFiles::Open(options);
  }
  static double HoursLeft(const TlsFiles::State& state) {
    return absl::ToDoubleHours(state.own.not_after - absl::Now());
  }

  TestAuthority authority_{"ours"}, other_{"other"};
  TlsFolder folder_{
      absl::StrCat(::testing::TempDir(), "/", ::testing::UnitTest::GetInstance()->current_test_info()->name())};
};

TEST_F(TlsFilesTest, WhatIsOfNoUseChangesNothingAndEndsAStart) {
  const TestAuthority::Pair right = Issue(authority_, 5), next = Issue(authority_, 7);
  const std::string ours = authority_.certificate();
  TestAuthority::Subject expired, early;
  expired.alternative_names = early.alternative_names = kRouter;
  expired.starts_in = -absl::Hours(2);
  expired.ends_in = -absl::Hours(1);
  early.starts_in = absl::Hours(1);
  early.ends_in = absl::Hours(2);
  const TestAuthority old("old", expired);
  const TestAuthority impostor("ours");  // The same name, another key.
  const struct {
    const char* what;
    TestAuthority::Pair pair;
    std::string authorities;
    bool own;  // It is the certificate or its key; else the authorities.
    const char* why;
  } cases[] = {
      {"another's key", {next.certificate, right.key}, ours, true, "tls.key: it is not the key of the certificate"},
      {"no key", {next.certificate, ""}, ours, true, "tls.key: no private key in PEM"},
      {"half a key", {next.certificate, Half(next.key)}, ours, true, "tls.key: no private key in PEM"},
      {"no certificate", {"", next.key}, ours, true, "tls.crt: no certificate in PEM"},
      {"half a certificate", {Half(next.certificate), next.key}, ours, true, "tls.crt: certificate 1 of it is cut off"},
      {"half of what signed it",
       {next.certificate + Half(ours), next.key},
       ours,
       true,
       "tls.crt: certificate 2 of it is cut off"},
      {"swapped", {next.key, next.certificate}, ours, true, "tls.crt: no certificate in PEM"},
      {"expired", authority_.Issue(expired), ours, true, "not now"},
      {"not yet valid", authority_.Issue(early), ours, true, "not now"},
      {"another role", Issue(authority_, 7, "URI:spiffe://test/rwkv/worker"), ours, true,
       "is of the role worker, this process is a router"},
      {"no role", Issue(authority_, 7, "DNS:localhost"), ours, true, "is of the role none"},
      {"another authority's", Issue(other_, 7), ours, false, "not signed by any of the authorities"},
      {"no authorities", next, "", false, "ca.crt: no certificate in PEM"},
      {"half an authority", next, Half(ours), false, "ca.crt: certificate 1 of it is cut off"},
      {"half of the second", next, ours + Half(other_.certificate()), false, "ca.crt: certificate 2 of it is cut off"},
      {"authorities without its own", next, other_.certificate(), false, "not signed by any of the authorities"},
      {"an authority of the same name", next, impostor.certificate(), false, "not signed by any of the authorities"},
      {"an authority that has expired", next, old.certificate(), false, "not now"},
  };
  Write(right, ours);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TlsFiles> files, Open());
  for (const auto& c : cases) {
    SCOPED_TRACE(c.what);
    Write(c.pair, c.authorities);
    const TlsFiles::State state = files->Look();
    const absl::Status& said = c.own ? state.own_status : state.authorities_status;
    EXPECT_THAT(said,
                StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(c.why), Not(HasSubstr("-----BEGIN")))));
    EXPECT_THAT(c.own ? state.authorities_status : state.own_status, IsOk());
    EXPECT_NEAR(HoursLeft(state), 5, 0.1) << "it is used";
    EXPECT_THAT(Open(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(c.why)));
    // The one of before comes back: all is well.
    Write(right, ours);
    EXPECT_THAT(files->Look().own_status, IsOk());
  }
  ASSERT_EQ(std::remove(folder_.key().c_str()), 0);
  EXPECT_THAT(files->Look().own_status, StatusIs(absl::StatusCode::kNotFound, HasSubstr("tls.key")));
  Write(next, ours);
  const TlsFiles::State state = files->Look();
  EXPECT_THAT(state.own_status, IsOk());
  EXPECT_NEAR(HoursLeft(state), 7, 0.1);
}

TEST_F(TlsFilesTest, OneAuthorityFollowsAnother) {
  Write(Issue(authority_, 5), authority_.certificate());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TlsFiles> files, Open());
  const auto takes = [&](const TestAuthority::Pair& pair, const std::string& authorities) {
    Write(pair, authorities);
    const TlsFiles::State state = files->Look();
    EXPECT_THAT(state.own_status, IsOk());
    EXPECT_THAT(state.authorities_status, IsOk());
    return HoursLeft(state);
  };
  const std::string both = authority_.certificate() + other_.certificate();
  EXPECT_NEAR(takes(Issue(authority_, 6), both), 6, 0.1);
  EXPECT_NEAR(takes(Issue(other_, 7), both), 7, 0.1);
  EXPECT_NEAR(takes(Issue(other_, 8), other_.certificate()), 8, 0.1);
  // Beside one that is valid an old one does no harm.
  TestAuthority::Subject expired;
  expired.starts_in = -absl::Hours(2);
  expired.ends_in = -absl::Hours(1);
  const TestAuthority old("old", expired);
  EXPECT_NEAR(takes(Issue(other_, 9), old.certificate() + other_.certificate()), 9, 0.1);
  EXPECT_LT(files->Look().authorities.not_after, absl::Now()) << "the first to expire";
  // And by one in between.
  TestAuthority between("between", other_);
  TestAuthority::Pair pair = Issue(between, 10);
  pair.certificate += between.certificate();
  EXPECT_NEAR(takes(pair, other_.certificate()), 10, 0.1);
}

TEST_F(TlsFilesTest, OneThatBecomesValidIsTakenThen) {
  // As of an authority whose clock is ahead of this machine's.
  TestAuthority::Subject ahead;
  ahead.alternative_names = kRouter;
  ahead.starts_in = absl::Seconds(2);
  ahead.ends_in = absl::Hours(7);
  Write(Issue(authority_, 5), authority_.certificate());
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TlsFiles> files, Open());
  Write(authority_.Issue(ahead), authority_.certificate());
  EXPECT_THAT(files->Look().own_status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("not now")));
  TlsFiles::State state;
  for (const absl::Time limit = absl::Now() + absl::Seconds(30); absl::Now() < limit;) {
    state = files->Look();
    if (state.own_status.ok()) break;
  }
  EXPECT_THAT(state.own_status, IsOk());
  EXPECT_NEAR(HoursLeft(state), 7, 0.1);
}

}  // namespace
}  // namespace rwkv::common
