#include "services/state_store/client/crc32c.h"

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "gtest/gtest.h"

namespace rwkv::state_store {
namespace {

// RFC 3720 appendix B.4, and the check value that every catalogue of CRCs gives.
TEST(Crc32cTest, KnownAnswers) {
  EXPECT_EQ(Crc32c(absl::string_view("123456789")), 0xE3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\x00')), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62A8AB43u);
  EXPECT_EQ(Crc32c({}), 0u);
}

TEST(Crc32cTest, PiecesEqualTheWhole) {
  std::string data(4099, '\0');
  for (size_t i = 0; i < data.size(); ++i) data[i] = static_cast<char>(i * 131 + 7);
  const uint32_t whole = Crc32c(data);
  for (size_t cut : {0u, 1u, 7u, 8u, 1024u, 4098u, 4099u}) {
    const absl::Span<const char> span(data);
    EXPECT_EQ(ExtendCrc32c(Crc32c(span.first(cut)), span.subspan(cut)), whole) << cut;
  }
}

TEST(Crc32cTest, EveryFlippedBitShows) {
  std::string data(64, 'x');
  const uint32_t whole = Crc32c(data);
  for (size_t bit = 0; bit < data.size() * 8; ++bit) {
    std::string flipped = data;
    flipped[bit / 8] ^= static_cast<char>(1 << (bit % 8));
    EXPECT_NE(Crc32c(flipped), whole) << bit;
  }
}

}  // namespace
}  // namespace rwkv::state_store
