/* The delta rule backward for bfloat16 and float16.
 *
 * In the terms of recurrent_chunks.cuh, with dS' the gradient of the state after a chunk, and
 * everything but the final gradients divided by `scale` (all of them are linear in dO):
 *   dV' = P^T dO + Kk dS'      dU = L^T dV', L = (I + Diag(beta) B)^-1      dR = Diag(beta) dU = dV
 *   dS  = Diag(exp(G_C)) dS' + Qg^T dO - Kg^T dR
 *   dP  = dO V'^T,  dB = -dR V'^T,  dQg = dO S^T,  dKg = -dR S^T,  dKk = V' dS'^T
 *   dbeta_i = dU_i . X_i
 * and dq, dk collect what P, B, Qg, Kg and Kk pass on. The decay's gradient, by token or by
 * channel: dG_i = q_i dq_i + k_i dk_i (as read by B, Kg) - k_i dk_i (as written, by P and B) w_i  =
 * k_i dk_i (as written, by Kk) dg_t = sum_{i >= t} dG_i + exp(G_C) S . dS' + sum_{i < t} w_i Four
 * kernels: chunks are prepared; a forward sweep keeps S and X; a backward sweep keeps dS' and dU;
 * then every chunk finds its gradients by itself. */
#include <cstdio>

#include "kernels/cuda/recurrent_chunks_step.cuh"

using namespace chunked;

namespace {

struct backward_parameters {
  parameters in; /* without outputs */
  rows<const void> d_o;
  rows<void> d_q, d_k, d_v;
  rows<float> d_decay, d_beta;
  states d_final, d_initial;
  /* Workspace, indexed by (sequence and chunk, value head): S^T and dS'^T [columns, DIM]; X and dU
   * [64, columns]. With grouped heads also the gradients of q and k of every value head, float32
   * [sequence and chunk, value head, 64, DIM]. */
  void *state, *d_state, *x, *d_u;
  float *head_d_q, *head_d_k;
};

/* The slab to rows of [columns, DIM]. */
template <typename E, int DIM> __device__ void keep_slab(const slab<DIM> &s, E *to, int lane) {
  E *row = to + lane / 4 * DIM + lane % 4 * 2;
#pragma unroll
  for (int n = 0; n < DIM / 8; ++n) {
    *(uint32_t *)(row + 8 * n) = pack<E>(s.s[n][0], s.s[n][1]);
    *(uint32_t *)(row + 8 * DIM + 8 * n) = pack<E>(s.s[n][2], s.s[n][3]);
  }
}

template <int DIM> __device__ void scale_slab(slab<DIM> &s, float factor) {
#pragma unroll
  for (int n = 0; n < DIM / 8; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) s.s[n][i] *= factor;
}

/* out[16, 64] += x[16, 64] l for the lower triangular l. */
template <typename E>
__device__ void times_lower_transposed(float (&out)[8][4], const uint32_t (&x)[SUBBLOCKS][4],
                                       const E *l, int lane) {
#pragma unroll
  for (int j = 0; j < SUBBLOCKS; ++j)
#pragma unroll
    for (int i = j; i < SUBBLOCKS; ++i) {
      uint32_t b[4];
      load_right_transposed(b, l + i * 16 * SQUARE + j * 16, SQUARE, lane);
      product<E>(out[2 * j], x[i], b[0], b[1]);
      product<E>(out[2 * j + 1], x[i], b[2], b[3]);
    }
}

/* Loads what a sweep needs of one chunk: `forward` Kg, Kk, Y and `values` = V, else Qg, Kg, Kk, L,
 * P and `values` = dO. */
template <typename E, int DIM, bool CHANNEL>
__device__ void fetch(const parameters &p, bool forward, const rows<const void> &values,
                      const tiles<E, DIM, CHANNEL> &tile, E *v, const sequence &s, int64_t slot,
                      int64_t chunk, int head, int column, int columns) {
  using record_type = record<DIM, CHANNEL>;
  constexpr int LD = pitch<DIM>();
  int thread = threadIdx.x, threads = blockDim.x;
  int64_t first = chunk * CHUNK;
  int tokens = (int)min((int64_t)CHUNK, s.tokens - first);
  const char *from =
      p.prepared + ((slot * p.chunks + chunk) * p.value_heads + head) * record_type::BACKWARD_BYTES;
  if (CHANNEL) {
    int skipped = forward ? CHUNK : 0, count = 3 * CHUNK - skipped;
    copy_rows(tile.q() + skipped * LD, LD, (const E *)from + skipped * DIM, DIM, count, DIM, count,
              thread, threads);
  } else {
    copy_keys(p, tile, s, first, tokens, head, thread, threads);
  }
  copy_rows(tile.y(), SQUARE, (const E *)(from + (forward ? record_type::Y : record_type::LEFT)),
            CHUNK, CHUNK, CHUNK, CHUNK, thread, threads);
  if (!forward)
    copy_rows(tile.p(), SQUARE, (const E *)(from + record_type::Y) + CHUNK * CHUNK, CHUNK, CHUNK,
              CHUNK, CHUNK, thread, threads);
  for (int at = thread; at < tile.NUMBERS / 4; at += threads)
    copy_async(tile.beta() + 4 * at, from + record_type::NUMBERS + 16 * at, true);
  rows<const E> source = as<E>(values);
  copy_rows(v, columns + 8, source.at(s.batch, s.first + first, head) + column, source.token, CHUNK,
            columns, tokens, thread, threads);
  copy_commit();
}

template <typename E, int DIM, bool CHANNEL, bool FORWARD>
__global__ void __launch_bounds__(256) sweep_kernel(backward_parameters all) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL>;
  const parameters &p = all.in;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int columns = blockDim.x / 32 * SLAB, column = blockIdx.x * columns, head = blockIdx.y;
  int stage_bytes = tile_type::BYTES + CHUNK * (columns + 8) * 2;
  int64_t slot = blockIdx.z;
  sequence s = find_sequence(p.offsets, p.length, (int)slot);
  int64_t chunks = (s.tokens + CHUNK - 1) / CHUNK;
  int own = column + warp * SLAB, ld = columns + 8;
  const rows<const void> &values = FORWARD ? p.v : all.d_o;
  auto tile_of = [&](int64_t step) { return tile_type{memory + step % 2 * stage_bytes}; };
  auto fetch_step = [&](int64_t step) {
    tile_type tile = tile_of(step);
    fetch(p, FORWARD, values, tile, (E *)(tile.base + tile_type::BYTES), s, slot,
          FORWARD ? step : chunks - 1 - step, head, column, columns);
  };

