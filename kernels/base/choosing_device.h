// A device that chooses, when a weight is loaded, how products with it are computed: for the log of whoever loads.
#pragma once

#include <string>
#include <vector>

#include "kernels/base/device.h"

namespace rwkv::kernels {

class ChoosingDevice : public Device {
 public:
  // What was chosen for the weights that are loaded so far, in words, a line a shape. Empty: there was no choice.
  virtual std::vector<std::string> Choices() const = 0;
};

}  // namespace rwkv::kernels
