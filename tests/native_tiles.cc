// One product of AMX tiles: `native_tiles bf16|u8s8|s8s8 WIDTH` takes sum [16, WIDTH], left [16, 16] and right
// [16, WIDTH] of 32 bits from its input and gives sum [16, 20], untouched beyond WIDTH. 77: no tiles here.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu.h"
#include "tiles.h"

namespace {

constexpr int64_t kStride = 20;

void read(uint32_t* to, size_t width) {
  for (int i = 0; i < 16; ++i)
    if (std::fread(to + i * kStride, 4, width, stdin) != width) std::exit(2);
}

}  // namespace

int main(int count, char** words) {
  if (count != 3) return 2;
  if (jaxllm::best_level() != jaxllm::Level::kAmx) return 77;
  const size_t width = static_cast<size_t>(std::atoi(words[2]));
  uint32_t sum[16 * kStride] = {}, left[16 * kStride], right[16 * kStride];
  const jaxllm::amx::Tiles tiles(static_cast<int64_t>(width));
  read(sum, width), read(left, 16), read(right, width);
  TILE_LOAD(0, sum, 4 * kStride);
  TILE_LOAD(4, left, 4 * kStride);
  TILE_LOAD(6, right, 4 * kStride);
  if (!std::strcmp(words[1], "bf16")) TILE_DOT(0, 4, 6);
  if (!std::strcmp(words[1], "u8s8")) TILE_DOT_U8S8(0, 4, 6);
  if (!std::strcmp(words[1], "s8s8")) TILE_DOT_S8S8(0, 4, 6);
  std::memset(sum, 0xab, sizeof sum);
  TILE_STORE(0, sum, 4 * kStride);
  return std::fwrite(sum, 4, 16 * kStride, stdout) == 16 * kStride ? 0 : 2;
}
