// rwkvctl chat: a conversation at the terminal, kept in a session.
#pragma once

#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "services/rwkvctl/command.h"

namespace rwkv::rwkvctl {

std::unique_ptr<Command> MakeChatCommand();

// What the user typed, made fit for the template, in which an empty line ends a message: CR LF becomes LF, empty lines
// and blanks at the ends go.
std::string CleanMessage(absl::string_view message);

// What to feed for `message`, given the end of the session's text so far: whatever is missing of "\n\nUser:", the
// message, and
// "\n\nAssistant:" without a blank (models are trained on tokens that begin with it).
std::string MakeTurn(absl::string_view session_end, absl::string_view message);

}  // namespace rwkv::rwkvctl
