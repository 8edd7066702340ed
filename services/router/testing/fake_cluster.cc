#include "services/router/testing/fake_cluster.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"
#include "prometheus/metric_family.h"
#include "services/router/pipeline/fleet.h"
#include "services/router/pipeline/found_workers.h"
#include "services/state_store/client/state_store_client.h"
#include "services/worker/client/worker_client.h"
#include "tests/testing/wait_until.h"

namespace rwkv::router {
namespace {

std::atomic<bool> a_wait_was_too_long{false};

}  // namespace

absl::Duration WaitLimit() { return a_wait_was_too_long ? absl::Seconds(1) : kTestLimit; }

bool Waited(bool came) {
  if (!came) a_wait_was_too_long = true;
  return came;
}

bool WaitUntil(const std::function<bool()>& condition) { return Waited(testing::WaitUntil(condition, WaitLimit())); }

FakeTokenizer::FakeTokenizer() {
  words_.resize(65536);
  for (uint32_t id = 1; id < words_.size(); ++id) {
    if (id <= 256) {
      words_[id] = std::string(1, static_cast<char>(id - 1));
    } else {
      words_[id] = {static_cast<char>('a' + id % 26), static_cast<char>('a' + id / 26 % 26), ' '};
    }
  }
}

std::vector<uint32_t> FakeTokenizer::Encode(absl::string_view bytes) const {
  std::vector<uint32_t> ids;
  for (const absl::string_view text : absl::StrSplit(bytes, "<end>")) {
    const std::vector<uint32_t> plain = EncodePlain(text);
    ids.insert(ids.end(), plain.begin(), plain.end());
    if (text.end() != bytes.end()) ids.push_back(0);
  }
  return ids;
}

std::vector<uint32_t> FakeTokenizer::EncodePlain(absl::string_view bytes) const {
  std::vector<uint32_t> ids;
  for (const char byte : bytes) ids.push_back(static_cast<unsigned char>(byte) + 1u);
  return ids;
}

absl::string_view FakeTokenizer::TokenBytes(uint32_t id) const {
  return id < words_.size() ? absl::string_view(words_[id]) : absl::string_view();
}

FakeCluster::FakeCluster(worker::FakePipeline::Options pipeline, TurnManager::Options router, common::Clock* clock,
                         std::vector<worker::FakePipeline::Options> others)
    : clock_(clock == nullptr ? &system_clock_ : clock), router_options_(std::move(router)) {
  pipeline_options_.push_back(std::move(pipeline));
  for (worker::FakePipeline::Options& other : others) pipeline_options_.push_back(std::move(other));
  metrics_ = *common::Metrics::Create("");
  router_metrics_ = std::make_unique<RouterMetrics>(metrics_.get());
  store_ = *state_store::FakeStateStore::Create(clock_);
  for (worker::FakePipeline::Options& options : pipeline_options_) {
    options.put_record = [this](const v1::RecordInfo& info, const std::string& bytes) {
      {
        absl::MutexLock lock(&put_mu_);
        put_records_.push_back(info);
      }
      return store_->PutRecord(info, bytes, nullptr, absl::Now() + kTestLimit);
    };
    options.get_record = [this](const v1::RecordInfo& info) {
      return store_->GetRecord(info, absl::Now() + kTestLimit);
    };
    pipelines_.push_back(std::make_unique<worker::FakePipeline>(options));
  }
  if (router_options_.router.empty()) router_options_.router = "router-0";
  RestartRouter();
}

FakeCluster::~FakeCluster() { StopRouter(); }

void FakeCluster::StopRouter() { router_ = nullptr; }

std::unique_ptr<TurnManager> FakeCluster::MakeRouter(TurnManager::Options router_options) {
  router_options.incarnation = absl::StrCat("incarnation-", ++incarnation_);
  Fleet::Options options;
  options.lane.router = router_options.router;
  options.lane.incarnation = router_options.incarnation;
  options.min_backoff = absl::Milliseconds(1);
  options.max_backoff = absl::Milliseconds(20);
  options.ask_interval = absl::Milliseconds(50);
  options.worker_timeout = absl::Seconds(1);
  std::vector<std::unique_ptr<worker::WorkerClient>> workers;
  for (size_t i = 0; i < pipelines_.size(); ++i) {
    for (int stage = 0; stage < pipeline_options_[i].stage_count; ++stage) {
      workers.push_back(pipelines_[i]->Connect(stage));
    }
  }
  auto draws = std::make_shared<std::atomic<uint64_t>>(incarnation_ * 1000003ull);
  auto router =
      std::make_unique<TurnManager>(router_options, options, TheseWorkers(std::move(workers)), store_.get(),
                                    std::vector<const tokenizer::Tokenizer*>{&tokenizer_}, router_metrics_.get(),
                                    clock_, [draws] { return draws->fetch_add(0x9e3779b97f4a7c15); });
  router->Start();
  return router;
}

void FakeCluster::RestartRouter() {
  StopRouter();
  router_ = MakeRouter(router_options_);
  epoch_prefix_ = absl::StrCat(router_options_.router, "/incarnation-", incarnation_, "/");
  EXPECT_TRUE(WaitServing());
}

bool FakeCluster::WaitServing() {
  // The fleet knows of an epoch that has come or gone a little before the core does, and what comes in between is told
  // to come again.
  return WaitUntil([&] {
    for (const LaneState& lane : router_->Lanes(absl::Now() + kTestLimit)) {
      for (const auto& pipeline : pipelines_) {
        const auto said = pipeline->Connect(0)->Describe(absl::Now() + kTestLimit);
        if (said.ok() && said->epoch() == absl::StrCat(epoch_prefix_, lane.epoch)) return true;
      }
    }
    return false;
  });
}

FakeCluster::Call FakeCluster::Start(TurnManager& router, const v1::GenerateRequest& request) {
  Call call;
  call.id = router.NewCall();
  router.Generate(call.id, request, call.stream);
  return call;
}

FakeCluster::Answer FakeCluster::Finish(const Call& call) {
  Answer answer;
  answer.status = call.stream->Wait();
  bool first = true;
  for (const v1::GenerateResponse& message : call.stream->received()) {
    if (first) answer.first_index = message.index();
    first = false;
    answer.text += message.text();
    if (message.has_finish()) {
      answer.finish = message.finish();
      EXPECT_EQ(message.index(), answer.finish.generated_tokens());
      continue;
    }
    EXPECT_EQ(message.index(), answer.first_index + answer.tokens.size());
    EXPECT_TRUE(message.has_logprob());
    answer.tokens.push_back(message.token_id());
  }
  return answer;
}

std::vector<v1::RecordInfo> FakeCluster::PutRecords() {
  absl::MutexLock lock(&put_mu_);
  return put_records_;
}

double FakeCluster::Exported(const std::string& name, const std::string& label, const std::string& value) {
  for (const prometheus::MetricFamily& family : metrics_->registry().Collect()) {
    if (family.name != name) continue;
    for (const prometheus::ClientMetric& metric : family.metric) {
      const bool is_it = label.empty() || std::any_of(metric.label.begin(), metric.label.end(), [&](const auto& one) {
                           return one.name == label && one.value == value;
                         });
      if (!is_it) continue;
      return family.type == prometheus::MetricType::Histogram ? static_cast<double>(metric.histogram.sample_count)
             : family.type == prometheus::MetricType::Gauge   ? metric.gauge.value
                                                              : metric.counter.value;
    }
  }
  return -1;
}

void FakeCluster::CreateSession(const std::string& id, const std::string& initial_state) {
  v1::CreateSessionRequest request;
  request.set_session_id(id);
  request.set_initial_state(initial_state);
  const auto created = store_->CreateSession(request, absl::Now() + kTestLimit);
  EXPECT_TRUE(created.ok()) << created.status();
}

std::vector<uint32_t> FakeCluster::Log(const std::string& session_id) {
  // Past the fake's switches: what is in the log while the router hears nothing of it.
  const std::unique_ptr<state_store::CatalogClient> catalog = state_store::NewCatalogClient(store_->channel());
  v1::GetSessionRequest get;
  get.set_session_id(session_id);
  const auto session = catalog->GetSession(get, absl::Now() + kTestLimit);
  EXPECT_TRUE(session.ok()) << session.status();
  if (!session.ok()) return {};
  v1::ReadTokensRequest read;
  read.set_session_id(session_id);
  read.set_end(session->session().token_count());
  const auto tokens = catalog->ReadTokens(read, absl::Now() + kTestLimit);
  EXPECT_TRUE(tokens.ok()) << tokens.status();
  return tokens.ok() ? *tokens : std::vector<uint32_t>();
}

v1::GenerateRequest Request(absl::Span<const uint32_t> tokens, uint32_t count) {
  v1::GenerateRequest request;
  request.mutable_tokens()->mutable_ids()->Add(tokens.begin(), tokens.end());
  request.set_max_tokens(count);
  return request;
}

v1::GenerateRequest SessionRequest(const std::string& session_id, const std::string& request_id,
                                   absl::Span<const uint32_t> tokens, uint32_t count) {
  v1::GenerateRequest request = Request(tokens, count);
  request.set_session_id(session_id);
  request.set_request_id(request_id);
  return request;
}

}  // namespace rwkv::router
