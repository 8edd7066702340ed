#include "services/rwkvctl/sessions_command.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/types/optional.h"
#include "rwkv/v1/sessions.pb.h"
#include "services/rwkvctl/json.h"
#include "services/rwkvctl/session_file.h"
#include "services/rwkvctl/table.h"

namespace rwkv::rwkvctl {
namespace {

constexpr uint32_t kTokensPerCall = 8192;  // Of 128 bytes at most, so that their text stays within 1 MiB, too.

class SessionsCommand : public Command {
 public:
  absl::string_view name() const override { return "sessions"; }
  absl::string_view arguments() const override {
    return "create|list|show|fork|rewind|delete|export|import [ID] [...]";
  }
  absl::string_view summary() const override {
    return "creates, lists, shows, forks, rewinds, deletes, exports and imports sessions";
  }
  absl::string_view details() const override {
    return "  create [ID]               a new session; prints its id. --initial-state: see status for what there is\n"
           "  list                      all sessions\n"
           "  show ID                   one session; with --log also its tokens, with --text their text\n"
           "  fork ID [POSITION]        a new session with its first tokens (default: all); prints its id;\n"
           "                            --new-session names it\n"
           "  rewind ID POSITION        drops all tokens after the first POSITION\n"
           "  delete ID...              deletes sessions\n"
           "  export ID FILE            writes the session to a .safetensors file: its state, and its tokens if they "
           "are at\n"
           "                            most 524,288\n"
           "  import FILE               a new session from such a file, or with a tuned state (.pth or .safetensors "
           "of\n"
           "                            blocks.N.att.time_state); prints its id; --session names it\n"
           "ID may also be given as --session ID, POSITION as --position N.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddString("session", "ID", "the session", [this](const std::string& value) {
      ids_.push_back(value);
      return absl::OkStatus();
    });
    flags.AddUint64("position", "with fork and rewind: tokens to keep", [this](uint64_t value) { position_ = value; });
    flags.AddString("new-session", "ID", "with fork: id of the new session", &new_id_);
    flags.AddString("initial-state", "NAME", "with create: the tuned state to begin with (default: the model's own)",
                    &initial_state_);
    flags.AddBool("log", "with show: also the token ids", &log_);
    flags.AddBool("text", "with show: also the text", &text_);
    flags.AddBool("json", "JSON", &json_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    constexpr absl::string_view kVerbs = "create, list, show, fork, rewind, delete, export or import";
    if (positional.empty()) return absl::InvalidArgumentError(absl::StrCat("what to do is missing: ", kVerbs));
    verb_ = positional[0];
    size_t most_ids = 1;
    size_t least_ids = 1;
    bool takes_position = false;
    const bool takes_file = verb_ == "export" || verb_ == "import";
    if (verb_ == "create") {
      least_ids = 0;
    } else if (verb_ == "import") {
      least_ids = 0;
    } else if (verb_ == "export") {
      least_ids = 1;
    } else if (verb_ == "list") {
      least_ids = most_ids = 0;
    } else if (verb_ == "delete") {
      most_ids = positional.size() + ids_.size();
    } else if (verb_ == "fork" || verb_ == "rewind") {
      takes_position = true;
    } else if (verb_ != "show") {
      return absl::InvalidArgumentError(absl::StrCat("\"", verb_, "\" is not ", kVerbs));
    }
    for (size_t i = 1; i < positional.size(); ++i) {
      if (ids_.size() < most_ids && verb_ != "import") {
        ids_.push_back(positional[i]);
      } else if (takes_file && path_.empty()) {
        path_ = positional[i];
      } else if (takes_position && !position_.has_value()) {
        absl::StatusOr<uint64_t> position = ParseUint64(positional[i]);
        if (!position.ok()) return absl::InvalidArgumentError(absl::StrCat("POSITION: ", position.status().message()));
        position_ = *position;
      } else {
        return absl::InvalidArgumentError(absl::StrCat(verb_, ": unexpected argument \"", positional[i], "\""));
      }
    }
    if (ids_.size() > most_ids) return absl::InvalidArgumentError(absl::StrCat(verb_, ": too many session ids"));
    if (ids_.size() < least_ids)
      return absl::InvalidArgumentError(absl::StrCat(verb_, ": the session's ID is missing"));
    for (const std::string& id : ids_) {
      if (id.empty()) return absl::InvalidArgumentError(absl::StrCat(verb_, ": the session's ID is empty"));
    }
    if (position_.has_value() && !takes_position) {
      return absl::InvalidArgumentError(absl::StrCat(verb_, " takes no --position"));
    }
    if (takes_file && path_.empty()) return absl::InvalidArgumentError(absl::StrCat(verb_, ": FILE is missing"));
    if (verb_ == "rewind" && !position_.has_value()) return absl::InvalidArgumentError("rewind: POSITION is missing");
    if (!initial_state_.empty() && verb_ != "create") {
      return absl::InvalidArgumentError(absl::StrCat(verb_, " takes no --initial-state"));
    }
    if (!new_id_.empty() && verb_ != "fork") {
      return absl::InvalidArgumentError(absl::StrCat(verb_, " takes no --new-session"));
    }
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    if (verb_ == "create") return Create(context);
    if (verb_ == "list") return List(context);
    if (verb_ == "show") return Show(context);
    if (verb_ == "fork") return Fork(context);
    if (verb_ == "rewind") return Rewind(context);
    if (verb_ == "export") return Export(context);
    if (verb_ == "import") return Import(context);
    return Delete(context);
  }

