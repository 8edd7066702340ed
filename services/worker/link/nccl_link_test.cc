// Links over NCCL: rows from device to device, and what becomes of a pair whose other end is late, silent or gone.
#include "services/worker/link/nccl_link.h"

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/device.h"
#include "kernels/base/stream.h"
#include "kernels/cuda/testing/emulated_cuda.h"
#include "kernels/cuda/testing/fake_runtime.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/link.h"
#include "services/worker/link/nccl.h"
#include "services/worker/link/nccl_side.h"
#include "services/worker/link/testing/fake_nccl.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

// Runs both ends of a pair, each on its thread, from the join on.
void RunPair(Side& sender, Side& receiver, const std::function<void(DeviceRows&)>& send,
             const std::function<void(DeviceRows&)>& receive) {
  absl::StatusOr<std::string> id = sender.links->NewPairId();
  ASSERT_THAT(id, IsOk());
  const auto run = [&id](Side& side, bool sends, const std::function<void(DeviceRows&)>& body) {
    absl::StatusOr<std::unique_ptr<DeviceRows>> rows = side.links->Join(*id, sends, side.shape, side.stop);
    ASSERT_THAT(rows, IsOk());
    body(**rows);
    EXPECT_THAT((*rows)->End(), IsOk());
    EXPECT_TRUE(side.DoneSoon()) << "the stream does not go on";
  };
  std::thread other([&] { run(receiver, false, receive); });
  run(sender, true, send);
  other.join();
}

TEST_F(NcclLinkTest, RowsArriveInOrderAndWhole) {
  for (const bool eager : {false, true}) {
    kernels::cuda::SetEager(eager);
    Side sender("a"), receiver("b");
    absl::Notification checked;  // Until then the sender stays: an end that left is an error of the pair.
    RunPair(
        sender, receiver,
        [&](DeviceRows& rows) {
          for (uint64_t step = 1; step <= 30; ++step) {
            sender.Fill(step);
            ASSERT_THAT(sender.Move(rows, 1 + step % 8), IsOk());
            ASSERT_TRUE(sender.DoneSoon());
          }
          checked.WaitForNotificationWithTimeout(absl::Seconds(60));
        },
        [&](DeviceRows& rows) {
          for (uint64_t step = 1; step <= 30; ++step) {
            receiver.Fill(1000);
            ASSERT_THAT(receiver.Move(rows, 1 + step % 8), IsOk());
            ASSERT_TRUE(receiver.DoneSoon());
            const int64_t x = (1 + step % 8) * kShape.width;
            EXPECT_EQ(receiver.x.data()[0], static_cast<float>(step * 100) + 0.1f);
            EXPECT_EQ(receiver.x.data()[x - 1], static_cast<float>(step * 100 + x - 1) + 0.1f);
            if (x < receiver.x.size()) EXPECT_EQ(receiver.x.data()[x], static_cast<float>(100'000 + x) + 0.1f);
            const int64_t v = (1 + step % 8) * kShape.v_first_width;
            EXPECT_EQ(receiver.v_first.data()[0], -static_cast<float>(step) / 3);
            EXPECT_EQ(receiver.v_first.data()[v - 1], -static_cast<float>(step + v - 1) / 3);
            if (v < receiver.v_first.size()) {
              EXPECT_EQ(receiver.v_first.data()[v], -static_cast<float>(1000 + v) / 3);
            }
            EXPECT_THAT(rows.Check(), IsOk());
          }
          checked.Notify();
        });
  }
  kernels::cuda::SetEager(false);
  EXPECT_EQ(nccl::TransfersOfFake(), 2 * 2 * 30) << "x and v_first are one group";
}

// What the stream is given behind a transfer finds it done, without the host in between.
TEST_F(NcclLinkTest, StepsFollowEachOtherInTheStream) {
  Side sender("a"), receiver("b");
  kernels::DeviceArray<float> pinned =
      *kernels::DeviceArray<float>::Create(*receiver.device, 4 * kShape.width, kernels::MemoryKind::kPinned);
  constexpr int64_t kRowBytes = kShape.width * sizeof(float);
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        sender.Fill(1);
        for (int i = 0; i < 4; ++i) {
          ASSERT_THAT(sender.Move(rows, 1), IsOk());
          ASSERT_THAT(sender.stream->Zero(sender.x.data(), (i + 1) * static_cast<int64_t>(sizeof(float))), IsOk());
        }
        ASSERT_TRUE(sender.DoneSoon());
      },
      [&](DeviceRows& rows) {
        for (int i = 0; i < 4; ++i) {
          ASSERT_THAT(receiver.Move(rows, 1), IsOk());
          ASSERT_THAT(receiver.stream->Copy(pinned.data() + i * kShape.width, receiver.x.data(), kRowBytes), IsOk());
        }
        ASSERT_THAT(receiver.stream->Record(*receiver.done), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
      });
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      EXPECT_EQ(pinned.data()[i * kShape.width + j], j < i ? 0.0f : static_cast<float>(100 + j) + 0.1f) << i << j;
    }
  }
}

