"""The C++ rules of this repository: one place for warnings, layering and thread-safety analysis."""

_COPTS = [
    "-std=c++17",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wthread-safety",
    "-Wno-unused-parameter",
    "-Wno-sign-compare",
]
# A build for another processor has its system headers where the layering check does not look.
_FEATURES = select({
    "//bazel:aarch64_cross": [],
    "//conditions:default": ["layering_check"],
})

# Found from a test's folder by TSAN_OPTIONS in .bazelrc.
_SANITIZER_DATA = select({
    "//bazel:tsan": ["//tests:tsan_suppressions.txt"],
    "//conditions:default": [],
})

def rwkv_cc_library(name, copts = [], features = [], **kwargs):
    native.cc_library(name = name, copts = _COPTS + copts, features = _FEATURES + features, **kwargs)

def rwkv_cc_binary(name, copts = [], features = [], data = [], **kwargs):
    native.cc_binary(
        name = name,
        data = data + _SANITIZER_DATA,
        copts = _COPTS + copts,
        features = _FEATURES + features,
        **kwargs
    )

def rwkv_cc_test(name, copts = [], features = [], data = [], deps = [], size = "small", **kwargs):
    native.cc_test(
        name = name,
        data = data + _SANITIZER_DATA,
        copts = _COPTS + copts,
        features = _FEATURES + features,
        size = size,
        deps = deps + ["//tests/testing:test_main"],
        **kwargs
    )

def rwkv_cc_benchmark(
        name,
        args = [],
        copts = [],
        features = [],
        data = [],
        deps = [],
        tags = [],
        size = "small",
        **kwargs):
    """A benchmark with its own main. As a test it runs each case for a moment, so that it cannot rot.

    To measure: bazel run //some:benchmark -- --benchmark_min_time=1
    """
    native.cc_test(
        name = name,
        args = args + ["--benchmark_min_time=0.001"],
        data = data + _SANITIZER_DATA,
        copts = _COPTS + copts,
        features = _FEATURES + features,
        size = size,
        tags = tags + ["bench"],
        deps = deps + ["//bazel/third_party:benchmark"],
        **kwargs
    )
