// One tenant walks over another's ids, through every call that takes one; and what limits do at the services.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/rpc/services_fixture.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class TenantsTest : public ServicesTest {
 protected:
  TenantsTest() { with_tenants_ = true; }

  void SetTenants(const std::string& text) {
    tenants_file_ = ::testing::TempDir() + "/tenants";
    std::ofstream(tenants_file_ + ".new") << text;
    ASSERT_EQ(rename((tenants_file_ + ".new").c_str(), tenants_file_.c_str()), 0);
  }
  static v1::GenerateRequest Request(const std::string& session, const std::string& request_id, uint32_t max_tokens) {
    v1::GenerateRequest request;
    request.set_session_id(session);
    request.set_request_id(request_id);
    for (const uint32_t id : kPrompt) request.mutable_tokens()->add_ids(id);
    request.set_max_tokens(max_tokens);
    request.set_ignore_end_of_text(true);
    return request;
  }
  std::vector<std::string> List() {
    std::vector<std::string> ids;
    v1::SessionsListRequest request;
    request.set_page_size(2);
    do {
      v1::SessionsListResponse page;
      EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, request, &page), IsOk());
      for (const v1::Session& session : page.sessions()) ids.push_back(session.id());
      request.set_page_token(page.next_page_token());
    } while (!request.page_token().empty());
    return ids;
  }
  v1::GetTenantUsageResponse Usage(const std::string& tenant = "") {
    v1::GetTenantUsageRequest request;
    request.set_tenant(tenant);
    v1::GetTenantUsageResponse usage;
    EXPECT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetTenantUsage, request, &usage), IsOk());
    return usage;
  }

  // What every call that takes the id of a session says to it.
  std::map<std::string, absl::Status> Walk(const std::string& id) {
    std::map<std::string, absl::Status> said;
    said["Generate"] = Generate(Request(id, "new", 2)).status;
    v1::GenerateRequest resume = Request(id, "first", 3);
    resume.set_resume_from(1);
    said["Generate, resumed"] = Generate(resume).status;
    v1::GenerateRequest go_on = Request(id, "go-on", 3);
    go_on.clear_input();
    said["Generate, continued"] = Generate(go_on).status;
    v1::SessionsGetRequest get;
    get.set_session_id(id);
    get.set_tokens_count(100);
    v1::SessionsGetResponse got;
    said["Get"] = Call(*sessions_, &v1::Sessions::Stub::Get, get, &got);
    v1::SessionsForkRequest fork;
    fork.set_session_id(id);
    v1::SessionsForkResponse forked;
    said["Fork"] = Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked);
    v1::SessionsRewindRequest rewind;
    rewind.set_session_id(id);
    rewind.set_position(1);
    v1::SessionsRewindResponse rewound;
    said["Rewind"] = Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound);
    std::map<std::string, Tensor> tensors;
    said["ExportState"] = Export(id, &tensors);
    v1::SessionsDeleteRequest erase;
    erase.set_session_id(id);
    v1::SessionsDeleteResponse erased;
    said["Delete"] = Call(*sessions_, &v1::Sessions::Stub::Delete, erase, &erased);
    return said;
  }
};

TEST_F(TenantsTest, AnothersSessionIsLikeOneThatIsNotThere) {
  StartServer();
  As("acme");
  ASSERT_EQ(CreateSession("secret"), "secret");
  const Result first = Generate(Request("secret", "first", 3));
  ASSERT_THAT(first.status, IsOk());
  EXPECT_EQ(first.finish.session_id(), "secret");
  for (const char* other : {"zeta", "acm", "acme.eu", ""}) {
    As(other);
    const auto theirs = Walk("secret"), missing = Walk("nowhere");
    for (const auto& [method, status] : theirs) {
      EXPECT_EQ(status.code(), absl::StatusCode::kNotFound) << method << " as \"" << other << "\": " << status;
      // The same words, so that nobody learns from them whether it is there.
      EXPECT_EQ(status.message(), absl::StrReplaceAll(missing.at(method).message(), {{"nowhere", "secret"}})) << method;
      EXPECT_THAT(status.message(), Not(HasSubstr("@"))) << method;
    }
    EXPECT_THAT(List(), IsEmpty());
  }
  // The id is free for everybody else, and each has its own.
  As("zeta");
  ASSERT_EQ(CreateSession("secret"), "secret");
  ASSERT_THAT(Generate(Request("secret", "first", 1)).status, IsOk());
  As("acme");
  EXPECT_THAT(List(), ElementsAre("secret"));
  const Result again = Generate(Request("secret", "first", 3));
  EXPECT_THAT(again.status, IsOk());
  EXPECT_EQ(again.tokens, first.tokens);
  for (const auto& [method, status] : Walk("secret")) {
    if (method == "Generate, continued" || method == "Generate, resumed") continue;
    EXPECT_THAT(status, IsOk()) << method;
  }
}

