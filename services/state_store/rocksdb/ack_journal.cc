#include "services/state_store/rocksdb/ack_journal.h"

#include <algorithm>
#include <cstring>
#include <fstream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/common/logging.h"
#include "services/state_store/client/crc32c.h"
#include "services/state_store/rocksdb/directories.h"
#include "services/state_store/rocksdb/rocksdb_status.h"
#include "services/state_store/rows/sealed_value.h"

namespace rwkv::state_store {
namespace {

constexpr char kPrefix[] = "ACKNOWLEDGED-";
constexpr char kManifestPrefix[] = "MANIFEST-";  // RocksDB's.
constexpr size_t kMaxFrameBytes = size_t{256} << 20;

// Kinds of frames.
constexpr char kHead = 'H';
constexpr char kNote = 'N';  // A head that holds until the machine is booted again: the list may lag behind it then.
constexpr char kIntent = 'I';
constexpr char kAcknowledged = 'A';
constexpr char kWritten = 'W';
constexpr char kClosed = 'C';

uint32_t Checksum(absl::string_view bytes) { return Crc32c(absl::MakeConstSpan(bytes.data(), bytes.size())); }

template <typename T>
void AppendInteger(std::string& bytes, T number) {
  bytes.append(reinterpret_cast<const char*>(&number), sizeof(number));
}
void AppendString(std::string& bytes, absl::string_view text) {
  AppendInteger(bytes, static_cast<uint32_t>(text.size()));
  bytes.append(text.data(), text.size());
}

// Takes pieces from the front; false, and stays false, when there is not enough.
class Parser {
 public:
  explicit Parser(absl::string_view bytes) : bytes_(bytes) {}
  template <typename T>
  bool Integer(T* number) {
    if (bytes_.size() < sizeof(T)) return ok_ = false;
    std::memcpy(number, bytes_.data(), sizeof(T));
    bytes_.remove_prefix(sizeof(T));
    return ok_;
  }
  bool String(std::string* text) {
    uint32_t size = 0;
    if (!Integer(&size) || bytes_.size() < size) return ok_ = false;
    text->assign(bytes_.data(), size);
    bytes_.remove_prefix(size);
    return ok_;
  }
  absl::string_view rest() const { return bytes_; }
  bool ok() const { return ok_; }

 private:
  absl::string_view bytes_;
  bool ok_ = true;
};

// The machine's present boot; empty where that cannot be known.
std::string Boot() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string boot;
  std::getline(file, boot);
  return boot;
}

absl::optional<std::string> Content(rocksdb::Env& env, const std::string& path) {
  std::string bytes;
  if (!rocksdb::ReadFileToString(&env, path, &bytes).ok()) return absl::nullopt;
  return bytes;
}

// The payloads of a file's whole frames. *damaged: something that is no frame comes before its end. A last frame that
// was cut is none: a write that did not end.
std::vector<std::string> Frames(absl::string_view bytes, bool* damaged) {
  std::vector<std::string> frames;
  Parser parser(bytes);
  while (!parser.rest().empty()) {
    uint32_t size = 0, checksum = 0;
    if (!parser.Integer(&size) || !parser.Integer(&checksum)) break;
    if (size == 0 || size > kMaxFrameBytes) {
      *damaged = true;
      break;
    }
    const absl::string_view rest = parser.rest();
    if (rest.size() < size) break;
    if (Checksum(rest.substr(0, size)) != checksum) {
      *damaged = true;
      break;
    }
    frames.emplace_back(rest.substr(0, size));
    parser = Parser(rest.substr(size));
  }
  return frames;
}

struct Intent {
  uint64_t number = 0;
  std::vector<JournalEdit> edits;
};

bool ParseIntent(absl::string_view payload, Intent* intent) {
  Parser parser(payload);
  uint32_t count = 0;
  if (!parser.Integer(&intent->number) || !parser.Integer(&count)) return false;
  for (uint32_t i = 0; i < count; ++i) {
    JournalEdit& edit = intent->edits.emplace_back();
    uint8_t kind = 0;
    if (!parser.Integer(&kind) || !parser.String(&edit.key)) return false;
    edit.kind = static_cast<JournalEdit::Kind>(kind);
    if (edit.kind == JournalEdit::Kind::kPut && !parser.Integer(&edit.seal)) return false;
    if (edit.kind == JournalEdit::Kind::kDeleteRange && !parser.String(&edit.end)) return false;
  }
  return parser.ok();
}

// What an acknowledged write made of the rows that the journal speaks of.
void Apply(const JournalEdit& edit, AcknowledgedRows& result) {
  if (edit.kind != JournalEdit::Kind::kDeleteRange) {
    AcknowledgedRows::Row& row = result.rows[edit.key];
    row.allowed.clear();
    row.acknowledged.reset();
    if (edit.kind == JournalEdit::Kind::kPut) row.acknowledged = edit.seal;
    return;
  }
  result.deleted.emplace_back(edit.key, edit.end);
  for (auto row = result.rows.lower_bound(edit.key); row != result.rows.end() && row->first < edit.end; ++row) {
    row->second.allowed.clear();
    row->second.acknowledged.reset();
  }
}

void Allow(const JournalEdit& edit, AcknowledgedRows& result) {
  if (edit.kind == JournalEdit::Kind::kDeleteRange) {
    result.maybe_deleted.emplace_back(edit.key, edit.end);
    return;
  }
  // A row that nothing acknowledged speaks of may be anything.
  const auto row = result.rows.find(edit.key);
  if (row == result.rows.end()) return;
  absl::optional<uint32_t> seal;
  if (edit.kind == JournalEdit::Kind::kPut) seal = edit.seal;
  row->second.allowed.insert(seal);
}

}  // namespace

