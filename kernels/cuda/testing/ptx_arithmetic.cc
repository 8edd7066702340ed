// Numbers and bits.
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "kernels/base/dtype.h"
#include "kernels/cuda/testing/emulation.h"
#include "kernels/cuda/testing/ptx_table.h"

namespace rwkv::kernels::cuda::ptx {
namespace {

// Whole numbers wrap.
template <typename T>
using Wrapping = std::make_unsigned_t<T>;

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a + b;
    else
      return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
  }
};
struct Subtract {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a - b;
    else
      return static_cast<T>(static_cast<Wrapping<T>>(a) - static_cast<Wrapping<T>>(b));
  }
};
struct Multiply {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_floating_point_v<T>)
      return a * b;
    else
      return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
  }
};
struct Divide {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (!std::is_floating_point_v<T>) {
      if (b == 0) emulation::Forbid("divides by zero");
    }
    return a / b;
  }
};
struct Least {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Largest {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
// The number, if one is none.
struct LargestNumber {
  float operator()(float a, float b) const { return std::fmax(a, b); }
};
struct LeastNumber {
  float operator()(float a, float b) const { return std::fmin(a, b); }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a & b);
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a | b);
  }
};
struct Xor {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(a ^ b);
  }
};

template <typename T, typename Function>
void Binary(Thread& thread, const Instruction& i) {
  Out<T>(thread, i, 0, Function()(In<T>(thread, i, 1), In<T>(thread, i, 2)));
}

