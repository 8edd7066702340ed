#include "services/router/turns/serving_model.h"

#include <string>

namespace rwkv::router {
namespace {

constexpr int32_t kWorldEmbeddingRows = 65536;

}  // namespace

ServingModel MakeServingModel(const v1::ModelInfo& info, const tokenizer::Tokenizer* world) {
  ServingModel model;
  model.info = info;
  model.info.clear_tokenizer();
  if (world == nullptr || info.vocab_size() != kWorldEmbeddingRows) return model;
  model.tokenizer = world;
  model.info.set_tokenizer(std::string(world->name()));
  if (world->vocab_size() < static_cast<uint32_t>(info.vocab_size())) {
    model.banned_token_ids = {world->vocab_size(), static_cast<uint32_t>(info.vocab_size())};
  }
  return model;
}

}  // namespace rwkv::router
