/* The additive scan's shared memory, and the warps that fill it: a ring of chunks by bulk tensor
 * copies, and the weighed keys that enter the state. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_LOAD_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_LOAD_CUH

#include "kernels/cuda/recurrent_additive_work.cuh"

namespace additive {

template <scan_kind KIND, int DK, int DV, bool CHANNEL> struct shape {
  static constexpr int consumers = KIND == GRADIENTS ? 2 : DV / 64;
  static constexpr int threads = 128 * (consumers + 1);
  /* In a multiprocessor; two leave too few registers for states of 128 rows. */
  static constexpr int blocks = consumers == 1 && DK == 64 ? 2 : 1;
  /* For each thread; together no more than the block starts with, or it waits forever: 168 for 384
   * threads or 128 for 256. */
  static constexpr int producer_registers = CHANNEL ? 56 : 40;
  static constexpr int consumer_registers =
      (blocks == 2 ? 216 : 232) - (CHANNEL ? 16 / consumers : 0);
  static constexpr bool moves_registers = consumers == 2 || blocks == 2;
  static constexpr int k_tiles = DK / 64, v_tiles = DV / 64;
  /* A stage: Q, K, V; with gradients one more of V's width. */
  static constexpr int k_offset = KIND == STATES ? 0 : k_tiles * TILE_BYTES;
  static constexpr int v_offset = k_offset + k_tiles * TILE_BYTES;
  static constexpr int w_offset = v_offset + v_tiles * TILE_BYTES;
  static constexpr int weights_offset = w_offset; /* P, with a decay per channel */
  static constexpr int stage_bytes = w_offset + (KIND == GRADIENTS            ? v_tiles * TILE_BYTES
                                                 : KIND == OUTPUTS && CHANNEL ? TILE_BYTES
                                                                              : 0);
  static constexpr int state_bytes = KIND == STATES ? 0 : k_tiles * v_tiles * TILE_BYTES;
  static constexpr int out_bytes = KIND == STATES    ? 0
                                   : KIND == OUTPUTS ? v_tiles * TILE_BYTES
                                                     : (k_tiles + v_tiles) * TILE_BYTES;
  /* Of one of two buffers; with a decay per channel keys enter the state as they are. */
  static constexpr int weighed_bytes = CHANNEL ? 0 : k_tiles * TILE_BYTES;
  /* Of a stage: A, then G_all; the state's factors with a decay per channel. */
  static constexpr int exponents = CHUNK + 4 + (CHANNEL ? DK : 0);
  static constexpr int room =
      227 * 1024 / blocks - state_bytes - out_bytes - 2 * weighed_bytes - 32;
  static constexpr int fitting = room / (stage_bytes + exponents * 4 + 16);
  static constexpr int stages = fitting > 4 ? 4 : fitting;
  static constexpr int state_offset = stages * stage_bytes;
  static constexpr int out_offset = state_offset + state_bytes;
  static constexpr int weighed_offset = out_offset + out_bytes;
  static constexpr int exponents_offset = weighed_offset + 2 * weighed_bytes;
  static constexpr int barriers_offset = exponents_offset + stages * exponents * 4;
  /* Barriers: full and empty of each stage; full and empty of each weighed buffer. */
  static constexpr int weighed_barriers_offset = barriers_offset + stages * 16;
  static constexpr int bytes = weighed_barriers_offset + 32;
  static_assert(bytes <= 227 * 1024 / blocks, "more shared memory than there is");
};

