// SPDX-License-Identifier: Apache-2.0
// What happens to the sums of a grouped product; grouped_gemm.h says what. A thread brings V neighbouring columns, or
// hidden units, of one row. Kernels differ in how they get the sums, not in what follows.
#pragma once
#include "activation.cuh"
#include "element.cuh"
#include "grouped_gemm.h"

namespace moe::cuda {

template <int kBytes> struct WordOf { using type = uint32_t; };
template <> struct WordOf<8> { using type = uint2; };
template <> struct WordOf<16> { using type = uint4; };

MOE_DEVICE void words_of(uint32_t v, uint32_t (&w)[1]) { w[0] = v; }
MOE_DEVICE void words_of(uint2 v, uint32_t (&w)[2]) { w[0] = v.x, w[1] = v.y; }
MOE_DEVICE void words_of(uint4 v, uint32_t (&w)[4]) { w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w; }
MOE_DEVICE uint32_t word_from(const uint32_t (&w)[1]) { return w[0]; }
MOE_DEVICE uint2 word_from(const uint32_t (&w)[2]) { return make_uint2(w[0], w[1]); }
MOE_DEVICE uint4 word_from(const uint32_t (&w)[4]) { return make_uint4(w[0], w[1], w[2], w[3]); }

/// Whether V elements at p move in requests of their own size; double goes one by one.
template <class T, int V> constexpr bool kWide = sizeof(T) <= 4 && V > 1;
template <class T, int V> constexpr int kRequest = V * int(sizeof(T)) < 16 ? V * int(sizeof(T)) : 16;
template <class T, int V> MOE_DEVICE bool aligned_for(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % kRequest<T, V> == 0;
}

/// V neighbouring elements at p, of which `left` are there; the rest is 0.
template <class T, int V> MOE_DEVICE void load_columns(const T* p, int64_t left, acc_t<T> (&v)[V]) {
  if constexpr (kWide<T, V>) {
    if (left >= V && aligned_for<T, V>(p)) {
      constexpr int in_request = kRequest<T, V> / int(sizeof(T));
#pragma unroll
      for (int first = 0; first < V; first += in_request) {
        uint32_t word[kRequest<T, V> / 4];
        words_of(__ldg(reinterpret_cast<const typename WordOf<kRequest<T, V>>::type*>(p + first)), word);
#pragma unroll
        for (int i = 0; i < in_request; ++i) {
          if constexpr (sizeof(T) == 2) {
            T half;
            half.bits = uint16_t(word[i / 2] >> (i % 2 * 16));
            v[first + i] = widen(half);
          } else {
            v[first + i] = __uint_as_float(word[i]);
          }
        }
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) v[i] = i < left ? widen(p[i]) : acc_t<T>(0);
}

/// Writes the first `left` of V elements to p.
template <class T, int V> MOE_DEVICE void store_columns(T* p, int64_t left, const acc_t<T> (&v)[V]) {
  if constexpr (kWide<T, V>) {
    if (left >= V && aligned_for<T, V>(p)) {
      constexpr int in_request = kRequest<T, V> / int(sizeof(T));
#pragma unroll
      for (int first = 0; first < V; first += in_request) {
        uint32_t word[kRequest<T, V> / 4];
#pragma unroll
        for (int i = 0; i < kRequest<T, V> / 4; ++i) {
          if constexpr (sizeof(T) == 4) {
            word[i] = __float_as_uint(v[first + i]);
          } else {
            const float low = v[first + 2 * i], high = v[first + 2 * i + 1];
            word[i] = T::kBrain ? cvt_rn_bf16x2_f32(high, low) : cvt_rn_f16x2_f32(high, low);
          }
        }
        __stcg(reinterpret_cast<typename WordOf<kRequest<T, V>>::type*>(p + first), word_from(word));
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i)
    if (i < left) p[i] = narrow<T>(v[i]);
}

/// What a row of D brings to its epilogue.
template <class A> struct EpilogueRow {
  int64_t r, slot;  // slot -1: padding
  int32_t expert;
  A weight;
};
template <class A> MOE_DEVICE EpilogueRow<A> epilogue_row(const RowsEpilogue& p, int64_t r, int32_t expert) {
  const int64_t slot = p.row_to_slot ? p.row_to_slot[r] : r;
  const A weight = slot < 0 ? A(0) : p.topk_weights ? static_cast<const A*>(p.topk_weights)[slot] : A(1);
  return {r, slot, expert, weight};
}

/// Columns [n, n + V) of plain, of which `left` are there.
template <class T, int V> MOE_DEVICE void finish_plain(const RowsEpilogue& p, const EpilogueRow<acc_t<T>>& row,
                                                       int64_t N, int64_t n, acc_t<T> (&sum)[V]) {
  using A = acc_t<T>;
  A bias[V] = {};
  if (p.bias) load_columns<T, V>(static_cast<const T*>(p.bias) + row.expert * N + n, N - n, bias);
#pragma unroll
  for (int i = 0; i < V; ++i) sum[i] = row.weight * (sum[i] + bias[i]);
  const int64_t at = row.r * p.out_stride + n;
  if constexpr (sizeof(T) == 8) {
    store_columns<T, V>(static_cast<T*>(p.out) + at, N - n, sum);
  } else {
    switch (p.out_dtype) {
      case DType::f32: store_columns<float, V>(static_cast<float*>(p.out) + at, N - n, sum); break;
      case DType::bf16: store_columns<bf16, V>(static_cast<bf16*>(p.out) + at, N - n, sum); break;
      case DType::f16: store_columns<f16, V>(static_cast<f16*>(p.out) + at, N - n, sum); break;
      case DType::f64: break;
    }
  }
}

/// Gate and up of units [i, i + V) in a row of 2I | I elements: as blocks, or gate, up, gate, up ..
template <class T, int V> MOE_DEVICE void load_units(const T* row, int64_t I, int64_t i, bool gated, bool interleaved,
                                                     acc_t<T> (&gate)[V], acc_t<T> (&up)[V]) {
  if (interleaved) {
    acc_t<T> pairs[2 * V];
    load_columns<T, 2 * V>(row + 2 * i, 2 * (I - i), pairs);
#pragma unroll
    for (int j = 0; j < V; ++j) gate[j] = pairs[2 * j], up[j] = pairs[2 * j + 1];
    return;
  }
  load_columns<T, V>(row + i, I - i, gate);
  if (gated) load_columns<T, V>(row + I + i, I - i, up);
}
template <class T, int V> MOE_DEVICE void store_units(T* row, int64_t I, int64_t i, bool gated, bool interleaved,
                                                      const acc_t<T> (&gate)[V], const acc_t<T> (&up)[V]) {
  if (interleaved) {
    acc_t<T> pairs[2 * V];
#pragma unroll
    for (int j = 0; j < V; ++j) pairs[2 * j] = gate[j], pairs[2 * j + 1] = up[j];
    store_columns<T, 2 * V>(row + 2 * i, 2 * (I - i), pairs);
    return;
  }
  store_columns<T, V>(row + i, I - i, gate);
  if (gated) store_columns<T, V>(row + I + i, I - i, up);
}

MOE_DEVICE ActivationRule rule_of(const RowsEpilogue& p) { return {p.activation, p.limit, p.alpha}; }

/// h = s * sum + bias, in place, of units [i, i + V).
template <class T, int V> MOE_DEVICE void add_bias(const RowsEpilogue& p, const EpilogueRow<acc_t<T>>& row, int64_t I,
                                                   int64_t i, acc_t<T> (&gate)[V], acc_t<T> (&up)[V]) {
  using A = acc_t<T>;
  if (!p.bias && !p.weight_on_input) return;
  const A s = p.weight_on_input ? row.weight : A(1);
  A gate_bias[V] = {}, up_bias[V] = {};
  if (p.bias) {
    const T* bias = static_cast<const T*>(p.bias) + row.expert * (p.gated ? 2 * I : I);
    load_units<T, V>(bias, I, i, p.gated, p.interleaved, gate_bias, up_bias);
  }
#pragma unroll
  for (int j = 0; j < V; ++j) gate[j] = s * gate[j] + gate_bias[j], up[j] = s * up[j] + up_bias[j];
}

template <class A, int V> MOE_DEVICE void load_mask(const RowsEpilogue& p, const EpilogueRow<A>& row, int64_t I,
                                                    int64_t i, A (&mask)[V]) {
#pragma unroll
  for (int j = 0; j < V; ++j) mask[j] = 1;
  if (p.hidden_mask && row.slot >= 0)
    load_columns<A, V>(static_cast<const A*>(p.hidden_mask) + row.slot * I + i, I - i, mask);
}

/// Units [i, i + V) of activation: sums of gate and up (without a gate: of the unit, up unused).
template <class T, int V> MOE_DEVICE void finish_activation(const RowsEpilogue& p, const EpilogueRow<acc_t<T>>& row,
                                                            int64_t I, int64_t i, acc_t<T> (&gate)[V],
                                                            acc_t<T> (&up)[V]) {
  using A = acc_t<T>;
  const int64_t width = p.gated ? 2 * I : I;
  if (p.hidden) store_units<T, V>(static_cast<T*>(p.hidden) + row.r * width, I, i, p.gated, false, gate, up);
  add_bias<T, V>(p, row, I, i, gate, up);
  A act[V], mask[V];
  load_mask(p, row, I, i, mask);
  const ActivationRule rule = rule_of(p);
#pragma unroll
  for (int j = 0; j < V; ++j) act[j] = mask[j] * activate<sizeof(T) == 2>(rule, p.gated, gate[j], up[j]).value;
  store_columns<T, V>(static_cast<T*>(p.act) + row.r * I + i, I - i, act);
}

/// Units [i, i + V) of activation_backward, from u = dO @ w2. Returns their share of d topk_weights.
template <class T, int V> MOE_DEVICE acc_t<T> finish_backward(const RowsEpilogue& p, const EpilogueRow<acc_t<T>>& row,
                                                              int64_t I, int64_t i, acc_t<T> (&u)[V]) {
  using A = acc_t<T>;
  const int64_t width = p.gated ? 2 * I : I, at = row.r * width;
  A gate[V], up[V] = {}, raw_gate[V], raw_up[V], mask[V], act[V], grad_gate[V], grad_up[V];
  load_units<T, V>(static_cast<const T*>(p.hidden) + at, I, i, p.gated, false, gate, up);
  load_mask(p, row, I, i, mask);
#pragma unroll
  for (int j = 0; j < V; ++j) raw_gate[j] = gate[j], raw_up[j] = up[j];
  add_bias<T, V>(p, row, I, i, gate, up);
  const A v = p.weight_on_input ? A(1) : row.weight, s = p.weight_on_input ? row.weight : A(1);
  const ActivationRule rule = rule_of(p);
  A share = 0;
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const Activated<A> a = activate<sizeof(T) == 2>(rule, p.gated, gate[j], up[j]);
    const A grad = mask[j] * u[j];
    grad_gate[j] = v * grad * a.by_gate, grad_up[j] = v * grad * a.by_up;
    act[j] = v * mask[j] * a.value;
    const A part = p.weight_on_input ? grad_gate[j] * raw_gate[j] + grad_up[j] * raw_up[j] : grad * a.value;
    share += i + j < I ? part : A(0);
  }
  if (p.weighted_act) store_columns<T, V>(static_cast<T*>(p.weighted_act) + row.r * I + i, I - i, act);
  if (p.grad_biased)
    store_units<T, V>(static_cast<T*>(p.grad_biased) + at, I, i, p.gated, p.interleaved, grad_gate, grad_up);
#pragma unroll
  for (int j = 0; j < V; ++j) grad_gate[j] *= s, grad_up[j] *= s;
  store_units<T, V>(static_cast<T*>(p.grad_hidden) + at, I, i, p.gated, p.interleaved, grad_gate, grad_up);
  return share;
}

}  // namespace moe::cuda
