#include "services/rwkvctl/usage_command.h"

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "rwkv/v1/cluster.pb.h"
#include "services/rwkvctl/json.h"

namespace rwkv::rwkvctl {
namespace {

class UsageCommand : public Command {
 public:
  absl::string_view name() const override { return "usage"; }
  absl::string_view arguments() const override { return ""; }
  absl::string_view summary() const override { return "what a tenant has used, ever, and what it keeps"; }
  absl::string_view details() const override {
    return "Exact, also after processes died: all that clients were told has been generated is in it.\n";
  }

  void AddFlags(FlagSet& flags) override {
    flags.AddString("tenant", "NAME", "for operators: whose (default: the tenant of the API key or certificate)",
                    request_.mutable_tenant());
    flags.AddBool("json", "JSON, one line", &json_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    return positional.empty() ? absl::OkStatus() : absl::InvalidArgumentError("unexpected argument");
  }

  absl::Status Run(Context& context) override {
    const absl::StatusOr<v1::GetTenantUsageResponse> usage = context.client->GetTenantUsage(request_);
    if (!usage.ok()) return usage.status();
    if (json_) {
      context.out << DumpLine({{"tenant", usage->tenant()},
                               {"turns", usage->turns()},
                               {"prompt_tokens", usage->prompt_tokens()},
                               {"generated_tokens", usage->generated_tokens()},
                               {"sessions", usage->sessions()},
                               {"stored_bytes", usage->stored_bytes()}});
    } else {
      context.out << "tenant            " << usage->tenant() << "\nturns             " << usage->turns()
                  << "\nprompt tokens     " << usage->prompt_tokens() << "\ngenerated tokens  "
                  << usage->generated_tokens() << "\nsessions          " << usage->sessions() << "\nstored bytes      "
                  << usage->stored_bytes() << "\n";
    }
    return absl::OkStatus();
  }

 private:
  v1::GetTenantUsageRequest request_;
  bool json_ = false;
};

}  // namespace

std::unique_ptr<Command> MakeUsageCommand() { return std::make_unique<UsageCommand>(); }

}  // namespace rwkv::rwkvctl
