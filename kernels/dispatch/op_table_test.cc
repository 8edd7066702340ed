#include "kernels/dispatch/op_table.h"

#include <set>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels {
namespace {

using ::rwkv::testing::IsOkAndHolds;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(OpTableTest, AutoChoosesTheFastest) {
  EXPECT_THAT(ChooseOpTable("auto"), IsOkAndHolds(AvailableOpTables().back()));
  EXPECT_NE(AvailableOpTables().back()->name, "reference");
}

TEST(OpTableTest, EveryAvailableTableIsFoundByItsNameAndIsWhole) {
  std::set<std::string> names;
  for (const OpTable* table : AvailableOpTables()) {
    EXPECT_THAT(ChooseOpTable(table->name), IsOkAndHolds(table));
    EXPECT_TRUE(names.insert(std::string(table->name)).second) << table->name;
    EXPECT_FALSE(table->numeric_family.empty()) << table->name;
    EXPECT_NE(table->embed, nullptr) << table->name;
    EXPECT_NE(table->layer_norm, nullptr) << table->name;
    EXPECT_NE(table->token_shift, nullptr) << table->name;
    EXPECT_NE(table->matmul, nullptr) << table->name;
    EXPECT_NE(table->group_norm, nullptr) << table->name;
    EXPECT_NE(table->wkv4, nullptr) << table->name;
    EXPECT_NE(table->wkv6, nullptr) << table->name;
    EXPECT_NE(table->wkv7_prepare, nullptr) << table->name;
    EXPECT_NE(table->wkv7, nullptr) << table->name;
    EXPECT_NE(table->wkv7_output, nullptr) << table->name;
    EXPECT_NE(table->deep_embed, nullptr) << table->name;
    EXPECT_NE(table->deep_embed_attention, nullptr) << table->name;
  }
  EXPECT_EQ(names.count("reference"), 1u);
  EXPECT_EQ(names.count("cpu/portable"), 1u);
}

TEST(OpTableTest, TableOfAnotherProcessorIsUnimplemented) {
  for (const char* name : {"cpu/avx2", "cpu/avx512"}) {
    bool available = false;
    for (const OpTable* table : AvailableOpTables()) available = available || table->name == name;
    if (!available) EXPECT_THAT(ChooseOpTable(name), StatusIs(absl::StatusCode::kUnimplemented, HasSubstr(name)));
  }
}

TEST(OpTableTest, UnknownNameIsInvalidAndTheMessageListsTheOthers) {
  EXPECT_THAT(ChooseOpTable("gpu/wish"),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       AllOf(HasSubstr("gpu/wish"), HasSubstr("auto, reference, cpu/portable, cpu/avx2, cpu/avx512"))));
  EXPECT_THAT(ChooseOpTable(""), StatusIs(absl::StatusCode::kInvalidArgument));
}

}  // namespace
}  // namespace rwkv::kernels
