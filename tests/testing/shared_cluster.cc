#include "tests/testing/shared_cluster.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "kernels/base/status_macros.h"
#include "tests/testing/conversations.h"
#include "tests/testing/random_model.h"

namespace rwkv::testing {

absl::StatusOr<SharedServers> SharedServers::Launch() {
  SharedServers servers;
  RWKV_ASSIGN_OR_RETURN(servers.postgres, PostgresServer::Launch());
  RWKV_ASSIGN_OR_RETURN(servers.s3, LaunchS3());
  return servers;
}

absl::StatusOr<LocalCluster::Options> TwoOfEverything(const SharedServers& servers, int slots) {
  RandomModelOptions model;
  model.layers = 4;
  model.vocab_size = Conversations::kVocabulary;
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/two_of_everything.safetensors");
  RWKV_RETURN_IF_ERROR(WriteRandomModel(model, options.model));
  options.stages = 2;
  options.pipelines = 2;
  options.spares = {1};
  options.routers = 2;
  options.stores = 2;
  options.state_store_flags = {
      absl::StrCat("--catalog=", servers.postgres->url()),
      absl::StrCat("--catalog_password_file=", servers.postgres->password_file()),
      absl::StrCat("--records=s3://", servers.s3->bucket()),
      absl::StrCat("--s3_endpoint=", servers.s3->endpoint()),
      absl::StrCat("--s3_credentials_file=", servers.s3->credentials_file()),
  };
  options.worker_flags = {absl::StrCat("--slots=", slots), "--threads=1"};
  options.router_flags = {"--lease_ttl=3s", "--snapshot_interval_tokens=64"};
  return options;
}

}  // namespace rwkv::testing