TEST_F(NcclLinkTest, AModelWithoutFirstValuesHasOneTransfer) {
  const LinkShape shape = {3, 0, 8};
  Side sender("a", shape), receiver("b", shape);
  sender.Fill(2);
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        ASSERT_THAT(sender.Move(rows, 2), IsOk());
        ASSERT_TRUE(sender.DoneSoon());
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 2), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
      });
  EXPECT_EQ(receiver.x.data()[5], sender.x.data()[5]);
}

TEST_F(NcclLinkTest, ALibraryThatIsTooOldIsUnimplementedInWords) {
  const auto make = [](int version) {
    nccl::FakeFaults faults;
    faults.version = version;
    nccl::ResetFake(faults);
    return MakeNcclLinks(nccl::kFakeNccl, "a", [] { return absl::OkStatus(); }).status();
  };
  EXPECT_THAT(make(nccl::kOldestVersion), IsOk());
  EXPECT_THAT(make(nccl::kOldestVersion - 1),
              StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("version 21799 is older than 21800")));
}

TEST_F(NcclLinkTest, JoinEndsWhereNobodyComes) {
  Side side("a");
  NcclLimits limits;
  limits.init = absl::Milliseconds(50);
  const auto links = *MakeNcclLinks(
      nccl::kFakeNccl, "a", [] { return absl::OkStatus(); }, limits);
  EXPECT_THAT(links->Join(*links->NewPairId(), true, kShape, side.stop),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("did not come in 50ms")));
  EXPECT_THAT(links->Join("short", true, kShape, side.stop), StatusIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(NcclLinkTest, JoinEndsWhereTheLibraryNeverGetsReady) {
  nccl::FakeFaults faults;
  faults.never_ready = true;
  nccl::ResetFake(faults);
  Side side("a");
  const std::string id = *side.links->NewPairId();
  std::thread stopper([&side] { side.stop.Notify(); });
  EXPECT_THAT(side.links->Join(id, true, kShape, side.stop),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr("aborted")));
  stopper.join();
}

TEST_F(NcclLinkTest, AnEndThatSaysNothingIsLeftAndTheStreamGoesOn) {
  nccl::FakeFaults faults;
  faults.hang_at = 2;
  nccl::ResetFake(faults);
  Side sender("a"), receiver("b");
  std::atomic<bool> over = false;
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        ASSERT_THAT(sender.Move(rows, 1), IsOk());
        ASSERT_TRUE(sender.DoneSoon());
        ASSERT_THAT(sender.Move(rows, 1), IsOk());
        sender.DoneSoon([&] { return over.load(); });
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        const absl::Time until = absl::Now() + absl::Milliseconds(50);
        EXPECT_FALSE(receiver.DoneSoon([&] { return absl::Now() > until; }));
        EXPECT_THAT(rows.Check(), IsOk()) << "nobody knows";
        over = true;
      });
}

TEST_F(NcclLinkTest, AnEndThatAbortsIsToldToTheOther) {
  Side sender("a"), receiver("b");
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        ASSERT_THAT(sender.Move(rows, 1), IsOk());
        ASSERT_TRUE(sender.DoneSoon());
        EXPECT_THAT(rows.End(), IsOk());
        EXPECT_THAT(sender.Move(rows, 1), StatusIs(absl::StatusCode::kUnavailable)) << "and not NCCL's any more";
        EXPECT_THAT(rows.Check(), StatusIs(absl::StatusCode::kUnavailable));
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
        EXPECT_FALSE(receiver.DoneSoon() && receiver.Move(rows, 1).ok() &&
                     receiver.DoneSoon([&] { return !rows.Check().ok(); }));
        EXPECT_THAT(rows.Check(), StatusIs(absl::StatusCode::kUnavailable,
                                           AllOf(HasSubstr("NCCL: receiving: "), HasSubstr("remote process exited"))));
      });
}

TEST_F(NcclLinkTest, AMoveThatTheOtherEndTakesNoPartInEndsInWords) {
  for (const bool sends : {true, false}) {
    Side alone("a", kShape, nccl::kFakeNccl, absl::Milliseconds(50)), idle("b");
    absl::Notification over;
    const auto move = [&](DeviceRows& rows) {
      EXPECT_THAT(alone.Move(rows, 1), StatusIs(absl::StatusCode::kUnavailable,
                                                HasSubstr(absl::StrCat("NCCL: ", sends ? "send" : "receive",
                                                                       ": the other stage did not come in 50ms"))));
      over.Notify();
    };
    const auto wait = [&](DeviceRows&) { over.WaitForNotificationWithTimeout(absl::Seconds(20)); };
    sends ? RunPair(alone, idle, move, wait) : RunPair(idle, alone, wait, move);
  }
}

