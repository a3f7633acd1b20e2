/* The recurrence backward for bfloat16 and float16.
 *
 * In the terms of recurrent_chunks.cuh, with dS' the gradient of the state after a chunk, and
 * everything but the final gradients divided by `scale` (all of them are linear in dO):
 *   dV' = P^T dO + Kk dS'      dU = L^T dV', L = (I + Diag(beta) B)^-1      dR = Diag(beta) dU = dV
 *   dS  = Diag(exp(G_C)) dS' + Qg^T dO - Kg^T dR
 *   dP  = dO V'^T,  dB = -dR V'^T,  dQg = dO S^T,  dKg = -dR S^T,  dKk = V' dS'^T
 *   dbeta_i = dU_i . X_i
 * and dq, dk collect what P, B, Qg, Kg and Kk pass on. The additive rule's dV is dV', and it has no
 * dR, dB and dKg. The decay's gradient, by token or by channel:
 *   dG_i = q_i dq_i + k_i dk_i (as read by B, Kg) - k_i dk_i (as written, by P and B)
 *   w_i  = k_i dk_i (as written, by Kk)
 *   dg_t = sum_{i >= t} dG_i + exp(G_C) S . dS' + sum_{i < t} w_i
 * Chunks are prepared; a forward sweep keeps S and X; a backward sweep keeps dS' and dU; then every
 * chunk finds its gradients by itself. Of the additive rule only S and dS' are kept, and the
 * backward sweep writes dV. */
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
   * [64, columns]. With grouped heads also the gradients of q and k of every value head [64, DIM];
   * with a constant decay its gradient's parts. */
  void *state, *d_state, *x, *d_u, *head_d_q, *head_d_k;
  float *decay_parts;
};

/* Pairs of channels of kept states lie in another order where the decay is per channel: of every 16
 * pairs, 4 i + j and 4 j + i change places. So a thread's accumulators of four tiles, whose columns
 * are 8 n + 2 t and the next, lie in a row; and where all operands have that order, so do the
 * channels 8 t .. 8 t + 7 in the accumulators. */
__device__ inline int place_of_pair(int pair) {
  return (pair & ~15) | (pair & 3) << 2 | (pair >> 2 & 3);
}

/* The slab to rows of [columns, DIM]. */
template <typename E, bool CHANNEL, int DIM>
__device__ void keep_slab(const slab<DIM> &s, E *to, int lane) {
  int g = lane / 4, t = lane % 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    E *row = to + (g + 8 * r) * DIM;
    uint32_t x[DIM / 8];
#pragma unroll
    for (int n = 0; n < DIM / 8; ++n) x[n] = pack<E>(s.s[n][2 * r], s.s[n][2 * r + 1]);
    if (CHANNEL)
#pragma unroll
      for (int n = 0; n < DIM / 8; n += 4)
        *(uint4 *)(row + 8 * n + 8 * t) = make_uint4(x[n], x[n + 1], x[n + 2], x[n + 3]);
    else
#pragma unroll
      for (int n = 0; n < DIM / 8; ++n) *(uint32_t *)(row + 8 * n + 2 * t) = x[n];
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
                      const tiles<E, DIM, CHANNEL, true> &tile, E *v, const sequence &s,
                      int64_t slot, int64_t chunk, int head, int column, int columns) {
  using record_type = record<DIM, CHANNEL, true>;
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
    rows<const E> q = as<E>(p.q), k = as<E>(p.k);
    copy_rows(tile.k(), LD, k.at(s.batch, s.first + first, head / p.group), k.token, CHUNK, DIM,
              tokens, thread, threads);
    if (!forward)
      copy_rows(tile.q(), LD, q.at(s.batch, s.first + first, head / p.group), q.token, CHUNK, DIM,
                tokens, thread, threads);
  }
  copy_rows(tile.y(), SQUARE, (const E *)(from + (forward ? record_type::Y : record_type::LEFT)),
            CHUNK, CHUNK, CHUNK, CHUNK, thread, threads);
  if (!forward)
    copy_rows(tile.p(), SQUARE, (const E *)(from + record_type::P), CHUNK, CHUNK, CHUNK, CHUNK,
              thread, threads);
  for (int at = thread; at < tile.NUMBERS / 4; at += threads)
    copy_async(tile.numbers() + 4 * at, from + record_type::NUMBERS + 16 * at, true);
  rows<const E> source = as<E>(values);
  copy_rows(v, columns + 8, source.at(s.batch, s.first + first, head) + column, source.token, CHUNK,
            columns, tokens, thread, threads);
  copy_commit();
}

