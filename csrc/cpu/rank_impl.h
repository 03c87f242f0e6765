// SPDX-License-Identifier: Apache-2.0
// The k best of a row. A bound that k numbers of the row reach leaves little more than k candidates; where a candidate
// stands among them is counted. Nothing but the walk over the candidates depends on a branch.
namespace moe::cpu::MOE_ISA {

// Bit i says that lane i compares so.
#if MOE_VEC_BYTES == 64
inline uint32_t lanes_above(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ); }
inline uint32_t lanes_above(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(__m512d(a), __m512d(b), _CMP_GT_OQ);
}
inline uint32_t lanes_equal(Vec<float> a, Vec<float> b) { return _mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_EQ_OQ); }
inline uint32_t lanes_equal(Vec<double> a, Vec<double> b) {
  return _mm512_cmp_pd_mask(__m512d(a), __m512d(b), _CMP_EQ_OQ);
}
#elif MOE_VEC_BYTES == 32
inline uint32_t lanes_above(Vec<float> a, Vec<float> b) { return uint32_t(_mm256_movemask_ps(__m256(a > b))); }
inline uint32_t lanes_above(Vec<double> a, Vec<double> b) { return uint32_t(_mm256_movemask_pd(__m256d(a > b))); }
inline uint32_t lanes_equal(Vec<float> a, Vec<float> b) { return uint32_t(_mm256_movemask_ps(__m256(a == b))); }
inline uint32_t lanes_equal(Vec<double> a, Vec<double> b) { return uint32_t(_mm256_movemask_pd(__m256d(a == b))); }
#else
template <class V> inline uint32_t bits_of_lanes(V yes) {
  uint32_t bits = 0;
  for (int i = 0; i < int(sizeof yes / sizeof yes[0]); ++i) bits |= uint32_t(yes[i] & 1) << i;
  return bits;
}
template <class V> inline uint32_t lanes_above(V a, V b) { return bits_of_lanes(a > b); }
template <class V> inline uint32_t lanes_equal(V a, V b) { return bits_of_lanes(a == b); }
#endif

/// Writes first + i for every bit i, room for 16 numbers; returns how many.
inline int put_lanes(uint32_t lanes, int64_t first, int32_t* to) {
#if MOE_VEC_BYTES == 64
  const __m512i iota = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i at = _mm512_add_epi32(_mm512_set1_epi32(int(first)), iota);
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(__mmask16(lanes), at));
  return __builtin_popcount(lanes);
#else
  int n = 0;
  for (; lanes != 0; lanes &= lanes - 1) to[n++] = int32_t(first) + __builtin_ctz(lanes);
  return n;
#endif
}

/// Calls f(values at i, i) for whole vectors; what is left over is filled up.
template <class A, class F> inline void for_filled(const A* values, int64_t count, A fill, F f) {
  constexpr int L = VecOf<A>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) f(load(values + i), i);
  if (i == count) return;
  A rest[L];
  for (int64_t j = 0; j < L; ++j) rest[j] = i + j < count ? values[i + j] : fill;
  f(load(rest), i);
}

template <class A> using IntOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A> constexpr A kLowest = -A(__builtin_inff());
template <class A> inline A max_of(const A* row, int64_t count) {  // of numbers; -inf where there is none
  Vec<A> best = Vec<A>{} + kLowest<A>;
  for_filled<A>(row, count, kLowest<A>, [&](Vec<A> v, int64_t) { best = larger_of(v, best); });
  return lane_max<A>(best);
}

// Integers that sort as the numbers do; there is one zero.
template <class A> inline Vec<IntOf<A>> sort_key(Vec<A> v) {
  using Int = IntOf<A>;
  const Vec<Int> bits = bit_cast<Vec<Int>>(v + A(0));
  return bits ^ ((bits >> Int(sizeof(A) * 8 - 1)) & std::numeric_limits<Int>::max());
}

template <class Bits> struct One {
  Bits at[2 * VecOf<Bits>::lanes] = {};
  constexpr One() { at[VecOf<Bits>::lanes] = 1; }
};
template <class Bits> constexpr One<Bits> kOne;

/// ranks[j] = how many of n keys stand before the j-th: the larger ones, and the earlier ones of its size. What fills
/// the last vector up is smaller than all.
template <class Int> inline void rank_keys(const Int* keys, int64_t n, Int* ranks) {
  using Bits = std::make_unsigned_t<Int>;  // the smallest key has no smaller one: its place is nobody's
  constexpr int L = VecOf<Int>::lanes;
  for (int64_t j = 0; j < n; j += L) {
    Vec<Int> rank{};
    Vec<Bits> least = bit_cast<Vec<Bits>>(load(keys + j)) - 1;  // what another key must exceed to stand before the j-th
    for (int64_t i = 0; i < n; ++i) {
      if (i >= j && i < j + L) least += load(kOne<Bits>.at + L - (i - j));  // only an earlier one may equal it
      rank -= keys[i] > bit_cast<Vec<Int>>(least);
    }
    store(ranks + j, rank);
  }
}

