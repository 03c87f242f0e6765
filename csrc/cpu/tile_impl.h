// SPDX-License-Identifier: Apache-2.0
// The micro-kernels, written once on the compiler's vector types and compiled once an instruction set: the including
// file sets MOE_ISA (a namespace), MOE_VEC_BYTES and MOE_VEC_REGS after its target pragma. Two products cover every
// layout:
//   dot:   both operands run along k; lanes hold k, so nothing is packed. Few rows, row-major weights.
//   outer: lanes hold n, the left operand is broadcast. Many rows on packed panels, or weights that run along n.
// Registers: dot holds (rows x weights) sums, outer (rows x vectors) sums + its vectors of weights + 1 broadcast.
namespace moe::cpu::MOE_ISA {

template <class A> struct VecOf {
  typedef A type __attribute__((vector_size(MOE_VEC_BYTES)));
  static constexpr int lanes = MOE_VEC_BYTES / sizeof(A);
};
template <class A> using Vec = typename VecOf<A>::type;
typedef int32_t IntVec __attribute__((vector_size(MOE_VEC_BYTES)));
typedef uint32_t BitVec __attribute__((vector_size(MOE_VEC_BYTES)));
typedef uint16_t HalfVec __attribute__((vector_size(MOE_VEC_BYTES / 2)));

template <class To, class From> inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class A> inline Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A> inline void store(A* p, Vec<A> v) { std::memcpy(p, &v, sizeof v); }

/// Past the caches: a line that is not read again need not be read before it is written. p is aligned to a vector.
template <class A> inline void store_streaming(A* p, Vec<A> v) {
#if MOE_VEC_BYTES == 64
  _mm512_stream_ps((float*)p, bit_cast<__m512>(v));
#elif MOE_VEC_BYTES == 32
  _mm256_stream_ps((float*)p, bit_cast<__m256>(v));
#else
  store(p, v);
#endif
}
inline void end_streaming() {  // before another thread may look
#if MOE_VEC_BYTES > 16
  _mm_sfence();
#endif
}

inline BitVec widen_bits(HalfVec h) {
#if MOE_VEC_BYTES == 64  // GCC 12 splits the generic conversion into halves
  return BitVec(_mm512_cvtepu16_epi32(__m256i(h)));
#elif MOE_VEC_BYTES == 32
  return BitVec(_mm256_cvtepu16_epi32(__m128i(h)));
#else
  return __builtin_convertvector(h, BitVec);
#endif
}
inline Vec<float> load(const bf16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec<float>>(widen_bits(h) << 16);
}
inline void store(bf16* p, Vec<float> v) {
  const BitVec u = bit_cast<BitVec>(v), rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const HalfVec h = __builtin_convertvector(v != v ? BitVec{} + 0x7fc0 : rounded, HalfVec);
  std::memcpy(p, &h, sizeof h);
}

#if MOE_VEC_BYTES == 64
inline Vec<float> widen_f16(HalfVec h) { return Vec<float>(_mm512_cvtph_ps(__m256i(h))); }
inline void store(f16* p, Vec<float> v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(__m512(v), 0)); }
#elif MOE_VEC_BYTES == 32
inline Vec<float> widen_f16(HalfVec h) { return Vec<float>(_mm256_cvtph_ps(__m128i(h))); }
inline void store(f16* p, Vec<float> v) { _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(__m256(v), 0)); }
#else
inline Vec<float> widen_f16(HalfVec h) {
  Vec<float> v;
  for (int i = 0; i < VecOf<float>::lanes; ++i) v[i] = float(bit_cast<f16>(uint16_t(h[i])));
  return v;
}
inline void store(f16* p, Vec<float> v) {
  for (int i = 0; i < VecOf<float>::lanes; ++i) p[i] = f16(v[i]);
}
#endif
inline Vec<float> load(const f16* p) {
  HalfVec h;
  std::memcpy(&h, p, sizeof h);
  return widen_f16(h);
}

