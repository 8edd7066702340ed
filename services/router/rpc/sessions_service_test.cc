#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/services_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/worker/client/fake_worker.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using worker::FakeModel;
using worker::FakePipeline;

using SessionsServiceTest = ServicesTest;

TEST_F(SessionsServiceTest, SessionsBeginWithATunedStateThatIsServed) {
  constexpr char kPoet[] = "poet@12345678";
  FakePipeline::Options pipeline = World();
  pipeline.initial_states = {"judge@9abcdef0", kPoet};
  StartServer(pipeline);
  v1::ListModelsResponse models;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::ListModels, {}, &models), IsOk());
  EXPECT_THAT(models.models(0).initial_states(), ElementsAre("judge@9abcdef0", kPoet));

  v1::SessionsCreateRequest create;
  v1::SessionsCreateResponse created;
  create.set_session_id("s");
  create.set_initial_state("bard");
  EXPECT_THAT(
      Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
      StatusIs(absl::StatusCode::kNotFound, HasSubstr("\"bard\"; those it has: judge@9abcdef0, poet@12345678")));
  create.set_initial_state("poet");
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created), IsOk());
  EXPECT_EQ(created.session().initial_state(), kPoet);
  create.set_session_id("t");
  create.set_initial_state(kPoet);
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created), IsOk());

  // The state of an empty session is the tuned one; a turn, a rewind to nothing and forks go on from it.
  const uint64_t fresh = FakeModel::Fresh(kPoet);
  std::map<std::string, Tensor> tensors;
  ASSERT_THAT(Export("t", &tensors), IsOk());
  EXPECT_EQ(tensors.begin()->second.bytes, std::string(reinterpret_cast<const char*>(&fresh), sizeof(fresh)));
  EXPECT_THAT(Generate(SessionRequest("s", "r", kPrompt, 6)).tokens,
              ElementsAreArray(FakeModel::Greedy(kPrompt, 6, vocabulary_, kPoet)));
  for (uint64_t position : {0, 3}) {
    SCOPED_TRACE(position);
    v1::SessionsForkRequest fork;
    fork.set_session_id("s");
    fork.set_position(position);
    fork.set_new_session_id(absl::StrCat("fork-", position));
    v1::SessionsForkResponse forked;
    ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked), IsOk());
    EXPECT_EQ(forked.session().initial_state(), kPoet);
    std::vector<uint32_t> log(kPrompt.begin(), kPrompt.begin() + position);
    log.push_back(9);
    EXPECT_THAT(Generate(SessionRequest(fork.new_session_id(), "r", {9}, 5)).tokens,
                ElementsAreArray(FakeModel::Greedy(log, 5, vocabulary_, kPoet)));
  }
  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("s");
  v1::SessionsRewindResponse rewound;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound), IsOk());
  EXPECT_EQ(rewound.session().initial_state(), kPoet);
  EXPECT_THAT(Generate(SessionRequest("s", "r2", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy({9}, 5, vocabulary_, kPoet)));
}

TEST_F(SessionsServiceTest, SessionsAreCreatedListedForkedRewoundAndDeleted) {
  StartServer(World());
  const std::string made = CreateSession();
  EXPECT_FALSE(made.empty());
  EXPECT_EQ(CreateSession("s"), "s");
  v1::SessionsCreateRequest create;
  create.set_session_id("s");
  v1::SessionsCreateResponse created;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
              StatusIs(absl::StatusCode::kAlreadyExists));
  create.set_session_id("not allowed");
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
              StatusIs(absl::StatusCode::kInvalidArgument));
  const Result turn = Generate(SessionRequest("s", "r", kPrompt, 6));
  ASSERT_THAT(turn.status, IsOk());

  v1::SessionsGetRequest get;
  get.set_session_id("s");
  get.set_tokens_begin(2);
  get.set_tokens_count(100);
  v1::SessionsGetResponse got;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), IsOk());
  EXPECT_EQ(got.session().token_count(), 10);
  EXPECT_EQ(got.token_ids_size(), 8);
  EXPECT_FALSE(got.text().empty());
  get.set_tokens_begin(11);
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), StatusIs(absl::StatusCode::kOutOfRange));
  get.set_session_id("nobody");
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), StatusIs(absl::StatusCode::kNotFound));

  v1::SessionsForkRequest fork;
  fork.set_session_id("s");
  fork.set_position(7);
  fork.set_new_session_id("t");
  v1::SessionsForkResponse forked;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked), IsOk());
  EXPECT_EQ(forked.session().token_count(), 7);
  fork.set_position(11);
  fork.set_new_session_id("u");
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked), StatusIs(absl::StatusCode::kOutOfRange));
  // The fork goes its own way from there.
  std::vector<uint32_t> log = kPrompt;
  log.insert(log.end(), turn.tokens.begin(), turn.tokens.begin() + 3);
  log.push_back(9);
  EXPECT_THAT(Generate(SessionRequest("t", "r", {9}, 5)).tokens,
              ElementsAreArray(FakeModel::Greedy(log, 5, vocabulary_)));

  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("s");
  rewind.set_position(4);
  v1::SessionsRewindResponse rewound;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound), IsOk());
  EXPECT_EQ(rewound.session().token_count(), 4);

  v1::SessionsListRequest list;
  list.set_page_size(2);
  std::vector<std::string> ids;
  do {
    v1::SessionsListResponse page;
    ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, list, &page), IsOk());
    for (const v1::Session& session : page.sessions()) ids.push_back(session.id());
    list.set_page_token(page.next_page_token());
  } while (!list.page_token().empty());
  EXPECT_THAT(ids, ::testing::UnorderedElementsAre(made, "s", "t"));
  list.set_page_size(1001);
  v1::SessionsListResponse page;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, list, &page), StatusIs(absl::StatusCode::kInvalidArgument));

  v1::SessionsDeleteRequest erase;
  erase.set_session_id("s");
  v1::SessionsDeleteResponse erased;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Delete, erase, &erased), IsOk());
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Delete, erase, &erased), StatusIs(absl::StatusCode::kNotFound));
}

