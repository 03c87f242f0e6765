// SPDX-License-Identifier: Apache-2.0
// Row functions on the vectors of tile_impl.h: activations with their derivatives, exponentials, sums.
#include "../activation.h"

namespace moe::cpu::MOE_ISA {

// exp in float: 2^n * p(r), |r| <= ln2/2, Taylor to r^7 (remainder 5e-9 relative, below half an ulp); 0 below -87.3.
inline Vec<float> exp_series(Vec<float> r) {
  Vec<float> p = Vec<float>{} + 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  return p * r + 1.f;
}
inline Vec<float> exp_of(Vec<float> x) {
  const Vec<float> high = Vec<float>{} + 88.72283f, low = Vec<float>{} - 87.33654f;
  const Vec<float> bounded = x > high ? high : x;
  const Vec<float> shifted = bounded * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low bits hold the rounded quotient
  const Vec<float> n = shifted - 12582912.f;
  const Vec<float> p = exp_series(bounded - n * 0.693359375f - n * -2.12194440e-4f);  // ln 2 in two parts
  // 2^n in two factors, so that n = 128 does not overflow the exponent field.
  const IntVec e = bit_cast<IntVec>(shifted) - 0x4b400000, half = e >> 1;
  const Vec<float> s0 = bit_cast<Vec<float>>((half + 127) << 23), s1 = bit_cast<Vec<float>>((e - half + 127) << 23);
  const Vec<float> y = p * s0 * s1, infinite = Vec<float>{} + __builtin_inff();
  return x < low ? Vec<float>{} : x > high ? infinite : y;
}
/// The same of x <= 0 in fewer steps: where the result is not 0, its exponent is in range, and is added to that of p.
inline Vec<float> exp_below(Vec<float> x) {
  const Vec<float> shifted = x * 1.44269504f + 12582912.f, n = shifted - 12582912.f;
  const Vec<float> r = x - n * 0.693359375f - n * -2.12194440e-4f, p = exp_series(r);
  const Vec<float> y = bit_cast<Vec<float>>(bit_cast<IntVec>(p) + (bit_cast<IntVec>(shifted) << 23));
  return x < -87.33654f ? Vec<float>{} : y;
}
template <class A, class F> inline Vec<A> by_lane(Vec<A> x, F f) {
  for (int i = 0; i < VecOf<A>::lanes; ++i) x[i] = f(x[i]);
  return x;
}
inline Vec<double> exp_of(Vec<double> x) {
  return by_lane<double>(x, [](double v) { return std::exp(v); });
}
inline Vec<double> exp_below(Vec<double> x) { return exp_of(x); }
template <class A> inline Vec<A> sigmoid_of(Vec<A> x) { return 1 / (1 + exp_of(-x)); }
template <class A> inline Vec<A> erf_of(Vec<A> x) {
  return by_lane<A>(x, [](A v) { return std::erf(v); });
}

/// What activation.h computes with.
template <class Element> struct Vectors {
  using A = Element;
  using V = Vec<A>;
  static V exp(V x) { return exp_of(x); }
  static V sigmoid(V x) { return sigmoid_of<A>(x); }
  static V erf(V x) { return erf_of<A>(x); }
};

// Calls f(i, lanes) for whole vectors, then once for the rest through a padded copy made by `part`.
template <class A> inline Vec<A> load_part(const A* p, int64_t lanes) {
  if (lanes == VecOf<A>::lanes) return load(p);
  Vec<A> v{};
  std::memcpy(&v, p, lanes * sizeof(A));
  return v;
}
template <class A> inline void store_part(A* p, Vec<A> v, int64_t lanes) {
  if (lanes == VecOf<A>::lanes) return store(p, v);
  std::memcpy(p, &v, lanes * sizeof(A));
}
template <class A, class F> inline void for_vectors(int64_t count, F f) {
  constexpr int L = VecOf<A>::lanes;
  int64_t i = 0;
  for (; i + L <= count; i += L) f(i, int64_t(L));
  if (i < count) f(i, count - i);
}

template <class A>
void activate(const ActivationRule& rule, const A* gate, const A* up, A* out, int64_t count) {
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    Vec<A> u{};
    if (up) u = load_part(up + i, lanes);
    store_part(out + i,
               gate_of<Vectors<A>, false>(rule, load_part(gate + i, lanes), u, up != nullptr, u, nullptr, nullptr),
               lanes);
  });
}
template <class A>
void activate_backward(const ActivationRule& rule, A scale, const A* gate, const A* up, const A* grad_out, A* grad_gate,
                       A* grad_up, A* act, int64_t count) {
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    Vec<A> u{}, dg{}, du{};
    if (up) u = load_part(up + i, lanes);
    const Vec<A> grad = scale * load_part(grad_out + i, lanes);
    store_part(act + i, gate_of<Vectors<A>, true>(rule, load_part(gate + i, lanes), u, up != nullptr, grad, &dg, &du),
               lanes);
    store_part(grad_gate + i, dg, lanes);
    if (up) store_part(grad_up + i, du, lanes);
  });
}