/* A step of the forward sweep; V's slab in shared memory becomes X's. */
template <typename E, int DIM, bool CHANNEL>
__device__ void forward_step(slab<DIM> &state, const tiles<E, DIM, CHANNEL, true> &tile, E *v,
                             int ld, int lane) {
  float r[8][4] = {};
  uint32_t x[SUBBLOCKS][4];
  times_rows<E>(r, state, tile.k(), lane);
  residual(r, v, ld, CHANNEL ? NULL : tile.gamma(), lane);
  tokens_operand<E>(x, r, NULL, lane);
  times_lower(r, x, tile.y(), lane); /* the diagonal's share is there */
  store_transposed(v, ld, r, 1, lane);
  scale_tokens(r, tile.beta(), lane);
  tokens_operand<E>(x, r, CHANNEL ? NULL : tile.kappa(), lane);
  decay_slab<DIM, CHANNEL>(state, tile.full(), lane);
  add_outer(state, x, CHANNEL ? tile.written() : tile.k(), lane);
}
/* A step of the backward sweep; dO's slab in shared memory becomes that of dU. */
template <typename E, int DIM, bool CHANNEL>
__device__ void backward_step(slab<DIM> &state, const tiles<E, DIM, CHANNEL, true> &tile, E *v,
                              int ld, int lane) {
  float r[8][4] = {};
  uint32_t d_o[SUBBLOCKS][4], x[SUBBLOCKS][4];
  values_operand(d_o, v, ld, lane);
  times_rows<E>(r, state, CHANNEL ? tile.written() : tile.k(), lane);
  if (!CHANNEL) scale_tokens(r, tile.kappa(), lane);
  times_lower_transposed(r, d_o, tile.p(), lane);
  tokens_operand<E>(x, r, NULL, lane);
  times_lower_transposed(r, x, tile.y(), lane); /* the diagonal's share is there */
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

template <typename E, int DIM, bool CHANNEL, bool FORWARD>
__global__ void __launch_bounds__(256) delta_sweep_kernel(backward_parameters all) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL, true>;
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
    keep_slab<E, CHANNEL>(state, kept, lane);
    if (FORWARD)
      forward_step(state, tile, v, ld, lane);
    else
      backward_step(state, tile, v, ld, lane);
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

/* The additive rule's forward sweep needs Kk and V only. */
template <typename E, int DIM> __host__ __device__ constexpr int additive_stage(int columns) {
  return CHUNK * (pitch<DIM>() + columns + 8) * 2 + tiles<E, DIM, true, false>::NUMBERS * 4;
}

/* copy_rows of a chunk with few registers, for up to 128 columns. */
template <typename E>
__device__ void copy_chunk(E *to, int ld_to, const E *from, int64_t ld_from, int columns, int valid,
                           int thread, int threads) {
  int pieces = columns > 64 ? 16 : columns > 32 ? 8 : columns > 16 ? 4 : 2;
  int row = thread / pieces, by = threads / pieces, column = thread % pieces * 8;
  if (column >= columns) return;
#pragma unroll 1
  for (; row < CHUNK; row += by)
    copy_async(to + row * ld_to + column, from + (row < valid ? row * ld_from + column : 0),
               row < valid);
}

template <typename E, int DIM, bool CHANNEL>
__global__ void __launch_bounds__(256, 2) additive_forward_kernel(backward_parameters all) {
  extern __shared__ __align__(16) char memory[];
  using record_type = record<DIM, CHANNEL, false>;
  constexpr int LD = pitch<DIM>(), NUMBERS = tiles<E, DIM, CHANNEL, false>::NUMBERS;
  const parameters &p = all.in;
  int thread = threadIdx.x, threads = blockDim.x, warp = thread / 32, lane = thread % 32;
  int columns = threads / 32 * SLAB, column = blockIdx.x * columns, head = blockIdx.y;
  int ld = columns + 8, own = column + warp * SLAB, stage_bytes = additive_stage<E, DIM>(columns);
  int64_t slot = blockIdx.z, at = slot * p.chunks * p.value_heads + head;
  sequence s = find_sequence(p.offsets, p.length, (int)slot);
  int chunks = (s.tokens + CHUNK - 1) / CHUNK;
  auto fetch_chunk = [&](int chunk) {
    int first = chunk * CHUNK, tokens = min((int)CHUNK, s.tokens - first);
    E *to = (E *)(memory + chunk % 2 * stage_bytes), *v = to + CHUNK * LD;
    float *numbers = (float *)(v + CHUNK * ld);
    const char *from =
        p.prepared + (at + (int64_t)chunk * p.value_heads) * record_type::BACKWARD_BYTES;
    rows<const E> values = as<E>(p.v), keys = as<E>(p.k);
    if (CHANNEL)
      copy_chunk(to, LD, (const E *)from + CHUNK * DIM, DIM, DIM, CHUNK, thread, threads);
    else
      copy_chunk(to, LD, keys.at(s.batch, s.first + first, head / p.group), keys.token, DIM, tokens,
                 thread, threads);
    copy_chunk(v, ld, values.at(s.batch, s.first + first, head) + column, values.token, columns,
               tokens, thread, threads);
    for (int i = thread; i < NUMBERS / 4; i += threads)
      copy_async(numbers + 4 * i, from + record_type::NUMBERS + 16 * i, true);
    copy_commit();
  };

  slab<DIM> state;
  load_slab(state, p.initial.data ? p.initial.at(slot, head) + own : NULL, p.initial.row, lane);
  if (chunks) fetch_chunk(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    if (chunk + 1 < chunks)
      fetch_chunk(chunk + 1);
    else
      copy_commit();
    copy_wait<1>();
    __syncthreads();
    const E *written = (const E *)(memory + chunk % 2 * stage_bytes), *v = written + CHUNK * LD;
    const float *numbers = (const float *)(v + CHUNK * ld); /* as in tiles */
    int64_t place = at + (int64_t)chunk * p.value_heads;
    keep_slab<E, CHANNEL>(state, (E *)all.state + (place * p.columns + own) * DIM, lane);
    uint32_t x[SUBBLOCKS][4];
    values_operand(x, v + warp * SLAB, ld, lane);
    if (!CHANNEL) scale_operand<E>(x, numbers + CHUNK, lane);
    decay_slab<DIM, CHANNEL>(state, numbers + 2 * CHUNK, lane);
    add_outer(state, x, written, lane);
    __syncthreads();
  }
}

/* Its backward sweep: of two warps the first one carries dS of a slab and hands it over, the second
 * one makes dV, and all of the second fetch. */
template <int DIM> struct backward_handover { uint4 s[2][DIM / 16][32]; }; /* by turns */

template <typename E, int DIM, bool CHANNEL>
__global__ void __launch_bounds__(512, 1) additive_backward_kernel(backward_parameters all) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL, false>;
  using record_type = record<DIM, CHANNEL, false>;
  constexpr int LD = pitch<DIM>();
  const parameters &p = all.in;
  int slabs = blockDim.x / 64, warp = threadIdx.x / 32 % slabs, lane = threadIdx.x % 32;
  int columns = slabs * SLAB, column = blockIdx.x * columns, ld = columns + 8, head = blockIdx.y;
  int own = column + warp * SLAB, stage_bytes = tile_type::BYTES + CHUNK * ld * 2;
  int64_t slot = blockIdx.z, at = slot * p.chunks * p.value_heads + head;
  sequence s = find_sequence(p.offsets, p.length, (int)slot);
  int chunks = (s.tokens + CHUNK - 1) / CHUNK, barrier = 1 + warp;
  auto tile_of = [&](int chunk) { return tile_type{memory + chunk % 2 * stage_bytes}; };
  backward_handover<DIM> &between = ((backward_handover<DIM> *)(memory + 2 * stage_bytes))[warp];

  if (threadIdx.x / 32 < slabs) {
    slab<DIM> state;
    load_slab(state, all.d_final.data ? all.d_final.at(slot, head) + own : NULL, all.d_final.row,
              lane);
    scale_slab(state, 1 / p.scale);
    for (int chunk = chunks - 1; chunk >= 0; --chunk) {
#pragma unroll
      for (int c = 0; c < DIM / 16; ++c) {
        uint32_t a[4];
        slab_operand<E>(a, state, c);
        between.s[chunk % 2][c][lane] = to_vector(a);
      }
      __syncthreads(); /* the chunk and its dS' are there, the one before is done */
      tile_type tile = tile_of(chunk);
      int64_t place = at + (int64_t)chunk * p.value_heads;
      keep_slab<E, CHANNEL>(state, (E *)all.d_state + (place * p.columns + own) * DIM, lane);
      uint32_t x[SUBBLOCKS][4];
      values_operand(x, (E *)(tile.base + tile_type::BYTES) + warp * SLAB, ld, lane);
      barrier_arrive(barrier, 64); /* dO was read */
      if (!CHANNEL) scale_operand<E>(x, tile.gamma(), lane);
      decay_slab<DIM, CHANNEL>(state, tile.full(), lane);
      add_outer(state, x, tile.q(), lane);
    }
    if (!all.d_initial.data) return;
    scale_slab(state, p.scale);
    store_slab(state, all.d_initial.at(slot, head) + own, all.d_initial.row, lane);
    return;
  }

  int thread = threadIdx.x - slabs * 32, threads = slabs * 32;
  rows<const E> d_o = as<E>(all.d_o);
  auto fetch_chunk = [&](int chunk) {
    tile_type tile = tile_of(chunk);
    int first = chunk * CHUNK, tokens = min((int)CHUNK, s.tokens - first);
    const char *from =
        p.prepared + (at + (int64_t)chunk * p.value_heads) * record_type::BACKWARD_BYTES;
    if (CHANNEL)
      copy_rows(tile.q(), LD, (const E *)from, DIM, 2 * CHUNK, DIM, 2 * CHUNK, thread, threads);
    else
      copy_keys(p, tile, s, first, tokens, head, thread, threads);
    copy_rows(tile.p(), SQUARE, (const E *)(from + record_type::P), CHUNK, CHUNK, CHUNK, CHUNK,
              thread, threads);
    for (int i = thread; i < tile.NUMBERS / 4; i += threads)
      copy_async(tile.numbers() + 4 * i, from + record_type::NUMBERS + 16 * i, true);
    copy_rows((E *)(tile.base + tile_type::BYTES), ld,
              d_o.at(s.batch, s.first + first, head) + column, d_o.token, CHUNK, columns, tokens,
              thread, threads);
    copy_commit();
  };
  if (chunks) fetch_chunk(chunks - 1);
  for (int chunk = chunks - 1; chunk >= 0; --chunk) {
    copy_wait<0>();
    __syncthreads();
    if (chunk) fetch_chunk(chunk - 1);
    tile_type tile = tile_of(chunk);
    E *v = (E *)(tile.base + tile_type::BYTES) + warp * SLAB;
    const E *written = CHANNEL ? tile.written() : tile.k();
    float r[8][4] = {};
#pragma unroll
    for (int c = 0; c < DIM / 16; ++c) {
      uint32_t a[4], b[4];
      from_vector(a, between.s[chunk % 2][c][lane]);
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        load_right(b, written + n * 16 * LD + c * 16, LD, lane);
        product<E>(r[2 * n], a, b[0], b[1]);
        product<E>(r[2 * n + 1], a, b[2], b[3]);
      }
    }
    if (!CHANNEL) scale_tokens(r, tile.kappa(), lane);
    uint32_t x[SUBBLOCKS][4];
    values_operand(x, v, ld, lane);
    times_lower_transposed(r, x, tile.p(), lane);
    barrier_sync(barrier, 64);
    if (!all.d_v.data) continue;
    store_transposed(v, ld, r, p.scale, lane);
    __syncwarp();
    int first = chunk * CHUNK;
    write_slab(as<E>(all.d_v).at(s.batch, s.first + first, head) + own, all.d_v.token, v, ld,
               min((int)CHUNK, s.tokens - first), lane);
  }
}

/* ---- Gradients of a chunk ---- */

enum { EXACT_LD = SUBBLOCK + 1, EXACT_FLOATS = 3 * 16 * EXACT_LD }; /* see exact_pairs */

/* Threads: 4 rows of warps, one for each subblock's tokens, and SIDES warps in each row that share
 * the channels. Shared memory: with a decay per channel q and k are the rows decayed from the
 * border before their subblock and the keys decayed to the one after it; all channels have the
 * order of place_of_pair. */
