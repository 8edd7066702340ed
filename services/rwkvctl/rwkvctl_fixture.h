// Whole command lines against a router in memory.
#pragma once

#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "services/common/security/security.h"
#include "services/router/client/fake_router_client.h"
#include "services/rwkvctl/local_clusters.h"
#include "services/rwkvctl/rwkvctl.h"

namespace rwkv::rwkvctl {

class FakeInterrupts : public Interrupts {
 public:
  void SetHandler(std::function<void()> handler) override { handler_ = std::move(handler); }
  bool has_handler() const { return handler_ != nullptr; }
  void Interrupt() { handler_(); }

 private:
  std::function<void()> handler_;
};

// What a request feeds, as bytes: the fake's ids.
inline std::string Fed(const v1::GenerateRequest& request) {
  return request.has_text() ? request.text()
                            : std::string(request.tokens().ids().begin(), request.tokens().ids().end());
}

// A session's text, after the end of text that it begins with.
inline std::string Begun(const std::string& text) { return std::string(1, '\0') + text; }

class RwkvctlTest : public ::testing::Test {
 protected:
  RwkvctlTest()
      : folder_(std::filesystem::path(::testing::TempDir()) /
                ::testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(Clusters());
    std::ofstream(Clusters() + "/one") << "router=127.0.0.1:4711\npid=" << getpid()
                                       << "\nstarted=" << StartTicks(getpid()) << "\n";
  }
  ~RwkvctlTest() override { std::filesystem::remove_all(folder_); }

  std::string Clusters() const { return (folder_ / "clusters").string(); }

  // Exit status; out_ and err_ are what was printed.
  int Call(const std::vector<std::string>& arguments, const std::string& input = "") {
    std::istringstream in(input);
    std::ostringstream out, err;
    const Environment environment{in,
                                  out,
                                  err,
                                  interrupts_,
                                  terminal_,
                                  terminal_,
                                  terminal_,
                                  Clusters(),
                                  [this](const std::string& address, const common::ClientSecurityOptions& security) {
                                    connected_ = address;
                                    security_ = security;
                                    return std::make_unique<router::FakeRouterClient>(&router_);
                                  }};
    const int status = rwkvctl::Run(arguments, environment);
    out_ = out.str();
    err_ = err.str();
    EXPECT_FALSE(interrupts_.has_handler());
    if (status == 0) {
      EXPECT_TRUE(terminal_ || err_.empty() || absl::StartsWith(err_, "session ")) << err_;
    } else {
      EXPECT_THAT(err_, ::testing::AllOf(::testing::HasSubstr("rwkvctl: "), ::testing::EndsWith("\n")));
    }
    return status;
  }

  // Its path.
  std::string WriteFile(const std::string& name, const std::string& content) const {
    const std::string path = (folder_ / name).string();
    std::ofstream(path, std::ios::binary) << content;
    return path;
  }

  const v1::GenerateRequest& request() const { return router_.generate_requests.back(); }

  const std::filesystem::path folder_;
  router::FakeRouterClient::State router_;
  FakeInterrupts interrupts_;
  bool terminal_ = false;
  std::string out_, err_;
  std::string connected_;
  common::ClientSecurityOptions security_;
};

}  // namespace rwkv::rwkvctl
