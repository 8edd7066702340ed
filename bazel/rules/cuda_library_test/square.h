// The smallest use of a device, to test how cuda_library builds and links.
#pragma once

#include <string>

namespace rwkv {

// values[i] *= values[i] on the device. Empty: done; else why not, with *no_device telling whether there is none.
// Blocks. Linked only where RWKV_HAVE_CUDA is 1.
std::string SquareOnDevice(float* values, int count, bool* no_device);

}  // namespace rwkv
