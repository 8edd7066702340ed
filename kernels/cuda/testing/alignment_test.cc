// Memory that is not aligned to 16 bytes is read and written by words: whatever one pointer of a launch that else could
// go by 16 bytes is off. The emulation ends a launch that goes wide there.
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/base/weight.h"
#include "kernels/cuda/kernel_set.h"
#include "kernels/cuda/testing/emulation.h"

namespace rwkv::kernels::cuda {
namespace {

// Gives memory of which one piece, the n-th, begins four bytes behind a multiple of 16.
class Memory {
 public:
  explicit Memory(int off) : off_(off) {}
  float* Floats(int64_t count) {
    floats_.emplace_back(static_cast<size_t>(count + 8), 0.25f);
    float* data = floats_.back().data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
    return data + (pieces_++ == off_ ? 1 : 0);
  }
  int pieces() const { return pieces_; }

 private:
  const int off_;
  int pieces_ = 0;
  std::deque<std::vector<float>> floats_;
};

// Runs `launch` once for each piece of its memory, which is off then, and once with all in place.
template <typename Launch>
void ForEachPiece(const Launch& launch, int pieces) {
  for (int off = -1; off < pieces; ++off) {
    Memory memory(off);
    EXPECT_EQ(launch(memory), 0) << "piece " << off << ": " << emulation::LastStatus();
    EXPECT_EQ(memory.pieces(), pieces);
  }
}

const SequenceSpan kSpans[] = {{1, 0, 2}, {0, 2, 1}};
const StepRows kStep = {3, 2, kSpans};

TEST(AlignmentTest, LayerNorm) {
  ForEachPiece(
      [](Memory& memory) {
        LayerNormArgs args;
        args.rows = 2;
        args.width = 64;
        args.x = memory.Floats(128);
        args.weight = memory.Floats(64);
        args.bias = memory.Floats(64);
        args.y = memory.Floats(128);
        return kEmulatedKernels.layer_norm(args, nullptr);
      },
      4);
}

TEST(AlignmentTest, Embed) {
  const std::vector<float> table(2 * 64 + 8, 0.5f);
  const float* data = table.data();
  while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
  const int32_t tokens[] = {1, 0};
  Weight weight;
  weight.matrix = {DType::kFloat32, 2, 64, data};
  ForEachPiece(
      [&](Memory& memory) {
        EmbedArgs args;
        args.rows = 2;
        args.tokens = tokens;
        args.embedding = &weight;
        args.weight = memory.Floats(64);
        args.bias = memory.Floats(64);
        args.x = memory.Floats(128);
        return kEmulatedKernels.embed(args, nullptr);
      },
      3);
}

TEST(AlignmentTest, MixInput) {
  ForEachPiece(
      [](Memory& memory) {
        MixInputArgs args;
        args.step = &kStep;
        args.width = 64;
        args.x = memory.Floats(3 * 64);
        args.weight = memory.Floats(64);
        args.bias = memory.Floats(64);
        args.shift = {memory.Floats(2 * 64), 64};
        args.normed = memory.Floats(3 * 64);
        args.outputs = 2;
        for (int m = 0; m < 2; ++m) {
          args.mix[m] = memory.Floats(64);
          args.mix_delta[m] = memory.Floats(3 * 64);
          args.y[m] = memory.Floats(3 * 64);
        }
        return kEmulatedKernels.mix_input(args, nullptr);
      },
      11);
}

// A pool whose slots are no multiple of 16 bytes apart.
TEST(AlignmentTest, StatesThatLieApart) {
  ForEachPiece(
      [](Memory& memory) {
        MixInputArgs args;
        args.step = &kStep;
        args.width = 64;
        args.x = memory.Floats(3 * 64);
        args.shift = {memory.Floats(2 * 65), 65};
        args.outputs = 1;
        args.mix[0] = memory.Floats(64);
        args.y[0] = memory.Floats(3 * 64);
        return kEmulatedKernels.mix_input(args, nullptr);
      },
      4);
}

// Rows that are no multiple of 16 bytes, in a pool whose slots are.
TEST(AlignmentTest, RowsThatAreNoQuads) {
  ForEachPiece(
      [](Memory& memory) {
        MixInputArgs args;
        args.step = &kStep;
        args.width = 66;
        args.x = memory.Floats(3 * 66);
        args.shift = {memory.Floats(2 * 68), 68};
        args.outputs = 1;
        args.mix[0] = memory.Floats(66);
        args.y[0] = memory.Floats(3 * 66);
        return kEmulatedKernels.mix_input(args, nullptr);
      },
      4);
}

TEST(AlignmentTest, Products) {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const std::vector<float> matrix(9 * 64 + 8, 0.5f);
    const float* data = matrix.data();
    while (reinterpret_cast<uintptr_t>(data) % 16 != 0) ++data;
    Weight weight;
    weight.matrix = {dtype, 9, 64, data};
    for (const int64_t rows : {1, 9}) {
      for (const auto launch :
           {kEmulatedKernels.products, kEmulatedKernels.tensor_products, kEmulatedKernels.rounded_products}) {
        ForEachPiece(
            [&](Memory& memory) {
              Product product;
              product.weight = &weight;
              product.x = memory.Floats(rows * 64);
              product.y = memory.Floats(rows * 9);
              return launch({rows, &product, 1}, nullptr);
            },
            2);
      }
    }
  }
}

TEST(AlignmentTest, InputsOfALibrarysProduct) {
  std::vector<uint16_t> to(4 * 64 + 8);
  ForEachPiece(
      [&](Memory& memory) {
        RoundInputsArgs args;
        args.x = memory.Floats(3 * 64);
        args.rows = 3;
        args.inputs = 64;
        args.to = to.data();
        while (reinterpret_cast<uintptr_t>(args.to) % 16 != 0) ++args.to;
        args.to_rows = 4;
        args.pitch = 64;
        return kEmulatedKernels.round_inputs(args, nullptr);
      },
      1);
}

TEST(AlignmentTest, States) {
  for (const int64_t gap : {0, 1}) {
    ForEachPiece(
        [gap](Memory& memory) {
          Wkv6Args args;
          args.step = &kStep;
          args.heads = 1;
          args.head_size = 64;
          args.state = {memory.Floats(2 * (64 * 64 + gap)), 64 * 64 + gap};
          for (const float** vector : {&args.bonus, &args.ln_weight, &args.ln_bias}) *vector = memory.Floats(64);
          for (const float** rows : {&args.r, &args.w, &args.k, &args.v}) *rows = memory.Floats(3 * 64);
          args.y = memory.Floats(3 * 64);
          return kEmulatedKernels.wkv6(args, nullptr);
        },
        9);
    ForEachPiece(
        [gap](Memory& memory) {
          Wkv7Args args;
          args.step = &kStep;
          args.heads = 1;
          args.head_size = 64;
          args.state = {memory.Floats(2 * (64 * 64 + gap)), 64 * 64 + gap};
          for (const float** vector :
               {&args.decay_bias, &args.iclr_bias, &args.k_k, &args.k_a, &args.bonus, &args.ln_weight, &args.ln_bias}) {
            *vector = memory.Floats(64);
          }
          for (const float** rows : {&args.r, &args.k, &args.v, &args.g, &args.decay_lora, &args.iclr_lora}) {
            *rows = memory.Floats(3 * 64);
          }
          args.y = memory.Floats(3 * 64);
          return kEmulatedKernels.wkv7(args, nullptr);
        },
        15);
  }
}

}  // namespace
}  // namespace rwkv::kernels::cuda
