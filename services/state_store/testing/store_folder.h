// The folder of a store that is not running, for tests that damage it.
#pragma once

#include <filesystem>
#include <fstream>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "gtest/gtest.h"
#include "services/common/metrics.h"
#include "services/state_store/embedded_state_store.h"
#include "services/state_store/testing/test_store.h"
#include "tests/testing/fake_clock.h"

namespace rwkv::state_store {

inline void WriteFile(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

class StoreFolderTest : public ::testing::Test {
 protected:
  // Of a store that runs, as a kill would leave its files now.
  static std::string Copy(const std::string& folder) {
    const std::string copy = NewTestFolder() + "/data";
    std::filesystem::copy(folder, copy, std::filesystem::copy_options::recursive);
    return copy;
  }

  // As a process opens it, without what it does now and then. One at a time.
  absl::StatusOr<std::unique_ptr<EmbeddedStateStore>> Open(const std::string& folder) {
    EmbeddedStateStore::Options options;
    options.database.data_dir = folder;
    options.store.prefix_cache_bytes = 64 << 20;
    options.sweep_interval = options.session_sweep_interval = absl::ZeroDuration();
    options.reclaim_interval = options.resume_check_interval = absl::ZeroDuration();
    metrics_ = *common::Metrics::Create("");
    return EmbeddedStateStore::Create(options, &clock_, metrics_.get());
  }

 private:
  rwkv::testing::FakeClock clock_;
  std::unique_ptr<common::Metrics> metrics_;
};

}  // namespace rwkv::state_store
