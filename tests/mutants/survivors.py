# SPDX-License-Identifier: Apache-2.0
"""Faults that no run can report, and why each is harmless. The key is "file | what | line of source"."""

HARMLESS: dict[str, str] = {
    "tests/simt/rules_sync.cu | delete griddepcontrol_launch_dependents | griddepcontrol_launch_dependents();": (
        "It only lets the next kernel start sooner; without it that starts when this one ends, which is always allowed."
    ),
    "tests/simt/rules_async.cu | delete fence_mbarrier_init | fence_mbarrier_init();": (
        "It publishes the init to the other blocks of a cluster; inside a block the __syncthreads that follows does."
    ),
    "tests/simt/rules_sm90.cu | delete fence_mbarrier_init | fence_mbarrier_init();": (
        "It publishes the init to the other blocks of a cluster; inside a block the __syncthreads that follows does."
    ),
    "tests/simt/rules_cluster.cu | delete fence_mbarrier_init | fence_mbarrier_init();": (
        "The cluster barrier that follows is a release and an acquire of all blocks, which publishes the init too."
    ),
    "tests/simt/rules_cluster.cu | delete fence_mbarrier_init | fence_mbarrier_init(); #2": (
        "It publishes the init to the other blocks of a cluster; inside a block the __syncthreads that follows does."
    ),
    "tests/simt/rules_cluster.cu | wrong block mbarrier_arrive_remote | "
    "if (threadIdx.x < 2) mbarrier_arrive_remote(empty, threadIdx.x);": (
        "The two threads exchange their two blocks: the same two arrivals, ordered after the same __syncthreads."
    ),
    "csrc/cuda/slots.cuh | off by one < | for (int64_t base = first; base < end; base += kWarp) {": (
        "At base == end no lane has a slot below end: every id is -1, every f does nothing. A wasted turn."
    ),
    "csrc/cuda/permute.cuh | off by one < | for (int base = 0; base < E; base += blockDim.x) {": (
        "At base == E no thread has an e below E: every count is 0, nothing is stored, the carry stays. A wasted turn."
    ),
    "csrc/cuda/permute.cuh | off by one < | "
    "for (int64_t base = int64_t(blockIdx.y) * kWarp * kRowVectors; base < vectors;": (
        "At base == vectors every lane's `at < vectors` is false, for the load and for the store. A wasted turn."
    ),
    "csrc/cuda/tile_scheduler.cuh | off by one < | const int64_t used = E < S ? E : S;": (
        "At E == S both are the same number."
    ),
    "csrc/cuda/tile_scheduler.cuh | off by one < | for (int64_t base = 0; base < E; base += kWarp * kExpertsALane) {": (
        "At base == E no lane has an expert below E: none has rows, no lane owns the tile. A wasted turn."
    ),
    "csrc/cuda/unpermute.cuh | off by one < | for (int64_t base = int64_t(blockIdx.y) * kWarp * N; base < args.H; "
    "base += int64_t(gridDim.y) * kWarp * N) {": (
        "At base == H no lane is inside: nothing is loaded or stored. A wasted turn."
    ),
    "csrc/cuda/unpermute.cuh | off by one < | for (int64_t k = 0; k < args.K; k += kRowsInFlight) {": (
        "At k == K every `k + i < args.K` is false: r is -1, nothing is there to add. A wasted turn."
    ),
    "csrc/cuda/route.cuh | off by one < | for (int e = threadIdx.x; e < E; e += blockDim.x) counts[e] = 0;": (
        "counts[E] lies in the 16 spare bytes behind counts; nobody reads it."
    ),
    "csrc/cuda/route.cuh | off by one < | for (int e = threadIdx.x; e < E && sums; e += blockDim.x) sums[e] = 0;": (
        "sums[E] lies in the 16 spare bytes behind sums; nobody reads it."
    ),
    "csrc/cuda/sum_scores.cuh | off by one < | for (int e = threadIdx.x; e < E; e += blockDim.x) sums[e] = 0;": (
        "sums[E] lies in the 16 spare bytes behind sums; nobody reads it."
    ),
    "csrc/cuda/sinkhorn.cuh | off by one < | "
    "for (int base = blockIdx.x * kWarp; base < E; base += gridDim.x * kWarp) {": (
        "At base == E no lane has a column below E: nothing is read of the tiles, nothing is stored. A wasted turn."
    ),
    "csrc/cuda/sinkhorn.cuh | off by one < | for (int e = threadIdx.x; e < E; e += blockDim.x) own[e] = 1;": (
        "own[E] is the first number of the scratch behind it, which is written before it is read again."
    ),
    "csrc/cuda/expert_choice.cuh | off by one < | "
    "for (int64_t first = int64_t(blockIdx.x) * tile.tokens; first < args.T; "
    "first += int64_t(gridDim.x) * tile.tokens) {": (
        "At first == T the tile has no tokens: no row is scored, nothing is stored, all threads meet the same barriers."
    ),
    "csrc/cuda/expert_choice.cuh | off by one < | "
    "for (int64_t first = int64_t(blockIdx.x) * tile.tokens; first < args.T; "
    "first += int64_t(gridDim.x) * tile.tokens) { #2": (
        "At first == T the tile has no tokens: nothing is loaded or stored, all threads meet the same barriers."
    ),
    "csrc/cuda/expert_choice.cuh | off by one < | for (int64_t base = 0; base < args.n; base += blockDim.x) {": (
        "At base == n no thread has a token below n: its key is 0, which no score has. Nothing is counted or taken."
    ),
    "csrc/cuda/expert_choice.cuh | off by one < | for (int base = 0; base < K; base += kWarp) {": (
        "At base == K no lane has a slot below K: nothing is taken, nothing is stored. A wasted turn."
    ),
    "csrc/cuda/decode.cuh | off by one < | for (int64_t k = int64_t(part) * step; k < K; k += kDecodeWarps * step) {": (
        "At k == K every `at < K` is false: zeros are multiplied. A wasted turn."
    ),
    "csrc/cuda/decode.cuh | delete griddepcontrol_launch_dependents | griddepcontrol_launch_dependents();": (
        "It only lets decode_w2 start sooner; without it that starts when decode_w13 ends, which is always allowed."
    ),
    "csrc/cuda/decode.cuh | delete griddepcontrol_launch_dependents | griddepcontrol_launch_dependents(); #2": (
        "It only lets decode_w2 start sooner; without it that starts when decode_w13 ends, which is always allowed."
    ),
    "csrc/cuda/expert_rows.cuh | off by one < | for (int64_t base = 0; base < E; base += kWarp) {": (
        "At base == E no lane has an expert below E: none is active. A wasted turn."
    ),
    "csrc/cuda/expert_rows.cuh | off by one < | for (int64_t base = 0; base < E; base += kWarp) { #2": (
        "At base == E no lane has an expert below E: none is active. A wasted turn."
    ),
} | {
    f"csrc/cuda/{file}.cuh | off by one < | "
    f"for (int64_t first = runs.begin(run); first < end; first += tile.tokens) {{{turn}": (
        "At first == end the tile has no tokens: nothing is copied or scored, all threads meet the same barriers."
    )
    for file in ("route", "sum_scores")
    for turn in ("", " #2")
}
