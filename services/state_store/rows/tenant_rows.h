// The rows of one tenant among those of others in one RowStore: each of its keys and locks begins with its name.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "services/state_store/rows/row_store.h"

namespace rwkv::state_store {

class TenantRows final : public RowStore {
 public:
  // The keys of tenants that have a name begin with '@', which no key without tenant does. `all` outlives it.
  TenantRows(RowStore* all, const std::string& tenant);

  absl::StatusOr<std::unique_ptr<RowTransaction>> Begin(const std::vector<std::string>& locks) override;
  absl::StatusOr<std::unique_ptr<RowReader>> Read() override;
  bool shared() const override { return all_->shared(); }

 private:
  class Reader;
  class Transaction;

  RowStore* const all_;
  const std::string prefix_;
};

}  // namespace rwkv::state_store