struct Negate {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_floating_point_v<T>)
      return -a;
    else
      return static_cast<T>(0 - static_cast<Wrapping<T>>(a));
  }
};
struct Absolute {
  template <typename T>
  T operator()(T a) const {
    return a < 0 ? static_cast<T>(-a) : a;
  }
};
struct AbsoluteNumber {
  template <typename T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
struct Not {
  template <typename T>
  T operator()(T a) const {
    return static_cast<T>(~a);
  }
};
struct Same {
  template <typename T>
  T operator()(T a) const {
    return a;
  }
};
struct Root {
  float operator()(float a) const { return std::sqrt(a); }
};
struct Reciprocal {
  template <typename T>
  T operator()(T a) const {
    return T{1} / a;
  }
};

template <typename T, typename Function>
void Unary(Thread& thread, const Instruction& i) {
  Out<T>(thread, i, 0, Function()(In<T>(thread, i, 1)));
}

// Bits beyond the width are zeros, or the sign.
template <typename T>
void ShiftLeft(Thread& thread, const Instruction& i) {
  const auto by = In<uint32_t>(thread, i, 2);
  Out<T>(thread, i, 0, by >= 8 * sizeof(T) ? T{0} : static_cast<T>(In<T>(thread, i, 1) << by));
}
template <typename T>
void ShiftRight(Thread& thread, const Instruction& i) {
  const auto by = In<uint32_t>(thread, i, 2);
  constexpr uint32_t kMost = 8 * sizeof(T) - 1;
  const T value = In<T>(thread, i, 1);
  if (by <= kMost) return Out<T>(thread, i, 0, static_cast<T>(value >> by));
  Out<T>(thread, i, 0, std::is_signed_v<T> ? static_cast<T>(value >> kMost) : T{0});
}

template <typename T, typename Wide>
void MultiplyWide(Thread& thread, const Instruction& i) {
  Out<Wide>(thread, i, 0, static_cast<Wide>(In<T>(thread, i, 1)) * static_cast<Wide>(In<T>(thread, i, 2)));
}
template <typename T, typename Wide>
void MultiplyHigh(Thread& thread, const Instruction& i) {
  const Wide product = static_cast<Wide>(In<T>(thread, i, 1)) * static_cast<Wide>(In<T>(thread, i, 2));
  Out<T>(thread, i, 0, static_cast<T>(product >> (8 * sizeof(T))));
}
template <typename T>
void MultiplyAdd(Thread& thread, const Instruction& i) {
  Out<T>(thread, i, 0, Add()(Multiply()(In<T>(thread, i, 1), In<T>(thread, i, 2)), In<T>(thread, i, 3)));
}
template <typename T>
void Fuse(Thread& thread, const Instruction& i) {
  Out<T>(thread, i, 0, std::fma(In<T>(thread, i, 1), In<T>(thread, i, 2), In<T>(thread, i, 3)));
}

struct Equal {
  template <typename T>
  bool operator()(T a, T b) const {
    return a == b;
  }
};
struct NotEqual {  // And both are numbers.
  template <typename T>
  bool operator()(T a, T b) const {
    return a < b || b < a;
  }
};
struct Less {
  template <typename T>
  bool operator()(T a, T b) const {
    return a < b;
  }
};
struct LessOrEqual {
  template <typename T>
  bool operator()(T a, T b) const {
    return a <= b;
  }
};
struct Greater {
  template <typename T>
  bool operator()(T a, T b) const {
    return a > b;
  }
};
struct GreaterOrEqual {
  template <typename T>
  bool operator()(T a, T b) const {
    return a >= b;
  }
};
// The same, or one is no number.
template <typename Opposite>
struct Unordered {
  template <typename T>
  bool operator()(T a, T b) const {
    return !Opposite()(a, b);
  }
};

template <typename T, typename Function>
void Compare(Thread& thread, const Instruction& i) {
  Out<uint64_t>(thread, i, 0, Function()(In<T>(thread, i, 1), In<T>(thread, i, 2)) ? 1 : 0);
}
template <typename T>
void Select(Thread& thread, const Instruction& i) {
  Out<T>(thread, i, 0, In<uint64_t>(thread, i, 3) != 0 ? In<T>(thread, i, 1) : In<T>(thread, i, 2));
}
void NotPredicate(Thread& thread, const Instruction& i) {
  Out<uint64_t>(thread, i, 0, In<uint64_t>(thread, i, 1) == 0 ? 1 : 0);
}
void MovePredicate(Thread& thread, const Instruction& i) {
  Out<uint64_t>(thread, i, 0, In<uint64_t>(thread, i, 1) != 0 ? 1 : 0);
}

// Whole numbers: cut, or filled with the sign. From whole numbers and between floats: the nearest.
template <typename To, typename From>
void Convert(Thread& thread, const Instruction& i) {
  Out<To>(thread, i, 0, static_cast<To>(In<From>(thread, i, 1)));
}
// Towards zero; what is too large is the largest, and no number zero.
template <typename To, typename From>
void Truncate(Thread& thread, const Instruction& i) {
  const From value = std::trunc(In<From>(thread, i, 1));
  constexpr To kLeast = std::numeric_limits<To>::min();
  constexpr To kMost = std::numeric_limits<To>::max();
  To result = 0;
  if (value >= static_cast<From>(kMost)) {
    result = kMost;
  } else if (value <= static_cast<From>(kLeast)) {
    result = kLeast;
  } else if (value == value) {
    result = static_cast<To>(value);
  }
  Out<To>(thread, i, 0, result);
}
// NVIDIA has one NaN of 16 bits.
void ToHalf(Thread& thread, const Instruction& i) {
  const auto value = In<float>(thread, i, 1);
  Out<uint16_t>(thread, i, 0, std::isnan(value) ? uint16_t{0x7fff} : FloatToHalf(value));
}
void ToBFloat16(Thread& thread, const Instruction& i) {
  const auto value = In<float>(thread, i, 1);
  Out<uint16_t>(thread, i, 0, std::isnan(value) ? uint16_t{0x7fff} : FloatToBFloat16(value));
}
void FromHalf(Thread& thread, const Instruction& i) {
  const float value = HalfToFloat(In<uint16_t>(thread, i, 1));
  constexpr uint32_t kNaN = 0x7fffffff;
  if (std::isnan(value)) return Out<uint32_t>(thread, i, 0, kNaN);
  Out<float>(thread, i, 0, value);
}

// Two halves, the low one first.
template <typename Half, typename Whole>
void Pack(Thread& thread, const Instruction& i) {
  const Whole high = In<Half>(thread, i, 2);
  Out<Whole>(thread, i, 0, In<Half>(thread, i, 1) | high << (8 * sizeof(Half)));
}
template <typename Half, typename Whole>
void Unpack(Thread& thread, const Instruction& i) {
  const auto whole = In<Whole>(thread, i, 2);
  Out<Half>(thread, i, 0, static_cast<Half>(whole));
  Out<Half>(thread, i, 1, static_cast<Half>(whole >> (8 * sizeof(Half))));
}

void Permute(Thread& thread, const Instruction& i) {
  const uint64_t bytes = In<uint32_t>(thread, i, 1) | uint64_t{In<uint32_t>(thread, i, 2)} << 32;
  const auto selector = In<uint32_t>(thread, i, 3);
  uint32_t result = 0;
  for (int byte = 0; byte < 4; ++byte) {
    const uint32_t of = selector >> (4 * byte) & 15u;
    auto value = static_cast<uint32_t>(bytes >> (8 * (of & 7u)) & 0xffu);
    if ((of & 8u) != 0) value = (value & 0x80u) != 0 ? 0xffu : 0;  // The sign of it.
    result |= value << (8 * byte);
  }
  Out<uint32_t>(thread, i, 0, result);
}
template <typename T>
void InsertBits(Thread& thread, const Instruction& i) {
  const uint32_t at = In<uint32_t>(thread, i, 3) & 0xffu;
  const uint32_t count = In<uint32_t>(thread, i, 4) & 0xffu;
  T result = In<T>(thread, i, 2);
  for (uint32_t bit = 0; bit < count && at + bit < 8 * sizeof(T); ++bit) {
    const T mask = T{1} << (at + bit);
    result = (In<T>(thread, i, 1) >> bit & 1u) != 0 ? result | mask : result & ~mask;
  }
  Out<T>(thread, i, 0, result);
}

template <typename T>
void AddOfInt(Table& table, const std::string& type) {
  table["add." + type] = {Binary<T, Add>, 3};
  table["sub." + type] = {Binary<T, Subtract>, 3};
  table["mul.lo." + type] = {Binary<T, Multiply>, 3};
  table["mad.lo." + type] = {MultiplyAdd<T>, 4};
  table["div." + type] = {Binary<T, Divide>, 3};
  table["min." + type] = {Binary<T, Least>, 3};
  table["max." + type] = {Binary<T, Largest>, 3};
  table["neg." + type] = {Unary<T, Negate>, 2};
  table["abs." + type] = {Unary<T, Absolute>, 2};
  table["shr." + type] = {ShiftRight<T>, 3};
}

// Of bits, whatever they are.
template <typename T>
void AddOfBits(Table& table, const std::string& width) {
  for (const char* kind : {"b", "u", "s"}) {
    table[absl::StrCat("mov.", kind, width)] = {Unary<T, Same>, 2};
    table[absl::StrCat("selp.", kind, width)] = {Select<T>, 4};
  }
  table["and.b" + width] = {Binary<T, And>, 3};
  table["or.b" + width] = {Binary<T, Or>, 3};
  table["xor.b" + width] = {Binary<T, Xor>, 3};
  table["not.b" + width] = {Unary<T, Not>, 2};
  table["shl.b" + width] = {ShiftLeft<T>, 3};
  table["setp.eq.b" + width] = {Compare<T, Equal>, 3};
  table["setp.ne.b" + width] = {Compare<T, NotEqual>, 3};
}

template <typename T>
void AddComparisons(Table& table, const std::string& type) {
  table["setp.eq." + type] = {Compare<T, Equal>, 3};
  table["setp.ne." + type] = {Compare<T, NotEqual>, 3};
  table["setp.lt." + type] = {Compare<T, Less>, 3};
  table["setp.le." + type] = {Compare<T, LessOrEqual>, 3};
  table["setp.gt." + type] = {Compare<T, Greater>, 3};
  table["setp.ge." + type] = {Compare<T, GreaterOrEqual>, 3};
  if constexpr (std::is_floating_point_v<T>) {
    table["setp.equ." + type] = {Compare<T, Unordered<NotEqual>>, 3};
    table["setp.neu." + type] = {Compare<T, Unordered<Equal>>, 3};
    table["setp.ltu." + type] = {Compare<T, Unordered<GreaterOrEqual>>, 3};
    table["setp.leu." + type] = {Compare<T, Unordered<Greater>>, 3};
    table["setp.gtu." + type] = {Compare<T, Unordered<LessOrEqual>>, 3};
    table["setp.geu." + type] = {Compare<T, Unordered<Less>>, 3};
  }
}

template <typename T>
void AddOfFloat(Table& table, const std::string& type) {
  table["add.rn." + type] = {Binary<T, Add>, 3};
  table["sub.rn." + type] = {Binary<T, Subtract>, 3};
  table["mul.rn." + type] = {Binary<T, Multiply>, 3};
  table["div.rn." + type] = {Binary<T, Divide>, 3};
  table["fma.rn." + type] = {Fuse<T>, 4};
  table["rcp.rn." + type] = {Unary<T, Reciprocal>, 2};
  table["neg." + type] = {Unary<T, Negate>, 2};
  table["abs." + type] = {Unary<T, AbsoluteNumber>, 2};
  table["mov." + type] = {Unary<T, Same>, 2};
  table["selp." + type] = {Select<T>, 4};
  AddComparisons<T>(table, type);
}

template <typename From>
void AddConversionsFrom(Table& table, const std::string& from) {
  table["cvt.u16." + from] = {Convert<uint16_t, From>, 2};
  table["cvt.s16." + from] = {Convert<int16_t, From>, 2};
  table["cvt.u32." + from] = {Convert<uint32_t, From>, 2};
  table["cvt.s32." + from] = {Convert<int32_t, From>, 2};
  table["cvt.u64." + from] = {Convert<uint64_t, From>, 2};
  table["cvt.s64." + from] = {Convert<int64_t, From>, 2};
  table["cvt.rn.f32." + from] = {Convert<float, From>, 2};
  table["cvt.rn.f64." + from] = {Convert<double, From>, 2};
}

template <typename From>
void AddTruncations(Table& table, const std::string& from) {
  table["cvt.rzi.s32." + from] = {Truncate<int32_t, From>, 2};
  table["cvt.rzi.u32." + from] = {Truncate<uint32_t, From>, 2};
  table["cvt.rzi.s64." + from] = {Truncate<int64_t, From>, 2};
  table["cvt.rzi.u64." + from] = {Truncate<uint64_t, From>, 2};
}

}  // namespace

