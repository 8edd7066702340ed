#include "services/router/core/serving_model.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"

namespace rwkv::router {
namespace {

// The tokenizers of published models, by their number of ids, and the rows of those models.
struct Published {
  absl::string_view name;
  uint32_t ids;
  uint32_t min_rows;
  uint32_t max_rows;
};
constexpr Published kPublished[] = {{"world", 65530, 65536, 65536}, {"neox", 50277, 50277, 50304}};

bool Fits(const tokenizer::Tokenizer& tokenizer, uint32_t rows) {
  for (const Published& published : kPublished) {
    if (tokenizer.name() != published.name || tokenizer.vocab_size() != published.ids) continue;
    return rows >= published.min_rows && rows <= published.max_rows;
  }
  return tokenizer.vocab_size() <= rows;
}

}  // namespace

ServingModel MakeServingModel(const v1::ModelInfo& info, const std::vector<const tokenizer::Tokenizer*>& tokenizers,
                              const std::vector<std::string>& unusable) {
  ServingModel model;
  model.no_tokenizer = absl::StrJoin(unusable, ", ");
  model.info = info;
  model.info.clear_tokenizer();
  const auto rows = static_cast<uint32_t>(info.vocab_size());
  for (const tokenizer::Tokenizer* const tokenizer : tokenizers) {
    if (!Fits(*tokenizer, rows)) {
      absl::StrAppend(&model.no_tokenizer, model.no_tokenizer.empty() ? "" : ", ", "\"", tokenizer->name(), "\" with ",
                      tokenizer->vocab_size(), " ids does not fit");
      continue;
    }
    model.no_tokenizer.clear();
    model.tokenizer = tokenizer;
    model.info.set_tokenizer(std::string(tokenizer->name()));
    if (tokenizer->vocab_size() < rows) model.banned_token_ids = {tokenizer->vocab_size(), rows};
    return model;
  }
  if (tokenizers.empty() && unusable.empty()) model.no_tokenizer = "the router was started without one";
  return model;
}

}  // namespace rwkv::router
