// The WKV-7 recurrence of train.py for the CPU, forward and backward, and the longest-match tokenizer: what would be
// slow in Python. train.py compiles this file when a compiler is there and checks it against its plain twins.
//
// Per sequence and head, with state S[i][j] (i value channel, j key channel, 64 by 64), one token does
//   sa_i = sum_j S_ij a_j;   S_ij = S_ij w_j + sa_i b_j + v_i k_j;   y_i = sum_j S_ij r_j.
// The forward pass holds the state transposed, value channels side by side: then a token is one sweep over its rows j
// without a sum across lanes, which also gathers sa of the next token. The backward pass takes kRows rows i at a time
// through a chunk of tokens, after it has recomputed their states from the state at the chunk's start, which the
// forward pass has kept.
//
// Layouts: r w k v a b y sa and their gradients [B, T, H, 64]; state [B, H, 64, 64]; starts [B, H, T / kChunk, 64, 64].
// All float, T a multiple of kChunk. Sequence-heads are dealt to the threads; nothing is shared between them.

#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int kHead = 64;
constexpr int kChunk = 16;
constexpr int kRows =
    8;  // of the backward pass: what it recomputes for them, (kChunk + 1) * kRows * 256 bytes, stays in cache

typedef float Lanes __attribute__((vector_size(64)));
constexpr int kLanes = 16;
constexpr int kVectors = kHead / kLanes;
static_assert(2 * kRows == kLanes, "two sums for each row of the backward pass are taken together");

struct Vector64 {
  Lanes part[kVectors];
};

