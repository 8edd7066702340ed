#include "services/state_store/client/shared_window.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <atomic>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "absl/types/optional.h"
#include "absl/types/span.h"
#include "gmock/gmock.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "gtest/gtest.h"
#include "rwkv/v1/state_store.grpc.pb.h"
#include "services/common/grpc_status.h"
#include "services/state_store/client/fake_store_fixture.h"
#include "services/state_store/client/state_store_client.h"
#include "tests/testing/status_matchers.h"

namespace rwkv::state_store {
namespace {

using absl::StatusCode;
using testing::ElementsAre;
using testing::IsOkAndHolds;
using testing::Ne;
using testing::SizeIs;
using testing::StatusIs;

std::string Path(const std::string& name) { return "/dev/shm/" + name; }

bool HasPlace(SharedWindow& window, size_t bytes) {
  const auto place = window.Take(bytes);
  return place.ok() && place->has_value();
}

// --- The window itself ------------------------------------------------------------------------------------------------

TEST(SharedWindowTest, BothEndsSeeTheSameBytesUntilTheClientsEndGoes) {
  std::shared_ptr<SharedWindow> window = SharedWindow::Create(2, 1 << 20);
  std::string name;
  {
    ASSERT_OK_AND_ASSIGN(const absl::optional<SharedWindow::Place> first, window->Take(3));
    ASSERT_OK_AND_ASSIGN(const absl::optional<SharedWindow::Place> second, window->Take(1 << 20));
    ASSERT_TRUE(first.has_value() && second.has_value());
    EXPECT_NE(first->name(), second->name());
    EXPECT_FALSE(HasPlace(*window, 1)) << "both are in use";
    name = second->name();
    ASSERT_OK_AND_ASSIGN(const SharedFile file, SharedFile::Open(name));
    ASSERT_OK(first->file().Write(0, std::string("abc")));
    ASSERT_OK(second->file().Write(0, std::string("xyz")));
    ASSERT_OK(file.Write(1, std::string("Y")));
    std::string read(3, ' ');
    ASSERT_OK(second->file().Read(0, absl::MakeSpan(read)));
    EXPECT_EQ(read, "xYz");
    ASSERT_OK(first->file().Read(0, absl::MakeSpan(read)));
    EXPECT_EQ(read, "abc");
    EXPECT_THAT(file.Read(1, absl::MakeSpan(read)), StatusIs(StatusCode::kUnavailable)) << "beyond its end";
  }
  EXPECT_TRUE(HasPlace(*window, 1 << 20));
  EXPECT_FALSE(HasPlace(*window, (1 << 20) + 1)) << "larger than a place";
  EXPECT_TRUE(std::filesystem::exists(Path(name)));
  window.reset();
  EXPECT_FALSE(std::filesystem::exists(Path(name)));
  EXPECT_THAT(SharedFile::Open(name), StatusIs(StatusCode::kNotFound));
}

TEST(SharedWindowTest, APlaceIsGivenOutAgainUnlessItWasAbandoned) {
  const std::shared_ptr<SharedWindow> window = SharedWindow::Create(1, 10);
  std::string name;
  for (const bool again : {false, true, false}) {
    ASSERT_OK_AND_ASSIGN(absl::optional<SharedWindow::Place> place, window->Take(1));
    ASSERT_TRUE(place.has_value());
    EXPECT_EQ(place->name() == name, again);
    name = place->name();
    if (again) place->Abandon();
  }
}

TEST(SharedWindowTest, OnlyWindowsAreOpened) {
  const std::string hex(32, 'a');
  for (const std::string& name :
       {std::string(), std::string("passwd"), "rwkv-states-" + hex.substr(1), "rwkv-states-" + hex + "a",
        std::string("rwkv-states-../../../etc/passwd........."), absl::StrCat("/rwkv-states-", hex),
        absl::StrCat("rwkv-states-", hex.substr(1), "/")}) {
    EXPECT_THAT(SharedFile::Open(name), StatusIs(StatusCode::kInvalidArgument)) << name;
  }
  EXPECT_THAT(SharedFile::Open("rwkv-states-" + hex), StatusIs(StatusCode::kNotFound));
  const std::string link = "rwkv-states-0123456789abcdef0123456789abcde0";
  std::filesystem::remove(Path(link));
  std::filesystem::create_symlink("/etc/hostname", Path(link));
  EXPECT_THAT(SharedFile::Open(link), StatusIs(StatusCode::kNotFound)) << "a link to something else";
  std::filesystem::remove(Path(link));
}

TEST(SharedWindowTest, WhatDeadProcessesLeftIsRemoved) {
  const std::string dead = Path("rwkv-states-0123456789abcdef0123456789abcdef");
  const std::string other = Path("rwkv-states-of-something-else");
  std::ofstream(dead) << "left";
  std::ofstream(other) << "not ours";
  const std::shared_ptr<SharedWindow> window = SharedWindow::Create(1, 10);
  EXPECT_FALSE(std::filesystem::exists(dead));
  EXPECT_TRUE(std::filesystem::exists(other));
  ASSERT_OK_AND_ASSIGN(const absl::optional<SharedWindow::Place> alive, window->Take(1));
  SharedWindow::Create(1, 10);
  EXPECT_TRUE(std::filesystem::exists(Path(alive->name())));
  std::filesystem::remove(other);
}

// --- Records through it -----------------------------------------------------------------------------------------------

std::string Bytes(size_t count) {
  std::string bytes(count, ' ');
  for (size_t i = 0; i < count; ++i) bytes[i] = static_cast<char>(i * 7 + i / 251);
  return bytes;
}

class SharedRecordsTest : public FakeStoreTest {
 protected:
  const std::unique_ptr<RecordsClient> records_ = NewRecordsClient(fake_->channel(), /*share_memory=*/true);
};

TEST_F(SharedRecordsTest, RecordsComeBackAsTheyWerePut) {
  const std::string data[] = {Bytes(5), Bytes((1 << 20) + 17), Bytes(300000)};
  std::vector<v1::RecordInfo> infos;
  std::vector<absl::Span<const char>> from;
  std::vector<std::string> read;
  std::vector<absl::Span<char>> to;
  for (int layer = 0; layer < 3; ++layer) {
    infos.push_back(InfoOf("x", layer, data[layer]));
    from.emplace_back(data[layer]);
    read.emplace_back(data[layer].size(), ' ');
  }
  for (std::string& record : read) to.push_back(absl::MakeSpan(record));
  ASSERT_OK(records_->PutRecords(infos, from, 0, nullptr, Deadline()));
  ASSERT_OK(records_->ReadRecords(infos, to, Deadline()));
  EXPECT_THAT(read, ElementsAre(data[0], data[1], data[2]));
  EXPECT_THAT(fake_->GetRecord(infos[1], Deadline()), IsOkAndHolds(data[1])) << "by a connection";
  v1::RecordInfo wrong = infos[0];
  wrong.set_crc32c(wrong.crc32c() + 1);
  wrong.set_layer(7);
  EXPECT_THAT(records_->PutRecord(wrong, data[0], nullptr, Deadline()), StatusIs(StatusCode::kDataLoss));
  EXPECT_THAT(records_->GetRecord(InfoOf("x", 8, "abc"), Deadline()), StatusIs(StatusCode::kNotFound));
}

TEST_F(SharedRecordsTest, WhatIsLargerThanAPlaceGoesByTheConnection) {
  const std::string data = Bytes(size_t{9} << 20);
  ASSERT_OK(records_->PutRecord(InfoOf("x", 0, data), data, nullptr, Deadline()));
  EXPECT_THAT(records_->GetRecord(InfoOf("x", 0, data), Deadline()), IsOkAndHolds(data));
}

// A store that notes how it was asked.
class WatchedStore : public v1::StateRecords::Service {
 public:
  grpc::Status PutRecords(grpc::ServerContext*, grpc::ServerReader<v1::PutRecordsRequest>* reader,
                          v1::PutRecordsResponse*) override {
    v1::PutRecordsRequest request;
    std::string data;
    reader->Read(&request);
    const std::string name = request.shared().name();
    while (reader->Read(&request)) data += request.data();
    absl::MutexLock lock(&mu_);
    names.push_back(name);
    if (!name.empty()) return common::ToGrpcStatus(refuse_with);
    put = data;
    return grpc::Status::OK;
  }
  grpc::Status GetRecords(grpc::ServerContext* context, const v1::GetRecordsRequest* request,
                          grpc::ServerWriter<v1::GetRecordsResponse>* writer) override {
    {
      absl::MutexLock lock(&mu_);
      names.push_back(request->shared().name());
    }
    while (hangs && !context->IsCancelled()) absl::SleepFor(absl::Milliseconds(1));
    v1::GetRecordsResponse response;
    response.set_data(put);
    writer->Write(response);
    return grpc::Status::OK;
  }