bool AcknowledgedRows::Agrees(const std::string& key, absl::optional<uint32_t> stored) const {
  const auto row = rows.find(key);
  if (row == rows.end() || row->second.acknowledged == stored || row->second.allowed.count(stored) > 0) return true;
  return !stored.has_value() && std::any_of(maybe_deleted.begin(), maybe_deleted.end(), [&](const auto& range) {
    return range.first <= key && key < range.second;
  });
}

AckJournal::AckJournal(rocksdb::Env* env, std::string directory) : env_(env), directory_(std::move(directory)) {}

std::string AckJournal::Path(uint64_t number) const { return absl::StrCat(directory_, "/", kPrefix, number); }

std::vector<uint64_t> AckJournal::Numbers() const {
  std::vector<std::string> names;
  env_->GetChildren(directory_, &names).PermitUncheckedError();
  std::vector<uint64_t> numbers;
  for (const std::string& name : names) {
    uint64_t number = 0;
    if (absl::StartsWith(name, kPrefix) && absl::SimpleAtoi(absl::StripPrefix(name, kPrefix), &number)) {
      numbers.push_back(number);
    }
  }
  std::sort(numbers.begin(), numbers.end());
  return numbers;
}

std::string AckJournal::Manifest() const {
  std::string current = Content(*env_, directory_ + "/CURRENT").value_or("");
  if (!current.empty() && current.back() == '\n') current.pop_back();
  return current;
}

absl::Status AckJournal::CheckFiles(const std::string& name) const {
  const std::vector<uint64_t> numbers = Numbers();
  if (!env_->FileExists(directory_ + "/CURRENT").ok()) {
    // RocksDB would begin anew, and delete what it does not know.
    std::vector<std::string> files;
    env_->GetChildren(directory_, &files).PermitUncheckedError();
    for (const std::string& file : files) {
      // The last two: of the states, and of a repair that was broken off.
      if (!absl::StartsWith(file, kManifestPrefix) && !absl::EndsWith(file, ".sst") &&
          !absl::StartsWith(file, kPrefix) && file != "records" && !absl::StartsWith(file, ".repaired.")) {
        continue;
      }
      return absl::DataLossError(absl::StrCat(name, ": the file CURRENT is missing beside ", file));
    }
    return absl::OkStatus();
  }
  const std::string manifest = Manifest();
  // What cannot be read at present is no damage, and RocksDB says it.
  if (!manifest.empty() && (!absl::StartsWith(manifest, kManifestPrefix) ||
                            env_->FileExists(absl::StrCat(directory_, "/", manifest)).IsNotFound())) {
    return absl::DataLossError(
        absl::StrCat(name, ": the file CURRENT names ", PrintableKey(manifest), ", which is not there"));
  }
  const std::string boot = Boot();
  for (const uint64_t number : numbers) {
    bool damaged = false;
    const std::vector<std::string> frames = Frames(Content(*env_, Path(number)).value_or(""), &damaged);
    for (const std::string& frame : frames) {
      if (frame[0] != kHead && frame[0] != kNote) continue;
      Parser parser(absl::string_view(frame).substr(1));
      Head head;
      if (!parser.String(&head.boot) || !parser.String(&head.manifest) || !parser.Integer(&head.manifest_bytes) ||
          !parser.Integer(&head.manifest_crc32c) || head.manifest != manifest) {
        continue;
      }
      if (frame[0] == kNote && (boot.empty() || head.boot != boot)) continue;
      const std::string bytes = Content(*env_, directory_ + "/" + manifest).value_or("");
      if (bytes.size() < head.manifest_bytes) {
        return absl::DataLossError(absl::StrCat(name, ": its list of files, ", manifest, ", has ", bytes.size(),
                                                " bytes of at least ", head.manifest_bytes));
      }
      if (Checksum(absl::string_view(bytes).substr(0, head.manifest_bytes)) != head.manifest_crc32c) {
        return absl::DataLossError(absl::StrCat(name, ": its list of files, ", manifest, ", is damaged"));
      }
    }
  }
  return absl::OkStatus();
}

