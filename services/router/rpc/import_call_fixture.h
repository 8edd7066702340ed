// Files of exported states, and sessions made of them over gRPC.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "rwkv/v1/sessions.pb.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/checkpoint/formats/element_type.h"
#include "services/common/grpc_status.h"
#include "services/router/rpc/services_fixture.h"
#include "services/router/testing/fake_cluster.h"
#include "services/router/testing/turn_testing.h"
#include "services/state_store/client/crc32c.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {

inline constexpr char kFingerprint[] = "00000000000000000000000000000fab";  // FakePipeline's.
inline constexpr int kLayers = 4;

template <typename T>
std::string BytesOf(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

struct File {
  std::vector<testing::RawTensor> tensors;
  std::map<std::string, std::string> metadata;

  std::string Bytes() const { return testing::SafetensorsBytes(tensors, metadata); }
};

class ImportCallTest : public ServicesTest {
 protected:
  struct Upload {
    std::unique_ptr<grpc::ClientContext> context = std::make_unique<grpc::ClientContext>();
    std::unique_ptr<v1::SessionsImportResponse> response = std::make_unique<v1::SessionsImportResponse>();
    std::unique_ptr<grpc::ClientWriter<v1::SessionsImportRequest>> writer;
    absl::Status End() { return common::FromGrpcStatus(writer->Finish()); }
  };
  Upload Begin() {
    Upload upload;
    SetLimit(*upload.context);
    upload.writer = sessions_->Import(upload.context.get(), upload.response.get());
    return upload;
  }

  // In pieces, with the checksum in the last one.
  absl::StatusOr<v1::Session> Import(const std::string& id, const std::string& bytes, size_t piece_bytes = 1 << 20) {
    Upload upload = Begin();
    v1::SessionsImportRequest piece;
    piece.set_session_id(id);
    for (size_t begin = 0; begin < bytes.size(); begin += piece_bytes) {
      piece.set_data(bytes.substr(begin, piece_bytes));
      if (begin + piece_bytes >= bytes.size()) piece.set_crc32c(state_store::Crc32c(bytes));
      if (!upload.writer->Write(piece)) return upload.End();
      piece.Clear();
    }
    upload.writer->WritesDone();
    const absl::Status end = upload.End();
    if (!end.ok()) return end;
    return upload.response->session();
  }

  // What `rwkvctl sessions export` makes of a session.
  File Exported(const std::string& id, bool with_log) {
    std::map<std::string, Tensor> tensors;
    EXPECT_THAT(Export(id, &tensors), ::rwkv::testing::IsOk());
    File file;
    for (const auto& [name, tensor] : tensors) {
      file.tensors.push_back({{name, checkpoint::ElementType::kFloat32, tensor.shape}, tensor.bytes});
      file.metadata["position"] = absl::StrCat(tensor.position);
    }
    file.metadata["model_fingerprint"] = kFingerprint;
    file.metadata["initial_state"] = GetSession(*cluster_, id).initial_state();
    if (with_log) {
      const std::vector<uint32_t> log = cluster_->Log(id);
      file.tensors.push_back(
          {{"token_ids", checkpoint::ElementType::kInt32, {static_cast<int64_t>(log.size())}}, BytesOf(log)});
    }
    return file;
  }

  // A session of kPrompt and six tokens; returns its log.
  std::vector<uint32_t> MakeSession(const std::string& id) {
    CreateSession(id);
    EXPECT_THAT(Generate(SessionRequest(id, "r", kPrompt, 6)).status, ::rwkv::testing::IsOk());
    return cluster_->Log(id);
  }

  // The router gives a session's lease back when none of its snapshots is on its way.
  void WaitUntilLetGo(const std::string& id) {
    v1::AcquireLeaseRequest acquire;
    acquire.set_session_id(id);
    acquire.set_holder("the test");
    acquire.set_incarnation("1");
    acquire.mutable_ttl()->set_seconds(60);
    EXPECT_TRUE(WaitUntil([&] { return cluster_->store().AcquireLease(acquire, absl::Now() + kTestLimit).ok(); }));
  }

  std::vector<std::string> SessionIds() {
    v1::SessionsListResponse page;
    EXPECT_THAT(Call(*sessions_, &v1::Sessions::Stub::List, {}, &page), ::rwkv::testing::IsOk());
    std::vector<std::string> ids;
    for (const v1::Session& session : page.sessions()) ids.push_back(session.id());
    return ids;
  }

  absl::StatusOr<v1::Session> Fork(const std::string& id, uint64_t position, const std::string& new_id) {
    v1::SessionsForkRequest fork;
    fork.set_session_id(id);
    fork.set_position(position);
    fork.set_new_session_id(new_id);
    v1::SessionsForkResponse forked;
    const absl::Status status = Call(*sessions_, &v1::Sessions::Stub::Fork, fork, &forked);
    if (!status.ok()) return status;
    return forked.session();
  }
};

// Without input: goes on from what the session has.
inline v1::GenerateRequest Continuation(const std::string& session_id, const std::string& request_id, uint32_t count) {
  v1::GenerateRequest request = SessionRequest(session_id, request_id, {}, count);
  request.clear_input();
  return request;
}

inline v1::GenerateRequest Sampled(v1::GenerateRequest request) {
  request.mutable_sampling()->set_temperature(1);
  request.mutable_sampling()->set_seed(42);
  return request;
}

}  // namespace rwkv::router
