// One RWKV-7 block, token after token, straight from the paper: no operation of kernels/api, no vectors, double
// throughout. The composition of the operations, as a worker makes it, is held to it
// (kernels/conformance/block_test.cc). Source: arXiv:2503.14456; BlinkDL/RWKV-LM RWKV-v7/rwkv_v7_demo_rnn.py.
#pragma once

#include <cstdint>
#include <vector>

namespace rwkv::kernels::reference {

// All of it row-major and named and shaped as in a checkpoint; A = heads * head_size.
struct Rwkv7BlockWeights {
  int64_t width = 0;  // D
  int64_t heads = 0;
  int64_t head_size = 0;
  int64_t ffn_width = 0;                                                 // F
  std::vector<float> ln1_weight, ln1_bias, ln2_weight, ln2_bias;         // [D]
  std::vector<float> x_r, x_w, x_k, x_v, x_a, x_g;                       // [D]
  std::vector<float> w0, a0, v0, k_k, k_a, r_k, ln_x_weight, ln_x_bias;  // [A]
  std::vector<float> w1, w2, a1, a2, v1, v2, g1, g2;                     // [D, rank], [rank, A], used as x M
  std::vector<float> receptance, key, value;                             // [A, D], used as W x
  std::vector<float> output;                                             // [D, A]
  std::vector<float> ffn_x_k, ffn_key, ffn_value;                        // [D], [F, D], [D, F]
};

struct Rwkv7BlockState {
  std::vector<double> att_x_prev;  // [D]
  std::vector<double> att_state;   // [H, N(value), N(key)]
  std::vector<double> ffn_x_prev;  // [D]
};

Rwkv7BlockState InitialState(const Rwkv7BlockWeights& weights);

// x: [D], in and out. v_first: [A]; written when `first_layer`, else read.
void Rwkv7Block(const Rwkv7BlockWeights& weights, bool first_layer, Rwkv7BlockState* state, std::vector<double>* x,
                std::vector<double>* v_first);

}  // namespace rwkv::kernels::reference
