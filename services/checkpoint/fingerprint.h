// Which model a checkpoint holds.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "services/checkpoint/checkpoint.h"

namespace rwkv::checkpoint {

// 32 lower-case hex digits: XXH3-128 over the tensors in order of name, each as name, element type, shape without unit
// dimensions, and content. Tensors above 1 MiB are sampled, so that a stage finds the fingerprint without reading other
// stages' weights: 16 windows of 4 KiB, evenly spaced, the first at the start and the last at the end.
// The same tensors in another container (.pth, safetensors) have the same fingerprint. It tells models apart; it is no
// proof against someone who makes two models collide on purpose, and no checksum of the parts it does not sample.
// kDataLoss: the file has been cut since it was opened.
absl::StatusOr<std::string> Fingerprint(const Checkpoint& checkpoint);

// The fingerprint of a model that is computed otherwise than usual: the same weights, but another function. `option`
// names what differs, with its value.
std::string FingerprintWith(absl::string_view fingerprint, absl::string_view option);

}  // namespace rwkv::checkpoint
