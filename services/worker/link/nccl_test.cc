// The table of NCCL's functions: how it is filled, and that it is NCCL's.
#include "services/worker/link/nccl.h"

#include <cstddef>
#include <cstdlib>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

#if __has_include(<nccl.h>)
#include <nccl.h>
#define RWKV_HAVE_NCCL_HEADER 1
#else
#define RWKV_HAVE_NCCL_HEADER 0
#endif

namespace rwkv::worker::nccl {
namespace {

using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::HasSubstr;

TEST(NcclTest, ALibraryThatIsNotThereIsUnimplementedInWords) {
  EXPECT_THAT(Load("libnccl-of-nobody.so"),
              StatusIs(absl::StatusCode::kUnimplemented, AllOf(HasSubstr("NCCL"), HasSubstr("libnccl-of-nobody.so"))));
}

TEST(NcclTest, ALibraryThatIsAnotherIsUnimplementedInWords) {
  EXPECT_THAT(Load("libm.so.6"),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("libm.so.6 has no ncclGetVersion")));
}

TEST(NcclTest, WhatLinksRelyOnIsSetAndWhatTheOperatorSaysStays) {
  setenv("NCCL_COMM_BLOCKING", "1", 1);
  setenv("NCCL_DEBUG", "INFO", 1);
  SetEnvironment();
  EXPECT_THAT(Environment(),
              AllOf(Contains("NCCL_COMM_BLOCKING=0"), Contains("NCCL_DEBUG=INFO"), Contains("NCCL_RAS_ENABLE=0")));
}

// No driver is needed for either call.
TEST(NcclTest, TheRealLibraryHasTheFunctions) {
  SetEnvironment();
  absl::StatusOr<Nccl> nccl = Load(kLibrary);
  if (!nccl.ok()) nccl = Load("/usr/local/cuda/lib64/libnccl.so.2");
  if (!nccl.ok()) nccl = Load("/usr/local/cuda/lib/libnccl.so.2");
  if (!nccl.ok()) GTEST_SKIP() << "not held against the real library: " << nccl.status();
  int version = 0;
  EXPECT_EQ(nccl->get_version(&version), kSuccess);
  EXPECT_GE(version, kOldestVersion);
  EXPECT_STREQ(nccl->get_error_string(kInProgress), "NCCL operation in progress");
}

#if RWKV_HAVE_NCCL_HEADER
TEST(NcclTest, NamesNumbersAndLayoutsAreThoseOfTheHeader) {
  EXPECT_EQ(int{kSuccess}, int{ncclSuccess});
  EXPECT_EQ(int{kUnhandledCudaError}, int{ncclUnhandledCudaError});
  EXPECT_EQ(int{kSystemError}, int{ncclSystemError});
  EXPECT_EQ(int{kInternalError}, int{ncclInternalError});
  EXPECT_EQ(int{kInvalidArgument}, int{ncclInvalidArgument});
  EXPECT_EQ(int{kInvalidUsage}, int{ncclInvalidUsage});
  EXPECT_EQ(int{kRemoteError}, int{ncclRemoteError});
  EXPECT_EQ(int{kInProgress}, int{ncclInProgress});
  EXPECT_EQ(kFloat32, int{ncclFloat32});
  EXPECT_EQ(sizeof(UniqueId), sizeof(ncclUniqueId));
  const ncclConfig_t theirs = NCCL_CONFIG_INITIALIZER;
  const Config ours;
  EXPECT_EQ(ours.magic, theirs.magic);
  EXPECT_EQ(ours.min_ctas, theirs.minCTAs);
  EXPECT_LE(ours.version, theirs.version);
  EXPECT_LE(sizeof(Config), sizeof(ncclConfig_t));
  EXPECT_EQ(offsetof(Config, size), offsetof(ncclConfig_t, size));
  EXPECT_EQ(offsetof(Config, magic), offsetof(ncclConfig_t, magic));
  EXPECT_EQ(offsetof(Config, version), offsetof(ncclConfig_t, version));
  EXPECT_EQ(offsetof(Config, blocking), offsetof(ncclConfig_t, blocking));
  EXPECT_EQ(offsetof(Config, cga_cluster_size), offsetof(ncclConfig_t, cgaClusterSize));
  EXPECT_EQ(offsetof(Config, min_ctas), offsetof(ncclConfig_t, minCTAs));
  EXPECT_EQ(offsetof(Config, max_ctas), offsetof(ncclConfig_t, maxCTAs));
  EXPECT_EQ(offsetof(Config, net_name), offsetof(ncclConfig_t, netName));
}
#endif

}  // namespace
}  // namespace rwkv::worker::nccl
