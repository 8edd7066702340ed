// How the process's heap deals with large buffers.
#pragma once

namespace rwkv::common {

// Keeps what is freed, up to some tens of megabytes, instead of giving it back to the system at once: a process that
// moves buffers of a megabyte would spend more time on page faults than on the bytes. Called once, at start.
void KeepFreedMemory();

}  // namespace rwkv::common
