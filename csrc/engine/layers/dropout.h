// Inverted dropout with a keep mask that is a pure function of where an element is, so that nothing
// is stored and any pass can be computed again. All arithmetic on 64 bits, wrapping:
//
//   mix(z):  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
//            z = (z ^ (z >> 27)) * 0x94d049bb133111eb
//            z ^ (z >> 31)
//   key:     0, then key = mix(key + v + G) for v = seed, id, pass, task; G = 0x9e3779b97f4a7c15
//   u:       mix(key + element * G)
//   kept:    (u >> 11) * 2^-53 >= p
//
// mix and G are those of SplitMix64 (Steele, Lea, Flood 2014). id is the node's; pass is the step,
// or -1 for the queries; element counts through the task's [rows, channels, height, width]. A kept
// element is multiplied by 1 / (1 - p), rounded to T.
#pragma once
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::dropout {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

FASTMETA_INLINE uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline uint64_t key_of(uint64_t seed, int64_t id, int64_t pass, int64_t task) {
  uint64_t key = 0;
  for (const uint64_t v : {seed, static_cast<uint64_t>(id), static_cast<uint64_t>(pass),
                           static_cast<uint64_t>(task)}) {
    key = mix(key + v + kGolden);
  }
  return key;
}

template <class T = double>
int64_t saved_bytes(const Node&, int64_t) {
  return 0;
}
template <class T = double>
int64_t scratch_bytes(const Node&, int64_t) {
  return 0;
}

// body(offset, factors) for each vector of the value: 0 or 1 / (1 - p).
template <class T, class Body>
FASTMETA_INLINE void over_factors(const LayerCall<T>& call, Body&& body) {
  const Node& node = *call.node;
  const uint64_t key = key_of(call.seed, node.id, call.pass, call.task);
  const int64_t pixels = node.out.pixels(), channels = node.out.channels, ld = node.out.ld;
  const T kept = node.a < 1 ? static_cast<T>(1 / (1 - node.a)) : T(0);
  // p * 2^53 is exact, and its ceiling the least u >> 11 that is kept.
  const int64_t least = static_cast<int64_t>(__builtin_ceil(node.a * 0x1p53));
  const uint64_t lane_step = static_cast<uint64_t>(pixels) * kGolden;
  for (int64_t i = 0; i < call.rows * pixels; ++i) {
    const int64_t first = (i / pixels) * channels * pixels + i % pixels;
    uint64_t position = key + static_cast<uint64_t>(first) * kGolden;
    for (int64_t c = 0; c < ld; c += kWidth<T>) {
      Vec<T> factors;
      for (int k = 0; k < kWidth<T>; ++k) {
        const int64_t u = static_cast<int64_t>(mix(position + k * lane_step) >> 11);
        factors[k] = u >= least ? kept : T(0);
      }
      position += kWidth<T> * lane_step;
      body(i * ld + c, factors);
    }
  }
}

template <class T>
void forward(const LayerCall<T>& call) {
  over_factors(
      call, [&](int64_t at, Vec<T> factors) { store(call.y + at, load(call.x + at) * factors); });
}

template <class T>
void backward(const LayerCall<T>& call) {
  if (call.gx == nullptr) return;
  over_factors(call, [&](int64_t at, Vec<T> factors) {
    give(call.gx + at, load(call.gy + at) * factors, call.add_gx);
  });
}

template <class T>
void dual_forward(const LayerCall<T>& call) {
  over_factors(call, [&](int64_t at, Vec<T> factors) {
    store(call.y + at, load(call.x + at) * factors);
    store(call.dy + at, load_or(call.dx, at, T(0)) * factors);
  });
}

template <class T>
void dual_backward(const LayerCall<T>& call) {
  if (call.gx == nullptr && call.dgx == nullptr) return;
  over_factors(call, [&](int64_t at, Vec<T> factors) {
    if (call.gx != nullptr) give(call.gx + at, load(call.gy + at) * factors, call.add_gx);
    if (call.dgx != nullptr) give(call.dgx + at, load(call.dgy + at) * factors, call.add_gx);
  });
}

}  // namespace fastmeta::engine::FASTMETA_ISA::dropout
