#include "services/router/core/client_streams.h"

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/router/core/core_testing.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

TurnOptions Options() {
  TurnOptions options;
  options.max_stream_messages = 2;
  options.slow_client_timeout = absl::Seconds(30);
  return options;
}

// A turn, and what its client gets.
struct Told {
  explicit Told(const std::string& session) {
    turn = core.Start(Turn::Phase::kRunning, "", session, stream);
    turn->request_id = "r";
  }
  void Draw(int tokens) {
    for (int i = 0; i < tokens; ++i) turn->answer->Push(10 + i, 0, {});
  }
  absl::Status Pump() { return core.streams.Pump(*turn); }

  CoreParts core{Options()};
  std::shared_ptr<HeldStream> stream = std::make_shared<HeldStream>();
  TurnPtr turn;
};

TEST(ClientStreamsTest, NothingIsSentThatIsNotDurable) {
  Told told("s");
  told.Draw(2);
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, IsEmpty());
  told.turn->durable = 1;
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, SizeIs(1));
  told.turn->answer->Finish(v1::FINISH_REASON_STOP_STRING, absl::nullopt, "x");
  told.turn->durable = 2;
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, SizeIs(2));
  told.stream->Take();
  told.turn->finish_durable = true;
  EXPECT_THAT(told.Pump(), IsOk());
  ASSERT_THAT(told.stream->sent, SizeIs(3));
  const v1::Finish& finish = told.stream->sent.back().finish();
  EXPECT_EQ(finish.reason(), v1::FINISH_REASON_STOP_STRING);
  EXPECT_EQ(finish.stop_string(), "x");
  EXPECT_EQ(finish.prompt_tokens(), 3);
  EXPECT_EQ(finish.generated_tokens(), 2);
  EXPECT_EQ(finish.session_id(), "s");
  EXPECT_EQ(finish.request_id(), "r");
  EXPECT_EQ(finish.session_tokens(), 5);
  EXPECT_THAT(told.stream->closed, ElementsAre(IsOk()));
  EXPECT_EQ(told.core.turns.FindCall(told.turn->call), nullptr);
}

TEST(ClientStreamsTest, WithoutALogTokensAreSentAsTheyAreDrawn) {
  Told told("");
  told.Draw(1);
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, SizeIs(1));
  told.turn->answer->Finish(v1::FINISH_REASON_LENGTH, absl::nullopt, "");
  EXPECT_THAT(told.Pump(), IsOk());
  ASSERT_THAT(told.stream->sent, SizeIs(2));
  EXPECT_EQ(told.stream->sent.back().finish().session_tokens(), 0);
  EXPECT_FALSE(told.turn->kind->IsOpen());
  EXPECT_THAT(told.Pump(), IsOk());  // There is nobody to tell.
}

TEST(ClientStreamsTest, AFullStreamIsAskedOnceToSayWhenThereIsRoom) {
  Told told("");
  told.Draw(5);
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, SizeIs(2));
  EXPECT_TRUE(told.turn->waits_for_room);
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->waits_for_room, SizeIs(1));
  told.stream->Take();
  EXPECT_TRUE(told.turn->waits_for_room);  // Until the core's thread hears of it.
  told.core.world.RunEvents();
  EXPECT_FALSE(told.turn->waits_for_room);
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, SizeIs(4));
}

TEST(ClientStreamsTest, WhoTakesNothingForTooLongIsStuck) {
  Told told("");
  told.Draw(9);
  EXPECT_THAT(told.Pump(), IsOk());
  told.core.world.now += absl::Seconds(30);
  EXPECT_THAT(told.Pump(), IsOk());
  told.stream->taken = 1;  // It took something: from here on.
  EXPECT_THAT(told.Pump(), IsOk());
  told.core.world.now += absl::Seconds(30);
  EXPECT_THAT(told.Pump(), IsOk());
  told.core.world.now += absl::Milliseconds(1);
  EXPECT_THAT(told.Pump(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("took no message for 30s")));
  EXPECT_THAT(told.stream->closed, IsEmpty());  // That is for who asked.
}

TEST(ClientStreamsTest, AnErrorWaitsUntilTheClientHasTheTokens) {
  Told told("s");
  told.Draw(1);
  told.turn->error = absl::InternalError("it broke");
  told.turn->answer->Finish(v1::FINISH_REASON_ERROR, absl::nullopt, "");
  told.turn->durable = 1;
  told.turn->finish_durable = true;
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, SizeIs(1));
  EXPECT_THAT(told.stream->closed, IsEmpty());
  told.stream->Take();
  told.core.world.RunEvents();
  EXPECT_THAT(told.Pump(), IsOk());
  EXPECT_THAT(told.stream->sent, SizeIs(1));
  EXPECT_THAT(told.stream->closed, ElementsAre(StatusIs(absl::StatusCode::kInternal)));
}

TEST(ClientStreamsTest, OtherCallsHaveRoomForAFewMessages) {
  Told told("");
  EXPECT_TRUE(told.core.streams.HasRoom(*told.turn, 3));
  EXPECT_FALSE(told.core.streams.HasRoom(*told.turn, 4));
  EXPECT_FALSE(told.core.streams.IsStuck(*told.turn));
  told.core.world.now += absl::Seconds(31);
  EXPECT_FALSE(told.core.streams.HasRoom(*told.turn, 4));
  EXPECT_TRUE(told.core.streams.IsStuck(*told.turn));
  EXPECT_TRUE(told.core.streams.HasRoom(*told.turn, 3));
  EXPECT_FALSE(told.core.streams.IsStuck(*told.turn));
}

}  // namespace
}  // namespace rwkv::router
