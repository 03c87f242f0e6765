// SPDX-License-Identifier: Apache-2.0
// What expert choice and Sinkhorn do with vectors, on those of tile_impl.h and the row functions of math_impl.h.
namespace moe::cpu::MOE_ISA {

// ---- expert choice: tokens side by side

template <class A> void softmax_panel(A* panel, int64_t count) {
  constexpr int L = VecOf<A>::lanes;
  constexpr A infinity = __builtin_inf();
  for (A* column = panel; column < panel + kPanel; column += L) {
    Vec<A> top = Vec<A>{} - infinity;
    for (int64_t e = 0; e < count; ++e) {
      const Vec<A> v = load(column + e * kPanel);
      top = larger_of(v, top);
    }
    top = top > -infinity ? top : Vec<A>{};
    ExpSum<A> sums;
    for (int64_t e = 0; e < count; ++e) {
      const Vec<A> exp = exp_below(load(column + e * kPanel) - top);
      store(column + e * kPanel, exp);
      sums.add(exp);
    }
    const Vec<A> sum = sums.of_lanes();
    const Vec<A> divisor = sum > 0 ? sum : Vec<A>{} + 1;
    for (int64_t e = 0; e < count; ++e) store(column + e * kPanel, load(column + e * kPanel) / divisor);
  }
}

template <class A> inline int64_t count_from(const A* values, int64_t count, A least) {
  Vec<IntOf<A>> found{};
  for_filled<A>(values, count, A(-1), [&](Vec<A> v, int64_t) { found -= v >= least; });
  int64_t sum = 0;
  for (int j = 0; j < VecOf<A>::lanes; ++j) sum += found[j];
  return sum;
}

/// The best-th largest of at least `best` numbers in [0, 1], among negative ones: its bits from the highest on. With a
/// bit set, are there enough numbers left? As soon as just `best` are left, the answer is the smallest of them.
template <class A> A nth_largest(const A* values, int64_t count, int64_t best) {
  using Int = IntOf<A>;
  Int bits = 0;
  int64_t left = -1;
  for (Int bit = Int(1) << (sizeof(A) == 8 ? 61 : 29); bit != 0 && left != best; bit >>= 1) {
    const int64_t found = count_from<A>(values, count, bit_cast<A>(Int(bits | bit)));
    if (found >= best) bits |= bit, left = found;
  }
  Vec<A> smallest = Vec<A>{} + A(2);
  const A bound = bit_cast<A>(bits);
  for_filled<A>(values, count, A(-1), [&](Vec<A> v, int64_t) { smallest = v >= bound && v < smallest ? v : smallest; });
  return -lane_max<A>(-smallest);
}

/// The numbers that may be among the `best` largest: those from the best-th largest of the maxima of 2 * best or more
/// stretches on. Returns how many; 0 where they are not few.
template <class A, int64_t kRoom> int64_t thin_out(const A* values, int64_t count, int64_t best, A (&kept)[kRoom]) {
  constexpr int L = VecOf<A>::lanes;
  const int64_t whole = count / L, wide = (2 * best + L - 1) / L;
  if (wide * L > kRoom || 3 * wide > whole) return 0;
  for (int64_t w = 0; w < wide; ++w) {
    Vec<A> top = load(values + w * L);
    for (int64_t i = w + wide; i < whole; i += wide) top = larger_of(load(values + i * L), top);
    store(kept + w * L, top);
  }
  if (count_from<A>(kept, wide * L, A(0)) < best) return 0;
  const A bound = nth_largest<A>(kept, wide * L, best);
  int64_t found = 0;
  const auto take = [&](Vec<A> v, int64_t i) {
    int32_t at[16];
    const Vec<A> low = Vec<A>{} + bound;
    const int lanes = put_lanes(lanes_above(v, low) | lanes_equal(v, low), i, at);
    for (int j = 0; j < lanes && found + j < kRoom; ++j) kept[found + j] = values[at[j]];
    found += lanes;
  };
  for_filled<A>(values, count, A(-1), take);
  return found <= kRoom ? found : 0;
}

template <class A> void cut(const A* values, int64_t count, int64_t best, A* least, int64_t* last) {
  using Int = IntOf<A>;
  *least = A(-1), *last = -1;
  A kept[4096];
  int64_t some = thin_out<A>(values, count, best, kept);
  const A* of = some ? kept : values;
  if (!some) some = count;
  if (count_from<A>(of, some, A(0)) < best) return;
  *least = nth_largest<A>(of, some, best);
  const A next = bit_cast<A>(Int(bit_cast<Int>(*least) + 1));
  int64_t room = best - count_from<A>(of, some, next);
  for_filled<A>(values, count, A(-1), [&](Vec<A> v, int64_t i) {
    for (uint32_t equal = lanes_equal(v, Vec<A>{} + *least); equal != 0 && room > 0; equal &= equal - 1, --room)
      *last = i + __builtin_ctz(equal);
  });
}

template <class A> void mark(const A* values, int64_t count, A least, int64_t last, uint8_t* marks) {
  const int end = int(std::clamp<int64_t>(last + 1, 0, kPanel));
  for (int i = 0; i < int(count); ++i)
    marks[i] = uint8_t(int(values[i] > least) | (int(values[i] == least) & int(i < end)));
  for (int64_t i = count; i < kPanel; ++i) marks[i] = 0;
}

// ---- sinkhorn

/// The kRowSums sums of a row in csrc/sinkhorn.h, added up until one vector is left.
template <class A> inline Vec<A> row_sums(const A* x, const A* y, int64_t count) {
  constexpr int L = VecOf<A>::lanes, kSums = sinkhorn::kRowSums / L;
  Vec<A> sum[kSums] = {};
  int64_t i = 0;
  for (; i + sinkhorn::kRowSums <= count; i += sinkhorn::kRowSums)
    for (int j = 0; j < kSums; ++j) sum[j] += load(x + i + j * L) * load(y + i + j * L);
  for (int j = 0; i < count; i += L, ++j) {
    const int64_t lanes = count - i < L ? count - i : L;
    sum[j] += load_part(x + i, lanes) * load_part(y + i, lanes);
  }
  for (int half = kSums / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) sum[j] += sum[j + half];
  return sum[0];
}

// Eight tokens at a time: their sums across lanes share a tree, and the sums of the columns are fetched once for all.
template <class A> void balance_tile(const BalanceTile<A>& tile) {
  constexpr int kTokens = 8;
  const int64_t E = tile.E;
  for_vectors<A>(E, [&](int64_t e, int64_t lanes) { store_part(tile.sums + e, Vec<A>{}, lanes); });
  for (int64_t t = 0; t < tile.tokens; t += kTokens) {
    const int64_t end = t + kTokens < tile.tokens ? t + kTokens : tile.tokens;
    Vec<A> sums[kTokens] = {};
    A dots[kTokens];
    for (int64_t i = t; i < end; ++i) sums[i - t] = row_sums<A>(tile.cost + i * E, tile.columns, E);
    lane_sums<A>(sums, dots);
    for (int i = 0; i < kTokens; ++i) dots[i] = sinkhorn::factor_of(dots[i], tile.all);
    for (int64_t i = t; i < end; ++i) tile.rows[i] = tile.live && !tile.live[i] ? A(0) : dots[i - t];
    for_vectors<A>(E, [&](int64_t e, int64_t lanes) {
      Vec<A> sum = load_part(tile.sums + e, lanes);
      for (int64_t i = t; i < end; ++i) sum += tile.rows[i] * load_part(tile.cost + i * E + e, lanes);
      store_part(tile.sums + e, sum, lanes);
    });
  }
}

}  // namespace moe::cpu::MOE_ISA
