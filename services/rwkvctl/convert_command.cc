#include "services/rwkvctl/convert_command.h"

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/checkpoint.h"
#include "services/checkpoint/model_config.h"
#include "services/rwkvctl/conversion.h"
#include "services/rwkvctl/output_file.h"
#include "services/rwkvctl/safetensors_writer.h"

namespace rwkv::rwkvctl {
namespace {

using checkpoint::Checkpoint;
using checkpoint::ModelConfig;

constexpr int64_t kLargeBytes = int64_t{256} << 20;  // From here on progress is told.

// Lines of "ID LITERAL LENGTH" from id 1 on, as BlinkDL's rwkv_vocab_v20230424.txt; every byte escaped, which the
// format allows. Ids at the end that stand for no text are left out.
absl::StatusOr<std::string> WorldVocabulary(absl::Span<const std::string> tokens) {
  size_t end = tokens.size();
  while (end > 0 && tokens[end - 1].empty()) --end;
  std::string text;
  for (size_t id = 1; id < end; ++id) {
    if (tokens[id].empty()) {
      return absl::FailedPreconditionError(
          absl::StrCat("token ", id, " stands for no text, which a vocabulary in World format cannot say"));
    }
    absl::StrAppend(&text, id, " b'");
    for (const char byte : tokens[id]) {
      absl::StrAppend(&text, "\\x", absl::Hex(static_cast<unsigned char>(byte), absl::kZeroPad2));
    }
    absl::StrAppend(&text, "' ", tokens[id].size(), "\n");
  }
  return text;
}

class ConvertCommand : public Command {
 public:
  absl::string_view name() const override { return "convert"; }
  absl::string_view arguments() const override { return "IN OUT.safetensors"; }
  absl::string_view summary() const override { return "writes a checkpoint as .safetensors in a chosen precision"; }
  absl::string_view details() const override {
    return "IN is any file that `rwkvctl inspect` knows. OUT has the original tensor names, is written whole or not "
           "at\n"
           "all, and loads like any other model. int8 and int4 hold the large matrices in groups of 64 that share a\n"
           "scale (names X, X.scale, X.min); embedding, norms, vectors and low-rank factors keep their type. No "
           "router\n"
           "is asked.\n";
  }
  bool needs_router() const override { return false; }

  void AddFlags(FlagSet& flags) override {
    flags.AddString("dtype", "fp32|bf16|fp16|int8|int4", "precision of the weights (default: as they are)",
                    [this](const std::string& value) -> absl::Status {
                      RWKV_ASSIGN_OR_RETURN(precision_, ParsePrecision(value));
                      return absl::OkStatus();
                    });
    flags.AddString("lora", "FILE", "an adapter to merge: LoRA, PiSSA or DiSHA", [this](const std::string& value) {
      lora_ = value;
      return absl::OkStatus();
    });
    flags.AddFloat("lora-alpha", "the alpha a LoRA was trained with, which is not in its file",
                   [this](float value) { lora_alpha_ = value; });
    flags.AddString("pissa-init", "FILE", "the factors that a PiSSA adapter began with",
                    [this](const std::string& value) {
                      pissa_init_ = value;
                      return absl::OkStatus();
                    });
    flags.AddString("vocabulary", "FILE", "write the vocabulary that IN brings (GGUF does) there, in World format",
                    [this](const std::string& value) {
                      vocabulary_ = value;
                      return absl::OkStatus();
                    });
    flags.AddBool("ignore-extra-tensors", "leave out tensors that are no part of the model", &ignore_extra_tensors_);
    flags.AddBool("overwrite", "replace files that exist", &overwrite_);
  }

  absl::Status Check(const std::vector<std::string>& positional) override {
    if (positional.size() != 2) return absl::InvalidArgumentError("IN and OUT are needed");
    if (lora_.empty() && (lora_alpha_.has_value() || !pissa_init_.empty())) {
      return absl::InvalidArgumentError("--lora-alpha and --pissa-init belong to a --lora FILE");
    }
    in_ = positional[0];
    out_ = positional[1];
    return absl::OkStatus();
  }