/// Something that at least k of the numbers exceed, if as many are finite: a little below the k-th largest of the
/// maxima of 2 k or more stretches. The margin is larger than what a division can make equal.
template <class A> inline A bound_of(const TopK<A>& p, A* maxima) {
  constexpr int L = VecOf<A>::lanes;
  const int64_t whole = p.count / L, wide = (2 * p.k + L - 1) / L;
  if (2 * wide > whole) return kLowest<A>;
  for (int64_t w = 0; w < wide; ++w) {
    Vec<A> even = load(p.values + w * L), odd = even;
    int64_t i = w + wide;
    for (; i + wide < whole; i += 2 * wide) {
      even = larger_of(load(p.values + i * L), even);
      odd = larger_of(load(p.values + (i + wide) * L), odd);
    }
    if (i < whole) even = larger_of(load(p.values + i * L), even);
    store(maxima + w * L, larger_of(even, odd));
  }
  Vec<A> least = Vec<A>{} + A(__builtin_inff());
  for (int64_t w = 0; w < wide; ++w) {  // the least of those that less than k exceed
    const Vec<A> mine = load(maxima + w * L);
    Vec<IntOf<A>> above{};
    for (int64_t j = 0; j < wide * L; ++j) above -= maxima[j] > mine;
    least = above < IntOf<A>(p.k) && mine < least ? mine : least;
  }
  const A bound = std::min(-lane_max<A>(-least), std::numeric_limits<A>::max());  // +inf comes of a bias
  const A size = bound < 0 ? -bound : bound;
  return bound - (size * (8 * std::numeric_limits<A>::epsilon()) + std::numeric_limits<A>::min());
}

template <class A> int64_t top_k(const TopK<A>& p) {
  using Int = IntOf<A>;
  constexpr int L = VecOf<A>::lanes;
  constexpr int64_t kAtOnce = 64;  // numbers whose candidates are found at a time
  const int64_t capacity = top_k_candidates(p.k);
  A *found = static_cast<A*>(p.room), *sorted = found + capacity;
  Int *keys = reinterpret_cast<Int*>(sorted + capacity), *ranks = keys + capacity;
  int32_t *ids = reinterpret_cast<int32_t*>(ranks + capacity), *sorted_ids = ids + capacity;
  const Vec<A> divisor = Vec<A>{} + p.divisor;
  Vec<A> bound = Vec<A>{} + bound_of(p, sorted);
  int64_t n = 0;
  const auto sort = [&] {
    for (int64_t i = 0; i < n; ++i) found[i] = p.values[ids[i]];
    for (int64_t i = 0; i < n; i += L) {
      const Vec<A> v = load(found + i) / divisor;
      store(found + i, v), store(keys + i, sort_key<A>(v));
    }
    store(keys + n, Vec<Int>{} + std::numeric_limits<Int>::min());
    rank_keys(keys, n, ranks);
    for (int64_t i = 0; i < n; ++i) sorted[ranks[i]] = found[i], sorted_ids[ranks[i]] = ids[i];
  };
  for (int64_t first = 0; first < p.count; first += kAtOnce) {
    for_filled<A>(p.values + first, std::min(kAtOnce, p.count - first), kLowest<A>,
                  [&](Vec<A> v, int64_t i) { n += put_lanes(lanes_above(v, bound), first + i, ids + n); });
    if (n <= p.k + kAtOnce) continue;
    sort();  // what comes later must exceed the k-th best so far
    n = p.k, bound = Vec<A>{} + p.values[sorted_ids[p.k - 1]];
    std::copy_n(sorted_ids, n, ids);
  }
  sort();
  n = std::min(n, p.k);
  std::copy_n(sorted, n, p.best), std::copy_n(sorted_ids, n, p.ids);
  return n;
}

/// The sum of the `top` largest of values, the largest first.
template <class A> A sum_of_best(const A* values, int64_t count, int64_t top) {
  A sum = 0, most = max_of(values, count);
  for (int64_t left = std::min(top, count);;) {
    int64_t equal = 0;
    for_filled<A>(values, count, kLowest<A>,
                  [&](Vec<A> v, int64_t) { equal += __builtin_popcount(lanes_equal(v, Vec<A>{} + most)); });
    equal = std::min(left, equal);
    for (int64_t i = 0; i < equal; ++i) sum += most;
    if ((left -= equal) == 0) return sum;
    Vec<A> next = Vec<A>{} + kLowest<A>;
    for_filled<A>(values, count, kLowest<A>, [&](Vec<A> v, int64_t) { next = larger_of(v < most ? v : next, next); });
    most = lane_max<A>(next);
  }
}

}  // namespace moe::cpu::MOE_ISA
