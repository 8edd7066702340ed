// The model a pipeline serves, as requests are checked against it.
#pragma once

#include <cstdint>
#include <vector>

#include "rwkv/v1/common.pb.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

struct ServingModel {
  v1::ModelInfo info;                               // With the tokenizer's name.
  const tokenizer::Tokenizer* tokenizer = nullptr;  // Null: token ids only. Not owned.
  std::vector<uint32_t> banned_token_ids;           // [begin, end) pairs: ids that mean nothing to the tokenizer.
};

// The model of `info` with `world` as its tokenizer, if that is given and fits (V is that of the World models).
ServingModel MakeServingModel(const v1::ModelInfo& info, const tokenizer::Tokenizer* world);

}  // namespace rwkv::router