  absl::Mutex mu_;
  std::vector<std::string> names;  // Of the shared memory, in the order of the calls; "": none.
  std::string put;
  absl::Status refuse_with;
  std::atomic<bool> hangs{false};
};

class WatchedStoreTest : public ::testing::Test {
 protected:
  WatchedStoreTest() {
    grpc::ServerBuilder builder;
    builder.RegisterService(&store_);
    server_ = builder.BuildAndStart();
    records_ = NewRecordsClient(server_->InProcessChannel({}), /*share_memory=*/true);
  }
  ~WatchedStoreTest() override { server_->Shutdown(); }

  const std::string data_ = Bytes(1000);
  const v1::RecordInfo info_ = InfoOf("x", 0, data_);
  WatchedStore store_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<RecordsClient> records_;
};

TEST_F(WatchedStoreTest, AStoreOfAnotherMachineOrAnOlderVersionIsAskedOnce) {
  // The second is what one says that knows nothing of such memory.
  for (const absl::Status& refusal :
       {common::WithErrorInfo(absl::FailedPreconditionError("none here"), "NO_SHARED_MEMORY"),
        absl::DataLossError("record x/0: 0 bytes of the 1000 of its info came")}) {
    store_.refuse_with = refusal;
    store_.names.clear();
    records_ = NewRecordsClient(server_->InProcessChannel({}), /*share_memory=*/true);
    for (int i = 0; i < 2; ++i) {
      ASSERT_OK(records_->PutRecord(info_, data_, nullptr, Deadline()));
      EXPECT_EQ(store_.put, data_);
    }
    EXPECT_THAT(records_->GetRecord(info_, Deadline()), IsOkAndHolds(data_));
    EXPECT_THAT(store_.names, ElementsAre(Ne(""), "", "", ""));
  }
}

TEST_F(WatchedStoreTest, BytesThatComeByTheConnectionNeverthelessAreTaken) {
  store_.put = data_;
  EXPECT_THAT(records_->GetRecord(info_, Deadline()), IsOkAndHolds(data_));
  EXPECT_THAT(records_->GetRecord(info_, Deadline()), IsOkAndHolds(data_));
  EXPECT_THAT(store_.names, ElementsAre(Ne(""), ""));
}

TEST_F(WatchedStoreTest, WhatAStoreMayStillWriteToIsNeverUsedAgain) {
  store_.put = data_;
  store_.hangs = true;
  EXPECT_THAT(records_->GetRecord(info_, absl::Now() + absl::Milliseconds(50)),
              StatusIs(StatusCode::kDeadlineExceeded));
  store_.hangs = false;
  EXPECT_THAT(records_->GetRecord(info_, Deadline()), IsOkAndHolds(data_));
  absl::MutexLock lock(&store_.mu_);
  ASSERT_THAT(store_.names, SizeIs(2));
  EXPECT_NE(store_.names[1], "");
  EXPECT_NE(store_.names[0], store_.names[1]);
}

}  // namespace
}  // namespace rwkv::state_store
