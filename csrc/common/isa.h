// Instruction sets of the CPU kernels: which there are, which the machine can run, which is chosen.
#pragma once
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fastmeta {

// kAvx512Bf16 runs the kernels of kAvx512; those with a form for AVX512-BF16 take it.
enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

inline const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

// The best set that both this build and this machine have.
inline Isa best_isa() {
#if defined(FASTMETA_X86)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kBaseline;
}

// The set that is taken unasked. On Intel's cores one port has AVX512-BF16's dot products where two
// have FMA, so that they save nothing, and what they need beside it costs: on a Xeon with both,
// tasks of bfloat16 took up to 1.7 times as long.
inline Isa default_isa() {
  const Isa best = best_isa();
#if defined(FASTMETA_X86)
  if (best == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512;
#endif
  return best;
}

// The set named by text; throws std::invalid_argument for any other text.
inline Isa parse_isa(const std::string& text) {
  for (Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (text == isa_name(isa)) return isa;
  }
  throw std::invalid_argument(
      "FASTMETA_CPU_ISA must be baseline, avx2, avx512 or avx512_bf16, got '" + text + "'");
}

// Chosen once: the default set, or the one that FASTMETA_CPU_ISA names. It never goes above the
// best.
inline Isa& mutable_isa() {
  static Isa chosen = [] {
    const char* cap = std::getenv("FASTMETA_CPU_ISA");
    if (cap == nullptr || *cap == '\0') return default_isa();
    return std::min(parse_isa(cap), best_isa());
  }();
  return chosen;
}
inline Isa current_isa() { return mutable_isa(); }

// FASTMETA_DISPATCH(isa, matching, forward, args...) calls
// fastmeta::matching::<isa>::forward(args...).
#if defined(FASTMETA_X86)
#define FASTMETA_DISPATCH(isa, family, function, ...)        \
  do {                                                       \
    switch (isa) {                                           \
      case ::fastmeta::Isa::kAvx512:                         \
      case ::fastmeta::Isa::kAvx512Bf16:                     \
        ::fastmeta::family::avx512::function(__VA_ARGS__);   \
        break;                                               \
      case ::fastmeta::Isa::kAvx2:                           \
        ::fastmeta::family::avx2::function(__VA_ARGS__);     \
        break;                                               \
      default:                                               \
        ::fastmeta::family::baseline::function(__VA_ARGS__); \
        break;                                               \
    }                                                        \
  } while (0)
#else
#define FASTMETA_DISPATCH(isa, family, function, ...) \
  ::fastmeta::family::baseline::function(__VA_ARGS__)
#endif

}  // namespace fastmeta
