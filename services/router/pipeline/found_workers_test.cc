#include "services/router/pipeline/found_workers.h"

#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::router {
namespace {

using ::rwkv::testing::IsOk;
using ::rwkv::testing::StatusIs;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::unique_ptr<worker::WorkerClient> None(const std::string&) { return nullptr; }

std::vector<std::string> List(WorkerSource& source) {
  const auto list = source.List();
  EXPECT_THAT(list, IsOk());
  return list.ok() ? *list : std::vector<std::string>();
}

void Write(const std::string& path, const std::string& content) { std::ofstream(path) << content; }

TEST(FoundWorkersTest, AListNamesEachOnce) {
  const auto source = FindWorkers({"b:2", "a:1", "b:2"}, None);
  ASSERT_THAT(source, IsOk());
  EXPECT_THAT(List(**source), ElementsAre("a:1", "b:2"));
}

TEST(FoundWorkersTest, AFileIsReadAgain) {
  const std::string path = absl::StrCat(::testing::TempDir(), "/workers");
  Write(path, "# all of them\n\n a:1 \nb:2 # the new one\n");
  const auto source = FindWorkers({"c:3", absl::StrCat("file:", path)}, None);
  ASSERT_THAT(source, IsOk());
  EXPECT_THAT(List(**source), ElementsAre("a:1", "b:2", "c:3"));
  Write(path, "a:1\n");
  EXPECT_THAT(List(**source), ElementsAre("a:1", "c:3"));
  Write(path, "a:1\nb\n");
  EXPECT_THAT((*source)->List(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(path + ":2")));
  std::remove(path.c_str());
  EXPECT_THAT((*source)->List(), StatusIs(absl::StatusCode::kUnavailable, HasSubstr(path)));
}

TEST(FoundWorkersTest, ANameIsResolvedAndOneThatIsNotThereIsNobody) {
  auto source = FindWorkers({"dns:localhost:17"}, None);
  ASSERT_THAT(source, IsOk());
  EXPECT_THAT(List(**source), Contains("127.0.0.1:17"));
  source = FindWorkers({"dns:127.0.0.2:17"}, None);
  ASSERT_THAT(source, IsOk());
  EXPECT_THAT(List(**source), ElementsAre("127.0.0.2:17"));
}

TEST(FoundWorkersTest, APlaceThatIsNoneIsSaid) {
  for (const std::string place : {"a", "file:", "dns:a", "a:b"}) {
    EXPECT_THAT(FindWorkers({place}, None), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--workers")))
        << place;
  }
  EXPECT_THAT(FindWorkers({}, None), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("--workers")));
}

}  // namespace
}  // namespace rwkv::router
