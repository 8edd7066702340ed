// What each kind of call has in its trace, over real processes.
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/common/grpc_status.h"
#include "tests/integration/traces_fixture.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

// What a client keeps of an exported state.
std::string FileOf(const std::vector<v1::SessionsExportStateResponse>& pieces) {
  std::vector<testing::RawTensor> tensors;
  std::map<std::string, std::string> metadata;
  for (const v1::SessionsExportStateResponse& piece : pieces) {
    metadata = {{"position", absl::StrCat(piece.position())}, {"model_fingerprint", piece.model_fingerprint()}};
    tensors.push_back(
        {{piece.tensor(), checkpoint::ElementType::kFloat32, {piece.shape().begin(), piece.shape().end()}},
         piece.data()});  // None is so large that it comes in pieces.
  }
  return testing::SafetensorsBytes(tensors, metadata);
}

// Every call, in a trace of its own.
TEST_F(TracesTest, CallsThatFeedTokensAreTracedOverTheWorkers) {
  Start(2, collector_.address(), {"--allow_logits"});
  {
    v1::LogitsRequest request;
    request.mutable_tokens()->mutable_ids()->Assign(std::begin(kPrompt), std::end(kPrompt));
    const auto call = InTrace(1);
    ASSERT_OK(ReadAll<v1::LogitsResponse>(*generation_->Logits(call.get(), request)));
  }
  {
    const auto call = InTrace(2);
    const auto stream = generation_->ScoreDocument(call.get());
    v1::ScoreDocumentRequest request;
    request.mutable_token_ids()->Assign(std::begin(kPrompt), std::end(kPrompt));
    ASSERT_TRUE(stream->Write(request));
    ASSERT_TRUE(stream->WritesDone());
    ASSERT_OK(ReadAll<v1::ScoreDocumentResponse>(*stream));
  }
  {
    v1::ScoreRequest request;
    v1::ScoreResponse response;
    request.mutable_tokens()->mutable_ids()->Assign(std::begin(kPrompt), std::end(kPrompt));
    ASSERT_OK(common::FromGrpcStatus(generation_->Score(InTrace(3).get(), request, &response)));
  }
  {
    v1::EmbedRequest request;
    v1::EmbedResponse response;
    request.mutable_tokens()->mutable_ids()->Assign(std::begin(kPrompt), std::end(kPrompt));
    ASSERT_OK(common::FromGrpcStatus(generation_->Embed(InTrace(4).get(), request, &response)));
  }
  ASSERT_OK(cluster_->Stop());

  int trace = 0;
  for (const char* method : {"Logits", "ScoreDocument", "Score", "Embed"}) {
    const std::string call = absl::StrCat("router-0 rwkv.v1.Generation/", method);
    std::vector<std::string> expected = {absl::StrCat(call, " < client")};
    for (const char* stage : {"router-0 attach", "router-0 prefill", "worker-0 worker.attach",
                              "worker-0 worker.prefill", "worker-1 worker.attach", "worker-1 worker.prefill"}) {
      expected.push_back(absl::StrCat(stage, " < ", call));
    }
    ExpectTree(++trace, expected);
  }
}

