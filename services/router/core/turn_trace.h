// What the core tells of a turn that is traced. The spans are made elsewhere: here is no clock.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "rwkv/v1/generation.pb.h"

namespace rwkv::router {

class TurnTrace {
 public:
  virtual ~TurnTrace() = default;

  // The turn is in this stage from now on; empty: in none. The same again changes nothing. One thread at a time.
  virtual void Enter(absl::string_view stage) = 0;

  // Whose children a worker's spans are: W3C traceparent and tracestate.
  virtual std::string trace_parent() const = 0;
  virtual std::string trace_state() const = 0;

  // Runs, on any thread, work whose calls to the store are children of the stage that the turn is in now.
  using Within = std::function<void(const std::function<void()>& work)>;
  virtual Within ForStore() const = 0;

  // What the client is told at the end.
  virtual void OnFinish(const v1::Finish& finish) = 0;
};

// `work`, with its calls to the store in the trace, if there is one.
template <typename Result>
std::function<Result()> Traced(const std::shared_ptr<TurnTrace>& trace, std::function<Result()> work) {
  if (trace == nullptr) return work;
  return [within = trace->ForStore(), work = std::move(work)] {
    absl::optional<Result> result;
    within([&] { result = work(); });
    return *std::move(result);
  };
}

}  // namespace rwkv::router
