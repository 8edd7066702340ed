#include "services/worker/link/inbox.h"

#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/link/link.h"
#include "services/worker/link/transfer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr LinkShape kShape = {3, 2, 8};

v1::TransferRequest Step(uint64_t id) {
  v1::TransferRequest request;
  request.set_step_id(id);
  return request;
}

TEST(InboxTest, OneCallFeedsItAndNoneOnceItIsOver) {
  Inbox inbox(kShape);
  EXPECT_TRUE(inbox.Connect(nullptr, nullptr, "pair", {true, "why"}));
  EXPECT_FALSE(inbox.Connect(nullptr, nullptr, "other", {}));
  std::string pair;
  LinkAgreement agreement;
  ASSERT_THAT(inbox.WaitConnected(&pair, &agreement), IsOk());
  EXPECT_EQ(pair, "pair");
  EXPECT_TRUE(agreement.by_device);
  EXPECT_EQ(agreement.why_not, "why");

  Inbox over(kShape);
  over.Abort();
  EXPECT_FALSE(over.Connect(nullptr, nullptr, "pair", {}));
  EXPECT_THAT(over.WaitConnected(&pair, &agreement), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("aborted")));
}

TEST(InboxTest, FourFramesWaitAndTheFifthForRoom) {
  Inbox inbox(kShape);
  EXPECT_FALSE(inbox.Ready());
  for (uint64_t id = 1; id <= 4; ++id) EXPECT_TRUE(inbox.Push(Step(id)));
  EXPECT_TRUE(inbox.Ready());
  LinkFrame frame;
  ASSERT_THAT(inbox.Pop(frame), IsOk());
  EXPECT_EQ(frame.header.step_id, 1u);
  EXPECT_TRUE(inbox.Push(Step(5))) << "there is room again";
  bool sixth = true;
  std::thread pushes([&] { sixth = inbox.Push(Step(6)); });
  inbox.Abort();
  pushes.join();
  EXPECT_FALSE(sixth) << "it waited, and the end came first";
  EXPECT_THAT(inbox.Pop(frame), StatusIs(absl::StatusCode::kUnavailable)) << "what came before does not count";
}

TEST(InboxTest, WhatComesIsAnnouncedBeforeItIsThere) {
  Inbox inbox(kShape);
  std::vector<std::string> seen;
  inbox.NotifyFrames([&](absl::optional<uint64_t> own_after) {
    EXPECT_FALSE(inbox.Ready());
    seen.push_back(own_after.has_value() ? "own after " + std::to_string(*own_after) : "the router's");
  });
  LinkFrame frame;
  ASSERT_TRUE(inbox.Push(Step(1)));
  ASSERT_THAT(inbox.Pop(frame), IsOk());
  v1::TransferRequest own = Step(2);
  own.mutable_own_step()->add_entries();
  own.set_commands_before(3);
  ASSERT_TRUE(inbox.Push(own));
  EXPECT_THAT(seen, ElementsAre("the router's", "own after 3"));
}

TEST(InboxTest, TheOtherEndsLeavingIsToldOnceAndOurOwnNever) {
  std::vector<std::string> told;
  const auto broken = [&](const absl::Status& why) { told.push_back(std::string(why.message())); };
  Inbox left(kShape);
  left.NotifyBroken(broken);
  left.Disconnect(absl::UnavailableError("gone"));
  left.Disconnect(absl::UnavailableError("gone again"));
  EXPECT_THAT(told, ElementsAre("gone"));
  left.NotifyBroken(broken);
  EXPECT_THAT(told, ElementsAre("gone", "gone")) << "at once, since it has happened";
  left.Abort();
  left.NotifyBroken(broken);
  EXPECT_THAT(told, ElementsAre("gone", "gone", "gone")) << "an abort afterwards changes nothing";
  LinkFrame frame;
  EXPECT_THAT(left.Pop(frame), StatusIs(absl::StatusCode::kUnavailable, "gone"));
  EXPECT_THAT(left.Return({}), StatusIs(absl::StatusCode::kUnavailable)) << "nobody is there to hear it";

  told.clear();
  Inbox aborted(kShape);
  aborted.NotifyBroken(broken);
  aborted.Abort();
  aborted.Disconnect(absl::UnavailableError("gone"));
  aborted.NotifyBroken(broken);
  EXPECT_THAT(told, ElementsAre());
  Inbox(kShape).Disconnect(absl::UnavailableError("nobody wants to know"));
}

}  // namespace
}  // namespace rwkv::worker
