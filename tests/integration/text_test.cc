// Text through the whole cluster, by tokenizers that a model's operator gives.
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "rwkv/v1/generation.pb.h"
#include "services/router/client/router_client.h"
#include "tests/testing/local_cluster.h"
#include "tests/testing/random_model.h"
#include "tests/testing/status_matchers.h"

namespace rwkv {
namespace {

using ::rwkv::router::MakeRouterClient;
using ::rwkv::router::RouterClient;
using ::rwkv::testing::LocalCluster;
using ::rwkv::testing::Runfile;
using ::rwkv::testing::StatusIs;
using ::testing::AllOf;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::Lt;
using ::testing::SizeIs;

constexpr char kWorldFile[] = "services/tokenizer/testdata/small_vocabulary.txt";  // 308 ids.
constexpr char kNeoxFile[] = "services/tokenizer/testdata/small_neox.json";        // 492 ids.

// One stage of a model with `rows` ids, and a router with `tokenizers`.
absl::StatusOr<std::unique_ptr<LocalCluster>> Start(int rows, const std::string& tokenizers) {
  testing::RandomModelOptions model;
  model.layers = 2;
  model.vocab_size = rows;
  LocalCluster::Options options;
  options.model = absl::StrCat(::testing::TempDir(), "/text_", rows, ".safetensors");
  options.stages = 1;
  options.router_flags = {absl::StrCat("--tokenizer=", tokenizers)};
  if (absl::Status status = testing::WriteRandomModel(model, options.model); !status.ok()) return status;
  return LocalCluster::Start(options);
}

TEST(TextTest, EachModelIsServedWithTheFirstTokenizerThatFits) {
  struct Case {
    int rows;  // With padding, which must never be drawn.
    const char* tokenizer;
    uint32_t ids;
  };
  for (const Case& c : {Case{512, "neox", 492}, Case{400, "world", 308}}) {
    SCOPED_TRACE(c.tokenizer);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster,
                         Start(c.rows, absl::StrCat(Runfile(kNeoxFile), ",", Runfile(kWorldFile))));
    const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
    ASSERT_OK_AND_ASSIGN(const v1::ListModelsResponse models, client->ListModels());
    ASSERT_EQ(models.models_size(), 1);
    EXPECT_EQ(models.models(0).tokenizer(), c.tokenizer);

    const std::string text = "the house  is there; \u4F60\u597D \U0001F600\n";
    v1::TokenizeRequest tokenize;
    tokenize.set_data(text);
    ASSERT_OK_AND_ASSIGN(const v1::TokenizeResponse tokens, client->Tokenize(tokenize));
    v1::DetokenizeRequest detokenize;
    *detokenize.mutable_token_ids() = tokens.token_ids();
    ASSERT_OK_AND_ASSIGN(const v1::DetokenizeResponse back, client->Detokenize(detokenize));
    EXPECT_EQ(back.data(), text);

    v1::GenerateRequest generate;
    generate.set_text(text);
    generate.set_max_tokens(200);
    generate.set_ignore_end_of_text(true);
    generate.mutable_sampling()->set_temperature(100);  // Every id is about as likely.
    generate.mutable_sampling()->set_seed(1);
    std::vector<uint32_t> drawn;
    EXPECT_OK(client->Generate(generate, [&](const v1::GenerateResponse& response) {
      if (response.has_token_id()) drawn.push_back(response.token_id());
      return absl::OkStatus();
    }));
    EXPECT_THAT(drawn, AllOf(SizeIs(200), Each(Lt(c.ids))));
  }
}

TEST(TextTest, ATokenizerThatDoesNotFitIsRefusedAndIdsGoOn) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<LocalCluster> cluster, Start(256, Runfile(kWorldFile)));
  const std::unique_ptr<RouterClient> client = MakeRouterClient(cluster->Channel("router-0"));
  v1::GenerateRequest generate;
  generate.set_text("the house");
  generate.set_max_tokens(3);
  const auto ignore = [](const v1::GenerateResponse&) { return absl::OkStatus(); };
  EXPECT_THAT(client->Generate(generate, ignore),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("\"world\" with 308 ids does not fit")));
  generate.mutable_tokens()->add_ids(255);
  EXPECT_OK(client->Generate(generate, ignore));
}

}  // namespace
}  // namespace rwkv
