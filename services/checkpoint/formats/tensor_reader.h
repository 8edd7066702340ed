// A tensor's elements out of the file: strides followed, blocks decoded, converters' functions taken back.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "services/checkpoint/formats/mapped_file.h"
#include "services/checkpoint/formats/tensor_record.h"

namespace rwkv::checkpoint {

// Bytes [offset, offset + out.size()) of the tensor's row-major content as it is read (record.type, record.shape);
// both are multiples of the element's size and inside the tensor. Leaves no page of the tensor mapped. The same bytes
// for any division into calls. kDataLoss: the file has been cut since it was opened.
absl::Status ReadTensor(const MappedFile& file, const TensorRecord& record, int64_t offset, absl::Span<uint8_t> out);

}  // namespace rwkv::checkpoint
