#include "kernels/conformance/conformance.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "kernels/base/dtype.h"
#include "kernels/dispatch/op_table.h"

namespace rwkv::kernels::conformance {

float Random::Uniform(float low, float high) {
  const float unit = static_cast<float>(generator_() >> 8) * 0x1p-24f;  // [0, 1), exact
  return low + (high - low) * unit;
}

std::vector<float> Random::Uniforms(int64_t count, float low, float high) {
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = Uniform(low, high);
  return values;
}

std::vector<const OpTable*> Backends() { return AvailableOpTables(); }

std::string TestName(const OpTable* table) {
  std::string name(table->name);
  std::replace(name.begin(), name.end(), '/', '_');
  return name;
}

::testing::AssertionResult AllClose(absl::Span<const float> expected, absl::Span<const float> actual,
                                    absl::Span<const double> tolerance) {
  if (expected.size() != actual.size() || expected.size() != tolerance.size()) {
    return ::testing::AssertionFailure() << "sizes differ: expected " << expected.size() << ", actual " << actual.size()
                                         << ", tolerances " << tolerance.size();
  }
  size_t failed = 0;
  size_t worst = 0;
  double worst_excess = -1.0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::abs(static_cast<double>(actual[i]) - static_cast<double>(expected[i]));
    if (difference <= tolerance[i]) continue;
    ++failed;
    const double excess = std::isnan(difference) ? HUGE_VAL : difference - tolerance[i];
    if (excess > worst_excess) {
      worst_excess = excess;
      worst = i;
    }
  }
  if (failed == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << failed << " of " << expected.size() << " elements are off; the worst is ["
                                       << worst << "]: expected " << expected[worst] << ", actual " << actual[worst]
                                       << ", tolerance " << tolerance[worst];
}

::testing::AssertionResult AllClose(absl::Span<const float> expected, absl::Span<const float> actual,
                                    double tolerance) {
  return AllClose(expected, actual, std::vector<double>(expected.size(), tolerance));
}

::testing::AssertionResult SameBits(absl::Span<const float> expected, absl::Span<const float> actual) {
  if (expected.size() != actual.size()) {
    return ::testing::AssertionFailure() << "sizes differ: expected " << expected.size() << ", actual "
                                         << actual.size();
  }
  size_t failed = 0;
  size_t first = 0;
  for (size_t i = expected.size(); i-- > 0;) {
    if (std::memcmp(&expected[i], &actual[i], sizeof(float)) != 0) {
      ++failed;
      first = i;
    }
  }
  if (failed == 0) return ::testing::AssertionSuccess();
  return ::testing::AssertionFailure() << failed << " of " << expected.size()
                                       << " elements have other bits; the first is [" << first << "]: expected "
                                       << std::hexfloat << expected[first] << ", actual " << actual[first];
}

std::vector<SequenceSpan> PackSpans(absl::Span<const int64_t> lengths, absl::Span<const int32_t> slots) {
  std::vector<SequenceSpan> spans;
  int64_t row = 0;
  for (size_t i = 0; i < lengths.size(); ++i) {
    spans.push_back({slots[i], row, lengths[i]});
    row += lengths[i];
  }
  return spans;
}

std::vector<char> Narrow(DType dtype, absl::Span<const float> values) {
  std::vector<char> bytes(values.size() * static_cast<size_t>(SizeOf(dtype)));
  NarrowFromFloat(dtype, values.data(), static_cast<int64_t>(values.size()), bytes.data());
  return bytes;
}

}  // namespace rwkv::kernels::conformance
