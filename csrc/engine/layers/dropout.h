// Inverted dropout with a keep mask that is a pure function of where an element is, so that nothing
// is stored and any pass can be computed again. All arithmetic on 64 bits, wrapping:
//
//   mix(z):  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9
//            z = (z ^ (z >> 27)) * 0x94d049bb133111eb
//            z ^ (z >> 31)
//   key:     mix(seed + G), then key = mix(key ^ (v + G)) for v = id, pass, task;
//            G = 0x9e3779b97f4a7c15
//   bits:    mix(key + (element + 1) * G) >> 40
//   kept:    bits >= p * 2^24, that rounded to an integer, halves to even
//
// mix and G are those of SplitMix64 (Steele, Lea, Flood 2014). id is the node's; pass is the step,
// or -1 for the queries; element counts through the task's [rows, channels, height, width]. A kept
// element is multiplied by 1 / (1 - p), computed in T; of p = 1 nothing is kept. keep_mask in
// fastmeta/ops/_engine_reference.py says the same in Python.
#pragma once
#include "engine/layers/lanes.h"

namespace fastmeta::engine::FASTMETA_ISA::dropout {

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;

// One word, or a vector of them.
template <class Word>
FASTMETA_INLINE Word mix(Word z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline uint64_t key_of(uint64_t seed, int64_t id, int64_t pass, int64_t task) {
  uint64_t key = mix(seed + kGolden);
  for (const int64_t v : {id, pass, task}) key = mix(key ^ (static_cast<uint64_t>(v) + kGolden));
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

// Words of 64 bits whatever T is: a vector of floats takes two vectors of them.
typedef uint64_t Words __attribute__((vector_size(kVecBytes)));
constexpr int kWords = kVecBytes / 8;

// Small numbers in words to integers in T's lanes.
template <class T>
struct Narrow;
template <>
struct Narrow<double> {
  static constexpr int kParts = 1;
  [[gnu::always_inline]] static IntVec<double> of(const Words* parts) {
    return reinterpret_cast<IntVec<double>>(parts[0]);
  }
};
template <>
struct Narrow<float> {
  static constexpr int kParts = 2;
  typedef int32_t Half __attribute__((vector_size(kVecBytes / 2)));
  template <int... I>
  [[gnu::always_inline]] static IntVec<float> join(Half low, Half high, Lanes<I...>) {
    return __builtin_shufflevector(low, high, I...);
  }
  [[gnu::always_inline]] static IntVec<float> of(const Words* parts) {
    return join(__builtin_convertvector(parts[0], Half), __builtin_convertvector(parts[1], Half),
                typename MakeLanes<2 * kWords>::type{});
  }
};

// body(offset, factors) for each vector of the value: 0 or 1 / (1 - p).
template <class T, class Body>
FASTMETA_INLINE void over_factors(const LayerCall<T>& call, Body&& body) {
  const Node& node = *call.node;
  const uint64_t key = key_of(call.seed, node.id, call.pass, call.task);
  const int64_t pixels = node.out.pixels(), channels = node.out.channels, ld = node.out.ld;
  const T kept = node.a < 1 ? T(1) / static_cast<T>(1 - node.a) : T(0);
  const IntVec<T> least = IntVec<T>{} + static_cast<int>(__builtin_rint(node.a * 0x1p24));
  // Channels are pixels apart in torch's order.
  const uint64_t step = static_cast<uint64_t>(pixels) * kGolden;
  Words lanes;
  for (int k = 0; k < kWords; ++k) lanes[k] = static_cast<uint64_t>(k) * step;
  for (int64_t i = 0; i < call.rows * pixels; ++i) {
    const int64_t first = (i / pixels) * channels * pixels + i % pixels;
    Words position = lanes + (key + static_cast<uint64_t>(first + 1) * kGolden);
    for (int64_t c = 0; c < ld; c += kWidth<T>) {
      Words parts[Narrow<T>::kParts];
      FASTMETA_UNROLL
      for (int k = 0; k < Narrow<T>::kParts; ++k) {
        parts[k] = mix(position) >> 40;
        position += kWords * step;
      }
      body(i * ld + c, Narrow<T>::of(parts) >= least ? splat<T>(kept) : Vec<T>{});
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
