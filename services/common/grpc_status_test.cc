#include "services/common/grpc_status.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "gmock/gmock.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "grpcpp/support/status.h"
#include "gtest/gtest.h"
#include "rwkv/v1/common.pb.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::common {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::EndsWith;

TEST(GrpcStatusTest, EveryCodeComesBackTheSame) {
  for (int code = 1; code <= 16; ++code) {
    const absl::Status status(static_cast<absl::StatusCode>(code), "what happened");
    const grpc::Status on_the_wire = ToGrpcStatus(status);
    EXPECT_EQ(on_the_wire.error_code(), code);
    EXPECT_EQ(FromGrpcStatus(on_the_wire), status) << status;
    EXPECT_EQ(FromStatusProto(ToStatusProto(status)), status) << status;
  }
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_THAT(FromGrpcStatus(grpc::Status::OK), IsOk());
  EXPECT_THAT(FromStatusProto(ToStatusProto(absl::OkStatus())), IsOk());
}

TEST(GrpcStatusTest, UnknownCodesBecomeUnknown) {
  // As large as the enum's bits hold; a larger value would be undefined in gRPC's own code.
  EXPECT_THAT(FromGrpcStatus(grpc::Status(static_cast<grpc::StatusCode>(31), "odd")),
              StatusIs(absl::StatusCode::kUnknown, "odd"));
  v1::StatusProto proto;
  proto.set_code(-3);
  EXPECT_THAT(FromStatusProto(proto), StatusIs(absl::StatusCode::kUnknown));
}

TEST(GrpcStatusTest, StreamRemovedIsUnavailable) {
  EXPECT_THAT(FromGrpcStatus(grpc::Status(grpc::StatusCode::UNKNOWN, "Stream removed")),
              StatusIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(FromGrpcStatus(grpc::Status(grpc::StatusCode::UNKNOWN, "other")), StatusIs(absl::StatusCode::kUnknown));
}

TEST(GrpcStatusTest, MessageOfExactlyTheLimitIsWhole) {
  const std::string message(kMaxStatusMessageBytes, 'x');
  EXPECT_EQ(ToGrpcStatus(absl::InternalError(message)).error_message(), message);
}

TEST(GrpcStatusTest, LongMessageIsCutAtACharacter) {
  // Shift the three-byte characters so that every way of meeting the limit is tried.
  for (int shift = 0; shift < 3; ++shift) {
    std::string message(shift, 'x');
    while (message.size() < 2 * kMaxStatusMessageBytes) message += "\u6c34";
    const std::string cut = ToGrpcStatus(absl::InternalError(message)).error_message();
    EXPECT_LE(cut.size(), kMaxStatusMessageBytes);
    EXPECT_GT(cut.size(), kMaxStatusMessageBytes - 3);
    ASSERT_THAT(cut, EndsWith("..."));
    const std::string kept = cut.substr(0, cut.size() - 3);
    EXPECT_EQ(kept, message.substr(0, kept.size()));
    EXPECT_EQ((kept.size() - shift) % 3, 0) << "a character was split";
  }
}

TEST(GrpcStatusTest, InvalidUtf8BecomesQuestionMarks) {
  const std::vector<std::pair<std::string, std::string>> cases = {
      {"a\xff z", "a? z"},           // No first byte.
      {"\xc0\xaf", "??"},            // Overlong.
      {"\xe6\xb0", "??"},            // Ends inside.
      {"\xed\xa0\x80", "???"},       // Surrogate.
      {"\xf4\x90\x80\x80", "????"},  // Beyond U+10FFFF.
      {"\xf0\x9f\x98\x80", "\U0001F600"},
  };
  for (const auto& [in, out] : cases) {
    EXPECT_EQ(ToGrpcStatus(absl::InternalError(in)).error_message(), out);
    EXPECT_EQ(ToStatusProto(absl::InternalError(in)).message(), out);
  }
}

TEST(GrpcStatusTest, DetailsCrossTheWire) {
  const absl::Status status =
      WithErrorInfo(WithRetryInfo(absl::ResourceExhaustedError("busy"), absl::Milliseconds(1500)), "QUEUE_FULL",
                    {{"waiting", "256"}});
  const grpc::Status on_the_wire = ToGrpcStatus(status);
  google::rpc::Status rpc_status;
  ASSERT_TRUE(rpc_status.ParseFromString(on_the_wire.error_details()));
  EXPECT_EQ(rpc_status.code(), 8);
  EXPECT_EQ(rpc_status.message(), "busy");
  ASSERT_EQ(rpc_status.details_size(), 2);
  // By name, whichever came first: one error has one form.
  EXPECT_THAT(rpc_status.details(0).type_url(), EndsWith("ErrorInfo"));
  EXPECT_THAT(rpc_status.details(1).type_url(), EndsWith("RetryInfo"));

  const absl::Status back = FromGrpcStatus(on_the_wire);
  EXPECT_EQ(back, status);
  EXPECT_EQ(GetRetryDelay(back), absl::Milliseconds(1500));
  EXPECT_EQ(GetErrorReason(back), "QUEUE_FULL");
  EXPECT_EQ(GetInvalidField(back), absl::nullopt);
}

TEST(GrpcStatusTest, InvalidFieldIsNamed) {
  const absl::Status status = InvalidFieldError("sampling.top_p", "must be in (0, 1], is 2");
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kInvalidArgument, "sampling.top_p: must be in (0, 1], is 2"));
  const absl::Status back = FromGrpcStatus(ToGrpcStatus(status));
  EXPECT_EQ(GetInvalidField(back), "sampling.top_p");
  google::rpc::BadRequest detail;
  ASSERT_TRUE(detail.ParseFromString(std::string(*back.GetPayload("type.googleapis.com/google.rpc.BadRequest"))));
  ASSERT_EQ(detail.field_violations_size(), 1);
  EXPECT_EQ(detail.field_violations(0).description(), "must be in (0, 1], is 2");
}