TEST_F(TenantsTest, NobodyCanSayAnothersName) {
  StartServer();
  As("acme");
  ASSERT_EQ(CreateSession("secret"), "secret");
  for (const char* who : {"", "zeta", "acme"}) {
    As(who);
    for (const auto& [method, status] : Walk("acme@secret")) {
      EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("A-Z a-z"))) << method;
    }
    v1::SessionsCreateRequest create;
    create.set_session_id("acme@mine");
    v1::SessionsCreateResponse created;
    EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
                StatusIs(absl::StatusCode::kInvalidArgument));
    v1::SessionsForkRequest fork;
    fork.set_session_id("secret");
    fork.set_new_session_id("acme@mine");
    v1::SessionsForkResponse forked;
    EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked),
                StatusIs(absl::StatusCode::kInvalidArgument));
    v1::SessionsListRequest list;
    list.set_page_token("acme@");
    v1::SessionsListResponse page;
    EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, list, &page), StatusIs(absl::StatusCode::kInvalidArgument));
    grpc::ClientContext context;
    Begin(context);
    v1::SessionsImportResponse imported;
    const auto writer = sessions_->Import(&context, &imported);
    v1::SessionsImportRequest piece;
    piece.set_session_id("acme@mine");
    piece.set_data("x");
    writer->Write(piece);
    writer->WritesDone();
    EXPECT_THAT(common::FromGrpcStatus(writer->Finish()), StatusIs(absl::StatusCode::kInvalidArgument));
  }
}

TEST_F(TenantsTest, WhatASessionIsCalledStaysTheTenants) {
  StartServer();
  As("acme");
  ASSERT_EQ(CreateSession("one"), "one");
  ASSERT_THAT(Generate(Request("one", "r", 2)).status, IsOk());
  v1::SessionsForkRequest fork;
  fork.set_session_id("one");
  v1::SessionsForkResponse forked;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked), IsOk());
  EXPECT_EQ(forked.session().forked_from(), "one");
  EXPECT_THAT(forked.session().id(), Not(HasSubstr("acme")));
  v1::SessionsGetRequest get;
  get.set_session_id(forked.session().id());
  v1::SessionsGetResponse got;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), IsOk());
  EXPECT_EQ(got.session().id(), forked.session().id());
  EXPECT_EQ(got.session().forked_from(), "one");
  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("one");
  rewind.set_position(2);
  v1::SessionsRewindResponse rewound;
  ASSERT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound), IsOk());
  EXPECT_EQ(rewound.session().id(), "one");
  v1::SessionsCreateRequest create;
  create.set_session_id("one");
  v1::SessionsCreateResponse created;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, create, &created),
              StatusIs(absl::StatusCode::kAlreadyExists, AllOf(HasSubstr("session one"), Not(HasSubstr("acme")))));
}

TEST_F(TenantsTest, UsageIsTheSumOfWhatClientsWereTold) {
  SetTenants("name=acme\nname=zeta\n");
  StartServer();
  uint64_t turns = 0, prompt = 0, generated = 0;
  As("acme");
  ASSERT_EQ(CreateSession("one"), "one");
  for (int i = 0; i < 4; ++i) {
    const bool with_session = i % 2 == 0;
    const Result result = Generate(Request(with_session ? "one" : "", with_session ? absl::StrCat("r", i) : "", 3 + i));
    ASSERT_THAT(result.status, IsOk());
    ++turns;
    prompt += result.finish.prompt_tokens();
    generated += result.finish.generated_tokens();
  }
  // Asked for again, nothing runs.
  ASSERT_THAT(Generate(Request("one", "r0", 3)).status, IsOk());
  v1::ScoreRequest score;
  for (const uint32_t id : kPrompt) score.mutable_tokens()->add_ids(id);
  v1::ScoreResponse scored;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::Score, score, &scored), IsOk());
  ++turns;
  prompt += kPrompt.size();
  const v1::GetTenantUsageResponse usage = Usage();
  EXPECT_EQ(usage.tenant(), "acme");
  EXPECT_EQ(usage.turns(), turns);
  EXPECT_EQ(usage.prompt_tokens(), prompt);
  EXPECT_EQ(usage.generated_tokens(), generated);
  EXPECT_EQ(usage.sessions(), 1u);
  EXPECT_GT(usage.stored_bytes(), 0u);
  // It is the tenant's own affair, and the operator's.
  As("zeta");
  EXPECT_EQ(Usage().turns(), 0u);
  v1::GetTenantUsageRequest request;
  request.set_tenant("acme");
  v1::GetTenantUsageResponse theirs;
  EXPECT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetTenantUsage, request, &theirs),
              StatusIs(absl::StatusCode::kPermissionDenied));
  As("");
  EXPECT_EQ(Usage("acme").generated_tokens(), generated);
  request.clear_tenant();
  EXPECT_THAT(Call(*cluster_stub_, &v1::Cluster::Stub::GetTenantUsage, request, &theirs),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tenant")));
}

