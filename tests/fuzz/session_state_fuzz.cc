// A file that is imported as the state of a session.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/session_state.h"

namespace rwkv::checkpoint {
namespace {

// As make_corpus writes them.
StateModel Model() {
  StateModel model;
  model.fingerprint = "f";
  model.layer_count = 2;
  model.vocab_size = 10;
  model.layout = {{"att.x_prev", {2}}, {"att.state", {1, 2, 2}}, {"ffn.x_prev", {2}}};
  return model;
}

void Check(const SessionState& state) {
  if (state.position() > kMaxSessionPosition) abort();
  if (!state.token_ids().empty() && state.token_ids().size() != state.position()) abort();
  for (const uint32_t id : state.token_ids()) {
    if (id >= 10) abort();
  }
  for (int layer = 0; layer < 2; ++layer) {
    const absl::StatusOr<std::string> record = state.Record(layer);
    if (!record.ok() || record->size() != 8 * sizeof(float)) abort();
    for (size_t at = 0; at < record->size(); at += sizeof(float)) {
      float value;
      std::memcpy(&value, record->data() + at, sizeof(value));
      if (!std::isfinite(value)) abort();
    }
  }
}

}  // namespace
}  // namespace rwkv::checkpoint

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int descriptor = memfd_create("input", MFD_CLOEXEC);
  if (descriptor < 0 || write(descriptor, data, size) != static_cast<ssize_t>(size)) abort();
  auto file = rwkv::checkpoint::MappedFile::OfDescriptor(descriptor, "input");
  if (!file.ok()) return 0;  // Empty.
  const auto state = rwkv::checkpoint::SessionState::Open(*std::move(file), rwkv::checkpoint::Model());
  if (state.ok()) rwkv::checkpoint::Check(**state);
  return 0;
}
