// SPDX-License-Identifier: Apache-2.0
// The table of an instruction set, from what the other files *_impl.h have defined.
namespace moe::cpu::MOE_ISA {

template <class T> constexpr Tile<T> make_tile() {
  return {dot<T>, outer<T>, transpose<T>, gather<T>, widen<T>, read_clean<T>, narrow<T>};
}
template <class A> constexpr Math<A> make_math() {
  return {.activate = activate<A>,
          .activate_backward = activate_backward<A>,
          .exp = exp<A>,
          .exp_sum = exp_sum<A>,
          .sigmoid = sigmoid<A>,
          .clean = clean_row<A>,
          .divide = divide<A>,
          .choose = choose<A>,
          .top_k = top_k<A>,
          .sum_of_best = sum_of_best<A>,
          .softmax_backward = softmax_backward<A>,
          .dot = dot_of<A>,
          .axpy = axpy<A>,
          .softmax_panel = softmax_panel<A>,
          .cut = cut<A>,
          .mark = mark<A>,
          .balance_tile = balance_tile<A>};
}

extern const Kernels table;
const Kernels table = {make_tile<double>(), make_tile<float>(), make_tile<bf16>(),
                       make_tile<f16>(),    make_math<float>(), make_math<double>()};

}  // namespace moe::cpu::MOE_ISA
