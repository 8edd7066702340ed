"""Libraries that the system's packages install under /usr."""

# The closure of every Abseil target we use, in link order (from pkg-config). Unneeded ones are dropped by --as-needed.
_ABSL_LIBS = [
    "absl_flags_parse",
    "absl_flags_usage",
    "absl_flags_usage_internal",
    "absl_statusor",
    "absl_status",
    "absl_strerror",
    "absl_random_distributions",
    "absl_throw_delegate",
    "absl_raw_logging_internal",
    "absl_random_seed_sequences",
    "absl_random_internal_pool_urbg",
    "absl_random_internal_randen",
    "absl_random_internal_randen_hwaes",
    "absl_random_internal_randen_hwaes_impl",
    "absl_random_internal_randen_slow",
    "absl_random_internal_platform",
    "absl_random_internal_seed_material",
    "absl_random_seed_gen_exception",
    "absl_failure_signal_handler",
    "absl_examine_stack",
    "absl_flags_internal",
    "absl_flags_marshalling",
    "absl_flags_reflection",
    "absl_flags_private_handle_accessor",
    "absl_flags_commandlineflag",
    "absl_flags_commandlineflag_internal",
    "absl_flags_config",
    "absl_flags_program_name",
    "absl_cord",
    "absl_cordz_info",
    "absl_cord_internal",
    "absl_cordz_functions",
    "absl_cordz_handle",
    "absl_hash",
    "absl_city",
    "absl_bad_variant_access",
    "absl_low_level_hash",
    "absl_raw_hash_set",
    "absl_bad_optional_access",
    "absl_hashtablez_sampler",
    "absl_exponential_biased",
    "absl_synchronization",
    "absl_graphcycles_internal",
    "absl_stacktrace",
    "absl_symbolize",
    "absl_debugging_internal",
    "absl_demangle_internal",
    "absl_malloc_internal",
    "absl_time",
    "absl_civil_time",
    "absl_time_zone",
    "absl_str_format_internal",
    "absl_strings",
    "absl_strings_internal",
    "absl_base",
    "absl_spinlock_wait",
    "absl_int128",
    "absl_log_severity",
]

def system_library(name, libs = [], deps = [], defines = [], **kwargs):
    """A library whose headers are in /usr/include. A name in `libs` that starts with "-" goes to the linker as is."""
    native.cc_library(
        name = name,
        linkopts = [lib if lib.startswith("-") else "-l" + lib for lib in libs],
        deps = deps,
        defines = defines,
        **kwargs
    )

def absl_library(name):
    native.cc_library(
        name = name,
        linkopts = select({
            "//bazel:tsan": [],
            "//conditions:default": ["-l" + lib for lib in _ABSL_LIBS],
        }),
        deps = select({
            "//bazel:tsan": ["@abseil_tsan//:abseil"],
            "//conditions:default": [],
        }),
    )