void AddArithmetic(Table& table) {
  AddOfInt<int16_t>(table, "s16"), AddOfInt<uint16_t>(table, "u16");
  AddOfInt<int32_t>(table, "s32"), AddOfInt<uint32_t>(table, "u32");
  AddOfInt<int64_t>(table, "s64"), AddOfInt<uint64_t>(table, "u64");
  AddOfBits<uint16_t>(table, "16"), AddOfBits<uint32_t>(table, "32"), AddOfBits<uint64_t>(table, "64");
  AddComparisons<int16_t>(table, "s16"), AddComparisons<uint16_t>(table, "u16");
  AddComparisons<int32_t>(table, "s32"), AddComparisons<uint32_t>(table, "u32");
  AddComparisons<int64_t>(table, "s64"), AddComparisons<uint64_t>(table, "u64");
  AddOfFloat<float>(table, "f32"), AddOfFloat<double>(table, "f64");
  table["max.f32"] = {Binary<float, LargestNumber>, 3};
  table["min.f32"] = {Binary<float, LeastNumber>, 3};
  table["sqrt.rn.f32"] = {Unary<float, Root>, 2};
  table["mul.wide.s16"] = {MultiplyWide<int16_t, int32_t>, 3};
  table["mul.wide.u16"] = {MultiplyWide<uint16_t, uint32_t>, 3};
  table["mul.wide.s32"] = {MultiplyWide<int32_t, int64_t>, 3};
  table["mul.wide.u32"] = {MultiplyWide<uint32_t, uint64_t>, 3};
  table["mul.hi.s32"] = {MultiplyHigh<int32_t, int64_t>, 3};
  table["mul.hi.u32"] = {MultiplyHigh<uint32_t, uint64_t>, 3};
  AddConversionsFrom<int8_t>(table, "s8"), AddConversionsFrom<uint8_t>(table, "u8");
  AddConversionsFrom<int16_t>(table, "s16"), AddConversionsFrom<uint16_t>(table, "u16");
  AddConversionsFrom<int32_t>(table, "s32"), AddConversionsFrom<uint32_t>(table, "u32");
  AddConversionsFrom<int64_t>(table, "s64"), AddConversionsFrom<uint64_t>(table, "u64");
  AddTruncations<float>(table, "f32"), AddTruncations<double>(table, "f64");
  table["cvt.f64.f32"] = {Convert<double, float>, 2};
  table["cvt.rn.f32.f64"] = {Convert<float, double>, 2};
  table["cvt.rn.f16.f32"] = {ToHalf, 2};
  table["cvt.rn.bf16.f32"] = {ToBFloat16, 2};
  table["cvt.f32.f16"] = {FromHalf, 2};
  table["and.pred"] = {Binary<uint64_t, And>, 3};
  table["or.pred"] = {Binary<uint64_t, Or>, 3};
  table["xor.pred"] = {Binary<uint64_t, Xor>, 3};
  table["not.pred"] = {NotPredicate, 2};
  table["mov.pred"] = {MovePredicate, 2};
  table["pack.b32"] = {Pack<uint16_t, uint32_t>, 3};
  table["pack.b64"] = {Pack<uint32_t, uint64_t>, 3};
  table["unpack.b32"] = {Unpack<uint16_t, uint32_t>, 3};
  table["unpack.b64"] = {Unpack<uint32_t, uint64_t>, 3};
  table["prmt.b32"] = {Permute, 4};
  table["bfi.b32"] = {InsertBits<uint32_t>, 5};
  table["bfi.b64"] = {InsertBits<uint64_t>, 5};
  table["cvta.to.global.u64"] = {Unary<uint64_t, Same>, 2};
}

}  // namespace rwkv::kernels::cuda::ptx