TEST_F(TracesTest, CallsOfSessionsAreTracedOverTheStore) {
  Start(1, collector_.address());
  v1::SessionsCreateRequest create;
  v1::SessionsCreateResponse created;
  create.set_session_id("a");
  ASSERT_OK(common::FromGrpcStatus(sessions_->Create(InTrace(1).get(), create, &created)));
  ASSERT_OK(Generate("a", "").status());
  v1::SessionsGetRequest get;
  v1::SessionsGetResponse got;
  get.set_session_id("a");
  get.set_tokens_count(5);
  ASSERT_OK(common::FromGrpcStatus(sessions_->Get(InTrace(2).get(), get, &got)));
  v1::SessionsListResponse listed;
  ASSERT_OK(common::FromGrpcStatus(sessions_->List(InTrace(3).get(), {}, &listed)));
  v1::SessionsForkRequest fork;
  v1::SessionsForkResponse forked;
  fork.set_session_id("a");
  fork.set_new_session_id("b");
  ASSERT_OK(common::FromGrpcStatus(sessions_->Fork(InTrace(4).get(), fork, &forked)));
  v1::SessionsRewindRequest rewind;
  v1::SessionsRewindResponse rewound;
  rewind.set_session_id("b");
  rewind.set_position(7);  // There is no snapshot: an export feeds the log again.
  ASSERT_OK(common::FromGrpcStatus(sessions_->Rewind(InTrace(5).get(), rewind, &rewound)));
  v1::SessionsExportStateRequest export_state;
  export_state.set_session_id("b");
  std::vector<v1::SessionsExportStateResponse> pieces;
  {
    const auto call = InTrace(6);
    ASSERT_OK(ReadAll(*sessions_->ExportState(call.get(), export_state), &pieces));
  }
  {
    const auto call = InTrace(7);
    v1::SessionsImportResponse imported;
    const auto writer = sessions_->Import(call.get(), &imported);
    v1::SessionsImportRequest request;
    request.set_session_id("c");
    request.set_data(FileOf(pieces));
    ASSERT_TRUE(writer->Write(request));
    ASSERT_TRUE(writer->WritesDone());
    ASSERT_OK(common::FromGrpcStatus(writer->Finish()));
  }
  v1::SessionsDeleteRequest erase;
  v1::SessionsDeleteResponse erased;
  erase.set_session_id("b");
  ASSERT_OK(common::FromGrpcStatus(sessions_->Delete(InTrace(8).get(), erase, &erased)));
  ASSERT_OK(cluster_->Stop());

  const auto call = [](const char* method) { return absl::StrCat("router-0 rwkv.v1.Sessions/", method); };
  const auto store = [](const char* method, const std::string& parent) {
    return absl::StrCat("state_store-0 rwkv.v1.State", method, " < ", parent);
  };
  ExpectTree(1, {call("Create") + " < client", store("Catalog/CreateSession", call("Create"))});
  ExpectTree(2, {call("Get") + " < client", store("Catalog/GetSession", call("Get")),
                 store("Catalog/ReadTokens", call("Get"))});
  ExpectTree(3, {call("List") + " < client", store("Catalog/ListSessions", call("List"))});
  ExpectTree(4, {call("Fork") + " < client", store("Catalog/ForkSession", call("Fork"))});
  ExpectTree(5, {call("Rewind") + " < client", "router-0 open < " + call("Rewind"),
                 store("Catalog/AcquireLease", "router-0 open"), store("Catalog/RewindSession", "router-0 open")});
  ExpectTree(6, {call("ExportState") + " < client", "router-0 open < " + call("ExportState"),
                 "router-0 locate < " + call("ExportState"), store("Catalog/FindSnapshot", "router-0 locate"),
                 store("Catalog/ReadTokens", "router-0 locate"), "worker-0 worker.attach < " + call("ExportState"),
                 "worker-0 worker.save < " + call("ExportState"), store("Records/PutRecords", "worker-0 worker.save"),
                 store("Records/GetRecords", call("ExportState"))});
  ExpectTree(7, {call("Import") + " < client", store("Catalog/GetSession", call("Import")),
                 store("Records/PutRecords", call("Import")), store("Catalog/ImportSession", call("Import"))});
  ExpectTree(8, {call("Delete") + " < client", "router-0 open < " + call("Delete"),
                 store("Catalog/AcquireLease", "router-0 open"), store("Catalog/DeleteSession", "router-0 open")});
}

TEST_F(TracesTest, TheLookForABeginningThatInputsShareIsTraced) {
  Start(1, collector_.address(), {"--prefix_min_tokens=16"});
  v1::GenerateRequest request;
  for (uint32_t id = 1; id <= 40; ++id) request.mutable_tokens()->add_ids(id);
  request.set_max_tokens(1);
  request.add_prefix_ends(20);
  const auto context = InTrace(1);
  ASSERT_OK(ReadAll<v1::GenerateResponse>(*generation_->Generate(context.get(), request)));
  ASSERT_OK(cluster_->Stop());
  const std::string call = absl::StrCat("router-0 ", kCall);
  ExpectTree(1, {absl::StrCat(call, " < client"), absl::StrCat("router-0 locate < ", call),
                 "state_store-0 rwkv.v1.StateCatalog/FindPrefix < router-0 locate",
                 "state_store-0 rwkv.v1.StateRecords/PutRecords < worker-0 worker.save"});
  // Of the stage that the turn is in by then, or of the call.
  EXPECT_THAT(Tree(OfTrace(collector_.spans(), 1)),
              Contains(HasSubstr("state_store-0 rwkv.v1.StateCatalog/PutPrefix < router-0")));
}

}  // namespace
}  // namespace rwkv
