#include "kernels/conformance/device_memory.h"

#include <cstring>
#include <utility>

#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::kernels::conformance {

DeviceMemory::DeviceMemory(Device& device) : device_(device), stream_(*device.NewStream()) {}

Buffer DeviceMemory::Allocate(int64_t bytes, MemoryKind kind) {
  absl::StatusOr<Buffer> buffer = device_.Allocate(bytes, kind);
  EXPECT_OK(buffer.status());
  return buffer.ok() ? *std::move(buffer) : Buffer();
}

void* DeviceMemory::PutBytes(const void* data, int64_t bytes) {
  const Buffer pinned = Allocate(bytes, MemoryKind::kPinned);
  if (bytes > 0) std::memcpy(pinned.data(), data, static_cast<size_t>(bytes));
  buffers_.push_back(Allocate(bytes, MemoryKind::kDevice));
  EXPECT_OK(stream_->Copy(buffers_.back().data(), pinned.data(), bytes));
  EXPECT_OK(stream_->Synchronize());
  return buffers_.back().data();
}

std::vector<float> DeviceMemory::Get(const float* from, int64_t count) {
  const auto bytes = count * static_cast<int64_t>(sizeof(float));
  const Buffer pinned = Allocate(bytes, MemoryKind::kPinned);
  EXPECT_OK(stream_->Copy(pinned.data(), from, bytes));
  EXPECT_OK(stream_->Synchronize());
  const float* const values = pinned.as<float>();
  return std::vector<float>(values, values + count);
}

const Weight* DeviceMemory::Load(const MatrixView& matrix, WeightUse use) {
  absl::StatusOr<Weight> weight = device_.Load(matrix, use);
  EXPECT_OK(weight.status());
  weights_.push_back(weight.ok() ? *std::move(weight) : Weight());
  return &weights_.back();
}

}  // namespace rwkv::kernels::conformance
