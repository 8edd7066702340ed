// The model a pipeline serves, as requests are checked against it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

struct ServingModel {
  v1::ModelInfo info;                               // With the tokenizer's name.
  const tokenizer::Tokenizer* tokenizer = nullptr;  // Null: token ids only. Not owned.
  std::string no_tokenizer;                         // Why it is null, for messages.
  std::vector<uint32_t> banned_token_ids;           // [begin, end) pairs: ids that mean nothing to the tokenizer.
  std::vector<v1::StateTensor> state_layout;        // Of a layer's record; set by who made the model.
};

// The model of `info` with the first of `tokenizers` that fits; with none it takes token ids only. A tokenizer fits a
// model with a row for each of its ids; the published ones fit the numbers of rows that models trained with them have,
// no other. `unusable`: why others could not be opened, for no_tokenizer.
ServingModel MakeServingModel(const v1::ModelInfo& info, const std::vector<const tokenizer::Tokenizer*>& tokenizers,
                              const std::vector<std::string>& unusable = {});

}  // namespace rwkv::router
