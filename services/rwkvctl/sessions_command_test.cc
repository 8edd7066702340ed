// rwkvctl sessions, state and logits.
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "services/checkpoint/session_state.h"
#include "services/rwkvctl/rwkvctl_fixture.h"

namespace rwkv::rwkvctl {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::SizeIs;
using ::testing::StartsWith;

TEST_F(RwkvctlTest, LogitsWritesAMatrix) {
  const std::string path = (folder_ / "l.npy").string();
  EXPECT_EQ(Call({"logits", "--tokens", "1,2,3", "--out", path}), 0);
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  EXPECT_THAT(content, HasSubstr("'shape': (3, 4), "));
  ASSERT_EQ(content.size(), 128 + 3 * 4 * sizeof(float));
  float last = 0;
  std::memcpy(&last, content.data() + content.size() - sizeof(last), sizeof(last));
  EXPECT_EQ(last, 3.75f);
}

TEST_F(RwkvctlTest, LogitsFailsWhereItCannotWrite) {
  EXPECT_EQ(Call({"logits", "--tokens", "1", "--out", (folder_ / "no" / "l.npy").string()}), 1);
  EXPECT_THAT(err_, HasSubstr("no/l.npy"));
}

TEST_F(RwkvctlTest, StateWritesSafetensors) {
  router_.logs["s"] = {1, 2};
  v1::SessionsExportStateResponse piece;
  piece.set_tensor("blocks.0.att.x_prev");
  piece.add_shape(2);
  piece.set_data(std::string("\0\0\x80\x3f\0\0\0\x40", 8));
  piece.set_position(2);
  router_.exported_state = {piece};
  const std::string path = (folder_ / "s.safetensors").string();
  EXPECT_EQ(Call({"state", "--session", "s", "--out", path}), 0);
  std::ifstream file(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(file), {}};
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, content.data(), sizeof(header_bytes));
  const nlohmann::json header = nlohmann::json::parse(content.substr(8, header_bytes));
  EXPECT_EQ(header["__metadata__"]["position"], "2");
  EXPECT_EQ(header["blocks.0.att.x_prev"]["shape"], nlohmann::json({2}));
  EXPECT_THAT(content, EndsWith(piece.data()));

  v1::SessionsExportStateResponse later = piece;
  later.set_tensor("blocks.0.ffn.x_prev");
  later.set_position(3);
  router_.exported_state.push_back(later);
  const std::string torn = (folder_ / "torn.safetensors").string();
  EXPECT_EQ(Call({"state", "--session", "s", "--out", torn}), 1);
  EXPECT_THAT(err_, HasSubstr("position changes from 2 to 3"));
  EXPECT_FALSE(std::filesystem::exists(torn));
}

v1::SessionsExportStateResponse StatePiece(uint64_t position) {
  v1::SessionsExportStateResponse piece;
  piece.set_tensor("blocks.0.att.x_prev");
  piece.add_shape(2);
  piece.set_data(std::string("\0\0\x80\x3f\0\0\0\x40", 8));
  piece.set_position(position);
  piece.set_model_fingerprint("abcd");
  return piece;
}

std::string ReadWhole(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string{std::istreambuf_iterator<char>(file), {}};
}

nlohmann::json HeaderOf(const std::string& content) {
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, content.data(), sizeof(header_bytes));
  return nlohmann::json::parse(content.substr(8, header_bytes));
}

