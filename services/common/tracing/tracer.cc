#include "services/common/tracing/tracer.h"

#include <algorithm>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "grpcpp/client_context.h"
#include "grpcpp/security/credentials.h"
#include "kernels/base/status_macros.h"
#include "services/common/address.h"
#include "services/common/channel.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"
#include "services/common/version.h"

namespace rwkv::common {
namespace {

namespace otlp = opentelemetry::proto::collector::trace::v1;

constexpr absl::Duration kRetryDelay = absl::Seconds(1);
constexpr size_t kMaxErrorBytes = 512;

std::string RandomId(size_t bytes) {
  thread_local absl::BitGen random;
  std::string id(bytes, '\0');
  do {
    for (char& c : id) c = static_cast<char>(absl::Uniform<int>(random, 0, 256));
  } while (id.find_first_not_of('\0') == std::string::npos);
  return id;
}

bool Drawn(double share) {
  thread_local absl::BitGen random;
  return share > 0 && absl::Uniform<double>(random, 0, 1) < share;
}

std::string Of(const grpc::ServerContextBase& context, const char* key) {
  const auto it = context.client_metadata().find(key);
  return it == context.client_metadata().end() ? "" : std::string(it->second.data(), it->second.size());
}

// Worth another try: who knows whether the collector just restarts.
bool MayPass(const grpc::Status& status) {
  switch (status.error_code()) {
    case grpc::StatusCode::CANCELLED:
    case grpc::StatusCode::DEADLINE_EXCEEDED:
    case grpc::StatusCode::ABORTED:
    case grpc::StatusCode::OUT_OF_RANGE:
    case grpc::StatusCode::UNAVAILABLE:
    case grpc::StatusCode::DATA_LOSS:
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return true;  // The list of the OTLP specification.
    default:
      return false;
  }
}

}  // namespace

Span::Span(Tracer* tracer, TraceContext context, Proto proto)
    : context_(std::move(context)), tracer_(tracer), proto_(std::move(proto)) {}

otlp::AnyValue* Span::Add(absl::string_view key) {
  otlp::KeyValue* const attribute = proto_.add_attributes();
  attribute->set_key(std::string(key));
  return attribute->mutable_value();
}

void Span::Set(absl::string_view key, absl::string_view value) {
  absl::MutexLock lock(&mu_);
  if (tracer_ != nullptr) Add(key)->set_string_value(std::string(value));
}

void Span::Set(absl::string_view key, int64_t value) {
  absl::MutexLock lock(&mu_);
  if (tracer_ != nullptr) Add(key)->set_int_value(value);
}

void Span::Set(absl::string_view key, double value) {
  absl::MutexLock lock(&mu_);
  if (tracer_ != nullptr) Add(key)->set_double_value(value);
}

void Span::SetError(absl::string_view message) {
  absl::MutexLock lock(&mu_);
  if (tracer_ == nullptr) return;
  proto_.mutable_status()->set_code(otlp::Status::STATUS_CODE_ERROR);
  proto_.mutable_status()->set_message(std::string(message.substr(0, kMaxErrorBytes)));
}

void Span::End(absl::Time time) {
  Proto proto;
  Tracer* tracer = nullptr;
  {
    absl::MutexLock lock(&mu_);
    tracer = std::exchange(tracer_, nullptr);
    if (tracer == nullptr) return;
    proto = std::move(proto_);
  }
  if (time == absl::InfinitePast()) time = absl::Now();
  proto.set_end_time_unix_nano(
      std::max<uint64_t>(static_cast<uint64_t>(absl::ToUnixNanos(time)), proto.start_time_unix_nano()));
  tracer->Record(std::move(proto));
}

// One call of a server.
class Tracer::Call final : public grpc::experimental::Interceptor {
 public:
  Call(Tracer* tracer, grpc::experimental::ServerRpcInfo* info, bool roots)
      : tracer_(tracer), context_(info->server_context()), method_(info->method()), roots_(roots) {}
  ~Call() override {
    if (span_ == nullptr) return;
    absl::MutexLock lock(&tracer_->calls_mu_);
    tracer_->calls_.erase(context_);
  }

  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using Point = grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(Point::POST_RECV_INITIAL_METADATA)) Begin();
    if (span_ != nullptr && methods->QueryInterceptionHookPoint(Point::PRE_SEND_STATUS)) {
      const grpc::Status status = methods->GetSendStatus();
      span_->Set("rpc.grpc.status_code", static_cast<int64_t>(status.error_code()));
      if (!status.ok()) span_->SetError(status.error_message());
      span_->End();
    }
    methods->Proceed();
  }

 private:
  void Begin() {
    const TraceContext parent = ParseTraceParent(Of(*context_, kTraceParentKey), Of(*context_, kTraceStateKey));
    if (!parent.valid() && !roots_) return;
    span_ = tracer_->Begin(absl::StripPrefix(method_, "/"), Span::kServer, parent);
    if (span_ == nullptr) return;
    span_->Set("rpc.system", "grpc");
    absl::MutexLock lock(&tracer_->calls_mu_);
    tracer_->calls_[context_] = span_;
  }

  Tracer* const tracer_;
  grpc::ServerContextBase* const context_;
  const absl::string_view method_;  // Of the server's own table.
  const bool roots_;
  std::shared_ptr<Span> span_;
};

