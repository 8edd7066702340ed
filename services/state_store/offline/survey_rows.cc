#include "services/state_store/offline/survey_rows.h"

#include <algorithm>
#include <memory>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "kernels/base/status_macros.h"
#include "rocksdb/db.h"
#include "rocksdb/iterator.h"
#include "services/state_store/catalog/keys.h"
#include "services/state_store/catalog/lost_rows.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

// Takes a row, or notes that it cannot be read.
void Take(const std::string& key, const std::string& sealed, Survey& survey, std::map<std::string, uint32_t>& seals) {
  const absl::optional<absl::string_view> value = OpenValue(key, sealed);
  if (value.has_value()) {
    survey.rows[key] = std::string(*value);
    seals[key] = SealOf(sealed);
    return;
  }
  ++survey.unreadable_rows;
  for (const std::string& session : LostSessions({key})) {
    survey.sessions.insert(session);
    survey.damaged[session] = absl::StrCat("row ", PrintableKey(key), " is damaged");
  }
  NoteLost(key, "a row of it is damaged", survey);
}

// Keys in gaps where a row may be, by the branches and sessions that are known.
std::set<std::string> Guesses(const Survey& survey) {
  std::set<std::string> guesses;
  const auto guess = [&](const std::string& key) {
    if (survey.InGap(key)) guesses.insert(key);
  };
  for (const char kind : absl::string_view("bcdegilmpstuxy")) guess(std::string(1, kind));
  for (const auto& [key, value] : survey.rows) {
    if (absl::StrContains("belmp", key[0]) && key.size() >= 9) {
      for (const char kind : absl::string_view("belmp")) {
        guess(NumberKey(kind, FirstNumber(key)));
        guess(NumberKey(kind, FirstNumber(key) + 1));
      }
    }
    std::set<std::string> sessions = LostSessions({key});
    if (key[0] == 'u') sessions.insert(std::string(IdleSessionId(key)));
    for (const std::string& id : sessions) {
      guess(SessionKey(id));
      guess(TurnKey(id, 0));
    }
  }
  return guesses;
}

// Takes rows from here on up to what cannot be read or lies outside the gap. Returns where that was; unset: nowhere.
template <typename Step>
absl::optional<std::string> TakeFrom(rocksdb::Iterator& it, const Gap& gap, Step step, Survey& survey,
                                     std::map<std::string, uint32_t>& seals) {
  std::string last;
  for (; it.Valid() && gap.Holds(it.key().ToString()); step(it)) {
    last = it.key().ToString();
    if (survey.rows.count(last) == 0) Take(last, it.value().ToString(), survey, seals);
  }
  if (it.status().ok()) return absl::nullopt;
  return last;
}

}  // namespace

void NoteLost(const std::string& key, const char* why, Survey& survey) {
  if (key[0] == 'g') survey.usage[key.substr(1, key.find('\0', 1) - 1)] = why;
  if (key[0] == 'p' && key.size() == 17) survey.lost_snapshots.emplace(FirstNumber(key), SecondNumber(key));
}

absl::Status ReadRows(Database& database, Survey& survey, std::map<std::string, uint32_t>& seals) {
  RWKV_ASSIGN_OR_RETURN(const Database::Access access, database.Read());
  const std::unique_ptr<rocksdb::Iterator> it(
      access.db().NewIterator(rocksdb::ReadOptions(), access.family(Family::kCatalog)));
  const auto forward = [](rocksdb::Iterator& at) { at.Next(); };
  const auto back = [](rocksdb::Iterator& at) { at.Prev(); };
  it->SeekToFirst();
  const absl::optional<std::string> after = TakeFrom(*it, Gap(), forward, survey, seals);
  if (!after.has_value()) return absl::OkStatus();
  it->SeekToLast();
  const absl::optional<std::string> before = TakeFrom(*it, {*after, ""}, back, survey, seals);
  if (!before.has_value()) return absl::OkStatus();
  survey.gaps = {{*after, *before}};
  std::set<std::string> tried;
  for (bool more = true; more;) {
    more = false;
    for (const std::string& guess : Guesses(survey)) {
      const auto gap =
          std::find_if(survey.gaps.begin(), survey.gaps.end(), [&](const Gap& g) { return g.Holds(guess); });
      if (gap == survey.gaps.end() || !tried.insert(guess).second) continue;
      it->Seek(guess);
      if (!it->Valid() || !gap->Holds(it->key().ToString())) continue;
      const Gap whole = *gap;
      const std::string middle = it->key().ToString();
      const absl::optional<std::string> last = TakeFrom(*it, whole, forward, survey, seals);
      it->Seek(middle);
      it->Prev();
      const absl::optional<std::string> first = TakeFrom(*it, whole, back, survey, seals);
      survey.gaps.erase(gap);
      if (first.has_value()) survey.gaps.push_back({whole.after, first->empty() ? middle : *first});
      if (last.has_value()) survey.gaps.push_back({last->empty() ? middle : *last, whole.before});
      more = true;
    }
  }
  std::sort(survey.gaps.begin(), survey.gaps.end(), [](const Gap& a, const Gap& b) { return a.after < b.after; });
  return absl::OkStatus();
}

}  // namespace rwkv::state_store