AcknowledgedRows AckJournal::Read() const {
  AcknowledgedRows result;
  const std::string boot = Boot();
  std::map<uint64_t, Intent> open;  // Intents not acknowledged.
  for (const uint64_t number : Numbers()) {
    const std::vector<std::string> frames = Frames(Content(*env_, Path(number)).value_or(""), &result.damaged);
    for (const std::string& frame : frames) {
      const absl::string_view payload = absl::string_view(frame).substr(1);
      if (frame[0] == kHead) {
        std::string head_boot;
        if (!Parser(payload).String(&head_boot) || head_boot.empty() || head_boot != boot) return AcknowledgedRows();
      } else if (frame[0] == kIntent) {
        Intent intent;
        if (ParseIntent(payload, &intent)) open[intent.number] = std::move(intent);
      } else if (frame[0] == kAcknowledged) {
        uint64_t acknowledged = 0;
        Parser(payload).Integer(&acknowledged);
        const auto intent = open.find(acknowledged);
        if (intent == open.end()) continue;
        for (const JournalEdit& edit : intent->second.edits) Apply(edit, result);
        // Of the same rows, earlier intents that were never acknowledged have been overtaken.
        open.erase(intent);
      }
    }
  }
  for (const auto& [number, intent] : open) {
    for (const JournalEdit& edit : intent.edits) Allow(edit, result);
  }
  return result;
}

absl::optional<uint64_t> AckJournal::ReadWritten() const {
  absl::optional<uint64_t> written;
  const std::string boot = Boot();
  const std::vector<uint64_t> numbers = Numbers();
  for (const uint64_t number : numbers) {
    bool damaged = false, same_boot = false;
    const std::vector<std::string> frames = Frames(Content(*env_, Path(number)).value_or(""), &damaged);
    if (damaged) return absl::nullopt;
    for (const std::string& frame : frames) {
      Parser parser(absl::string_view(frame).substr(1));
      std::string head_boot;
      if (frame[0] == kHead && parser.String(&head_boot)) same_boot = !boot.empty() && head_boot == boot;
      const bool is_last = number == numbers.back() && &frame == &frames.back();
      uint64_t sequence = 0;
      const bool counts = (frame[0] == kWritten && same_boot) || (frame[0] == kClosed && (same_boot || is_last));
      if (counts && parser.Integer(&sequence)) written = std::max(sequence, written.value_or(0));
    }
  }
  return written;
}

absl::Status AckJournal::Open() {
  const std::vector<uint64_t> numbers = Numbers();
  const uint64_t number = std::max(number_, numbers.empty() ? 0 : numbers.back()) + 1;
  std::unique_ptr<rocksdb::WritableFile> file;
  RWKV_RETURN_IF_ERROR(FromRocksdbStatus(env_->NewWritableFile(Path(number), &file, rocksdb::EnvOptions()),
                                         absl::StrCat("cannot make ", Path(number))));
  file_ = std::move(file);
  number_ = number;
  bytes_ = 0;
  next_intent_ = std::max(next_intent_, number << 32);  // So that no two processes gave one number.
  return AppendHead(kHead);
}

