#include "services/common/security/tls_files.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/base/status_macros.h"
#include "services/common/grpc_status.h"
#include "services/common/logging.h"

namespace rwkv::common {
namespace {

using ::grpc::experimental::FileWatcherCertificateProvider;

unsigned WholeSeconds(absl::Duration interval) {
  return static_cast<unsigned>(std::max<int64_t>(1, absl::ToInt64Seconds(interval)));
}

// A new file in memory that holds the text.
absl::StatusOr<int> NewMemoryFile(const std::string& text) {
  const int descriptor = memfd_create("tls", MFD_CLOEXEC);
  if (descriptor < 0) return absl::ErrnoToStatus(errno, "no memory for certificates");
  for (size_t done = 0; done < text.size();) {
    const ssize_t written = write(descriptor, text.data() + done, text.size() - done);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      const absl::Status status = absl::ErrnoToStatus(errno, "no memory for certificates");
      close(descriptor);
      return status;
    }
    done += static_cast<size_t>(written);
  }
  return descriptor;
}

}  // namespace

std::string TlsFiles::Published::path() const { return absl::StrCat("/proc/self/fd/", descriptor_); }

absl::Status TlsFiles::Published::Replace(const std::string& text) {
  RWKV_ASSIGN_OR_RETURN(const int fresh, NewMemoryFile(text));
  // gRPC reads key and certificate one after the other, and again if the time of either changed meanwhile: by whole
  // seconds, and zero is none.
  const timespec time = {++version_, 0};
  const timespec times[] = {time, time};
  futimens(fresh, times);
  if (descriptor_ < 0) {
    descriptor_ = fresh;
    return absl::OkStatus();
  }
  const int replaced =
      dup3(fresh, descriptor_, O_CLOEXEC);  // At once: whoever opens the path has the one or the other.
  const absl::Status status = replaced < 0 ? absl::ErrnoToStatus(errno, "certificates") : absl::OkStatus();
  close(fresh);
  return status;
}

absl::StatusOr<TlsFiles::Texts> TlsFiles::Read() const {
  Texts texts;
  RWKV_ASSIGN_OR_RETURN(texts.certificate, ReadPemFile(options_.certificate));
  RWKV_ASSIGN_OR_RETURN(texts.key, ReadPemFile(options_.key));
  RWKV_ASSIGN_OR_RETURN(texts.authorities, ReadPemFile(options_.authorities));
  return texts;
}

void TlsFiles::Check(const Texts& texts, State* state) const {
  const absl::Time now = absl::Now();
  const auto check_own = [&]() -> absl::Status {
    RWKV_ASSIGN_OR_RETURN(state->own, ParseCertificate(texts.certificate));
    RWKV_RETURN_IF_ERROR(CheckValidAt(state->own, now));
    if (options_.role.has_value() && !state->own.roles.Has(*options_.role)) {
      return absl::InvalidArgumentError(absl::StrCat("is of the role ", state->own.roles.ToString(),
                                                     ", this process is a ", RoleName(*options_.role)));
    }
    return absl::OkStatus();
  };
  const absl::StatusOr<CertificateInfo> authorities = ParseAuthorities(texts.authorities, now);
  if (authorities.ok()) state->authorities = *authorities;
  state->authorities_status = Annotate(authorities.status(), options_.authorities);
  state->own_status = Annotate(check_own(), options_.certificate);
  if (state->own_status.ok()) {
    state->own_status = Annotate(CheckKeyOfCertificate(texts.key, texts.certificate), options_.key);
  }
  if (state->own_status.ok() && state->authorities_status.ok()) {
    // Others believe the same authorities, so they would not believe this process.
    state->authorities_status = Annotate(CheckSignedBy(texts.certificate, texts.authorities),
                                         absl::StrCat(options_.certificate, ", by ", options_.authorities));
  }
}

absl::Status TlsFiles::Publish(const Texts& texts) {
  RWKV_RETURN_IF_ERROR(authorities_.Replace(texts.authorities));
  // In one file, so that no key is ever read with another's certificate. Each reader passes over what is not its own.
  return identity_.Replace(absl::StrCat(texts.key, "\n", texts.certificate));
}

absl::StatusOr<std::unique_ptr<TlsFiles>> TlsFiles::Open(const Options& options) {
  std::unique_ptr<TlsFiles> files(new TlsFiles(options));
  absl::MutexLock lock(&files->mu_);
  RWKV_ASSIGN_OR_RETURN(files->used_, files->Read());
  files->Check(files->used_, &files->state_);
  RWKV_RETURN_IF_ERROR(files->state_.own_status);
  RWKV_RETURN_IF_ERROR(files->state_.authorities_status);
  RWKV_RETURN_IF_ERROR(files->Publish(files->used_));
  for (const std::string& path : {files->identity_.path(), files->authorities_.path()}) {
    RWKV_RETURN_IF_ERROR(Annotate(ReadPemFile(path).status(), "TLS wants /proc to be there"));
  }
  files->provider_ = std::make_shared<FileWatcherCertificateProvider>(files->identity_.path(), files->identity_.path(),
                                                                      files->authorities_.path(),
                                                                      WholeSeconds(options.reload_interval));
  return files;
}

TlsFiles::State TlsFiles::Look() {
  absl::MutexLock lock(&mu_);
  const absl::StatusOr<Texts> texts = Read();
  State now;
  if (!texts.ok()) {
    now.own_status = now.authorities_status = texts.status();
  } else if (!(*texts == used_)) {
    Check(*texts, &now);
    if (now.own_status.ok() && now.authorities_status.ok()) now.own_status = Publish(*texts);
    if (now.own_status.ok() && now.authorities_status.ok()) {
      used_ = *texts;
      state_ = now;
      LogInfo("tls_files_read", {{"roles", now.own.roles.ToString()},
                                 {"expires", absl::FormatTime(now.own.not_after, absl::UTCTimeZone())}});
    }
  }
  state_.own_status = now.own_status;
  state_.authorities_status = now.authorities_status;
  SayWhy(now.own_status.ok() ? now.authorities_status : now.own_status);
  return state_;
}

void TlsFiles::SayWhy(const absl::Status& why) {
  if (why.ok() || why.message() != wrong_) times_ = 0;
  wrong_ = std::string(why.message());
  if (!why.ok() && ++times_ == 2) LogWarning("tls_files_unusable", {{"why", why.message()}});
}

}  // namespace rwkv::common
