// SPDX-License-Identifier: Apache-2.0
// The stages a second time, for CUDA tensors. A file of its own: one source cannot be two objects of one library.
#define MOE_CUDA_OPS
#include "expert_ops.cpp"
#include "gemm_ops.cpp"
#include "ops.cpp"