template <int DIM, bool CHANNEL, bool DELTA> struct gradient_layout {
  enum {
    SIDES = DELTA && DIM == 128 ? 4 : 2,
    THREADS = SUBBLOCKS * SIDES * 32,
    BLOCKS = DELTA ? 1 : 2,               /* of a multiprocessor */
    COLUMNS = CHANNEL && DELTA ? 64 : 32, /* value columns at once */
    STAGES = DELTA && !CHANNEL ? 3 : 1,   /* of them on their way */
    LD = DIM + 8,
    LV = COLUMNS + 8,
    ROWS = CHUNK * LD * 2,
    SQUARE_BYTES = CHUNK * SQUARE * 2,
    Q = 0,
    K = Q + ROWS,
    K_PREFIX = K + ROWS,
    N_P = K_PREFIX + (CHANNEL && DELTA ? ROWS : 0), /* what P and B get, masked */
    N_B = N_P + SQUARE_BYTES,
    BETA = N_B + (DELTA ? SQUARE_BYTES : 0),
    BOUNDARY = BETA + (DELTA ? CHUNK * 4 : 0),
    /* Per token G, gamma, kappa, two sums of each side. Per channel, of subblocks [4, DIM]: decay
     * and its power; and G inside the subblock [64, LD]. */
    GATES = BOUNDARY + DIM * 4,
    SHARED = GATES + (CHANNEL ? 2 * SUBBLOCKS * DIM + CHUNK * LD : (3 + 2 * SIDES) * CHUNK) * 4,
    STAGE_BYTES = (DELTA ? 3 : 2) * CHUNK * LV * 2 + 2 * COLUMNS * LD * 2,
    FIRST = STAGES * STAGE_BYTES,
    /* Later there: sums of w and of dG - w over subblocks [4, DIM], and each warp's exact pairs. */
    LATER = CHANNEL ? (2 * SUBBLOCKS * DIM + THREADS / 32 * EXACT_FLOATS) * 4 : 0,
    BYTES = SHARED + (FIRST > LATER ? FIRST : LATER),
  };
};

/* acc[16, 16 N] += a x[16, 16 N] */
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

/* Where a block's chunk lies. */
struct place {
  sequence s;
  int64_t first, at; /* the first token; the chunk and head's place in the workspace */
  int head, tokens;
};

/* A chunk's rows of dq or dk: in the caller's tensor, or in the value head's part. */
template <typename E> struct gradient_rows {
  E *data; /* NULL: not wanted */
  int64_t token;
};
template <typename E, int DIM>
__device__ gradient_rows<E> gradient_rows_of(const rows<void> &to, void *part, const parameters &p,
                                             const place &l) {
  if (!to.data) return {NULL, 0};
  if (p.group > 1) return {(E *)part + l.at * CHUNK * DIM, DIM};
  return {as<E>(to).at(l.s.batch, l.s.first + l.first, l.head), to.token};
}

/* What values and states give to a warp's 16 tokens: dP and dB for the columns of J subblocks, and
 * for 8 N channels dQg, dKg, dKk; dB and dKg without their factors, which are not there for the
 * additive rule. To a thread, a part of S . dS' of two channels. */
template <int DIM, bool CHANNEL, bool DELTA> struct value_sums {
  enum {
    SIDES = gradient_layout<DIM, CHANNEL, DELTA>::SIDES,
    J = SUBBLOCKS / SIDES,
    N = DIM / SIDES / 8,
    N_K = DELTA ? N : 1,
  };
  float d_p[2 * J][4], d_b[DELTA ? 2 * J : 1][4];
  float d_qg[N][4], d_kg[N_K][4], d_kk[N][4];
  float2 boundary;
};

/* A thread's pieces of the values and states, a part of the value columns after the other. */
template <typename E, int DIM, bool CHANNEL, bool DELTA> struct value_pieces {
  using layout = gradient_layout<DIM, CHANNEL, DELTA>;
  enum {
    COLUMNS = layout::COLUMNS,
    LV = layout::LV,
    PIECES = COLUMNS / 8, /* of a row of values */
    STEP = layout::THREADS / PIECES,
    VALUES = STEP < CHUNK ? CHUNK / STEP : 1,
    STATE_STEP = layout::THREADS / (DIM / 8),
    STATES = COLUMNS / STATE_STEP,
  };
  const E *d_o, *x, *d_u, *state, *d_state;
  int64_t d_o_step, x_step;
  int left, tokens; /* value columns from the thread's own on; tokens from its first on */

  __device__ value_pieces(const backward_parameters &all, const place &l) {
    const parameters &p = all.in;
    int i = threadIdx.x / PIECES, c = threadIdx.x % PIECES * 8;
    left = p.columns - c, tokens = l.tokens - i;
    int64_t token = l.s.first + l.first + (tokens > 0 ? i : 0);
    d_o = as<E>(all.d_o).at(l.s.batch, token, l.head) + c, d_o_step = STEP * all.d_o.token;
    if (DELTA) {
      int64_t from = (l.at * CHUNK + i) * p.columns + c;
      x = (const E *)all.x + from, d_u = (const E *)all.d_u + from, x_step = STEP * p.columns;
    } else {
      x = as<E>(p.v).at(l.s.batch, token, l.head) + c, x_step = STEP * p.v.token;
    }
    int64_t from = l.at * p.columns * DIM + threadIdx.x * 8;
    state = (const E *)all.state + from, d_state = (const E *)all.d_state + from;
  }

  /* Starts the loads of the next COLUMNS, if there are any, to a stage. */
  __device__ void fetch(char *stage) {
    int i = threadIdx.x / PIECES, c = threadIdx.x % PIECES * 8;
    int row = threadIdx.x / (DIM / 8), channel = threadIdx.x % (DIM / 8) * 8;
    E *values = (E *)stage + i * LV + c;
    E *states = (E *)stage + (DELTA ? 3 : 2) * CHUNK * LV + row * layout::LD + channel;
    if (left + c <= 0) {
      copy_commit();
      return;
    }
#pragma unroll
    for (int j = 0; j < VALUES; ++j) {
      if (STEP > CHUNK && i >= CHUNK) break;
      bool inside = left > 0, given = inside && j * STEP < tokens;
      E *to = values + j * STEP * LV;
      copy_async(to, given ? d_o + j * d_o_step : d_o, given);
      copy_async(to + CHUNK * LV, DELTA || given ? x + j * x_step : x, DELTA ? inside : given);
      if (DELTA) copy_async(to + 2 * CHUNK * LV, d_u + j * x_step, inside);
    }
#pragma unroll
    for (int j = 0; j < STATES; ++j) {
      bool inside = row + j * STATE_STEP < left + c;
      E *to = states + j * STATE_STEP * layout::LD;
      copy_async(to, state + j * STATE_STEP * DIM, inside);
      copy_async(to + COLUMNS * layout::LD, d_state + j * STATE_STEP * DIM, inside);
    }
    copy_commit();
    d_o += COLUMNS, x += COLUMNS, d_u += DELTA ? COLUMNS : 0, left -= COLUMNS;
    state += COLUMNS * DIM, d_state += COLUMNS * DIM;
  }
};

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ __forceinline__ void add_values(const backward_parameters &all, const char *memory,
                                           const char *stage, const place &l, int v,
                                           value_sums<DIM, CHANNEL, DELTA> &sums) {
  using layout = gradient_layout<DIM, CHANNEL, DELTA>;
  constexpr int COLUMNS = layout::COLUMNS, LV = layout::LV, LD = layout::LD;
  constexpr int THREADS = layout::THREADS, J = sums.J, N = sums.N;
  const E *d_o = (const E *)stage, *x = d_o + CHUNK * LV;
  const E *d_u = x + CHUNK * LV, *state = d_u + (DELTA ? CHUNK * LV : 0);
  const E *d_state = state + COLUMNS * LD;
  int thread = threadIdx.x, lane = thread % 32, block = thread / 32 % SUBBLOCKS;
  int side = thread / 32 / SUBBLOCKS, row = block * SUBBLOCK, half = side * 8 * N;
#pragma unroll
  for (int c = 0; c < COLUMNS; c += 16) {
    uint32_t of_d_o[4], of_d_u[4], of_x[4], b[4];
    load_left(of_d_o, d_o + row * LV + c, LV, lane);
    if (DELTA) load_left(of_d_u, d_u + row * LV + c, LV, lane);
    load_left(of_x, x + row * LV + c, LV, lane);
#pragma unroll
    for (int j = 0; j < J; ++j)
      if (side * J + j <= block) {
        load_right(b, x + (side * J + j) * SUBBLOCK * LV + c, LV, lane);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          product<E>(sums.d_p[2 * j + n], of_d_o, b[2 * n], b[2 * n + 1]);
          if constexpr (DELTA) product<E>(sums.d_b[2 * j + n], of_d_u, b[2 * n], b[2 * n + 1]);
        }
      }
#pragma unroll
    for (int n = 0; n < N / 2; ++n) {
      load_right_transposed(b, state + c * LD + half + 16 * n, LD, lane);
      product<E>(sums.d_qg[2 * n], of_d_o, b[0], b[1]);
      product<E>(sums.d_qg[2 * n + 1], of_d_o, b[2], b[3]);
      if constexpr (DELTA) {
        product<E>(sums.d_kg[2 * n], of_d_u, b[0], b[1]);
        product<E>(sums.d_kg[2 * n + 1], of_d_u, b[2], b[3]);
      }
      load_right_transposed(b, d_state + c * LD + half + 16 * n, LD, lane);
      product<E>(sums.d_kk[2 * n], of_x, b[0], b[1]);
      product<E>(sums.d_kk[2 * n + 1], of_x, b[2], b[3]);
    }
  }
  constexpr int PAIRS = DIM / 2, PARTS = THREADS / PAIRS;
