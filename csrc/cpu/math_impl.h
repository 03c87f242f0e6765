// SPDX-License-Identifier: Apache-2.0
// Row functions on the vectors of tile_impl.h: activations with their derivatives, exponentials, sums.
#include "../activation.h"

namespace moe::cpu::MOE_ISA {

// exp in float: 2^n * p(r), |r| <= ln2/2, Taylor to r^7 (remainder 5e-9 relative, below half an ulp); 0 below -87.3.
inline Vec<float> exp_of(Vec<float> x) {
  const Vec<float> high = Vec<float>{} + 88.72283f, low = Vec<float>{} - 87.33654f;
  const Vec<float> bounded = x > high ? high : x;
  const Vec<float> shifted = bounded * 1.44269504f + 12582912.f;  // 1.5 * 2^23: the low bits hold the rounded quotient
  const Vec<float> n = shifted - 12582912.f;
  const Vec<float> r = bounded - n * 0.693359375f - n * -2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = Vec<float>{} + 1.f / 5040;
  p = p * r + 1.f / 720;
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + .5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  // 2^n in two factors, so that n = 128 does not overflow the exponent field.
  const IntVec e = bit_cast<IntVec>(shifted) - 0x4b400000, half = e >> 1;
  const Vec<float> s0 = bit_cast<Vec<float>>((half + 127) << 23), s1 = bit_cast<Vec<float>>((e - half + 127) << 23);
  const Vec<float> y = p * s0 * s1, infinite = Vec<float>{} + __builtin_inff();
  return x < low ? Vec<float>{} : x > high ? infinite : y;
}
template <class A, class F> inline Vec<A> by_lane(Vec<A> x, F f) {
  for (int i = 0; i < VecOf<A>::lanes; ++i) x[i] = f(x[i]);
  return x;
}
inline Vec<double> exp_of(Vec<double> x) {
  return by_lane<double>(x, [](double v) { return std::exp(v); });
}
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
template <class A, int kBy = VecOf<A>::lanes / 2> inline A lane_sum(Vec<A> v) {  // by halves
  if constexpr (kBy == 0) return v[0];
  else return lane_sum<A, kBy / 2>(v + shuffle_by<A, Rotate<VecOf<A>::lanes, kBy>>(v, v));
}
// In float32 the sum is one of whole multiples of 2^-40 (score.h), so that any order of the terms gives the same bits.
inline float sum_of_exps(const float* row, int64_t count) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += exact_part(row[i]);
  return exact_sum(sum);
}
inline double sum_of_exps(const double* row, int64_t count) {
  Vec<double> sum{};
  for_vectors<double>(count, [&](int64_t i, int64_t lanes) { sum += load_part(row + i, lanes); });
  return lane_sum<double>(sum);
}
template <class A> void exp(A* row, A shift, int64_t count) {
  for_vectors<A>(
      count, [&](int64_t i, int64_t lanes) { store_part(row + i, exp_of(load_part(row + i, lanes) - shift), lanes); });
}
template <class A> A exp_sum(A* row, A shift, int64_t count) {
  exp(row, shift, count);
  return sum_of_exps(row, count);
}
template <class A> void sigmoid(A* row, int64_t count) {
  for_vectors<A>(
      count, [&](int64_t i, int64_t lanes) { store_part(row + i, sigmoid_of<A>(load_part(row + i, lanes)), lanes); });
}
template <class A> A max_of(const A* row, int64_t count) {  // of numbers; -inf where there is none
  Vec<A> best = Vec<A>{} - A(__builtin_inff());
  A rest = best[0];
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    if (lanes < VecOf<A>::lanes) {
      for (int64_t j = 0; j < lanes; ++j) rest = row[i + j] > rest ? row[i + j] : rest;
    } else {
      const Vec<A> v = load(row + i);
      best = v > best ? v : best;
    }
  });
  for (int j = 0; j < VecOf<A>::lanes; ++j) rest = best[j] > rest ? best[j] : rest;
  return rest;
}
template <class A> void clean(A* row, int64_t count) {
  const Vec<A> low = Vec<A>{} - A(__builtin_inff()), high = Vec<A>{} + A(__FLT_MAX__);
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    const Vec<A> v = load_part(row + i, lanes);
    store_part(row + i, v != v ? low : v > high ? high : v, lanes);
  });
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
// Integers that sort as the numbers do: their maximum takes one cycle, a comparison and a choice of floats five.
template <class A> using IntOf = std::conditional_t<sizeof(A) == 8, int64_t, int32_t>;
template <class A> inline Vec<IntOf<A>> sort_key(Vec<A> v) {
  using Int = IntOf<A>;
  const Vec<Int> bits = bit_cast<Vec<Int>>(v + A(0));  // one zero
  return bits ^ ((bits >> Int(sizeof(A) * 8 - 1)) & std::numeric_limits<Int>::max());
}
template <class Int, bool kMax, int kBy = VecOf<Int>::lanes / 2> inline Int lane_best(Vec<Int> v) {
  if constexpr (kBy == 0) {
    return v[0];
  } else {
    const Vec<Int> w = shuffle_by<Int, Rotate<VecOf<Int>::lanes, kBy>>(v, v);
    return lane_best<Int, kMax, kBy / 2>((kMax ? w > v : w < v) ? w : v);
  }
}
template <class A> int64_t top_k(A* values, int64_t count, int64_t k, int32_t* best) {
  using Int = IntOf<A>;
  constexpr int L = VecOf<A>::lanes;
  constexpr Int kNone = std::numeric_limits<Int>::max();
  const Int low = sort_key<A>(Vec<A>{} - A(__builtin_inff()))[0];
  const int64_t end = (count + L - 1) / L * L;
  Int* keys = reinterpret_cast<Int*>(values);
  const auto key_at = [&](int64_t i) {
    Vec<Int> v;
    std::memcpy(&v, keys + i, sizeof v);
    return v;
  };
  for (int64_t i = count; i < end; ++i) values[i] = -A(__builtin_inff());
  for (int64_t i = 0; i < end; i += L) store(values + i, bit_cast<Vec<A>>(sort_key<A>(load(values + i))));
  Vec<Int> lanes;
  for (int j = 0; j < L; ++j) lanes[j] = j;
  for (int64_t i = 0; i < k; ++i) {
    Vec<Int> top = key_at(0), at = Vec<Int>{} + kNone;
    for (int64_t j = L; j < end; j += L) top = key_at(j) > top ? key_at(j) : top;
    const Int highest = lane_best<Int, true>(top);
    if (highest == low) return i;
    for (int64_t j = 0; j < end; j += L) {
      const Vec<Int> found = key_at(j) == highest ? lanes + Int(j) : Vec<Int>{} + kNone;
      at = found < at ? found : at;
    }
    best[i] = int32_t(lane_best<Int, false>(at));
    std::memcpy(keys + best[i], &low, sizeof low);
  }
  return k;
}
template <class A> A dot_of(const A* x, const A* y, int64_t count) {
  Vec<A> sum{};
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) { sum += load_part(x + i, lanes) * load_part(y + i, lanes); });
  return lane_sum<A>(sum);
}
template <class A> void axpy(A scale, const A* x, A* y, int64_t count) {
  for_vectors<A>(count, [&](int64_t i, int64_t lanes) {
    store_part(y + i, load_part(y + i, lanes) + scale * load_part(x + i, lanes), lanes);
  });
}

}  // namespace moe::cpu::MOE_ISA
