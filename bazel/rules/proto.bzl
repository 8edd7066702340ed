"""Protocol buffers and gRPC stubs, made by the system's protoc."""

def rwkv_proto_library(name, src, deps = [], grpc = False, visibility = None):
    """C++ library for one .proto file under //proto, whose include path is its import path.

    Args:
      name: target; C++ includes "<import path without .proto>.pb.h".
      src: the .proto file, in this package.
      deps: rwkv_proto_library targets of the imported files.
      grpc: also makes .grpc.pb.h with the service stubs.
      visibility: as usual.
    """
    stem = src[:-len(".proto")]
    outs = [stem + ".pb.h", stem + ".pb.cc"]
    flags = "--cpp_out=$(RULEDIR)/%s" % _root()
    if grpc:
        outs += [stem + ".grpc.pb.h", stem + ".grpc.pb.cc"]
        flags += " --plugin=protoc-gen-grpc=/usr/bin/grpc_cpp_plugin --grpc_out=$(RULEDIR)/%s" % _root()
    native.filegroup(name = name + "_protos", srcs = [src] + [dep + "_protos" for dep in deps], visibility = visibility)
    native.genrule(
        name = name + "_gen",
        srcs = [":" + name + "_protos", "@googleapis//:protos"],
        outs = outs,
        cmd = "protoc -Iproto -I$$(dirname $$(dirname $$(dirname $(location @googleapis//:google/rpc/status.proto)))) " +
              "%s %s/%s" % (flags, native.package_name(), src),
        tools = ["@googleapis//:google/rpc/status.proto"],
    )
    native.cc_library(
        name = name,
        srcs = [out for out in outs if out.endswith(".cc")],
        hdrs = [out for out in outs if out.endswith(".h")],
        strip_include_prefix = "/proto",
        # Under the thread sanitizer this code is left out: it reads and writes libgrpc's buffers, and the sanitizer
        # does not see libgrpc recycle them. Inlined getters and setters count as their users' code and are checked.
        copts = ["-std=c++17"] + select({
            "//bazel:tsan": ["-fno-sanitize=thread"],
            "//conditions:default": [],
        }),
        deps = deps + ["//bazel/third_party:protobuf", "@googleapis//:rpc_cc"] +
               (["//bazel/third_party:grpc"] if grpc else []),
        visibility = visibility,
    )

def _root():
    """From this package up to //proto."""
    return "/".join([".."] * native.package_name().count("/"))