#pragma unroll 4
  for (int i = thread / PAIRS; i < COLUMNS; i += PARTS) {
    float2 a = unpack<E>(*(const uint32_t *)(state + i * LD + thread % PAIRS * 2));
    float2 b = unpack<E>(*(const uint32_t *)(d_state + i * LD + thread % PAIRS * 2));
    sums.boundary.x += a.x * b.x, sums.boundary.y += a.y * b.y;
  }
  if (!DELTA || !all.d_v.data) return; /* the additive rule's dV is written by the sweep */
  const float *beta = (const float *)(memory + layout::BETA);
  for (int piece = thread; piece < CHUNK * COLUMNS / 8; piece += THREADS) {
    int i = piece / (COLUMNS / 8), c = piece % (COLUMNS / 8) * 8;
    if (i >= l.tokens || v + c >= all.in.columns) continue;
    uint4 y = *(const uint4 *)(d_u + i * LV + c);
    float f = beta[i] * all.in.scale;
    auto times = [&](uint32_t pair) {
      float2 z = unpack<E>(pair);
      return pack<E>(f * z.x, f * z.y);
    };
    *(uint4 *)(as<E>(all.d_v).at(l.s.batch, l.s.first + l.first + i, l.head) + v + c) =
        make_uint4(times(y.x), times(y.y), times(y.z), times(y.w));
  }
}

/* What P and B get, to shared memory; with a decay per token that decay is in it. */
template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ void store_score_gradients(const backward_parameters &all, char *memory, const place &l,
                                      const value_sums<DIM, CHANNEL, DELTA> &sums) {
  using layout = gradient_layout<DIM, CHANNEL, DELTA>;
  constexpr int J = sums.J;
  E *n_p = (E *)(memory + layout::N_P), *n_b = (E *)(memory + layout::N_B);
  const float *beta = (const float *)(memory + layout::BETA);
  const float *sum = (const float *)(memory + layout::GATES);
  int thread = threadIdx.x, lane = thread % 32, g = lane / 4, t = lane % 4;
  int row = thread / 32 % SUBBLOCKS * SUBBLOCK, side = thread / 32 / SUBBLOCKS;
#pragma unroll
  for (int n = 0; n < 2 * J; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int i = row + g + 8 * r, j = (side * 2 * J + n) * 8 + 2 * t;
      float p_ij[2], b_ij[2] = {0, 0};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float decay = i < j + e ? 0 : CHANNEL ? 1 : power_of_two(sum[i] - sum[j + e]);
        p_ij[e] = decay * sums.d_p[n][2 * r + e];
        if constexpr (DELTA) {
          p_ij[e] *= beta[j + e];
          b_ij[e] = i == j + e ? 0 : -decay * beta[i] * beta[j + e] * sums.d_b[n][2 * r + e];
          if (i == j + e && i < l.tokens && all.d_beta.data)
            *all.d_beta.at(l.s.batch, l.s.first + l.first + i, l.head) =
                all.in.scale * sums.d_b[n][2 * r + e];
        }
      }
      *(uint32_t *)(n_p + i * SQUARE + j) = pack<E>(p_ij[0], p_ij[1]);
      if (DELTA) *(uint32_t *)(n_b + i * SQUARE + j) = pack<E>(b_ij[0], b_ij[1]);
    }
}

/* dq, dk and the decay's gradient with a decay per token. */
template <typename E, int DIM, bool DELTA>
__device__ __forceinline__ void token_gradients(const backward_parameters &all, char *memory,
                                                const place &l,
                                                value_sums<DIM, false, DELTA> &sums) {
  using layout = gradient_layout<DIM, false, DELTA>;
  constexpr int LD = layout::LD, N = sums.N;
  const parameters &p = all.in;
  const E *q = (const E *)(memory + layout::Q), *k = (const E *)(memory + layout::K);
  const E *n_p = (const E *)(memory + layout::N_P), *n_b = (const E *)(memory + layout::N_B);
  const float *beta = (const float *)(memory + layout::BETA);
  const float *boundary = (const float *)(memory + layout::BOUNDARY);
  const float *gamma = (const float *)(memory + layout::GATES) + CHUNK, *kappa = gamma + CHUNK;
  float *token_sums = (float *)(memory + layout::GATES) + 3 * CHUNK;
  int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  int block = warp % SUBBLOCKS, side = warp / SUBBLOCKS, row = block * SUBBLOCK;
  int half = side * 8 * N;
  /* d_qg becomes dq, d_kg what k gets as read, d_kk what it gets as written. */
  float w[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < N; ++n)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int i = row + g + 8 * r;
      float2 k_i = unpack<E>(*(const uint32_t *)(k + i * LD + half + 8 * n + 2 * t));
      float kept = DELTA ? beta[i] * kappa[i] : kappa[i];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sums.d_qg[n][2 * r + e] *= gamma[i];
        if constexpr (DELTA) sums.d_kg[n][2 * r + e] *= -beta[i] * gamma[i];
        sums.d_kk[n][2 * r + e] *= kept;
        w[r] += (e ? k_i.y : k_i.x) * sums.d_kk[n][2 * r + e];
      }
    }
#pragma unroll
  for (int b = 0; b < SUBBLOCKS; ++b) {
    uint32_t a[4];
    if (b <= block) {
      load_left(a, n_p + row * SQUARE + b * 16, SQUARE, lane);
      add_product(sums.d_qg, a, k + b * 16 * LD + half, LD, lane);
      if constexpr (DELTA) {
        load_left(a, n_b + row * SQUARE + b * 16, SQUARE, lane);
        add_product(sums.d_kg, a, k + b * 16 * LD + half, LD, lane);
      }
    }
    if (b >= block) {
      load_left_transposed(a, n_p + b * 16 * SQUARE + row, SQUARE, lane);
      add_product(sums.d_kk, a, q + b * 16 * LD + half, LD, lane);
      if (DELTA) {
        load_left_transposed(a, n_b + b * 16 * SQUARE + row, SQUARE, lane);
        add_product(sums.d_kk, a, k + b * 16 * LD + half, LD, lane);
      }
    }
  }
  gradient_rows<E> rows_q = gradient_rows_of<E, DIM>(all.d_q, all.head_d_q, p, l);
  gradient_rows<E> rows_k = gradient_rows_of<E, DIM>(all.d_k, all.head_d_k, p, l);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int i = row + g + 8 * r;
    float d_g = w[r]; /* w is in d_kk too, where it does not belong to dG */
    bool write_q = rows_q.data && i < l.tokens, write_k = rows_k.data && i < l.tokens;
    E *to_q = rows_q.data + i * rows_q.token, *to_k = rows_k.data + i * rows_k.token;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      int c = half + 8 * n + 2 * t;
      float2 q_i = unpack<E>(*(const uint32_t *)(q + i * LD + c));
      float2 k_i = unpack<E>(*(const uint32_t *)(k + i * LD + c));
      const float *dq = sums.d_qg[n] + 2 * r, *written = sums.d_kk[n] + 2 * r;
      float read[2] = {0, 0};
      if constexpr (DELTA) read[0] = sums.d_kg[n][2 * r], read[1] = sums.d_kg[n][2 * r + 1];
      d_g += q_i.x * dq[0] + k_i.x * (read[0] - written[0]);
      d_g += q_i.y * dq[1] + k_i.y * (read[1] - written[1]);
      if (write_q) *(uint32_t *)(to_q + c) = pack<E>(p.scale * dq[0], p.scale * dq[1]);
      if (write_k)
        *(uint32_t *)(to_k + c) =
            pack<E>(p.scale * (read[0] + written[0]), p.scale * (read[1] + written[1]));
    }
    for (int d = 1; d < 4; d *= 2) {
      d_g += __shfl_xor_sync(~0u, d_g, d);
      w[r] += __shfl_xor_sync(~0u, w[r], d);
    }
    if (t == 0)
      token_sums[2 * side * CHUNK + i] = d_g, token_sums[(2 * side + 1) * CHUNK + i] = w[r];
  }
  __syncthreads();
  if (warp || !all.d_decay.data) return;
  /* Lane l has the tokens 2 l, 2 l + 1. */
  float edge = 0, d_g[2], of_w[2], sum = 0;
  for (int c = lane; c < DIM; c += 32) edge += boundary[c];
  for (int d = 1; d < 32; d *= 2) edge += __shfl_xor_sync(~0u, edge, d);
  for (int e = 0; e < 2; ++e) {
    d_g[e] = of_w[e] = 0;
    for (int side = 0; side < sums.SIDES; ++side) {
      d_g[e] += token_sums[2 * side * CHUNK + 2 * lane + e];
      of_w[e] += token_sums[(2 * side + 1) * CHUNK + 2 * lane + e];
    }
  }
  float after = d_g[0] + d_g[1], before = of_w[0] + of_w[1];
  for (int d = 1; d < 32; d *= 2) {
    float x = __shfl_down_sync(~0u, after, d), y = __shfl_up_sync(~0u, before, d);
    if (lane + d < 32) after += x;
    if (lane >= d) before += y;
  }
  before -= of_w[0] + of_w[1];
  for (int e = 0; e < 2; ++e) {
    int i = 2 * lane + e;
    float x = edge + (e ? after - d_g[0] : after) + (e ? before + of_w[0] : before);
    if (i >= l.tokens) continue;
    sum += p.scale * x;
    if (!all.decay_parts) *all.d_decay.at(l.s.batch, l.s.first + l.first + i, l.head) = p.scale * x;
  }
  if (!all.decay_parts) return;
  for (int d = 1; d < 32; d *= 2) sum += __shfl_xor_sync(~0u, sum, d);
  if (lane == 0) all.decay_parts[l.at] = sum;
}

