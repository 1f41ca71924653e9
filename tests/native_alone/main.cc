// The kernels without XLA, for processors that run in an emulator. The task is in the words of the command, arrays
// come from the input one after the other, and the result goes to the output:
//   LEVEL matmul M N K X_BF16 W_BF16                          x [m, k], w [n, k] -> f32 [m, n]
//   LEVEL attend B T HEADS GROUP S H BF16 SCALE SOFTCAP       q, k, v, sinks f32 [heads, group], mask -> as q
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "attention.h"
#include "cpu.h"
#include "matmul.h"
#include "parallel.h"

namespace {

using Bytes = std::vector<char>;

Bytes read(int64_t count, int64_t size) {
  Bytes data(static_cast<size_t>(count * size));
  if (std::fread(data.data(), 1, data.size(), stdin) != data.size()) std::exit(2);
  return data;
}

Bytes matmul(const std::vector<std::string>& words, int level, jaxllm::Team& team) {
  const int64_t m = std::stoll(words[0]), n = std::stoll(words[1]), k = std::stoll(words[2]);
  const bool x_bf16 = words[3] == "1", w_bf16 = words[4] == "1";
  const auto type = [](bool bf16) { return bf16 ? jaxllm::Type::kBF16 : jaxllm::Type::kF32; };
  const Bytes x = read(m * k, x_bf16 ? 2 : 4), w = read(n * k, w_bf16 ? 2 : 4);
  Bytes y(static_cast<size_t>(m * n * 4));
  jaxllm::matmul({x.data(), w.data(), y.data(), type(x_bf16), type(w_bf16), type(false), m, n, k}, level, team);
  return y;
}

Bytes attend(const std::vector<std::string>& words, int level, jaxllm::Team& team) {
  jaxllm::Attention a{};
  int64_t h, *sizes[] = {&a.b, &a.t, &a.heads, &a.group, &a.s, &h};
  for (size_t i = 0; i < 6; ++i) *sizes[i] = std::stoll(words[i]);
  a.type = words[6] == "1" ? jaxllm::Type::kBF16 : jaxllm::Type::kF32;
  a.scale = std::stof(words[7]), a.softcap = std::stof(words[8]);
  const int64_t size = jaxllm::bytes(a.type), queries = a.b * a.t * a.heads * a.group * h;
  const Bytes q = read(queries, size), k = read(a.b * a.heads * a.s * h, size);
  const Bytes v = read(a.b * a.heads * a.s * h, size), sinks = read(a.heads * a.group, 4);
  const Bytes mask = read(a.b * a.t * a.s, 1);
  Bytes y(static_cast<size_t>(queries * size));
  a.q = q.data(), a.y = y.data();
  a.k = {k.data(), nullptr, jaxllm::Held::kPlain, h, 0};
  a.v = {v.data(), nullptr, jaxllm::Held::kPlain, h, 0};
  a.sinks = reinterpret_cast<const float*>(sinks.data());
  a.mask = reinterpret_cast<const uint8_t*>(mask.data());
  jaxllm::attend(a, level, team);
  return y;
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.size() != 7 && words.size() != 11) return 2;
  const int level = std::stoi(words[0]);
  const bool product = words[1] == "matmul";
  words.erase(words.begin(), words.begin() + 2);
  jaxllm::Team team(xla::ffi::ThreadPool(3), 0);
  const Bytes y = product ? matmul(words, level, team) : attend(words, level, team);
  return std::fwrite(y.data(), 1, y.size(), stdout) == y.size() ? 0 : 2;
}
