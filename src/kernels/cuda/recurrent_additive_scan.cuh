/* The additive update by chunks of 64 tokens. With G_i the sum of log2 alpha over the chunk's
 * tokens up to i, G_all that of the whole chunk, and S the state before it,
 *
 *   O = scale (2^{G_i} (Q S) + (Q K^T (.) 2^{G_i - G_j} [i >= j]) V),
 *   S = 2^{G_all} S + (2^{G_all - G_j} K)^T V.
 *
 * Every exponent is <= 0, whatever the decay.
 *
 * In reverse (from the last chunk to the first, and i <= j) the part of G_i is played by G_all -
 * G_i: the token's own decay does not act between it and later tokens, and G_all - (G_all - G_j) =
 * G_j weighs what enters the state. So all of the arithmetic is common: a row's exponent A_i, a
 * column's A_j, and G_all.
 *
 * A block holds one or two consumer warpgroups, 64 value columns each, that share Q and K but not
 * their part of the state: float32 in registers, and rounded in shared memory as the B operand of
 * Q S. A producer warp fills a ring of chunks by bulk tensor copies. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_SCAN_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_SCAN_CUH

#include "kernels/cuda/recurrent_additive_gradients.cuh"

namespace additive {

/* States and outputs. Each warpgroup has 64 columns of the state. */
template <typename T, scan_kind KIND, int DK, int DV, bool CHANNEL>
__device__ void consume(const scan_parameters &p, char *shared, uint32_t base) {
  typedef shape<KIND, DK, DV, CHANNEL> S;
  constexpr int M = DK / 64;
  constexpr bool OUTPUT = KIND == OUTPUTS;
  const int lane = threadIdx.x % 32, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int group = threadIdx.x / 128 - 1;
  const uint32_t full = base + S::barriers_offset, empty = full + S::stages * 8;
  const uint32_t weighed_full = base + S::weighed_barriers_offset,
                 weighed_empty = weighed_full + 16;
  const uint32_t state_tile = base + S::state_offset + group * M * TILE_BYTES;
  const uint32_t out_tile = base + S::out_offset + group * TILE_BYTES;
  const bool leader = threadIdx.x % 128 == 0;
  int step = 0;
  for (int item = blockIdx.x; item < item_count<KIND>(p); item += gridDim.x) {
    work w;
    if (!locate<KIND == STATES>(p, item, &w)) continue;
    float state[M][32];
#pragma unroll
    for (int m = 0; m < M; m++) {
      if (OUTPUT && p.states) {
        pairs_read(state[m], p.states + w.slot * DK * DV + 64 * (m * DV + group), DV);
      } else if (OUTPUT && p.initial.data) {
        const state_view &view = p.initial;
        matrix_read(state[m], state_at(view, w) + 64 * (m * view.row + group * view.column),
                    view.row, view.column, view.scale);
      } else {
#pragma unroll
        for (int i = 0; i < 32; i++) state[m][i] = 0;
      }
      if (OUTPUT) tile_write<T>(state_tile + m * TILE_BYTES, 0, state[m]);
    }
    if (OUTPUT) {
      proxy_fence();
      named_sync(1 + group, 128);
    }
    float total = 0;
    for (cursor c; advance<CHANNEL>(p, w, &c); step++) {
      const int token = c.token, valid = c.valid;
      const int stage = step % S::stages, buffer = step % 2;
      const uint32_t q_tile = base + stage * S::stage_bytes, k_tile = q_tile + S::k_offset;
      const uint32_t v_tile = q_tile + S::v_offset + group * TILE_BYTES;
      const uint32_t weighed_tile =
          CHANNEL ? k_tile : base + S::weighed_offset + buffer * S::weighed_bytes;
      const float *exponents = (float *)(shared + S::exponents_offset) + stage * S::exponents;
      barrier_wait(full + stage * 8, step / S::stages % 2);
      if (valid < CHUNK) barrier_wait(weighed_full + buffer * 8, step / 2 % 2);
      const float all = exponents[CHUNK], state_decay = exp2_approximate(all);
      total += all;

      float scores[32], out[32];
      uint32_t q[DK / 16][4], weights[CHUNK / 16][4], partner[16];
      if (OUTPUT && p.products) {
        const T *rows = (const T *)p.partner + (p.offsets ? 0 : w.batch * p.partner_step.batch) +
                        w.head / p.partner_group * p.partner_step.head + 64 * group + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < 16; j++) {
          const int row = row0 + j % 2 * 8;
          partner[j] = 0;
          if (row < valid)
            partner[j] = *(const uint32_t *)(rows + (w.start + token + row) * p.partner_step.token +
                                             j / 2 * 8);
        }
      }
      if (OUTPUT) {
        rows_load(q, q_tile);
        if constexpr (CHANNEL) {
          rows_load(weights, q_tile + S::weights_offset);
          pin(out);
          wgmma_fence();
        } else {
          pin(scores);
          pin(out);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < DK / 16; k++) /* Q K^T */
            wgmma<T, 0>(scores, q[k], descriptor(k_tile + k / 4 * TILE_BYTES + k % 4 * 32), k > 0);
          wgmma_commit();
        }
#pragma unroll
        for (int k = 0; k < DK / 16; k++) /* Q S */
          wgmma<T, 1>(out, q[k], descriptor(state_tile + k * 2048), k > 0);
        wgmma_commit();
      }
      if (OUTPUT) {
        const float exponent0 = exponents[row0] + p.log2_scale;
        const float exponent1 = exponents[row0 + 8] + p.log2_scale;
        const float weight0 = exp2_approximate(exponent0), weight1 = exp2_approximate(exponent1);
        if constexpr (!CHANNEL) {
          wgmma_wait<1>();
          pin(scores);
          weigh<T>(weights, scores, exponents, exponent0, exponent1, p.reverse);
        }
        wgmma_wait<0>();
        pin(out);
#pragma unroll
        for (int j = 0; j < 32; j++) out[j] *= j % 4 < 2 ? weight0 : weight1;
        pin(out);
      }
      /* Not before: registers of a wgmma may not be written while another one runs. */
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int j = 0; j < 32 && !CHANNEL; j++) state[m][j] *= state_decay;
        pin(state[m]);
      }
      barrier_wait(weighed_full + buffer * 8, step / 2 % 2);
      wgmma_fence();
      if (OUTPUT) {
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++)
          wgmma<T, 1>(out, weights[k], descriptor(v_tile + k * 2048), 1);
        wgmma_commit();
      }
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++)
          wgmma<T, 1, 1>(state[m], descriptor(weighed_tile + m * TILE_BYTES + k * 2048),
                         descriptor(v_tile + k * 2048), 1);
      wgmma_commit();

      if (OUTPUT) {
        wgmma_wait<1>();
        pin(out);
        /* From here on nobody in the group reads the old state, nor a copy the old output. */
        if (leader) tensor_store_read();
        named_sync(1 + group, 128);
        tile_write<T>(out_tile, 0, out);
        if (p.products) {
          float sums[2] = {0, 0};
#pragma unroll
          for (int j = 0; j < 16; j++) {
            const float2 pair = element<T>::unpack(partner[j]);
            sums[j % 2] += pair.x * out[2 * j] + pair.y * out[2 * j + 1];
          }
          products_write(p, w, sums, token, valid, group);
        }
      }
      wgmma_wait<0>();
