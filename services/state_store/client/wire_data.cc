#include "services/state_store/client/wire_data.h"

#include <array>
#include <cstdint>

#include "google/protobuf/io/coded_stream.h"

namespace rwkv::state_store {
namespace {

using google::protobuf::io::CodedInputStream;
using google::protobuf::io::CodedOutputStream;

constexpr int kLengthDelimited = 2;  // Of wire types: protobuf.dev/programming-guides/encoding.
constexpr size_t kMaxHead = 10;      // Of tag and length.

uint32_t Tag(int field) { return static_cast<uint32_t>(field) << 3 | kLengthDelimited; }

}  // namespace

grpc::ByteBuffer WireMessage(int field, absl::Span<const char> data, const std::shared_ptr<const void>& owner) {
  std::array<uint8_t, kMaxHead> head;
  uint8_t* end = CodedOutputStream::WriteVarint32ToArray(Tag(field), head.data());
  end = CodedOutputStream::WriteVarint32ToArray(static_cast<uint32_t>(data.size()), end);
  std::array<grpc::Slice, 2> slices = {grpc::Slice(head.data(), end - head.data()), grpc::Slice()};
  if (owner == nullptr) {
    slices[1] = grpc::Slice(data.data(), data.size());
  } else {
    const auto let_go = [](void* held) { delete static_cast<std::shared_ptr<const void>*>(held); };
    // gRPC only reads; its parameter lacks the const.
    slices[1] =
        grpc::Slice(const_cast<char*>(data.data()), data.size(), let_go, new std::shared_ptr<const void>(owner));
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

bool WireData::Read(int field, const grpc::ByteBuffer& message) {
  slices_.clear();
  if (!message.Dump(&slices_).ok()) return false;
  std::array<uint8_t, kMaxHead> head;
  size_t in_head = 0;
  for (const grpc::Slice& slice : slices_) {
    for (size_t i = 0; i < slice.size() && in_head < kMaxHead; ++i) head[in_head++] = slice.begin()[i];
  }
  CodedInputStream stream(head.data(), static_cast<int>(in_head));
  uint32_t length = 0;
  if (stream.ReadTag() != Tag(field) || !stream.ReadVarint32(&length)) return false;
  begin_ = static_cast<size_t>(stream.CurrentPosition());
  size_ = length;
  return begin_ + size_ == message.Length();
}

void WireData::ForEach(absl::FunctionRef<void(absl::Span<const char>)> visit) const {
  size_t skip = begin_;
  for (const grpc::Slice& slice : slices_) {
    if (skip >= slice.size()) {
      skip -= slice.size();
      continue;
    }
    visit(absl::MakeConstSpan(reinterpret_cast<const char*>(slice.begin()) + skip, slice.size() - skip));
    skip = 0;
  }
}

}  // namespace rwkv::state_store