  slab<DIM> state;
  states given = FORWARD ? p.initial : all.d_final;
  load_slab(state, given.data ? given.at(slot, head) + own : NULL, given.row, lane);
  if (!FORWARD) scale_slab(state, 1 / p.scale);
  if (chunks) fetch_step(0);
  for (int64_t step = 0; step < chunks; ++step) {
    if (step + 1 < chunks)
      fetch_step(step + 1);
    else
      copy_commit();
    copy_wait<1>();
    __syncthreads();
    int64_t chunk = FORWARD ? step : chunks - 1 - step;
    int64_t at = (slot * p.chunks + chunk) * p.value_heads + head;
    tile_type tile = tile_of(step);
    E *v = (E *)(tile.base + tile_type::BYTES) + warp * SLAB;
    E *kept = (E *)(FORWARD ? all.state : all.d_state) + (at * p.columns + own) * DIM;
    keep_slab<E>(state, kept, lane);
    float r[8][4] = {};
    uint32_t x[SUBBLOCKS][4];
    if (FORWARD) {
      times_rows<E>(r, state, tile.k(), lane);
      residual(r, v, ld, CHANNEL ? NULL : tile.gamma(), lane);
      tokens_operand<E>(x, r, NULL, lane);
      clear(r);
      times_lower(r, x, tile.y(), lane);
      store_transposed(v, ld, r, 1, lane);
      scale_tokens(r, tile.beta(), lane);
      tokens_operand<E>(x, r, CHANNEL ? NULL : tile.kappa(), lane);
      decay_slab<DIM, CHANNEL>(state, tile.full(), lane);
      add_outer(state, x, CHANNEL ? tile.written() : tile.k(), lane);
    } else {
      uint32_t d_o[SUBBLOCKS][4];
#pragma unroll
      for (int j = 0; j < SUBBLOCKS; ++j) load_left_transposed(d_o[j], v + 16 * j * ld, ld, lane);
      times_rows<E>(r, state, CHANNEL ? tile.written() : tile.k(), lane);
      if (!CHANNEL) scale_tokens(r, tile.kappa(), lane);
      times_lower_transposed(r, d_o, tile.p(), lane);
      tokens_operand<E>(x, r, NULL, lane);
      clear(r);
      times_lower_transposed(r, x, tile.y(), lane);
      __syncwarp();
      store_transposed(v, ld, r, 1, lane);
      scale_tokens(r, tile.beta(), lane);
#pragma unroll
      for (int n = 0; n < 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) r[n][i] = -r[n][i];
      tokens_operand<E>(x, r, CHANNEL ? NULL : tile.gamma(), lane);
      decay_slab<DIM, CHANNEL>(state, tile.full(), lane);
      add_outer(state, x, tile.k(), lane);
      if (!CHANNEL) scale_operand<E>(d_o, tile.gamma(), lane);
      add_outer(state, d_o, tile.q(), lane);
    }
    __syncwarp();
    E *out = (E *)(FORWARD ? all.x : all.d_u) + at * CHUNK * p.columns + own;
    write_slab(out, p.columns, v, ld, CHUNK, lane);
    __syncthreads();
  }
  if (!FORWARD && all.d_initial.data) {
    scale_slab(state, p.scale);
    store_slab(state, all.d_initial.at(slot, head) + own, all.d_initial.row, lane);
  }
}

/* ---- Gradients of a chunk ---- */

enum { GRADIENT_THREADS = 256, GRADIENT_COLUMNS = 64 /* value columns at once */ };

/* Shared memory. What the first phase reads of the values and states lies where the second one has
 * decayed rows, and in the third one the sums. */
template <int DIM, bool CHANNEL> struct gradient_layout {
  enum {
    LD = DIM + 8,
    LF = DIM + 4,
    LV = GRADIENT_COLUMNS + 8,
    ROWS = CHUNK * LD * 2,
    SUMS = CHUNK * LF * 4,
    Q = 0,
    K = Q + ROWS,
    N_P = K + ROWS, /* what P and B get, masked */
    N_B = N_P + CHUNK * SQUARE * 2,
    NUMBERS =
        N_B + CHUNK * SQUARE * 2, /* beta, G, gamma, kappa; two sums of each token; boundary */
    TOTAL = NUMBERS + (8 * CHUNK + DIM) * 4, /* of subblocks [4, DIM]; group sums [2][4, DIM] */
    DECAY = TOTAL + (CHANNEL ? 12 * DIM * 4 : 0),
    SHARED = DECAY + (CHANNEL ? SUMS : 0),
    FIRST = 3 * CHUNK * LV * 2 + 2 * GRADIENT_COLUMNS * LD * 2,
    LATER = CHANNEL ? 4 * SUMS : 0,
    BYTES = SHARED + (FIRST > LATER ? FIRST : LATER),
  };
};

