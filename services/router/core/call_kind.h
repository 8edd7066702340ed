// What kinds of calls differ in: what each takes, what it asks of the workers, and how its client hears of it. The core
// knows this interface and no kind; the kinds are in call_kinds.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "rwkv/v1/worker.pb.h"
#include "services/router/core/response_stream.h"
#include "services/router/core/turn_options.h"

namespace rwkv::router {

struct Turn;

// Of one call, which owns it. Not thread-safe.
class CallKind {
 public:
  // What a sequence in a slot does next.
  struct Next {
    enum class What {
      kWait,
      kFeed,  // So many more tokens.
      kSave,
      kEnd,  // The call ends with this status, and leaves its slot.
    };
    Next(What what = What::kWait, uint64_t tokens = 0, absl::Status status = absl::OkStatus())
        : what(what), tokens(tokens), status(std::move(status)) {}
    What what;
    uint64_t tokens;
    absl::Status status;
  };

  // Whether the client takes a message more, with so many of them in its stream. The call of one that takes none for
  // too long ends after this.
  using HasRoom = std::function<bool(size_t queued)>;

  virtual ~CallKind() = default;

  // Tokens are drawn for it. With a session it is a turn in the word's narrow sense.
  virtual bool generates() const { return false; }
  // False: all it does is job().
  virtual bool takes_slot() const { return true; }
  // Its answer can pause, and its slot serve others meanwhile.
  virtual bool may_yield() const { return false; }
  // Of all that its session's log has: with that it is answered.
  virtual bool wants_snapshot() const { return false; }

  // The client waits for something.
  virtual bool IsOpen() const = 0;
  // Nothing comes any more; who waits for an answer gets this status instead. Any thread that has the call for itself.
  virtual void Close(const absl::Status& status) = 0;

  // Where the tokens of a call that generates go; null once closed.
  virtual ResponseStream<v1::GenerateResponse>* stream() { return nullptr; }

  // Of one without a slot: done while its session's lease is held. `deletes`: after it there is no such session.
  virtual ExclusiveJob job() const { return nullptr; }
  virtual bool deletes() const { return false; }

  // Not OK: a model with such states cannot answer it.
  virtual absl::Status CheckLayout(const std::vector<v1::StateTensor>& /*layout*/) const { return absl::OkStatus(); }

  // Up to where its tokens are fed as soon as it has a slot; what lies behind is Advance()'s.
  virtual uint64_t FeedAtOnce(const Turn& turn) const;
  // What the workers are to return of the tokens [position, end).
  virtual void Ask(const Turn& /*turn*/, uint64_t /*position*/, uint64_t /*end*/, v1::StepEntry* /*entry*/) const {}
  // What they returned; turn.done_end is where the slot has come to.
  virtual void OnResult(const Turn& /*turn*/, const v1::EntryResult& /*result*/) {}
  virtual void OnLogits(const Turn& /*turn*/, const v1::LogitsRows& /*rows*/) {}
  // Of a call that generates nothing. `idle`: all that it was fed has come back. Sends what there is to send.
  virtual Next Advance(const Turn& /*turn*/, bool /*idle*/, const HasRoom& /*has_room*/) { return {}; }
  // What came back is with the client, or can be sent at any time: it may give its slot away.
  virtual bool IsPassedOn(const Turn& /*turn*/) const { return true; }
  // It left its slot: what has not been passed on comes again.
  virtual void LeftSlot() {}

  // One that wants a snapshot. A save began for it, and is what it waits for until it leaves its slot; OnSnapshot: this
  // is its answer.
  virtual void OnSaveBegan(const std::string& /*snapshot_id*/) {}
  virtual bool AwaitsSave(const std::string& /*snapshot_id*/) const { return false; }
  virtual void OnSnapshot(const Turn& /*turn*/, v1::SnapshotManifest /*manifest*/) {}
};

}  // namespace rwkv::router
