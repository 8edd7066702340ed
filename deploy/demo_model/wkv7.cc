// The WKV-7 recurrence of train.py for the CPU, forward and backward, and the longest-match tokenizer: what would be
// slow in Python. train.py compiles this file when a compiler is there and checks it against its plain twins.
//
// Per sequence and head, with state S[i][j] (i value channel, j key channel, 64 by 64), one token does
//   sa_i = sum_j S_ij a_j;   S_ij = S_ij w_j + sa_i b_j + v_i k_j;   y_i = sum_j S_ij r_j.
// Rows i do not see each other, so a few rows at a time stay in registers while a chunk of tokens goes by. The backward pass
// recomputes a chunk's states from the state at its start, which the forward pass has kept.
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
constexpr int kRows = 4;  // rows in registers: kRows * 4 vectors of 16 floats

typedef float Lanes __attribute__((vector_size(64)));
constexpr int kLanes = 16;
constexpr int kVectors = kHead / kLanes;

struct Vector64 {
  Lanes part[kVectors];
};

inline Vector64 Load(const float* p) {
  Vector64 result;
  std::memcpy(&result, p, sizeof(result));
  return result;
}

inline void Store(float* p, const Vector64& x) { std::memcpy(p, &x, sizeof(x)); }

inline float Sum(Lanes x) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half low, high;
  std::memcpy(&low, &x, 32);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + 32, 32);
  low += high;
  Quarter a, b;
  std::memcpy(&a, &low, 16);
  std::memcpy(&b, reinterpret_cast<const char*>(&low) + 16, 16);
  a += b;
  return (a[0] + a[1]) + (a[2] + a[3]);
}

