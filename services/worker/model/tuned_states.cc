#include "services/worker/model/tuned_states.h"

#include <algorithm>
#include <memory>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/fingerprint.h"
#include "services/checkpoint/formats/tensor_record.h"
#include "services/checkpoint/initial_state.h"

namespace rwkv::worker {
namespace {

using checkpoint::Quoted;

constexpr size_t kFingerprintDigits = 8;

bool IsName(absl::string_view name) {
  return !name.empty() && name.size() <= kMaxTunedStateNameBytes && std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(c) || c == '.' || c == '_' || c == '-';
  });
}

absl::Status LoadEntry(const std::string& entry, const checkpoint::ModelConfig& config, LayerRange layers,
                       std::set<std::string>* names, TunedStates* states) {
  const size_t equals = entry.find('=');
  if (equals == std::string::npos || equals + 1 == entry.size()) return absl::InvalidArgumentError("not NAME=FILE");
  const std::string name = entry.substr(0, equals);
  if (!IsName(name)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the name is not 1 to ", kMaxTunedStateNameBytes, " of A-Z a-z 0-9 . _ -"));
  }
  if (!names->insert(name).second) return absl::InvalidArgumentError("the name is given twice");
  RWKV_ASSIGN_OR_RETURN(const std::shared_ptr<const checkpoint::Checkpoint> file,
                        checkpoint::Checkpoint::Open(entry.substr(equals + 1)));
  RWKV_ASSIGN_OR_RETURN(TunedState state, checkpoint::LoadInitialStates(*file, config, layers.begin, layers.end));
  RWKV_ASSIGN_OR_RETURN(const std::string fingerprint, checkpoint::Fingerprint(*file));
  (*states)[absl::StrCat(name, "@", fingerprint.substr(0, kFingerprintDigits))] = std::move(state);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TunedStates> LoadTunedStates(absl::Span<const std::string> entries,
                                            const checkpoint::ModelConfig& config, LayerRange layers) {
  if (entries.size() > kMaxTunedStates) {
    return absl::InvalidArgumentError(absl::StrCat(entries.size(), " states; at most ", kMaxTunedStates));
  }
  std::set<std::string> names;
  TunedStates states;
  for (const std::string& entry : entries) {
    const absl::Status status = LoadEntry(entry, config, layers, &names, &states);
    if (!status.ok()) return absl::Status(status.code(), absl::StrCat(Quoted(entry), ": ", status.message()));
  }
  return states;
}

}  // namespace rwkv::worker
