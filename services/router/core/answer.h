// What a turn has generated: tokens, their text and log-probabilities, and how it ended.
#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "rwkv/v1/common.pb.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/turn_spec.pb.h"
#include "services/router/core/answer_text.h"
#include "services/tokenizer/tokenizer.h"

namespace rwkv::router {

// The same tokens give the same messages, whether they were just drawn or read from the log (top_logprobs alone are not
// in the log). Not thread-safe.
class Answer {
 public:
  // `tokenizer` may be null; it outlives this.
  Answer(const tokenizer::Tokenizer* tokenizer, const v1::TurnSpec& spec);

  // The next token as it was drawn. It may end the answer: see finished(). A stop token ends it and is not kept.
  // Ignored once finished.
  void Push(uint32_t token_id, float logprob, std::vector<v1::TokenLogprob> top_logprobs);
  // A token of this turn out of the log, which never holds stop tokens.
  void PushLogged(uint32_t token_id, float logprob);
  // Ends it for a reason that the tokens do not tell (a stop token of the log, an error).
  void Finish(v1::FinishReason reason, absl::optional<uint32_t> stop_token_id, absl::string_view stop_string);

  size_t size() const { return ids_.size(); }
  const std::vector<uint32_t>& ids() const { return ids_; }
  const std::vector<float>& logprobs() const { return logprobs_; }

  // Ascending.
  const std::vector<uint32_t>& stop_token_ids() const { return stop_token_ids_; }

  bool finished() const { return reason_ != v1::FINISH_REASON_UNSPECIFIED; }
  v1::FinishReason reason() const { return reason_; }
  absl::optional<uint32_t> stop_token_id() const { return stop_token_id_; }
  const std::string& stop_string() const { return stop_string_; }

  // The message of token i < size(). Text, once told, does not change.
  v1::GenerateResponse Message(size_t i) const;
  // The text that goes with the last message: what was held back when a stop token came.
  const std::string& last_text() const { return last_text_; }

  // Messages below i have been sent: their top_logprobs are not kept any longer.
  void Sent(size_t i);

 private:
  void Add(uint32_t token_id, float logprob);

  const uint32_t max_tokens_;
  std::vector<uint32_t> stop_token_ids_;  // Ascending.
  AnswerText text_state_;
  std::vector<uint32_t> ids_;
  std::vector<float> logprobs_;
  std::string text_;
  std::vector<uint64_t> text_end_;                  // Of each token's piece within text_.
  std::deque<std::vector<v1::TokenLogprob>> tops_;  // Of tokens [tops_begin_, size()).
  size_t tops_begin_ = 0;
  v1::FinishReason reason_ = v1::FINISH_REASON_UNSPECIFIED;
  absl::optional<uint32_t> stop_token_id_;
  std::string stop_string_;
  std::string last_text_;
};

}  // namespace rwkv::router
