#include "services/checkpoint/matrix_names.h"

#include "gtest/gtest.h"

namespace rwkv::checkpoint {
namespace {

TEST(MatrixNamesTest, MatricesThatTokensAreMultipliedBy) {
  for (const char* name : {"head.weight", "blocks.0.att.key.weight", "blocks.31.att.output.weight",
                           "blocks.7.ffn.value.weight", "blocks.7.ffn.receptance.weight"}) {
    EXPECT_TRUE(IsMultipliedMatrix(name)) << name;
  }
}

TEST(MatrixNamesTest, NormsTablesAndVectorsAreNone) {
  for (const char* name : {"", "head", "head.bias", "emb.weight", "ln_out.weight", "blocks.0.ln1.weight",
                           "blocks.0.att.ln_x.weight", "blocks.0.att.x_k", "blocks.0.ffn.s_emb.weight",
                           "blocks.0.ffn.s_emb_x.weight", "blocks.0.attx.key.weight", "blocks.weight"}) {
    EXPECT_FALSE(IsMultipliedMatrix(name)) << name;
  }
}

}  // namespace
}  // namespace rwkv::checkpoint