#pragma unroll
      for (int m = 0; m < M; m++) pin(state[m]);
      if (CHANNEL) {
#pragma unroll
        for (int m = 0; m < M; m++) {
          const float factor0 = exponents[CHUNK + 4 + 64 * m + row0];
          const float factor1 = exponents[CHUNK + 4 + 64 * m + row0 + 8];
#pragma unroll
          for (int j = 0; j < 32; j++) state[m][j] *= j % 4 < 2 ? factor0 : factor1;
        }
      }
      __syncwarp(); /* what the others read is read */
      if (lane == 0) {
        barrier_arrive(empty + stage * 8);
        barrier_arrive(weighed_empty + buffer * 8);
      }
      if (OUTPUT) {
#pragma unroll
        for (int m = 0; m < M; m++) tile_write<T>(state_tile + m * TILE_BYTES, 0, state[m]);
        proxy_fence();
        named_sync(1 + group, 128);
        out_store<T, CHANNEL>(p, w, &p.o, p.out, shared, base, out_tile, 1, 64 * group, token,
                              valid);
      }
    }
    if (!OUTPUT) {
#pragma unroll
      for (int m = 0; m < M; m++)
        pairs_write(state[m], p.added + w.slot * DK * DV + 64 * (m * DV + group), DV);
      if (!CHANNEL && leader && group == 0) p.totals[w.slot] = total;
    } else if (w.last && p.final.data) {
      const state_view &view = p.final;
#pragma unroll
      for (int m = 0; m < M; m++)
        matrix_write(state[m], state_at(view, w) + 64 * (m * view.row + group * view.column),
                     view.row, view.column, view.scale);
    }
  }
  if (OUTPUT && leader) tensor_store_wait();
}

