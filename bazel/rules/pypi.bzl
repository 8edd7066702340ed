"""Data files out of wheels on PyPI, pinned by version and hash."""

def _pin(ctx):
    """The (version, sha256) of the package in the requirements file."""
    for line in ctx.read(ctx.path(ctx.attr._requirements)).split("\n"):
        name, _, rest = line.partition("==")
        version, _, sha256 = rest.partition(" --hash=sha256:")
        if name == ctx.attr.package and sha256:
            return version, sha256.strip()
    fail("%s is not in %s" % (ctx.attr.package, ctx.attr._requirements))

def _pypi_wheel_impl(ctx):
    version, sha256 = _pin(ctx)
    wheel = "%s-%s-%s.whl" % (ctx.attr.package.replace("-", "_"), version, ctx.attr.tag)
    cached = "%s/.cache/rwkv-serving/pypi/%s" % (ctx.os.environ["HOME"], wheel)
    if not ctx.path(cached).exists:
        # The set-up script fills the cache; this serves whoever calls bazel without it.
        ctx.file("requirements.txt", "%s==%s --hash=sha256:%s\n" % (ctx.attr.package, version, sha256))
        result = ctx.execute([
            "python3", "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--require-hashes", "--only-binary=:all:", "--requirement=requirements.txt",
            "--dest=" + str(ctx.path(cached).dirname),
        ])
        if result.return_code != 0:
            fail("%s is not in the cache and cannot be downloaded: %s" % (wheel, result.stderr))
    digest = ctx.execute(["sha256sum", cached]).stdout.split(" ")[0]
    if digest != sha256:
        fail("%s has sha256 %s, expected %s; delete it and try again" % (cached, digest, sha256))
    result = ctx.execute(["python3", "-m", "zipfile", "-e", cached, "."])
    if result.return_code != 0:
        fail("%s cannot be unpacked: %s" % (cached, result.stderr))
    ctx.file("BUILD", ctx.attr.build_file_content)

pypi_wheel = repository_rule(
    implementation = _pypi_wheel_impl,
    doc = "Unpacks a wheel from ~/.cache/rwkv-serving/pypi, filled when needed. Pinned in pypi_requirements.txt.",
    environ = ["HOME"],
    attrs = {
        "build_file_content": attr.string(mandatory = True),
        "package": attr.string(mandatory = True),
        "tag": attr.string(default = "py3-none-any"),
        "_requirements": attr.label(default = "//bazel:pypi_requirements.txt", allow_single_file = True),
    },
)
