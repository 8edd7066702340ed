"""The CUDA toolkit of this machine, if it has one."""

def _find_toolkit(ctx):
    """The folder above bin/nvcc, or None. $CUDA_HOME, then $PATH, then the usual place."""
    candidates = []
    if ctx.os.environ.get("CUDA_HOME"):
        candidates.append(ctx.path(ctx.os.environ["CUDA_HOME"]))
    nvcc = ctx.which("nvcc")
    if nvcc:
        candidates.append(nvcc.realpath.dirname.dirname)
    candidates.append(ctx.path("/usr/local/cuda"))
    for toolkit in candidates:
        compiler = toolkit.get_child("bin").get_child("nvcc")
        header = toolkit.get_child("include").get_child("cuda_runtime.h")
        if compiler.exists and header.exists:
            return toolkit
    return None

def _local_cuda_impl(ctx):
    toolkit = None if ctx.os.environ.get("RWKV_CUDA") == "none" else _find_toolkit(ctx)
    if toolkit == None:
        if ctx.os.environ.get("RWKV_CUDA") == "required":
            fail("--config=cuda needs nvcc: not in $CUDA_HOME, $PATH or /usr/local/cuda")

        # buildifier: disable=print
        print("no nvcc found: this build is CPU-only")
        ctx.file("defs.bzl", "NVCC = None\n")
        ctx.file("BUILD", "".join([
            """cc_library(name = "%s", visibility = ["//visibility:public"])\n""" % name
            for name in ["cudart", "cudart_headers"]
        ]))
        return
    libraries = "lib64" if toolkit.get_child("lib64").exists else "lib"
    ctx.file("defs.bzl", "NVCC = \"%s\"\n" % toolkit.get_child("bin").get_child("nvcc"))

    # A link of our own, because cc_library takes no include folder outside its package.
    ctx.symlink(toolkit.get_child("include"), "include")
    ctx.file("BUILD", """
cc_library(
    name = "cudart_headers",
    hdrs = glob(["include/*.h", "include/*.hpp", "include/crt/**"]),
    includes = ["include"],
    visibility = ["//visibility:public"],
)
cc_library(
    name = "cudart",
    deps = [":cudart_headers"],
    linkopts = ["-L%s", "-lcudart_static", "-ldl", "-lpthread", "-lrt"],
    visibility = ["//visibility:public"],
)
""" % toolkit.get_child(libraries))

local_cuda = repository_rule(
    implementation = _local_cuda_impl,
    doc = "@local_cuda//:defs.bzl has NVCC, a path or None; @local_cuda//:cudart is the runtime, empty without one.",
    environ = ["CUDA_HOME", "PATH", "RWKV_CUDA"],
    local = True,
)