/* acc[16, 8 * 2 N] += a x[16, 16 N] */
template <typename E, int N>
__device__ void add_product(float (&acc)[N][4], const uint32_t (&a)[4], const E *x, int ld,
                            int lane) {
#pragma unroll
  for (int n = 0; n < N / 2; ++n) {
    uint32_t b[4];
    load_right_transposed(b, x + 16 * n, ld, lane);
    product<E>(acc[2 * n], a, b[0], b[1]);
    product<E>(acc[2 * n + 1], a, b[2], b[3]);
  }
}

/* One element of dq or dk, and its neighbour: to the caller's tensor, or to the value head's part.
 */
template <typename E>
__device__ void store_pair(const rows<void> &to, float *part, const parameters &p,
                           const sequence &s, int64_t first, int i, int tokens, int head, int c,
                           int dim, int64_t at, float x, float y) {
  if (i >= tokens) return;
  if (p.group > 1) {
    if (part) *(float2 *)(part + (at * CHUNK + i) * dim + c) = make_float2(x, y);
  } else if (to.data) {
    *(uint32_t *)(as<E>(to).at(s.batch, s.first + first + i, head) + c) = pack<E>(x, y);
  }
}

template <typename E, int DIM, bool CHANNEL>
__global__ void __launch_bounds__(GRADIENT_THREADS, 1) gradient_kernel(backward_parameters all) {
  extern __shared__ __align__(16) char memory[];
  using layout = gradient_layout<DIM, CHANNEL>;
  constexpr int LD = layout::LD, LV = layout::LV, LF = layout::LF, N = DIM / 16;
  const parameters &p = all.in;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  int block = warp % 4, row = block * 16, side = warp / 4, half = side * (DIM / 2);
  int head = blockIdx.y;
  int64_t chunk = blockIdx.x % p.chunks, first = chunk * CHUNK;
  sequence s = find_sequence(p.offsets, p.length, (int)(blockIdx.x / p.chunks));
  if (first >= s.tokens) return;
  int64_t at = (int64_t)blockIdx.x * p.value_heads + head;
  chunk_gates gates = gates_of<E>(p, s, first, head);
  int tokens = gates.tokens;

  E *q = (E *)(memory + layout::Q), *k = (E *)(memory + layout::K);
  E *n_p = (E *)(memory + layout::N_P), *n_b = (E *)(memory + layout::N_B);
  float *beta = (float *)(memory + layout::NUMBERS), *sum = beta + CHUNK, *gamma = sum + CHUNK;
  float *kappa = gamma + CHUNK, *token_sums = kappa + CHUNK, *boundary = beta + 8 * CHUNK;
  float *total = (float *)(memory + layout::TOTAL), *group_sums = total + 4 * DIM;
  float *own_sum = (float *)(memory + layout::DECAY); /* G inside the subblock [64, LF] */

  /* Gates. */
  rows<const E> all_q = as<E>(p.q), all_k = as<E>(p.k);
  copy_rows(q, LD, all_q.at(s.batch, s.first + first, head / p.group), all_q.token, CHUNK, DIM,
            tokens, thread, GRADIENT_THREADS);
  copy_rows(k, LD, all_k.at(s.batch, s.first + first, head / p.group), all_k.token, CHUNK, DIM,
            tokens, thread, GRADIENT_THREADS);
  copy_commit();
  if (thread < CHUNK) {
    beta[thread] = thread < tokens ? gates.beta[thread * gates.beta_token] : 0;
    for (int i = 0; i < 4; ++i) token_sums[i * CHUNK + thread] = 0;
  }
  if (CHANNEL) {
    for (int c = thread; c < SUBBLOCKS * DIM; c += GRADIENT_THREADS) {
      int b = c / DIM, channel = c % DIM;
      float running = 0;
#pragma unroll
      for (int i = b * SUBBLOCK; i < b * SUBBLOCK + SUBBLOCK; ++i) {
        if (i < tokens) running += log2_decay(gates.decay[i * gates.decay_token + channel]);
        own_sum[i * LF + channel] = running;
      }
      total[c] = running;
    }
  } else if (warp == 1 && lane == 0) {
    float running = 0;
    for (int i = 0; i < CHUNK; ++i) {
      if (gates.decay && i < tokens) running += log2_decay(gates.decay[i * gates.decay_token]);
      sum[i] = running;
    }
  }
  __syncthreads();
  if (!CHANNEL && thread < CHUNK) {
    gamma[thread] = power_of_two(sum[thread]);
    kappa[thread] = power_of_two(sum[CHUNK - 1] - sum[thread]);
  }

  /* Everything that values and states give. */
  float d_p[4][4] = {}, d_b[4][4] = {}; /* dO X^T and dU X^T; rows `row`, columns 32 side.. */
  float d_qg[N][4] = {}, d_kg[N][4] = {}, d_kk[N][4] = {}; /* columns half.. */
  constexpr int PAIRS = DIM / 2, PARTS = GRADIENT_THREADS / PAIRS;
  float2 of_boundary = {0, 0};
  E *d_o = (E *)(memory + layout::SHARED), *x = d_o + CHUNK * LV, *d_u = x + CHUNK * LV;
  E *state = d_u + CHUNK * LV, *d_state = state + GRADIENT_COLUMNS * LD;
  rows<const E> all_d_o = as<E>(all.d_o);
  for (int v = 0; v < p.columns; v += GRADIENT_COLUMNS) {
    int columns = min((int)GRADIENT_COLUMNS, p.columns - v);
    __syncthreads();
    for (int piece = thread; piece < CHUNK * GRADIENT_COLUMNS / 8; piece += GRADIENT_THREADS) {
      int i = piece / (GRADIENT_COLUMNS / 8), c = piece % (GRADIENT_COLUMNS / 8) * 8;
      bool inside = c < columns, given = inside && i < tokens;
      int64_t from = at * CHUNK * p.columns + (int64_t)i * p.columns + v + (inside ? c : 0);
      copy_async(x + i * LV + c, (const E *)all.x + from, inside);
      copy_async(d_u + i * LV + c, (const E *)all.d_u + from, inside);
      copy_async(d_o + i * LV + c,
                 all_d_o.at(s.batch, s.first + first + (given ? i : 0), head) + v +
                     (inside ? c : 0),
                 given);
    }
    int64_t from = (at * p.columns + v) * DIM;
    copy_rows(state, LD, (const E *)all.state + from, DIM, GRADIENT_COLUMNS, DIM, columns, thread,
              GRADIENT_THREADS);
    copy_rows(d_state, LD, (const E *)all.d_state + from, DIM, GRADIENT_COLUMNS, DIM, columns,
              thread, GRADIENT_THREADS);
    copy_commit();
    copy_wait<0>();
    __syncthreads();
#pragma unroll
    for (int c = 0; c < GRADIENT_COLUMNS; c += 16) {
      uint32_t of_d_o[4], of_d_u[4], of_x[4], b[4];
      load_left(of_d_o, d_o + row * LV + c, LV, lane);
      load_left(of_d_u, d_u + row * LV + c, LV, lane);
      load_left(of_x, x + row * LV + c, LV, lane);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (side * 2 + j <= block) {
          load_right(b, x + (side * 32 + j * 16) * LV + c, LV, lane);
#pragma unroll
          for (int n = 0; n < 2; ++n) {
            product<E>(d_p[2 * j + n], of_d_o, b[2 * n], b[2 * n + 1]);
            product<E>(d_b[2 * j + n], of_d_u, b[2 * n], b[2 * n + 1]);
          }
        }
#pragma unroll
      for (int n = 0; n < N / 2; ++n) {
        load_right_transposed(b, state + c * LD + half + 16 * n, LD, lane);
        product<E>(d_qg[2 * n], of_d_o, b[0], b[1]);
        product<E>(d_qg[2 * n + 1], of_d_o, b[2], b[3]);
        product<E>(d_kg[2 * n], of_d_u, b[0], b[1]);
        product<E>(d_kg[2 * n + 1], of_d_u, b[2], b[3]);
        load_right_transposed(b, d_state + c * LD + half + 16 * n, LD, lane);
        product<E>(d_kk[2 * n], of_x, b[0], b[1]);
        product<E>(d_kk[2 * n + 1], of_x, b[2], b[3]);
      }
    }
    for (int i = thread / PAIRS; i < GRADIENT_COLUMNS; i += PARTS) {
      float2 a = unpack<E>(*(const uint32_t *)(state + i * LD + thread % PAIRS * 2));
      float2 b = unpack<E>(*(const uint32_t *)(d_state + i * LD + thread % PAIRS * 2));
      of_boundary.x += a.x * b.x, of_boundary.y += a.y * b.y;
    }
    if (all.d_v.data)
      for (int pair = thread; pair < tokens * columns / 2; pair += GRADIENT_THREADS) {
        int i = pair / (columns / 2), c = pair % (columns / 2) * 2;
        float2 y = unpack<E>(*(const uint32_t *)(d_u + i * LV + c));
        float f = beta[i] * p.scale;
        *(uint32_t *)(as<E>(all.d_v).at(s.batch, s.first + first + i, head) + v + c) =
            pack<E>(f * y.x, f * y.y);
      }
  }
  __syncthreads(); /* the values' memory is free */

  /* What P and B get. */
#pragma unroll
  for (int n = 0; n < 4; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int i = row + g + 8 * r, j = side * 32 + n * 8 + 2 * t;
      float p_ij[2], b_ij[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float decay = i < j + e ? 0 : CHANNEL ? 1 : power_of_two(sum[i] - sum[j + e]);
        p_ij[e] = decay * beta[j + e] * d_p[n][2 * r + e];
        b_ij[e] = i == j + e ? 0 : -decay * beta[i] * beta[j + e] * d_b[n][2 * r + e];
        if (i == j + e && i < tokens && all.d_beta.data)
          *all.d_beta.at(s.batch, s.first + first + i, head) = p.scale * d_b[n][2 * r + e];
      }
      *(uint32_t *)(n_p + i * SQUARE + j) = pack<E>(p_ij[0], p_ij[1]);
      *(uint32_t *)(n_b + i * SQUARE + j) = pack<E>(b_ij[0], b_ij[1]);
    }
  float2 *boundary_parts = (float2 *)(memory + layout::SHARED);
  boundary_parts[thread] = of_boundary;
  __syncthreads();
  if (thread < PAIRS) {
    float2 x = {0, 0};
    for (int i = 0; i < PARTS; ++i)
      x.x += boundary_parts[i * PAIRS + thread].x, x.y += boundary_parts[i * PAIRS + thread].y;
    float2 full = {0, 0};
    if (CHANNEL) {
      for (int b = 0; b < SUBBLOCKS; ++b) {
        float2 y = *(const float2 *)(total + b * DIM + 2 * thread);
        full.x += y.x, full.y += y.y;
      }
      full.x = power_of_two(full.x), full.y = power_of_two(full.y);
    } else {
      full.x = full.y = gamma[CHUNK - 1];
    }
    *(float2 *)(boundary + 2 * thread) = make_float2(full.x * x.x, full.y * x.y);
  }
  __syncthreads();

  if (!CHANNEL) {
    /* d_qg becomes dq, d_kg what k gets as read, pairs what it gets as written by P and B. */
    float pairs[N][4] = {};
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int i = row + g + e / 2 * 8;
        d_qg[n][e] *= gamma[i];
        d_kg[n][e] *= -beta[i] * gamma[i];
        d_kk[n][e] *= beta[i] * kappa[i];
      }
#pragma unroll
    for (int b = 0; b < SUBBLOCKS; ++b) {
      uint32_t a[4];
      if (b <= block) {
        load_left(a, n_p + row * SQUARE + b * 16, SQUARE, lane);
        add_product(d_qg, a, k + b * 16 * LD + half, LD, lane);
        load_left(a, n_b + row * SQUARE + b * 16, SQUARE, lane);
        add_product(d_kg, a, k + b * 16 * LD + half, LD, lane);
      }
      if (b >= block) {
        load_left_transposed(a, n_p + b * 16 * SQUARE + row, SQUARE, lane);
        add_product(pairs, a, q + b * 16 * LD + half, LD, lane);
        load_left_transposed(a, n_b + b * 16 * SQUARE + row, SQUARE, lane);
        add_product(pairs, a, k + b * 16 * LD + half, LD, lane);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int i = row + g + 8 * r;
      float d_g = 0, w = 0;
#pragma unroll
      for (int n = 0; n < N; ++n) {
        int c = half + 8 * n + 2 * t;
        float2 q_i = unpack<E>(*(const uint32_t *)(q + i * LD + c));
        float2 k_i = unpack<E>(*(const uint32_t *)(k + i * LD + c));
        const float *dq = d_qg[n] + 2 * r, *read = d_kg[n] + 2 * r;
        const float *written = pairs[n] + 2 * r, *kept = d_kk[n] + 2 * r;
        d_g += q_i.x * dq[0] + k_i.x * (read[0] - written[0]);
        d_g += q_i.y * dq[1] + k_i.y * (read[1] - written[1]);
        w += k_i.x * kept[0] + k_i.y * kept[1];
        store_pair<E>(all.d_q, all.head_d_q, p, s, first, i, tokens, head, c, DIM, at,
                      p.scale * dq[0], p.scale * dq[1]);
        store_pair<E>(all.d_k, all.head_d_k, p, s, first, i, tokens, head, c, DIM, at,
                      p.scale * (read[0] + written[0] + kept[0]),
                      p.scale * (read[1] + written[1] + kept[1]));
      }
      for (int d = 1; d < 4; d *= 2) {
        d_g += __shfl_xor_sync(~0u, d_g, d);
        w += __shfl_xor_sync(~0u, w, d);
      }
      if (t == 0)
        token_sums[2 * side * CHUNK + i] = d_g, token_sums[(2 * side + 1) * CHUNK + i] = w;
    }
    __syncthreads();
    if (warp || !all.d_decay.data) return;
    /* Lane l has the tokens 2 l, 2 l + 1. */
    float edge = 0, d_g[2], w[2];
    for (int c = lane; c < DIM; c += 32) edge += boundary[c];
    for (int d = 1; d < 32; d *= 2) edge += __shfl_xor_sync(~0u, edge, d);
    for (int e = 0; e < 2; ++e) {
      d_g[e] = token_sums[2 * lane + e] + token_sums[2 * CHUNK + 2 * lane + e];
      w[e] = token_sums[CHUNK + 2 * lane + e] + token_sums[3 * CHUNK + 2 * lane + e];
    }
    float after = d_g[0] + d_g[1], before = w[0] + w[1];
    for (int d = 1; d < 32; d *= 2) {
      float x = __shfl_down_sync(~0u, after, d), y = __shfl_up_sync(~0u, before, d);
      if (lane + d < 32) after += x;
      if (lane >= d) before += y;
    }
    before -= w[0] + w[1];
    for (int e = 0; e < 2; ++e) {
      int i = 2 * lane + e;
      float x = edge + (e ? after - d_g[0] : after) + (e ? before + w[0] : before);
      if (i < tokens) *all.d_decay.at(s.batch, s.first + first + i, head) = p.scale * x;
    }
    return;
  }

  /* Rows decayed from the border before their subblock, keys to the end of it. */
  E *q_prefix = (E *)(memory + layout::SHARED), *k_prefix = q_prefix + CHUNK * LD;
  E *k_suffix = k_prefix + CHUNK * LD;
  for (int pair = thread; pair < CHUNK * PAIRS; pair += GRADIENT_THREADS) {
    int i = pair / PAIRS, c = pair % PAIRS * 2;
    float2 own = *(const float2 *)(own_sum + i * LF + c);
    float2 last = *(const float2 *)(total + i / SUBBLOCK * DIM + c);
    float2 x = unpack<E>(*(const uint32_t *)(q + i * LD + c));
    float2 y = unpack<E>(*(const uint32_t *)(k + i * LD + c));
    float e0 = power_of_two(own.x), e1 = power_of_two(own.y);
    *(uint32_t *)(q_prefix + i * LD + c) = pack<E>(x.x * e0, x.y * e1);
    *(uint32_t *)(k_prefix + i * LD + c) = pack<E>(y.x * e0, y.y * e1);
    *(uint32_t *)(k_suffix + i * LD + c) =
        pack<E>(y.x * power_of_two(last.x - own.x), y.y * power_of_two(last.y - own.y));
  }
  __syncthreads();

  /* Pairs of different subblocks. Farther ones are decayed through the nearer ones' channels. */
  float from_q[N][4] = {}, from_k[N][4] = {}, onto_k[N][4] = {};
  auto decay_columns = [&](float(&acc)[N][4], int b) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float2 f = *(const float2 *)(total + b * DIM + half + 8 * n + 2 * t);
      float e0 = power_of_two(f.x), e1 = power_of_two(f.y);
      acc[n][0] *= e0, acc[n][1] *= e1, acc[n][2] *= e0, acc[n][3] *= e1;
    }
  };
  for (int b = 0; b < block; ++b) {
    uint32_t a[4];
    if (b) decay_columns(from_q, b), decay_columns(from_k, b);
    load_left(a, n_p + row * SQUARE + b * 16, SQUARE, lane);
    add_product(from_q, a, k_suffix + b * 16 * LD + half, LD, lane);
    load_left(a, n_b + row * SQUARE + b * 16, SQUARE, lane);
    add_product(from_k, a, k_suffix + b * 16 * LD + half, LD, lane);
  }
  for (int b = SUBBLOCKS - 1; b > block; --b) {
    uint32_t a[4];
    if (b < SUBBLOCKS - 1) decay_columns(onto_k, b);
    load_left_transposed(a, n_p + b * 16 * SQUARE + row, SQUARE, lane);
    add_product(onto_k, a, q_prefix + b * 16 * LD + half, LD, lane);
    load_left_transposed(a, n_b + b * 16 * SQUARE + row, SQUARE, lane);
    add_product(onto_k, a, k_prefix + b * 16 * LD + half, LD, lane);
  }
  /* d_qg becomes dq, d_kg dk, from_q the part of dG, d_kk w. */
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int i = row + g + 8 * r, c = half + 8 * n + 2 * t;
      float2 own = *(const float2 *)(own_sum + i * LF + c);
      float2 before = {0, 0}, after = {0, 0}, last = {0, 0};
