// Several stores: whichever is lost, calls go on at another, and none runs twice that may not.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/channel.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/client/state_store_client.h"
#include "tests/testing/status_matchers.h"
#include "tests/testing/wait_until.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::HasSubstr;
using testing::IsOk;
using testing::StatusIs;
using testing::WaitUntil;

constexpr absl::Duration kLimit = absl::Seconds(60);

absl::Time Deadline() { return absl::Now() + kLimit; }

// A store on a port of its own that counts its calls, and can be gone, silent or unable.
class Store final : public v1::StateCatalog::Service, public v1::StateRecords::Service {
 public:
  Store() { Start(); }
  ~Store() override { Stop(); }

  void Start() {
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    int port = 0;
    builder.AddListeningPort(absl::StrCat("127.0.0.1:", port_), grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(static_cast<v1::StateCatalog::Service*>(this));
    builder.RegisterService(static_cast<v1::StateRecords::Service*>(this));
    server_ = builder.BuildAndStart();
    ASSERT_NE(server_, nullptr);
    port_ = port;
  }
  void Stop() {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    server_ = nullptr;
  }
  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

  grpc::Status Describe(grpc::ServerContext* context, const v1::StateCatalogDescribeRequest*,
                        v1::StateCatalogDescribeResponse* response) override {
    ++described;
    response->set_name(address());
    return Answer(context);
  }
  grpc::Status BeginTurn(grpc::ServerContext* context, const v1::BeginTurnRequest*, v1::BeginTurnResponse*) override {
    ++calls;
    return Answer(context);
  }
  grpc::Status AppendTokens(grpc::ServerContext* context, const v1::AppendTokensRequest*,
                            v1::AppendTokensResponse*) override {
    ++calls;
    return Answer(context);
  }
  grpc::Status GetRecords(grpc::ServerContext* context, const v1::GetRecordsRequest*,
                          grpc::ServerWriter<v1::GetRecordsResponse>* writer) override {
    ++calls;
    v1::GetRecordsResponse response;
    response.set_data("abc");
    writer->Write(response);
    if (silent || unable) return Answer(context);
    response.set_data("def");
    writer->Write(response);
    return grpc::Status::OK;
  }

  std::atomic<bool> silent{false};  // Calls are taken and not answered, as by a stopped process.
  std::atomic<bool> unable{false};
  std::atomic<int> calls{0};
  std::atomic<int> described{0};

 private:
  grpc::Status Answer(grpc::ServerContext* context) const {
    (void)WaitUntil([&] { return !silent || context->IsCancelled(); });
    return unable ? grpc::Status(grpc::StatusCode::UNAVAILABLE, "no PostgreSQL") : grpc::Status::OK;
  }

  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

class StoreFailoverTest : public ::testing::Test {
 protected:
  StoreFailoverTest()
      : catalog_(NewCatalogClient(common::MakeChannels({a_.address(), b_.address()}), 0)),
        records_(NewRecordsClient(common::MakeChannels({a_.address(), b_.address()}), 0)) {}
  ~StoreFailoverTest() override { a_.silent = b_.silent = false; }

  Store a_, b_;
  std::unique_ptr<CatalogClient> catalog_;
  std::unique_ptr<RecordsClient> records_;
};

TEST_F(StoreFailoverTest, AllCallsGoToOneStoreWhileItAnswers) {
  for (int i = 0; i < 20; ++i) {
    ASSERT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
    ASSERT_THAT(catalog_->AppendTokens({}, Deadline()), IsOk());
  }
  EXPECT_EQ(a_.calls, 40);
  EXPECT_EQ(b_.calls, 0);
  EXPECT_EQ(a_.described, 0) << "who works is not asked";
  const auto other = NewCatalogClient(common::MakeChannels({a_.address(), b_.address()}), 1);
  ASSERT_THAT(other->BeginTurn({}, Deadline()), IsOk());
  EXPECT_EQ(b_.calls, 1);
}

TEST_F(StoreFailoverTest, NoCallFailsAtAStoreThatIsGone) {
  ASSERT_THAT(catalog_->AppendTokens({}, Deadline()), IsOk());
  a_.Stop();
  // Also what may not run twice: it is not sent to where nobody is. Only one that is being written while the connection
  // breaks cannot tell.
  int unsure = 0;
  for (int i = 0; i < 6; ++i) unsure += !catalog_->AppendTokens({}, Deadline()).ok();
  EXPECT_LE(unsure, 1);
  ASSERT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
  EXPECT_EQ(a_.calls + b_.calls, 8 - unsure);
}

TEST_F(StoreFailoverTest, AStoreThatNeverWasThereIsPassedOver) {
  a_.Stop();
  EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), IsOk());
  EXPECT_EQ(b_.calls, 1);
}

