// main() of every test that has none of its own.
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/test_limit.h"

int main(int argc, char** argv) {
  ::testing::InitGoogleMock(&argc, argv);
  rwkv::testing::LimitTests(rwkv::testing::TestSeconds());
  return RUN_ALL_TESTS();
}
