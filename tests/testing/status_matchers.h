// GoogleTest matchers for absl::Status and absl::StatusOr, as Abseil 20240722 has them and ours does not.
//   EXPECT_THAT(Store(), IsOk());
//   EXPECT_THAT(Load(), IsOkAndHolds(SizeIs(3)));
//   EXPECT_THAT(Load(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("tiny.pth")));
#pragma once

#include <ostream>
#include <string>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace testing {}

namespace rwkv::testing {

using namespace ::testing;  // So that testing::HasSubstr, said inside namespace rwkv, still means GoogleMock's.

inline const absl::Status& GetStatus(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& GetStatus(const absl::StatusOr<T>& status_or) {
  return status_or.status();
}

MATCHER(IsOk, negation ? "is not OK" : "is OK") {
  const absl::Status& status = GetStatus(arg);
  if (!status.ok()) *result_listener << "whose status is " << status.ToString();
  return status.ok();
}

MATCHER_P2(StatusIs, code, message_matcher,
           "has status " + absl::StatusCodeToString(code) + " and a message that " +
               ::testing::DescribeMatcher<std::string>(message_matcher, negation)) {
  const absl::Status& status = GetStatus(arg);
  *result_listener << "whose status is " << status.ToString();
  return status.code() == code &&
         ::testing::ExplainMatchResult(message_matcher, std::string(status.message()), result_listener);
}

inline auto StatusIs(absl::StatusCode code) { return StatusIs(code, ::testing::_); }

template <typename ValueMatcher>
class IsOkAndHoldsMatcher {
 public:
  explicit IsOkAndHoldsMatcher(ValueMatcher value_matcher) : value_matcher_(std::move(value_matcher)) {}

  template <typename StatusOrType>
  operator ::testing::Matcher<StatusOrType>() const {  // NOLINT: implicit, as gMock's polymorphic matchers are
    return ::testing::Matcher<StatusOrType>(new Impl<StatusOrType>(value_matcher_));
  }

 private:
  template <typename StatusOrType>
  class Impl : public ::testing::MatcherInterface<StatusOrType> {
   public:
    using Value = typename std::decay_t<StatusOrType>::value_type;

    explicit Impl(const ValueMatcher& value_matcher)
        : value_matcher_(::testing::SafeMatcherCast<const Value&>(value_matcher)) {}

    bool MatchAndExplain(StatusOrType status_or, ::testing::MatchResultListener* listener) const override {
      if (!status_or.ok()) {
        *listener << "whose status is " << status_or.status().ToString();
        return false;
      }
      *listener << "which holds " << ::testing::PrintToString(*status_or) << " ";
      return value_matcher_.MatchAndExplain(*status_or, listener);
    }
    void DescribeTo(std::ostream* os) const override {
      *os << "is OK and holds a value that ";
      value_matcher_.DescribeTo(os);
    }
    void DescribeNegationTo(std::ostream* os) const override {
      *os << "is not OK or holds a value that ";
      value_matcher_.DescribeNegationTo(os);
    }

   private:
    const ::testing::Matcher<const Value&> value_matcher_;
  };

  const ValueMatcher value_matcher_;
};

template <typename ValueMatcher>
IsOkAndHoldsMatcher<std::decay_t<ValueMatcher>> IsOkAndHolds(ValueMatcher&& value_matcher) {
  return IsOkAndHoldsMatcher<std::decay_t<ValueMatcher>>(std::forward<ValueMatcher>(value_matcher));
}

}  // namespace rwkv::testing

// ASSERT_OK_AND_ASSIGN(std::unique_ptr<Store> store, Store::Create(options));
#define ASSERT_OK(expr) ASSERT_THAT(expr, ::rwkv::testing::IsOk())
#define EXPECT_OK(expr) EXPECT_THAT(expr, ::rwkv::testing::IsOk())
#define ASSERT_OK_AND_ASSIGN(lhs, expr) \
  RWKV_TESTING_ASSIGN_IMPL(RWKV_TESTING_CONCAT(rwkv_testing_or_, __LINE__), lhs, expr)
#define RWKV_TESTING_ASSIGN_IMPL(var, lhs, expr)                             \
  auto var = (expr);                                                         \
  ASSERT_TRUE(var.ok()) << #expr << " returned " << var.status().ToString(); \
  lhs = *std::move(var)
#define RWKV_TESTING_CONCAT(a, b) RWKV_TESTING_CONCAT_IMPL(a, b)
#define RWKV_TESTING_CONCAT_IMPL(a, b) a##b
