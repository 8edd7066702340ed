#include "kernels/cuda/testing/ptx.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/status_macros.h"
#include "kernels/cuda/testing/ptx_instructions.h"

namespace rwkv::kernels::cuda::ptx {

struct Entry {
  struct Parameter {
    int64_t offset, bytes;
  };
  std::vector<Parameter> parameters;
  int64_t parameter_bytes = 0;
  std::vector<Instruction> instructions;
  std::vector<uint64_t> registers;  // At a thread's start: constants, and rubbish.
  // Where a thread finds who it is: %tid.x, %ntid.x, %ctaid.x, %ctaid.y.
  int special[4] = {-1, -1, -1, -1};
};

namespace {

constexpr absl::string_view kSpecial[] = {"%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y"};
constexpr uint64_t kRubbish = 0xdeadbeefdeadbeef;

int64_t RoundUp(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// The text, statement by statement: what ends with ";" or ":", braces around statements, and what stands before them.
class Reader {
 public:
  explicit Reader(absl::string_view text) : text_(text) {}

  // False at the end. Comments are left out.
  bool Next(std::string& statement, char& end) {
    statement.clear();
    int inside = 0;  // Of a vector or a list.
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '/' && text_.substr(at_, 2) == "//") {
        at_ = std::min(text_.find('\n', at_), text_.size()) - 1;
        continue;
      }
      if (c == '\n') ++line_;
      const bool is_blank = statement.empty();
      if (absl::ascii_isspace(c) && is_blank) continue;
      if (is_blank) begin_ = line_;
      if (inside == 0 && (c == ';' || c == ':' || ((c == '{' || c == '}') && (is_blank || IsHeader(statement))))) {
        ++at_;
        end = c;
        return true;
      }
      if (c == '{' || c == '(' || c == '[') ++inside;
      if (c == '}' || c == ')' || c == ']') --inside;
      statement.push_back(absl::ascii_isspace(c) ? ' ' : c);
    }
    return false;
  }
  int line() const { return begin_; }

 private:
  static bool IsHeader(absl::string_view statement) { return statement[0] == '.'; }

  const absl::string_view text_;
  size_t at_ = 0;
  int line_ = 1;
  int begin_ = 1;
};

// One kernel.
class Parser {
 public:
  // "(.param .align 8 .b8 name[32], .param .u64 name)"
  absl::Status AddParameters(absl::string_view list) {
    for (absl::string_view text : absl::StrSplit(list, ',', absl::SkipWhitespace())) {
      const std::vector<std::string> words = absl::StrSplit(text, ' ', absl::SkipEmpty());
      const bool is_array = words.size() == 5 && words[1] == ".align";
      int64_t bytes = 0, alignment = 0;
      absl::string_view name;
      if (!words.empty()) name = words.back();
      if (is_array) {
        const size_t bracket = name.find('[');
        if (!absl::SimpleAtoi(words[2], &alignment) || bracket == absl::string_view::npos ||
            !absl::SimpleAtoi(absl::StripSuffix(name.substr(bracket + 1), "]"), &bytes)) {
          return absl::InvalidArgumentError(absl::StrCat("parameter ", text));
        }
        name = name.substr(0, bracket);
      } else if (words.size() != 3 || words[0] != ".param" || !absl::SimpleAtoi(words[1].substr(2), &bytes)) {
        return absl::InvalidArgumentError(absl::StrCat("parameter ", text));
      } else {
        bytes = alignment = bytes / 8;
      }
      entry_->parameter_bytes = RoundUp(entry_->parameter_bytes, alignment);
      symbols_[std::string(name)] = entry_->parameter_bytes;
      entry_->parameters.push_back({entry_->parameter_bytes, bytes});
      entry_->parameter_bytes += bytes;
    }
    return absl::OkStatus();
  }

  // Memory of the block: where it begins.
  void AddShared(const std::string& name) { symbols_[name] = 0; }

  void AddLabel(absl::string_view name) { labels_[std::string(name)] = static_cast<int>(entry_->instructions.size()); }

