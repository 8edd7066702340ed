#include "services/common/logging.h"

#include <atomic>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "spdlog/logger.h"
#include "spdlog/pattern_formatter.h"
#include "spdlog/sinks/stdout_sinks.h"

namespace rwkv::common {
namespace {

constexpr size_t kMaxLineBytes = 8192;

std::atomic<bool> is_muted{false};

struct Logger {
  Logger() : spdlog("rwkv", std::make_shared<spdlog::sinks::stderr_sink_mt>()) {
    spdlog.set_formatter(
        std::make_unique<spdlog::pattern_formatter>("%Y-%m-%dT%H:%M:%S.%eZ %v", spdlog::pattern_time_type::utc));
    spdlog.set_level(spdlog::level::info);
    spdlog.flush_on(spdlog::level::info);
  }

  std::string process_name() ABSL_LOCKS_EXCLUDED(mu) {
    absl::MutexLock lock(&mu);
    return process;
  }

  absl::Mutex mu;
  std::string process ABSL_GUARDED_BY(mu) = "-";
  spdlog::logger spdlog;
};

// Never destroyed: threads may log while the process exits.
Logger& GetLogger() {
  static Logger* const logger = new Logger;
  return *logger;
}

const char* SeverityName(Severity severity) {
  switch (severity) {
    case Severity::kInfo:
      return "INFO";
    case Severity::kWarning:
      return "WARNING";
    case Severity::kError:
      return "ERROR";
  }
  return "ERROR";
}

spdlog::level::level_enum SpdlogLevel(Severity severity) {
  switch (severity) {
    case Severity::kInfo:
      return spdlog::level::info;
    case Severity::kWarning:
      return spdlog::level::warn;
    case Severity::kError:
      return spdlog::level::err;
  }
  return spdlog::level::err;
}

bool NeedsQuotes(absl::string_view text) {
  if (text.empty()) return true;
  for (const unsigned char c : text) {
    if (c <= ' ' || c == '"' || c == '\\' || c == '=' || c == 0x7f) return true;
  }
  return false;
}

std::string Quote(absl::string_view text) {
  std::string out = "\"";
  for (const unsigned char c : text) {
    switch (c) {
      case '"':
        out += "\\\"";
        break;
      case '\\':
        out += "\\\\";
        break;
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      default:
        if (c < ' ' || c == 0x7f) {
          absl::StrAppendFormat(&out, "\\x%02x", c);
        } else {
          out += static_cast<char>(c);
        }
    }
  }
  out += '"';
  return out;
}

}  // namespace

LogValue::LogValue(absl::string_view text) : text_(NeedsQuotes(text) ? Quote(text) : std::string(text)) {}
LogValue::LogValue(bool value) : text_(value ? "true" : "false") {}
LogValue::LogValue(long long value) : text_(absl::StrCat(value)) {}
LogValue::LogValue(unsigned long long value) : text_(absl::StrCat(value)) {}
LogValue::LogValue(double value) : text_(absl::StrCat(value)) {}

void InitLogging(absl::string_view process) {
  Logger& logger = GetLogger();
  absl::MutexLock lock(&logger.mu);
  logger.process = LogValue(process).text();
}

void MuteLog(bool muted) { is_muted = muted; }

void Log(Severity severity, absl::string_view event, LogFields fields) {
  if (is_muted) return;
  Logger& logger = GetLogger();
  const std::string line = FormatLogLine(severity, logger.process_name(), event, fields);
  logger.spdlog.log(SpdlogLevel(severity), spdlog::string_view_t(line.data(), line.size()));
}

std::string FormatLogLine(Severity severity, absl::string_view process, absl::string_view event, LogFields fields) {
  std::string line = absl::StrCat(SeverityName(severity), " ", process, " ", event);
  for (const auto& [key, value] : fields) absl::StrAppend(&line, " ", key, "=", value.text());
  if (line.size() > kMaxLineBytes) {
    line.resize(kMaxLineBytes - 3);
    line += "...";
  }
  return line;
}

}  // namespace rwkv::common
