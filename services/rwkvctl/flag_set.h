// The flags of one command. Unlike Abseil's, they belong to a command, may stand before or after its name, and a test
// can have many of them.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace rwkv::rwkvctl {

// Spelled `--name value` or `--name=value`; a bool `--name`, `--name=true` or `--name=false`. Given twice, the last one
// holds, but for those that collect. Setters are called by Parse, in the order of the arguments. What they set outlives
// the FlagSet.
class FlagSet {
 public:
  // `placeholder` stands for the value in the help: "N".
  void AddString(absl::string_view name, absl::string_view placeholder, absl::string_view help,
                 std::function<absl::Status(const std::string&)> set);
  void AddString(absl::string_view name, absl::string_view placeholder, absl::string_view help, std::string* value);
  void AddInt32(absl::string_view name, absl::string_view help, std::function<void(int32_t)> set);
  void AddUint32(absl::string_view name, absl::string_view help, std::function<void(uint32_t)> set);
  void AddUint64(absl::string_view name, absl::string_view help, std::function<void(uint64_t)> set);
  void AddFloat(absl::string_view name, absl::string_view help, std::function<void(float)> set);  // Finite.
  void AddBool(absl::string_view name, absl::string_view help, std::function<void(bool)> set);
  void AddBool(absl::string_view name, absl::string_view help, bool* value);

  bool Has(absl::string_view name) const;
  bool TakesValue(absl::string_view name) const;  // False for bools and unknown names.

  // Returns the arguments that are not flags; after "--" none is. kInvalidArgument naming the flag: unknown, without a
  // value, or with a value of the wrong form or range.
  absl::StatusOr<std::vector<std::string>> Parse(const std::vector<std::string>& arguments) const;

  std::string Help() const;  // A line or more per flag, in the order they were added.

 private:
  struct Flag {
    std::string name;
    std::string placeholder;  // Empty: a bool.
    std::string help;
    std::function<absl::Status(const std::string&)> set;
  };
  const Flag* Find(absl::string_view name) const;

  std::vector<Flag> flags_;
};

// "--name" or "--name=value" (also with one dash): the name, or empty if `argument` is not a flag. A negative number
// and "-" (standard input) are not.
absl::string_view FlagName(absl::string_view argument);

// Decimal, without sign, blanks or rest; kInvalidArgument or kOutOfRange with the text.
absl::StatusOr<uint64_t> ParseUint64(absl::string_view text, uint64_t max = UINT64_MAX);

// "1,2,3" or "1 2 3"; empty is none.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text);

}  // namespace rwkv::rwkvctl