 private:
  absl::Status Create(Context& context) const {
    v1::SessionsCreateRequest request;
    if (!ids_.empty()) request.set_session_id(ids_[0]);
    request.set_initial_state(initial_state_);
    return Print(context, context.client->CreateSession(request),
                 [](const v1::Session& session) { return session.id(); });
  }

  absl::Status Fork(Context& context) const {
    v1::SessionsForkRequest request;
    request.set_session_id(ids_[0]);
    if (position_.has_value()) request.set_position(*position_);
    request.set_new_session_id(new_id_);
    return Print(context, context.client->ForkSession(request),
                 [](const v1::Session& session) { return session.id(); });
  }

  absl::Status Rewind(Context& context) const {
    v1::SessionsRewindRequest request;
    request.set_session_id(ids_[0]);
    request.set_position(*position_);
    return Print(context, context.client->RewindSession(request), [](const v1::Session& session) {
      return absl::StrCat("rewound to ", session.token_count(), " tokens: session ", session.id());
    });
  }

  absl::Status Export(Context& context) const {
    absl::StatusOr<ExportedSession> exported = ExportSession(context, ids_[0], /*with_log=*/true, path_);
    if (!exported.ok()) return exported.status();
    if (json_) {
      context.out << DumpLine({{"session", ids_[0]},
                               {"file", path_},
                               {"bytes", exported->bytes},
                               {"position", exported->position},
                               {"has_log", exported->has_log}});
      return absl::OkStatus();
    }
    context.out << "exported session " << ids_[0] << " at position " << exported->position << " to " << path_ << ", "
                << exported->bytes << " bytes, " << (exported->has_log ? "with its tokens" : "without its tokens")
                << "\n";
    return absl::OkStatus();
  }

  absl::Status Import(Context& context) const {
    absl::StatusOr<v1::Session> session = ImportSession(context, path_, ids_.empty() ? "" : ids_[0]);
    if (session.ok() && session->has_base_position() && session->base_position() > 0) {
      context.err << "session " << session->id() << " cannot be forked or rewound to before position "
                  << session->base_position() << ": no log stands for the state there" << std::endl;
    }
    return Print(context, session, [](const v1::Session& imported) { return imported.id(); });
  }

  template <typename Describe>
  absl::Status Print(Context& context, const absl::StatusOr<v1::Session>& session, Describe describe) const {
    if (!session.ok()) return session.status();
    context.out << (json_ ? DumpLine(SessionToJson(*session)) : absl::StrCat(describe(*session), "\n"));
    return absl::OkStatus();
  }

