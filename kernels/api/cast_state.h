// A wkv state between fp16, as some devices store it, and floats, as everybody else knows it. Such a device rounds a
// state to fp16 after every token (to nearest, ties to even; too large becomes infinity), so that neither where a prompt
// is cut nor saving and loading a state changes a bit.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/base/stream.h"

namespace rwkv::kernels {

struct CastStateArgs {
  int64_t count = 0;           // numbers, >= 1
  bool widens = false;         // From `narrow` to `wide`; else the other way round.
  float* wide = nullptr;       // [count], perhaps pinned
  uint16_t* narrow = nullptr;  // [count], fp16
};

// kInvalidArgument: size < 1, null or misaligned pointer (nothing is written then). Stateless and thread-safe, but for
// the stream.
using CastStateOp = absl::Status(const CastStateArgs& args, Stream& stream);

// The part of the contract that every backend checks before it computes.
absl::Status Validate(const CastStateArgs& args);

}  // namespace rwkv::kernels