  absl::Status Run(Context& context) override {
    RWKV_RETURN_IF_ERROR(CheckOutput(out_));
    if (!vocabulary_.empty()) RWKV_RETURN_IF_ERROR(CheckOutput(vocabulary_));
    RWKV_ASSIGN_OR_RETURN(
        const std::shared_ptr<const Checkpoint> checkpoint,
        lora_.empty() ? Checkpoint::Open(in_) : Checkpoint::OpenWithAdapter(in_, {lora_, lora_alpha_, pissa_init_}));
    RWKV_ASSIGN_OR_RETURN(const ModelConfig config, ModelConfig::FromCheckpoint(*checkpoint, ignore_extra_tensors_));
    for (const std::string& note : checkpoint::Notes(*checkpoint, config)) {
      context.err << "note: " << note << std::endl;
    }
    RWKV_ASSIGN_OR_RETURN(const Conversion conversion, Conversion::Plan(checkpoint, precision_, config.ignored));
    for (const absl::string_view ending : {".pth", ".pt", ".gguf", ".bin"}) {
      if (absl::EndsWith(out_, ending)) {
        context.err << "note: " << out_ << " is .safetensors by content, whatever its name says" << std::endl;
      }
    }
    RWKV_RETURN_IF_ERROR(WriteVocabulary(*checkpoint, context));
    RWKV_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create(out_));
    RWKV_RETURN_IF_ERROR(file.Write(SafetensorsHeader(conversion.tensors(), conversion.metadata())));
    std::atomic<bool> interrupted{false};
    const InterruptScope scope(context.interrupts, [&interrupted] { interrupted = true; });
    int64_t written = 0;
    int64_t told_tenths = 0;
    RWKV_RETURN_IF_ERROR(conversion.Write([&](absl::string_view bytes) -> absl::Status {
      if (interrupted) return absl::CancelledError(absl::StrCat("interrupted; nothing is left of ", out_));
      written += static_cast<int64_t>(bytes.size());
      if (conversion.bytes() >= kLargeBytes && written >= conversion.bytes() / 10 * (told_tenths + 1)) {
        told_tenths = written / (conversion.bytes() / 10);
        context.err << "converted " << 10 * told_tenths << " % of " << (conversion.bytes() >> 20) << " MiB"
                    << std::endl;
      }
      return file.Write(bytes);
    }));
    return file.Commit();
  }

 private:
  absl::Status CheckOutput(const std::string& path) const {
    std::error_code ignored;  // What cannot be looked at fails when it is opened.
    if (std::filesystem::equivalent(in_, path, ignored)) {
      return absl::InvalidArgumentError(absl::StrCat(path, " is the file to be converted"));
    }
    if (std::filesystem::is_directory(path, ignored)) {
      return absl::InvalidArgumentError(absl::StrCat(path, " is a folder"));
    }
    if (!overwrite_ && std::filesystem::exists(path, ignored)) {
      return absl::AlreadyExistsError(absl::StrCat(path, " exists; --overwrite replaces it"));
    }
    return absl::OkStatus();
  }

  absl::Status WriteVocabulary(const Checkpoint& checkpoint, const Context& context) const {
    const absl::StatusOr<std::vector<std::string>> tokens = checkpoint.Vocabulary();
    if (vocabulary_.empty()) {
      if (!absl::IsNotFound(tokens.status())) {
        context.err << "note: " << in_ << " brings a vocabulary, which is not in OUT; --vocabulary FILE writes it"
                    << std::endl;
      }
      return absl::OkStatus();
    }
    RWKV_RETURN_IF_ERROR(tokens.status());
    RWKV_ASSIGN_OR_RETURN(const std::string text, WorldVocabulary(*tokens));
    RWKV_ASSIGN_OR_RETURN(OutputFile file, OutputFile::Create(vocabulary_));
    RWKV_RETURN_IF_ERROR(file.Write(text));
    return file.Commit();
  }

  Precision precision_ = Precision::kAsStored;
  std::string lora_;
  absl::optional<double> lora_alpha_;
  std::string pissa_init_;
  std::string vocabulary_;  // Empty: not written.
  bool ignore_extra_tensors_ = false;
  bool overwrite_ = false;
  std::string in_;
  std::string out_;
};

}  // namespace

std::unique_ptr<Command> MakeConvertCommand() { return std::make_unique<ConvertCommand>(); }

}  // namespace rwkv::rwkvctl