TEST(GrpcStatusTest, PrivatePayloadsStayAtHome) {
  absl::Status status = absl::InternalError("x");
  status.SetPayload("example.com/private", absl::Cord("secret"));
  EXPECT_EQ(ToGrpcStatus(status).error_details(), "");
  const absl::Status mixed = WithRetryInfo(status, absl::Seconds(1));
  EXPECT_EQ(ToGrpcStatus(mixed).error_details().find("secret"), std::string::npos);
  EXPECT_EQ(GetRetryDelay(FromGrpcStatus(ToGrpcStatus(mixed))), absl::Seconds(1));
}

TEST(GrpcStatusTest, DetailsThatAreTooLargeAreLeftOut) {
  absl::Status status = WithErrorInfo(absl::InternalError("x"), "BIG", {{"k", std::string(900, 'v')}});
  google::rpc::DebugInfo debug;
  debug.set_detail(std::string(kMaxStatusDetailsBytes, 'd'));
  status.SetPayload("type.googleapis.com/google.rpc.DebugInfo", absl::Cord(debug.SerializeAsString()));
  const grpc::Status on_the_wire = ToGrpcStatus(status);
  EXPECT_LT(on_the_wire.error_details().size(), kMaxStatusMessageBytes + kMaxStatusDetailsBytes);
  EXPECT_EQ(GetErrorReason(FromGrpcStatus(on_the_wire)), "BIG");
}

TEST(GrpcStatusTest, GarbageDetailsAreDropped) {
  const absl::Status status = FromGrpcStatus(grpc::Status(grpc::StatusCode::ABORTED, "m", "\xff\xff\xff not a proto"));
  EXPECT_EQ(status, absl::AbortedError("m"));
  absl::Status odd = absl::AbortedError("m");
  odd.SetPayload("type.googleapis.com/google.rpc.RetryInfo", absl::Cord("\xff\xff\xff"));
  EXPECT_EQ(GetRetryDelay(odd), absl::nullopt);
}

TEST(GrpcStatusTest, RetryDelaysAreClamped) {
  EXPECT_EQ(GetRetryDelay(WithRetryInfo(absl::AbortedError(""), -absl::Seconds(5))), absl::ZeroDuration());
  EXPECT_EQ(GetRetryDelay(WithRetryInfo(absl::AbortedError(""), absl::InfiniteDuration())), absl::Hours(24));
  EXPECT_EQ(GetRetryDelay(WithRetryInfo(absl::AbortedError(""), absl::Nanoseconds(1000000001))),
            absl::Nanoseconds(1000000001));
}

TEST(GrpcStatusTest, AnnotateKeepsCodeAndDetails) {
  const absl::Status status = Annotate(WithRetryInfo(absl::AbortedError("moved"), absl::Seconds(2)), "session s1");
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kAborted, "session s1: moved"));
  EXPECT_EQ(GetRetryDelay(status), absl::Seconds(2));
}

TEST(GrpcStatusTest, OkStaysOk) {
  EXPECT_THAT(Annotate(absl::OkStatus(), "context"), IsOk());
  EXPECT_THAT(WithRetryInfo(absl::OkStatus(), absl::Seconds(1)), IsOk());
  EXPECT_THAT(WithErrorInfo(absl::OkStatus(), "X"), IsOk());
}

}  // namespace
}  // namespace rwkv::common
