#include "services/common/tracing/trace_context.h"

#include <string>

#include "gtest/gtest.h"

namespace rwkv::common {
namespace {

constexpr char kParent[] = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

TEST(TraceContextTest, WhatIsReadIsWrittenAgain) {
  const TraceContext context = ParseTraceParent(kParent, "vendor=abc");
  ASSERT_TRUE(context.valid());
  EXPECT_TRUE(context.sampled);
  EXPECT_EQ(context.trace_id.size(), 16);
  EXPECT_EQ(context.span_id, std::string("\0\xf0\x67\xaa\x0b\xa9\x02\xb7", 8));
  EXPECT_EQ(context.trace_state, "vendor=abc");
  EXPECT_EQ(FormatTraceParent(context), kParent);
}

TEST(TraceContextTest, ASpanThatNobodyWantsIsNotSampled) {
  const TraceContext context = ParseTraceParent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00");
  EXPECT_TRUE(context.valid());
  EXPECT_FALSE(context.sampled);
}

TEST(TraceContextTest, ALaterVersionMayHaveMore) {
  EXPECT_TRUE(ParseTraceParent("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03-more").valid());
  EXPECT_FALSE(ParseTraceParent("01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03more").valid());
}

TEST(TraceContextTest, WhatIsWrongIsNoContext) {
  for (const char* wrong : {"", "00", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0",
                            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-more",
                            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
                            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
                            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
                            "00-4bf92f3577b34da6a3ce929d0e0e473g-00f067aa0ba902b7-01",
                            "00_4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7_01"}) {
    EXPECT_FALSE(ParseTraceParent(wrong).valid()) << wrong;
  }
}

TEST(TraceContextTest, TooLongAStateIsDropped) {
  EXPECT_EQ(ParseTraceParent(kParent, std::string(513, 'a')).trace_state, "");
  EXPECT_EQ(ParseTraceParent(kParent, std::string(512, 'a')).trace_state.size(), 512);
}

}  // namespace
}  // namespace rwkv::common
