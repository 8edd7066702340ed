#include "services/router/tenants/tenants_file.h"

#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status_macros.h"
#include "services/common/tenant_ids.h"

namespace rwkv::router {
namespace {

constexpr double kMaxWeight = 1000;
constexpr int64_t kMaxCount = int64_t{1} << 50;

absl::Status Wrong(absl::string_view field, absl::string_view value, absl::string_view want) {
  return absl::InvalidArgumentError(
      absl::StrCat(field, " is \"", absl::CHexEscape(value.substr(0, 64)), "\", want ", want));
}

absl::Status ReadCount(absl::string_view field, absl::string_view value, int64_t* count) {
  if (absl::SimpleAtoi(value, count) && *count >= 0 && *count <= kMaxCount) return absl::OkStatus();
  return Wrong(field, value, "a whole number from 0 on; 0 is no bound");
}

absl::Status ReadBytes(absl::string_view field, absl::string_view value, int64_t* bytes) {
  constexpr std::pair<absl::string_view, int> kUnits[] = {{"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  absl::string_view digits = value;
  int shift = 0;
  for (const auto& [unit, bits] : kUnits) {
    if (!absl::EndsWith(value, unit)) continue;
    digits.remove_suffix(unit.size());
    shift = bits;
  }
  if (absl::SimpleAtoi(digits, bytes) && *bytes >= 0 && *bytes <= (kMaxCount >> shift)) {
    *bytes <<= shift;
    return absl::OkStatus();
  }
  return Wrong(field, value, "bytes, or a number of KiB, MiB, GiB or TiB; 0 is no bound");
}

absl::Status ReadWord(absl::string_view field, absl::string_view value, TenantLimits* tenant) {
  if (field == "weight") {
    if (absl::SimpleAtod(value, &tenant->weight) && tenant->weight > 0 && tenant->weight <= kMaxWeight) {
      return absl::OkStatus();
    }
    return Wrong(field, value, absl::StrCat("a number above 0, at most ", kMaxWeight));
  }
  if (field == "requests_per_minute") return ReadCount(field, value, &tenant->requests_per_minute);
  if (field == "tokens_per_minute") return ReadCount(field, value, &tenant->tokens_per_minute);
  if (field == "concurrent_turns") return ReadCount(field, value, &tenant->concurrent_turns);
  if (field == "max_tokens") return ReadCount(field, value, &tenant->max_tokens);
  if (field == "stored_bytes") return ReadBytes(field, value, &tenant->stored_bytes);
  if (field == "models") {
    for (const absl::string_view model : absl::StrSplit(value, ',')) {
      if (model.empty()) return Wrong(field, value, "names of models by commas");
      tenant->models.emplace_back(model);
    }
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "no field \"", absl::CHexEscape(field.substr(0, 64)),
      "\"; there are name, weight, requests_per_minute, tokens_per_minute, concurrent_turns, stored_bytes, "
      "max_tokens, models"));
}

absl::Status ParseLine(absl::string_view line, TenantLimits* tenant) {
  absl::flat_hash_set<absl::string_view> seen;
  for (const absl::string_view word : absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty())) {
    const size_t equals = word.find('=');
    if (equals == absl::string_view::npos) return Wrong("a word", word, "FIELD=VALUE");
    const absl::string_view field = word.substr(0, equals), value = word.substr(equals + 1);
    if (!seen.insert(field).second) return absl::InvalidArgumentError(absl::StrCat(field, " stands there twice"));
    if (field == "name") {
      if (!common::IsTenantName(value)) return Wrong(field, value, "1 to 64 of A-Z a-z 0-9 . _ -");
      tenant->name = std::string(value);
    } else {
      RWKV_RETURN_IF_ERROR(ReadWord(field, value, tenant));
    }
  }
  return tenant->name.empty() ? absl::InvalidArgumentError("name is missing") : absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::vector<TenantLimits>> ParseTenants(absl::string_view text) {
  std::vector<TenantLimits> tenants;
  absl::flat_hash_set<std::string> names;
  int number = 0;
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    TenantLimits tenant;
    absl::Status status = ParseLine(line, &tenant);
    if (status.ok() && !names.insert(tenant.name).second) {
      status = absl::InvalidArgumentError("its name stands there twice");
    }
    if (status.ok() && tenants.size() == kMaxTenants) {
      status = absl::InvalidArgumentError(absl::StrCat("more than ", kMaxTenants, " tenants"));
    }
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("line ", number, tenant.name.empty() ? "" : ", tenant ", tenant.name, ": ", status.message()));
    }
    tenants.push_back(std::move(tenant));
  }
  return tenants;
}

}  // namespace rwkv::router
