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
_FEATURES = ["layering_check"]

def rwkv_cc_library(name, copts = [], features = [], **kwargs):
    native.cc_library(name = name, copts = _COPTS + copts, features = _FEATURES + features, **kwargs)

def rwkv_cc_binary(name, copts = [], features = [], **kwargs):
    native.cc_binary(name = name, copts = _COPTS + copts, features = _FEATURES + features, **kwargs)

def rwkv_cc_test(name, copts = [], features = [], data = [], deps = [], size = "small", **kwargs):
    native.cc_test(
        name = name,
        # Found from the test's folder by TSAN_OPTIONS in .bazelrc.
        data = data + select({
            "//bazel:tsan": ["//tests:tsan_suppressions.txt"],
            "//conditions:default": [],
        }),
        copts = _COPTS + copts,
        features = _FEATURES + features,
        size = size,
        deps = deps + ["//bazel/third_party:gtest_main"],
        **kwargs
    )