inline Vector64 Load(const float* p) {
  Vector64 result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

inline void Store(float* p, const Vector64& x) { std::memcpy(p, &x, sizeof(x)); }

inline Lanes LoadLanes(const float* p) {
  Lanes result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

inline void StoreLanes(float* p, Lanes x) { std::memcpy(p, &x, sizeof(x)); }

// Lanes of x summed in pairs kApart apart, those of y likewise, side by side.
template <int kApart>
inline Lanes Fold(Lanes x, Lanes y) {
  typedef int32_t Places __attribute__((vector_size(64)));
  Places first, second;
  for (int l = 0; l < kLanes; ++l) {
    const int source = (l / (2 * kApart)) * (2 * kApart) + l % kApart + ((l & kApart) != 0 ? kLanes : 0);
    first[l] = source;
    second[l] = source + kApart;
  }
  return __builtin_shuffle(x, y, first) + __builtin_shuffle(x, y, second);
}

// The sums of 16 vectors, sum l in lane l.
inline Lanes Sums(const Lanes* x) {
  Lanes eight[8], four[4];
  for (int n = 0; n < 8; ++n) eight[n] = Fold<8>(x[n], x[n + 8]);
  for (int n = 0; n < 4; ++n) four[n] = Fold<4>(eight[n], eight[n + 4]);
  return Fold<1>(Fold<2>(four[0], four[2]), Fold<2>(four[1], four[3]));
}

inline void Transpose(const float* from, float* to) {
  typedef int32_t Places __attribute__((vector_size(64)));
  for (int i = 0; i < kHead; i += kLanes) {
    for (int j = 0; j < kHead; j += kLanes) {
      Lanes x[kLanes];
      for (int n = 0; n < kLanes; ++n) x[n] = LoadLanes(from + (i + n) * kHead + j);
#pragma GCC unroll 4
      for (int apart = kLanes / 2; apart > 0;
           apart /= 2) {  // Swaps the upper right and lower left of blocks 2 apart wide.
        Places upper, lower;
        for (int l = 0; l < kLanes; ++l) {
          upper[l] = (l & apart) == 0 ? l : kLanes + l - apart;
          lower[l] = (l & apart) == 0 ? l + apart : kLanes + l;
        }
#pragma GCC unroll 16
        for (int n = 0; n < kLanes; ++n) {
          if ((n & apart) != 0) continue;
          const Lanes first = x[n];
          x[n] = __builtin_shuffle(first, x[n + apart], upper);
          x[n + apart] = __builtin_shuffle(first, x[n + apart], lower);
        }
      }
      for (int n = 0; n < kLanes; ++n) StoreLanes(to + (j + n) * kHead + i, x[n]);
    }
  }
}

template <typename Body>
void ForEachHead(int64_t count, int threads, const Body& body) {
  std::vector<std::thread> pool;
  for (int t = 1; t < threads; ++t) {
    pool.emplace_back([=, &body] {
      for (int64_t n = t; n < count; n += threads) body(n);
    });
  }
  for (int64_t n = 0; n < count; n += threads) body(n);
  for (std::thread& thread : pool) thread.join();
}

}  // namespace

extern "C" {

int wkv7_chunk() { return kChunk; }

void wkv7_forward(int64_t batch, int64_t tokens, int64_t heads, int threads, const float* r, const float* w,
                  const float* k, const float* v, const float* a, const float* b, float* state, float* y, float* sa,
                  float* starts) {
  ForEachHead(batch * heads, threads, [=](int64_t n) {
    const int64_t step = heads * kHead;
    const int64_t origin = (n / heads) * tokens * step + (n % heads) * kHead;
    alignas(64) float s[kHead * kHead];
    Transpose(state + n * kHead * kHead, s);
    Vector64 recall = {};
    for (int j = 0; j < kHead; ++j) {
      for (int p = 0; p < kVectors; ++p) recall.part[p] += Load(s + j * kHead).part[p] * a[origin + j];
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t at = origin + t * step;
      if (starts != nullptr && t % kChunk == 0) {
        Transpose(s, starts + (n * (tokens / kChunk) + t / kChunk) * kHead * kHead);
      }
      const float* next_a = a + (t + 1 < tokens ? at + step : at);
      const Vector64 at_v = Load(v + at);
      Vector64 next_recall = {}, at_y = {};
      for (int j = 0; j < kHead; ++j) {
        Vector64 row = Load(s + j * kHead);
        const float at_w = w[at + j], at_k = k[at + j], at_b = b[at + j], at_r = r[at + j], at_a = next_a[j];
        for (int p = 0; p < kVectors; ++p) {
          row.part[p] = row.part[p] * at_w + recall.part[p] * at_b + at_v.part[p] * at_k;
          at_y.part[p] += row.part[p] * at_r;
          next_recall.part[p] += row.part[p] * at_a;
        }
        Store(s + j * kHead, row);
      }
      Store(y + at, at_y);
      if (sa != nullptr) Store(sa + at, recall);
      recall = next_recall;
    }
    Transpose(s, state + n * kHead * kHead);
  });
}

// The gradient of the final state is taken as zero (training cuts the gradient between windows). dr..db start as zeros.
void wkv7_backward(int64_t batch, int64_t tokens, int64_t heads, int threads, const float* r, const float* w,
                   const float* k, const float* v, const float* a, const float* b, const float* sa, const float* starts,
                   const float* dy, float* dr, float* dw, float* dk, float* dv, float* da, float* db) {
  ForEachHead(batch * heads, threads, [=](int64_t n) {
    const int64_t step = heads * kHead;
    const int64_t origin = (n / heads) * tokens * step + (n % heads) * kHead;
    const float nothing[kHead] = {};
    alignas(64) float gradient[kHead][kHead] = {};
    alignas(64) float history[kRows][kChunk + 1][kHead];
    for (int64_t begin = tokens - kChunk; begin >= 0; begin -= kChunk) {
      const float* start = starts + (n * (tokens / kChunk) + begin / kChunk) * kHead * kHead;
      for (int i = 0; i < kHead; i += kRows) {
        for (int m = 0; m < kRows; m += 2) {  // Two rows fit into the registers.
          Vector64 row0 = Load(start + (i + m) * kHead), row1 = Load(start + (i + m + 1) * kHead);
          Store(history[m][0], row0);
          Store(history[m + 1][0], row1);
          for (int t = 0; t < kChunk; ++t) {
            const int64_t at = origin + (begin + t) * step;
            const Vector64 at_w = Load(w + at), at_b = Load(b + at), at_k = Load(k + at);
            const float *at_sa = sa + at + i + m, *at_v = v + at + i + m;
            for (int p = 0; p < kVectors; ++p) {
              row0.part[p] = row0.part[p] * at_w.part[p] + at_sa[0] * at_b.part[p] + at_v[0] * at_k.part[p];
              row1.part[p] = row1.part[p] * at_w.part[p] + at_sa[1] * at_b.part[p] + at_v[1] * at_k.part[p];
            }
            Store(history[m][t + 1], row0);
            Store(history[m + 1][t + 1], row1);
          }
        }
        // A sweep goes from the gradient of token t's state to that of token t - 1, and takes what sums over j the
        // latter needs.
        alignas(64) float rows[kRows][kHead];
        std::memcpy(rows, gradient[i], sizeof(rows));
        Lanes sums[2 * kRows] = {};
        {
          const int64_t at = origin + (begin + kChunk - 1) * step;
          const Vector64 at_r = Load(r + at), at_b = Load(b + at), at_k = Load(k + at);
          for (int m = 0; m < kRows; ++m) {
            Vector64 row = Load(rows[m]);
            for (int p = 0; p < kVectors; ++p) {
              row.part[p] += dy[at + i + m] * at_r.part[p];
              sums[m] += row.part[p] * at_b.part[p];
              sums[kRows + m] += row.part[p] * at_k.part[p];
            }
            Store(rows[m], row);
          }
        }
        for (int t = kChunk - 1; t >= 0; --t) {
          const int64_t at = origin + (begin + t) * step;
          alignas(64) float recall_gradient[2 * kRows];  // and dv behind it
          const Lanes both = Sums(sums);
          std::memcpy(recall_gradient, &both, sizeof(both));
          std::memcpy(dv + at + i, recall_gradient + kRows, sizeof(float) * kRows);
          const float *next_dy = t > 0 ? dy + at - step + i : nothing, *next_r = t > 0 ? r + at - step : nothing;
          const float *next_b = t > 0 ? b + at - step : nothing, *next_k = t > 0 ? k + at - step : nothing;
          const float *at_dy = dy + at + i, *at_v = v + at + i, *at_sa = sa + at + i;
          for (int m = 0; m < 2 * kRows; ++m) sums[m] = Lanes{};
          for (int p = 0; p < kHead; p += kLanes) {
            Lanes sum_r = {}, sum_w = {}, sum_k = {}, sum_a = {}, sum_b = {};
            const Lanes at_w = LoadLanes(w + at + p), at_a = LoadLanes(a + at + p);
            const Lanes to_r = LoadLanes(next_r + p), to_b = LoadLanes(next_b + p), to_k = LoadLanes(next_k + p);
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
              const Lanes before = LoadLanes(&history[m][t][p]), after = LoadLanes(&history[m][t + 1][p]);
              Lanes row = LoadLanes(&rows[m][p]);
              sum_r += after * at_dy[m];
              sum_w += before * row;
              sum_k += row * at_v[m];
              sum_b += row * at_sa[m];
              sum_a += before * recall_gradient[m];
              row = row * at_w + recall_gradient[m] * at_a + next_dy[m] * to_r;
              sums[m] += row * to_b;
              sums[kRows + m] += row * to_k;
              StoreLanes(&rows[m][p], row);
            }
            StoreLanes(dr + at + p, LoadLanes(dr + at + p) + sum_r);
            StoreLanes(dw + at + p, LoadLanes(dw + at + p) + sum_w);
            StoreLanes(dk + at + p, LoadLanes(dk + at + p) + sum_k);
            StoreLanes(da + at + p, LoadLanes(da + at + p) + sum_a);
            StoreLanes(db + at + p, LoadLanes(db + at + p) + sum_b);
          }
        }
        std::memcpy(gradient[i], rows, sizeof(rows));
      }
    }
  });
}

// Greedy longest match over bytes. tokens: all tokens' bytes one after the other, token n (id n + 1) is
// tokens[begin[n], begin[n + 1]). A zero byte of the text becomes id 0, the document end. Returns how many ids it
// wrote.
int64_t tokenize(int64_t size, const uint8_t* text, int64_t count, const uint8_t* tokens, const int64_t* begin,
                 uint16_t* ids) {
  std::vector<int32_t> child(256, 0);
  std::vector<int32_t> token(1, -1);
  for (int64_t n = 0; n < count; ++n) {
    int32_t node = 0;
    for (int64_t i = begin[n]; i < begin[n + 1]; ++i) {
      int32_t next = child[node * 256 + tokens[i]];
      if (next == 0) {
        next = static_cast<int32_t>(token.size());
        child[node * 256 + tokens[i]] = next;
        child.resize(child.size() + 256, 0);
        token.push_back(-1);
      }
      node = next;
    }
    token[node] = static_cast<int32_t>(n + 1);
  }
  int64_t written = 0;
  for (int64_t at = 0; at < size;) {
    if (text[at] == 0) {
      ids[written++] = 0;
      ++at;
      continue;
    }
    int32_t node = 0, best = 0;
    int64_t end = at + 1;
    for (int64_t i = at; i < size; ++i) {
      node = child[node * 256 + text[i]];
      if (node == 0) break;
      if (token[node] > 0) {
        best = token[node];
        end = i + 1;
      }
    }
    ids[written++] = static_cast<uint16_t>(best);
    at = end;
  }
  return written;
}

}  // extern "C"
