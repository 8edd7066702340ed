#include "services/rwkvctl/flag_set.h"

#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace rwkv::rwkvctl {
namespace {

absl::StatusOr<int32_t> ParseInt32(absl::string_view text) {
  const bool negative = !text.empty() && text[0] == '-';
  const uint64_t max = uint64_t{std::numeric_limits<int32_t>::max()} + negative;
  absl::StatusOr<uint64_t> magnitude = ParseUint64(negative ? text.substr(1) : text, max);
  if (!magnitude.ok())
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a whole number of 32 bits"));
  const auto value = static_cast<int64_t>(*magnitude);
  return static_cast<int32_t>(negative ? -value : value);
}

absl::StatusOr<float> ParseFloat(absl::string_view text) {
  float value = 0;
  const bool blank = !text.empty() && (absl::ascii_isspace(text.front()) || absl::ascii_isspace(text.back()));
  if (blank || !absl::SimpleAtof(text, &value) || !std::isfinite(value)) {
    return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a finite number"));
  }
  return value;
}

// A setter of text, from a parser and a setter of what it makes.
template <typename T>
std::function<absl::Status(const std::string&)> Parsed(absl::StatusOr<T> (*parse)(absl::string_view),
                                                       std::function<void(T)> set) {
  return [parse, set = std::move(set)](const std::string& text) {
    absl::StatusOr<T> value = parse(text);
    if (value.ok()) set(*value);
    return value.status();
  };
}

}  // namespace

absl::string_view FlagName(absl::string_view argument) {
  if (argument.size() < 2 || argument[0] != '-') return {};
  argument.remove_prefix(argument[1] == '-' ? 2 : 1);
  if (argument.empty() || !absl::ascii_isalpha(argument[0])) return {};
  return argument.substr(0, argument.find('='));
}

absl::StatusOr<uint64_t> ParseUint64(absl::string_view text, uint64_t max) {
  uint64_t value = 0;
  bool digits = !text.empty();
  for (char c : text) digits = digits && absl::ascii_isdigit(c);
  if (!digits) return absl::InvalidArgumentError(absl::StrCat("\"", text, "\" is not a whole number of 0 or more"));
  if (!absl::SimpleAtoi(text, &value) || value > max) {
    return absl::OutOfRangeError(absl::StrCat("\"", text, "\" is above ", max));
  }
  return value;
}

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text) {
  std::vector<uint32_t> ids;
  text = absl::StripAsciiWhitespace(text);
  if (text.empty()) return ids;
  // A comma, blanks, or a comma among blanks parts two ids.
  for (absl::string_view group : absl::StrSplit(text, ',')) {
    size_t in_group = 0;
    for (absl::string_view id : absl::StrSplit(group, absl::ByAnyChar(" \t\r\n"), absl::SkipEmpty())) {
      absl::StatusOr<uint64_t> value = ParseUint64(id, std::numeric_limits<uint32_t>::max());
      if (!value.ok()) {
        return absl::InvalidArgumentError(absl::StrCat("token id ", ids.size(), ": ", value.status().message()));
      }
      ids.push_back(static_cast<uint32_t>(*value));
      ++in_group;
    }
    if (in_group == 0) return absl::InvalidArgumentError(absl::StrCat("token id ", ids.size(), " is empty"));
  }
  return ids;
}

void FlagSet::AddString(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                        std::function<absl::Status(const std::string&)> set) {
  flags_.push_back({std::string(name), std::string(placeholder), std::string(help), std::move(set)});
}

void FlagSet::AddString(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                        std::string* value) {
  AddString(name, placeholder, help, [value](const std::string& text) {
    *value = text;
    return absl::OkStatus();
  });
}

void FlagSet::AddInt32(absl::string_view name, absl::string_view help, std::function<void(int32_t)> set) {
  AddString(name, "N", help, Parsed<int32_t>(&ParseInt32, std::move(set)));
}

void FlagSet::AddUint32(absl::string_view name, absl::string_view help, std::function<void(uint32_t)> set) {
  AddString(name, "N", help, [set = std::move(set)](const std::string& text) {
    absl::StatusOr<uint64_t> value = ParseUint64(text, std::numeric_limits<uint32_t>::max());
    if (value.ok()) set(static_cast<uint32_t>(*value));
    return value.status();
  });
}

void FlagSet::AddUint64(absl::string_view name, absl::string_view help, std::function<void(uint64_t)> set) {
  AddString(name, "N", help, [set = std::move(set)](const std::string& text) {
    absl::StatusOr<uint64_t> value = ParseUint64(text);
    if (value.ok()) set(*value);
    return value.status();
  });
}

void FlagSet::AddFloat(absl::string_view name, absl::string_view help, std::function<void(float)> set) {
  AddString(name, "X", help, Parsed<float>(&ParseFloat, std::move(set)));
}

void FlagSet::AddBool(absl::string_view name, absl::string_view help, std::function<void(bool)> set) {
  AddString(name, "", help, [set = std::move(set)](const std::string& text) {
    if (text != "true" && text != "false") return absl::InvalidArgumentError("is true or false");
    set(text == "true");
    return absl::OkStatus();
  });
}

void FlagSet::AddBool(absl::string_view name, absl::string_view help, bool* value) {
  AddBool(name, help, [value](bool given) { *value = given; });
}

const FlagSet::Flag* FlagSet::Find(absl::string_view name) const {
  for (const Flag& flag : flags_) {
    if (flag.name == name) return &flag;
  }
  return nullptr;
}

bool FlagSet::Has(absl::string_view name) const { return Find(name) != nullptr; }

bool FlagSet::TakesValue(absl::string_view name) const {
  const Flag* flag = Find(name);
  return flag != nullptr && !flag->placeholder.empty();
}

absl::StatusOr<std::vector<std::string>> FlagSet::Parse(const std::vector<std::string>& arguments) const {
  std::vector<std::string> positional;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument == "--") {
      positional.insert(positional.end(), arguments.begin() + static_cast<int64_t>(i) + 1, arguments.end());
      break;
    }
    const absl::string_view name = FlagName(argument);
    if (name.empty()) {
      positional.push_back(argument);
      continue;
    }
    const Flag* flag = Find(name);
    if (flag == nullptr) return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name));
    const size_t equals = argument.find('=');
    std::string value = "true";
    if (equals != std::string::npos) {
      value = argument.substr(equals + 1);
    } else if (!flag->placeholder.empty()) {
      if (++i == arguments.size()) return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value"));
      value = arguments[i];
    }
    if (absl::Status status = flag->set(value); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": ", status.message()));
    }
  }
  return positional;
}

std::string FlagSet::Help() const {
  constexpr size_t kColumn = 26;
  std::string help;
  for (const Flag& flag : flags_) {
    std::string left = absl::StrCat("  --", flag.name, flag.placeholder.empty() ? "" : " ", flag.placeholder);
    left.resize(std::max(left.size() + 1, kColumn), ' ');
    absl::StrAppend(&help, left, flag.help, "\n");
  }
  return help;
}

}  // namespace rwkv::rwkvctl
