// Draws tokens from rows of logits: a block a row. Every sum is of whole numbers, so no order matters, and what is drawn
// has the bits of the host's sampler (kernels/api/sample.h).
//
// A cut keeps the shortest run of candidates in some order, and is remembered as where that run ends; whether an id is
// still a candidate is computed anew each time, and so is its weight: both cost less than to store them.
#pragma once

#include "kernels/api/sample.h"
#include "kernels/base/deterministic_math.h"
#include "kernels/cuda/rows.cuh"

namespace rwkv::kernels::cuda {
inline namespace RWKV_CUDA_BUILD {

constexpr int kSampleThreads = 512;
constexpr int kSampleBins = 2048;
constexpr int kBinsOfPart = 32;
constexpr uint64_t kNoRank = ~uint64_t{0};

struct SampleShared {
  uint64_t values[kSampleThreads];
  uint64_t bins[kSampleBins];
  uint64_t parts[kSampleBins / kBinsOfPart];
};

// Bits that rise with the number. Both zeros are one number, and there is no NaN.
RWKV_DEVICE uint32_t Ordered(float x) {
  const uint32_t bits = AsBits(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Rises from the largest logit to the smallest, and from id to id among equal ones. 0: no logit, but NaN or +inf.
RWKV_DEVICE uint64_t Rank(float logit, int id) {
  if (!(logit <= kLargestFloat)) return 0;
  return uint64_t{Ordered(0.0f - logit)} << 32 | static_cast<uint32_t>(id);
}
RWKV_DEVICE int IdOf(uint64_t rank) { return static_cast<int>(rank & 0xffffffffu); }

// value(t) of every thread; the smallest, or the sum, in all threads.
RWKV_DEVICE uint64_t BlockMin(uint64_t value, SampleShared& shared) {
  const int t = ThreadIndex();
  shared.values[t] = value;
  SyncBlock();
  for (int width = kSampleThreads / 2; width > 0; width /= 2) {
    if (t < width && shared.values[t + width] < shared.values[t]) shared.values[t] = shared.values[t + width];
    SyncBlock();
  }
  const uint64_t result = shared.values[0];
  SyncBlock();
  return result;
}
RWKV_DEVICE uint64_t BlockSum(uint64_t value, SampleShared& shared) {
  const int t = ThreadIndex();
  shared.values[t] = value;
  SyncBlock();
  for (int width = kSampleThreads / 2; width > 0; width /= 2) {
    if (t < width) shared.values[t] += shared.values[t + width];
    SyncBlock();
  }
  const uint64_t result = shared.values[0];
  SyncBlock();
  return result;
}

template <typename Value>
RWKV_DEVICE uint64_t MinOf(int n, const Value& value, SampleShared& shared) {
  uint64_t least = kNoRank;
  for (int i = ThreadIndex(); i < n; i += kSampleThreads) {
    const uint64_t v = value(i);
    if (v < least) least = v;
  }
  return BlockMin(least, shared);
}
template <typename Value>
RWKV_DEVICE uint64_t SumOf(int n, const Value& value, SampleShared& shared) {
  uint64_t sum = 0;
  for (int i = ThreadIndex(); i < n; i += kSampleThreads) sum += value(i);
  return BlockSum(sum, shared);
}

// The first bin with which the measures of all bins up to it sum to `target`, from which those before it are taken.
// bin(i): of id i, or below 0 if it has none.
template <int kBins, typename Bin, typename Measure>
RWKV_DEVICE int FindBin(int n, const Bin& bin, const Measure& measure, uint64_t& target, SampleShared& shared) {
  const int t = ThreadIndex();
  for (int b = t; b < kBins; b += kSampleThreads) shared.bins[b] = 0;
  SyncBlock();
  for (int i = t; i < n; i += kSampleThreads) {
    const int b = bin(i);
    if (b >= 0) AtomicAdd(&shared.bins[b], measure(i));
  }
  SyncBlock();
  if (t < kBins / kBinsOfPart) {
    uint64_t sum = 0;
    for (int b = 0; b < kBinsOfPart; ++b) sum += shared.bins[t * kBinsOfPart + b];
    shared.parts[t] = sum;
  }
  SyncBlock();
  int part = 0;
  while (part + 1 < kBins / kBinsOfPart && shared.parts[part] < target) target -= shared.parts[part++];
  int found = part * kBinsOfPart;
  while (found + 1 < kBins && shared.bins[found] < target) target -= shared.bins[found++];
  SyncBlock();
  return found;
}

// The first id at which the measures of those in `in` and not above it sum to `target`.
template <typename In, typename Measure>
RWKV_DEVICE int FindId(int n, const In& in, const Measure& measure, uint64_t& target, SampleShared& shared) {
  int shift = 24;
  while (shift > 0 && (n - 1) >> shift == 0) shift -= 8;
  int id = 0;
  for (; shift >= 0; shift -= 8) {
    const auto digit = [&](int i) { return int64_t{i} >> (shift + 8) == id && in(i) ? i >> shift & 255 : -1; };
    id = id << 8 | FindBin<256>(n, digit, measure, target, shared);
  }
  return id;
}

// Where a run ends: its last element, by key and id.
struct RunEnd {
  uint64_t key;
  int id;
};

// The shortest run, in order of rising keys and then ids, of those in `in` whose measures sum to `target`; with
// `keep_ties` it goes to the last of equal keys. key(i) is a double >= first_key, ordered(i) the same in kBits bits.
template <int kBits, typename In, typename Key, typename OrderedKey, typename Measure>
RWKV_DEVICE RunEnd FindRun(int n, const In& in, const Key& key, double first_key, const OrderedKey& ordered,
                           const Measure& measure, uint64_t target, bool keep_ties, SampleShared& shared) {
  // Bins of 1/32 nat first: the bits of keys are alike for most.
  const auto bucket = [&](int i) {
    const double b = (key(i) - first_key) * 32.0;
    return b < kSampleBins - 1 ? static_cast<int>(b) : kSampleBins - 1;
  };
  const int last = FindBin<kSampleBins>(
      n, [&](int i) { return in(i) ? bucket(i) : -1; }, measure, target, shared);
  uint64_t prefix = 0;
  for (int shift = kBits - 8; shift >= 0; shift -= 8) {
    const auto digit = [&](int i) {
      if (!in(i) || bucket(i) != last) return -1;
      const uint64_t bits = ordered(i);
      if (shift + 8 < kBits && bits >> (shift + 8) != prefix) return -1;
      return static_cast<int>(bits >> shift & 255u);
    };
    prefix = prefix << 8 | static_cast<uint64_t>(FindBin<256>(n, digit, measure, target, shared));
  }
  if (keep_ties) return {prefix, 0x7fffffff};
  const int id = FindId(
      n, [&](int i) { return in(i) && ordered(i) == prefix; }, measure, target, shared);
  return {prefix, id};
}

// The candidates of a row, and what belongs to each.
struct Candidates {
  const float* logits;  // after the edits
  int n;
  double scale;    // 2^bits
  double max;      // The largest logit, as
  double inverse;  // 1 / temperature, for weights.
  uint64_t last_rank;
  bool has_typical;
  double typical_max;
  double typical_temperature;
  double log_total;
  double entropy;
  RunEnd last_typical;
  bool has_least;
  double least;
  double least_max;
  double least_inverse;

  RWKV_DEVICE uint64_t WeightOf(int i, double of_max, double of_inverse) const {
    return deterministic::FixedPointExp((static_cast<double>(logits[i]) - of_max) * of_inverse, scale);
  }
  RWKV_DEVICE uint64_t Weight(int i) const { return WeightOf(i, max, inverse); }
  RWKV_DEVICE double Surprise(int i) const {
    return (typical_max - static_cast<double>(logits[i])) / typical_temperature + log_total;
  }
  RWKV_DEVICE double TypicalKey(int i) const {
    const double distance = Surprise(i) - entropy;
    return distance < 0.0 ? -distance : distance;
  }
  RWKV_DEVICE bool Has(int i) const {
    const float logit = logits[i];
    if (!(logit >= -kLargestFloat) || Rank(logit, i) > last_rank) return false;
    if (has_typical) {
      const uint64_t key = AsBits(TypicalKey(i));
      if (key > last_typical.key || (key == last_typical.key && i > last_typical.id)) return false;
    }
    return !has_least || static_cast<double>(WeightOf(i, least_max, least_inverse)) >= least;
  }

  RWKV_DEVICE uint64_t Total(SampleShared& shared) const {
    return SumOf(
        n, [&](int i) { return Has(i) ? Weight(i) : 0; }, shared);
  }
  RWKV_DEVICE float Largest(SampleShared& shared) const {
    return logits[IdOf(MinOf(
        n, [&](int i) { return Has(i) ? Rank(logits[i], i) : kNoRank; }, shared))];
  }

  // The shortest run in order of falling logits: of top_k ids, or of ids with top_p of the weights.
  RWKV_DEVICE void CutByLogit(bool by_weight, int top_k, double top_p, bool keep_ties, float largest,
                              SampleShared& shared) {
    if (by_weight ? top_p >= 1.0 : top_k == 0) return;
    const auto measure = [&](int i) { return by_weight ? Weight(i) : uint64_t{1}; };
    const uint64_t total = SumOf(
        n, [&](int i) { return Has(i) ? measure(i) : 0; }, shared);
    const uint64_t target = by_weight ? deterministic::FractionOf(top_p, total) : static_cast<uint64_t>(top_k);
    if (target >= total) return;
    const RunEnd end = FindRun<32>(
        n, [&](int i) { return Has(i); }, [&](int i) { return -static_cast<double>(logits[i]); },
        -static_cast<double>(largest), [&](int i) { return Rank(logits[i], i) >> 32; }, measure, target, keep_ties,
        shared);
    last_rank = end.key << 32 | static_cast<uint32_t>(end.id);
  }
  RWKV_DEVICE void CutTypical(double typical_p, double temperature, SampleShared& shared) {
    if (typical_p >= 1.0) return;
    const uint64_t total = Total(shared);
    typical_max = max;
    typical_temperature = temperature;
    log_total = deterministic::Log(static_cast<double>(total) / scale);
    const uint64_t units = SumOf(
        n,
        [&](int i) {
          const uint64_t weight = Has(i) ? Weight(i) : 0;
          return weight == 0 ? 0 : deterministic::FixedPointEntropy(weight, total, Surprise(i));
        },
        shared);
    entropy = static_cast<double>(units) * 0x1p-52;
    const auto ordered = [&](int i) { return AsBits(TypicalKey(i)); };
    const double first_key = AsDouble(MinOf(
        n, [&](int i) { return Has(i) ? ordered(i) : kNoRank; }, shared));
    last_typical = FindRun<64>(
        n, [&](int i) { return Has(i); }, [&](int i) { return TypicalKey(i); }, first_key, ordered,
        [&](int i) { return Weight(i); }, deterministic::FractionOf(typical_p, total), false, shared);
    has_typical = true;
  }
  RWKV_DEVICE void CutMinP(double min_p, SampleShared& shared) {
    if (min_p == 0.0) return;
    const uint64_t largest = ~MinOf(
        n, [&](int i) { return Has(i) ? ~Weight(i) : kNoRank; }, shared);
    least = min_p * static_cast<double>(largest);
    least_max = max;
    least_inverse = inverse;
    has_least = true;
  }
};

// Logits after the row's edits, in `adjusted` if it has any.
RWKV_DEVICE const float* Adjust(const SampleArgs& args, const SampleRow& row, const float* logits, float* adjusted) {
  if (row.biases == row.end) return logits;
  const auto n = static_cast<int>(args.vocab);
  for (int i = ThreadIndex(); i < n; i += kSampleThreads) adjusted[i] = logits[i];
  SyncBlock();
  for (int e = row.biases + ThreadIndex(); e < row.seen; e += kSampleThreads) {
    const SampleEdit edit = args.edits[e];
    if (edit.id < static_cast<uint32_t>(n)) adjusted[edit.id] += static_cast<float>(edit.value);
  }
  SyncBlock();
  for (int e = row.seen + ThreadIndex(); e < row.banned; e += kSampleThreads) {
    const SampleEdit edit = args.edits[e];
    if (edit.id >= static_cast<uint32_t>(n)) continue;
    float logit = adjusted[edit.id];
    if (row.repetition_penalty != 1.0f) {
      logit = logit > 0.0f ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    }
    adjusted[edit.id] = static_cast<float>(static_cast<double>(logit) - edit.value);
  }
  SyncBlock();
  for (int e = row.banned; e < row.end; ++e) {
    const SampleEdit edit = args.edits[e];
    for (uint32_t i = edit.id + static_cast<uint32_t>(ThreadIndex()); i < edit.end; i += kSampleThreads) {
      adjusted[i] = AsFloat(0xff800000u);
    }
  }
  SyncBlock();
  return adjusted;
}

// What is drawn of candidates among which there is one.
RWKV_DEVICE int DrawToken(const SampleRow& row, Candidates& c, float largest, SampleShared& shared) {
  const auto temperature = static_cast<double>(row.temperature);
  c.max = largest;
  c.inverse = row.temperature_last ? 1.0 : 1.0 / temperature;
  // top_k, typical_p, top_p; or top_p, top_k, typical_p.
#pragma unroll 1
  for (int i = 0; i < 3; ++i) {
    const int cut = row.temperature_last ? (i + 2) % 3 : i;
    if (cut == 1) {
      c.CutTypical(row.typical_p, row.temperature_last ? 1.0 : temperature, shared);
    } else {
      c.CutByLogit(cut == 2, row.top_k, row.top_p, cut == 2 && row.temperature_last, largest, shared);
    }
  }
  c.CutMinP(row.min_p, shared);
  if (row.temperature_last && row.temperature != 1.0f) {
    c.max = c.Largest(shared);
    c.inverse = 1.0 / temperature;
  }
  // The first id whose running sum exceeds the share.
  uint64_t target = deterministic::ShareOf(row.random, c.Total(shared)) + 1;
  return FindId(
      c.n, [&](int i) { return c.Has(i); }, [&](int i) { return c.Weight(i); }, target, shared);
}

RWKV_LARGE_KERNEL(kSampleThreads) SampleKernel(SampleArgs args) {
  BeginKernel();
  auto& shared = BlockShared<SampleShared>();
  const int t = ThreadIndex();
  const auto n = static_cast<int>(args.vocab);
  const SampleRow row = args.rows[BlockIndexX()];
  const float* const logits = args.logits + row.row * n;
  SampleResult& result = args.results[BlockIndexX()];
  const auto fail = [&](SampleStatus status) {
    if (t == 0) result.status = status;
  };

  // The model's own distribution.
  const uint64_t first = MinOf(
      n, [&](int i) { return Rank(logits[i], i); }, shared);
  if (first == 0) return fail(SampleStatus::kNotFinite);
  const float max = logits[IdOf(first)];
  if (!(max >= -kLargestFloat)) return fail(SampleStatus::kNoLogit);
  const auto scale = static_cast<double>(uint64_t{1} << deterministic::FixedPointBits(n));
  const uint64_t sum = SumOf(
      n,
      [&](int i) {
        return deterministic::FixedPointExp(static_cast<double>(logits[i]) - static_cast<double>(max), scale);
      },
      shared);
  const double log_sum = deterministic::Log(static_cast<double>(sum) / scale);
  const auto logprob = [&](int id) {
    return static_cast<float>((static_cast<double>(logits[id]) - static_cast<double>(max)) - log_sum);
  };
  const int top_count = row.top_logprobs < n ? row.top_logprobs : n;
  uint64_t next = first;
  for (int m = 0; m < top_count; ++m) {
    if (m > 0) {
      const uint64_t last = next;
      next = MinOf(
          n,
          [&](int i) {
            const uint64_t rank = Rank(logits[i], i);
            return rank > last ? rank : kNoRank;
          },
          shared);
    }
    if (t == 0) result.top[m] = {static_cast<uint32_t>(IdOf(next)), logprob(IdOf(next))};
  }

  Candidates c = {};
  c.logits = Adjust(args, row, logits, args.adjusted + int64_t{BlockIndexX()} * n);
  c.n = n;
  c.scale = scale;
  c.last_rank = kNoRank;
  const uint64_t best = MinOf(
      n, [&](int i) { return Rank(c.logits[i], i); }, shared);
  if (best == 0) return fail(SampleStatus::kOutOfRange);
  const float largest = c.logits[IdOf(best)];
  if (!(largest >= -kLargestFloat)) return fail(SampleStatus::kNoToken);
  const int token = row.temperature == 0.0f ? IdOf(best) : DrawToken(row, c, largest, shared);
  if (t != 0) return;
  result.token = static_cast<uint32_t>(token);
  result.logprob = logprob(token);
  result.top_count = top_count;
  result.status = SampleStatus::kDrawn;
}

}  // namespace RWKV_CUDA_BUILD
}  // namespace rwkv::kernels::cuda
