#include "services/state_store/rows/tenant_rows.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace rwkv::state_store {
namespace {

std::vector<std::string> WithPrefix(const std::string& prefix, const std::vector<std::string>& names) {
  std::vector<std::string> prefixed;
  prefixed.reserve(names.size());
  for (const std::string& name : names) prefixed.push_back(prefix + name);
  return prefixed;
}

absl::Status Scan(RowReader& rows, const std::string& prefix, absl::string_view begin, absl::string_view end,
                  bool ascending, RowReader::Visit visit) {
  const auto stripped = [&](absl::string_view key, absl::string_view value) {
    return visit(key.substr(prefix.size()), value);
  };
  const std::string from = absl::StrCat(prefix, begin), to = absl::StrCat(prefix, end);
  return ascending ? rows.Scan(from, to, stripped) : rows.ScanBack(from, to, stripped);
}

}  // namespace

class TenantRows::Reader final : public RowReader {
 public:
  Reader(const std::string& prefix, std::unique_ptr<RowReader> rows) : prefix_(prefix), rows_(std::move(rows)) {}
  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) override {
    return rows_->Get(absl::StrCat(prefix_, key));
  }
  absl::Status Scan(absl::string_view begin, absl::string_view end, Visit visit) override {
    return state_store::Scan(*rows_, prefix_, begin, end, true, visit);
  }
  absl::Status ScanBack(absl::string_view begin, absl::string_view end, Visit visit) override {
    return state_store::Scan(*rows_, prefix_, begin, end, false, visit);
  }

 private:
  const std::string prefix_;
  const std::unique_ptr<RowReader> rows_;
};

class TenantRows::Transaction final : public RowTransaction {
 public:
  Transaction(const std::string& prefix, std::unique_ptr<RowTransaction> rows)
      : prefix_(prefix), rows_(std::move(rows)) {}
  absl::StatusOr<absl::optional<std::string>> Get(absl::string_view key) override {
    return rows_->Get(absl::StrCat(prefix_, key));
  }
  absl::Status Scan(absl::string_view begin, absl::string_view end, Visit visit) override {
    return state_store::Scan(*rows_, prefix_, begin, end, true, visit);
  }
  absl::Status ScanBack(absl::string_view begin, absl::string_view end, Visit visit) override {
    return state_store::Scan(*rows_, prefix_, begin, end, false, visit);
  }
  absl::Status Extend(const std::vector<std::string>& locks) override {
    return rows_->Extend(WithPrefix(prefix_, locks));
  }
  absl::StatusOr<uint64_t> NextId() override { return rows_->NextId(); }
  void Put(absl::string_view key, absl::string_view value) override { rows_->Put(absl::StrCat(prefix_, key), value); }
  void Delete(absl::string_view key) override { rows_->Delete(absl::StrCat(prefix_, key)); }
  void DeleteRange(absl::string_view begin, absl::string_view end) override {
    rows_->DeleteRange(absl::StrCat(prefix_, begin), absl::StrCat(prefix_, end));
  }
  bool empty() const override { return rows_->empty(); }
  absl::Status Commit() override { return rows_->Commit(); }

 private:
  const std::string prefix_;
  const std::unique_ptr<RowTransaction> rows_;
};

TenantRows::TenantRows(RowStore* all, const std::string& tenant)
    : all_(all), prefix_(tenant.empty() ? "" : absl::StrCat("@", tenant, absl::string_view("\0", 1))) {}

absl::StatusOr<std::unique_ptr<RowTransaction>> TenantRows::Begin(const std::vector<std::string>& locks) {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<RowTransaction> rows, all_->Begin(WithPrefix(prefix_, locks)));
  return std::unique_ptr<RowTransaction>(new Transaction(prefix_, std::move(rows)));
}

absl::StatusOr<std::unique_ptr<RowReader>> TenantRows::Read() {
  RWKV_ASSIGN_OR_RETURN(std::unique_ptr<RowReader> rows, all_->Read());
  return std::unique_ptr<RowReader>(new Reader(prefix_, std::move(rows)));
}

}  // namespace rwkv::state_store
