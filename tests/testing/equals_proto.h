// EXPECT_THAT(answer, EqualsProto(R"pb(code: 5 message: "gone")pb"));  or with a message instead of text.
#pragma once

#include <memory>
#include <ostream>
#include <string>
#include <utility>

#include "gmock/gmock.h"
#include "google/protobuf/message.h"
#include "google/protobuf/text_format.h"
#include "google/protobuf/util/message_differencer.h"

namespace testing {}

namespace rwkv::testing {

using namespace ::testing;  // So that testing::HasSubstr, said inside namespace rwkv, still means GoogleMock's.

// Equal field by field; unset and default differ only where the field tracks presence. A failure lists the differences.
class EqualsProtoMatcher {
 public:
  using is_gtest_matcher = void;

  explicit EqualsProtoMatcher(std::string text) : text_(std::move(text)) {}
  explicit EqualsProtoMatcher(const google::protobuf::Message& expected) {
    google::protobuf::TextFormat::PrintToString(expected, &text_);
  }

  bool MatchAndExplain(const google::protobuf::Message& actual, ::testing::MatchResultListener* listener) const {
    std::unique_ptr<google::protobuf::Message> expected(actual.New());
    if (!google::protobuf::TextFormat::ParseFromString(text_, expected.get())) {
      *listener << "where the expected text is no " << actual.GetTypeName();
      return false;
    }
    std::string differences;
    google::protobuf::util::MessageDifferencer differencer;
    differencer.ReportDifferencesToString(&differences);
    const bool equal = differencer.Compare(*expected, actual);
    if (!equal) *listener << "with these differences:\n" << differences;
    return equal;
  }
  void DescribeTo(std::ostream* os) const { *os << "equals {\n" << text_ << "}"; }
  void DescribeNegationTo(std::ostream* os) const { *os << "does not equal {\n" << text_ << "}"; }

 private:
  std::string text_;
};

inline EqualsProtoMatcher EqualsProto(const std::string& text) { return EqualsProtoMatcher(text); }
inline EqualsProtoMatcher EqualsProto(const char* text) { return EqualsProtoMatcher(std::string(text)); }
inline EqualsProtoMatcher EqualsProto(const google::protobuf::Message& expected) {
  return EqualsProtoMatcher(expected);
}

}  // namespace rwkv::testing