template <typename T, scan_kind KIND, int DK, int DV, bool CHANNEL>
__global__ void __launch_bounds__(shape<KIND, DK, DV, CHANNEL>::threads,
                                  shape<KIND, DK, DV, CHANNEL>::blocks)
    scan(const __grid_constant__ scan_parameters p) {
  typedef shape<KIND, DK, DV, CHANNEL> S;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t base = shared_address(shared);
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::stages; stage++) {
      barrier_init(base + S::barriers_offset + stage * 8, 1);
      barrier_init(base + S::barriers_offset + (S::stages + stage) * 8, 4 * S::consumers);
    }
    for (int buffer = 0; buffer < 2; buffer++) {
      barrier_init(base + S::weighed_barriers_offset + buffer * 8, 3);
      barrier_init(base + S::weighed_barriers_offset + 16 + buffer * 8, 4 * S::consumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if (S::moves_registers) registers_fewer<S::producer_registers>();
    if (threadIdx.x < 32)
      produce<KIND, S, CHANNEL>(p, shared, base);
    else
      weigh_keys<T, KIND, S, CHANNEL>(p, shared, base);
  } else if constexpr (KIND == GRADIENTS) {
    registers_more<S::consumer_registers>();
    if (threadIdx.x < 256)
      consume_gradients<T, DK, 0>(p, shared, base);
    else
      consume_gradients<T, DK, 1>(p, shared, base);
  } else {
    if (S::moves_registers) registers_more<S::consumer_registers>();
    consume<T, KIND, DK, DV, CHANNEL>(p, shared, base);
  }
}

/* From what each part of each segment adds to the state before each segment. A thread has four
 * elements of one state. */
template <int DK, int DV, bool CHANNEL>
__global__ void chain_segments(const __grid_constant__ scan_parameters p) {
  constexpr int BATCH = 16, SIZE = DK * DV / 4; /* loads in flight; of a state in vectors */
  const int element = blockIdx.x * blockDim.x + threadIdx.x, pair = blockIdx.y;
  work w;
  locate<false>(p, pair, &w); /* the first segment */
  const int chunks = (w.length + CHUNK - 1) / CHUNK;
  const int segments = max(1, (chunks + p.segment_chunks - 1) / p.segment_chunks);
  const float constant = constant_decay(p, w.head);
  float4 *states = (float4 *)p.states + w.slot * SIZE + element;
  const float4 *added = (const float4 *)p.added + w.slot * p.parts * SIZE + element;
  const float *totals = p.totals + w.slot * p.parts * (CHANNEL ? DK : 1);
  float4 running = make_float4(0, 0, 0, 0);
  if (p.initial.data) {
    const int64_t step = p.initial.column;
    const float *data =
        state_at(p.initial, w) + element * 4 / DV * p.initial.row + element * 4 % DV * step;
    running = make_float4(p.initial.scale * data[0], p.initial.scale * data[step],
                          p.initial.scale * data[2 * step], p.initial.scale * data[3 * step]);
  }
  /* The parts that count are the last ones of each segment, from first_part on. */
  int first_part = 0, parts = 0, first, last;
  const auto enter = [&](int segment) {
    const int count = segment == 0 ? w.count : p.segment_chunks;
    parts = (count + p.part_chunks - 1) / p.part_chunks;
    first_part = 0;
    while (first_part < parts && !part_range(p, constant, count, first_part, &first, &last))
      first_part++;
  };
  enter(0);
  int segment = 0, part = first_part, state = 0; /* to be loaded next; to be written next */
  while (segment < segments - 1) {
    float4 terms[BATCH];
    float decays[BATCH];
    bool begins[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      terms[i] = make_float4(0, 0, 0, 0);
      decays[i] = 1;
      begins[i] = false;
      if (segment == segments - 1) continue;
      const int slot = segment * p.parts + part;
      terms[i] = added[(int64_t)slot * SIZE];
      decays[i] =
          CHANNEL ? totals[(int64_t)slot * DK + element * 4 / DV] : exp2_approximate(totals[slot]);
      begins[i] = part == first_part;
      /* What comes before parts that do not count counts even less. */
      if (begins[i] && first_part > 0) decays[i] = 0;
      if (++part == parts) {
        if (++segment < 2) enter(1);
        part = first_part;
      }
    }
#pragma unroll
    for (int i = 0; i < BATCH; i++) {
      if (begins[i]) states[(int64_t)state++ * SIZE] = running;
      running.x = decays[i] * running.x + terms[i].x;
      running.y = decays[i] * running.y + terms[i].y;
      running.z = decays[i] * running.z + terms[i].z;
      running.w = decays[i] * running.w + terms[i].w;
    }
  }
  states[(int64_t)(segments - 1) * SIZE] = running;
}

} // namespace additive

#endif
