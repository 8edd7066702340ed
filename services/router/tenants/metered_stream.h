// A Generate call's stream as its tenant sees it: tokens are counted as they go out, ids are its own, and without a
// session the last message waits until what it used is on disk.
#pragma once

#include <functional>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/core/response_stream.h"
#include "services/router/tenants/crowd.h"
#include "services/router/tenants/tenancy.h"

namespace rwkv::router {

class MeteredStream final : public ResponseStream<v1::GenerateResponse>,
                            public std::enable_shared_from_this<MeteredStream> {
 public:
  // `tenancy` outlives it. `place` and `ticket` may be null. `prompt_tokens`: of the input, as far as is known.
  MeteredStream(std::shared_ptr<ResponseStream<v1::GenerateResponse>> inner, Tenancy* tenancy, Caller caller,
                std::shared_ptr<Crowd::Place> place, std::shared_ptr<TenantBook::Ticket> ticket, bool has_session,
                uint64_t prompt_tokens)
      : inner_(std::move(inner)),
        tenancy_(tenancy),
        caller_(std::move(caller)),
        has_session_(has_session),
        prompt_tokens_(prompt_tokens),
        place_(std::move(place)),
        ticket_(std::move(ticket)) {}

  void Send(v1::GenerateResponse response) override;
  size_t queued() const override { return inner_->queued(); }
  void OnRoom(std::function<void()> on_room) override { inner_->OnRoom(std::move(on_room)); }
  void Close(absl::Status status) override;

 private:
  const std::shared_ptr<ResponseStream<v1::GenerateResponse>> inner_;
  Tenancy* const tenancy_;
  const Caller caller_;
  const bool has_session_;
  const uint64_t prompt_tokens_;
  const std::shared_ptr<Crowd::Place> place_;
  absl::Mutex mu_;
  std::shared_ptr<TenantBook::Ticket> ticket_ ABSL_GUARDED_BY(mu_);  // Null: nothing (more) is counted.
  bool drawn_ ABSL_GUARDED_BY(mu_) = false;
  bool recording_ ABSL_GUARDED_BY(mu_) = false;              // The last message waits,
  absl::optional<absl::Status> close_ ABSL_GUARDED_BY(mu_);  // and so does the end.
};

}  // namespace rwkv::router