/// The element whose 16 bits each lane holds.
template <class T> inline Vec<float> from_bits(BitVec bits) {
  if constexpr (std::is_same_v<T, bf16>) return bit_cast<Vec<float>>(bits << 16);
  else return widen_f16(__builtin_convertvector(bits, HalfVec));
}

template <class A, int... I> inline Vec<A> shuffle(Vec<A> a, Vec<A> b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, I...);
#else
  using Int = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
  return __builtin_shuffle(a, b, Vec<Int>{I...});
#endif
}
template <class F, int... I> constexpr auto map_sequence(F, std::integer_sequence<int, I...>) {
  return std::integer_sequence<int, F::lane(I)...>{};
}
template <class A, class F> inline Vec<A> shuffle_by(Vec<A> a, Vec<A> b) {
  return shuffle<A>(a, b, decltype(map_sequence(F{}, std::make_integer_sequence<int, VecOf<A>::lanes>{})){});
}

// One step of a tree of sums: from two vectors whose groups of G lanes each hold one sum, a vector with groups of G/2.
template <int L, int G, int kHalf> struct GroupHalf {
  static constexpr int lane(int r) {
    return r / (L / 2) * L + r % (L / 2) / (G / 2) * G + r % (G / 2) + kHalf * (G / 2);
  }
};
template <class A, int kCount> inline Vec<A> sum_tree(
    const Vec<A>* v) {  // lane groups of L/kCount hold the sums of v[i]
  if constexpr (kCount == 1) {
    return v[0];
  } else {
    constexpr int L = VecOf<A>::lanes, G = L / (kCount / 2);
    const Vec<A> a = sum_tree<A, kCount / 2>(v), b = sum_tree<A, kCount / 2>(v + kCount / 2);
    return shuffle_by<A, GroupHalf<L, G, 0>>(a, b) + shuffle_by<A, GroupHalf<L, G, 1>>(a, b);
  }
}

// Writes the sums of the lanes of count vectors to out, eight at a time.
template <class A, int kCount> inline void lane_sums(const Vec<A> (&v)[kCount], A (&out)[kCount]) {
  constexpr int L = VecOf<A>::lanes, kStep = L < 8 ? L : 8, G = L / kStep;
#pragma GCC unroll 4
  for (int i = 0; i < kCount; i += kStep) {
    Vec<A> part[kStep];
#pragma GCC unroll 8
    for (int j = 0; j < kStep; ++j) part[j] = i + j < kCount ? v[i + j] : Vec<A>{};
    const Vec<A> sums = sum_tree<A, kStep>(part);
    for (int j = 0; j < kStep && i + j < kCount; ++j) {
      A sum = sums[j * G];
      for (int g = 1; g < G; ++g) sum += sums[j * G + g];
      out[i + j] = sum;
    }
  }
}

template <class A> inline const A* left_row(const Left<A>& left, int64_t m) {
  return left.data + (left.index ? int64_t(left.index[m]) : m) * left.stride;
}

