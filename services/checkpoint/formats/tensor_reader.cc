#include "services/checkpoint/formats/tensor_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "absl/types/optional.h"
#include "kernels/base/dtype.h"
#include "kernels/base/ggml_blocks.h"
#include "kernels/base/status_macros.h"
#include "services/checkpoint/formats/element_type.h"

namespace rwkv::checkpoint {
namespace {

// Where index i of dimension `axis` stands in the file.
int64_t Place(const TensorRecord& record, size_t axis, int64_t i) {
  if (axis != record.reordered || record.order.empty()) return i;
  const int64_t piece = record.shape[axis] / static_cast<int64_t>(record.order.size());
  return record.order[i / piece] * piece + i % piece;
}

// Calls visit(n, element) for n = 0 .. count - 1, where `element` is the place in the file's order of the row-major
// element first + n.
template <typename Visit>
void WalkStrides(const TensorRecord& record, int64_t first, int64_t count, const Visit& visit) {
  const size_t rank = record.shape.size();
  std::vector<int64_t> index(rank);
  for (size_t i = rank; i-- > 0;) {
    index[i] = first % record.shape[i];
    first /= record.shape[i];
  }
  for (int64_t n = 0; n < count; ++n) {
    int64_t element = 0;
    for (size_t i = 0; i < rank; ++i) element += Place(record, i, index[i]) * record.strides[i];
    visit(n, element);
    for (size_t i = rank; i-- > 0;) {
      if (++index[i] < record.shape[i]) break;
      index[i] = 0;
    }
  }
}

// `count` fp64 to the nearest fp32; both may be unaligned.
void NarrowDoubles(const uint8_t* from, int64_t count, uint8_t* to) {
  for (int64_t i = 0; i < count; ++i) {
    double wide;
    std::memcpy(&wide, from + i * sizeof(double), sizeof(wide));
    const float narrow = static_cast<float>(wide);
    std::memcpy(to + i * sizeof(float), &narrow, sizeof(narrow));
  }
}

// Row-major fp64: bytes [offset, offset + out.size()) of what they are as fp32.
absl::Status ReadDoubles(const MappedFile& file, const TensorRecord& record, int64_t offset, absl::Span<uint8_t> out) {
  constexpr size_t kElementsAtOnce = 1 << 16;
  std::vector<uint8_t> wide;
  while (!out.empty()) {
    const size_t count = std::min(kElementsAtOnce, out.size() / sizeof(float));
    wide.resize(count * sizeof(double));
    RWKV_RETURN_IF_ERROR(file.ReadAt(record.offset + 2 * offset, absl::MakeSpan(wide)));
    NarrowDoubles(wide.data(), static_cast<int64_t>(count), out.data());
    out.remove_prefix(count * sizeof(float));
    offset += static_cast<int64_t>(count * sizeof(float));
  }
  return absl::OkStatus();
}

void Gather(const MappedFile& file, const TensorRecord& record, int64_t first, int64_t count, uint8_t* out) {
  const uint8_t* data = file.bytes().data() + record.offset;
  if (record.blocks == BlockType::kNone) {
    const int64_t size = ElementSize(record.type);
    if (record.is_stored_double) {
      WalkStrides(record, first, count, [&](int64_t n, int64_t element) {
        NarrowDoubles(data + element * sizeof(double), 1, out + n * size);
      });
      return;
    }
    WalkStrides(record, first, count, [&](int64_t n, int64_t element) {
      std::memcpy(out + n * size, data + element * size, static_cast<size_t>(size));
    });
    return;
  }
  const int64_t weights = BlockWeights(record.blocks);
  std::vector<uint8_t> block(PartBytes(record.blocks, BlockPart::kWeights));
  int64_t decoded = -1;
  WalkStrides(record, first, count, [&](int64_t n, int64_t element) {
    if (element / weights != decoded) {
      decoded = element / weights;
      DecodeBlocks(record.blocks, BlockPart::kWeights, data + decoded * BlockBytes(record.blocks), 1, block.data());
    }
    std::memcpy(out + n * sizeof(float), block.data() + element % weights * sizeof(float), sizeof(float));
  });
}

absl::Status ReadBlocks(const MappedFile& file, const TensorRecord& record, int64_t offset, absl::Span<uint8_t> out) {
  constexpr int64_t kBlocksAtOnce = 1024;
  const int64_t part = PartBytes(record.blocks, record.part);
  const int64_t stored = BlockBytes(record.blocks);
  std::vector<uint8_t> blocks;
  std::vector<uint8_t> decoded;
  while (!out.empty()) {
    const int64_t first = offset / part;
    const int64_t skip = offset % part;  // Of the first block, which may be wanted from its middle.
    const int64_t size = std::min(static_cast<int64_t>(out.size()), kBlocksAtOnce * part - skip);
    const int64_t count = (skip + size + part - 1) / part;
    blocks.resize(count * stored);
    RWKV_RETURN_IF_ERROR(file.ReadAt(record.offset + first * stored, absl::MakeSpan(blocks)));
    decoded.resize(count * part);
    DecodeBlocks(record.blocks, record.part, blocks.data(), count, decoded.data());
    std::memcpy(out.data(), decoded.data() + skip, static_cast<size_t>(size));
    out.remove_prefix(static_cast<size_t>(size));
    offset += size;
  }
  return absl::OkStatus();
}

// In double, so that the result is the float nearest to the parameter the converter started from.
float TakeBack(Applied applied, float stored) {
  const double value = stored;
  switch (applied) {
    case Applied::kNothing:
      return stored;
    case Applied::kExp:
      return static_cast<float>(std::log(value));
    case Applied::kNegativeExp:
      return static_cast<float>(std::log(-value));
    case Applied::kExpNegativeExp:
      return static_cast<float>(std::log(-std::log(value)));
  }
  return stored;
}

void Restore(const TensorRecord& record, absl::Span<uint8_t> out) {
  const absl::optional<kernels::DType> dtype = WeightDType(record.type);
  if (!dtype.has_value()) return;
  constexpr size_t kElementsAtOnce = 1024;
  const size_t size = static_cast<size_t>(ElementSize(record.type));
  const float scale = std::ldexp(1.0f, record.exponent);
  float values[kElementsAtOnce];
  while (!out.empty()) {
    const size_t count = std::min(kElementsAtOnce, out.size() / size);
    kernels::WidenToFloat(*dtype, out.data(), static_cast<int64_t>(count), values);
    if (record.applied != Applied::kNothing) {
      for (size_t i = 0; i < count; ++i) values[i] = TakeBack(record.applied, values[i]);
    }
    for (size_t i = 0; i < count; ++i) values[i] *= scale;
    kernels::NarrowFromFloat(*dtype, values, static_cast<int64_t>(count), out.data());
    out.remove_prefix(count * size);
  }
}

}  // namespace

absl::Status ReadTensor(const MappedFile& file, const TensorRecord& record, int64_t offset, absl::Span<uint8_t> out) {
  if (out.empty()) return absl::OkStatus();
  if (!record.strides.empty()) {
    const int64_t size = ElementSize(record.type);
    Gather(file, record, offset / size, static_cast<int64_t>(out.size()) / size, out.data());
    file.Forget(record.offset, StoredBytes(record));
  } else if (record.blocks != BlockType::kNone) {
    RWKV_RETURN_IF_ERROR(ReadBlocks(file, record, offset, out));
  } else if (record.is_stored_double) {
    RWKV_RETURN_IF_ERROR(ReadDoubles(file, record, offset, out));
  } else {
    RWKV_RETURN_IF_ERROR(file.ReadAt(record.offset + offset, out));
  }
  if (record.applied != Applied::kNothing || record.exponent != 0) Restore(record, out);
  return absl::OkStatus();
}

}  // namespace rwkv::checkpoint
