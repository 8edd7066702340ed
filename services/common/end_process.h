// The end of a process that has used gRPC.
#pragma once

namespace rwkv::common {

// Flushes C and C++ streams and ends the process with `status`, without exit handlers and destructors of static objects:
// gRPC's own threads outlive its last channel and server for a moment, and OpenSSL frees at exit what a connection that
// they are just opening or closing uses. Call it when all that matters is destroyed. Sanitizers report from their exit
// handlers: built with one, it is std::exit().
[[noreturn]] void EndProcess(int status);

}  // namespace rwkv::common
