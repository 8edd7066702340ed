# Bazel 4.2 still carries the C++ rules inside itself; this re-exports them under the name that the embedded tools load.
cc_binary = native.cc_binary
cc_import = native.cc_import
cc_library = native.cc_library
cc_test = native.cc_test
cc_toolchain = native.cc_toolchain
cc_toolchain_suite = native.cc_toolchain_suite
cc_flags_supplier = native.cc_toolchain_alias
cc_toolchain_alias = native.cc_toolchain_alias
objc_library = native.objc_library
