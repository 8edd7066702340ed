#include "services/common/channel.h"

#include <chrono>
#include <memory>
#include <thread>

#include "grpcpp/completion_queue.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/support/channel_arguments.h"

namespace rwkv::common {
namespace {

constexpr int kBulkFrameBytes = 1 << 20;
constexpr int kBulkWindowBytes = 8 << 20;
constexpr int kBulkReadBytes = 256 << 10;

// gRPC reads from a connection while some call of its channel waits. A caller that tries again after a pause waits for
// nothing in between, and a TLS handshake, which takes several turns, starves until its time is over (a TCP connection
// needs no reading). So a thread of its own waits for every channel with TLS, from the first on.
class Waiter {
 public:
  static Waiter& Get() {
    static auto* const waiter = new Waiter();
    return *waiter;
  }
  void Add(const std::shared_ptr<grpc::Channel>& channel) { Wait(*channel, new std::weak_ptr<grpc::Channel>(channel)); }

 private:
  Waiter() {
    std::thread([this] { Run(); }).detach();
  }

  void Wait(grpc::Channel& channel, std::weak_ptr<grpc::Channel>* tag) {
    channel.NotifyOnStateChange(channel.GetState(false), std::chrono::system_clock::now() + std::chrono::seconds(1),
                                &queue_, tag);
  }
  void Run() {
    void* tag = nullptr;
    bool ok = false;
    while (queue_.Next(&tag, &ok)) {
      auto* const weak = static_cast<std::weak_ptr<grpc::Channel>*>(tag);
      if (const std::shared_ptr<grpc::Channel> channel = weak->lock()) {
        Wait(*channel, weak);
      } else {
        delete weak;
      }
    }
  }

  grpc::CompletionQueue queue_;
};

}  // namespace

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const ChannelOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(options.max_receive_bytes);
  // As in RpcServer: a compressed answer is refused, not unpacked.
  arguments.SetInt(GRPC_COMPRESSION_CHANNEL_ENABLED_ALGORITHMS_BITSET, 1 << GRPC_COMPRESS_NONE);
  arguments.SetInt(GRPC_ARG_ENABLE_PER_MESSAGE_DECOMPRESSION, 0);
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  if (options.bulk) {
    arguments.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kBulkFrameBytes);
    arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kBulkWindowBytes);
    arguments.SetInt(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, kBulkFrameBytes);
    arguments.SetInt(GRPC_ARG_TCP_READ_CHUNK_SIZE, kBulkReadBytes);
    arguments.SetInt(GRPC_ARG_TCP_MIN_READ_CHUNK_SIZE, kBulkReadBytes);
    arguments.SetInt(GRPC_ARG_TCP_MAX_READ_CHUNK_SIZE, kBulkReadBytes);
  }
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 20);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 1000);  // Also how long one attempt to connect may take.
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // A name is asked for again as often: a pod that comes back has another address. gRPC would wait for 30 s.
  arguments.SetInt(GRPC_ARG_DNS_MIN_TIME_BETWEEN_RESOLUTIONS_MS, 1000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 10000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 5000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);  // No limit: long pauses between messages are normal.
  if (!options.server_name.empty()) arguments.SetSslTargetNameOverride(options.server_name);
  if (options.credentials == nullptr) {
    return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
  }
  std::shared_ptr<grpc::Channel> channel = grpc::CreateCustomChannel(address, options.credentials, arguments);
  Waiter::Get().Add(channel);
  return channel;
}

std::vector<std::shared_ptr<grpc::Channel>> MakeChannels(const std::vector<std::string>& addresses,
                                                         const ChannelOptions& options) {
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (const std::string& address : addresses) channels.push_back(MakeChannel(address, options));
  return channels;
}

}  // namespace rwkv::common