#pragma unroll
      for (int b = 0; b < SUBBLOCKS; ++b) {
        float2 f = *(const float2 *)(total + b * DIM + c);
        if (b < block) before.x += f.x, before.y += f.y;
        if (b == block) last = f;
        if (b > block) after.x += f.x, after.y += f.y;
      }
      float2 q_i = unpack<E>(*(const uint32_t *)(q + i * LD + c));
      float2 k_i = unpack<E>(*(const uint32_t *)(k + i * LD + c));
      float2 q_p = unpack<E>(*(const uint32_t *)(q_prefix + i * LD + c));
      float2 k_p = unpack<E>(*(const uint32_t *)(k_prefix + i * LD + c));
      float2 k_s = unpack<E>(*(const uint32_t *)(k_suffix + i * LD + c));
      float of_beta = beta[i];
      auto finish = [&](int e, float own, float before, float last, float after, float q_i,
                        float k_i, float q_p, float k_p, float k_s) {
        float prefix = power_of_two(own), whole = power_of_two(before + own);
        float suffix = power_of_two(last - own), rest = power_of_two(after + last - own);
        float dq = whole * d_qg[n][e], read = -of_beta * whole * d_kg[n][e];
        float kept = of_beta * rest * d_kk[n][e];
        float d_g =
            q_i * dq + k_i * read + q_p * from_q[n][e] + k_p * from_k[n][e] - k_s * onto_k[n][e];
        d_qg[n][e] = dq + prefix * from_q[n][e];
        d_kg[n][e] = read + kept + prefix * from_k[n][e] + suffix * onto_k[n][e];
        d_kk[n][e] = k_i * kept;
        from_q[n][e] = d_g;
      };
      finish(2 * r, own.x, before.x, last.x, after.x, q_i.x, k_i.x, q_p.x, k_p.x, k_s.x);
      finish(2 * r + 1, own.y, before.y, last.y, after.y, q_i.y, k_i.y, q_p.y, k_p.y, k_s.y);
    }
  __syncthreads();
  float *d_q = (float *)(memory + layout::SHARED), *d_k = d_q + CHUNK * LF;
  float *d_g = d_k + CHUNK * LF, *w = d_g + CHUNK * LF;
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int to = (row + g + 8 * r) * LF + half + 8 * n + 2 * t;
      *(float2 *)(d_q + to) = make_float2(d_qg[n][2 * r], d_qg[n][2 * r + 1]);
      *(float2 *)(d_k + to) = make_float2(d_kg[n][2 * r], d_kg[n][2 * r + 1]);
      *(float2 *)(d_g + to) = make_float2(from_q[n][2 * r], from_q[n][2 * r + 1]);
      *(float2 *)(w + to) = make_float2(d_kk[n][2 * r], d_kk[n][2 * r + 1]);
    }
  __syncthreads();

  /* Pairs inside a subblock, a thread for each channel: every factor is a product of decays. Then
   * the sums over tokens, of which each group of threads has a part of the subblocks. */
  constexpr int GROUPS = GRADIENT_THREADS / DIM, OWN = SUBBLOCKS / GROUPS;
  int c = thread % DIM, group = thread / DIM;
  float sum_g = 0, sum_w = 0;
  for (int b = group * OWN; b < group * OWN + OWN; ++b) {
    float alpha[SUBBLOCK], k_i[SUBBLOCK], q_i[SUBBLOCK], of_q[SUBBLOCK], of_k[SUBBLOCK];
    float of_g[SUBBLOCK];
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      int at = b * SUBBLOCK + i;
      float before = i ? own_sum[(at - 1) * LF + c] : 0;
      alpha[i] = power_of_two(own_sum[at * LF + c] - before);
      q_i[i] = float(q[at * LD + c]), k_i[i] = float(k[at * LD + c]);
      of_q[i] = of_k[i] = of_g[i] = 0;
    }