class Tracer::Calls final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  Calls(Tracer* tracer, bool roots) : tracer_(tracer), roots_(roots) {}
  grpc::experimental::Interceptor* CreateServerInterceptor(grpc::experimental::ServerRpcInfo* info) override {
    const absl::string_view method = info->method();
    // Probes and questions of one process to another are no work for anybody.
    const bool ours = method.substr(0, 9) == "/rwkv.v1." && method.substr(0, 17) != "/rwkv.v1.Cluster/";
    return new Call(tracer_, info, roots_ && ours);
  }

 private:
  Tracer* const tracer_;
  const bool roots_;
};

absl::StatusOr<std::unique_ptr<Tracer>> Tracer::Create(const Options& options, Metrics* metrics) {
  if (!(options.sample >= 0 && options.sample <= 1)) {
    return absl::InvalidArgumentError(absl::StrCat("a share of traces of ", options.sample, " is not in [0, 1]"));
  }
  if (options.endpoint.empty()) return std::unique_ptr<Tracer>();
  absl::string_view address = options.endpoint;
  ChannelOptions to_collector;
  if (absl::ConsumePrefix(&address, "https://")) {
    to_collector.credentials = grpc::SslCredentials({});
  } else {
    absl::ConsumePrefix(&address, "http://");
  }
  absl::ConsumeSuffix(&address, "/");
  const absl::StatusOr<HostPort> host = ParseHostPort(address);
  RWKV_RETURN_IF_ERROR(Annotate(host.status(), "collector of traces"));
  std::unique_ptr<Tracer> tracer(new Tracer(options, metrics));
  tracer->stub_ = otlp::TraceService::NewStub(MakeChannel(FormatHostPort(*host), to_collector));
  tracer->thread_ = std::thread([tracer = tracer.get()] { tracer->Loop(); });
  LogInfo("tracing", {{"collector", options.endpoint}, {"sample", options.sample}});
  return tracer;
}

Tracer::Tracer(const Options& options, Metrics* metrics)
    : options_(options),
      exported_(metrics->Counter("rwkv_trace_spans_total", "Spans, by what became of them.", {{"result", "exported"}})),
      dropped_(metrics->Counter("rwkv_trace_spans_total", "Spans, by what became of them.", {{"result", "dropped"}})) {}

Tracer::~Tracer() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    stop_at_ = absl::Now() + options_.flush_timeout;
    mu_.AwaitWithDeadline(absl::Condition(this, &Tracer::Ended), stop_at_);
    if (sending_ != nullptr) sending_->TryCancel();
  }
  if (thread_.joinable()) thread_.join();
}

std::unique_ptr<Span> Tracer::Begin(absl::string_view name, Span::Proto::SpanKind kind, const TraceContext& parent) {
  if (parent.valid() ? !parent.sampled : !Drawn(options_.sample)) return nullptr;
  TraceContext context = parent;
  if (!parent.valid()) context.trace_id = RandomId(16);
  context.span_id = RandomId(8);
  context.sampled = true;
  Span::Proto proto;
  proto.set_trace_id(context.trace_id);
  proto.set_span_id(context.span_id);
  proto.set_parent_span_id(parent.span_id);
  proto.set_trace_state(context.trace_state);
  proto.set_flags(1);
  proto.set_name(std::string(name));
  proto.set_kind(kind);
  proto.set_start_time_unix_nano(static_cast<uint64_t>(absl::ToUnixNanos(absl::Now())));
  return std::unique_ptr<Span>(new Span(this, std::move(context), std::move(proto)));
}

