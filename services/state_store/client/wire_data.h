// The bytes of records as they lie on the wire, without the copies into a message and out of it: messages of
// proto/rwkv/v1/state_store.proto carry them in one field: `data` of PutRecord(s)Request and of GetRecord(s)Response.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/slice.h"

namespace rwkv::state_store {

// The message that has `data` in its field of that number, and nothing else. `owner` keeps `data` until gRPC has let go
// of it, which may be after the call. Null: it is copied.
grpc::ByteBuffer WireMessage(int field, absl::Span<const char> data, const std::shared_ptr<const void>& owner);

// The opposite: what came, in the pieces in which it came.
class WireData {
 public:
  // False: `message` has something else in it, or is written in another way than WireMessage() and protobuf write it.
  bool Read(int field, const grpc::ByteBuffer& message);

  size_t size() const { return size_; }
  void ForEach(absl::FunctionRef<void(absl::Span<const char>)> visit) const;

 private:
  std::vector<grpc::Slice> slices_;
  size_t begin_ = 0;  // Of the data, in the slices together.
  size_t size_ = 0;
};

}  // namespace rwkv::state_store
