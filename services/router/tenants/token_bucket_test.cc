#include "services/router/tenants/token_bucket.h"

#include "absl/time/time.h"
#include "gtest/gtest.h"

namespace rwkv::router {
namespace {

const absl::Time kStart = absl::FromUnixSeconds(1'800'000'000);

TEST(TokenBucketTest, HoldsAMinutesWorthAndFillsSteadily) {
  TokenBucket bucket;
  bucket.SetRate(600, kStart);
  EXPECT_EQ(bucket.Wait(600, kStart), absl::ZeroDuration());
  bucket.Take(600, kStart);
  EXPECT_EQ(bucket.Wait(1, kStart), absl::Milliseconds(100));
  EXPECT_EQ(bucket.Wait(10, kStart + absl::Seconds(1)), absl::ZeroDuration());
  EXPECT_EQ(bucket.Wait(20, kStart + absl::Seconds(1)), absl::Seconds(1));
  EXPECT_EQ(bucket.Wait(600, kStart + absl::Hours(1)), absl::ZeroDuration());
  bucket.Take(600, kStart + absl::Hours(1));  // An hour fills no more than a minute does.
  EXPECT_GT(bucket.Wait(1, kStart + absl::Hours(1)), absl::ZeroDuration());
}

TEST(TokenBucketTest, MoreThanAMinutesWorthWantsAFullBucketAndLeavesADebt) {
  TokenBucket bucket;
  bucket.SetRate(60, kStart);
  EXPECT_EQ(bucket.Wait(240, kStart), absl::ZeroDuration());
  bucket.Take(240, kStart);
  EXPECT_EQ(bucket.Wait(1, kStart), absl::Seconds(181));
  EXPECT_EQ(bucket.Wait(240, kStart), absl::Minutes(4));
}

TEST(TokenBucketTest, WhatIsGivenBackIsThereAgainAndNoMore) {
  TokenBucket bucket;
  bucket.SetRate(60, kStart);
  bucket.Take(50, kStart);
  bucket.Take(-50, kStart);
  EXPECT_EQ(bucket.Wait(60, kStart), absl::ZeroDuration());
  bucket.Take(-1000, kStart);
  bucket.Take(60, kStart);
  EXPECT_GT(bucket.Wait(1, kStart), absl::ZeroDuration());
}

TEST(TokenBucketTest, AnotherRateLeavesItAsFullAsItWas) {
  TokenBucket bucket;
  bucket.SetRate(600, kStart);
  bucket.Take(300, kStart);
  bucket.SetRate(1200, kStart);
  EXPECT_EQ(bucket.Wait(600, kStart), absl::ZeroDuration());
  EXPECT_GT(bucket.Wait(601, kStart), absl::ZeroDuration());
  bucket.Take(600, kStart);
  bucket.SetRate(60, kStart);
  EXPECT_EQ(bucket.Wait(1, kStart), absl::Seconds(1));
  bucket.SetRate(0, kStart);
  EXPECT_EQ(bucket.Wait(1e9, kStart), absl::ZeroDuration());
  bucket.SetRate(60, kStart);
  EXPECT_EQ(bucket.Wait(60, kStart), absl::ZeroDuration());
}

TEST(TokenBucketTest, AClockThatIsSetBackFillsNothing) {
  TokenBucket bucket;
  bucket.SetRate(60, kStart);
  bucket.Take(60, kStart);
  EXPECT_EQ(bucket.Wait(1, kStart - absl::Hours(1)), absl::Seconds(1));
  EXPECT_EQ(bucket.Wait(1, kStart), absl::Seconds(1));
}

}  // namespace
}  // namespace rwkv::router