#pragma unroll
    for (int j = 0; j < SUBBLOCK; ++j) {
      float decay = 1, onto = 0;
#pragma unroll
      for (int i = j; i < SUBBLOCK; ++i) {
        int at = (b * SUBBLOCK + i) * SQUARE + b * SUBBLOCK + j;
        float x = float(n_p[at]), y = float(n_b[at]);
        if (i > j) decay *= alpha[i];
        float key = decay * k_i[j];
        of_q[i] += x * key;
        of_k[i] += y * key;
        float pull = x * q_i[i] + y * k_i[i];
        onto += decay * pull;
        if (i > j) of_g[i] += pull * key;
      }
      /* The pair of a token with itself has no decay. */
      float self = float(n_p[(b * SUBBLOCK + j) * (SQUARE + 1)]) * q_i[j];
      of_g[j] -= (onto - self) * k_i[j];
      of_k[j] += onto;
    }
#pragma unroll
    for (int i = 0; i < SUBBLOCK; ++i) {
      int to = (b * SUBBLOCK + i) * LF + c;
      d_q[to] += of_q[i];
      d_k[to] += of_k[i];
      of_g[i] += d_g[to];
      d_g[to] = of_g[i];
      sum_g += of_g[i];
      sum_w += w[to];
    }
  }
  group_sums[group * DIM + c] = sum_g;
  group_sums[(4 + group) * DIM + c] = sum_w;
  __syncthreads();
  if (all.d_decay.data) {
    float before = 0, running = boundary[c];
    for (int i = 0; i < group; ++i) before += group_sums[(4 + i) * DIM + c];
    for (int i = group + 1; i < GROUPS; ++i) running += group_sums[i * DIM + c];
    int begin = group * OWN * SUBBLOCK, end = begin + OWN * SUBBLOCK;
    for (int i = end - 1; i >= begin; --i) {
      running += d_g[i * LF + c];
      d_g[i * LF + c] = running;
    }
    for (int i = begin; i < end && i < tokens; ++i) {
      all.d_decay.at(s.batch, s.first + first + i, head)[c] = p.scale * (d_g[i * LF + c] + before);
      before += w[i * LF + c];
    }
  }
  for (int pair = thread; pair < CHUNK * PAIRS; pair += GRADIENT_THREADS) {
    int i = pair / PAIRS, c = pair % PAIRS * 2;
    float2 x = *(const float2 *)(d_q + i * LF + c), y = *(const float2 *)(d_k + i * LF + c);
    store_pair<E>(all.d_q, all.head_d_q, p, s, first, i, tokens, head, c, DIM, at, p.scale * x.x,
                  p.scale * x.y);
    store_pair<E>(all.d_k, all.head_d_k, p, s, first, i, tokens, head, c, DIM, at, p.scale * y.x,
                  p.scale * y.y);
  }
}