/* What the pairs of a subblock give to its tokens at the places of 16 channels from `channel` on
 * where they are not factored, every pair with its own decay: to dq, dk and dG - w, [3][16
 * channels][EXACT_LD]. */
template <typename E> __device__ inline bool is_factored(float last) {
  return coarse<E>() && last >= MIN_FACTORED;
}
template <typename E, int DIM, bool DELTA>
__device__ __forceinline__ void exact_pairs(float *to, const char *memory, const chunk_gates &gates,
                                            int block, int channel, int lane) {
  using layout = gradient_layout<DIM, true, DELTA>;
  const E *n_p = (const E *)(memory + layout::N_P) + block * SUBBLOCK * (SQUARE + 1);
  const E *n_b = (const E *)(memory + layout::N_B) + block * SUBBLOCK * (SQUARE + 1);
  const float *total = (const float *)(memory + layout::GATES) + block * DIM;
  const float *own_sum = (const float *)(memory + layout::GATES) + 2 * SUBBLOCKS * DIM;
  int i = lane % SUBBLOCK, token = block * SUBBLOCK + i; /* half of a warp for half of the pairs */
  bool given = token < gates.tokens;
  __syncwarp();
#pragma unroll 1
  for (int m = 0; m < 16; ++m) {
    int c = channel + m;
    if (is_factored<E>(total[c])) continue;
    float own = own_sum[token * layout::LD + c], from_q = 0, from_k = 0, onto = 0;
    c = 2 * place_of_pair(c / 2) + c % 2;
    float q_i = given ? float(((const E *)gates.q)[token * gates.q_token + c]) : 0;
    float k_i = given ? float(((const E *)gates.k)[token * gates.k_token + c]) : 0;
    /* Above the diagonal n_p and n_b are 0. */
#pragma unroll 1
    for (int j = lane / SUBBLOCK; j < SUBBLOCK; j += 2) {
      float decay = power_of_two(-fabsf(own - __shfl_sync(~0u, own, j)));
      float q_j = decay * __shfl_sync(~0u, q_i, j), k_j = decay * __shfl_sync(~0u, k_i, j);
      from_q += float(n_p[i * SQUARE + j]) * k_j;
      onto += float(n_p[j * SQUARE + i]) * q_j;
      if (DELTA) {
        from_k += float(n_b[i * SQUARE + j]) * k_j;
        onto += float(n_b[j * SQUARE + i]) * k_j;
      }
    }
    from_q += __shfl_xor_sync(~0u, from_q, 16);
    from_k += __shfl_xor_sync(~0u, from_k, 16);
    onto += __shfl_xor_sync(~0u, onto, 16);
    float *place = to + m * EXACT_LD + i;
    if (lane < SUBBLOCK) {
      place[0] = from_q;
      place[16 * EXACT_LD] = from_k + onto;
      place[32 * EXACT_LD] = q_i * from_q + k_i * (from_k - onto);
    }
  }
  __syncwarp();
}

/* The same with a decay per channel. Everything that reads is summed in units of the border before
 * the own subblock, everything that is written in those of the border after it, so that what comes
 * from other subblocks and from the states is decayed from border to border on its way. Inside the
 * subblock that takes the inverse of the subblock's decay, at most 2^86; channels that decay
 * further, and float16, add pair by pair. */
template <typename E, int DIM, bool DELTA>
__device__ __forceinline__ void channel_gradients(const backward_parameters &all, char *memory,
                                                  const place &l, const chunk_gates &gates,
                                                  value_sums<DIM, true, DELTA> &sums) {
  using layout = gradient_layout<DIM, true, DELTA>;
  constexpr int LD = layout::LD, N = sums.N;
  const parameters &p = all.in;
  const E *q = (const E *)(memory + layout::Q), *k = (const E *)(memory + layout::K);
  const E *k_prefix = (const E *)(memory + layout::K_PREFIX);
  const E *n_p = (const E *)(memory + layout::N_P), *n_b = (const E *)(memory + layout::N_B);
  const float *beta = (const float *)(memory + layout::BETA);
  const float *boundary = (const float *)(memory + layout::BOUNDARY);
  const float *total = (const float *)(memory + layout::GATES), *power = total + SUBBLOCKS * DIM;
  const float *own_sum = power + SUBBLOCKS * DIM;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  int block = warp % SUBBLOCKS, side = warp / SUBBLOCKS, row = block * SUBBLOCK;
  int half = side * 8 * N, own_pair = half + 2 * t;
  float *w_sums = (float *)(memory + layout::SHARED), *g_sums = w_sums + SUBBLOCKS * DIM;
  float *exact = g_sums + SUBBLOCKS * DIM + warp * EXACT_FLOATS;

  /* w, and its sum over the subblock. */
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if constexpr (DELTA)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float of_beta = beta[row + g + e / 2 * 8];
        sums.d_kg[n][e] *= -of_beta;
        sums.d_kk[n][e] *= of_beta;
      }
    float2 after = {1, 1};
#pragma unroll
    for (int b = 1; b < SUBBLOCKS; ++b) {
      float2 f = *(const float2 *)(power + b * DIM + own_pair + 8 * n);
      if (b > block) after.x *= f.x, after.y *= f.y;
    }
    const E *keys = k + (row + g) * LD + own_pair + 8 * n;
    float2 low = unpack<E>(*(const uint32_t *)keys);
    float2 high = unpack<E>(*(const uint32_t *)(keys + 8 * LD));
    float x = low.x * sums.d_kk[n][0] + high.x * sums.d_kk[n][2];
    float y = low.y * sums.d_kk[n][1] + high.y * sums.d_kk[n][3];
