#include "services/state_store/records/s3/s3_record_store.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"
#include "services/state_store/client/crc32c.h"

namespace rwkv::state_store {
namespace {

std::string Name(const v1::RecordInfo& info) { return absl::StrCat("record ", info.snapshot_id(), "/", info.layer()); }

std::string Describe(uint64_t bytes, uint32_t crc32c) {
  return absl::StrCat(bytes, " bytes with CRC32C ", absl::Hex(crc32c, absl::kZeroPad8));
}

}  // namespace

S3RecordStore::S3RecordStore(std::unique_ptr<S3Client> client, std::string prefix, common::Metrics* metrics)
    : client_(std::move(client)),
      prefix_(std::move(prefix)),
      bytes_gauge_(metrics->Gauge("rwkv_state_store_records_bytes", "Bytes of all state records.")),
      written_bytes_total_(metrics->Counter("rwkv_state_store_records_written_bytes_total", "Record bytes stored.")),
      read_bytes_total_(metrics->Counter("rwkv_state_store_records_read_bytes_total", "Record bytes served.")),
      corrupt_total_(metrics->Counter("rwkv_state_store_corrupt_records_total",
                                      "Records that could not be served because their bytes had changed.")) {}

absl::StatusOr<std::unique_ptr<S3RecordStore>> S3RecordStore::Create(std::unique_ptr<S3Client> client,
                                                                     std::string prefix, common::Metrics* metrics) {
  std::unique_ptr<S3RecordStore> store(new S3RecordStore(std::move(client), std::move(prefix), metrics));
  RWKV_RETURN_IF_ERROR(store->client_->List(
      store->prefix_, [](const S3Client::Object&) { return false; }, 1));
  return store;
}

std::string S3RecordStore::LayerPrefix(const v1::RecordInfo& info) const {
  return absl::StrCat(prefix_, info.snapshot_id(), "/", info.layer(), "-");
}

std::string S3RecordStore::Key(const v1::RecordInfo& info) const {
  return absl::StrCat(LayerPrefix(info), info.bytes(), "-", absl::Hex(info.crc32c(), absl::kZeroPad8));
}

void S3RecordStore::CountBytes(int64_t delta) {
  bytes_gauge_.Set(static_cast<double>(bytes_.fetch_add(delta, std::memory_order_relaxed) + delta));
}

absl::Status S3RecordStore::Put(const v1::RecordInfo& info, absl::Span<const char> data) {
  const uint32_t crc32c = Crc32c(data);
  if (data.size() != info.bytes() || crc32c != info.crc32c()) {
    return absl::DataLossError(absl::StrCat(Name(info), ": ", Describe(data.size(), crc32c), " came, its info says ",
                                            Describe(info.bytes(), info.crc32c())));
  }
  const std::string key = Key(info);
  bool there = false;
  std::string other;
  RWKV_RETURN_IF_ERROR(client_->List(
      LayerPrefix(info),
      [&](const S3Client::Object& object) {
        there |= object.key == key && object.bytes == info.bytes();
        if (object.key != key) other = object.key;
        return true;
      },
      2));
  if (!other.empty()) return absl::AlreadyExistsError(absl::StrCat(Name(info), " exists already, as ", other));
  if (there) return absl::OkStatus();
  RWKV_RETURN_IF_ERROR(client_->Put(key, data));
  CountBytes(static_cast<int64_t>(data.size()));
  written_bytes_total_.Increment(static_cast<double>(data.size()));
  return absl::OkStatus();
}

absl::Status S3RecordStore::Read(const v1::RecordInfo& info, absl::Span<char> to) {
  if (to.size() < info.bytes()) {
    return absl::DataLossError(absl::StrCat(Name(info), " has ", info.bytes(), " bytes, its place ", to.size()));
  }
  absl::StatusOr<std::string> data = client_->Get(Key(info), info.bytes());
  absl::Status damage;
  if (absl::IsNotFound(data.status())) {
    // Gone, or there as something else.
    const absl::Status is = Check(info);
    if (absl::StrContains(is.message(), "does not exist")) {
      return absl::NotFoundError(absl::StrCat(Name(info), " does not exist"));
    }
    return is.ok() ? absl::NotFoundError(absl::StrCat(Name(info), " was not there at first")) : is;
  }
  if (absl::IsDataLoss(data.status())) damage = data.status();
  if (data.ok() && Crc32c(*data) != info.crc32c()) {
    damage = absl::DataLossError(absl::StrCat(Name(info), ": stored are ", Describe(data->size(), Crc32c(*data)),
                                              ", want ", Describe(info.bytes(), info.crc32c())));
  }
  if (!damage.ok()) {
    corrupt_total_.Increment();
    common::LogError("record_corrupt",
                     {{"snapshot", info.snapshot_id()}, {"layer", static_cast<int>(info.layer())}, {"reason", damage}});
    return damage;
  }
  RWKV_RETURN_IF_ERROR(data.status());
  std::memcpy(to.data(), data->data(), data->size());
  read_bytes_total_.Increment(static_cast<double>(data->size()));
  return absl::OkStatus();
}

absl::Status S3RecordStore::Check(const v1::RecordInfo& info) {
  const std::string key = Key(info);
  std::string found;
  uint64_t bytes = 0;
  RWKV_RETURN_IF_ERROR(client_->List(
      LayerPrefix(info),
      [&](const S3Client::Object& object) {
        found = object.key;
        bytes = object.bytes;
        return found != key;
      },
      2));
  if (found.empty()) return absl::DataLossError(absl::StrCat(Name(info), " does not exist"));
  if (found == key && bytes == info.bytes()) return absl::OkStatus();
  return absl::DataLossError(
      absl::StrCat(Name(info), " is ", found, " with ", bytes, " bytes, not ", Describe(info.bytes(), info.crc32c())));
}

absl::Status S3RecordStore::Delete(const std::string& snapshot_id) {
  std::vector<S3Client::Object> objects;
  RWKV_RETURN_IF_ERROR(client_->List(absl::StrCat(prefix_, snapshot_id, "/"), [&](const S3Client::Object& object) {
    objects.push_back(object);
    return true;
  }));
  for (const S3Client::Object& object : objects) {
    RWKV_RETURN_IF_ERROR(client_->Delete(object.key));
    CountBytes(-static_cast<int64_t>(object.bytes));
  }
  return absl::OkStatus();
}

absl::Status S3RecordStore::ForEach(absl::FunctionRef<void(const Stored&)> visit) {
  Stored stored;
  int64_t bytes = 0;
  RWKV_RETURN_IF_ERROR(client_->List(prefix_, [&](const S3Client::Object& object) {
    const absl::string_view rest = absl::string_view(object.key).substr(prefix_.size());
    const size_t slash = rest.find('/');
    if (slash == absl::string_view::npos) return true;  // Not ours.
    const absl::string_view snapshot_id = rest.substr(0, slash);
    if (snapshot_id != stored.snapshot_id) {
      if (!stored.snapshot_id.empty()) visit(stored);
      stored = {std::string(snapshot_id), absl::InfinitePast(), 0};
    }
    stored.newest_put = std::max(stored.newest_put, object.modified);
    stored.bytes += object.bytes;
    bytes += static_cast<int64_t>(object.bytes);
    return true;
  }));
  if (!stored.snapshot_id.empty()) visit(stored);
  bytes_.store(bytes, std::memory_order_relaxed);
  CountBytes(0);
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