  absl::Status List(Context& context) const {
    Json all = Json::array();
    std::vector<std::vector<std::string>> rows = {{"SESSION", "TOKENS", "UPDATED", "FORKED FROM"}};
    v1::SessionsListRequest request;
    do {
      absl::StatusOr<v1::SessionsListResponse> page = context.client->ListSessions(request);
      if (!page.ok()) return page.status();
      for (const v1::Session& session : page->sessions()) {
        all.push_back(SessionToJson(session));
        rows.push_back({session.id(), absl::StrCat(session.token_count()), FormatTimestamp(session.update_time()),
                        session.forked_from().empty()
                            ? ""
                            : absl::StrCat(session.forked_from(), " at ", session.fork_position())});
      }
      request.set_page_token(page->next_page_token());
    } while (!request.page_token().empty());
    context.out << (json_ ? DumpIndented(all) : FormatTable(rows));
    return absl::OkStatus();
  }

  absl::Status Show(Context& context) const {
    v1::SessionsGetRequest request;
    request.set_session_id(ids_[0]);
    if (log_ || text_) request.set_tokens_count(kTokensPerCall);
    v1::Session session;
    std::vector<uint32_t> tokens;
    std::string text;
    if (log_ || text_) {  // An imported session may not know its first tokens.
      v1::SessionsGetRequest first;
      first.set_session_id(ids_[0]);
      absl::StatusOr<v1::SessionsGetResponse> response = context.client->GetSession(first);
      if (!response.ok()) return response.status();
      request.set_tokens_begin(response->session().log_begin());
    }
    for (;;) {
      absl::StatusOr<v1::SessionsGetResponse> response = context.client->GetSession(request);
      if (!response.ok()) return response.status();
      session = std::move(*response->mutable_session());
      tokens.insert(tokens.end(), response->token_ids().begin(), response->token_ids().end());
      // A character across two calls would be cut; the bytes of all tokens together are not.
      if (text_ && response->token_ids_size() > 0) {
        v1::DetokenizeRequest detokenize;
        *detokenize.mutable_token_ids() = response->token_ids();
        absl::StatusOr<v1::DetokenizeResponse> bytes = context.client->Detokenize(detokenize);
        if (!bytes.ok()) return bytes.status();
        text += bytes->data();
      }
      request.set_tokens_begin(session.log_begin() + tokens.size());
      if (response->token_ids_size() == 0 || request.tokens_begin() >= session.token_count()) break;
    }
    Json json = SessionToJson(session);
    if (json_) {
      if (log_) json["token_ids"] = tokens;
      if (text_) json["text"] = text;
      context.out << DumpIndented(json);
      return absl::OkStatus();
    }
    for (const auto& [key, value] : json.items()) {
      context.out << key << ": " << (value.is_string() ? value.get<std::string>() : value.dump()) << "\n";
    }
    if (log_) context.out << "token_ids: " << absl::StrJoin(tokens, " ") << "\n";
    if (text_) context.out << "text:\n" << text << "\n";
    return absl::OkStatus();
  }

  absl::Status Delete(Context& context) const {
    for (const std::string& id : ids_) {
      v1::SessionsDeleteRequest request;
      request.set_session_id(id);
      if (absl::Status status = context.client->DeleteSession(request); !status.ok()) return status;
      if (json_) {
        context.out << DumpLine({{"deleted", id}});
      } else {
        context.out << "deleted session " << id << "\n";
      }
    }
    return absl::OkStatus();
  }

  std::string verb_;
  std::vector<std::string> ids_;
  absl::optional<uint64_t> position_;
  std::string new_id_;
  std::string path_;
  std::string initial_state_;
  bool log_ = false;
  bool text_ = false;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeSessionsCommand() { return std::make_unique<SessionsCommand>(); }

}  // namespace rwkv::rwkvctl