/* dq and dk of a key head: the sum over its value heads, in order. */
template <typename E> __global__ void gather_kernel(backward_parameters all, int dim) {
  const parameters &p = all.in;
  int head = blockIdx.y, thread = threadIdx.x;
  int64_t chunk = blockIdx.x % p.chunks, first = chunk * CHUNK;
  sequence s = find_sequence(p.offsets, p.length, (int)(blockIdx.x / p.chunks));
  int64_t from = ((int64_t)blockIdx.x * p.value_heads + head * p.group) * CHUNK * dim;
  for (int at = thread; at < CHUNK * dim; at += blockDim.x) {
    int i = at / dim, c = at % dim;
    if (first + i >= s.tokens) return;
    float x = 0, y = 0;
    for (int h = 0; h < p.group; ++h) {
      int64_t place = from + (int64_t)h * CHUNK * dim + at;
      if (all.d_q.data) x += all.head_d_q[place];
      if (all.d_k.data) y += all.head_d_k[place];
    }
    if (all.d_q.data) as<E>(all.d_q).at(s.batch, s.first + first + i, head)[c] = E(x);
    if (all.d_k.data) as<E>(all.d_k).at(s.batch, s.first + first + i, head)[c] = E(y);
  }
}

/* ---- Planning ---- */

enum { SLABS }; /* of choice->values: slabs of a block of the sweeps */