TEST_F(TenantsTest, LimitsOfTheFileHoldAndChangeWithIt) {
  SetTenants("name=acme max_tokens=5 tokens_per_minute=20\nname=small stored_bytes=1\nname=picky models=other\n");
  StartServer();
  As("acme");
  EXPECT_THAT(Generate(Request("", "", 6)).status,
              StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr("max_tokens"), HasSubstr("at most 5"))));
  v1::GenerateRequest unsaid = Request("", "", 0);
  unsaid.clear_max_tokens();
  const Result fits = Generate(unsaid);
  ASSERT_THAT(fits.status, IsOk());
  EXPECT_EQ(fits.tokens.size(), 5u);
  ASSERT_THAT(Generate(Request("", "", 5)).status, IsOk());
  const absl::Status refused = Generate(Request("", "", 5)).status;  // 18 of 20 are gone.
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("tokens_per_minute, 20")));
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  As("picky");
  EXPECT_THAT(Generate(Request("", "", 1)).status, StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("model")));
  v1::ListModelsResponse models;
  ASSERT_THAT(Call(*generation_, &v1::Generation::Stub::ListModels, v1::ListModelsRequest(), &models), IsOk());
  EXPECT_EQ(models.models_size(), 0);
  const auto not_its_own = StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("model"));
  v1::TokenizeRequest tokenize;
  tokenize.set_data("r");
  v1::TokenizeResponse tokenized;
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokenized), not_its_own);
  v1::DetokenizeResponse text;
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Detokenize, v1::DetokenizeRequest(), &text), not_its_own);
  grpc::ClientContext context;
  Begin(context);
  const auto document = generation_->TokenizeDocument(&context);
  v1::TokenizeDocumentRequest piece;
  piece.set_text("r");
  ASSERT_TRUE(document->Write(piece) && document->WritesDone());
  v1::TokenizeDocumentResponse tokens;
  EXPECT_FALSE(document->Read(&tokens));
  EXPECT_THAT(common::FromGrpcStatus(document->Finish()), not_its_own);
  v1::SessionsCreateRequest poet;
  poet.set_initial_state("poet");
  v1::SessionsCreateResponse none;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Create, poet, &none), not_its_own);
  As("small");
  ASSERT_EQ(CreateSession("one"), "one");
  ASSERT_THAT(Generate(Request("one", "r", 1)).status, IsOk());
  v1::SessionsCreateRequest create;
  v1::SessionsCreateResponse created;
  const absl::Status full = Call(*sessions_, &v1::Sessions::Stub::Create, create, &created);
  EXPECT_THAT(full, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("stored_bytes, 1")));
  EXPECT_TRUE(common::GetRetryDelay(full).has_value());
  As("stranger");
  EXPECT_THAT(Generate(Request("", "", 1)).status,
              StatusIs(absl::StatusCode::kPermissionDenied, HasSubstr("stranger")));
  SetTenants("name=stranger\n");
  EXPECT_THAT(Generate(Request("", "", 1)).status, IsOk());
  SetTenants("name=stranger weight=heavy\n");  // Of no use: the one of before stays.
  EXPECT_THAT(Generate(Request("", "", 1)).status, IsOk());
  As("acme");
  EXPECT_THAT(Generate(Request("", "", 1)).status, StatusIs(absl::StatusCode::kPermissionDenied));
  As("");  // An operator.
  EXPECT_THAT(Generate(Request("", "", 1)).status, IsOk());
}

TEST_F(TenantsTest, AFloodIsRefusedAtTheDoorAndKeepsNobodyElseOut) {
  max_calls_ = 3;
  StartServer();
  // Three that are not read to their end.
  As("flood");
  std::vector<
      std::pair<std::unique_ptr<grpc::ClientContext>, std::unique_ptr<grpc::ClientReader<v1::GenerateResponse>>>>
      flood;
  for (int i = 0; i < 3; ++i) {
    auto context = std::make_unique<grpc::ClientContext>();
    Begin(*context);
    auto reader = generation_->Generate(context.get(), Request("", "", 5000));
    v1::GenerateResponse first;
    ASSERT_TRUE(reader->Read(&first));
    flood.emplace_back(std::move(context), std::move(reader));
  }
  const auto is_refused = [](const absl::Status& status) {
    EXPECT_THAT(status, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("3 of them of tenant flood")));
    EXPECT_TRUE(common::GetRetryDelay(status).has_value());
  };
  is_refused(Generate(Request("", "", 1)).status);
  v1::ScoreRequest score;
  for (const uint32_t id : kPrompt) score.mutable_tokens()->add_ids(id);
  v1::ScoreResponse scored;
  is_refused(Call(*generation_, &v1::Generation::Stub::Score, score, &scored));
  // It may be a turn that has its place.
  ASSERT_EQ(CreateSession("one"), "one");
  EXPECT_THAT(Generate(Request("one", "named", 1)).status, IsOk());
  As("quiet");
  for (int i = 0; i < 5; ++i) {
    EXPECT_THAT(Generate(Request("", "", 1)).status, IsOk());
    EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Score, score, &scored), IsOk());
  }
  // A client that leaves makes room. When the router hears of it nobody knows.
  As("flood");
  flood.back().first->TryCancel();
  absl::Status status;
  for (const absl::Time limit = absl::Now() + kTestLimit; absl::Now() < limit;) {
    status = Generate(Request("", "", 1)).status;
    if (status.ok()) break;
  }
  EXPECT_THAT(status, IsOk());
  for (auto& [context, reader] : flood) {
    context->TryCancel();
    (void)reader->Finish();
  }
}

