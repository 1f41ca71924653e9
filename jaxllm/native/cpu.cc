#include "cpu.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace jaxllm {
namespace {

#if defined(__x86_64__)

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf leaf(unsigned number, unsigned sub) {
  Leaf found;
  __get_cpuid_count(number, sub, &found.eax, &found.ebx, &found.ecx, &found.edx);
  return found;
}

bool has(unsigned bits, int bit) { return (bits >> bit) & 1; }

#if defined(JAXLLM_SOFT_TILES)

bool has_tiles() { return true; }

#else

// Linux gives a process the 8 KiB of tile registers only when it asks; the answer holds for all its threads.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has_tiles() {
  const unsigned features = leaf(7, 0).edx;
  return has(features, 22) && has(features, 24) && has(features, 25) && may_use_tiles();
}

#endif

Level detect() {
  __builtin_cpu_init();
  // The compiler's own check knows whether the operating system keeps the vector registers.
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::kPortable;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512vnni");
  if (!wide || !has(leaf(7, 1).eax, 5)) return Level::kAvx2;
  return has_tiles() ? Level::kAmx : Level::kAvx512;
}

#else

Level detect() { return Level::kPortable; }

#endif

}  // namespace

Level best_level() {
  static const Level level = detect();
  return level;
}

}  // namespace jaxllm
