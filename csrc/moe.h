// SPDX-License-Identifier: Apache-2.0
// The contract between the binding and the kernels: plain structs in, nothing out. No torch, no allocation, no throw.
//
// Letters: T tokens, H hidden, I expert intermediate width, E experts, K experts a token, S = T*K slots, P permuted
// rows,
//          G groups of experts. Inside a GEMM m, n, k are loop letters. slot = t*K + k.
// Types:   "acc" is double where the tensors are float64, else float. Every pointer is contiguous in its last dimension
//          unless a stride stands beside it. Row strides count elements.
// Index maps: row_to_slot [P] (-1 = padding), slot_to_row [S] (-1 = absent), expert_offsets [E+1] (exclusive, first 0).
// Sums run in one fixed order (ascending expert, ascending slot), whatever the number of threads.
#pragma once
#include "dtype.h"

namespace moe {

/// The caller's thread pool. run() calls body(worker, context) for worker = 0 .. count-1, perhaps several workers one
/// after another on one thread (nested region, fewer threads than asked): bodies must not wait for each other.
struct Workers {
  int32_t count;
  void (*run)(int32_t count, void (*body)(int32_t worker, void* context), void* context);
};

enum class Scoring : int32_t { softmax, sigmoid, sqrtsoftplus };
enum class Activation : int32_t { silu, gelu, gelu_tanh, relu, relu2, swigluoai };

struct ActivationRule {
  Activation activation;
  double limit, alpha;  // of swigluoai
};

/// What turns logits into weights; shared by route and its backward.
struct RouteRule {
  Scoring scoring;
  bool renormalize;        // divide a token's weights by (their sum + eps)
  double renormalize_eps;  //
  double scale;            // multiplies last
  double logit_softcap;    // c * tanh(l / c) before all else; 0 = off
};

/// route: score the logits, keep the K best (ties: lowest id), weigh them. Reads T*E, writes T*K. Where score_sums is
/// given, it sums the scores by expert for the balance losses too, as sum_scores does.
struct RouteArgs {
  int64_t T, E, K;
  int64_t G, topk_group, group_top;  // experts outside the topk_group best groups are masked; G = 1: no groups
  RouteRule rule;
  DType dtype;                  // of logits
  const void* logits;           // [T, E]
  int64_t logits_stride;        // between tokens
  const void* correction_bias;  // [E] acc, or null: added for the choice, not for the weight
  const uint8_t* padding_mask;  // [T], 0 = not a token, or null
  void* topk_weights;           // [T, K] acc
  int32_t* topk_ids;            // [T, K] by descending selection score, -1 = absent
  int32_t* tokens_per_expert;   // [E]
  void* lse;                    // [T] acc, logsumexp of the (capped) logits; null unless softmax
  int64_t B;                    // groups of T / B tokens, for score_sums only
  bool normalize_scores;        // a token's scores are divided by their sum before they are added up
  void* score_sums;             // [B, E] acc, or null
  void* workspace;              // route_workspace_bytes
};

/// route_backward: d logits from d topk_weights, d lse and d score_sums. Reads T*E, writes T*E, once.
struct RouteBackwardArgs {
  int64_t T, E, K;
  RouteRule rule;
  DType dtype;               // of logits and grad_logits
  const void* grad_weights;  // [T, K] acc, or null
  const void* grad_lse;      // [T] acc, or null
  const void* logits;        // [T, E]
  int64_t logits_stride;
  const int32_t* topk_ids;   // [T, K]; a token whose first id is absent is masked
  const void* topk_weights;  // [T, K] acc; a slot of weight 0 was out of reach and gets no gradient
  int64_t B;
  bool normalize_scores;
  const void* grad_score_sums;  // [B, E] acc, or null
  void* grad_logits;            // [T, E]
  void* workspace;              // route_backward_workspace_bytes on a CPU, null on a GPU
};

/// sum_scores: the scores of the tokens of each of B groups of T / B tokens, summed by expert, where nothing is chosen.
/// Reads T*E.
struct SumScoresArgs {
  int64_t T, E, B;
  RouteRule rule;      // scoring and logit_softcap
  bool normalize;      // a token's scores are divided by their sum
  DType dtype;         // of logits
  const void* logits;  // [T, E]
  int64_t logits_stride;
  const uint8_t* padding_mask;  // [T], 0 = not a token, or null
  void* sums;                   // [B, E] acc
  void* workspace;              // sum_scores_workspace_bytes
};

/// sum_scores_backward: d logits from d sums. Reads T*E, writes T*E.
struct SumScoresBackwardArgs {
  int64_t T, E, B;
  RouteRule rule;
  bool normalize;
  DType dtype;            // of logits and grad_logits
  const void* grad_sums;  // [B, E] acc
  const void* logits;     // [T, E]
  int64_t logits_stride;
  const uint8_t* padding_mask;
  void* grad_logits;  // [T, E]
  void* workspace;    // sum_scores_backward_workspace_bytes on a CPU, null on a GPU
};

/// narrow_ids: ids of any integer width to int32, through expert_map where given; all that is not in [0, E) becomes -1.
struct NarrowIdsArgs {
  int64_t S, E, map_size;
  bool ids64, map64;
  const void* topk_ids;    // [S] int32 | int64
  const void* expert_map;  // [map_size] int32 | int64 global id -> local id, or null
  int32_t* narrow;         // [S]
};

/// limit_capacity: which slots come too late for their expert. A group of tokens walks its first choices in token
/// order, then its second ones, ...; each expert keeps the first `capacity` slots of every group. Absent slots stay as
/// they are.
struct LimitCapacityArgs {
  int64_t T, E, K;
  int64_t capacity, group_size;  // the last group may be shorter
  const int32_t* topk_ids;       // [T, K], -1 = absent
  uint8_t* dropped;              // [T, K], 1 = too late
  void* workspace;               // limit_capacity_workspace_bytes
};

/// expert_cuts: what each expert takes of every group of n tokens: the C best of its scores (softmax over the experts),
/// ties to the lowest token. It is told by the least score taken and the last token taken that has just this score.
struct ExpertCutsArgs {
  int64_t T, E, n, C;  // T is a multiple of n, C <= n
  DType dtype;         // of logits
  const void* logits;  // [T, E]
  int64_t logits_stride;
  const uint8_t* padding_mask;  // [T], 0 = not a token: never taken, or null
  void* scores;                 // [E, T] acc, -1 for what is not a token
  void* least;                  // [T / n, E] acc
  int32_t* last;                // [T / n, E] a token, -1: none of the least score
  int32_t* experts_per_token;   // [T]
  int32_t* tokens_per_expert;   // [E]
  void* workspace;              // expert_cuts_workspace_bytes on a CPU, null on a GPU
};

/// expert_choice: the slots of every token from the cuts: experts by descending score, ties to the lowest id, at most
/// K.
struct ExpertChoiceArgs {
  int64_t T, E, n, K;
  DType dtype;          // acc: of scores, least and topk_weights
  const void* scores;   // [E, T]
  const void* least;    // [T / n, E]
  const int32_t* last;  // [T / n, E]
  void* topk_weights;   // [T, K]
  int32_t* topk_ids;    // [T, K], -1 = absent, behind all others
};

/// sinkhorn: the K best of a transport plan whose rows sum to 1/T and whose columns to 1/E. Rows that are not tokens
/// have no part in it. csrc/sinkhorn.h fixes the order of its sums.
struct SinkhornArgs {
  int64_t T, E, K, max_iterations;
  double tol;          // the mean move of the experts' factors that ends the iteration
  DType dtype;         // of logits
  const void* logits;  // [T, E]
  int64_t logits_stride;
  const uint8_t* padding_mask;  // [T], 0 = not a token, or null
  void* plan;                   // [T, E] acc
  int32_t* iterations;          // [1]
  void* topk_weights;           // [T, K] acc: sigmoid of the logit for K = 1, else softmax over all of them
  int32_t* topk_ids;            // [T, K], -1 = absent
  int32_t* tokens_per_expert;   // [E]
  void* workspace;              // sinkhorn_workspace_bytes, of the device
};

/// permute_index: stable counting sort of the slots by expert. Each expert's rows start at a multiple of align.
struct PermuteIndexArgs {
  int64_t S, E, P, align;
  const int32_t* topk_ids;  // [S], -1 = absent
  int32_t* expert_offsets;  // [E+1]
  int32_t* row_to_slot;     // [P]
  int32_t* slot_to_row;     // [S], or null
  void* workspace;          // permute_index_workspace_bytes on a GPU, null on a CPU
};

/// permute: x_rows[r] = x[row_to_slot[r] / K], zero where row_to_slot is -1. Reads and writes P*H.
struct PermuteArgs {
  int64_t P, H, K;
  DType dtype;
  const void* x;  // [T, H]
  int64_t x_stride;
  const int32_t* row_to_slot;  // [P]
  void* x_rows;                // [P, H]
};

/// unpermute: y[t] = sum over k of topk_weights[t, k] * rows[slot_to_row[t*K + k]]; slots outside [0, P) are left out.
struct UnpermuteArgs {
  int64_t T, H, K, P;
  DType dtype;
  const void* rows;  // [P, H]
  int64_t rows_stride;
  const int32_t* slot_to_row;  // [S]
  const void* topk_weights;    // [T, K] acc, or null: all weights 1
  void* y;                     // [T, H]
};

/// unpermute_backward: grad_rows[r] = w[slot] * grad_y[t], grad_weights[slot] = <rows[r], grad_y[t]>.
struct UnpermuteBackwardArgs {
  int64_t T, H, K, P;
  DType dtype;
  const void* grad_y;  // [T, H]
  const void* rows;    // [P, H]
  int64_t grad_y_stride, rows_stride;
  const int32_t* slot_to_row;  // [S]
  const void* topk_weights;    // [T, K] acc
  void* grad_rows;             // [P, H], rows that no slot owns are zeroed
  void* grad_weights;          // [T, K] acc
  void* workspace;             // unpermute_backward_workspace_bytes on a GPU, null on a CPU
};

/// One matrix an expert: element (e, n, k) stands at data + e*expert_stride + n*row_stride + k*col_stride.
/// n is the output index and k the contracted one. Packed weights have panel_stride instead of 32 * row_stride.
struct Weight {
  const void* data;
  int64_t expert_stride, row_stride, col_stride, panel_stride;
  bool padded;  // packed: every panel is 32 wide, zero padded
};

/// grouped_gemm: out_g = a_g b_g for every group g of G. Exactly one of m, n, k may be cut into groups by offs.
/// grouped_gemm_backward: out_g += a_g^T grad_g, the gradient of the weights b_g, into the main gradient.
enum class Grouped : int32_t { none, rows, cols, contraction };
struct GroupedGemmArgs {
  int64_t G, M, N, K;  // sizes of the whole operand; the grouped one is cut by offs
  Grouped grouped;
  DType dtype, out_dtype;
  const void* a;  // element (g, m, k)
  int64_t a_group, a_row, a_col;
  Weight b;             // element (g, n, k)
  const int32_t* offs;  // [G] inclusive ends, or null for none
  const void* bias;     // [G, N] dtype, or null
  bool allow_tf32;      // of f32, on a GPU: products of 10-bit mantissas
  bool accumulate;      // contraction only: out, of acc, is added to
  void* out;            // [G?, M, N] contiguous; what no group owns is zeroed
  void* workspace;      // grouped_gemm_workspace_bytes
};

/// The expert MLP: its sizes, its weights and its rule, shared by forward and backward.
/// h = s * (x W13^T) + b13 with s = topk_weight if weight_on_input else 1; a = act(h); slot output = w * (a W2^T + b2).
struct ExpertMlp {
  int64_t T, H, I, E, K;
  DType dtype, weight_dtype;  // of x, y, hidden | of weights and biases
  Activation activation;
  bool gated;        // W13 has 2I rows
  bool interleaved;  // rows gate, up, gate, up ..; else all gate rows, then all up rows
  bool weight_on_input;
  bool allow_tf32;      // of f32, on a GPU: products of 10-bit mantissas
  double limit, alpha;  // of swigluoai
  const void* x;        // [T, H]
  int64_t x_stride;
  Weight w13, w2;                 // (n = 2I | I, k = H), (n = H, k = I)
  Weight plain13, plain2;         // beside packed ones: the same, row-major, for experts of few rows; or no data
  const void* w13_bias;           // [E, 2I | I] weight_dtype, or null
  const void* w2_bias;            // [E, H] weight_dtype, or null
  const void* topk_weights;       // [S] acc
  const void* hidden_mask;        // [S, I] acc, multiplies a, or null
  const int32_t* row_to_slot;     // [S]
  const int32_t* slot_to_row;     // [S]; null on a CPU
  const int32_t* expert_offsets;  // [E+1]
};

struct FusedExpertsArgs {
  ExpertMlp mlp;
  void* hidden;     // [S, 2I | I] x W13^T in row order, gate block then up block, for the backward; or null
  void* y;          // [T, H]
  void* workspace;  // fused_experts_workspace_bytes
};

struct FusedExpertsBackwardArgs {
  ExpertMlp mlp;
  const void* grad_y;  // [T, H]
  int64_t grad_y_stride;
  const void* hidden;       // as the forward left it; null: computed again
  void* grad_x;             // [T, H], or null as each of the following
  void* grad_w13;           // laid out as w13_out says, of weight_dtype; a main gradient: of acc, and added to
  void* grad_w2;            //
  void* grad_topk_weights;  // [S] acc, zeroed by the caller: absent slots are not written
  void* grad_w13_bias;      // [E, 2I | I]
  void* grad_w2_bias;       // [E, H]
  Weight w13_out, w2_out;   // strides of the two weight gradients
  bool w13_main, w2_main;   // whether grad_w13 and grad_w2 are main gradients
  void* workspace;          // fused_experts_backward_workspace_bytes
};

/// pack_experts: one matrix an expert into zero-padded panels [E, ceil(N/32), K, 32], for streaming.
struct PackArgs {
  int64_t E, N, K;
  DType dtype, packed_dtype;
  Weight w;
  void* packed;
  int64_t packed_expert_stride, packed_panel_stride;
};

constexpr int64_t kPanel = 32;      // columns of a weight panel
constexpr int64_t kFewTokens = 64;  // up to here a GPU decodes: the first product is not kept, weights are streamed

namespace cpu {
int64_t route_workspace_bytes(const RouteArgs&, const Workers&);
void route(const RouteArgs&, const Workers&);
int64_t route_backward_workspace_bytes(const RouteBackwardArgs&, const Workers&);
void route_backward(const RouteBackwardArgs&, const Workers&);
void narrow_ids(const NarrowIdsArgs&);
int64_t sum_scores_workspace_bytes(const SumScoresArgs&, const Workers&);
void sum_scores(const SumScoresArgs&, const Workers&);
int64_t sum_scores_backward_workspace_bytes(const SumScoresBackwardArgs&, const Workers&);
void sum_scores_backward(const SumScoresBackwardArgs&, const Workers&);
int64_t limit_capacity_workspace_bytes(const LimitCapacityArgs&, const Workers&);
void limit_capacity(const LimitCapacityArgs&, const Workers&);
int64_t expert_cuts_workspace_bytes(const ExpertCutsArgs&, const Workers&);
void expert_cuts(const ExpertCutsArgs&, const Workers&);
void expert_choice(const ExpertChoiceArgs&, const Workers&);
int64_t sinkhorn_workspace_bytes(const SinkhornArgs&, const Workers&);
void sinkhorn(const SinkhornArgs&, const Workers&);
void permute_index(const PermuteIndexArgs&);
void permute(const PermuteArgs&, const Workers&);
void unpermute(const UnpermuteArgs&, const Workers&);
void unpermute_backward(const UnpermuteBackwardArgs&, const Workers&);
int64_t grouped_gemm_workspace_bytes(const GroupedGemmArgs&, const Workers&);
void grouped_gemm(const GroupedGemmArgs&, const Workers&);
int64_t fused_experts_workspace_bytes(const FusedExpertsArgs&, const Workers&);
void fused_experts(const FusedExpertsArgs&, const Workers&);
int64_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardArgs&, const Workers&);
void fused_experts_backward(const FusedExpertsBackwardArgs&, const Workers&);
void pack_experts(const PackArgs&, const Workers&);
}  // namespace cpu

}  // namespace moe