TEST_F(StoreFailoverTest, ASilentStoreIsLeftWithinTheDeadline) {
  ASSERT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
  a_.silent = true;
  const absl::Time begin = absl::Now();
  EXPECT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
  EXPECT_LT(absl::Now() - begin, absl::Seconds(15)) << "5 s, and a slow machine";
  EXPECT_EQ(a_.calls, 2);
  EXPECT_EQ(b_.calls, 1);
  // And nobody waits for it again.
  const absl::Time then = absl::Now();
  for (int i = 0; i < 100; ++i) ASSERT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
  EXPECT_LT(absl::Now() - then, absl::Seconds(4));
  EXPECT_EQ(a_.calls, 2);
}

TEST_F(StoreFailoverTest, WhatMayNotRunTwiceRunsOnceAndTheNextGoesElsewhere) {
  a_.unable = true;
  EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), StatusIs(StatusCode::kUnavailable, HasSubstr("no PostgreSQL")));
  EXPECT_EQ(a_.calls + b_.calls, 1);
  EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), IsOk());
  EXPECT_EQ(b_.calls, 1);
  a_.unable = false;
  b_.silent = true;
  EXPECT_THAT(catalog_->AppendTokens({}, absl::Now() + absl::Milliseconds(200)),
              StatusIs(StatusCode::kDeadlineExceeded));
  EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), IsOk());
}

TEST_F(StoreFailoverTest, AStoreThatAnswersAgainIsComeBackTo) {
  a_.Stop();
  ASSERT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
  EXPECT_EQ(b_.calls, 1);
  a_.Start();
  EXPECT_TRUE(WaitUntil([&] {
    EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), IsOk());
    return a_.calls > 0;
  }));
}

TEST_F(StoreFailoverTest, ASilentStoreIsNotComeBackTo) {
  a_.unable = true;
  ASSERT_THAT(catalog_->BeginTurn({}, Deadline()), IsOk());
  a_.silent = true;
  const int before = a_.calls;
  ASSERT_TRUE(WaitUntil([&] {
    EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), IsOk());
    return a_.described >= 2;
  }));
  EXPECT_EQ(a_.calls, before);
}

TEST_F(StoreFailoverTest, WithAllAwayACallEndsSoonAndSaysWhy) {
  a_.unable = b_.unable = true;
  const absl::Time begin = absl::Now();
  EXPECT_THAT(catalog_->BeginTurn({}, Deadline()), StatusIs(StatusCode::kUnavailable, HasSubstr("no PostgreSQL")));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
  EXPECT_GE(a_.calls, 2);
  EXPECT_GE(b_.calls, 2);
  EXPECT_LE(a_.calls + b_.calls, 6);
  a_.Stop();
  b_.Stop();
  EXPECT_THAT(catalog_->BeginTurn({}, Deadline()), StatusIs(StatusCode::kUnavailable));
  EXPECT_THAT(catalog_->AppendTokens({}, Deadline()), StatusIs(StatusCode::kUnavailable));
  b_.unable = false;
  b_.Start();
  EXPECT_TRUE(WaitUntil([&] { return catalog_->AppendTokens({}, Deadline()).ok(); }));
}

TEST_F(StoreFailoverTest, ARecordThatBreaksOffIsReadWholeAtAnother) {
  v1::RecordInfo info;
  info.set_snapshot_id("x");
  info.set_bytes(6);
  info.set_crc32c(Crc32c(std::string("abcdef")));
  a_.unable = true;
  EXPECT_THAT(records_->GetRecord(info, Deadline()), testing::IsOkAndHolds(std::string("abcdef")));
  EXPECT_EQ(a_.calls, 1);
  EXPECT_EQ(b_.calls, 1);
}

TEST_F(StoreFailoverTest, ManyCallersLeaveAStoreTogether) {
  std::atomic<bool> stop{false};
  std::atomic<int> failed{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      while (!stop) {
        const absl::Status status = catalog_->BeginTurn({}, Deadline()).status();
        if (!status.ok()) std::fprintf(stderr, "a call failed: %s\n", status.ToString().c_str());
        failed += !status.ok();
      }
    });
  }
  for (Store* const store : {&a_, &b_}) {
    store->Stop();
    Store& other = store == &a_ ? b_ : a_;
    const int before = other.calls;
    EXPECT_TRUE(WaitUntil([&] { return other.calls > before + 50; }));
    store->Start();
    const int again = store->described;
    // The second is nobody's own: whether it is there is not asked before it is needed.
    EXPECT_TRUE(WaitUntil([&] { return store == &b_ || store->described > again; }));
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failed, 0);
}

TEST_F(StoreFailoverTest, EveryStoreSaysWhoItIs) {
  b_.silent = true;
  const auto answers =
      DescribeStores(common::MakeChannels({a_.address(), b_.address()}), absl::Now() + absl::Seconds(1));
  ASSERT_EQ(answers.size(), 2u);
  ASSERT_THAT(answers[0], IsOk());
  EXPECT_EQ(answers[0]->name(), a_.address());
  EXPECT_THAT(answers[1], StatusIs(StatusCode::kDeadlineExceeded));
}

}  // namespace
}  // namespace rwkv::state_store