#pragma unroll
    for (int d = 4; d < 32; d *= 2)
      x += __shfl_xor_sync(~0u, x, d), y += __shfl_xor_sync(~0u, y, d);
    if (g == 0)
      *(float2 *)(w_sums + block * DIM + own_pair + 8 * n) = make_float2(after.x * x, after.y * y);
  }

  /* From border to border. */
  auto decay_columns = [&](auto &acc, int b) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      float2 f = *(const float2 *)(power + b * DIM + own_pair + 8 * n);
      acc[n][0] *= f.x, acc[n][1] *= f.y, acc[n][2] *= f.x, acc[n][3] *= f.y;
    }
  };
  for (int b = 0; b < block; ++b) {
    uint32_t a[4];
    decay_columns(sums.d_qg, b);
    load_left(a, n_p + row * SQUARE + b * 16, SQUARE, lane);
    add_product(sums.d_qg, a, k + b * 16 * LD + half, LD, lane);
    if constexpr (DELTA) {
      decay_columns(sums.d_kg, b);
      load_left(a, n_b + row * SQUARE + b * 16, SQUARE, lane);
      add_product(sums.d_kg, a, k + b * 16 * LD + half, LD, lane);
    }
  }
  for (int b = SUBBLOCKS - 1; b > block; --b) {
    uint32_t a[4];
    decay_columns(sums.d_kk, b);
    load_left_transposed(a, n_p + b * 16 * SQUARE + row, SQUARE, lane);
    add_product(sums.d_kk, a, q + b * 16 * LD + half, LD, lane);
    if (DELTA) {
      load_left_transposed(a, n_b + b * 16 * SQUARE + row, SQUARE, lane);
      add_product(sums.d_kk, a, k_prefix + b * 16 * LD + half, LD, lane);
    }
  }

  /* The own subblock; dG - w to the place of d_kk. */
  uint32_t of_p[4], of_p_transposed[4], of_b[4], of_b_transposed[4];
  load_left(of_p, n_p + row * (SQUARE + 1), SQUARE, lane);
  load_left_transposed(of_p_transposed, n_p + row * (SQUARE + 1), SQUARE, lane);
  if (DELTA) load_left(of_b, n_b + row * (SQUARE + 1), SQUARE, lane);
  if (DELTA) load_left_transposed(of_b_transposed, n_b + row * (SQUARE + 1), SQUARE, lane);
  uint32_t d_q[2][4], d_k[2][4];
  gradient_rows<E> rows_q = gradient_rows_of<E, DIM>(all.d_q, all.head_d_q, p, l);
  gradient_rows<E> rows_k = gradient_rows_of<E, DIM>(all.d_k, all.head_d_k, p, l);
#pragma unroll
  for (int n = 0; n < N; n += 2) {
    float from_q[2][4] = {}, from_k[2][4] = {}, onto_k[2][4] = {}, last[2][2], back[2][2];
    if (coarse<E>()) {
      int at = row * LD + half + 8 * n;
      add_product(from_q, of_p, k + at, LD, lane);
      add_product(onto_k, of_p_transposed, q + at, LD, lane);
      if (DELTA) add_product(from_k, of_b, k + at, LD, lane);
      if (DELTA) add_product(onto_k, of_b_transposed, k_prefix + at, LD, lane);
    }
    bool all_factored = true;
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      float2 x = *(const float2 *)(total + block * DIM + own_pair + 8 * (n + m));
      last[m][0] = x.x, last[m][1] = x.y;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        bool factored = is_factored<E>(last[m][e]);
        back[m][e] = factored ? power_of_two(-last[m][e]) : 0;
        all_factored = all_factored && factored;
      }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int at = (row + g + 8 * r) * LD + own_pair + 8 * (n + m);
        float2 own = *(const float2 *)(own_sum + at);
        float2 q_p = unpack<E>(*(const uint32_t *)(q + at));
        float2 k_s = unpack<E>(*(const uint32_t *)(k + at)), k_p = {0, 0};
        if (DELTA) k_p = unpack<E>(*(const uint32_t *)(k_prefix + at));
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float &of_q = from_q[m][2 * r + e], &of_k = onto_k[m][2 * r + e];
          float &kept = sums.d_kk[n + m][2 * r + e], sum = e ? own.y : own.x;
          float read = sums.d_qg[n + m][2 * r + e] + back[m][e] * of_q;
          float written = kept + back[m][e] * of_k, prefix = power_of_two(sum);
          kept = (e ? q_p.y : q_p.x) * read - (e ? k_s.y : k_s.x) * written;
          of_q = prefix * read;
          of_k = power_of_two(last[m][e] - sum) * written;
          if constexpr (DELTA) {
            float read_k = sums.d_kg[n + m][2 * r + e] + back[m][e] * from_k[m][2 * r + e];
            kept += (e ? k_p.y : k_p.x) * read_k;
            of_k += prefix * read_k;
          }
        }
      }
    if (__any_sync(~0u, !all_factored)) {
      exact_pairs<E, DIM, DELTA>(exact, memory, gates, block, half + 8 * n, lane);
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if (is_factored<E>(last[m][e % 2])) continue;
          const float *pairs = exact + (8 * m + 2 * t + e % 2) * EXACT_LD + g + e / 2 * 8;
          from_q[m][e] += pairs[0];
          onto_k[m][e] += pairs[16 * EXACT_LD];
          sums.d_kk[n + m][e] += pairs[32 * EXACT_LD];
        }
    }
#pragma unroll
    for (int m = 0; m < 2; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float *x = from_q[m] + 2 * r, *y = onto_k[m] + 2 * r;
        d_q[r][n % 4 + m] = pack<E>(p.scale * x[0], p.scale * x[1]);
        d_k[r][n % 4 + m] = pack<E>(p.scale * y[0], p.scale * y[1]);
      }
    if (n % 4 == 0) continue;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      int i = row + g + 8 * r, c = half + 8 * (n - 2) + 8 * t;
      const uint32_t *x = d_q[r], *y = d_k[r];
      if (i >= l.tokens) continue;
      if (rows_q.data)
        *(uint4 *)(rows_q.data + i * rows_q.token + c) = make_uint4(x[0], x[1], x[2], x[3]);
      if (rows_k.data)
        *(uint4 *)(rows_k.data + i * rows_k.token + c) = make_uint4(y[0], y[1], y[2], y[3]);
    }
  }
  if (!all.d_decay.data) return;

    /* Sums of dG - w from a token to the subblock's end: rows g of a column lie 4 lanes apart. */
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float begin[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float low = sums.d_kk[n][e], high = sums.d_kk[n][2 + e];
#pragma unroll
      for (int d = 1; d < 8; d *= 2) {
        float x = __shfl_down_sync(~0u, low, 4 * d), y = __shfl_down_sync(~0u, high, 4 * d);
        if (g + d < 8) low += x, high += y;
      }
      low += __shfl_sync(~0u, high, t);
      sums.d_kk[n][e] = low, sums.d_kk[n][2 + e] = high;
      begin[e] = low;
    }
    if (g == 0)
      *(float2 *)(g_sums + block * DIM + own_pair + 8 * n) = make_float2(begin[0], begin[1]);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; ++n) {
    float2 edge = *(const float2 *)(boundary + own_pair + 8 * n);
#pragma unroll
    for (int b = 0; b < SUBBLOCKS; ++b) {
      float2 w = *(const float2 *)(w_sums + b * DIM + own_pair + 8 * n);
      edge.x += w.x, edge.y += w.y;
      if (b <= block) continue;
      float2 later = *(const float2 *)(g_sums + b * DIM + own_pair + 8 * n);
      edge.x += later.x, edge.y += later.y;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e)
      sums.d_kk[n][e] = p.scale * (sums.d_kk[n][e] + (e % 2 ? edge.y : edge.x));
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    int i = row + g + 8 * r;
    if (i >= l.tokens) continue;
    float *to = all.d_decay.at(l.s.batch, l.s.first + l.first + i, l.head) + half + 8 * t;
#pragma unroll
    for (int n = 0; n < N; n += 2) {
      const float *x = sums.d_kk[n] + 2 * r, *y = sums.d_kk[n + 1] + 2 * r;
      *(float4 *)(to + n / 4 * 32 + n % 4 * 2) = make_float4(x[0], x[1], y[0], y[1]);
    }
  }
}

/* q, k and the decays to what channel_gradients reads. A thread has two channels of a subblock, or
 * of ROWS of its tokens where there are more threads. */
