"""A libFuzzer target and the test that runs its seeds without libFuzzer."""

load("//bazel/rules:cc.bzl", "rwkv_cc_binary", "rwkv_cc_library", "rwkv_cc_test")

def rwkv_fuzz_target(name, deps):
    """Makes NAME_fuzz and NAME_corpus_test from NAME_fuzz.cc and the folder corpus/NAME."""
    rwkv_cc_library(
        name = name + "_target",
        testonly = True,
        srcs = [name + "_fuzz.cc"],
        # Nothing calls LLVMFuzzerTestOneInput by include, so the linker must be told to keep it.
        alwayslink = True,
        deps = deps,
    )
    rwkv_cc_binary(
        name = name + "_fuzz",
        testonly = True,
        linkopts = ["-fsanitize=fuzzer"],
        # libFuzzer's main needs the instrumentation of --config=fuzz; without, it would not link.
        tags = ["manual"],
        deps = [":" + name + "_target"],
    )
    rwkv_cc_test(
        name = name + "_corpus_test",
        srcs = ["corpus_test.cc"],
        data = native.glob(["corpus/" + name + "/*"]),
        local_defines = ['RWKV_CORPUS=\\"tests/fuzz/corpus/%s\\"' % name],
        deps = [
            ":" + name + "_target",
            "//bazel/third_party:absl_strings",
            "//bazel/third_party:gtest",
        ],
    )
