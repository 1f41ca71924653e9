// One or two rows of x: lanes run along the columns of w, whose words are taken as they lie, and the whole sums of the
// blocks are turned round instead. Included by packed_simd.cc, in its namespace.

template <int Width, typename C>
constexpr int words_of_block() {
  return Width / C::kCodes;
}

// sums[r][i] + the products of four rows' words with the dots of x that meet them.
template <int R, typename C, int J = 0>
inline void add_lanes(const C& codes, const W (&words)[4], const int32_t* x, int64_t row, W (&sums)[R][4]) {
  if constexpr (J < C::kDots) {
    W with[R];
    for (int r = 0; r < R; ++r) with[r] = load(reinterpret_cast<const uint32_t*>(x + r * row + J * kLanes));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const W some = codes.template codes<J>(words[i]);
      for (int r = 0; r < R; ++r) sums[r][i] = C::add(sums[r][i], some, with[r]);
    }
    add_lanes<R, C, J + 1>(codes, words, x, row, sums);
  }
}

// to[r] lane 4 j + i: the sum of row i's products in lanes 4 j to 4 j + 4 of `Wide` vectors of words from w on. Of four
// rows from `first` on those that are missing are the last one again; beyond a row's end there are no words.
template <int R, int Wide, bool kWhole, typename C>
inline void add_four(const C& codes, const Lines& l, int64_t first, int64_t rows, int64_t w, const Rounded& x, W* to) {
  W sums[R][4];
#pragma GCC unroll 8
  for (int i = 0; i < 4 * R; ++i) sums[i / 4][i % 4] = set_int(0);
#pragma GCC unroll 2
  for (int v = 0; v < Wide; ++v) {
    W words[4];
    const uint8_t* at = l.at(first, w + v * kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      words[i] = codes.word(kWhole ? load(reinterpret_cast<const uint32_t*>(at + i * l.bytes))
                                   : words_at(l, least(first + i, rows - 1), w + v * kLanes));
    add_lanes<R>(codes, words, x.values + (w + v * kLanes) * C::kDots, x.row, sums);
  }
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) to[r * (kLanes / 4)] = add_fours(sums[r]);
}

// Which block comes next, and its group of columns.
struct Place {
  int64_t block, group, left, each;
  void step() {
    ++block;
    if (--left == 0) ++group, left = each;
  }
};

// The blocks of a chunk, whose sums are `fours` [R, kLanes / 4].
template <int R, int kFours>
inline void add_blocks(const Rounded& x, const Strip& s, W* fours, Place* at, V (&totals)[R][1]) {
#pragma GCC unroll 2
  for (int r = 0; r < R; ++r) turn_fours(*reinterpret_cast<W(*)[kLanes / 4]>(fours + r * (kLanes / 4)));
#pragma GCC unroll 4
  for (int b = 0; b < kLanes / 4; b += kFours) {
    if (at->block == x.blocks) return;
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r) {
      const int64_t j = r * x.blocks + at->block;
      W sums[] = {plus(set_int(x.start[j]), fours[r * (kLanes / 4) + b])};
      for (int i = 1; i < kFours; ++i) sums[0] = plus(sums[0], fours[r * (kLanes / 4) + b + i]);
      add_scaled(x, s, j, at->group, sums, totals[r]);
    }
    at->step();
  }
}

// What to fetch ahead of the codes that are read: the next strip, in the order in which it lies, into the second cache.
// The first has too few places for lines that are on their way.
class Ahead {
 public:
  // Of a strip that begins with row n and is gone through in `steps`.
  Ahead(const Lines& l, const Numbers& scale, int64_t n, int64_t steps)
      : step_(kLanes * scale.count * bytes(scale.type) / steps), at_(l.at(kLanes, 0)),
        scales_(static_cast<const uint8_t*>(scale.data) + (n + kLanes) * scale.count * bytes(scale.type)) {}

  // What goes with a step of `vectors` of words.
  void some(int vectors) {
    for (; vectors > 0; --vectors, at_ += 4 * kLanes) __builtin_prefetch(at_, 0, 2);
    __builtin_prefetch(scales_, 0, 3);
    scales_ += step_;
  }

 private:
  const int64_t step_;
  const uint8_t *at_, *scales_;
};

// totals[r] lane i: row r of x against row n + i of w. Four rows are read side by side, some chunks of each, before the
// next four: memory likes to be read in one piece, and the sums should stay in the nearest cache.
template <int R, int Width, typename C>
inline void add_few(const Packed& p, const Rounded& x, const Strip& s, int64_t n, int64_t rows, V (&totals)[R][1]) {
  constexpr int kWords = words_of_block<Width, C>(), kWide = kWords > kLanes ? kWords / kLanes : 1, kPanel = 8;
  constexpr int kFours = (kWide > 1 ? kLanes : kWords) / 4, kStep = kWide * kLanes, kSums = R * (kLanes / 4);
  const C codes(p);
  const Lines l = lines(p, n, rows, s);
  fill_numbers(p, n, rows, s);
  for (int r = 0; r < R; ++r) totals[r][0] = set(0);
  Place at{0, 0, p.group / Width, p.group / Width};
  W fours[kPanel * kSums];
  const int64_t count = words_of(p), chunks = (count + kStep - 1) / kStep;
  Ahead ahead(l, p.scale, n, chunks * (kLanes / 4));
  const int64_t whole = rows < kLanes ? 0 : least(count, l.bytes / 4) / kStep;
  for (int64_t first = 0; first < chunks; first += kPanel) {
    const int64_t last = least(first + kPanel, chunks);
    for (int g = 0; g < kLanes / 4; ++g) {
      W* to = fours + g;
      int64_t c = first;
      for (; c < least(last, whole); ++c, to += kSums) {
        ahead.some(4 * kWide);
        add_four<R, kWide, true>(codes, l, 4 * g, rows, c * kStep, x, to);
      }
      for (; c < last; ++c, to += kSums) {
        ahead.some(4 * kWide);
        add_four<R, kWide, false>(codes, l, 4 * g, rows, c * kStep, x, to);
      }
    }
    for (int64_t c = first; c < last; ++c) add_blocks<R, kFours>(x, s, fours + (c - first) * kSums, &at, totals);
  }
}
