#include "services/router/rpc/stream_reactor.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/grpc_status.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

// gRPC's side of a call, whose writes are done when the test says so.
class FakeCall {
 public:
  virtual ~FakeCall() = default;
  virtual void OnWriteDone(bool ok) = 0;
  virtual void OnCancel() = 0;
  virtual void OnDone() = 0;

  void StartWrite(const std::string* message, grpc::WriteOptions options) {
    EXPECT_FALSE(finished.has_value()) << "a write after the end";
    EXPECT_FALSE(writing) << "two writes at a time";
    writing = true;
    may_wait = options.get_buffer_hint();
    written.push_back(*message);
  }
  void Finish(const grpc::Status& status) {
    EXPECT_FALSE(finished.has_value()) << "finished twice";
    EXPECT_FALSE(writing) << "finished during a write";
    finished = common::FromGrpcStatus(status);
  }

  void EndWrite(bool ok = true) {
    ASSERT_TRUE(writing);
    writing = false;
    OnWriteDone(ok);
  }

  bool writing = false;
  bool may_wait = false;  // The last one, for more to go along with it.
  std::vector<std::string> written;
  absl::optional<absl::Status> finished;
};

using Reactor = StreamReactor<std::string, std::string, FakeCall>;

class StreamReactorTest : public ::testing::Test {
 protected:
  Reactor* const reactor_ = new Reactor([](const std::string& message) { return message; }, [this] { ++cancels_; });
  const std::shared_ptr<Reactor::Stream> stream_ = reactor_->stream();
  int cancels_ = 0;
};

TEST_F(StreamReactorTest, MessagesGoOutOneByOneAndThenTheEnd) {
  stream_->Send("a");
  stream_->Send("b");
  stream_->Close(absl::OkStatus());
  EXPECT_THAT(reactor_->written, ElementsAre("a"));
  EXPECT_EQ(stream_->queued(), 2u);
  reactor_->EndWrite();
  EXPECT_EQ(stream_->queued(), 1u);
  EXPECT_FALSE(reactor_->finished.has_value());
  reactor_->EndWrite();
  EXPECT_THAT(reactor_->written, ElementsAre("a", "b"));
  ASSERT_TRUE(reactor_->finished.has_value());
  EXPECT_THAT(*reactor_->finished, IsOk());
  reactor_->OnDone();
}

TEST_F(StreamReactorTest, AMessageWaitsForNoneThatIsNotThere) {
  stream_->Send("a");
  EXPECT_FALSE(reactor_->may_wait);
  for (const char* message : {"b", "c"}) stream_->Send(message);
  reactor_->EndWrite();
  EXPECT_TRUE(reactor_->may_wait) << "c comes right behind it";
  reactor_->EndWrite();
  EXPECT_FALSE(reactor_->may_wait);
  reactor_->EndWrite();
  EXPECT_THAT(reactor_->written, ElementsAre("a", "b", "c"));
  stream_->Close(absl::OkStatus());
  reactor_->OnDone();
}

TEST_F(StreamReactorTest, AnErrorDoesNotWaitBehindMessages) {
  for (const char* message : {"a", "b", "c"}) stream_->Send(message);
  stream_->Close(absl::UnavailableError("the pipeline is gone"));
  stream_->Close(absl::OkStatus());  // The first end counts.
  stream_->Send("d");
  reactor_->EndWrite();
  EXPECT_THAT(reactor_->written, ElementsAre("a"));
  ASSERT_TRUE(reactor_->finished.has_value());
  EXPECT_THAT(*reactor_->finished, StatusIs(absl::StatusCode::kUnavailable));
  reactor_->OnDone();
}

TEST_F(StreamReactorTest, RoomIsSaidWhenHalfIsGone) {
  int told = 0;
  stream_->OnRoom([&] { ++told; });
  EXPECT_EQ(told, 1) << "there is nothing to wait for";
  for (const char* message : {"a", "b", "c", "d"}) stream_->Send(message);
  stream_->OnRoom([&] { ++told; });
  reactor_->EndWrite();
  EXPECT_EQ(told, 1);
  reactor_->EndWrite();
  EXPECT_EQ(told, 2);
  reactor_->EndWrite();
  EXPECT_EQ(told, 2) << "once";
  reactor_->EndWrite();
  stream_->Close(absl::OkStatus());
  reactor_->OnDone();
}

TEST_F(StreamReactorTest, WhoWaitsForRoomHearsOfABrokenCall) {
  int told = 0;
  for (const char* message : {"a", "b", "c", "d"}) stream_->Send(message);
  stream_->OnRoom([&] { ++told; });
  reactor_->EndWrite(false);
  EXPECT_EQ(told, 1);
  EXPECT_EQ(stream_->queued(), 0u);
  stream_->Send("e");
  EXPECT_THAT(reactor_->written, ElementsAre("a"));
  reactor_->OnCancel();
  EXPECT_EQ(cancels_, 1);
  stream_->Close(absl::CancelledError("gone"));
  EXPECT_TRUE(reactor_->finished.has_value());
  reactor_->OnDone();
}

TEST_F(StreamReactorTest, TheStreamOutlivesItsCall) {
  int told = 0;
  stream_->Send("a");
  stream_->OnRoom([&] { ++told; });
  reactor_->OnDone();  // Deletes it.
  EXPECT_EQ(told, 1);
  stream_->Send("b");
  EXPECT_EQ(stream_->queued(), 1u) << "the write that was never done";
  stream_->OnRoom([&] { ++told; });
  EXPECT_EQ(told, 2);
  stream_->Close(absl::OkStatus());
}

}  // namespace
}  // namespace rwkv::router