  absl::Status AddInstruction(absl::string_view text, int line) {
    Instruction instruction;
    instruction.line = line;
    if (absl::ConsumePrefix(&text, "@")) {
      instruction.guard_is_not = absl::ConsumePrefix(&text, "!");
      const size_t end = text.find(' ');
      instruction.guard = Register(text.substr(0, end));
      text = absl::StripLeadingAsciiWhitespace(text.substr(end));
    }
    const size_t end = std::min(text.find(' '), text.size());
    std::string name(text.substr(0, end));
    absl::string_view operands = text.substr(end);
    // Halves of a register as a vector: an instruction of its own, whatever the text calls it.
    if (absl::StartsWith(name, "mov.b") && absl::StrContains(operands, "{")) {
      const bool unpacks = operands.find('{') < operands.find(',');
      name = absl::StrCat(unpacks ? "unpack" : "pack", name.substr(3));
    }
    int count = 0;
    RWKV_RETURN_IF_ERROR(SetMeaning(name, instruction, count));
    if (absl::StartsWith(name, "bra")) {
      branches_.emplace_back(entry_->instructions.size(), std::string(absl::StripAsciiWhitespace(operands)));
      operands = "";
    }
    int at = 0;
    // Vectors and addresses are as good as lists: the order says what is what.
    for (absl::string_view operand : absl::StrSplit(operands, absl::ByAnyChar(",|{}"), absl::SkipWhitespace())) {
      operand = absl::StripAsciiWhitespace(operand);
      if (at == kMostOperands) return absl::UnimplementedError(absl::StrCat(name, ": more operands"));
      if (absl::ConsumePrefix(&operand, "[")) {
        operand = absl::StripSuffix(operand, "]");
        const size_t plus = operand.find('+');
        if (plus != absl::string_view::npos && !absl::SimpleAtoi(operand.substr(plus + 1), &instruction.offset)) {
          return absl::UnimplementedError(absl::StrCat("address ", operand));
        }
        operand = operand.substr(0, plus);
      }
      RWKV_ASSIGN_OR_RETURN(instruction.registers[at++], Operand(operand));
    }
    if (at != count) return absl::UnimplementedError(absl::StrCat(name, " of ", at, " operands, not ", count));
    entry_->instructions.push_back(instruction);
    return absl::OkStatus();
  }

  absl::StatusOr<std::shared_ptr<const Entry>> Finish() {
    for (const auto& [at, label] : branches_) {
      const auto it = labels_.find(label);
      if (it == labels_.end()) return absl::InvalidArgumentError(absl::StrCat("a branch to ", label));
      entry_->instructions[at].target = it->second;
    }
    RWKV_RETURN_IF_ERROR(AddInstruction("ret", 0));
    for (int i = 0; i < 4; ++i) {
      const auto it = registers_.find(std::string(kSpecial[i]));
      if (it != registers_.end()) entry_->special[i] = it->second;
    }
    return std::shared_ptr<const Entry>(std::move(entry_));
  }

 private:
  int Register(absl::string_view name) {
    const auto [it, is_new] = registers_.emplace(std::string(name), static_cast<int>(entry_->registers.size()));
    if (is_new) entry_->registers.push_back(kRubbish);
    return it->second;
  }

  absl::StatusOr<int> Operand(absl::string_view text) {
    if (absl::StartsWith(text, "%")) return Register(text);
    uint64_t value = 0;
    int64_t number = 0;
    if (const auto it = symbols_.find(std::string(text)); it != symbols_.end()) {
      value = static_cast<uint64_t>(it->second);
    } else if (absl::StartsWith(text, "0f") || absl::StartsWith(text, "0d")) {
      if (!absl::SimpleHexAtoi(text.substr(2), &value)) return absl::InvalidArgumentError(text);
    } else if (absl::SimpleAtoi(text, &number)) {
      value = static_cast<uint64_t>(number);
    } else if (!absl::SimpleAtoi(text, &value)) {
      return absl::UnimplementedError(absl::StrCat("operand ", text));
    }
    const int at = Register(absl::StrCat("constant ", value));
    entry_->registers[at] = value;
    return at;
  }

