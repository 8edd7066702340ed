#include "services/common/call_metrics.h"

#include <array>
#include <string>

#include "absl/strings/string_view.h"

namespace rwkv::common {
namespace {

constexpr std::array<const char*, 17> kCodes = {
    "OK",       "Canceled",       "Unknown",          "InvalidArgument",   "DeadlineExceeded",
    "NotFound", "AlreadyExists",  "PermissionDenied", "ResourceExhausted", "FailedPrecondition",
    "Aborted",  "OutOfRange",     "Unimplemented",    "Internal",          "Unavailable",
    "DataLoss", "Unauthenticated"};

class Counted final : public grpc::experimental::Interceptor {
 public:
  Counted(Metrics* metrics, absl::string_view method) : metrics_(metrics), method_(method) {}

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::PRE_SEND_STATUS)) {
      const auto code = static_cast<size_t>(methods->GetSendStatus().error_code());
      const size_t slash = method_.rfind('/');  // "/rwkv.v1.Generation/Generate"
      if (slash != 0 && slash != absl::string_view::npos) {
        metrics_
            ->Counter("grpc_server_handled_total", "Calls that were answered.",
                      {{"grpc_service", std::string(method_.substr(1, slash - 1))},
                       {"grpc_method", std::string(method_.substr(slash + 1))},
                       {"grpc_code", code < kCodes.size() ? kCodes[code] : "Unknown"}})
            .Increment();
      }
    }
    methods->Proceed();
  }

 private:
  Metrics* const metrics_;
  const absl::string_view method_;  // Of the server's own table.
};

}  // namespace

grpc::experimental::Interceptor* CallMetrics::CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) {
  return new Counted(metrics_, info->method());
}

}  // namespace rwkv::common