template <typename E, int DIM, bool DELTA>
__device__ __forceinline__ void load_decayed_rows(char *memory, const chunk_gates &gates) {
  using layout = gradient_layout<DIM, true, DELTA>;
  constexpr int LD = layout::LD, PAIRS = DIM / 2, PARTS = layout::THREADS / (SUBBLOCKS * PAIRS);
  constexpr int ROWS = SUBBLOCK / PARTS;
  int pair = threadIdx.x % PAIRS, block = threadIdx.x / PAIRS % SUBBLOCKS, row = block * SUBBLOCK;
  int first = threadIdx.x / PAIRS / SUBBLOCKS * ROWS;
  const float *decay = gates.decay + row * gates.decay_token + 2 * pair;
  const E *q = (const E *)gates.q + (row + first) * gates.q_token + 2 * pair;
  const E *k = (const E *)gates.k + (row + first) * gates.k_token + 2 * pair;
  float2 all[SUBBLOCK], sum[ROWS], last = {0, 0};
  uint32_t of_q[ROWS], of_k[ROWS];
#pragma unroll
  for (int i = 0; i < SUBBLOCK; ++i) {
    bool given = row + i < gates.tokens;
    all[i] = given ? *(const float2 *)(decay + i * gates.decay_token) : make_float2(0, 0);
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    bool given = row + first + i < gates.tokens;
    of_q[i] = given ? *(const uint32_t *)(q + i * gates.q_token) : 0;
    of_k[i] = given ? *(const uint32_t *)(k + i * gates.k_token) : 0;
  }
  int at = (row + first) * LD + 2 * place_of_pair(pair);
  float *total = (float *)(memory + layout::GATES) + block * DIM + 2 * place_of_pair(pair);
  float *own_sum = (float *)(memory + layout::GATES) + 2 * SUBBLOCKS * DIM + at;
#pragma unroll
  for (int i = 0; i < SUBBLOCK; ++i) {
    last.x += log2_decay(all[i].x), last.y += log2_decay(all[i].y);
    if (i / ROWS * ROWS == first) sum[i % ROWS] = last;
  }
  if (first == 0) {
    *(float2 *)total = last;
    *(float2 *)(total + SUBBLOCKS * DIM) = make_float2(power_of_two(last.x), power_of_two(last.y));
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    float2 x = unpack<E>(of_q[i]), y = unpack<E>(of_k[i]);
    float e0 = power_of_two(sum[i].x), e1 = power_of_two(sum[i].y);
    *(float2 *)(own_sum + i * LD) = sum[i];
    *(uint32_t *)((E *)(memory + layout::Q) + at + i * LD) = pack<E>(x.x * e0, x.y * e1);
    if (DELTA)
      *(uint32_t *)((E *)(memory + layout::K_PREFIX) + at + i * LD) = pack<E>(y.x * e0, y.y * e1);
    *(uint32_t *)((E *)(memory + layout::K) + at + i * LD) =
        pack<E>(y.x * power_of_two(last.x - sum[i].x), y.y * power_of_two(last.y - sum[i].y));
  }
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__global__ void __launch_bounds__(gradient_layout<DIM, CHANNEL, DELTA>::THREADS,
                                  gradient_layout<DIM, CHANNEL, DELTA>::BLOCKS)
    gradient_kernel(backward_parameters all) {
  extern __shared__ __align__(16) char memory[];
  using layout = gradient_layout<DIM, CHANNEL, DELTA>;
  constexpr int LD = layout::LD, THREADS = layout::THREADS;
  constexpr int PAIRS = DIM / 2, PARTS = THREADS / PAIRS;
  const parameters &p = all.in;
  int thread = threadIdx.x;
  place l;
  l.head = blockIdx.y;
  unsigned chunks = (unsigned)p.chunks;
  l.first = (int64_t)(blockIdx.x % chunks) * CHUNK;
  l.s = find_sequence(p.offsets, p.length, (int)(blockIdx.x / chunks));
  if (l.first >= l.s.tokens) return;
  l.at = (int64_t)blockIdx.x * p.value_heads + l.head;
  chunk_gates gates = gates_of<E>(p, l.s, l.first, l.head);
  l.tokens = gates.tokens;

  if (!CHANNEL) {
    copy_rows((E *)(memory + layout::Q), LD, (const E *)gates.q, gates.q_token, CHUNK, DIM,
              l.tokens, thread, THREADS);
    copy_rows((E *)(memory + layout::K), LD, (const E *)gates.k, gates.k_token, CHUNK, DIM,
              l.tokens, thread, THREADS);
  }
  value_pieces<E, DIM, CHANNEL, DELTA> pieces(all, l);
  char *stages = memory + layout::SHARED;
#pragma unroll
  for (int stage = 0; stage < layout::STAGES; ++stage)
    pieces.fetch(stages + stage * layout::STAGE_BYTES);
  if (DELTA && thread < CHUNK)
    ((float *)(memory + layout::BETA))[thread] =
        thread < l.tokens ? gates.beta[thread * gates.beta_token] : 0;
  float *of_gates = (float *)(memory + layout::GATES);
  if constexpr (CHANNEL) {
    load_decayed_rows<E, DIM, DELTA>(memory, gates);
  } else {
    float *sum = of_gates, *gamma = sum + CHUNK, *kappa = gamma + CHUNK;
    if (thread < 32) sum_decays(sum, gates, thread);
    __syncthreads();
    if (thread < CHUNK) {
      gamma[thread] = power_of_two(sum[thread]);
      kappa[thread] = power_of_two(sum[CHUNK - 1] - sum[thread]);
    }
  }

  value_sums<DIM, CHANNEL, DELTA> sums = {};
  for (int v = 0, stage = 0; v < p.columns; v += layout::COLUMNS) {
    char *values = stages + stage * layout::STAGE_BYTES;
    copy_wait<layout::STAGES - 1>();
    __syncthreads();
    add_values<E>(all, memory, values, l, v, sums);
    __syncthreads();
    pieces.fetch(values);
    stage = stage + 1 < layout::STAGES ? stage + 1 : 0;
  }
  store_score_gradients<E>(all, memory, l, sums);
  float2 *parts = (float2 *)(memory + layout::SHARED);
  parts[thread] = sums.boundary;
  __syncthreads();
  if (thread < PAIRS) {
    float2 x = {0, 0}, full = {0, 0};
    for (int i = 0; i < PARTS; ++i)
      x.x += parts[i * PAIRS + thread].x, x.y += parts[i * PAIRS + thread].y;
    if (CHANNEL) {
      for (int b = 0; b < SUBBLOCKS; ++b) {
        float2 y = *(const float2 *)(of_gates + b * DIM + 2 * thread);
        full.x += y.x, full.y += y.y;
      }
    } else {
      full.x = full.y = of_gates[CHUNK - 1];
    }
    *(float2 *)((float *)(memory + layout::BOUNDARY) + 2 * thread) =
        make_float2(power_of_two(full.x) * x.x, power_of_two(full.y) * x.y);
  }
  __syncthreads();
  if constexpr (CHANNEL)
    channel_gradients<E>(all, memory, l, gates, sums);
  else
    token_gradients<E>(all, memory, l, sums);
}

/* dq and dk of a key head: the sum over its value heads, in order. */
template <typename E> __global__ void gather_kernel(backward_parameters all, int dim) {
  const parameters &p = all.in;
  int head = blockIdx.y, thread = threadIdx.x;
  int64_t first = blockIdx.x % p.chunks * CHUNK;
  sequence s = find_sequence(p.offsets, p.length, (int)(blockIdx.x / p.chunks));
  int64_t from = ((int64_t)blockIdx.x * p.value_heads + head * p.group) * CHUNK * dim;
  auto sum = [&](const void *parts, int at) {
    float2 x = {0, 0};
    for (int h = 0; h < p.group; ++h) {
      const E *part = (const E *)parts + from + (int64_t)h * CHUNK * dim + at;
      float2 y = unpack<E>(*(const uint32_t *)part);
      x.x += y.x, x.y += y.y;
    }
    return pack<E>(x.x, x.y);
  };
  for (int at = 2 * thread; at < CHUNK * dim; at += 2 * blockDim.x) {
    int i = at / dim, c = at % dim;
    if (first + i >= s.tokens) return;
    int64_t token = s.first + first + i;
    if (all.d_q.data)
      *(uint32_t *)(as<E>(all.d_q).at(s.batch, token, head) + c) = sum(all.head_d_q, at);
    if (all.d_k.data)
      *(uint32_t *)(as<E>(all.d_k).at(s.batch, token, head) + c) = sum(all.head_d_k, at);
  }
}

/* The gradient of a constant decay: the sum over the chunks of all sequences, in order. */
__global__ void decay_kernel(backward_parameters all, int batch) {
  __shared__ float sums[256];
  const parameters &p = all.in;
  int head = blockIdx.x, thread = threadIdx.x;
  float sum = 0;
  for (int64_t unit = thread; unit < batch * p.chunks; unit += 256) {
    sequence s = find_sequence(p.offsets, p.length, (int)(unit / p.chunks));
    if (unit % p.chunks * CHUNK < s.tokens) sum += all.decay_parts[unit * p.value_heads + head];
  }
  sums[thread] = sum;
  for (int apart = 128; apart; apart /= 2) {
    __syncthreads();
    if (thread < apart) sums[thread] += sums[thread + apart];
  }
  if (thread == 0) *all.d_decay.at(0, 0, head) = sums[0];
}

/* ---- Planning ---- */

enum { SLABS }; /* of choice->values: slabs of a block of the sweeps */

/* Bytes of the workspace's parts, in order. */
struct parts {
  size_t prepared, state, d_state, x, d_u, head_d_q, head_d_k, decay;
  size_t sum() const {
    return prepared + state + d_state + x + d_u + head_d_q + head_d_k + decay;
  }
};

template <int DIM, bool CHANNEL, bool DELTA> parts parts_of(const attn_recurrent_problem *problem) {
  size_t chunks = (size_t)((problem->length + CHUNK - 1) / CHUNK);
  size_t units = (size_t)(problem->batch * problem->value_heads) * chunks;
  size_t columns = (size_t)problem->value_dim;
  parts bytes = {};
  bytes.prepared = units * record<DIM, CHANNEL, DELTA>::BACKWARD_BYTES;
  bytes.state = bytes.d_state = units * columns * DIM * 2;
  if (DELTA) bytes.x = bytes.d_u = units * CHUNK * columns * 2;
  if (problem->value_heads > problem->heads)
    bytes.head_d_q = bytes.head_d_k = units * CHUNK * DIM * 2;
  if (problem->decay == ATTN_DECAY_HEAD) bytes.decay = units * 4;
  return bytes;
}

/* Two stages of a sweep. */
template <int DIM, bool CHANNEL, bool DELTA> constexpr int sweep_bytes(int slabs) {
  return 2 * (tiles<__half, DIM, CHANNEL, DELTA>::BYTES + CHUNK * (slabs * SLAB + 8) * 2) +
         (DELTA ? 0 : slabs * (int)sizeof(backward_handover<DIM>));
}

template <int DIM, bool CHANNEL, bool DELTA>
bool plan_for(const attn_cuda_device *device, const attn_recurrent_problem *problem,
              attn_cuda_choice *choice) {
  int64_t pairs = problem->batch * problem->value_heads, slabs = problem->value_dim / SLAB;
  int64_t all = slabs;
  auto fits = [&](int64_t slabs) {
    return (size_t)sweep_bytes<DIM, CHANNEL, DELTA>((int)slabs) <= device->shared_bytes;
  };
  while (slabs % 2 == 0 && (slabs > 8 || !fits(slabs) ||
                            (slabs > 2 && pairs * (all / slabs) * 2 <= device->multiprocessors)))
    slabs /= 2;
  if (slabs > 8) slabs = 1;
  if (!fits(slabs) || (size_t)gradient_layout<DIM, CHANNEL, DELTA>::BYTES > device->shared_bytes)
    return false;
  choice->values[SLABS] = slabs;
  choice->workspace_bytes = parts_of<DIM, CHANNEL, DELTA>(problem).sum();
  snprintf(choice->description, sizeof choice->description,
           "%s, chunks of %d prepared at once, two sweeps of %d value columns a block",
           rule_name(DELTA), CHUNK, (int)slabs * SLAB);
  return true;
}

bool plan(const attn_cuda_device *device, const attn_recurrent_problem *problem,
          attn_cuda_choice *choice) {
  if (!accepts(device, problem, ATTN_PASS_BACKWARD)) return false;
  return with_instance(problem, [&](auto dim, auto channel, auto delta) {
    return plan_for<dim.value, channel.value, delta.value>(device, problem, choice);
  });
}

bool suits(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  /* What is written in pieces of 16 bytes. */
  int64_t of_keys = problem->decay == ATTN_DECAY_CHANNEL ? 8 : 2;
  return reads_aligned(problem, args) && aligned(args->d_o, 8) && aligned(args->d_q, of_keys) &&
         aligned(args->d_k, of_keys) && aligned(args->d_v, 8) &&
         (problem->decay != ATTN_DECAY_CHANNEL || aligned(args->d_decay, 4));
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
attn_status launch(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                   backward_parameters p, char *workspace, cudaStream_t stream) {
  using layout = gradient_layout<DIM, CHANNEL, DELTA>;
  parts bytes = parts_of<DIM, CHANNEL, DELTA>(problem);
  auto take = [&](size_t size) { return (workspace += size) - size; };
  p.in.prepared = take(bytes.prepared);
  p.state = take(bytes.state);
  p.d_state = take(bytes.d_state);
  p.x = take(bytes.x);
  p.d_u = take(bytes.d_u);
  p.head_d_q = take(bytes.head_d_q);
  p.head_d_k = take(bytes.head_d_k);
  if (p.d_decay.data && bytes.decay) p.decay_parts = (float *)take(bytes.decay);

  dim3 all((unsigned)(problem->batch * p.in.chunks), (unsigned)p.in.value_heads);
  int shared = prepare_bytes<E, DIM, CHANNEL, DELTA>();
  attn_status status = allow_shared(prepare_kernel<E, DIM, CHANNEL, DELTA, true>, shared);
  if (status != ATTN_OK) return status;
  prepare_kernel<E, DIM, CHANNEL, DELTA, true><<<all, PREPARE_THREADS, shared, stream>>>(p.in);
  ATTN_CUDA_TRY_LAUNCH("the preparation of chunks");

  int slabs = (int)choice->values[SLABS];
  shared = sweep_bytes<DIM, CHANNEL, DELTA>(slabs);
  dim3 grid((unsigned)(p.in.columns / SLAB / slabs), (unsigned)p.in.value_heads,
            (unsigned)problem->batch);
  if constexpr (DELTA) {
    status = allow_shared(delta_sweep_kernel<E, DIM, CHANNEL, true>, shared);
    if (status == ATTN_OK)
      status = allow_shared(delta_sweep_kernel<E, DIM, CHANNEL, false>, shared);
    if (status != ATTN_OK) return status;
    delta_sweep_kernel<E, DIM, CHANNEL, true><<<grid, slabs * 32, shared, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("the forward sweep over chunks");
    delta_sweep_kernel<E, DIM, CHANNEL, false><<<grid, slabs * 32, shared, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("the backward sweep over chunks");
  } else {
    int forward = 2 * additive_stage<E, DIM>(slabs * SLAB);
    status = allow_shared(additive_forward_kernel<E, DIM, CHANNEL>, forward);
    if (status == ATTN_OK) status = allow_shared(additive_backward_kernel<E, DIM, CHANNEL>, shared);
    if (status != ATTN_OK) return status;
    additive_forward_kernel<E, DIM, CHANNEL><<<grid, slabs * 32, forward, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("the forward sweep over chunks");
    additive_backward_kernel<E, DIM, CHANNEL><<<grid, slabs * 64, shared, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("the backward sweep over chunks");
  }

  status = allow_shared(gradient_kernel<E, DIM, CHANNEL, DELTA>, layout::BYTES);
  if (status != ATTN_OK) return status;
  gradient_kernel<E, DIM, CHANNEL, DELTA><<<all, layout::THREADS, layout::BYTES, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the gradients of chunks");
  if (p.decay_parts) {
    decay_kernel<<<(unsigned)p.in.value_heads, 256, 0, stream>>>(p, (int)problem->batch);
    ATTN_CUDA_TRY_LAUNCH("the sum of a constant decay's gradient");
  }
  if (p.in.group == 1) return ATTN_OK;
  dim3 heads(all.x, (unsigned)problem->heads);
  gather_kernel<E><<<heads, 256, 0, stream>>>(p, DIM);
  ATTN_CUDA_TRY_LAUNCH("the sum over value heads");
  return ATTN_OK;
}

template <typename E>
attn_status launch_any(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                       const backward_parameters &p, char *workspace, cudaStream_t stream) {
  return with_instance(problem, [&](auto dim, auto channel, auto delta) {
    return launch<E, dim.value, channel.value, delta.value>(choice, problem, p, workspace, stream);
  });
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
  if (args->d_decay.data) p.d_decay = decay_rows<float>(problem, args->d_decay);
  if (args->d_beta.data) p.d_beta = rows_of<float>(args->d_beta, ragged);
  if (args->d_final_state.data) p.d_final = states_of(args->d_final_state);
  if (args->d_initial_state.data) p.d_initial = states_of(args->d_initial_state);
  return problem->dtype == ATTN_BF16
             ? launch_any<__nv_bfloat16>(choice, problem, p, (char *)workspace, stream)
             : launch_any<__half>(choice, problem, p, (char *)workspace, stream);
}

} // namespace

extern const recurrent_algorithm recurrent_chunks_backward = {"recurrence by chunks, backward",
                                                              ATTN_PASS_BACKWARD, plan, suits, run};
