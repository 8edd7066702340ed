#include "services/state_store/client/wire_data.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"

namespace rwkv::state_store {
namespace {

constexpr int kData = v1::PutRecordRequest::kDataFieldNumber;

std::string Bytes(const grpc::ByteBuffer& message) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(message.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) bytes.append(slice.begin(), slice.end());
  return bytes;
}

// In two slices, cut at `cut`.
grpc::ByteBuffer Message(const std::string& bytes, size_t cut) {
  const grpc::Slice slices[] = {grpc::Slice(bytes.substr(0, cut)), grpc::Slice(bytes.substr(cut))};
  return grpc::ByteBuffer(slices, 2);
}

absl::optional<std::string> Read(const grpc::ByteBuffer& message) {
  WireData data;
  if (!data.Read(kData, message)) return absl::nullopt;
  std::string bytes;
  data.ForEach([&](absl::Span<const char> piece) { bytes.append(piece.data(), piece.size()); });
  EXPECT_EQ(bytes.size(), data.size());
  return bytes;
}

TEST(WireDataTest, IsWhatProtobufWrites) {
  for (const size_t size : {0, 1, 127, 128, 20000, 1 << 20}) {
    const std::string bytes(size, 'x');
    v1::PutRecordRequest request;
    request.set_data(bytes);
    EXPECT_EQ(Bytes(WireMessage(kData, bytes, nullptr)), request.SerializeAsString()) << size;
    EXPECT_EQ(Read(WireMessage(kData, bytes, nullptr)), bytes) << size;
  }
}

TEST(WireDataTest, MayBeCutAnywhere) {
  const std::string bytes(300, 'x');
  const std::string message = Bytes(WireMessage(kData, bytes, nullptr));
  for (size_t cut = 0; cut <= message.size(); ++cut) EXPECT_EQ(Read(Message(message, cut)), bytes) << cut;
}

TEST(WireDataTest, IsNotTakenFromAMessageThatHasMoreOrLess) {
  v1::PutRecordRequest other;
  other.mutable_info()->set_snapshot_id("x");
  const std::string message = Bytes(WireMessage(kData, absl::MakeConstSpan("abcdef", 6), nullptr));
  for (const std::string& bytes :
       {std::string(), message.substr(0, 1), message.substr(0, 4), message + "x", message + message,
        other.SerializeAsString(), other.SerializeAsString() + message, std::string(20, '\xff')}) {
    EXPECT_EQ(Read(Message(bytes, bytes.size() / 2)), absl::nullopt);
  }
}

TEST(WireDataTest, AMessageKeepsTheOwnerAndNoCopy) {
  auto owner = std::make_shared<const std::string>(1000, 'x');
  const std::weak_ptr<const std::string> watched = owner;
  {
    const grpc::ByteBuffer message = WireMessage(kData, *owner, owner);
    const char* const lies_at = owner->data();
    owner = nullptr;
    ASSERT_FALSE(watched.expired());
    WireData data;
    ASSERT_TRUE(data.Read(kData, message));
    data.ForEach([&](absl::Span<const char> piece) { EXPECT_EQ(piece.data(), lies_at); });
  }
  EXPECT_TRUE(watched.expired());
}

}  // namespace
}  // namespace rwkv::state_store
