// Clusters whose stores share a PostgreSQL and an S3 of the test's own.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/test_servers.h"

namespace rwkv::testing {

// kFailedPrecondition of Launch() says what this machine lacks: skip the test with it.
struct SharedServers {
  std::unique_ptr<PostgresServer> postgres;
  std::unique_ptr<AnyS3Server> s3;

  static absl::StatusOr<SharedServers> Launch();
};

// Two pipelines of two stages, a spare for stage 1, two routers, two stores, a small model
// (Conversations::kVocabulary); leases that end soon. `slots`: of each pipeline.
absl::StatusOr<LocalCluster::Options> TwoOfEverything(const SharedServers& servers, int slots);

}  // namespace rwkv::testing