TEST_F(RwkvctlTest, ASessionIsExportedWithItsTokensAndImportedAsItIs) {
  router_.logs["s"].assign(8195, 7);  // Two calls to read.
  router_.logs["s"].back() = 9;
  router_.initial_states["s"] = "poet@12345678";
  router_.exported_state = {StatePiece(8195)};
  const std::string path = (folder_ / "s.safetensors").string();
  EXPECT_EQ(Call({"sessions", "export", "s", path}), 0) << err_;
  const std::string content = ReadWhole(path);
  EXPECT_EQ(out_, absl::StrCat("exported session s at position 8195 to ", path, ", ", content.size(),
                               " bytes, with its tokens\n"));
  const nlohmann::json header = HeaderOf(content);
  EXPECT_EQ(header["token_ids"]["dtype"], "I32");
  EXPECT_EQ(header["token_ids"]["shape"], nlohmann::json({8195}));
  const std::map<std::string, std::string> metadata = header["__metadata__"];
  const std::string payload = StatePiece(0).data() + [] {
    std::string bytes;
    for (int i = 0; i < 8195; ++i) bytes += std::string(i == 8194 ? "\x09\0\0\0" : "\x07\0\0\0", 4);
    return bytes;
  }();
  EXPECT_THAT(content, EndsWith(payload));
  EXPECT_EQ(metadata, (std::map<std::string, std::string>{{"position", "8195"},
                                                          {"session", "s"},
                                                          {"model_fingerprint", "abcd"},
                                                          {"initial_state", "poet@12345678"},
                                                          {"xxh3", checkpoint::SessionStateChecksum({payload})}}));

  EXPECT_EQ(Call({"sessions", "import", path}), 0) << err_;
  EXPECT_EQ(out_, "session-2\n");
  EXPECT_EQ(err_, "");
  EXPECT_EQ(Call({"sessions", "import", path, "--session", "mine", "--json"}), 0) << err_;
  EXPECT_EQ(nlohmann::json::parse(out_)["id"], "mine");
  EXPECT_THAT(router_.imported_files, ::testing::ElementsAre(content, content));
  EXPECT_EQ(Call({"sessions", "import", path, "--session", "mine"}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("ALREADY_EXISTS"), HasSubstr(path)));
  EXPECT_EQ(Call({"sessions", "import", path + ".no"}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("NOT_FOUND"), HasSubstr(path + ".no")));
}