/* Bytes of the workspace's parts, in order. */
struct parts {
  size_t prepared, state, d_state, x, d_u, head_d_q, head_d_k;
  size_t sum() const {
    return prepared + state + d_state + x + d_u + head_d_q + head_d_k;
  }
};

template <int DIM, bool CHANNEL> parts parts_of(const attn_recurrent_problem *problem) {
  size_t chunks = (size_t)((problem->length + CHUNK - 1) / CHUNK);
  size_t units = (size_t)(problem->batch * problem->value_heads) * chunks;
  size_t columns = (size_t)problem->value_dim;
  parts bytes = {};
  bytes.prepared = units * record<DIM, CHANNEL>::BACKWARD_BYTES;
  bytes.state = bytes.d_state = units * columns * DIM * 2;
  bytes.x = bytes.d_u = units * CHUNK * columns * 2;
  if (problem->value_heads > problem->heads)
    bytes.head_d_q = bytes.head_d_k = units * CHUNK * DIM * 4;
  return bytes;
}

template <int DIM, bool CHANNEL>
bool plan_for(const attn_cuda_device *device, const attn_recurrent_problem *problem,
              attn_cuda_choice *choice) {
  size_t stage = tiles<__nv_bfloat16, DIM, CHANNEL>::BYTES;
  int64_t pairs = problem->batch * problem->value_heads, slabs = problem->value_dim / SLAB;
  int64_t all = slabs;
  auto fits = [&](int64_t slabs) {
    return 2 * (stage + CHUNK * (size_t)(slabs * SLAB + 8) * 2) <= device->shared_bytes;
  };
  while (slabs % 2 == 0 && (slabs > 8 || !fits(slabs) ||
                            (slabs > 2 && pairs * (all / slabs) * 2 <= device->multiprocessors)))
    slabs /= 2;
  if (slabs > 8) slabs = 1;
  if (!fits(slabs) || (size_t)gradient_layout<DIM, CHANNEL>::BYTES > device->shared_bytes)
    return false;
  choice->values[SLABS] = slabs;
  choice->workspace_bytes = parts_of<DIM, CHANNEL>(problem).sum();
  snprintf(choice->description, sizeof choice->description,
           "delta rule, chunks of %d prepared at once, two sweeps of %d value columns a block",
           CHUNK, (int)slabs * SLAB);
  return true;
}