TEST_F(TenantsTest, CallsOfSessionsAndTextsAreRequestsToo) {
  SetTenants("name=acme requests_per_minute=5\nname=zeta\n");
  StartServer(World());
  As("acme");
  ASSERT_EQ(CreateSession("one"), "one");
  v1::SessionsGetRequest get;
  get.set_session_id("one");
  v1::SessionsGetResponse got;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Get, get, &got), IsOk());
  v1::SessionsRewindRequest rewind;
  rewind.set_session_id("one");
  v1::SessionsRewindResponse rewound;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound), IsOk());
  v1::TokenizeRequest tokenize;
  tokenize.set_data("text");
  v1::TokenizeResponse tokens;
  (void)Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokens);
  EXPECT_THAT(Generate(Request("", "", 1)).status, IsOk());
  const absl::Status refused = Call(*sessions_, &v1::Sessions::Stub::Get, get, &got);
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("requests_per_minute, 5")));
  EXPECT_TRUE(common::GetRetryDelay(refused).has_value());
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::Rewind, rewind, &rewound),
              StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(Call(*generation_, &v1::Generation::Stub::Tokenize, tokenize, &tokens),
              StatusIs(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(Usage().turns(), 1u) << "what it has used it may ask all the same";
  As("zeta");
  v1::SessionsListResponse page;
  EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, v1::SessionsListRequest(), &page), IsOk());
}

TEST_F(TenantsTest, AFloodOfCallsOfSessionsKeepsNobodyElseOut) {
  max_store_calls_ = 2;
  StartServer();
  As("flood");
  ASSERT_EQ(CreateSession("one"), "one");
  std::atomic<bool> stop{false};
  std::atomic<int> refused_sessions{0}, refused_usage{0}, failed{0};
  std::vector<std::thread> flood;
  for (int i = 0; i < 16; ++i) {
    flood.emplace_back([&, asks_for_usage = i % 2 == 0] {
      while (!stop) {
        grpc::ClientContext context;
        Begin(context);
        v1::SessionsGetRequest get;
        get.set_session_id("one");
        v1::SessionsGetResponse got;
        v1::GetTenantUsageResponse usage;
        const absl::Status status =
            common::FromGrpcStatus(asks_for_usage ? cluster_stub_->GetTenantUsage(&context, {}, &usage)
                                                  : sessions_->Get(&context, get, &got));
        if (status.ok()) continue;
        const bool comes_again = absl::IsResourceExhausted(status) && common::GetRetryDelay(status).has_value();
        ++(!comes_again ? failed : asks_for_usage ? refused_usage : refused_sessions);
      }
    });
  }
  EXPECT_TRUE(::rwkv::testing::WaitUntil([&] { return refused_sessions > 10 && refused_usage > 10; }));
  // The quiet one calls through a stub of its own, as a tenant of its own.
  for (int i = 0; i < 50; ++i) {
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kTestLimit));
    context.AddMetadata("test-tenant", "quiet");
    v1::SessionsListResponse page;
    EXPECT_THAT(common::FromGrpcStatus(sessions_->List(&context, v1::SessionsListRequest(), &page)), IsOk());
  }
  stop = true;
  for (std::thread& thread : flood) thread.join();
  EXPECT_EQ(failed, 0);
}

TEST_F(TenantsTest, WhatIsRefusedAtOnceCostsNothing) {
  SetTenants("name=acme requests_per_minute=1\n");
  StartServer();
  As("acme");
  v1::GenerateRequest wrong = Request("", "", 1);
  wrong.mutable_sampling()->set_top_p(7);
  for (int i = 0; i < 5; ++i) {
    EXPECT_THAT(Generate(wrong).status, StatusIs(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_THAT(Generate(Request("", "", 1)).status, IsOk());
  EXPECT_THAT(Generate(Request("", "", 1)).status, StatusIs(absl::StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace rwkv::router
