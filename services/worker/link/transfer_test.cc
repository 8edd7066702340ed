#include "services/worker/link/transfer.h"

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/worker.pb.h"
#include "services/worker/link/device_links.h"
#include "services/worker/link/link.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::worker {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::HasSubstr;

constexpr LinkShape kShape = {3, 2, 8};

// Memory of frames.
class Rows {
 public:
  LinkFrame Frame(uint64_t step, int64_t rows) {
    LinkFrame frame;
    frame.header.step_id = step;
    frame.header.rows = rows;
    frame.x = x_.data();
    frame.v_first = v_first_.data();
    return frame;
  }

 private:
  std::vector<float> x_ = std::vector<float>(kShape.max_rows * kShape.width, 1.5f);
  std::vector<float> v_first_ = std::vector<float>(kShape.max_rows * kShape.v_first_width, -2.5f);
};

TEST(TransferTest, AHeaderComesOutAsItWentIn) {
  Rows memory;
  LinkFrame frame = memory.Frame(7, 2);
  frame.header.refused = {{1, absl::AbortedError("slot 1")}, {4, absl::InvalidArgumentError("slot 4")}};
  LinkHeader header = HeaderOf(FrameToProto("e", kShape, frame));
  EXPECT_EQ(header.step_id, 7u);
  EXPECT_EQ(header.rows, 2);
  ASSERT_EQ(header.refused.size(), 2u);
  EXPECT_EQ(header.refused[0].entry, 1);
  EXPECT_EQ(header.refused[1].entry, 4);
  EXPECT_EQ(header.refused[1].status, absl::InvalidArgumentError("slot 4"));
  EXPECT_FALSE(header.is_own());

  frame.header.own_step.add_entries()->set_sequence(9);
  frame.header.commands_before = 3;
  header = HeaderOf(FrameToProto("e", kShape, frame));
  ASSERT_TRUE(header.is_own());
  EXPECT_EQ(header.own_step.entries(0).sequence(), 9u);
  EXPECT_EQ(header.commands_before, 3u);
}

TEST(TransferTest, ATransferWhoseSizesAreWrongIsRefused) {
  Rows memory;
  const v1::TransferRequest good = FrameToProto("e", kShape, memory.Frame(3, 2));
  EXPECT_THAT(CheckTransfer(good, "e", kShape), IsOk());
  struct Row {
    const char* name;
    void (*spoil)(v1::TransferRequest&);
    const char* says;
  };
  const Row rows[] = {
      {"epoch", [](v1::TransferRequest& r) { r.set_epoch("f"); }, "epoch f in epoch e"},
      {"width", [](v1::TransferRequest& r) { r.set_width(4); }, "2 x 4"},
      {"rows", [](v1::TransferRequest& r) { r.set_rows(9); }, "9 x 3"},
      {"negative", [](v1::TransferRequest& r) { r.set_rows(-1); }, "-1 x 3"},
      {"x", [](v1::TransferRequest& r) { r.mutable_hidden()->pop_back(); }, "hidden has 23 bytes"},
      {"v_first", [](v1::TransferRequest& r) { r.mutable_v_first()->push_back('x'); }, "v_first has 17 bytes"},
      {"refusals", [](v1::TransferRequest& r) { r.add_refused_entries(1); }, "1 refused entries with 0 statuses"}};
  for (const Row& row : rows) {
    SCOPED_TRACE(row.name);
    v1::TransferRequest request = good;
    row.spoil(request);
    EXPECT_THAT(CheckTransfer(request, "e", kShape), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(row.says)));
  }
}

// Each part of it is larger than what the limit has to spare.
TEST(TransferTest, TheLargestFrameFitsTheMessageLimit) {
  constexpr LinkShape kLarge = {512, 256, 1024};
  std::vector<float> x(kLarge.max_rows * kLarge.width), v_first(kLarge.max_rows * kLarge.v_first_width);
  LinkFrame frame;
  frame.header.step_id = 1;
  frame.header.rows = kLarge.max_rows;
  frame.x = x.data();
  frame.v_first = v_first.data();
  const std::string long_message(2000, 'x');
  for (int i = 0; i < kLarge.max_rows; ++i) frame.header.refused.push_back({i, absl::AbortedError(long_message)});
  const auto bytes = static_cast<int64_t>(FrameToProto("an epoch", kLarge, frame).ByteSizeLong());
  EXPECT_LE(bytes, MaxTransferBytes(kLarge));
  EXPECT_GE(bytes + (512 << 10), MaxTransferBytes(kLarge)) << "a server need not take much more";
}

TEST(AgreeTest, BothStagesDecide) {
  class Links final : public DeviceLinks {
   public:
    absl::string_view kind() const override { return "nccl"; }
    int version() const override { return 22809; }
    std::string device() const override { return "cuda/1"; }
    absl::StatusOr<std::string> NewPairId() override { return "id"; }
    absl::StatusOr<std::unique_ptr<DeviceRows>> Join(const std::string&, bool, const LinkShape&,
                                                     const absl::Notification&) override {
      return absl::UnimplementedError("");
    }
  } links;
  v1::LinkOffer offer;
  offer.set_kind("nccl");
  offer.set_version(22809);
  offer.set_device("cuda/0");
  const LinkChoice choice = {LinkKind::kAuto, &links, ""};
  EXPECT_TRUE(Agree(offer, choice)->by_device);
  EXPECT_TRUE(Agree(offer, {LinkKind::kDevice, &links, ""})->by_device);

  struct Row {
    const char* name;
    std::function<void(v1::LinkOffer&, LinkChoice&)> change;
    const char* says;
  };
  for (const Row& row : std::vector<Row>{
           {"told here", [](v1::LinkOffer&, LinkChoice&c) { c.kind = LinkKind::kGrpc; }, "this stage shall use gRPC"},
           {"none here",
            [](v1::LinkOffer&, LinkChoice&c) {
              c = {LinkKind::kAuto, nullptr, "no GPU"};
            },
            "no GPU"},
           {"none there",
            [](v1::LinkOffer&o, LinkChoice&) {
              o.clear_kind();
              o.set_why_none("no library");
            },
            "the stage before: no library"},
           {"versions", [](v1::LinkOffer&o, LinkChoice&) { o.set_version(22805); }, "has nccl 22805, this one nccl"},
           {"kinds", [](v1::LinkOffer&o, LinkChoice&) { o.set_kind("other"); }, "has other"},
           {"one GPU", [](v1::LinkOffer&o, LinkChoice&) { o.set_device("cuda/1"); },
            "both stages compute on cuda/1"}}) {
    SCOPED_TRACE(row.name);
    v1::LinkOffer changed_offer = offer;
    LinkChoice changed = choice;
    row.change(changed_offer, changed);
    absl::StatusOr<LinkAgreement> agreement = Agree(changed_offer, changed);
    ASSERT_THAT(agreement, IsOk());
    EXPECT_FALSE(agreement->by_device);
    EXPECT_THAT(agreement->why_not, HasSubstr(row.says));
    changed_offer.set_required(true);
    EXPECT_THAT(Agree(changed_offer, changed), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(row.says)));
    if (changed.kind == LinkKind::kGrpc) continue;
    changed_offer.set_required(false);
    changed.kind = LinkKind::kDevice;
    EXPECT_THAT(Agree(changed_offer, changed), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr(row.says)));
  }
}

}  // namespace
}  // namespace rwkv::worker
