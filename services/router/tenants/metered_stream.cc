#include "services/router/tenants/metered_stream.h"

namespace rwkv::router {

void MeteredStream::Send(v1::GenerateResponse response) {
  std::shared_ptr<TenantBook::Ticket> ticket;
  {
    absl::MutexLock lock(&mu_);
    ticket = ticket_;
    if (response.has_token_id()) drawn_ = true;
    if (response.has_finish()) {
      ticket_ = nullptr;
      recording_ = ticket != nullptr && !has_session_;
    }
  }
  if (ticket != nullptr && response.has_token_id()) ticket->Drawn(1);
  if (response.has_finish()) {
    response.mutable_finish()->set_session_id(caller_.Out(response.finish().session_id()));
    if (ticket != nullptr) ticket->Fed(response.finish().prompt_tokens());
    if (ticket != nullptr && !has_session_) {
      tenancy_->Record(ticket, [self = shared_from_this(), response = std::move(response)] {
        self->inner_->Send(response);
        absl::optional<absl::Status> close;
        {
          absl::MutexLock lock(&self->mu_);
          self->recording_ = false;
          close = self->close_;
        }
        if (close.has_value()) self->inner_->Close(*close);
      });
      return;
    }
  }
  inner_->Send(std::move(response));
}

void MeteredStream::Close(absl::Status status) {
  // First: whoever hears of the end may come again at once.
  if (place_ != nullptr) place_->Leave();
  status = caller_.Out(status);
  std::shared_ptr<TenantBook::Ticket> ticket;
  bool drawn = false;
  {
    absl::MutexLock lock(&mu_);
    std::swap(ticket, ticket_);
    drawn = drawn_;
    if (recording_) {
      close_ = std::move(status);
      return;
    }
  }
  if (ticket != nullptr && drawn) {  // Cut off. In a session the store knows what was fed; here nobody waits for it.
    ticket->Fed(prompt_tokens_);
    if (!has_session_) tenancy_->Record(ticket, [] {});
  } else if (ticket != nullptr) {
    ticket->Refund();
  }
  inner_->Close(std::move(status));
}

}  // namespace rwkv::router