TEST_F(RwkvctlTest, WhatStandsOnAnImportedStateIsSaidAndHasNoLogToExport) {
  router_.bases["t"] = 5;
  const std::string path = (folder_ / "t.pth").string();
  std::ofstream(path) << "bytes";
  EXPECT_EQ(Call({"sessions", "import", path, "--session=t"}), 0) << err_;
  EXPECT_THAT(err_, HasSubstr("cannot be forked or rewound to before position 5"));
  EXPECT_EQ(Call({"sessions", "show", "t"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("base_position: 5\n"), HasSubstr("log_begin: 5\n")));
  router_.exported_state = {StatePiece(5)};
  const std::string again = (folder_ / "again.safetensors").string();
  EXPECT_EQ(Call({"sessions", "export", "t", again, "--json"}), 0) << err_;
  EXPECT_EQ(nlohmann::json::parse(out_)["has_log"], false);
  EXPECT_FALSE(HeaderOf(ReadWhole(again)).contains("token_ids"));
}

TEST_F(RwkvctlTest, AnExportOfASessionThatGoesOnMeanwhileWritesNothing) {
  router_.logs["s"] = {1, 2};
  router_.exported_state = {StatePiece(2)};
  router_.on_export = [this] { router_.logs["s"].push_back(3); };
  const std::string path = (folder_ / "s.safetensors").string();
  EXPECT_EQ(Call({"sessions", "export", "s", path}), 1);
  EXPECT_THAT(err_, AllOf(HasSubstr("ABORTED"), HasSubstr("went on while it was exported")));
  EXPECT_FALSE(std::filesystem::exists(path));
}

TEST_F(RwkvctlTest, SessionsAreCreatedListedShownForkedRewoundAndDeleted) {
  EXPECT_EQ(Call({"sessions", "create"}), 0);
  EXPECT_EQ(out_, "session-1\n");
  EXPECT_EQ(Call({"sessions", "create", "mine"}), 0);
  EXPECT_EQ(out_, "mine\n");
  EXPECT_EQ(Call({"sessions", "create", "--session", "mine"}), 1);
  EXPECT_THAT(err_, HasSubstr("ALREADY_EXISTS"));
  EXPECT_EQ(Call({"generate", "--session", "mine", "--prompt", "Hi", "--max-tokens", "3"}), 0);

  EXPECT_EQ(Call({"sessions", "fork", "mine", "4", "--new-session", "theirs"}), 0);
  EXPECT_EQ(out_, "theirs\n");
  EXPECT_EQ(Call({"sessions", "fork", "--session=mine"}), 0);
  EXPECT_EQ(out_, "mine-fork\n");
  EXPECT_EQ(Call({"sessions", "rewind", "theirs", "--position", "1"}), 0);
  EXPECT_EQ(out_, "rewound to 1 tokens: session theirs\n");
  EXPECT_EQ(Call({"sessions", "rewind", "theirs", "9"}), 1);
  EXPECT_THAT(err_, HasSubstr("OUT_OF_RANGE"));

  // Four sessions over two pages.
  EXPECT_EQ(Call({"sessions", "list"}), 0);
  EXPECT_THAT(out_, AllOf(StartsWith("SESSION"), HasSubstr("mine "), HasSubstr("mine-fork "), HasSubstr("session-1 "),
                          HasSubstr("theirs ")));
  EXPECT_EQ(Call({"sessions", "list", "--json"}), 0);
  const nlohmann::json listed = nlohmann::json::parse(out_);
  ASSERT_THAT(listed, SizeIs(4));
  EXPECT_EQ(listed[0]["id"], "mine");
  EXPECT_EQ(listed[0]["tokens"], 5);

  EXPECT_EQ(Call({"sessions", "show", "mine", "--log", "--text"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("id: mine\n"), HasSubstr("tokens: 5\n"),
                          HasSubstr("token_ids: 72 105 72 101 108\n"), HasSubstr("text:\nHiHel\n")));
  EXPECT_EQ(Call({"sessions", "show", "mine", "--json", "--log"}), 0);
  EXPECT_EQ(nlohmann::json::parse(out_)["token_ids"], nlohmann::json({72, 105, 72, 101, 108}));

  EXPECT_EQ(Call({"sessions", "delete", "mine", "theirs"}), 0);
  EXPECT_EQ(out_, "deleted session mine\ndeleted session theirs\n");
  EXPECT_EQ(Call({"sessions", "delete", "mine"}), 1);
  EXPECT_THAT(err_, HasSubstr("NOT_FOUND"));
}

TEST_F(RwkvctlTest, WhatBeginsWithATunedStateNamesIt) {
  EXPECT_EQ(Call({"sessions", "create", "mine", "--initial-state", "poet"}), 0);
  EXPECT_EQ(router_.initial_states["mine"], "poet");
  EXPECT_EQ(Call({"sessions", "show", "mine"}), 0);
  EXPECT_THAT(out_, HasSubstr("initial_state: poet\n"));
  EXPECT_EQ(Call({"sessions", "create", "plain"}), 0);
  EXPECT_EQ(Call({"sessions", "show", "plain"}), 0);
  EXPECT_THAT(out_, Not(HasSubstr("initial_state")));
  EXPECT_EQ(Call({"sessions", "fork", "mine", "--initial-state", "poet"}), 2);
  EXPECT_THAT(err_, HasSubstr("fork takes no --initial-state"));
  EXPECT_EQ(Call({"generate", "--initial-state", "judge", "--prompt", "Hi"}), 0);
  EXPECT_EQ(request().initial_state(), "judge");
  EXPECT_EQ(Call({"chat", "--initial-state", "poet"}, "Hi\n"), 0);
  EXPECT_EQ(router_.initial_states[request().session_id()], "poet");
  EXPECT_EQ(Call({"chat", "--session", "mine", "--initial-state", "poet"}, "Hi\n"), 2);
  EXPECT_THAT(err_, HasSubstr("--initial-state is for a new session"));
  router_.status.mutable_model()->add_initial_states("judge@9abcdef0");
  router_.status.mutable_model()->add_initial_states("poet@12345678");
  EXPECT_EQ(Call({"status"}), 0);
  EXPECT_THAT(out_, HasSubstr("states:   judge@9abcdef0, poet@12345678\n"));
  EXPECT_EQ(Call({"status", "--json"}), 0);
  EXPECT_EQ(nlohmann::json::parse(out_)["model"]["initial_states"][1], "poet@12345678");
}

}  // namespace
}  // namespace rwkv::rwkvctl