// ---- dot: c[M][N] over rows that run along k. The rows of a tile stand apart, so that from tile to tile each goes on
// where it was: as many streams from front to back, which is how memory reads fastest (10 -> 12 GB/s at k = 768).
template <class T, int M, int N> void dot_tile(const ProductArgs<T>& p, int64_t m0, int64_t n0, int64_t apart) {
  using A = acc_t<T>;
  constexpr int L = VecOf<A>::lanes;
  // The hardware prefetcher falls behind rows of half precision: 13.4 -> 14.5 GB/s at k = 2048; not so in float.
  constexpr int64_t kPrefetch = sizeof(T) == 2 ? 512 : 0;
  const A* a[M];
  for (int m = 0; m < M; ++m) a[m] = left_row(p.left, m0 + m);
  const T* b = p.b + n0 * p.b_stride;
  const int64_t stride = apart * p.b_stride;
  Vec<A> acc[M * N] = {};
  int64_t k = 0;
  for (; k + L <= p.k; k += L) {
    Vec<A> bv[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      bv[n] = load(b + n * stride + k);
      if constexpr (kPrefetch > 0) __builtin_prefetch((const char*)(b + n * stride + k) + kPrefetch, 0, 2);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const Vec<A> av = load(a[m] + k);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) acc[m * N + n] += av * bv[n];
    }
  }
  A sums[M * N];
  lane_sums<A>(acc, sums);
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) {
      A sum = sums[m * N + n];
      for (int64_t i = k; i < p.k; ++i) sum += a[m][i] * A(b[n * stride + i]);
      A* c = p.c + (m0 + m) * p.c_stride + n0 + n * apart;
      *c = p.accumulate ? *c + sum : sum;
    }
}
template <class T, int M, int N> void dot_rows(const ProductArgs<T>& p, int64_t m0) {
  const int64_t apart = p.n / N;
  for (int64_t n = 0; n < apart; ++n) dot_tile<T, M, N>(p, m0, n, apart);
  for (int64_t n = apart * N; n < p.n; ++n) dot_tile<T, M, 1>(p, m0, n, 1);
}
template <class T> void dot(const ProductArgs<T>& p) {
  constexpr bool kMany = MOE_VEC_REGS == 32;  // the numbers of rows divide a panel
  int64_t m = 0;
  for (; m + 4 <= p.m; m += 4) dot_rows<T, 4, kMany ? 4 : 2>(p, m);
  if (p.m - m == 3) dot_rows<T, 3, kMany ? 4 : 2>(p, m);
  if (p.m - m == 2) dot_rows<T, 2, kMany ? 8 : 4>(p, m);
  if (p.m - m == 1) dot_rows<T, 1, kMany ? 8 : 4>(p, m);
}