  std::shared_ptr<Entry> entry_ = std::make_shared<Entry>();
  std::map<std::string, int> registers_;
  std::map<std::string, int64_t> symbols_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<size_t, std::string>> branches_;
};

// Of the threads of the one block that runs in this process.
uint64_t* RegistersOfThread(const Entry& entry) {
  static auto* const memory = new std::vector<uint64_t>;
  const size_t size = entry.registers.size();
  const size_t all = size * static_cast<size_t>(emulation::BlockThreads());
  if (memory->size() < all) memory->resize(all);  // By the first of the block.
  uint64_t* const mine = memory->data() + size * static_cast<size_t>(emulation::ThreadIndex());
  std::copy(entry.registers.begin(), entry.registers.end(), mine);
  const int is[] = {emulation::ThreadIndex(), emulation::BlockThreads(), emulation::BlockIndexX(),
                    emulation::BlockIndexY()};
  for (int i = 0; i < 4; ++i) {
    if (entry.special[i] >= 0) mine[entry.special[i]] = static_cast<uint32_t>(is[i]);
  }
  return mine;
}

void RunEntry(const Entry& entry, const char* parameters) {
  Thread thread = {RegistersOfThread(entry), parameters, entry.parameter_bytes, 0};
  while (thread.next >= 0) {
    const Instruction& instruction = entry.instructions[static_cast<size_t>(thread.next++)];
    if (instruction.guard >= 0 && (thread.registers[instruction.guard] != 0) == instruction.guard_is_not) continue;
    instruction.run(thread, instruction);
  }
}

absl::Status Annotate(const absl::Status& status, int line) {
  return status.ok() ? status : absl::Status(status.code(), absl::StrCat("PTX, line ", line, ": ", status.message()));
}

}  // namespace

absl::StatusOr<std::map<std::string, std::shared_ptr<const Entry>>> Parse(absl::string_view text) {
  std::map<std::string, std::shared_ptr<const Entry>> entries;
  std::vector<std::string> shared;
  Reader reader(text);
  std::string statement;
  char end = 0;
  std::string name;
  std::unique_ptr<Parser> parser;
  int depth = 0;
  while (reader.Next(statement, end)) {
    const int line = reader.line();
    const size_t entry = statement.find(".entry ");
    if (end == '{' && depth == 0) {
      const size_t open = statement.find('(');
      const size_t close = statement.rfind(')');
      if (entry == std::string::npos || open == std::string::npos || close == std::string::npos) {
        return Annotate(absl::InvalidArgumentError(statement), line);
      }
      name = statement.substr(entry + 7, open - entry - 7);
      parser = std::make_unique<Parser>();
      for (const std::string& memory : shared) parser->AddShared(memory);
      RWKV_RETURN_IF_ERROR(
          Annotate(parser->AddParameters(absl::string_view(statement).substr(open + 1, close - open - 1)), line));
      ++depth;
    } else if (end == '{') {
      ++depth;
    } else if (end == '}') {
      if (--depth > 0) continue;
      RWKV_ASSIGN_OR_RETURN(entries[name], parser->Finish());
      parser = nullptr;
    } else if (parser == nullptr) {
      const size_t at = statement.find(".extern .shared ");
      if (at == std::string::npos) return Annotate(absl::UnimplementedError(statement), line);
      shared.push_back(statement.substr(statement.rfind(' ') + 1));
      shared.back() = std::string(absl::StripSuffix(shared.back(), "[]"));
    } else if (end == ':') {
      parser->AddLabel(statement);
    } else if (absl::StartsWith(statement, ".reg ") || absl::StartsWith(statement, ".pragma ")) {
      continue;
    } else {
      RWKV_RETURN_IF_ERROR(Annotate(parser->AddInstruction(statement, line), line));
    }
  }
  if (parser != nullptr || !absl::StrContains(text, ".version ")) return absl::InvalidArgumentError("half of a text");
  return entries;
}

emulation::Body Bind(std::shared_ptr<const Entry> entry, void* const* arguments) {
  emulation::Body body;
  body.argument_bytes = entry->parameter_bytes;
  body.arguments = std::shared_ptr<void>(std::calloc(1, static_cast<size_t>(entry->parameter_bytes) + 8), std::free);
  auto* const copies = static_cast<char*>(body.arguments.get());
  for (size_t i = 0; i < entry->parameters.size(); ++i) {
    std::memcpy(copies + entry->parameters[i].offset, arguments[i], static_cast<size_t>(entry->parameters[i].bytes));
  }
  body.run = [entry = std::move(entry), copies] { RunEntry(*entry, copies); };
  return body;
}

}  // namespace rwkv::kernels::cuda::ptx