std::shared_ptr<Span> Tracer::SpanOf(const grpc::ServerContextBase* context) {
  absl::MutexLock lock(&calls_mu_);
  const auto it = calls_.find(context);
  return it == calls_.end() ? nullptr : it->second;
}

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> Tracer::Interceptor(bool roots) {
  return std::make_unique<Calls>(this, roots);
}

TraceContext TraceOf(Tracer* tracer, const grpc::ServerContextBase& context) {
  const std::shared_ptr<Span> call = tracer == nullptr ? nullptr : tracer->SpanOf(&context);
  return call == nullptr ? TraceContext() : call->context();
}

void Tracer::Record(Span::Proto&& span) {
  {
    absl::MutexLock lock(&mu_);
    if (queue_.size() < options_.max_queued) {
      queue_.push_back(std::move(span));
      return;
    }
  }
  dropped_.Increment();
}

bool Tracer::Send(const otlp::ExportTraceServiceRequest& request, size_t spans) {
  grpc::ClientContext context;
  {
    absl::MutexLock lock(&mu_);
    const absl::Time deadline = std::min(absl::Now() + options_.export_timeout, stop_at_);
    context.set_deadline(absl::ToChronoTime(deadline));
    sending_ = &context;
  }
  otlp::ExportTraceServiceResponse response;
  const grpc::Status status = stub_->Export(&context, request, &response);
  {
    absl::MutexLock lock(&mu_);
    sending_ = nullptr;
  }
  if (!status.ok() && MayPass(status)) return false;
  const int64_t said = response.partial_success().rejected_spans();
  const auto rejected = static_cast<size_t>(std::clamp<int64_t>(said, 0, static_cast<int64_t>(spans)));
  const size_t exported = status.ok() ? spans - rejected : 0;
  exported_.Increment(static_cast<double>(exported));
  dropped_.Increment(static_cast<double>(spans - exported));
  return true;
}

void Tracer::Loop() {
  bool reached = true;
  for (;;) {
    std::vector<Span::Proto> batch;
    {
      absl::MutexLock lock(&mu_);
      mu_.AwaitWithTimeout(absl::Condition(this, &Tracer::Due), options_.interval);
      const size_t count = std::min(queue_.size(), options_.max_batch);
      if (stopping_ && (count == 0 || absl::Now() >= stop_at_)) {
        dropped_.Increment(static_cast<double>(queue_.size()));
        ended_ = true;
        return;
      }
      if (count == 0) continue;
      batch.assign(std::make_move_iterator(queue_.begin()), std::make_move_iterator(queue_.begin() + count));
      queue_.erase(queue_.begin(), queue_.begin() + static_cast<int64_t>(count));
    }
    otlp::ExportTraceServiceRequest request;
    otlp::ResourceSpans& spans = *request.add_resource_spans();
    const auto say = [&spans](const char* key, const std::string& value) {
      otlp::KeyValue& attribute = *spans.mutable_resource()->add_attributes();
      attribute.set_key(key);
      attribute.mutable_value()->set_string_value(value);
    };
    say("service.name", options_.service);
    say("service.instance.id", options_.process);
    say("service.version", kVersion);
    spans.add_scope_spans()->mutable_scope()->set_name("rwkv");
    for (Span::Proto& span : batch) *spans.mutable_scope_spans(0)->add_spans() = std::move(span);

    bool sent = false;
    for (int tries = 1; !sent; ++tries) {
      sent = Send(request, batch.size());
      absl::MutexLock lock(&mu_);
      if (sent || tries == options_.max_tries || stopping_) break;
      mu_.AwaitWithTimeout(absl::Condition(this, &Tracer::Stopping), kRetryDelay);
    }
    if (!sent) dropped_.Increment(static_cast<double>(batch.size()));
    if (sent != reached) {
      if (sent) {
        LogInfo("traces_go_on", {{"collector", options_.endpoint}});
      } else {
        LogWarning("traces_dropped", {{"collector", options_.endpoint}, {"spans", batch.size()}});
      }
      reached = sent;
    }
  }
}

}  // namespace rwkv::common