inline float Dot(const Vector64& x, const Vector64& y) {
  Lanes sum = x.part[0] * y.part[0];
  for (int n = 1; n < kVectors; ++n) sum += x.part[n] * y.part[n];
  return Sum(sum);
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

void wkv7_forward(int64_t batch, int64_t tokens, int64_t heads, int threads, const float* r, const float* w, const float* k,
                  const float* v, const float* a, const float* b, float* state, float* y, float* sa, float* starts) {
  ForEachHead(batch * heads, threads, [=](int64_t n) {
    const int64_t step = heads * kHead;
    const int64_t origin = (n / heads) * tokens * step + (n % heads) * kHead;
    float* s = state + n * kHead * kHead;
    for (int64_t begin = 0; begin < tokens; begin += kChunk) {
      if (starts != nullptr) {
        std::memcpy(starts + (n * (tokens / kChunk) + begin / kChunk) * kHead * kHead, s, sizeof(float) * kHead * kHead);
      }
      for (int i = 0; i < kHead; i += kRows) {
        Vector64 row[kRows];
        for (int m = 0; m < kRows; ++m) row[m] = Load(s + (i + m) * kHead);
        for (int64_t t = begin; t < begin + kChunk; ++t) {
          const int64_t at = origin + t * step;
          float recall[kRows];
          const Vector64 at_a = Load(a + at);
          for (int m = 0; m < kRows; ++m) recall[m] = Dot(row[m], at_a);
          for (int p = 0; p < kVectors; ++p) {
            const Lanes at_w = *reinterpret_cast<const Lanes*>(w + at + p * kLanes);
            const Lanes at_b = *reinterpret_cast<const Lanes*>(b + at + p * kLanes);
            const Lanes at_k = *reinterpret_cast<const Lanes*>(k + at + p * kLanes);
            for (int m = 0; m < kRows; ++m) {
              row[m].part[p] = row[m].part[p] * at_w + recall[m] * at_b + v[at + i + m] * at_k;
            }
          }
          const Vector64 at_r = Load(r + at);
          for (int m = 0; m < kRows; ++m) {
            y[at + i + m] = Dot(row[m], at_r);
            if (sa != nullptr) sa[at + i + m] = recall[m];
          }
        }
        for (int m = 0; m < kRows; ++m) Store(s + (i + m) * kHead, row[m]);
      }
    }
  });
}

// The gradient of the final state is taken as zero (training cuts the gradient between windows). dr..db start as zeros.
void wkv7_backward(int64_t batch, int64_t tokens, int64_t heads, int threads, const float* r, const float* w, const float* k,
                   const float* v, const float* a, const float* b, const float* sa, const float* starts, const float* dy,
                   float* dr, float* dw, float* dk, float* dv, float* da, float* db) {
  ForEachHead(batch * heads, threads, [=](int64_t n) {
    constexpr int kBack = 2;
    const int64_t step = heads * kHead;
    const int64_t origin = (n / heads) * tokens * step + (n % heads) * kHead;
    std::vector<float> gradient(kHead * kHead, 0.0f);
    alignas(64) float history[kBack][kChunk + 1][kHead];
    for (int64_t begin = tokens - kChunk; begin >= 0; begin -= kChunk) {
      const float* start = starts + (n * (tokens / kChunk) + begin / kChunk) * kHead * kHead;
      for (int i = 0; i < kHead; i += kBack) {
        Vector64 row[kBack];
        for (int m = 0; m < kBack; ++m) {
          row[m] = Load(start + (i + m) * kHead);
          Store(history[m][0], row[m]);
        }
        for (int t = 0; t < kChunk; ++t) {
          const int64_t at = origin + (begin + t) * step;
          const Vector64 at_w = Load(w + at), at_b = Load(b + at), at_k = Load(k + at);
          for (int m = 0; m < kBack; ++m) {
            for (int p = 0; p < kVectors; ++p) {
              row[m].part[p] = row[m].part[p] * at_w.part[p] + sa[at + i + m] * at_b.part[p] + v[at + i + m] * at_k.part[p];
            }
            Store(history[m][t + 1], row[m]);
          }
        }
        Vector64 g[kBack];
        for (int m = 0; m < kBack; ++m) g[m] = Load(gradient.data() + (i + m) * kHead);
        for (int t = kChunk - 1; t >= 0; --t) {
          const int64_t at = origin + (begin + t) * step;
          float recall_gradient[kBack];
          {
            const Vector64 at_r = Load(r + at), at_k = Load(k + at), at_b = Load(b + at);
            for (int m = 0; m < kBack; ++m) {
              for (int p = 0; p < kVectors; ++p) g[m].part[p] += dy[at + i + m] * at_r.part[p];
              dv[at + i + m] = Dot(g[m], at_k);
              recall_gradient[m] = Dot(g[m], at_b);
            }
          }
          for (int p = 0; p < kVectors; ++p) {
            const int64_t here = at + p * kLanes;
            Lanes sum_r = {}, sum_w = {}, sum_k = {}, sum_a = {}, sum_b = {};
            const Lanes at_w = *reinterpret_cast<const Lanes*>(w + here);
            const Lanes at_a = *reinterpret_cast<const Lanes*>(a + here);
            for (int m = 0; m < kBack; ++m) {
              const Lanes before = *reinterpret_cast<const Lanes*>(&history[m][t][p * kLanes]);
              const Lanes after = *reinterpret_cast<const Lanes*>(&history[m][t + 1][p * kLanes]);
              sum_r += after * dy[at + i + m];
              sum_w += before * g[m].part[p];
              sum_k += g[m].part[p] * v[at + i + m];
              sum_b += g[m].part[p] * sa[at + i + m];
              sum_a += before * recall_gradient[m];
              g[m].part[p] = g[m].part[p] * at_w + recall_gradient[m] * at_a;
            }
            *reinterpret_cast<Lanes*>(dr + here) += sum_r;
            *reinterpret_cast<Lanes*>(dw + here) += sum_w;
            *reinterpret_cast<Lanes*>(dk + here) += sum_k;
            *reinterpret_cast<Lanes*>(da + here) += sum_a;
            *reinterpret_cast<Lanes*>(db + here) += sum_b;
          }
        }
        for (int m = 0; m < kBack; ++m) Store(gradient.data() + (i + m) * kHead, g[m]);
      }
    }
  });
}

// Greedy longest match over bytes. tokens: all tokens' bytes one after the other, token n (id n + 1) is
// tokens[begin[n], begin[n + 1]). A zero byte of the text becomes id 0, the document end. Returns how many ids it wrote.
int64_t tokenize(int64_t size, const uint8_t* text, int64_t count, const uint8_t* tokens, const int64_t* begin, uint16_t* ids) {
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
