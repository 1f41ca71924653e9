// One product of AMX tiles: `native_tiles bf16|u8s8|s8s8 WIDTH ROWS DEPTH` takes sum [ROWS, WIDTH], left
// [ROWS, DEPTH / 4] and right [DEPTH / 4, WIDTH] of 32 bits from its input and gives sum [16, 20], untouched beyond
// WIDTH and ROWS. 77: no tiles here.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "cpu.h"
#include "tiles.h"

namespace {

constexpr int64_t kStride = 20;

void read(uint32_t* to, int64_t rows, size_t width) {
  for (int64_t i = 0; i < rows; ++i)
    if (std::fread(to + i * kStride, 4, width, stdin) != width) std::exit(2);
}

}  // namespace

int main(int count, char** words) {
  if (count != 5) return 2;
  if (jaxllm::best_level() != jaxllm::Level::kAmx) return 77;
  const size_t width = static_cast<size_t>(std::atoi(words[2]));
  const int64_t rows = std::atoi(words[3]), depth = std::atoi(words[4]);
  uint32_t sum[16 * kStride] = {}, left[16 * kStride], right[16 * kStride];
  const jaxllm::amx::Tiles tiles(static_cast<int64_t>(width), rows, depth);
  read(sum, rows, width), read(left, rows, static_cast<size_t>(depth / 4)), read(right, depth / 4, width);
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