absl::Status AckJournal::AppendHead(char kind) {
  const std::string manifest = Manifest();
  const std::string content = Content(*env_, directory_ + "/" + manifest).value_or("");
  std::string head(1, kind);
  AppendString(head, Boot());
  AppendString(head, manifest);
  AppendInteger(head, static_cast<uint64_t>(content.size()));
  AppendInteger(head, Checksum(content));
  RWKV_RETURN_IF_ERROR(Append(head));
  noted_manifest_ = manifest;
  noted_bytes_ = content.size();
  return absl::OkStatus();
}

void AckJournal::NoteFiles() {
  absl::MutexLock lock(&mu_);
  if (file_ == nullptr) return;
  const std::string manifest = Manifest();
  uint64_t bytes = 0;
  if (!env_->GetFileSize(absl::StrCat(directory_, "/", manifest), &bytes).ok()) return;
  if (manifest == noted_manifest_ && bytes == noted_bytes_) return;
  AppendHead(kNote).IgnoreError();  // Without it only less is known.
}

absl::Status AckJournal::Rotate() {
  absl::MutexLock lock(&mu_);
  file_.reset();
  return Open();
}

void AckJournal::DropOlder() {
  absl::MutexLock lock(&mu_);
  // The list of files as it is with what the older journals speak of.
  if (file_ == nullptr || !AppendHead(kHead).ok()) return;
  for (const uint64_t number : Numbers()) {
    if (number < number_) env_->DeleteFile(Path(number)).PermitUncheckedError();
  }
  if (const absl::Status synced = SyncDirectory(*env_, directory_); !synced.ok()) {
    common::LogWarning("journal_not_synced", {{"data_dir", directory_}, {"error", synced}});
  }
}

absl::Status AckJournal::Append(absl::string_view payload) {
  if (file_ == nullptr) return absl::UnavailableError("the journal is not open");
  std::string frame;
  frame.reserve(8 + payload.size());
  AppendInteger(frame, static_cast<uint32_t>(payload.size()));
  AppendInteger(frame, Checksum(payload));
  frame.append(payload.data(), payload.size());
  rocksdb::Status status = file_->Append(frame);
  if (status.ok()) status = file_->Flush();
  if (!status.ok()) file_.reset();  // It may end in half a frame: go on in another.
  bytes_ += frame.size();
  return FromRocksdbStatus(status, absl::StrCat("cannot write to ", Path(number_)));
}

absl::StatusOr<uint64_t> AckJournal::Intend(const std::vector<JournalEdit>& edits) {
  std::string payload(1, kIntent);
  AppendInteger(payload, uint64_t{0});
  AppendInteger(payload, static_cast<uint32_t>(edits.size()));
  for (const JournalEdit& edit : edits) {
    payload.push_back(static_cast<char>(edit.kind));
    AppendString(payload, edit.key);
    if (edit.kind == JournalEdit::Kind::kPut) AppendInteger(payload, edit.seal);
    if (edit.kind == JournalEdit::Kind::kDeleteRange) AppendString(payload, edit.end);
  }
  absl::MutexLock lock(&mu_);
  if (file_ == nullptr) RWKV_RETURN_IF_ERROR(Open());
  const uint64_t intent = next_intent_++;
  std::memcpy(payload.data() + 1, &intent, sizeof(intent));
  RWKV_RETURN_IF_ERROR(Append(payload));
  return intent;
}

void AckJournal::Acknowledge(uint64_t intent) {
  std::string payload(1, kAcknowledged);
  AppendInteger(payload, intent);
  absl::MutexLock lock(&mu_);
  // Without it only less is known of what must be there.
  Append(payload).IgnoreError();
}

void AckJournal::NoteWritten(uint64_t sequence, bool closed) {
  std::string payload(1, closed ? kClosed : kWritten);
  AppendInteger(payload, sequence);
  absl::MutexLock lock(&mu_);
  // Without it only less is known of what must be there.
  if (file_ == nullptr) Open().IgnoreError();
  Append(payload).IgnoreError();
}

uint64_t AckJournal::bytes() const {
  absl::MutexLock lock(&mu_);
  return bytes_;
}

}  // namespace rwkv::state_store
