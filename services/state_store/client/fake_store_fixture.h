// What tests of the client begin with: a fake store and a clock that stands still.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.pb.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/client/fake_state_store.h"
#include "tests/testing/fake_clock.h"

namespace rwkv::state_store {

inline absl::Time Deadline() { return absl::Now() + absl::Seconds(60); }

inline v1::RecordInfo InfoOf(const std::string& snapshot_id, int layer, absl::string_view data) {
  v1::RecordInfo info;
  info.set_snapshot_id(snapshot_id);
  info.set_layer(layer);
  info.set_bytes(data.size());
  info.set_crc32c(Crc32c(absl::MakeConstSpan(data.data(), data.size())));
  return info;
}

class FakeStoreTest : public ::testing::Test {
 protected:
  testing::FakeClock clock_;
  const std::unique_ptr<FakeStateStore> fake_ = *FakeStateStore::Create(&clock_);
};

}  // namespace rwkv::state_store
