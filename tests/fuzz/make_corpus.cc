// Writes the seeds of the fuzz targets: make_corpus tests/fuzz/corpus
#include <sys/stat.h>

#include <functional>
#include <iostream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/dtype.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"
#include "tests/fuzz/small_tokenizers.h"
#include "tests/testing/checkpoint_writer.h"
#include "tests/testing/random_model.h"

namespace rwkv::testing {
namespace {

using checkpoint::ElementType;

RandomModelOptions SmallestModel(kernels::DType dtype) {
  RandomModelOptions options;
  options.layers = 2;
  options.width = 4;
  options.head_size = 2;
  options.ffn_width = 3;
  options.vocab_size = 3;
  options.decay_rank = options.iclr_rank = options.value_residual_rank = options.gate_rank = 1;
  options.dtype = dtype;
  options.time_state = true;
  return options;
}

std::vector<RawTensor> FewTensors() {
  return {{{"a", checkpoint::ElementType::kFloat32, {2, 3}}, std::string(24, 'a')},
          {{"b", checkpoint::ElementType::kBFloat16, {1, 1, 4}}, std::string(8, 'b')},
          {{"c", checkpoint::ElementType::kInt64, {}}, std::string(8, 'c')},
          {{"d", checkpoint::ElementType::kUint8, {0, 3}}, ""}};
}

using Write = std::function<absl::Status(const std::string& folder, const std::string& name, const std::string& bytes)>;

absl::Status WriteTokenizers(const Write& write) {
  RWKV_RETURN_IF_ERROR(write("chat_template", "one", "Hi\r\n\r\nUser: you \n\n\n Assistant: <think"));
  RWKV_RETURN_IF_ERROR(write("chat_template", "conversation", std::string("System\0User\0Assistant\n\n\0\n User", 28)));
  RWKV_RETURN_IF_ERROR(write("chat_template", "raven", "RWKV-4-Raven-14B-v12"));

  RWKV_RETURN_IF_ERROR(write("neox_vocabulary", "whole", SmallNeoxTokenizer()));
  RWKV_RETURN_IF_ERROR(write("neox_vocabulary", "merges", R"("t h","th e","a a")"));
  RWKV_RETURN_IF_ERROR(write("neox_vocabulary", "merge_pairs", R"(["t","h"],["th","e"],["Ã","©"])"));
  RWKV_RETURN_IF_ERROR(write("neox_vocabulary", "deep", "[[[[[[[[[[[[[[[[{\"a\":[1e99,-0,\"\\ud83d\"]}"));

  RWKV_RETURN_IF_ERROR(write("world_vocabulary", "whole", SmallWorldVocabulary()));
  RWKV_RETURN_IF_ERROR(write("world_vocabulary", "lines", "257 'ab' 2\n258 'abc' 3\n259 b'\\xe4\\xbd' 2\n"));
  RWKV_RETURN_IF_ERROR(write("world_vocabulary", "quotes", "257 \"it's\" 4\r\n258 '\\u4f60' 3\r\n259 '\\x80' 2"));
  RWKV_RETURN_IF_ERROR(write("world_vocabulary", "blanks", "257 '  ' 2\n258 '   ' 3\n259 '\\\\a' 2\n"));
  RWKV_RETURN_IF_ERROR(write("world_vocabulary", "surrogate", "257 '\\U0001f600' 4\n258 '\\ud83d' 3\n"));

  RWKV_RETURN_IF_ERROR(write("tokenizer_text", "words", "the aaaaaaa it's  12.5\r\n\t x<|endoftext|>  caf\u00e9 "));
  RWKV_RETURN_IF_ERROR(write("tokenizer_text", "marks", "e\u0301\u0323 \u1100\u1161\u11a8 \u304b\u3099 \u0958 \u212b"));
  RWKV_RETURN_IF_ERROR(
      write("tokenizer_text", "pieces", "abcabcab  \xE4\xBD\xA0\xE4\xBD \xF0\x9F\x98\x80\xED\xA0\x80"));
  return absl::OkStatus();
}

GgmlTensor Zeros(const std::string& name, uint32_t type, std::vector<int64_t> shape, size_t bytes) {
  return {name, type, std::move(shape), std::string(bytes, '\0')};
}

// Every dialect's change and every kind of block; types are GGUF's codes.
std::vector<GgmlTensor> GgufTensors() {
  return {Zeros("token_embd.weight", 1, {3, 4}, 24),
          Zeros("blk.0.time_mix_lerp_fused.weight", 0, {6, 1, 1, 4}, 96),
          Zeros("blk.1.time_mix_w1.weight", 0, {2, 4}, 32),
          Zeros("blk.1.time_mix_r_k.weight", 0, {4}, 16),
          Zeros("blk.0.time_mix_key.weight", 8, {1, 32}, 34),
          Zeros("blk.0.time_mix_value.weight", 3, {1, 32}, 20),
          Zeros("blk.0.time_mix_output.weight", 7, {1, 32}, 24),
          Zeros("blk.0.channel_mix_key.weight", 14, {1, 256}, 210)};
}

std::string GgufFile(const std::string& architecture) {
  return GgufBytes(
      std::vector<GgufKey>{GgufText("general.architecture", architecture),
                           GgufUint32(architecture + ".wkv.head_size", 2),
                           GgufUint32("rwkv6.rescale_every_n_layers", 1), GgufText("tokenizer.ggml.model", "rwkv"),
                           GgufTexts("tokenizer.ggml.tokens", {"<s>", "\\x00", "a\\n"})},
      GgufTensors());
}

std::vector<GgmlTensor> RwkvCppTensors(const std::string& version_tensor) {
  return {Zeros("emb.weight", 0, {3, 4}, 48),
          Zeros(version_tensor, 0, {1, 4}, 16),
          Zeros("blocks.0.att.time_decay", 0, {2, 2, 1}, 16),
          Zeros("blocks.0.att.time_faaaa", 0, {2, 2, 1}, 16),
          Zeros("blocks.0.att.time_maa_w2", 0, {5, 4, 2}, 160),
          Zeros("blocks.0.att.x_rwkvag", 0, {6, 1, 4}, 96),
          Zeros("blocks.0.att.w1", 2, {2, 32}, 36),
          Zeros("blocks.0.att.key.weight", 7, {1, 32}, 22),
          Zeros("blocks.0.ffn.key.weight", 9, {1, 32}, 34)};
}

std::vector<RawTensor> WithNames(std::vector<RawTensor> tensors, const std::vector<std::string>& names) {
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i].spec.name = names[i];
  return tensors;
}

// A state of a model of two layers, with its log; and a tuned one.
std::vector<RawTensor> StateTensors() {
  std::vector<RawTensor> tensors;
  for (const char* layer : {"blocks.0", "blocks.1"}) {
    for (const char* name : {".att.x_prev", ".ffn.x_prev"}) {
      tensors.push_back({{absl::StrCat(layer, name), ElementType::kFloat32, {2}}, std::string(8, '\x3f')});
    }
    tensors.push_back({{absl::StrCat(layer, ".att.state"), ElementType::kFloat32, {1, 2, 2}}, std::string(16, '\x3e')});
  }
  tensors.push_back({{"token_ids", ElementType::kInt32, {3}}, std::string("\1\0\0\0\2\0\0\0\3\0\0\0", 12)});
  return tensors;
}

std::vector<RawTensor> TunedTensors() {
  return {{{"blocks.0.att.time_state", ElementType::kFloat32, {1, 2, 2}}, std::string(16, '\x3e')},
          {{"blocks.1.att.time_state", ElementType::kBFloat16, {1, 2, 2}}, std::string(8, '\x3e')}};
}

absl::Status WriteAll(const std::string& root) {
  const Write write = [&root](const std::string& folder, const std::string& name, const std::string& bytes) {
    mkdir(absl::StrCat(root, "/", folder).c_str(), 0755);
    return WriteFileAtomically(absl::StrCat(root, "/", folder, "/", name), bytes);
  };
  const std::vector<RawTensor> few = FewTensors();
  RWKV_ASSIGN_OR_RETURN(const std::vector<RawTensor> model, MakeRandomModel(SmallestModel(kernels::DType::kBFloat16)));
  RWKV_ASSIGN_OR_RETURN(const std::vector<RawTensor> wide, MakeRandomModel(SmallestModel(kernels::DType::kFloat32)));
  std::vector<TensorSpec> specs;
  for (const RawTensor& tensor : few) specs.push_back(tensor.spec);

  RWKV_RETURN_IF_ERROR(write("safetensors", "empty", SafetensorsBytes({})));
  RWKV_RETURN_IF_ERROR(write("safetensors", "few", SafetensorsBytes(few)));
  RWKV_RETURN_IF_ERROR(write("safetensors", "metadata", SafetensorsBytes(few, {{"format", "pt"}, {"a", "\"b\""}})));
  RWKV_RETURN_IF_ERROR(write("safetensors", "model", SafetensorsBytes(model)));

  const std::map<std::string, std::string> of_state = {
      {"model_fingerprint", "f"}, {"position", "3"}, {"xxh3", "0123456789abcdef"}, {"initial_state", "a@12345678"}};
  std::map<std::string, std::string> unchecked = of_state;
  unchecked.erase("xxh3");
  RWKV_RETURN_IF_ERROR(write("session_state", "checked", SafetensorsBytes(StateTensors(), of_state)));
  RWKV_RETURN_IF_ERROR(write("session_state", "unchecked", SafetensorsBytes(StateTensors(), unchecked)));
  RWKV_RETURN_IF_ERROR(write("session_state", "tuned.safetensors", SafetensorsBytes(TunedTensors())));
  RWKV_RETURN_IF_ERROR(write("session_state", "tuned.pth", TorchZipBytes(TunedTensors())));
  RWKV_RETURN_IF_ERROR(write("session_state", "tuned_legacy.pth", TorchLegacyBytes(TunedTensors())));

  RWKV_RETURN_IF_ERROR(write("torch_file", "zip", TorchZipBytes(few)));
  RWKV_RETURN_IF_ERROR(write("torch_file", "legacy", TorchLegacyBytes(few)));
  RWKV_RETURN_IF_ERROR(
      write("torch_file", "zip32",
            ZipBytes(std::vector<ZipEntry>{{"x/data.pkl", StateDictPickle({})}}, ZipOptions{false, false})));
  RWKV_RETURN_IF_ERROR(write("torch_file", "model", TorchZipBytes(model)));

  RWKV_RETURN_IF_ERROR(write("pickle", "few", StateDictPickle(specs)));
  RWKV_RETURN_IF_ERROR(write("pickle", "empty", StateDictPickle({})));
  RWKV_RETURN_IF_ERROR(
      write("pickle", "protocol4",
            std::string("\x80\x04\x95\x0e\0\0\0\0\0\0\0}\x94(\x8c\1aK\1\x8c\1b]\x94(K\2K\3e\x8c\1cNu.", 37)));
  RWKV_RETURN_IF_ERROR(write("pickle", "code",
                             std::string("\x80\x02"
                                         "cos\nsystem\nX\2\0\0\0id\x85R.",
                                         25)));
  RWKV_RETURN_IF_ERROR(write("pickle", "itself", std::string("\x80\x02}q\0(X\1\0\0\0ah\0X\1\0\0\0bh\0u.", 24)));

  const RwkvCppHeader header = {101, 3, 4, 1};
  for (const char* architecture : {"rwkv6", "rwkv7"}) {
    RWKV_RETURN_IF_ERROR(write("gguf", architecture, GgufFile(architecture)));
    RWKV_RETURN_IF_ERROR(write("checkpoint", absl::StrCat(architecture, ".gguf"), GgufFile(architecture)));
  }
  RWKV_RETURN_IF_ERROR(write("gguf", "empty", GgufBytes({}, {})));
  const std::pair<const char*, const char*> kVersions[] = {{"4", "blocks.0.att.time_mix_k"},
                                                           {"5", "blocks.0.att.ln_x.weight"},
                                                           {"6", "blocks.0.att.time_maa_x"},
                                                           {"7", "blocks.0.att.r_k"}};
  for (const auto& [version, tensor] : kVersions) {
    const std::string bytes = RwkvCppBytes(header, RwkvCppTensors(tensor));
    RWKV_RETURN_IF_ERROR(write("rwkv_cpp", version, bytes));
    RWKV_RETURN_IF_ERROR(write("checkpoint", absl::StrCat(version, ".bin"), bytes));
  }
  RWKV_RETURN_IF_ERROR(
      write("checkpoint", "fla.safetensors",
            SafetensorsBytes(WithNames(few, {"model.layers.0.attn.w_lora.lora.0.weight", "model.layers.0.attn.x_r",
                                             "model.norm.weight", "model.layers.0.attn.r_proj.weight"}))));
  RWKV_RETURN_IF_ERROR(
      write("checkpoint", "port.safetensors",
            SafetensorsBytes(WithNames(few, {"rwkv.blocks.0.attention.key.weight", "rwkv.blocks.0.pre_ln.weight",
                                             "rwkv.embeddings.weight", "rwkv.blocks.0.feed_forward.time_mix_key"}))));
  RWKV_RETURN_IF_ERROR(
      write("checkpoint", "web_rwkv.st",
            SafetensorsBytes(WithNames(few, {"blocks.0.att.time_mix_w1", "blocks.0.att.time_mix_w2",
                                             "blocks.0.att.time_decay_w1", "blocks.0.att.time_state"}))));

  RWKV_RETURN_IF_ERROR(write("checkpoint", "few.safetensors", SafetensorsBytes(few)));
  RWKV_RETURN_IF_ERROR(write("checkpoint", "model.safetensors", SafetensorsBytes(model)));
  RWKV_RETURN_IF_ERROR(write("checkpoint", "model_fp32.pth", TorchZipBytes(wide)));
  RWKV_RETURN_IF_ERROR(write("checkpoint", "model_legacy.pth", TorchLegacyBytes(model)));
  return WriteTokenizers(write);
}

}  // namespace
}  // namespace rwkv::testing

int main(int argc, char** argv) {
  if (argc != 2) {
    std::cerr << "make_corpus DIR\n";
    return 2;
  }
  if (const absl::Status status = rwkv::testing::WriteAll(argv[1]); !status.ok()) {
    std::cerr << "make_corpus: " << status << "\n";
    return 1;
  }
  return 0;
}