// ---- outer: c[M][V vectors] over a panel that runs along n
/// Memory that one tile after another fetches, some bytes a step of k. More than these for each row would fill the line
/// buffers, and the tile itself would wait: two or three bytes a cycle.
struct Ahead {
  const char* at;
  int64_t step;
};
constexpr int64_t kAheadPerRow = MOE_VEC_BYTES / 12;
template <class T, int M, int V, bool kByColumn>
void outer_tile(const ProductArgs<T>& p, int64_t m0, int64_t n0, Ahead& ahead) {
  using A = acc_t<T>;
  constexpr int L = VecOf<A>::lanes, kSteps = 4;
  const A* a[M];
  for (int m = 0; m < M; ++m) a[m] = kByColumn ? p.left.data + m0 + m : left_row(p.left, m0 + m);
  const auto column = [&](int64_t n) { return p.b + n / kPanel * p.b_half + n % kPanel; };
  const T *low = column(n0), *high = column(n0 + V / 2 * L);
  const int64_t step = std::min<int64_t>(ahead.step, kAheadPerRow * M);
  Vec<A> acc[M][V] = {};
  const auto multiply = [&](int64_t k, const T* l, const T* h) __attribute__((always_inline)) {
    Vec<A> b[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) b[v] = load(v < V / 2 ? l + v * L : h + (v - V / 2) * L);
    const int64_t at = kByColumn ? k * p.left.stride : k;
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m) {
      const A av = kByColumn ? a[0][at + m] : a[m][at];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[m][v] += av * b[v];
    }
  };
  int64_t k = 0;
  const char* fetch = ahead.at;
  // Every instruction that is no multiply-add counts where a core is shared: a panel's stride is a constant.
  const auto loop = [&](int64_t stride) __attribute__((always_inline)) {
    for (; k + kSteps <= p.k; k += kSteps, low += kSteps * stride, high += kSteps * stride, fetch += kSteps * step) {
#pragma GCC unroll 4
      for (int i = 0; i < kSteps; ++i) {
        if (i % 2 == 0) __builtin_prefetch(fetch + i * step, 0, 2);
        multiply(k + i, low + i * stride, high + i * stride);
      }
    }
    for (; k < p.k; ++k, low += stride, high += stride) multiply(k, low, high);
  };
  p.b_stride == kPanel ? loop(kPanel) : loop(p.b_stride);
  ahead.at += p.k * step;
  A* const c = p.c + m0 * p.c_stride + n0;
  const auto finish = [&](auto&& put) __attribute__((always_inline)) {
#pragma GCC unroll 12
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) put(c + m * p.c_stride + v * L, acc[m][v]);
  };
  if (p.stream) finish([](A* to, Vec<A> sum) { store_streaming(to, sum); });
  else if (p.accumulate) finish([](A* to, Vec<A> sum) { store(to, load(to) + sum); });
  else finish([](A* to, Vec<A> sum) { store(to, sum); });
}
template <class T, int M, int V>
void outer_rows(const ProductArgs<T>& p, int64_t rows, int64_t m0, Ahead& ahead) {
  if constexpr (M > 0) {
    if (rows != M) return outer_rows<T, M - 1, V>(p, rows, m0, ahead);
    for (int64_t n = 0; n < p.n; n += V * VecOf<acc_t<T>>::lanes)
      p.left.by_column ? outer_tile<T, M, V, true>(p, m0, n, ahead) : outer_tile<T, M, V, false>(p, m0, n, ahead);
  }
}
template <class T, int M, int V> void outer_by(const ProductArgs<T>& p) {
  const int64_t blocks = (p.m + M - 1) / M;  // balanced: 16 rows are 8 + 8, not 12 + 4
  const int64_t steps = blocks * (p.n / (V * VecOf<acc_t<T>>::lanes)) * p.k;
  Ahead ahead{reinterpret_cast<const char*>(p.b), 0};
  if (p.ahead && steps) ahead = {p.ahead, (p.ahead_bytes + steps - 1) / steps};
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t m0 = p.m * i / blocks;
    outer_rows<T, M, V>(p, p.m * (i + 1) / blocks - m0, m0, ahead);
  }
}
template <class T> void outer(const ProductArgs<T>& p) {
  constexpr bool kMany = MOE_VEC_REGS == 32;
  // Four vectors take 10 loads for 24 multiply-adds, two take 14: it shows where two threads share a core.
  if (p.stream) {
    const bool aligned = (uintptr_t(p.c) | p.c_stride * sizeof(*p.c)) % MOE_VEC_BYTES == 0;
    ProductArgs<T> plain = p;
    plain.stream = false;
    if (p.accumulate || !aligned) return outer<T>(plain);
  }
  if constexpr (kMany) {
    if (p.n % (4 * VecOf<acc_t<T>>::lanes) == 0) outer_by<T, 6, 4>(p);
    else outer_by<T, 12, 2>(p);
  } else {
    outer_by<T, 6, 2>(p);
  }
  if (p.stream) end_streaming();
}

