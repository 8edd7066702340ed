// Feeds a fuzz target its seeds, and mutations of them, without libFuzzer. RWKV_CORPUS: the seeds' folder.
#include <dirent.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr int kMutationsPerSeed = 500;
constexpr uint32_t kSeed = 20230424;

using Bytes = std::vector<uint8_t>;

// By name, so that every run is the same.
std::vector<std::pair<std::string, Bytes>> ReadCorpus() {
  std::vector<std::pair<std::string, Bytes>> corpus;
  DIR* folder = opendir(RWKV_CORPUS);
  if (folder == nullptr) return corpus;
  while (const dirent* entry = readdir(folder)) {
    if (entry->d_name[0] == '.') continue;
    std::ifstream file(absl::StrCat(RWKV_CORPUS, "/", entry->d_name), std::ios::binary);
    corpus.emplace_back(entry->d_name, Bytes(std::istreambuf_iterator<char>(file), {}));
  }
  closedir(folder);
  std::sort(corpus.begin(), corpus.end());
  return corpus;
}

// A copy of exactly the right size, so that the address sanitizer sees a read beyond it.
void Feed(const Bytes& bytes) {
  const Bytes exact(bytes.begin(), bytes.end());
  EXPECT_EQ(LLVMFuzzerTestOneInput(exact.data(), exact.size()), 0);
}

Bytes Mutated(Bytes bytes, std::mt19937* random) {
  static constexpr uint8_t kTelling[] = {0x00, 0x01, 0x7f, 0x80, 0xff, '(', ')', '.', '{', '[', '"', '0', '9', '-'};
  const int changes = 1 + static_cast<int>((*random)() % 4);
  for (int i = 0; i < changes && !bytes.empty(); ++i) {
    const size_t at = (*random)() % bytes.size();
    const size_t length = std::min<size_t>(bytes.size() - at, 1 + (*random)() % 16);
    switch ((*random)() % 6) {
      case 0:
        bytes[at] ^= static_cast<uint8_t>(1 << ((*random)() % 8));
        break;
      case 1:
        bytes[at] = kTelling[(*random)() % sizeof(kTelling)];
        break;
      case 2:
        std::fill_n(bytes.begin() + static_cast<ptrdiff_t>(at), length, kTelling[(*random)() % sizeof(kTelling)]);
        break;
      case 3:
        bytes.erase(bytes.begin() + static_cast<ptrdiff_t>(at), bytes.begin() + static_cast<ptrdiff_t>(at + length));
        break;
      case 4: {
        const Bytes copy(bytes.begin() + static_cast<ptrdiff_t>(at),
                         bytes.begin() + static_cast<ptrdiff_t>(at + length));
        bytes.insert(bytes.begin() + static_cast<ptrdiff_t>((*random)() % bytes.size()), copy.begin(), copy.end());
        break;
      }
      default:
        bytes.resize(at);
        break;
    }
  }
  return bytes;
}

TEST(CorpusTest, EverySeedAndItsMutationsPass) {
  const std::vector<std::pair<std::string, Bytes>> corpus = ReadCorpus();
  ASSERT_GE(corpus.size(), 3) << "no seeds in " << RWKV_CORPUS;
  RecordProperty("seed", static_cast<int>(kSeed));
  Feed({});
  for (const auto& [name, bytes] : corpus) {
    SCOPED_TRACE(absl::StrCat(name, ", mutations seeded with ", kSeed));
    Feed(bytes);
    std::mt19937 random(kSeed);
    for (int i = 0; i < kMutationsPerSeed; ++i) Feed(Mutated(bytes, &random));
  }
}

}  // namespace
