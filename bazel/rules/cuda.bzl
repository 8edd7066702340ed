"""CUDA code: compiled where nvcc is, left out where it is not."""

load("@local_cuda//:defs.bzl", "NVCC")

# Ampere and Hopper; newer devices compile the last one's PTX when it is loaded.
_ARCHITECTURES = ["80", "90"]

def _cuda_archive_impl(ctx):
    """One archive of the objects that nvcc makes of `srcs`, against the headers of `deps`."""
    context = cc_common.merge_cc_infos(cc_infos = [dep[CcInfo] for dep in ctx.attr.deps]).compilation_context
    objects = []
    resources = []
    texts = []
    for source in ctx.files.srcs:
        output = ctx.actions.declare_file("%s_objects/%s.o" % (ctx.label.name, source.basename))
        resource = ctx.actions.declare_file("%s_objects/%s.ptxas.txt" % (ctx.label.name, source.basename))
        arguments = ctx.actions.args()
        arguments.add_all(["-ccbin", "/usr/bin/g++", "-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-Wall,-fno-omit-frame-pointer"])
        for architecture in _ARCHITECTURES:
            arguments.add("-gencode=arch=compute_%s,code=sm_%s" % (architecture, architecture))
        arguments.add("-gencode=arch=compute_%s,code=compute_%s" % (_ARCHITECTURES[-1], _ARCHITECTURES[-1]))
        arguments.add("-Xptxas=-v")  # Registers, shared memory and spills of every kernel, on standard error.
        arguments.add_all(ctx.attr.copts)
        arguments.add_all(depset(transitive = [context.defines, context.local_defines]), format_each = "-D%s")
        arguments.add_all([".", ctx.bin_dir.path], format_each = "-I%s")
        arguments.add_all(context.quote_includes, format_each = "-I%s")
        arguments.add_all(context.includes, format_each = "-I%s")
        arguments.add_all(context.system_includes, format_each = "-isystem=%s")
        arguments.add_all(["-c", source, "-o", output])
        ctx.actions.run_shell(
            command = 'log=$1; shift; "$@" 2> "$log" || { cat "$log" >&2; exit 1; }',
            arguments = [resource.path, NVCC, arguments],
            inputs = depset(ctx.files.srcs + ctx.files.hdrs, transitive = [context.headers]),
            outputs = [output, resource],
            mnemonic = "Nvcc",
            progress_message = "Compiling %s with nvcc" % source.short_path,
            env = {"PATH": "/usr/bin:/bin"},  # nvcc's own helpers.
        )
        objects.append(output)
        resources.append(resource)

        # The instructions for the last architecture, as text: only built where somebody wants to read it.
        text = ctx.actions.declare_file("%s_objects/%s.ptx" % (ctx.label.name, source.basename))
        arguments = ctx.actions.args()
        arguments.add_all(["-ccbin", "/usr/bin/g++", "-std=c++17", "-O3"])
        arguments.add_all(["-ptx", "-arch=compute_" + _ARCHITECTURES[-1]])
        arguments.add_all(ctx.attr.copts)
        arguments.add_all(depset(transitive = [context.defines, context.local_defines]), format_each = "-D%s")
        arguments.add_all([".", ctx.bin_dir.path], format_each = "-I%s")
        arguments.add_all(context.quote_includes, format_each = "-I%s")
        arguments.add_all(context.includes, format_each = "-I%s")
        arguments.add_all(context.system_includes, format_each = "-isystem=%s")
        arguments.add_all([source, "-o", text])
        ctx.actions.run(
            executable = NVCC,
            arguments = [arguments],
            inputs = depset(ctx.files.srcs + ctx.files.hdrs, transitive = [context.headers]),
            outputs = [text],
            mnemonic = "NvccPtx",
            progress_message = "Writing the PTX of %s" % source.short_path,
            env = {"PATH": "/usr/bin:/bin"},
        )
        texts.append(text)
    archive = ctx.actions.declare_file("lib%s.a" % ctx.label.name)
    ctx.actions.run(
        executable = "/usr/bin/ar",
        arguments = ["crsD", archive.path] + [object.path for object in objects],
        inputs = objects,
        outputs = [archive],
        mnemonic = "CudaArchive",
    )
    return [DefaultInfo(files = depset([archive])), OutputGroupInfo(resources = depset(resources), ptx = depset(texts))]

_cuda_archive = rule(
    implementation = _cuda_archive_impl,
    attrs = {
        "copts": attr.string_list(),
        "deps": attr.label_list(providers = [CcInfo]),
        "hdrs": attr.label_list(allow_files = [".h", ".cuh"]),
        "srcs": attr.label_list(allow_files = [".cu"], mandatory = True),
    },
)

def cuda_library(name, srcs, hdrs = [], deps = [], copts = [], **kwargs):
    """A C++ library whose sources are CUDA.

    Without nvcc it has its headers and nothing else. Its users see RWKV_HAVE_CUDA as 1 or 0 and must not call into it
    when it is 0.

    Args:
      name: of the cc_library.
      srcs: .cu files.
      hdrs: .h for everybody; .cuh for other .cu files.
      deps: C++ libraries; the CUDA runtime is added.
      copts: more arguments for nvcc.
      **kwargs: visibility, testonly, tags.
    """
    archive = []
    if NVCC:
        _cuda_archive(
            name = name + "_cuda",
            srcs = srcs,
            hdrs = hdrs,
            copts = copts,
            deps = deps + ["@local_cuda//:cudart"],
            testonly = kwargs.get("testonly", False),
            visibility = ["//visibility:private"],
        )
        archive = [":%s_cuda" % name]
    native.cc_library(
        name = name,
        srcs = archive,
        hdrs = hdrs,
        linkstatic = True,
        defines = ["RWKV_HAVE_CUDA=" + ("1" if NVCC else "0")],
        deps = deps + ["@local_cuda//:cudart"],
        **kwargs
    )

def emulated_cuda_library(name, srcs, textual_hdrs = [], deps = [], copts = [], **kwargs):
    """The same sources as plain C++, for tests: kernels run on the emulation of kernels/cuda/testing.

    Args:
      name: of the cc_library.
      srcs: .cu files.
      textual_hdrs: .cuh files.
      deps: C++ libraries, the emulation among them.
      copts: more arguments for the compiler.
      **kwargs: visibility, testonly, tags.
    """
    wrappers = []
    for source in srcs:
        label = source if source.startswith("//") else "//%s:%s" % (native.package_name(), source)
        stem = label.rsplit(":", 1)[1][:-len(".cu")]
        path = label[2:].replace(":", "/")
        wrapper = "%s_%s.cc" % (name, stem)
        native.genrule(
            name = "%s_%s_source" % (name, stem),
            outs = [wrapper],
            cmd = "echo '#include \"%s\"' > $@" % path,
            testonly = kwargs.get("testonly", False),
        )
        wrappers.append(wrapper)
    native.cc_library(
        name = name,
        srcs = wrappers,
        textual_hdrs = textual_hdrs + srcs,
        copts = ["-std=c++17", "-Wall", "-Werror", "-Wno-pass-failed", "-ffp-contract=off"] + copts,
        deps = deps,
        **kwargs
    )
