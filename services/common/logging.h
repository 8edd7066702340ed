// Structured logs: one line per change of state, to standard error.
//   2026-11-22T06:00:01.123Z INFO worker-0 stage_ready layers=0:6 model=tiny
// Time is UTC, then severity, process, event, and key=value fields. Nothing per token, never a user's text.
#pragma once

#include <initializer_list>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace rwkv::common {

enum class Severity { kInfo, kWarning, kError };

// The value of a field. Numbers and booleans become text; text that is empty or holds blanks, quotes, '=' or control
// characters is quoted, with \" \\ \n \r \t and \xHH escapes, so that a line stays a line.
class LogValue {
 public:
  LogValue(absl::string_view text);                                                         // NOLINT: implicit
  LogValue(const char* text) : LogValue(absl::string_view(text)) {}                         // NOLINT: implicit
  LogValue(const std::string& text) : LogValue(absl::string_view(text)) {}                  // NOLINT: implicit
  LogValue(const absl::Status& status) : LogValue(absl::string_view(status.ToString())) {}  // NOLINT: implicit
  LogValue(bool value);                                                                     // NOLINT: implicit
  LogValue(int value) : LogValue(static_cast<long long>(value)) {}                          // NOLINT: implicit
  LogValue(long value) : LogValue(static_cast<long long>(value)) {}                         // NOLINT: implicit
  LogValue(unsigned value) : LogValue(static_cast<unsigned long long>(value)) {}            // NOLINT: implicit
  LogValue(unsigned long value) : LogValue(static_cast<unsigned long long>(value)) {}       // NOLINT: implicit
  LogValue(long long value);                                                                // NOLINT: implicit
  LogValue(unsigned long long value);                                                       // NOLINT: implicit
  LogValue(double value);                                                                   // NOLINT: implicit

  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

using LogFields = std::initializer_list<std::pair<absl::string_view, LogValue>>;

// Names this process in every later line. May be called again (main() first knows only the binary's name, later
// --name). Before the first call the name is "-". Thread-safe.
void InitLogging(absl::string_view process);

// Writes one line and flushes it. `event` and keys are snake_case and constant. A line is cut to 8 KiB. Thread-safe;
// never fails (what cannot be written is dropped).
void Log(Severity severity, absl::string_view event, LogFields fields = {});

inline void LogInfo(absl::string_view event, LogFields fields = {}) { Log(Severity::kInfo, event, fields); }
inline void LogWarning(absl::string_view event, LogFields fields = {}) { Log(Severity::kWarning, event, fields); }
inline void LogError(absl::string_view event, LogFields fields = {}) { Log(Severity::kError, event, fields); }

// Nothing is written while muted: for a process that plays many others (tests/simulator). Thread-safe.
void MuteLog(bool muted);

// The line without its time, as Log() writes it: "INFO worker-0 stage_ready layers=0:6".
std::string FormatLogLine(Severity severity, absl::string_view process, absl::string_view event, LogFields fields);

}  // namespace rwkv::common
