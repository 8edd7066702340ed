// libFuzzer's entry: bazel run --config=fuzz //services/tokenizer:tokenizer_fuzz -- FOLDER
#include <cstddef>
#include <cstdint>

#include "services/tokenizer/tokenizer_fuzz_body.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  rwkv::tokenizer::CheckTokenizer(data, size);
  return 0;
}