/* Fills the ring. One warp. */
template <scan_kind KIND, typename S, bool CHANNEL>
__device__ void produce(const scan_parameters &p, char *shared, uint32_t base) {
  constexpr int DK = S::k_tiles * 64;
  const int lane = threadIdx.x % 32;
  uint32_t full = base + S::barriers_offset, empty = full + S::stages * 8;
  int step = 0;
  for (int item = blockIdx.x; item < item_count<KIND>(p); item += gridDim.x) {
    work w;
    if (!locate<KIND == STATES>(p, item, &w)) continue;
    const float constant = constant_decay(p, w.head);
    const float *decay = p.decay + w.head * p.decay_head;
    if (p.decay_kind == ATTN_DECAY_TOKEN)
      decay += (p.offsets ? 0 : w.batch * p.decay_batch) + w.start * p.decay_token;
    if (CHANNEL)
      decay += (p.offsets ? 0 : w.batch * p.decay_step.batch) + w.start * p.decay_step.token +
               w.head * p.decay_step.head + 4 * lane;
    float4 product = make_float4(1, 1, 1, 1);
    for (cursor c; advance<CHANNEL>(p, w, &c); step++) {
      const int valid = c.valid;
      float4 factor = make_float4(1, 1, 1, 1);
      if (CHANNEL && lane < DK / 4) {
        if (c.size == CHUNK) {
          const int64_t chunk = flat_chunk(p, w) + c.token / CHUNK;
          factor = *(const float4 *)(p.factors + (chunk * p.heads + w.head) * DK + 4 * lane);
        } else {
          float *factors = &factor.x;
#pragma unroll
          for (int j = 0; j < 4; j++) {
            float sum = 0;
            for (int t = 0; t < valid; t++)
              sum += channel_log2(decay[(c.token + t) * p.decay_step.token + j]);
            factors[j] = exp2_approximate(sum);
          }
        }
        product.x *= factor.x, product.y *= factor.y, product.z *= factor.z, product.w *= factor.w;
      }
      float log2_decays[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int token = 2 * lane + j;
        log2_decays[j] = token < valid ? constant : 0;
        if (p.decay_kind == ATTN_DECAY_TOKEN && token < valid) {
          float log2_decay = decay[(int64_t)(c.token + token) * p.decay_token] * LOG2_E;
          log2_decays[j] = log2_decay < LEAST_LOG2 ? LEAST_LOG2 : log2_decay;
        }
      }
      const int stage = step % S::stages;
      barrier_wait(empty + stage * 8, step / S::stages % 2 ^ 1);
      float sum = log2_decays[0] + log2_decays[1];
#pragma unroll
      for (int distance = 1; distance < 32; distance *= 2) {
        float below = __shfl_up_sync(~0u, sum, distance);
        if (lane >= distance) sum += below;
      }
      float all = __shfl_sync(~0u, sum, 31);
      float before = sum - log2_decays[1];
      float *exponents = (float *)(shared + S::exponents_offset) + stage * S::exponents;
      exponents[2 * lane] = p.reverse ? all - before : before;
      exponents[2 * lane + 1] = p.reverse ? all - sum : sum;
      if (lane == 0) exponents[CHUNK] = all;
      if (CHANNEL && lane < DK / 4) *(float4 *)&exponents[CHUNK + 4 + 4 * lane] = factor;
      __syncwarp();
      if (lane == 0) {
        uint32_t tile = base + stage * S::stage_bytes, barrier = full + stage * 8;
        int token = (int)w.start + c.token, batch = p.offsets ? 0 : w.batch;
        barrier_expect(barrier, S::stage_bytes);
#pragma unroll
        for (int j = 0; j < S::k_tiles; j++) {
          if (KIND != STATES)
            tensor_load(tile + j * TILE_BYTES, &p.q, barrier, j * 64, w.head / p.q_group, token,
                        batch);
          tensor_load(tile + S::k_offset + j * TILE_BYTES, &p.k, barrier, j * 64,
                      w.head / p.k_group, token, batch);
        }
        if (KIND == OUTPUTS && CHANNEL)
          tensor_load(tile + S::weights_offset, &p.weights, barrier, 0, w.head, token, batch);
#pragma unroll
        for (int j = 0; j < S::v_tiles; j++) {
          tensor_load(tile + S::v_offset + j * TILE_BYTES, &p.v, barrier, j * 64,
                      w.head / p.v_group, token, batch);
          if (KIND == GRADIENTS)
            tensor_load(tile + S::w_offset + j * TILE_BYTES, &p.w, barrier, j * 64, w.head, token,
                        batch);
        }
      }
    }
    if (CHANNEL && KIND == STATES && lane < DK / 4)
      *(float4 *)&p.totals[w.slot * DK + 4 * lane] = product;
  }
}

/* Writes 2^{G_all - A_j} K beside each chunk, for the state (not with a decay per channel), and
 * zeros into the rows after the sequence's end: what lies there may be anything, NaN too. Three
 * warps. */
template <typename T, scan_kind KIND, typename S, bool CHANNEL>
__device__ void weigh_keys(const scan_parameters &p, char *shared, uint32_t base) {
  constexpr int PIECES = CHUNK * S::k_tiles * 8; /* of 16 bytes */
  const int thread = threadIdx.x - 32;
  const uint32_t full = base + S::barriers_offset;
  const uint32_t weighed_full = base + S::weighed_barriers_offset,
                 weighed_empty = weighed_full + 16;
  int step = 0;
  for (int item = blockIdx.x; item < item_count<KIND>(p); item += gridDim.x) {
    work w;
    if (!locate<KIND == STATES>(p, item, &w)) continue;
    for (cursor c; advance<CHANNEL>(p, w, &c); step++) {
      const int valid = c.valid;
      const int stage = step % S::stages, buffer = step % 2;
      char *tile = shared + stage * S::stage_bytes, *keys = tile + S::k_offset;
      char *weighed = shared + S::weighed_offset + buffer * S::weighed_bytes;
      const float *exponents = (float *)(shared + S::exponents_offset) + stage * S::exponents;
      barrier_wait(full + stage * 8, step / S::stages % 2);
      barrier_wait(weighed_empty + buffer * 8, step / 2 % 2 ^ 1);
      if (valid < CHUNK) {
        constexpr int TILES = S::k_tiles + S::v_tiles; /* K and V lie one after the other */
        for (int j = thread; j < TILES * (CHUNK - valid) * 8; j += 96) {
          const int row = j / 8 % (CHUNK - valid) + valid, which = j / 8 / (CHUNK - valid);
          *(uint4 *)(keys + which * TILE_BYTES + row * 128 + j % 8 * 16) = make_uint4(0, 0, 0, 0);
        }
        named_sync(4, 96);
      }
      const float all = exponents[CHUNK];
#pragma unroll 4
      for (int j = thread; j < PIECES && !CHANNEL; j += 96) {
        const int at = j * 16, row = j / 8 % CHUNK;
        const float weight = exp2_approximate(all - exponents[row]);
        uint4 piece = *(const uint4 *)(keys + at);
        uint32_t *words = &piece.x;
#pragma unroll
        for (int word = 0; word < 4; word++) {
          float2 pair = element<T>::unpack(words[word]);
          words[word] = element<T>::pack(pair.x * weight, pair.y * weight);
        }
        *(uint4 *)(weighed + at) = piece;
      }
      proxy_fence();
      __syncwarp();
      if (thread % 32 == 0) barrier_arrive(weighed_full + buffer * 8);
    }
  }
}

} // namespace additive

#endif