// ---- transpose: a piece of each of a few rows to a vector; then pieces are transposed among as many vectors as they
// have elements
constexpr int kPiece = MOE_VEC_BYTES == 64 ? 32 : 16;                          // bytes
template <class A> inline Vec<A> load_pieces(const char* p, int64_t stride) {  // from rows `stride` bytes apart
#if MOE_VEC_BYTES == 64
  const __m512d v = _mm512_castpd256_pd512(_mm256_loadu_pd((const double*)p));
  return bit_cast<Vec<A>>(_mm512_insertf64x4(v, _mm256_loadu_pd((const double*)(p + stride)), 1));
#elif MOE_VEC_BYTES == 32
  const __m256 v = _mm256_castps128_ps256(_mm_loadu_ps((const float*)p));
  return bit_cast<Vec<A>>(_mm256_insertf128_ps(v, _mm_loadu_ps((const float*)(p + stride)), 1));
#else
  (void)stride;
  return load(reinterpret_cast<const A*>(p));
#endif
}
template <int L, int Q, int kUpper> struct InterleaveLanes {
  static constexpr int lane(int r) { return r / Q * Q + kUpper * (Q / 2) + r % Q / 2 + r % 2 * L; }
};
// Stores what the lanes of v hold: one row of the panel, or two where a lane holds a pair of half-width elements.
template <class T> inline void store_rows(acc_t<T>* panel, Vec<acc_t<T>> v) {
  if constexpr (sizeof(T) == sizeof(acc_t<T>)) {
    store(panel, v);
  } else {
    const BitVec bits = bit_cast<BitVec>(v);
    store(panel, from_bits<T>(bits & 0xffff)), store(panel + kPanel, from_bits<T>(bits >> 16));
  }
}
template <class T> void transpose(const T* b, int64_t b_stride, int64_t n, int64_t k, acc_t<T>* panel) {
  using A = acc_t<T>;
  constexpr int L = VecOf<A>::lanes, Q = kPiece / sizeof(A), kEach = sizeof(A) / sizeof(T);
  for (int64_t n0 = 0; n0 < kPanel; n0 += L) {
    int64_t k0 = 0;
    for (; n0 + L <= n && k0 + Q * kEach <= k; k0 += Q * kEach) {
      Vec<A> v[Q], w[Q];
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i)
        v[i] = load_pieces<A>((const char*)(b + (n0 + i) * b_stride + k0), Q * b_stride * int64_t(sizeof(T)));
#pragma GCC unroll 3
      for (int round = 1; round < Q; round *= 2) {
#pragma GCC unroll 4
        for (int i = 0; i < Q / 2; ++i) {
          w[2 * i] = shuffle_by<A, InterleaveLanes<L, Q, 0>>(v[i], v[i + Q / 2]);
          w[2 * i + 1] = shuffle_by<A, InterleaveLanes<L, Q, 1>>(v[i], v[i + Q / 2]);
        }
#pragma GCC unroll 8
        for (int i = 0; i < Q; ++i) v[i] = w[i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < Q; ++i) store_rows<T>(panel + (k0 + i * kEach) * kPanel + n0, v[i]);
    }
    for (; k0 < k; ++k0)
      for (int64_t i = n0; i < n0 + L; ++i) panel[k0 * kPanel + i] = i < n ? A(b[i * b_stride + k0]) : A(0);
  }
}

// ---- gather: short pieces of rows that are far apart are beyond the hardware prefetcher
template <class T>
void gather(const T* b, int64_t b_stride, const int32_t* index, int64_t n, int64_t k, acc_t<T>* panel, int64_t width) {
  using A = acc_t<T>;
  constexpr int L = VecOf<A>::lanes;
  constexpr int64_t kRowsAhead = 16, kLine = 64 / sizeof(T);
  const auto row = [&](int64_t i) { return b + (index ? int64_t(index[i]) : i) * b_stride; };
  for (int64_t i = 0; i < k; ++i) {
    const T *from = row(i), *ahead = row(i + kRowsAhead < k ? i + kRowsAhead : k - 1);
    A* to = panel + i * width;
    for (int64_t j = 0; j < n; j += kLine) __builtin_prefetch(ahead + j);
    int64_t j = 0;
    for (; j + L <= n; j += L) store(to + j, load(from + j));
    for (; j < width; ++j) to[j] = j < n ? A(from[j]) : A(0);
  }
}

template <class T> void widen(const T* from, acc_t<T>* to, int64_t count) {
  constexpr int L = VecOf<acc_t<T>>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = acc_t<T>(from[i]);
}
template <class T> void narrow_row(const acc_t<T>* from, T* to, int64_t count) {
  constexpr int L = VecOf<acc_t<T>>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) store(to + i, load(from + i));
  for (; i < count; ++i) to[i] = T(from[i]);
}

template <class T>
void narrow(const acc_t<T>* from, int64_t from_stride, T* to, int64_t to_stride, int64_t rows, int64_t n) {
  for (int64_t r = 0; r < rows; ++r) narrow_row(from + r * from_stride, to + r * to_stride, n);
}

}  // namespace moe::cpu::MOE_ISA
