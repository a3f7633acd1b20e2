/* The additive scan's consumers for the gradients of keys and values together. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_GRADIENTS_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_GRADIENTS_CUH

#include "kernels/cuda/recurrent_additive_load.cuh"
#include "kernels/cuda/recurrent_additive_tiles.cuh"

namespace additive {

/* dV and dK together, where q is K, k is Q, v is dO, o is dV, w is V and d_w is dK: the first
 * warpgroup has
 *
 *   dK = scale (2^{A_i} (V dS^T) + (V dO^T (.) 2^{A_i - A_j} [i <= j]) Q)
 *
 * and the second dV in the same form with K, dS, Q and dO. With D = 128 each has 64 rows of dS;
 * with D = 64 both have all of it. */
template <typename T, int D, int group>
__device__ void consume_gradients(const scan_parameters &p, char *shared, uint32_t base) {
  typedef shape<GRADIENTS, D, D, false> S;
  constexpr int TILES = D / 64, STATE_STRIDE = D * 128;
  const int lane = threadIdx.x % 32, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
  constexpr int part = D == 128 ? group : 0; /* of the state's rows */
  const uint32_t full = base + S::barriers_offset, empty = full + S::stages * 8;
  const uint32_t weighed_full = base + S::weighed_barriers_offset,
                 weighed_empty = weighed_full + 16;
  const uint32_t state_tile = base + S::state_offset, part_tile = state_tile + part * TILE_BYTES;
  const uint32_t out_tile = base + S::out_offset + group * TILES * TILE_BYTES;
  const bool leader = threadIdx.x % 128 == 0, writer = D == 128 || group == 0;
  int step = 0;
  for (int item = blockIdx.x; item < item_count<GRADIENTS>(p); item += gridDim.x) {
    work w;
    if (!locate<false>(p, item, &w)) continue;
    float state[D / 2];
    if (p.states) {
      pairs_read(state, p.states + w.slot * D * D + 64 * part * D, D);
    } else if (p.initial.data) {
      const state_view &view = p.initial;
      matrix_read(state, state_at(view, w) + 64 * part * view.row, view.row, view.column,
                  view.scale);
    } else {
#pragma unroll
      for (int i = 0; i < D / 2; i++) state[i] = 0;
    }
    if (writer) tile_write<T>(part_tile, STATE_STRIDE, state);
    proxy_fence();
    named_sync(1, 256);
    for (cursor c; advance<false>(p, w, &c); step++) {
      const int token = c.token, valid = c.valid;
      const int stage = step % S::stages, buffer = step % 2;
      const uint32_t k_tile = base + stage * S::stage_bytes, q_tile = k_tile + S::k_offset;
      const uint32_t d_o_tile = k_tile + S::v_offset, v_tile = k_tile + S::w_offset;
      const uint32_t weighed_tile =
          base + S::weighed_offset + buffer * S::weighed_bytes + part * TILE_BYTES;
      const float *exponents = (float *)(shared + S::exponents_offset) + stage * S::exponents;
      barrier_wait(full + stage * 8, step / S::stages % 2);
      if (valid < CHUNK) barrier_wait(weighed_full + buffer * 8, step / 2 % 2);
      float scores[32], out[D / 2];
      uint32_t weights[CHUNK / 16][4];
      const uint32_t left_tile = group ? q_tile : d_o_tile, right_tile = group ? d_o_tile : q_tile;
      /* From shared memory: registers are short. */
      const uint32_t row_tile = group ? k_tile : v_tile;
      const auto a = [&](int k) { return descriptor(row_tile + k / 4 * TILE_BYTES + k % 4 * 32); };
      pin(scores);
      pin(out);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D / 16; k++) /* V dO^T, K Q^T */
        wgmma<T, 0, 0>(scores, a(k), descriptor(left_tile + k / 4 * TILE_BYTES + k % 4 * 32),
                       k > 0);
      wgmma_commit();
      if constexpr (group == 0) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) /* V dS^T */
          wgmma<T, 0, 0>(out, a(k), descriptor(state_tile + k / 4 * STATE_STRIDE + k % 4 * 32),
                         k > 0);
      } else {
#pragma unroll
        for (int k = 0; k < D / 16; k++) /* K dS */
          wgmma<T, 0, 1>(out, a(k), descriptor(state_tile + k * 2048, STATE_STRIDE), k > 0);
      }
      wgmma_commit();
      const float exponent0 = exponents[row0] + p.log2_scale;
      const float exponent1 = exponents[row0 + 8] + p.log2_scale;
      const float weight0 = exp2_approximate(exponent0), weight1 = exp2_approximate(exponent1);
      const float state_decay = exp2_approximate(exponents[CHUNK]);
      wgmma_wait<1>();
      pin(scores);
      weigh<T>(weights, scores, exponents, exponent0, exponent1, 1);
      wgmma_wait<0>();
      pin(out);
#pragma unroll
      for (int j = 0; j < D / 2; j++) out[j] *= j % 4 < 2 ? weight0 : weight1;
#pragma unroll
      for (int j = 0; j < D / 2; j++) state[j] *= state_decay;
      pin(out);
      pin(state);
      barrier_wait(weighed_full + buffer * 8, step / 2 % 2);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < CHUNK / 16; k++)
        wgmma<T, 1>(out, weights[k], descriptor(right_tile + k * 2048, TILE_BYTES), 1);
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < CHUNK / 16; k++) /* Q^T dO */
        wgmma<T, 1, 1>(state, descriptor(weighed_tile + k * 2048),
                       descriptor(d_o_tile + k * 2048, TILE_BYTES), 1);
      wgmma_commit();

      wgmma_wait<1>();
      pin(out);
      /* From here on nobody reads the old state, nor a copy the old outputs. */
      if (leader) tensor_store_read();
      named_sync(1, 256);
      tile_write<T>(out_tile, TILE_BYTES, out);
      if (group == 0 && p.products) {
        float sums[2] = {0, 0};
#pragma unroll
        for (int j = 0; j < D / 4; j++) {
          const uint32_t *words =
              (const uint32_t *)(shared + (k_tile - base) + j / 16 * TILE_BYTES +
                                 swizzled(row0 + j % 2 * 8, j / 2 % 8));
          const float2 pair = element<T>::unpack(words[lane % 4]);
          sums[j % 2] += pair.x * out[2 * j] + pair.y * out[2 * j + 1];
        }
        products_write(p, w, sums, token, valid, 0);
      }
      wgmma_wait<0>();
      pin(state);
      __syncwarp(); /* what the others read is read */
      if (lane == 0) {
        barrier_arrive(empty + stage * 8);
        barrier_arrive(weighed_empty + buffer * 8);
      }
      if (writer) tile_write<T>(part_tile, STATE_STRIDE, state);
      proxy_fence();
      named_sync(1, 256);
      out_store<T, false>(p, w, group ? &p.o : &p.d_w, group ? p.out : p.d_w_out, shared, base,
                          out_tile, TILES, 0, token, valid);
    }
    if (w.last && p.final.data && writer) {
      const state_view &view = p.final;
      matrix_write(state, state_at(view, w) + 64 * part * view.row, view.row, view.column,
                   view.scale);
    }
  }
  if (leader) tensor_store_wait();
}

} // namespace additive

#endif
