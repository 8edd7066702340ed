// Numbers that a seed and a place fix: the same on every machine, whatever thread asks, in whatever order.
#pragma once

#include <cmath>
#include <cstdint>

namespace rwkv::rwkvctl {

// SplitMix64 (Steele, Lea, Flood 2014, figure 17). Standard distributions are left alone: libraries differ in them.
class LoadRandom {
 public:
  // `stream` parts what is drawn for one purpose, or for one request, from what is drawn for another.
  LoadRandom(uint64_t seed, uint64_t stream) : state_(Mix(seed + kStep) ^ Mix(stream + 2 * kStep)) {}

  uint64_t Next() { return Mix(state_ += kStep); }

  // In [first, last]; first <= last. Its bias is below 2^-32.
  uint32_t Uniform(uint32_t first, uint32_t last) {
    const uint64_t count = uint64_t{last} - first + 1;
    return first + static_cast<uint32_t>((Next() >> 32) * count >> 32);
  }

  // In (0, 1].
  double Unit() { return static_cast<double>((Next() >> 11) + 1) * 0x1p-53; }

  // With mean 1.
  double Exponential() { return -std::log(Unit()); }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15;

  static uint64_t Mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }

  uint64_t state_;
};

}  // namespace rwkv::rwkvctl
