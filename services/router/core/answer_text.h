// The text of a turn while its tokens come: whole characters only, ended by a stop string.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/optional.h"
#include "services/tokenizer/stop_matcher.h"
#include "services/tokenizer/stream_decoder.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

// The same tokens give the same pieces, so a turn can be told again from its log. Not thread-safe.
class AnswerText {
 public:
  // `tokenizer` may be null: then there is no text. It outlives this.
  AnswerText(const tokenizer::Tokenizer* tokenizer, std::vector<std::string> stops)
      : tokenizer_(tokenizer), matcher_(std::move(stops)) {}

  struct Piece {
    std::string text;             // Became printable with this token.
    absl::optional<size_t> stop;  // This token completed that stop string; the text ends before it.
  };
  Piece Push(uint32_t token_id) {
    Piece piece;
    if (tokenizer_ == nullptr) return piece;
    tokenizer::StopMatcher::Result result = matcher_.Push(decoder_.Push(tokenizer_->TokenBytes(token_id)));
    piece.text = std::move(result.text);
    piece.stop = result.stop;
    return piece;
  }

  // What was held back, when nothing more comes. Empty after a stop string.
  std::string Finish() {
    if (tokenizer_ == nullptr) return std::string();
    std::string text = matcher_.Push(decoder_.Finish()).text;
    text += matcher_.Finish();
    return text;
  }

  const std::string& stop_string(size_t i) const { return matcher_.stops()[i]; }

 private:
  const tokenizer::Tokenizer* tokenizer_;  // Not owned.
  tokenizer::StreamDecoder decoder_;
  tokenizer::StopMatcher matcher_;
};

}  // namespace rwkv::router