bool plan(const attn_cuda_device *device, const attn_recurrent_problem *problem,
          attn_cuda_choice *choice) {
  bool channel = problem->decay == ATTN_DECAY_CHANNEL;
  if (!accepts(device, problem)) return false;
  if (problem->dim == 64)
    return channel ? plan_for<64, true>(device, problem, choice)
                   : plan_for<64, false>(device, problem, choice);
  return channel ? plan_for<128, true>(device, problem, choice)
                 : plan_for<128, false>(device, problem, choice);
}

bool suits(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  /* A constant decay's gradient would be a sum over all tokens. */
  return reads_aligned(problem, args) && aligned(args->d_o, 8) && aligned(args->d_q, 2) &&
         aligned(args->d_k, 2) && aligned(args->d_v, 2) &&
         (problem->decay != ATTN_DECAY_HEAD || !args->d_decay.data);
}

template <typename E, int DIM, bool CHANNEL>
attn_status launch(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                   backward_parameters p, char *workspace, cudaStream_t stream) {
  using tile_type = tiles<E, DIM, CHANNEL>;
  parts bytes = parts_of<DIM, CHANNEL>(problem);
  auto take = [&](size_t size) { return (workspace += size) - size; };
  p.in.prepared = take(bytes.prepared);
  p.state = take(bytes.state);
  p.d_state = take(bytes.d_state);
  p.x = take(bytes.x);
  p.d_u = take(bytes.d_u);
  p.head_d_q = (float *)take(bytes.head_d_q);
  p.head_d_k = (float *)take(bytes.head_d_k);

  dim3 all((unsigned)(problem->batch * p.in.chunks), (unsigned)p.in.value_heads);
  int shared = prepare_bytes<E, DIM, CHANNEL>();
  attn_status status = allow_shared(prepare_kernel<E, DIM, CHANNEL, true>, shared);
  if (status != ATTN_OK) return status;
  prepare_kernel<E, DIM, CHANNEL, true><<<all, PREPARE_THREADS, shared, stream>>>(p.in);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's preparation");

  int slabs = (int)choice->values[SLABS];
  shared = 2 * (tile_type::BYTES + CHUNK * (slabs * SLAB + 8) * 2);
  dim3 grid((unsigned)(p.in.columns / SLAB / slabs), (unsigned)p.in.value_heads,
            (unsigned)problem->batch);
  status = allow_shared(sweep_kernel<E, DIM, CHANNEL, true>, shared);
  if (status == ATTN_OK) status = allow_shared(sweep_kernel<E, DIM, CHANNEL, false>, shared);
  if (status != ATTN_OK) return status;
  sweep_kernel<E, DIM, CHANNEL, true><<<grid, slabs * 32, shared, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's forward sweep");
  sweep_kernel<E, DIM, CHANNEL, false><<<grid, slabs * 32, shared, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's backward sweep");

  shared = gradient_layout<DIM, CHANNEL>::BYTES;
  status = allow_shared(gradient_kernel<E, DIM, CHANNEL>, shared);
  if (status != ATTN_OK) return status;
  gradient_kernel<E, DIM, CHANNEL><<<all, GRADIENT_THREADS, shared, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's gradients");
  if (p.in.group == 1) return ATTN_OK;
  dim3 heads(all.x, (unsigned)problem->heads);
  gather_kernel<E><<<heads, 256, 0, stream>>>(p, DIM);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's sum over value heads");
  return ATTN_OK;
}

template <typename E, int DIM>
attn_status launch_decay(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                         const backward_parameters &p, char *workspace, cudaStream_t stream) {
  return problem->decay == ATTN_DECAY_CHANNEL
             ? launch<E, DIM, true>(choice, problem, p, workspace, stream)
             : launch<E, DIM, false>(choice, problem, p, workspace, stream);
}

template <typename E>
attn_status launch_dim(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                       const backward_parameters &p, char *workspace, cudaStream_t stream) {
  return problem->dim == 64 ? launch_decay<E, 64>(choice, problem, p, workspace, stream)
                            : launch_decay<E, 128>(choice, problem, p, workspace, stream);
}

attn_status run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                void *workspace, cudaStream_t stream) {
  (void)device;
  bool ragged = problem->ragged;
  backward_parameters p = {};
  p.in = parameters_of(problem, args);
  p.d_o = rows_of<const void>(args->d_o, ragged);
  if (args->d_q.data) p.d_q = rows_of<void>(args->d_q, ragged);
  if (args->d_k.data) p.d_k = rows_of<void>(args->d_k, ragged);
  if (args->d_v.data) p.d_v = rows_of<void>(args->d_v, ragged);
  if (args->d_decay.data) p.d_decay = rows_of<float>(args->d_decay, ragged);
  if (args->d_beta.data) p.d_beta = rows_of<float>(args->d_beta, ragged);
  if (args->d_final_state.data) p.d_final = states_of(args->d_final_state);
  if (args->d_initial_state.data) p.d_initial = states_of(args->d_initial_state);
  return problem->dtype == ATTN_BF16
             ? launch_dim<__nv_bfloat16>(choice, problem, p, (char *)workspace, stream)
             : launch_dim<__half>(choice, problem, p, (char *)workspace, stream);
}

} // namespace

extern const recurrent_algorithm recurrent_chunks_backward = {"delta rule by chunks, backward",
                                                             ATTN_PASS_BACKWARD, plan, suits, run};
