// Real certificates for tests, made on the spot: authorities, and certificates of theirs with any name and any age.
#pragma once

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace rwkv::testing {

// An authority with a key of its own. EC keys: a millisecond each.
class TestAuthority {
 public:
  struct Subject {
    std::string alternative_names;  // As in OpenSSL's configuration: "URI:spiffe://test/rwkv/router,DNS:localhost".
    absl::Duration starts_in = -absl::Hours(1);
    absl::Duration ends_in = absl::Hours(1);
  };
  explicit TestAuthority(const std::string& name);
  TestAuthority(const std::string& name, const Subject& subject);
  // One in between: its certificate is signed by `parent`.
  TestAuthority(const std::string& name, const TestAuthority& parent);
  ~TestAuthority();

  struct Pair {
    std::string certificate;  // PEM, both.
    std::string key;
  };
  Pair Issue(const Subject& subject);
  // For a role, valid now, and good for "localhost" and 127.0.0.1.
  Pair IssueRole(const std::string& role);

  const std::string& certificate() const { return certificate_; }  // PEM

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
  std::string certificate_;
};

// Files of a process: DIRECTORY/{tls.crt,tls.key,ca.crt}, names as Kubernetes has them. Each is replaced by a rename.
class TlsFolder {
 public:
  explicit TlsFolder(const std::string& directory);
  void Write(const TestAuthority::Pair& pair);
  void WriteAuthorities(const std::string& pem);
  std::string certificate() const { return directory_ + "/tls.crt"; }
  std::string key() const { return directory_ + "/tls.key"; }
  std::string authorities() const { return directory_ + "/ca.crt"; }

 private:
  const std::string directory_;
};

// Writes beside, then renames.
void ReplaceFile(const std::string& path, const std::string& content);

}  // namespace rwkv::testing
