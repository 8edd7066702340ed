// What prover.cc runs, one each. They print JSON lines, and say "NOT RUN: why" where the machine lacks something.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"

namespace rwkv::gpu {

// {"copy_gb_per_s": X, "matrix_tflop_per_s": Y}: bytes read and written by copies within the device's memory, and
// operations of the tensor cores with bfloat16 values.
absl::Status Rates(const std::string& device);

// Every primitive of kernels/cuda/device.cuh, bit for bit against the emulation.
absl::Status Probes(const std::string& device);

// "<case> <hash>" of what small models of every version compute. `expected`: a file of such lines that must be the
// same, or empty.
absl::Status Bits(const std::string& device, const std::string& folder, const std::string& expected);

// Decode steps of 1 to 5 rows as graphs and as launches have the same bits, and every graph that was asked for was
// made. {"graphs": N, "us_a_step": T, "us_a_step_launched": T}: of one row of a small model.
absl::Status Graphs(const std::string& device, const std::string& folder);

// One layer of RWKV-7 at a real model's width, random weights: logits of prompts and steps against this machine's CPU.
absl::Status Layers(const std::string& device, const std::string& folder, int64_t width);

// {"op": NAME, "rows": N, "us": T, "bytes": B, "gb_per_s": G, "tflop_per_s": F} of each operation of a layer at the
// width, median of `seconds` each.
absl::Status OpTimes(const std::string& device, int64_t width, int64_t rows, double seconds);

// {"choice": "96 outputs of 2048 inputs (bf16), 128 rows: algorithm A, tile T, stages S"} of cuBLASLt for the matrices
// of a layer, {"library_tflop_per_s": F} of its products of many rows.
absl::Status Library(const std::string& device);

// `epochs` times: an epoch with a batch that runs beside a save. The state saved is always the same, and the device's
// free memory does not become less.
absl::Status Epochs(const std::string& device, const std::string& folder, int epochs);

// Rows between two processes by NCCL: right, and after a death, a silence and an abort again. `program`: this one.
absl::Status Pair(const std::string& device, const std::string& program);
// One of the two: what Pair() starts. `end`: "send" or "receive".
absl::Status PairEnd(const std::string& device, const std::string& end);

}  // namespace rwkv::gpu
