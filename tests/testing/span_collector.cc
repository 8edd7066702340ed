#include "tests/testing/span_collector.h"

#include <chrono>

#include "absl/strings/str_cat.h"
#include "grpcpp/security/server_credentials.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/server_context.h"

namespace rwkv::testing {
namespace {

namespace otlp = opentelemetry::proto::collector::trace::v1;

std::string TextOf(const otlp::AnyValue& value) {
  switch (value.value_case()) {
    case otlp::AnyValue::kStringValue:
      return value.string_value();
    case otlp::AnyValue::kIntValue:
      return absl::StrCat(value.int_value());
    case otlp::AnyValue::kDoubleValue:
      return absl::StrCat(value.double_value());
    case otlp::AnyValue::kBoolValue:
      return value.bool_value() ? "true" : "false";
    case otlp::AnyValue::VALUE_NOT_SET:
      return "";
  }
  return "";
}

template <typename Attributes>
std::string Find(const Attributes& attributes, const std::string& key) {
  for (const otlp::KeyValue& attribute : attributes) {
    if (attribute.key() == key) return TextOf(attribute.value());
  }
  return "";
}

}  // namespace

std::string SpanCollector::Received::Attribute(const std::string& key) const { return Find(span.attributes(), key); }

SpanCollector::SpanCollector() {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
}

SpanCollector::~SpanCollector() {
  Hang(false);
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
}

void SpanCollector::Hang(bool hang) {
  absl::MutexLock lock(&mu_);
  hangs_ = hang;
}

int SpanCollector::calls() const {
  absl::MutexLock lock(&mu_);
  return calls_;
}

std::vector<SpanCollector::Received> SpanCollector::spans() const {
  absl::MutexLock lock(&mu_);
  return spans_;
}

bool SpanCollector::WaitUntil(const std::function<bool(const std::vector<Received>&)>& enough,
                              absl::Time deadline) const {
  const auto is_enough = [&] {
    mu_.AssertReaderHeld();
    return enough(spans_);
  };
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithDeadline(absl::Condition(&is_enough), deadline);
}

grpc::Status SpanCollector::Export(grpc::ServerContext* context, const otlp::ExportTraceServiceRequest* request,
                                   otlp::ExportTraceServiceResponse* /*response*/) {
  absl::MutexLock lock(&mu_);
  ++calls_;
  const auto goes_on = [&] {
    mu_.AssertReaderHeld();
    return !hangs_;
  };
  while (!mu_.AwaitWithTimeout(absl::Condition(&goes_on), absl::Milliseconds(10))) {
    if (context->IsCancelled()) return {grpc::StatusCode::CANCELLED, "the sender has given up"};
  }
  for (const otlp::ResourceSpans& resource : request->resource_spans()) {
    for (const otlp::ScopeSpans& scope : resource.scope_spans()) {
      for (const otlp::Span& span : scope.spans()) {
        spans_.push_back({Find(resource.resource().attributes(), "service.instance.id"),
                          Find(resource.resource().attributes(), "service.name"), span});
      }
    }
  }
  return grpc::Status::OK;
}

}  // namespace rwkv::testing
