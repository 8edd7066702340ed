#include "services/state_store/records/s3/s3_client.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/time/clock.h"
#include "curl/curl.h"
#include "kernels/base/status_macros.h"

namespace rwkv::state_store {
namespace {

constexpr absl::Duration kFirstBackoff = absl::Milliseconds(100);  // Then 3x more each time.
constexpr size_t kMaxIdle = 64;
constexpr size_t kMaxAnswerBytes = 8 << 20;  // Of a list or an error.

// Everything but what stays as it is, as signing wants it: of a path, slashes stay.
std::string Escape(absl::string_view text, bool path) {
  std::string escaped;
  for (const char c : text) {
    if (absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '.' || c == '_' || c == '~' ||
        (path && c == '/')) {
      escaped.push_back(c);
    } else {
      constexpr char kHex[] = "0123456789ABCDEF";
      const auto byte = static_cast<uint8_t>(c);
      escaped.append({'%', kHex[byte >> 4], kHex[byte & 15]});
    }
  }
  return escaped;
}

// The text between <tag> and </tag>, from *at on, which goes behind it. False: there is none.
bool NextElement(absl::string_view xml, absl::string_view tag, size_t* at, absl::string_view* content) {
  const std::string open = absl::StrCat("<", tag, ">"), close = absl::StrCat("</", tag, ">");
  const size_t begin = xml.find(open, *at);
  if (begin == absl::string_view::npos) return false;
  const size_t end = xml.find(close, begin);
  if (end == absl::string_view::npos) return false;
  *content = xml.substr(begin + open.size(), end - begin - open.size());
  *at = end + close.size();
  return true;
}

std::string Element(absl::string_view xml, absl::string_view tag) {
  size_t at = 0;
  absl::string_view content;
  if (!NextElement(xml, tag, &at, &content)) return "";
  return absl::StrReplaceAll(content,
                             {{"&lt;", "<"}, {"&gt;", ">"}, {"&quot;", "\""}, {"&apos;", "'"}, {"&amp;", "&"}});
}

}  // namespace

struct S3Client::Request {
  const char* method = "GET";
  std::string key;
  std::string query;  // Sorted and escaped.
  absl::Span<const char> body;
  uint64_t max_answer = kMaxAnswerBytes;
};

struct S3Client::Response {
  long code = 0;  // NOLINT(google-runtime-int): curl's type.
  std::string body;
};

absl::StatusOr<std::unique_ptr<S3Client>> S3Client::Create(const Options& options) {
  if (!absl::StartsWith(options.endpoint, "http://") && !absl::StartsWith(options.endpoint, "https://")) {
    return absl::InvalidArgumentError(
        absl::StrCat("the S3 endpoint is '", options.endpoint, "', want http://HOST:PORT or https://HOST"));
  }
  if (options.bucket.empty() || options.access_key.empty() || options.secret_key.empty() || options.attempts < 1) {
    return absl::InvalidArgumentError("S3 wants a bucket, an access key and a secret key");
  }
  curl_global_init(CURL_GLOBAL_DEFAULT);  // Thread-safe since 7.84, and counts.
  return std::unique_ptr<S3Client>(new S3Client(options));
}

S3Client::~S3Client() {
  absl::MutexLock lock(&mu_);
  for (void* const handle : idle_) curl_easy_cleanup(handle);
}

void* S3Client::TakeHandle() {
  absl::MutexLock lock(&mu_);
  if (idle_.empty()) return curl_easy_init();
  void* const handle = idle_.back();
  idle_.pop_back();
  return handle;
}

void S3Client::ReturnHandle(void* handle) {
  curl_easy_reset(handle);  // Its connection stays.
  absl::MutexLock lock(&mu_);
  if (idle_.size() < kMaxIdle) {
    idle_.push_back(handle);
  } else {
    curl_easy_cleanup(handle);
  }
}

absl::StatusOr<S3Client::Response> S3Client::SendOnce(const Request& request) {
  CURL* const handle = TakeHandle();
  if (handle == nullptr) return absl::ResourceExhaustedError("S3: no memory for a request");
  Response response;
  struct Body {
    absl::Span<const char> left;
    absl::Span<const char> all;
  } body{request.body, request.body};
  struct Sink {
    std::string* bytes;
    uint64_t max;
  } sink{&response.body, request.max_answer};
  const std::string url = absl::StrCat(options_.endpoint, "/", options_.bucket, request.key.empty() ? "" : "/",
                                       Escape(request.key, true), request.query.empty() ? "" : "?", request.query);
  const std::string user = absl::StrCat(options_.access_key, ":", options_.secret_key);
  const std::string signing = absl::StrCat("aws:amz:", options_.region, ":s3");
  // The body is not hashed: what it must be is checked by our own checksum when it is read.
  curl_slist* const headers = curl_slist_append(nullptr, "x-amz-content-sha256: UNSIGNED-PAYLOAD");
  char error[CURL_ERROR_SIZE] = "";
  curl_easy_setopt(handle, CURLOPT_URL, url.c_str());
  curl_easy_setopt(handle, CURLOPT_USERPWD, user.c_str());
  curl_easy_setopt(handle, CURLOPT_AWS_SIGV4, signing.c_str());
  curl_easy_setopt(handle, CURLOPT_HTTPHEADER, headers);
  curl_easy_setopt(handle, CURLOPT_ERRORBUFFER, error);
  curl_easy_setopt(handle, CURLOPT_NOSIGNAL, 1L);
  curl_easy_setopt(handle, CURLOPT_NOPROXY, "*");
  curl_easy_setopt(handle, CURLOPT_TCP_NODELAY, 1L);
  curl_easy_setopt(handle, CURLOPT_BUFFERSIZE, 512L << 10);
  curl_easy_setopt(handle, CURLOPT_UPLOAD_BUFFERSIZE, 1L << 20);
  curl_easy_setopt(handle, CURLOPT_CONNECTTIMEOUT_MS, static_cast<long>(absl::ToInt64Milliseconds(options_.connect)));
  curl_easy_setopt(handle, CURLOPT_TIMEOUT_MS, static_cast<long>(absl::ToInt64Milliseconds(options_.timeout)));
  curl_easy_setopt(handle, CURLOPT_LOW_SPEED_LIMIT, 1L);
  curl_easy_setopt(handle, CURLOPT_LOW_SPEED_TIME,
                   std::max<long>(1, static_cast<long>(absl::ToInt64Seconds(options_.silence))));
  curl_easy_setopt(handle, CURLOPT_EXPECT_100_TIMEOUT_MS, 1000L);
  const auto write = +[](char* data, size_t size, size_t count, void* to) -> size_t {
    Sink* const sink = static_cast<Sink*>(to);
    if (sink->bytes->size() + size * count > sink->max) return 0;  // Ends the transfer.
    sink->bytes->append(data, size * count);
    return size * count;
  };
  curl_easy_setopt(handle, CURLOPT_WRITEFUNCTION, write);
  curl_easy_setopt(handle, CURLOPT_WRITEDATA, &sink);
  if (std::strcmp(request.method, "PUT") == 0) {
    curl_easy_setopt(handle, CURLOPT_UPLOAD, 1L);
    curl_easy_setopt(handle, CURLOPT_INFILESIZE_LARGE, static_cast<curl_off_t>(request.body.size()));
    const auto read = +[](char* data, size_t size, size_t count, void* from) -> size_t {
      Body* const body = static_cast<Body*>(from);
      const size_t taken = std::min(size * count, body->left.size());
      std::memcpy(data, body->left.data(), taken);
      body->left.remove_prefix(taken);
      return taken;
    };
    // Where a connection that was kept turns out to be closed, curl begins anew.
    const auto seek = +[](void* from, curl_off_t offset, int origin) -> int {
      Body* const body = static_cast<Body*>(from);
      if (origin != SEEK_SET || static_cast<size_t>(offset) > body->all.size()) return CURL_SEEKFUNC_FAIL;
      body->left = body->all.subspan(static_cast<size_t>(offset));
      return CURL_SEEKFUNC_OK;
    };
    curl_easy_setopt(handle, CURLOPT_READFUNCTION, read);
    curl_easy_setopt(handle, CURLOPT_READDATA, &body);
    curl_easy_setopt(handle, CURLOPT_SEEKFUNCTION, seek);
    curl_easy_setopt(handle, CURLOPT_SEEKDATA, &body);
  } else {
    curl_easy_setopt(handle, CURLOPT_CUSTOMREQUEST, request.method);
    response.body.reserve(request.max_answer == kMaxAnswerBytes ? 0 : request.max_answer);
  }
  const CURLcode code = curl_easy_perform(handle);
  curl_easy_getinfo(handle, CURLINFO_RESPONSE_CODE, &response.code);
  curl_slist_free_all(headers);
  ReturnHandle(handle);
  if (code == CURLE_WRITE_ERROR && response.code == 200) {
    return absl::DataLossError(
        absl::StrCat("S3: ", request.method, " ", request.key, ": more than ", request.max_answer, " bytes came"));
  }
  if (code != CURLE_OK) {
    return absl::UnavailableError(absl::StrCat("S3: ", request.method, " ", options_.endpoint, "/", options_.bucket,
                                               "/", request.key, ": ", error[0] ? error : curl_easy_strerror(code)));
  }
  if (response.code / 100 == 2) return response;
  const std::string message =
      absl::StrCat("S3: ", request.method, " ", options_.bucket, "/", request.key, ": ", response.code, " ",
                   Element(response.body, "Code"), " ", Element(response.body, "Message"));
  if (response.code == 404 && Element(response.body, "Code") != "NoSuchBucket") return absl::NotFoundError(message);
  // Busy, or broken inside; 409 and 408 pass as well.
  if (response.code >= 500 || response.code == 429 || response.code == 408 || response.code == 409) {
    return absl::UnavailableError(message);
  }
  return absl::FailedPreconditionError(message);
}

absl::StatusOr<S3Client::Response> S3Client::Send(const Request& request) {
  absl::BitGen random;
  absl::Duration backoff = kFirstBackoff;
  for (int attempt = 1;; ++attempt) {
    absl::StatusOr<Response> response = SendOnce(request);
    if (!absl::IsUnavailable(response.status()) || attempt == options_.attempts) return response;
    absl::SleepFor(backoff * absl::Uniform(random, 0.5, 1.0));
    backoff *= 3;
  }
}

absl::Status S3Client::Put(const std::string& key, absl::Span<const char> data) {
  Request request;
  request.method = "PUT";
  request.key = key;
  request.body = data;
  return Send(request).status();
}

absl::StatusOr<std::string> S3Client::Get(const std::string& key, uint64_t bytes) {
  Request request;
  request.key = key;
  // An error's words may be longer than the object.
  request.max_answer = std::max<uint64_t>(bytes, 64 << 10);
  RWKV_ASSIGN_OR_RETURN(Response response, Send(request));
  if (response.body.size() != bytes) {
    return absl::DataLossError(
        absl::StrCat("S3: ", options_.bucket, "/", key, " has ", response.body.size(), " bytes, want ", bytes));
  }
  return std::move(response.body);
}

absl::Status S3Client::Delete(const std::string& key) {
  Request request;
  request.method = "DELETE";
  request.key = key;
  const absl::Status status = Send(request).status();
  return absl::IsNotFound(status) ? absl::OkStatus() : status;
}

absl::Status S3Client::List(const std::string& prefix, absl::FunctionRef<bool(const Object&)> visit, int page) {
  std::string after;
  for (;;) {
    Request request;
    request.query = absl::StrCat("list-type=2&max-keys=", page, "&prefix=", Escape(prefix, false),
                                 after.empty() ? "" : "&start-after=", Escape(after, false));
    RWKV_ASSIGN_OR_RETURN(const Response response, Send(request));
    size_t at = 0;
    absl::string_view content;
    bool any = false;
    while (NextElement(response.body, "Contents", &at, &content)) {
      Object object;
      object.key = Element(content, "Key");
      std::string error;
      if (object.key.empty() || !absl::SimpleAtoi(Element(content, "Size"), &object.bytes) ||
          !absl::ParseTime(absl::RFC3339_full, Element(content, "LastModified"), &object.modified, &error)) {
        return absl::DataLossError(absl::StrCat("S3: a list of ", options_.bucket, " cannot be read: ", content));
      }
      any = true;
      after = object.key;
      if (!visit(object)) return absl::OkStatus();
    }
    if (!any || Element(response.body, "IsTruncated") != "true") return absl::OkStatus();
  }
}

}  // namespace rwkv::state_store