template <int L, int kBy> struct Rotate {
  static constexpr int lane(int r) { return (r + kBy) % L; }
};
// a > b ? a : b and a < b ? a : b, each one instruction; a NaN makes it b.
#if MOE_VEC_BYTES == 64
inline Vec<float> larger_of(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_max_ps(__m512(a), __m512(b))); }
inline Vec<double> larger_of(Vec<double> a, Vec<double> b) {
  return Vec<double>(_mm512_max_pd(__m512d(a), __m512d(b)));
}
inline Vec<float> smaller_of(Vec<float> a, Vec<float> b) { return Vec<float>(_mm512_min_ps(__m512(a), __m512(b))); }
inline Vec<double> smaller_of(Vec<double> a, Vec<double> b) {
  return Vec<double>(_mm512_min_pd(__m512d(a), __m512d(b)));
}
#elif MOE_VEC_BYTES == 32
inline Vec<float> larger_of(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_max_ps(__m256(a), __m256(b))); }
inline Vec<double> larger_of(Vec<double> a, Vec<double> b) {
  return Vec<double>(_mm256_max_pd(__m256d(a), __m256d(b)));
}
inline Vec<float> smaller_of(Vec<float> a, Vec<float> b) { return Vec<float>(_mm256_min_ps(__m256(a), __m256(b))); }
inline Vec<double> smaller_of(Vec<double> a, Vec<double> b) {
  return Vec<double>(_mm256_min_pd(__m256d(a), __m256d(b)));
}
#else
template <class V> inline V larger_of(V a, V b) { return a > b ? a : b; }
template <class V> inline V smaller_of(V a, V b) { return a < b ? a : b; }
#endif
template <class A, int kBy = VecOf<A>::lanes / 2> inline A lane_max(Vec<A> v) {
  if constexpr (kBy == 0) return v[0];
  else return lane_max<A, kBy / 2>(larger_of(v, shuffle_by<A, Rotate<VecOf<A>::lanes, kBy>>(v, v)));
}
template <class A, int kBy = VecOf<A>::lanes / 2> inline A lane_sum(Vec<A> v) {  // by halves
  if constexpr (kBy == 0) return v[0];
  else return lane_sum<A, kBy / 2>(v + shuffle_by<A, Rotate<VecOf<A>::lanes, kBy>>(v, v));
}
// In float32 the sum is one of whole multiples of 2^-40 (score.h), so that any order of the terms gives the same bits.
// Each term is split in two of 20 bits, of which a lane takes 2^10 in 32 bits.
template <class A> struct ExpSum {
  Vec<A> sum{};
  void add(Vec<A> e) { sum += e; }
  A total() { return lane_sum<A>(sum); }
  Vec<A> of_lanes() { return sum; }
};
template <> struct ExpSum<float> {
  static constexpr int L = VecOf<float>::lanes;
  IntVec high{}, low{};
  int64_t sums[L] = {};
  int added = 0;
  void add(Vec<float> e) {
    const Vec<float> scaled = e * 0x1p20f;
    const IntVec whole = __builtin_convertvector(scaled, IntVec);
    const Vec<float> rest = scaled - __builtin_convertvector(whole, Vec<float>);
    high += whole, low += __builtin_convertvector(rest * 0x1p20f, IntVec);
    if (++added == 1 << 10) flush();
  }
  void flush() {
    for (int i = 0; i < L; ++i) sums[i] += (int64_t(high[i]) << 20) + low[i];
    high = low = IntVec{}, added = 0;
  }
  float total() {
    flush();
    int64_t sum = 0;
    for (int i = 0; i < L; ++i) sum += sums[i];
    return exact_sum(sum);
  }
  Vec<float> of_lanes() {
    flush();
    Vec<float> v;
    for (int i = 0; i < L; ++i) v[i] = exact_sum(sums[i]);
    return v;
  }
};
template <class A> void exp(A* row, A shift, int64_t count) {
  for_vectors<A>(
      count, [&](int64_t i, int64_t lanes) { store_part(row + i, exp_of(load_part(row + i, lanes) - shift), lanes); });
}
template <class A> A exp_sum(const A* row, A shift, A* exps, int64_t count) {
  ExpSum<A> sum;
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    store_part(exps + i, exp_below(load_part(row + i, lanes) - shift), lanes);
    sum.add(load_part(exps + i, lanes));
  });
  return sum.total();
}
template <class A> void sigmoid(const A* row, A* out, int64_t count) {
  for_vectors<A>(
      count, [&](int64_t i, int64_t lanes) { store_part(out + i, sigmoid_of<A>(load_part(row + i, lanes)), lanes); });
}
template <class A> inline Vec<A> clean(Vec<A> v) {  // in this order a NaN fails the first comparison
  const Vec<A> low = Vec<A>{} - A(__builtin_inff()), high = Vec<A>{} + A(__FLT_MAX__);
  return smaller_of(larger_of(v, low), high);
}
template <class A> void clean_row(A* row, int64_t count) {
  for_vectors<A>(count,
                 [&](int64_t i, int64_t lanes) { store_part(row + i, clean<A>(load_part(row + i, lanes)), lanes); });
}
template <class T> acc_t<T> read_clean(const T* from, acc_t<T>* to, int64_t count) {
  using A = acc_t<T>;
  constexpr int L = VecOf<A>::lanes;
  Vec<A> best = Vec<A>{} - A(__builtin_inff());
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    const Vec<A> v = clean<A>(load(from + i));
    store(to + i, v);
    best = larger_of(v, best);
  }
  if (i < count) {
    A rest[L];
    for (int64_t j = 0; j < L; ++j) rest[j] = i + j < count ? A(from[i + j]) : -A(__builtin_inff());
    const Vec<A> v = clean<A>(load(rest));
    store_part(to + i, v, count - i);
    best = larger_of(v, best);
  }
  return lane_max<A>(best);
}
template <class A> void divide(A* row, A by, int64_t count) {
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) { store_part(row + i, load_part(row + i, lanes) / by, lanes); });
}
template <class A> void choose(const A* score, const A* bias, const A* logit, A* choice, int64_t count) {
  const Vec<A> low = Vec<A>{} - A(__builtin_inff());
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    Vec<A> v = load_part(score + i, lanes);
    if (bias) v += load_part(bias + i, lanes);
    v = v != v ? low : v;
    store_part(choice + i, load_part(logit + i, lanes) == low ? low : v, lanes);
  });
}
template <class A> A dot_of(const A* x, const A* y, int64_t count) {
  Vec<A> sum{};
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) { sum += load_part(x + i, lanes) * load_part(y + i, lanes); });
  return lane_sum<A>(sum);
}
template <class A> void softmax_backward(const A* exps, A unit, const A* grad, A shift, A* d, int64_t count) {
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    Vec<A> pull = Vec<A>{} + shift;
    if (grad) pull += load_part(grad + i, lanes);
    store_part(d + i, load_part(exps + i, lanes) * unit * pull, lanes);
  });
}
template <class A> void axpy(A scale, const A* x, A* y, int64_t count) {
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    store_part(y + i, load_part(y + i, lanes) + scale * load_part(x + i, lanes), lanes);
  });
}

}  // namespace moe::cpu::MOE_ISA
