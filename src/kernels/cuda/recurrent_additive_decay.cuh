/* The gradient of a decay per token and head. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_DECAY_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_DECAY_CUH

#include "kernels/cuda/recurrent_additive_work.cuh"

namespace additive {

/* The sum over a block of 1024 threads, for all of them. `room` holds 32 floats. */
__device__ float block_sum(float value, float *room) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(~0u, value, distance);
  __syncthreads();
  if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = value;
  __syncthreads();
  value = room[threadIdx.x % 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value += __shfl_xor_sync(~0u, value, distance);
  return value;
}

/* The gradient of a decay per token from those of queries and keys. The log decays act through
 * their sums G_i, and
 *
 *   dL/dG_i = q_i . dq_i - k_i . dk_i,   dg_t = sum_{i >= t} dL/dG_i + <dS_N, S_N>.
 *
 * `products` [q_parts + k_parts, tokens, heads] are these products. Both come from the same rounded
 * weights inside a chunk, so that what should cancel does. A block of 1024 threads for each
 * sequence and value head; `final_states` [batch, heads, dim, value_dim] is what d_final goes with.
 */
__global__ void decay_sums(const float *products, int q_parts, int k_parts, int64_t tokens,
                           float *d_decay, strides step, const int32_t *offsets, int64_t length,
                           int heads, const float *final_states, state_view d_final, int dim,
                           int value_dim) {
  __shared__ float room[32], ends[32];
  const int head = blockIdx.x % heads, batch = blockIdx.x / heads, lane = threadIdx.x % 32;
  float carry = 0;
  if (d_final.data) {
    const float *states = final_states + (int64_t)blockIdx.x * dim * value_dim;
    const float *gradients = d_final.data + batch * d_final.batch + head * d_final.head;
    for (int i = threadIdx.x; i < dim * value_dim; i += 1024)
      carry += states[i] * gradients[i / value_dim * d_final.row + i % value_dim];
    carry = block_sum(carry, room);
  }
  const int64_t start = offsets ? offsets[batch] : 0;
  if (offsets) length = offsets[batch + 1] - start;
  products += (offsets ? start : batch * length) * heads + head;
  d_decay += batch * step.batch + start * step.token + head * step.head;
  for (int64_t last = length - 1; last >= 0; last -= 1024) {
    const int64_t token = last - threadIdx.x;
    float sum = 0;
    if (token >= 0)
      for (int part = 0; part < q_parts + k_parts; part++) {
        const float product = products[(part * tokens + token) * heads];
        sum += part < q_parts ? product : -product;
      }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      float above = __shfl_up_sync(~0u, sum, distance);
      if (lane >= distance) sum += above;
    }
    __syncthreads();
    if (lane == 31) ends[threadIdx.x / 32] = sum;
    __syncthreads();
    float others = ends[lane], before = lane < threadIdx.x / 32 ? others : 0;
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) {
      others += __shfl_xor_sync(~0u, others, distance);
      before += __shfl_xor_sync(~0u, before, distance);
    }
    if (token >= 0) d_decay[token * step.token] = carry + before + sum;
    carry += others;
  }
}

} // namespace additive

#endif