TEST_F(SessionsServiceTest, ExportStateNamesTensorsAsCheckpointsDo) {
  StartServer();
  CreateSession("s");
  const Result turn = Generate(SessionRequest("s", "r", kPrompt, 6));
  ASSERT_THAT(turn.status, IsOk());
  std::map<std::string, Tensor> tensors;
  ASSERT_THAT(Export("s", &tensors), IsOk());
  std::vector<uint32_t> log = kPrompt;
  log.insert(log.end(), turn.tokens.begin(), turn.tokens.end());
  const uint64_t state = FakeModel::Feed(FakeModel::Fresh(), log);
  ASSERT_EQ(tensors.size(), 4);
  for (int layer = 0; layer < 4; ++layer) {
    const Tensor& tensor = tensors[absl::StrCat("blocks.", layer, ".att.state")];
    EXPECT_EQ(tensor.position, 10);
    EXPECT_THAT(tensor.shape, ElementsAre(2));
    EXPECT_EQ(tensor.bytes, std::string(reinterpret_cast<const char*>(&state), sizeof(state)));
  }

  // Of an empty session: the initial state.
  CreateSession("empty");
  tensors.clear();
  ASSERT_THAT(Export("empty", &tensors), IsOk());
  EXPECT_EQ(tensors.size(), 4);
  EXPECT_EQ(tensors.begin()->second.position, 0);
  EXPECT_THAT(Export("nobody", &tensors), StatusIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(Export("not allowed", &tensors), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(SessionsServiceTest, TensorsOfSeveralMessagesAreExportedWhole) {
  FakePipeline::Options pipeline;
  pipeline.record_bytes = (5 << 19) + 8;  // Two and a half messages.
  StartServer(pipeline);
  CreateSession("s");
  const Result turn = Generate(SessionRequest("s", "r", kPrompt, 6));
  ASSERT_THAT(turn.status, IsOk());
  std::map<std::string, Tensor> tensors;
  ASSERT_THAT(Export("s", &tensors), IsOk());  // Checks offsets, and joins.
  std::vector<uint32_t> log = kPrompt;
  log.insert(log.end(), turn.tokens.begin(), turn.tokens.end());
  const uint64_t state = FakeModel::Feed(FakeModel::Fresh(), log);
  ASSERT_EQ(tensors.size(), 4);
  for (const auto& [name, tensor] : tensors) {
    ASSERT_EQ(tensor.bytes.size(), static_cast<size_t>(pipeline.record_bytes)) << name;
    uint64_t word = state;
    for (size_t at = 0; at < tensor.bytes.size(); at += sizeof(word), ++word) {
      ASSERT_EQ(std::memcmp(&tensor.bytes[at], &word, sizeof(word)), 0) << name << " at " << at;
    }
  }
}

TEST_F(SessionsServiceTest, AnExportWhoseSnapshotCannotBeReadMakesItAnew) {
  StartServer();
  CreateSession("s");
  const Result turn = Generate(SessionRequest("s", "r", kPrompt, 6));
  ASSERT_THAT(turn.status, IsOk());
  std::map<std::string, Tensor> tensors;
  ASSERT_THAT(Export("s", &tensors), IsOk());  // From now on there is a snapshot at the end.
  std::vector<uint32_t> log = kPrompt;
  log.insert(log.end(), turn.tokens.begin(), turn.tokens.end());
  const uint64_t state = FakeModel::Feed(FakeModel::Fresh(), log);
  for (const absl::Status& lost : {absl::DataLossError("corrupt"), absl::NotFoundError("no such record")}) {
    cluster_->store().FailGetRecords(1, lost);
    tensors.clear();
    ASSERT_THAT(Export("s", &tensors), IsOk());
    ASSERT_EQ(tensors.size(), 4);
    for (const auto& [name, tensor] : tensors) {
      EXPECT_EQ(tensor.bytes, std::string(reinterpret_cast<const char*>(&state), sizeof(state))) << name;
    }
  }
  // It does not go on so for ever.
  cluster_->store().FailGetRecords(1000, absl::DataLossError("corrupt"));
  tensors.clear();
  const absl::Status given_up = Export("s", &tensors);
  EXPECT_THAT(given_up, StatusIs(absl::StatusCode::kAborted, HasSubstr("could not be read")));
  EXPECT_TRUE(common::GetRetryDelay(given_up).has_value());
  cluster_->store().FailGetRecords(0, absl::OkStatus());
  EXPECT_THAT(Export("s", &tensors), IsOk());
}

TEST_F(SessionsServiceTest, ASessionOfAnotherModelHasTokensAndNoText) {
  StartServer(World());
  CreateSession("s");
  ASSERT_THAT(Generate(SessionRequest("s", "r", kPrompt, 6)).status, IsOk());
  v1::SessionsGetRequest get;
  get.set_session_id("s");
  get.set_tokens_count(100);
  v1::SessionsGetResponse got;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), IsOk());
  EXPECT_FALSE(got.text().empty());
  cluster_->pipeline().SetFingerprint("11111111111111111111111111111111");
  Reconnect(*cluster_);
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), IsOk());
  EXPECT_EQ(got.token_ids_size(), 10);
  EXPECT_EQ(got.text(), "");
  get.set_tokens_count(65537);
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tokens_count")));
}

}  // namespace
}  // namespace rwkv::router
