// A session in a .safetensors file, and back: services/checkpoint/session_state.h says what is in it.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

struct ExportedSession {
  uint64_t position = 0;
  bool has_log = false;
  uint64_t bytes = 0;  // Of the file.
};

// The state after the session's last token, and `with_log` its tokens, too, unless they are too many or not all known.
// kAborted: it went on meanwhile; nothing is written.
absl::StatusOr<ExportedSession> ExportSession(Context& context, const std::string& session_id, bool with_log,
                                              const std::string& path);

// Empty id: the router makes one.
absl::StatusOr<v1::Session> ImportSession(Context& context, const std::string& path, const std::string& session_id);

}  // namespace rwkv::rwkvctl
