// Group commit: the new tokens and ends of all turns go into the log together, one append at a time, until it is known
// what became of it. An append whose answer was lost is looked up in the log when the next attempt is refused.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/router/core/turn.h"
#include "services/router/core/world.h"
#include "services/state_store/client/state_store_client.h"

namespace rwkv::router {

// A call to the store that was not answered in time, or not at all: it may have changed something.
bool MayHaveHappened(const absl::Status& status);

// Part of the core: one thread at a time, no clock of its own.
class LogWriter {
 public:
  // What is committed of one turn.
  struct Item {
    uint64_t turn_id = 0;
    size_t tokens = 0;
    bool finish = false;
    absl::Status status;
  };

  struct Batch {
    v1::AppendTokensRequest request;
    std::vector<Item> items;            // As many as the request has.
    std::vector<uint64_t> turn_tokens;  // By item: those that were durable before.

    bool full() const;
    // What the turn has and the log has not. It has a session, whose lease this router holds.
    void Add(const Turn& turn);
  };

  // Each item's status says whether it is in the log; after an error nobody may take it for written.
  using Done = std::function<void(const std::vector<Item>& items, absl::Duration took)>;

  // Borrowed. `done` is called from World::Post's events.
  LogWriter(World* world, state_store::CatalogClient* catalog, Done done);

  bool busy() const { return commit_ != nullptr; }
  // Not while it is busy. After `deadline` no new attempt is made.
  void Begin(Batch batch, absl::Time deadline);
  // Makes the attempt that is due, if one is. `stopping`: it is the last.
  void Sweep(bool stopping);

 private:
  struct Commit {
    Batch batch;
    absl::Time begin;
    absl::Time deadline;
    int attempts = 0;      // That may have happened or not.
    bool running = false;  // One of them, now.
    absl::Time not_before;
    absl::Status status;  // Of the last attempt as a whole.
  };

  void Try();
  // Where it may wait.
  void Attempt(Commit& commit);
  absl::StatusOr<bool> WasAppended(const v1::AppendItem& item, uint64_t turn_tokens);
  void OnAttempt(const std::shared_ptr<Commit>& commit);

  World* const world_;
  state_store::CatalogClient* const catalog_;
  const Done done_;
  bool stopping_ = false;
  std::shared_ptr<Commit> commit_;  // On its way, or tried again soon.
};

}  // namespace rwkv::router
