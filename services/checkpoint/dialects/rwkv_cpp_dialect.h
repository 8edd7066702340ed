// rwkv.cpp's layouts of RWKV-4 to RWKV-7 to the original ones; the names are the original ones already.
#pragma once

#include <vector>

#include "absl/status/status.h"
#include "services/checkpoint/formats/rwkv_cpp.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// The converter's functions are marked to be taken back (decays and the bonus, small fp32 vectors), low-rank factors
// transposed, fused token shifts split. Consumes directory's tensors.
// kInvalidArgument: the header contradicts the tensors, or a shape cannot be one of an RWKV's.
absl::StatusOr<std::vector<TensorRecord>> RwkvCppToOriginal(RwkvCppDirectory directory);

}  // namespace rwkv::checkpoint