TEST_F(NcclLinkTest, ATransferThatNcclRefusesIsToldAndItsGroupEnded) {
  static bool refuse_one;  // A function of a table knows no test.
  refuse_one = false;
  nccl::Nccl library = nccl::kFakeNccl;
  library.send = [](const void* memory, size_t count, int type, int peer, nccl::Communicator communicator,
                    nccl::StreamHandle stream) {
    if (std::exchange(refuse_one, false)) return nccl::kInvalidUsage;
    return nccl::kFakeNccl.send(memory, count, type, peer, communicator, stream);
  };
  Side sender("a", kShape, library), receiver("b");
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        refuse_one = true;
        EXPECT_THAT(sender.Move(rows, 1), StatusIs(absl::StatusCode::kInternal, HasSubstr("NCCL: send: ")));
        EXPECT_THAT(sender.Move(rows, 1), IsOk()) << "nothing of the first is left";
        ASSERT_TRUE(sender.DoneSoon());
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
      });
  EXPECT_EQ(nccl::TransfersOfFake(), 2);
}

TEST_F(NcclLinkTest, WhatNcclHasNotDoneYetIsNoError) {
  static bool busy;
  busy = false;
  nccl::Nccl library = nccl::kFakeNccl;
  library.comm_get_async_error = [](nccl::Communicator communicator, nccl::Result* error) {
    const nccl::Result result = nccl::kFakeNccl.comm_get_async_error(communicator, error);
    if (busy) *error = nccl::kInProgress;
    return result;
  };
  Side sender("a", kShape, library), receiver("b");
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        busy = true;
        EXPECT_THAT(rows.Check(), IsOk());
        busy = false;
        ASSERT_THAT(sender.Move(rows, 1), IsOk());
        ASSERT_TRUE(sender.DoneSoon());
      },
      [&](DeviceRows& rows) {
        ASSERT_THAT(receiver.Move(rows, 1), IsOk());
        ASSERT_TRUE(receiver.DoneSoon());
      });
}

TEST_F(NcclLinkTest, AnErrorThatComesLaterIsTold) {
  nccl::FakeFaults faults;
  faults.fail_at = 0;
  nccl::ResetFake(faults);
  Side sender("a"), receiver("b");
  std::atomic<int> told = 0;
  const auto body = [&told](Side& side) {
    return [&side, &told](DeviceRows& rows) {
      // The other end may have heard of it, and gone, before this one's call.
      if (side.Move(rows, 1).ok()) EXPECT_FALSE(side.DoneSoon([&] { return !rows.Check().ok() || told > 0; }));
      if (!rows.Check().ok()) ++told;
    };
  };
  RunPair(sender, receiver, body(sender), body(receiver));
  EXPECT_GE(told, 1);
}

TEST_F(NcclLinkTest, AnAbortThatHangsIsToldSoThatTheProcessEnds) {
  Side sender("a"), receiver("b");
  absl::Notification over;
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        nccl::FakeFaults faults;
        faults.abort_hangs = true;
        nccl::ResetFake(faults);
        EXPECT_THAT(rows.End(), StatusIs(absl::StatusCode::kDeadlineExceeded, HasSubstr("abort of a communicator")));
        nccl::ResetFake();
        over.Notify();
      },
      [&](DeviceRows&) { over.WaitForNotificationWithTimeout(absl::Seconds(20)); });
  const absl::Time limit = absl::Now() + absl::Seconds(20);
  while (nccl::CommunicatorsOfFake() > 0 && absl::Now() < limit) std::this_thread::yield();
}

// A pipeline of three: the first pair fails and is made anew while the second stays as it is.
TEST_F(NcclLinkTest, APairIsMadeAnewWhileAnotherGoesOn) {
  Side first("a"), second("b"), sender("c"), receiver("d");
  const auto once = [](Side& side) {
    return [&side](DeviceRows& rows) {
      ASSERT_THAT(side.Move(rows, 1), IsOk());
      ASSERT_TRUE(side.DoneSoon());
    };
  };
  RunPair(
      sender, receiver,
      [&](DeviceRows& rows) {
        once(sender)(rows);
        RunPair(first, second, once(first), once(second));
        RunPair(first, second, once(first), once(second));
        once(sender)(rows);
      },
      [&](DeviceRows& rows) {
        once(receiver)(rows);
        once(receiver)(rows);
      });
  EXPECT_EQ(nccl::TransfersOfFake(), 8);
}

}  // namespace
}  // namespace rwkv::worker
