"""Abseil with thread-sanitizer instrumentation, out of ~/.cache/rwkv-serving."""

# The name that an error about a missing file shows.
_FOLDER = "made_by_deploy_local_setup.sh_--tsan"

_BUILD = """
cc_import(
    name = "abseil",
    static_library = "%s/libabseil_tsan.a",
    # Whole, so that libgrpc finds every lock function here and the process has one set of them, not two.
    alwayslink = True,
    visibility = ["//visibility:public"],
)
""" % _FOLDER

def _abseil_tsan_impl(ctx):
    # The folder may not be there yet; only a build with --config=tsan looks into it.
    ctx.symlink(ctx.os.environ["HOME"] + "/.cache/rwkv-serving/abseil-tsan", _FOLDER)
    ctx.file("BUILD", _BUILD)

abseil_tsan = repository_rule(
    implementation = _abseil_tsan_impl,
    doc = "The library that bazel/abseil_tsan.sh builds.",
    environ = ["HOME"],
    local = True,
)
