#include "services/router/core/answer.h"

#include <algorithm>
#include <utility>

namespace rwkv::router {

Answer::Answer(const tokenizer::Tokenizer* tokenizer, const v1::TurnSpec& spec)
    : max_tokens_(spec.max_tokens()),
      stop_token_ids_(spec.stop_token_ids().begin(), spec.stop_token_ids().end()),
      text_state_(tokenizer, std::vector<std::string>(spec.stop().begin(), spec.stop().end())) {
  if (tokenizer != nullptr && !spec.ignore_end_of_text()) {
    stop_token_ids_.push_back(tokenizer->end_of_text());
    std::sort(stop_token_ids_.begin(), stop_token_ids_.end());
  }
}

void Answer::Push(uint32_t token_id, float logprob, std::vector<v1::TokenLogprob> top_logprobs) {
  if (finished()) return;
  if (std::binary_search(stop_token_ids_.begin(), stop_token_ids_.end(), token_id)) {
    Finish(v1::FINISH_REASON_STOP_TOKEN, token_id, "");
    return;
  }
  while (tops_begin_ + tops_.size() < ids_.size()) tops_.emplace_back();
  tops_.push_back(std::move(top_logprobs));
  Add(token_id, logprob);
}

void Answer::PushLogged(uint32_t token_id, float logprob) {
  if (finished()) return;
  Add(token_id, logprob);
  Sent(size());
}

void Answer::Add(uint32_t token_id, float logprob) {
  AnswerText::Piece piece = text_state_.Push(token_id);
  ids_.push_back(token_id);
  logprobs_.push_back(logprob);
  text_ += piece.text;
  if (piece.stop.has_value()) {
    reason_ = v1::FINISH_REASON_STOP_STRING;
    stop_string_ = text_state_.stop_string(*piece.stop);
  } else if (ids_.size() >= max_tokens_) {
    reason_ = v1::FINISH_REASON_LENGTH;
    text_ += text_state_.Finish();
  }
  text_end_.push_back(text_.size());
}

void Answer::Finish(v1::FinishReason reason, absl::optional<uint32_t> stop_token_id, absl::string_view stop_string) {
  if (finished()) return;
  reason_ = reason;
  stop_token_id_ = stop_token_id;
  stop_string_ = std::string(stop_string);
  last_text_ = text_state_.Finish();
}

v1::GenerateResponse Answer::Message(size_t i) const {
  v1::GenerateResponse message;
  message.set_index(i);
  message.set_token_id(ids_[i]);
  message.set_logprob(logprobs_[i]);
  const uint64_t begin = i == 0 ? 0 : text_end_[i - 1];
  message.set_text(text_.substr(begin, text_end_[i] - begin));
  if (i >= tops_begin_ && i - tops_begin_ < tops_.size()) {
    for (const v1::TokenLogprob& top : tops_[i - tops_begin_]) *message.add_top_logprobs() = top;
  }
  return message;
}

void Answer::Sent(size_t i) {
  while (tops_begin_ < i && !tops_.empty()) {
    tops_.pop_front();
    ++tops_begin_;
  }
  if (tops_.empty()) tops_begin_ = std::max(tops_begin_, std::min(i, size()));
}

}  // namespace rwkv::router
