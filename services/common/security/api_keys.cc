#include "services/common/security/api_keys.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/common/tenant_ids.h"

namespace rwkv::common {
namespace {

constexpr size_t kMaxFileBytes = 16 << 20;
constexpr size_t kMaxNameBytes = 128;

bool IsName(absl::string_view name) {
  if (name.empty() || name.size() > kMaxNameBytes) return false;
  for (const char c : name) {
    if (!absl::ascii_isalnum(c) && c != '-' && c != '_' && c != '.' && c != '@') return false;
  }
  return true;
}

absl::StatusOr<ApiKey> ParseLine(absl::string_view line) {
  ApiKey key;
  bool has_role = false;
  for (absl::string_view word : absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty())) {
    if (absl::ConsumePrefix(&word, "sha256:")) {
      if (!key.sha256.empty()) return absl::InvalidArgumentError("two hashes");
      if (word.size() != 2 * SHA256_DIGEST_LENGTH) return absl::InvalidArgumentError("sha256: wants 64 hex digits");
      for (const char c : word) {
        if (!absl::ascii_isxdigit(c)) return absl::InvalidArgumentError("sha256: wants 64 hex digits");
      }
      key.sha256 = absl::HexStringToBytes(word);
    } else if (absl::ConsumePrefix(&word, "name=")) {
      if (!key.name.empty() || !IsName(word))
        return absl::InvalidArgumentError("name= wants one name of A-Za-z0-9-_.@");
      key.name = std::string(word);
    } else if (absl::ConsumePrefix(&word, "role=")) {
      RWKV_ASSIGN_OR_RETURN(key.role, ParseRole(word));
      // The cluster's own processes show certificates: a key that a person holds must not speak for one.
      if (has_role || !RoleSet({Role::kClient, Role::kGateway, Role::kOperator}).Has(key.role)) {
        return absl::InvalidArgumentError("role= is once client, gateway or operator");
      }
      has_role = true;
    } else if (absl::ConsumePrefix(&word, "tenant=")) {
      if (!key.tenant.empty() || !IsTenantName(word)) {
        return absl::InvalidArgumentError("tenant= wants one name of A-Za-z0-9-_., at most 64");
      }
      key.tenant = std::string(word);
    } else {
      return absl::InvalidArgumentError("a word that is none of sha256:, name=, role=, tenant=");
    }
  }
  if (key.sha256.empty()) return absl::InvalidArgumentError("no sha256:");
  if (key.name.empty()) return absl::InvalidArgumentError("no name=");
  return key;
}

}  // namespace

absl::StatusOr<std::vector<ApiKey>> ParseApiKeys(absl::string_view text) {
  std::vector<ApiKey> keys;
  absl::flat_hash_set<std::string> names, hashes;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    absl::StatusOr<ApiKey> key = ParseLine(line);
    if (key.ok() && !names.insert(key->name).second) key = absl::InvalidArgumentError("its name stands there twice");
    if (key.ok() && !hashes.insert(key->sha256).second) key = absl::InvalidArgumentError("its key stands there twice");
    if (!key.ok()) return absl::InvalidArgumentError(absl::StrCat("line ", number, ": ", key.status().message()));
    keys.push_back(*std::move(key));
  }
  return keys;
}

absl::StatusOr<std::unique_ptr<ApiKeys>> ApiKeys::Open(const std::string& path, absl::Duration reload_interval,
                                                       Metrics* metrics) {
  std::unique_ptr<ApiKeys> keys(new ApiKeys);
  absl::MutexLock lock(&keys->mu_);
  const auto use = [keys = keys.get()](const std::string& text) ABSL_NO_THREAD_SAFETY_ANALYSIS {  // Under mu_.
    absl::StatusOr<std::vector<ApiKey>> parsed = ParseApiKeys(text);
    if (!parsed.ok()) return parsed.status();
    keys->keys_ = std::make_shared<const std::vector<ApiKey>>(*std::move(parsed));
    return absl::OkStatus();
  };
  RWKV_ASSIGN_OR_RETURN(keys->file_,
                        ReloadedFile::Open(path, "api_keys", kMaxFileBytes, reload_interval, use, metrics));
  return keys;
}

void ApiKeys::Look() {
  absl::MutexLock lock(&mu_);
  file_->Look(absl::Now());
}

absl::optional<ApiKeys::Who> ApiKeys::Find(absl::string_view key) {
  std::shared_ptr<const std::vector<ApiKey>> keys;
  {
    absl::MutexLock lock(&mu_);
    file_->Look(absl::Now());
    keys = keys_;
  }
  unsigned char hash[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(key.data()), key.size(), hash);
  const ApiKey* found = nullptr;
  for (const ApiKey& known : *keys) {  // All of them, whichever it is.
    if (CRYPTO_memcmp(known.sha256.data(), hash, sizeof(hash)) == 0) found = &known;
  }
  if (found == nullptr) return absl::nullopt;
  return Who{found->name, found->role, found->tenant};
}

}  // namespace rwkv::common
