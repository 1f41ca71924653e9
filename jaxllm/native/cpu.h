// What this processor can do. Every kernel is compiled once per level; the level is chosen when it is called.
#pragma once

namespace jaxllm {

// In increasing order; each level has all that the ones before it have.
enum class Level : int {
  kPortable = 0,  // any processor
  kAvx2 = 1,      // AVX2, FMA and F16C
  kAvx512 = 2,    // AVX-512 F, BW, DQ, VL, VNNI and BF16
  kAmx = 3,       // AMX tiles of bf16 and int8
};

// The highest level of this machine and its operating system. Asks once for the right to use AMX's registers.
Level best_level();

// The level to run at: the best one, or `most` where that is lower.
inline Level level_within(int most) {
  const Level best = best_level();
  return most < static_cast<int>(best) ? static_cast<Level>(most < 0 ? 0 : most) : best;
}

}  // namespace jaxllm
