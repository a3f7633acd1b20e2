/* The recurrent engine's additive update on Hopper's matrix units, for no decay, a constant decay
 * per head (Lightning Attention-2, arXiv 2401.04658) and a decay per token and head (Mamba-2, arXiv
 * 2405.21060):
 *
 *   S_t = alpha_t S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t.
 *
 * One kernel, `scan`, does it by chunks of 64 tokens. With G_i the sum of log2 alpha over the
 * chunk's tokens up to i, G_all that of the whole chunk, and S the state before it,
 *
 *   O = scale (2^{G_i} (Q S) + (Q K^T (.) 2^{G_i - G_j} [i >= j]) V),
 *   S = 2^{G_all} S + (2^{G_all - G_j} K)^T V.
 *
 * Every exponent is <= 0, whatever the decay.
 *
 * The backward pass is runs of it, some of them backwards in time (`reverse`: from the last chunk
 * to the first, and i <= j):
 *
 *   dQ: dO for Q, V for K, K for V;   dV: K for Q, Q for K, dO for V, reversed;
 *   dK: V for Q, dO for K, Q for V, reversed.
 *
 * dK and dV share their state and all of their operands, so one launch finds both where dim and
 * value_dim are equal.
 *
 * In reverse the part of G_i is played by G_all - G_i: the token's own decay does not act between
 * it and later tokens, and G_all - (G_all - G_j) = G_j weighs what enters the state. So all of the
 * arithmetic is common: a row's exponent A_i, a column's A_j, and G_all.
 *
 * A block holds one or two consumer warpgroups, 64 value columns each, that share Q and K but not
 * their part of the state: float32 in registers, and rounded in shared memory as the B operand of
 * Q S. A producer warp fills a ring of chunks by bulk tensor copies.
 *
 * Where there are fewer sequences and heads than multiprocessors, sequences are cut into segments:
 * a first launch finds what each segment adds to the state, a second one the state before each
 * segment. With a constant decay the first reads no more tokens of a segment than still weigh. */
#include "kernels/cuda/hopper.cuh"

#include <cstdio>
#include <cstring>

using namespace hopper;

namespace {

constexpr int CHUNK = 64;
constexpr int TILE_BYTES = CHUNK * 128; /* 64 tokens by 64 columns */
constexpr float LOG2_E = 1.4426950408889634f;
/* 2^-256 is zero in float32; sums of 64 such exponents keep an error below 1e-3. */
constexpr float LEAST_LOG2 = -256.f;
/* Tokens that weigh less than 2^-64 beside the newest do not reach the state's 24 bits. */
constexpr float NEGLIGIBLE_LOG2 = -64.f;

/* A float32 state [rows, columns] for each sequence and head. */
struct state_view {
  float *data;
  int64_t batch, head, row, column; /* strides */
  float scale;                      /* multiplies what is read or written */
};

/* Strides in elements. */
struct scan_output {
  void *data;
  int64_t token, head;
};

struct scan_parameters {
  CUtensorMap q, k, v, o;
  CUtensorMap w, d_w; /* for gradients: below */
  scan_output d_w_out;
  scan_output out;               /* what o maps */
  int q_group, k_group, v_group; /* value heads for each head of q, k, v */
  const int32_t *offsets;
  int batch, heads, length;
  attn_decay decay_kind;
  const float *decay;
  int64_t decay_batch, decay_token, decay_head;
  state_view initial, final;
  float *states; /* [batch, heads, segments, rows, columns], or NULL for one segment */
  float *totals; /* [batch, heads, segments]: log2 of a segment's decay */
  int segments, segment_chunks;
  int reverse;
  float scale;
};

/* A segment of one sequence and head. */
struct work {
  int batch, head;
  int place, last;  /* among the sequence's segments in the order of the scan; whether the last */
  int64_t start;    /* the sequence's first token in the tensors */
  int length;       /* of the sequence */
  int first, count; /* chunks */
};

__device__ bool locate(const scan_parameters &p, int item, work *w) {
  int pairs = p.batch * p.heads, pair = item % pairs;
  w->place = item / pairs;
  w->head = pair % p.heads;
  w->batch = pair / p.heads;
  w->start = p.offsets ? p.offsets[w->batch] : 0;
  w->length = p.offsets ? (int)(p.offsets[w->batch + 1] - w->start) : p.length;
  int chunks = (w->length + CHUNK - 1) / CHUNK;
  int segments = max(1, (chunks + p.segment_chunks - 1) / p.segment_chunks);
  if (w->place >= segments) return false;
  w->last = w->place == segments - 1;
  w->first = (p.reverse ? segments - 1 - w->place : w->place) * p.segment_chunks;
  w->count = min(chunks - w->first, p.segment_chunks);
  return true;
}

/* Chunks of a segment that the state after it depends on: the last `needed` ones. */
__device__ int needed_chunks(const scan_parameters &p, const work &w) {
  if (p.decay_kind != ATTN_DECAY_HEAD) return w.count;
  float log2_decay = p.decay[w.head * p.decay_head] * LOG2_E;
  float chunks = NEGLIGIBLE_LOG2 / (CHUNK * log2_decay) + 2;
  return chunks < w.count ? (int)chunks : w.count;
}

/* What a launch computes: the state after each segment; outputs; or the gradients of keys and
 * values, which share their operands. */
enum scan_kind { STATES, OUTPUTS, GRADIENTS };

template <scan_kind KIND, int DK, int DV> struct shape {
  static constexpr int consumers = KIND == GRADIENTS ? 2 : DV / 64;
  static constexpr int threads = 128 * (consumers + 1);
  /* In a multiprocessor; two leave too few registers for states of 128 rows. */
  static constexpr int blocks = consumers == 1 && DK == 64 ? 2 : 1;
  /* For each thread; together no more than the block starts with, or it waits forever: 168 for 384
   * threads or 128 for 256. */
  static constexpr int consumer_registers = blocks == 2 ? 216 : 232;
  static constexpr int producer_registers = 40;
  static constexpr bool moves_registers = consumers == 2 || blocks == 2;
  static constexpr int k_tiles = DK / 64, v_tiles = DV / 64;
  /* A stage: Q, K, V; with gradients one more of V's width. */
  static constexpr int k_offset = KIND == STATES ? 0 : k_tiles * TILE_BYTES;
  static constexpr int v_offset = k_offset + k_tiles * TILE_BYTES;
  static constexpr int w_offset = v_offset + v_tiles * TILE_BYTES;
  static constexpr int stage_bytes = w_offset + (KIND == GRADIENTS ? v_tiles * TILE_BYTES : 0);
  static constexpr int state_bytes = KIND == STATES ? 0 : k_tiles * v_tiles * TILE_BYTES;
  static constexpr int out_bytes = KIND == STATES    ? 0
                                   : KIND == OUTPUTS ? v_tiles * TILE_BYTES
                                                     : (k_tiles + v_tiles) * TILE_BYTES;
  static constexpr int room = 224 * 1024 / blocks - state_bytes - out_bytes;
  static constexpr int stages = room / stage_bytes > 4 ? 4 : room / stage_bytes;
  static constexpr int state_offset = stages * stage_bytes;
  static constexpr int out_offset = state_offset + state_bytes;
  static constexpr int exponents_offset = out_offset + out_bytes;
  static constexpr int exponents = CHUNK + 4; /* of a stage: A, then G_all */
  static constexpr int barriers_offset = exponents_offset + stages * exponents * 4;
  static constexpr int bytes = barriers_offset + stages * 16 + 1024; /* and alignment */
};

/* Fills the ring. One warp. */
template <scan_kind KIND, typename S>
__device__ void produce(const scan_parameters &p, char *shared, uint32_t base) {
  const int lane = threadIdx.x % 32, pairs = p.batch * p.heads;
  uint32_t full = base + S::barriers_offset, empty = full + S::stages * 8;
  int step = 0;
  for (int item = blockIdx.x; item < pairs * p.segments; item += gridDim.x) {
    work w;
    if (!locate(p, item, &w)) continue;
    if (KIND == STATES && w.last) continue;
    const int count = KIND == STATES ? needed_chunks(p, w) : w.count;
    const float *decay = p.decay + w.head * p.decay_head;
    float constant = 0;
    if (p.decay_kind == ATTN_DECAY_HEAD) constant = *decay * LOG2_E;
    if (constant < LEAST_LOG2) constant = LEAST_LOG2;
    if (p.decay_kind == ATTN_DECAY_TOKEN)
      decay += (p.offsets ? 0 : w.batch * p.decay_batch) + w.start * p.decay_token;
    for (int i = w.count - count; i < w.count; i++, step++) {
      const int chunk = w.first + (p.reverse ? w.count - 1 - i : i);
      const int valid = min(w.length - chunk * CHUNK, CHUNK);
      float log2_decays[2];
#pragma unroll
      for (int j = 0; j < 2; j++) {
        int token = 2 * lane + j;
        log2_decays[j] = token < valid ? constant : 0;
        if (p.decay_kind == ATTN_DECAY_TOKEN && token < valid) {
          float log2_decay = decay[(int64_t)(chunk * CHUNK + token) * p.decay_token] * LOG2_E;
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
      __syncwarp();
      if (lane == 0) {
        uint32_t tile = base + stage * S::stage_bytes, barrier = full + stage * 8;
        int token = (int)w.start + chunk * CHUNK, batch = p.offsets ? 0 : w.batch;
        barrier_expect(barrier, S::stage_bytes);
#pragma unroll
        for (int j = 0; j < S::k_tiles; j++) {
          if (KIND != STATES)
            tensor_load(tile + j * TILE_BYTES, &p.q, barrier, j * 64, w.head / p.q_group, token,
                        batch);
          tensor_load(tile + S::k_offset + j * TILE_BYTES, &p.k, barrier, j * 64,
                      w.head / p.k_group, token, batch);
        }
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
  }
}

/* Accumulators of a warpgroup for 64 rows: element i of a thread is in row 16 warp + lane / 4 (and
 * 8 below for i % 4 >= 2) and column 8 (i / 4) + 2 (lane % 4) + i % 2. */

/* From the float32 matrix at `data`. */
template <int count>
__device__ void matrix_read(float (&values)[count], const float *data, int64_t row_stride,
                            int64_t column_stride, float scale) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i++)
    values[i] = scale * data[(row + i % 4 / 2 * 8) * row_stride +
                             (i / 4 * 8 + lane % 4 * 2 + i % 2) * column_stride];
}

template <int count>
__device__ void matrix_write(const float (&values)[count], float *data, int64_t row_stride,
                             int64_t column_stride, float scale) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i++)
    data[(row + i % 4 / 2 * 8) * row_stride + (i / 4 * 8 + lane % 4 * 2 + i % 2) * column_stride] =
        scale * values[i];
}

/* Rounded, into swizzled tiles of 64 columns that lie `tile_stride` bytes apart. */
template <typename T, int count>
__device__ __forceinline__ void tile_write(uint32_t tile, int tile_stride,
                                           const float (&values)[count]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < count / 4; j += 2)
    matrix_store(tile + j / 8 * tile_stride + swizzled(row, j % 8 + lane / 16),
                 element<T>::pack(values[4 * j], values[4 * j + 1]),
                 element<T>::pack(values[4 * j + 2], values[4 * j + 3]),
                 element<T>::pack(values[4 * j + 4], values[4 * j + 5]),
                 element<T>::pack(values[4 * j + 6], values[4 * j + 7]));
}

/* The address that a view has for a sequence and head. */
__device__ float *state_at(const state_view &view, const work &w) {
  return view.data + w.batch * view.batch + w.head * view.head;
}

/* Chunk i of a segment in the order of the scan. */
__device__ int chunk_of(const scan_parameters &p, const work &w, int i) {
  return w.first + (p.reverse ? w.count - 1 - i : i);
}

/* Sixteen rows of 64 (the warp's) by 64 k as the A operands of wgmma. */
template <int steps>
__device__ __forceinline__ void rows_load(uint32_t (&a)[steps][4], uint32_t tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int k = 0; k < steps; k++)
    matrix_load(a[k],
                tile + k / 4 * TILE_BYTES + swizzled(16 * warp + lane % 16, k % 4 * 2 + lane / 16));
}

/* Sixteen columns (the warp's) of 64 tokens, transposed and weighed by 2^{G_all - A_j}, as the A
 * operands [columns, tokens]. */
template <typename T, int tiles>
__device__ __forceinline__ void columns_load(uint32_t (&a)[tiles][CHUNK / 16][4], uint32_t tile,
                                             const float *exponents, float all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int k = 0; k < CHUNK / 16; k++) {
    float2 low = *(const float2 *)&exponents[16 * k + lane % 4 * 2];
    float2 high = *(const float2 *)&exponents[16 * k + lane % 4 * 2 + 8];
    low = make_float2(exp2_approximate(all - low.x), exp2_approximate(all - low.y));
    high = make_float2(exp2_approximate(all - high.x), exp2_approximate(all - high.y));
#pragma unroll
    for (int m = 0; m < tiles; m++) {
      matrix_load_transposed(
          a[m][k], tile + m * TILE_BYTES +
                       swizzled(16 * k + lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2));
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float2 pair = element<T>::unpack(a[m][k][j]), weight = j < 2 ? low : high;
        a[m][k][j] = element<T>::pack(pair.x * weight.x, pair.y * weight.y);
      }
    }
  }
}

/* Scores [64, 64] times 2^{A_i - A_j} where row i sees column j, else 0, as A operands. */
template <typename T>
__device__ __forceinline__ void weigh(uint32_t (&a)[CHUNK / 16][4], const float (&scores)[32],
                                      const float *exponents, int reverse, int valid) {
  const int lane = threadIdx.x % 32, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const float exponent0 = exponents[row0], exponent1 = exponents[row0 + 8];
#pragma unroll
  for (int j = 0; j < 8; j++) {
    int column0 = 8 * j + lane % 4 * 2;
    float2 exponent = *(const float2 *)&exponents[column0];
    float weighed[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      int row = row0 + i / 2 * 8, column = column0 + i % 2;
      bool seen = (reverse ? column >= row : column <= row) && column < valid;
      float weight =
          exp2_approximate((i < 2 ? exponent0 : exponent1) - (i % 2 ? exponent.y : exponent.x));
      weighed[i] = seen ? scores[4 * j + i] * weight : 0;
    }
    a[j / 2][j % 2 * 2] = element<T>::pack(weighed[0], weighed[1]);
    a[j / 2][j % 2 * 2 + 1] = element<T>::pack(weighed[2], weighed[3]);
  }
}

/* The warpgroup's output tiles of a chunk to memory. All of its threads call it, after a barrier
 * that follows the writes to the tiles. */
template <typename T>
__device__ __forceinline__ void out_store(const scan_parameters &p, const work &w,
                                          const CUtensorMap *map, const scan_output &out,
                                          const char *shared, uint32_t base, uint32_t tile,
                                          int tiles, int column0, int token, int valid) {
  if (p.offsets && valid < CHUNK) {
    /* The next sequence's rows follow. */
    T *rows = (T *)out.data + (w.start + token) * out.token + w.head * out.head + column0;
    for (int i = threadIdx.x % 128; i < valid * tiles * 8; i += 128) {
      int row = i / (tiles * 8), piece = i % (tiles * 8);
      *(uint4 *)(rows + row * out.token + piece * 8) =
          *(uint4 *)(shared + (tile - base) + piece / 8 * TILE_BYTES + swizzled(row, piece % 8));
    }
  } else if (threadIdx.x % 128 == 0) {
    for (int i = 0; i < tiles; i++)
      tensor_store(map, tile + i * TILE_BYTES, column0 + 64 * i, w.head, (int)w.start + token,
                   p.offsets ? 0 : w.batch);
  }
}

/* States and outputs. Each warpgroup has 64 columns of the state. */
template <typename T, scan_kind KIND, int DK, int DV>
__device__ void consume(const scan_parameters &p, char *shared, uint32_t base) {
  typedef shape<KIND, DK, DV> S;
  constexpr int M = DK / 64;
  constexpr bool OUTPUT = KIND == OUTPUTS;
  const int lane = threadIdx.x % 32, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int group = threadIdx.x / 128 - 1, pairs = p.batch * p.heads;
  const uint32_t full = base + S::barriers_offset, empty = full + S::stages * 8;
  const uint32_t state_tile = base + S::state_offset + group * M * TILE_BYTES;
  const uint32_t out_tile = base + S::out_offset + group * TILE_BYTES;
  const bool leader = threadIdx.x % 128 == 0;
  int step = 0;
  for (int item = blockIdx.x; item < pairs * p.segments; item += gridDim.x) {
    work w;
    if (!locate(p, item, &w)) continue;
    if (!OUTPUT && w.last) continue;
    const int count = OUTPUT ? w.count : needed_chunks(p, w);
    float *slot = p.states;
    if (slot) slot += ((int64_t)(w.batch * p.heads + w.head) * p.segments + w.place) * DK * DV;
    float state[M][32];
#pragma unroll
    for (int m = 0; m < M; m++) {
      if (OUTPUT && slot) {
        matrix_read(state[m], slot + 64 * (m * DV + group), DV, 1, 1);
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
    for (int i = w.count - count; i < w.count; i++, step++) {
      const int token = chunk_of(p, w, i) * CHUNK, valid = min(w.length - token, CHUNK);
      const int stage = step % S::stages;
      const uint32_t q_tile = base + stage * S::stage_bytes, k_tile = q_tile + S::k_offset;
      const uint32_t v_tile = q_tile + S::v_offset + group * TILE_BYTES;
      const float *exponents = (float *)(shared + S::exponents_offset) + stage * S::exponents;
      barrier_wait(full + stage * 8, step / S::stages % 2);
      const float all = exponents[CHUNK];
      total += all;

      float scores[32], out[32];
      uint32_t q[DK / 16][4], kt[M][CHUNK / 16][4], weights[CHUNK / 16][4];
      if (OUTPUT) {
        rows_load(q, q_tile);
        pin(scores);
        pin(out);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < DK / 16; k++) /* Q K^T */
          wgmma<T, 0>(scores, q[k], descriptor(k_tile + k / 4 * TILE_BYTES + k % 4 * 32), k > 0);
        wgmma_commit();
#pragma unroll
        for (int k = 0; k < DK / 16; k++) /* Q S */
          wgmma<T, 1>(out, q[k], descriptor(state_tile + k * 2048), k > 0);
        wgmma_commit();
      }
      columns_load<T>(kt, k_tile, exponents, all);
      if (valid < CHUNK) {
        /* What lies after the sequence's end may be anything, NaN too. */
#pragma unroll
        for (int k = 0; k < CHUNK / 16; k++)
#pragma unroll
          for (int m = 0; m < M; m++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
              int column = 16 * k + j / 2 * 8 + lane % 4 * 2;
              if (column >= valid) kt[m][k][j] = 0;
              if (column + 1 >= valid) kt[m][k][j] &= 0xffff;
            }
        for (int j = threadIdx.x % 128; j < (CHUNK - valid) * 8; j += 128)
          *(uint4 *)(shared + (v_tile - base) + valid * 128 + j * 16) = make_uint4(0, 0, 0, 0);
        proxy_fence();
        named_sync(1 + group, 128);
      }
      if (OUTPUT) {
        wgmma_wait<1>();
        pin(scores);
        weigh<T>(weights, scores, exponents, p.reverse, valid);
        const float weight0 = exp2_approximate(exponents[row0]);
        const float weight1 = exp2_approximate(exponents[row0 + 8]);
        wgmma_wait<0>();
        pin(out);
#pragma unroll
        for (int j = 0; j < 32; j++) out[j] *= j % 4 < 2 ? weight0 : weight1;
        pin(out);
      }
      /* Not before: registers of a wgmma may not be written while another one runs. */
      const float state_decay = exp2_approximate(all);
#pragma unroll
      for (int m = 0; m < M; m++) {
#pragma unroll
        for (int j = 0; j < 32; j++) state[m][j] *= state_decay;
        pin(state[m]);
      }
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
          wgmma<T, 1>(state[m], kt[m][k], descriptor(v_tile + k * 2048), 1);
      wgmma_commit();

      if (OUTPUT) {
        wgmma_wait<1>();
        pin(out);
        /* From here on nobody in the group reads the old state, nor a copy the old output. */
        if (leader) tensor_store_read();
        named_sync(1 + group, 128);
#pragma unroll
        for (int j = 0; j < 32; j++) out[j] *= p.scale;
        tile_write<T>(out_tile, 0, out);
      }
      wgmma_wait<0>();
#pragma unroll
      for (int m = 0; m < M; m++) pin(state[m]);
      if (lane == 0) barrier_arrive(empty + stage * 8);
      if (OUTPUT) {
#pragma unroll
        for (int m = 0; m < M; m++) tile_write<T>(state_tile + m * TILE_BYTES, 0, state[m]);
        proxy_fence();
        named_sync(1 + group, 128);
        out_store<T>(p, w, &p.o, p.out, shared, base, out_tile, 1, 64 * group, token, valid);
      }
    }
    if (!OUTPUT) {
#pragma unroll
      for (int m = 0; m < M; m++) matrix_write(state[m], slot + 64 * (m * DV + group), DV, 1, 1);
      if (p.decay_kind == ATTN_DECAY_HEAD) /* also of chunks that were left out */
        total = p.decay[w.head * p.decay_head] * LOG2_E *
                (min(w.length, (w.first + w.count) * CHUNK) - w.first * CHUNK);
      if (leader && group == 0) p.totals[(slot - p.states) / (DK * DV)] = total;
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

/* dV and dK together, where q is K, k is Q, v is dO, o is dV, w is V and d_w is dK: the first
 * warpgroup has
 *
 *   dK = scale (2^{A_i} (V dS^T) + (V dO^T (.) 2^{A_i - A_j} [i <= j]) Q)
 *
 * and the second dV in the same form with K, dS, Q and dO. With D = 128 each has 64 rows of dS;
 * with D = 64 both have all of it. */
template <typename T, int D, int group>
__device__ void consume_gradients(const scan_parameters &p, char *shared, uint32_t base) {
  typedef shape<GRADIENTS, D, D> S;
  constexpr int TILES = D / 64, STATE_STRIDE = D * 128;
  const int lane = threadIdx.x % 32, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
  constexpr int part = D == 128 ? group : 0; /* of the state's rows */
  const int pairs = p.batch * p.heads;
  const uint32_t full = base + S::barriers_offset, empty = full + S::stages * 8;
  const uint32_t state_tile = base + S::state_offset, part_tile = state_tile + part * TILE_BYTES;
  const uint32_t out_tile = base + S::out_offset + group * TILES * TILE_BYTES;
  const bool leader = threadIdx.x % 128 == 0, writer = D == 128 || group == 0;
  int step = 0;
  for (int item = blockIdx.x; item < pairs * p.segments; item += gridDim.x) {
    work w;
    if (!locate(p, item, &w)) continue;
    float state[D / 2];
    if (p.states) {
      int64_t slot = (int64_t)(w.batch * p.heads + w.head) * p.segments + w.place;
      matrix_read(state, p.states + slot * D * D + 64 * part * D, D, 1, 1);
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
    for (int i = 0; i < w.count; i++, step++) {
      const int token = chunk_of(p, w, i) * CHUNK, valid = min(w.length - token, CHUNK);
      const int stage = step % S::stages;
      const uint32_t k_tile = base + stage * S::stage_bytes, q_tile = k_tile + S::k_offset;
      const uint32_t d_o_tile = k_tile + S::v_offset, v_tile = k_tile + S::w_offset;
      const float *exponents = (float *)(shared + S::exponents_offset) + stage * S::exponents;
      barrier_wait(full + stage * 8, step / S::stages % 2);
      const float all = exponents[CHUNK];
      if (valid < CHUNK) {
        /* What lies after the sequence's end may be anything, NaN too. */
        for (int j = threadIdx.x - 128; j < (CHUNK - valid) * 8; j += 256)
          for (int tile = 0; tile < TILES; tile++) {
            int at = tile * TILE_BYTES + valid * 128 + j * 16;
            *(uint4 *)(shared + (q_tile - base) + at) = make_uint4(0, 0, 0, 0);
            *(uint4 *)(shared + (d_o_tile - base) + at) = make_uint4(0, 0, 0, 0);
          }
        proxy_fence();
        named_sync(1, 256);
      }
      float scores[32], out[D / 2];
      uint32_t qt[1][CHUNK / 16][4], weights[CHUNK / 16][4];
      const uint32_t left_tile = group ? q_tile : d_o_tile, right_tile = group ? d_o_tile : q_tile;
      /* From shared memory: registers are short. */
      const uint32_t row_tile = group ? k_tile : v_tile;
      const auto a = [&](int k) { return descriptor(row_tile + k / 4 * TILE_BYTES + k % 4 * 32); };
      pin(scores);
      pin(out);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < D / 16; k++) /* V dO^T, K Q^T */
        wgmma<T, 0>(scores, a(k), descriptor(left_tile + k / 4 * TILE_BYTES + k % 4 * 32), k > 0);
      wgmma_commit();
      if constexpr (group == 0) {
#pragma unroll
        for (int k = 0; k < D / 16; k++) /* V dS^T */
          wgmma<T, 0>(out, a(k), descriptor(state_tile + k / 4 * STATE_STRIDE + k % 4 * 32), k > 0);
      } else {
#pragma unroll
        for (int k = 0; k < D / 16; k++) /* K dS */
          wgmma<T, 1>(out, a(k), descriptor(state_tile + k * 2048, STATE_STRIDE), k > 0);
      }
      wgmma_commit();
      columns_load<T>(qt, q_tile + part * TILE_BYTES, exponents, all);
      wgmma_wait<1>();
      pin(scores);
      weigh<T>(weights, scores, exponents, 1, valid);
      const float weight0 = exp2_approximate(exponents[row0]);
      const float weight1 = exp2_approximate(exponents[row0 + 8]);
      const float state_decay = exp2_approximate(all);
      wgmma_wait<0>();
      pin(out);
#pragma unroll
      for (int j = 0; j < D / 2; j++) out[j] *= j % 4 < 2 ? weight0 : weight1;
#pragma unroll
      for (int j = 0; j < D / 2; j++) state[j] *= state_decay;
      pin(out);
      pin(state);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < CHUNK / 16; k++)
        wgmma<T, 1>(out, weights[k], descriptor(right_tile + k * 2048, TILE_BYTES), 1);
      wgmma_commit();
#pragma unroll
      for (int k = 0; k < CHUNK / 16; k++) /* Q^T dO */
        wgmma<T, 1>(state, qt[0][k], descriptor(d_o_tile + k * 2048, TILE_BYTES), 1);
      wgmma_commit();

      wgmma_wait<1>();
      pin(out);
      /* From here on nobody reads the old state, nor a copy the old outputs. */
      if (leader) tensor_store_read();
      named_sync(1, 256);
#pragma unroll
      for (int j = 0; j < D / 2; j++) out[j] *= p.scale;
      tile_write<T>(out_tile, TILE_BYTES, out);
      wgmma_wait<0>();
      pin(state);
      if (lane == 0) barrier_arrive(empty + stage * 8);
      if (writer) tile_write<T>(part_tile, STATE_STRIDE, state);
      proxy_fence();
      named_sync(1, 256);
      out_store<T>(p, w, group ? &p.o : &p.d_w, group ? p.out : p.d_w_out, shared, base, out_tile,
                   TILES, 0, token, valid);
    }
    if (w.last && p.final.data && writer) {
      const state_view &view = p.final;
      matrix_write(state, state_at(view, w) + 64 * part * view.row, view.row, view.column,
                   view.scale);
    }
  }
  if (leader) tensor_store_wait();
}

template <typename T, scan_kind KIND, int DK, int DV>
__global__ void __launch_bounds__(shape<KIND, DK, DV>::threads, shape<KIND, DK, DV>::blocks)
    scan(const __grid_constant__ scan_parameters p) {
  typedef shape<KIND, DK, DV> S;
  extern __shared__ char dynamic[];
  uint32_t base = (shared_address(dynamic) + 1023) / 1024 * 1024;
  char *shared = dynamic + (base - shared_address(dynamic));
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < S::stages; stage++) {
      barrier_init(base + S::barriers_offset + stage * 8, 1);
      barrier_init(base + S::barriers_offset + (S::stages + stage) * 8, 4 * S::consumers);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    if (S::moves_registers) registers_fewer<S::producer_registers>();
    if (threadIdx.x < 32) produce<KIND, S>(p, shared, base);
  } else if constexpr (KIND == GRADIENTS) {
    registers_more<S::consumer_registers>();
    if (threadIdx.x < 256)
      consume_gradients<T, DK, 0>(p, shared, base);
    else
      consume_gradients<T, DK, 1>(p, shared, base);
  } else {
    if (S::moves_registers) registers_more<S::consumer_registers>();
    consume<T, KIND, DK, DV>(p, shared, base);
  }
}

/* From what each segment adds to the state before each segment, in place. A thread has four
 * elements of one state. */
template <int DK, int DV>
__global__ void chain_segments(const __grid_constant__ scan_parameters p) {
  constexpr int BATCH = 8; /* loads in flight */
  const int pair = blockIdx.y, element = (blockIdx.x * blockDim.x + threadIdx.x) * 4;
  const int row = element / DV, column = element % DV;
  float4 *slot = (float4 *)(p.states + (int64_t)pair * p.segments * DK * DV + element);
  const float *totals = p.totals + (int64_t)pair * p.segments;
  const int batch = pair / p.heads, head = pair % p.heads;
  int length = p.offsets ? p.offsets[batch + 1] - p.offsets[batch] : p.length;
  int chunks = (length + CHUNK - 1) / CHUNK;
  int segments = max(1, (chunks + p.segment_chunks - 1) / p.segment_chunks);
  float4 running = make_float4(0, 0, 0, 0);
  if (p.initial.data) {
    const float *data = p.initial.data + batch * p.initial.batch + head * p.initial.head;
    int64_t step = p.initial.column;
    data += row * p.initial.row + column * step;
    running = make_float4(p.initial.scale * data[0], p.initial.scale * data[step],
                          p.initial.scale * data[2 * step], p.initial.scale * data[3 * step]);
  }
  for (int first = 0; first < segments; first += BATCH) {
    float4 added[BATCH];
    float decays[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i < segments - 1) {
        added[i] = slot[(int64_t)(first + i) * (DK * DV / 4)];
        decays[i] = exp2_approximate(totals[first + i]);
      }
#pragma unroll
    for (int i = 0; i < BATCH; i++)
      if (first + i < segments) {
        slot[(int64_t)(first + i) * (DK * DV / 4)] = running;
        running.x = decays[i] * running.x + added[i].x;
        running.y = decays[i] * running.y + added[i].y;
        running.z = decays[i] * running.z + added[i].z;
        running.w = decays[i] * running.w + added[i].w;
      }
  }
}

/* out[token, head] = the sum over the group of parts[token, head * group + ...]: gradients of
 * queries and keys that several value heads share. */
template <typename T>
__global__ void sum_groups(const void *parts, void *out, int64_t tokens, int64_t length, int heads,
                           int group, int dim, int64_t out_batch, int64_t out_token,
                           int64_t out_head) {
  const int words = dim / 2;
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens * heads * words) return;
  int word = (int)(i % words), head = (int)(i / words % heads);
  int64_t token = i / words / heads;
  const uint32_t *part = (const uint32_t *)parts + (token * heads + head) * group * words + word;
  float2 sum = make_float2(0, 0);
  for (int g = 0; g < group; g++) {
    float2 pair = element<T>::unpack(part[g * words]);
    sum.x += pair.x, sum.y += pair.y;
  }
  T *row = (T *)out + token / length * out_batch + token % length * out_token + head * out_head;
  *(uint32_t *)(row + 2 * word) = element<T>::pack(sum.x, sum.y);
}

/* Strides in elements of a tensor [batch, length, heads, ...]; ragged: batch 0. */
struct strides {
  int64_t batch, token, head;
};

/* The gradient of a decay per token from those of queries and keys. The log decays act through
 * their sums G_i, and
 *
 *   dL/dG_i = q_i . dq_i - k_i . dk_i,   dg_t = sum_{i >= t} dL/dG_i + <dS_N, S_N>.
 *
 * This finds the terms, DIM / 8 threads for each token and value head. */
template <typename T, int DIM>
__global__ void decay_terms(const T *q, const T *k, const T *d_q, const T *d_k, float *d_decay,
                            int64_t tokens, int64_t length, int heads, int group, strides q_step,
                            strides k_step, strides d_q_step, strides d_k_step, int d_group,
                            strides d_decay_step) {
  constexpr int LANES = DIM / 8;
  const int64_t index = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / LANES;
  const int64_t row = index < tokens * heads ? index : 0;
  const int head = (int)(row % heads), lane = threadIdx.x % LANES;
  const int64_t token = row / heads % length, batch = row / heads / length;
  const auto load = [&](const T *data, const strides &step, int h) {
    return *(const uint4 *)(data + batch * step.batch + token * step.token + h * step.head +
                            8 * lane);
  };
  const uint4 words[4] = {load(q, q_step, head / group), load(d_q, d_q_step, head / d_group),
                          load(k, k_step, head / group), load(d_k, d_k_step, head / d_group)};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const float2 a = element<T>::unpack((&words[0].x)[i]), b = element<T>::unpack((&words[1].x)[i]);
    const float2 c = element<T>::unpack((&words[2].x)[i]), d = element<T>::unpack((&words[3].x)[i]);
    sum += a.x * b.x - c.x * d.x;
    sum += a.y * b.y - c.y * d.y;
  }
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane == 0 && row == index)
    d_decay[batch * d_decay_step.batch + token * d_decay_step.token + head * d_decay_step.head] =
        sum;
}

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

/* Their sums from the sequence's end, in place; a block of 1024 threads for each sequence and value
 * head. `final_states` [batch, heads, size] is what d_final goes with. */
__global__ void decay_sums(float *d_decay, strides step, const int32_t *offsets, int64_t length,
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
  d_decay += batch * step.batch + start * step.token + head * step.head;
  for (int64_t last = length - 1; last >= 0; last -= 1024) {
    const int64_t token = last - threadIdx.x;
    float sum = token >= 0 ? d_decay[token * step.token] : 0;
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

/* ------------------------------------------------------------------------------ host's side */

/* choice->values */
enum { SEGMENTS, SEGMENT_CHUNKS, MULTIPROCESSORS };

/* [batch, length, heads, columns], or [1, total, heads, columns] when ragged. */
struct operand {
  const void *data;
  int64_t batch, token, head; /* strides */
  int64_t heads, columns;
};

operand operand_of(const attn_recurrent_problem *problem, const attn_tensor *t) {
  int first = problem->ragged ? 0 : 1;
  return operand{t->data,
                 problem->ragged ? 0 : t->stride[0],
                 t->stride[first],
                 t->stride[first + 1],
                 t->shape[first + 1],
                 t->shape[first + 2]};
}

bool operand_suits(const attn_recurrent_problem *problem, const attn_tensor *t) {
  if (!t->data) return true;
  if (problem->ragged && !t->shape[0]) return false; /* no tensor map is empty */
  operand x = operand_of(problem, t);
  int64_t tokens = problem->ragged ? t->shape[0] : problem->length;
  return map_possible(x.data, x.heads, tokens, problem->ragged ? 1 : problem->batch, x.head,
                      x.token, x.batch);
}

state_view view_of(const attn_tensor *t, bool transposed, double scale) {
  if (!t->data) return state_view{};
  return state_view{(float *)t->data,
                    t->stride[0],
                    t->stride[1],
                    transposed ? 1 : t->stride[2],
                    transposed ? t->stride[2] : 1,
                    (float)scale};
}

/* Queries, keys, values and results of one run of the scan, in the roles that they play in it; w
 * and d_w where it finds the gradients of keys and values together. */
struct scan_operands {
  operand q, k, v, o;
  state_view initial, final;
  bool reverse;
  operand w, d_w;
};

size_t align(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/* Bytes of the segments' states and decays. */
size_t segments_bytes(const attn_recurrent_problem *problem, int64_t segments) {
  int64_t slots = problem->batch * problem->value_heads * segments;
  return segments < 2 ? 0
                      : align((size_t)(slots * problem->dim * problem->value_dim) * sizeof(float)) +
                            align((size_t)slots * sizeof(float));
}

template <typename T, scan_kind KIND, int DK, int DV>
attn_status launch(const attn_cuda_choice *choice, const scan_parameters &p, cudaStream_t stream) {
  typedef shape<KIND, DK, DV> S;
  int items = p.batch * p.heads * p.segments;
  int most = (int)choice->values[MULTIPROCESSORS] * S::blocks;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(scan<T, KIND, DK, DV>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes));
  const int grid = items < most ? items : most;
  scan<T, KIND, DK, DV><<<grid, S::threads, S::bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("scan");
  return ATTN_OK;
}

template <typename T, int DK, int DV>
attn_status scan_launch(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                        const attn_recurrent_args *args, const scan_operands &x, void *workspace,
                        cudaStream_t stream) {
  scan_parameters p;
  memset(&p, 0, sizeof p);
  int64_t tokens = problem->ragged ? args->q.shape[0] : problem->length;
  int64_t batch = problem->ragged ? 1 : problem->batch;
  const struct {
    CUtensorMap *map;
    const operand *tensor;
  } maps[] = {{&p.q, &x.q}, {&p.k, &x.k}, {&p.v, &x.v},
              {&p.o, &x.o}, {&p.w, &x.w}, {&p.d_w, &x.d_w}};
  for (const auto &entry : maps) {
    const operand *t = entry.tensor;
    if (t->data && !map_encode(entry.map, element<T>::map_type, t->data, t->columns, t->heads,
                               tokens, batch, t->head, t->token, t->batch))
      return attn_cuda_fail(ATTN_INTERNAL,
                            "recurrent: the driver refuses a tensor map of [%lld, %lld, %lld, "
                            "%lld]",
                            (long long)batch, (long long)tokens, (long long)t->heads,
                            (long long)t->columns);
  }
  p.out = scan_output{(void *)x.o.data, x.o.token, x.o.head};
  p.d_w_out = scan_output{(void *)x.d_w.data, x.d_w.token, x.d_w.head};
  p.q_group = (int)(problem->value_heads / x.q.heads);
  p.k_group = (int)(problem->value_heads / x.k.heads);
  p.v_group = (int)(problem->value_heads / x.v.heads);
  p.offsets = problem->ragged ? args->offsets : NULL;
  p.batch = (int)problem->batch;
  p.heads = (int)problem->value_heads;
  p.length = (int)problem->length;
  p.decay_kind = problem->decay;
  p.decay = (const float *)args->decay.data;
  if (problem->decay == ATTN_DECAY_HEAD) {
    p.decay_head = args->decay.stride[0];
  } else if (problem->decay == ATTN_DECAY_TOKEN) {
    int first = problem->ragged ? 0 : 1;
    p.decay_batch = problem->ragged ? 0 : args->decay.stride[0];
    p.decay_token = args->decay.stride[first];
    p.decay_head = args->decay.stride[first + 1];
  }
  p.initial = x.initial;
  p.final = x.final;
  p.segments = (int)choice->values[SEGMENTS];
  p.segment_chunks = (int)choice->values[SEGMENT_CHUNKS];
  p.reverse = x.reverse;
  p.scale = (float)problem->scale;

  int pairs = p.batch * p.heads;
  if (p.segments > 1) {
    p.states = (float *)workspace;
    p.totals =
        (float *)((char *)workspace + align((size_t)pairs * p.segments * DK * DV * sizeof(float)));
    attn_status status = launch<T, STATES, DK, DV>(choice, p, stream);
    if (status != ATTN_OK) return status;
    chain_segments<DK, DV><<<dim3(DK * DV / 4 / 256, pairs), 256, 0, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("chain_segments");
  }
  if constexpr (DK == DV)
    if (x.w.data) return launch<T, GRADIENTS, DK, DV>(choice, p, stream);
  return launch<T, OUTPUTS, DK, DV>(choice, p, stream);
}

attn_status scan_run(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                     const attn_recurrent_args *args, const scan_operands &x, void *workspace,
                     cudaStream_t stream) {
  const bool bf16 = problem->dtype == ATTN_BF16;
#define CASE(dk, dv)                                                                               \
  if (x.q.columns == dk && x.v.columns == dv)                                                      \
    return bf16 ? scan_launch<__nv_bfloat16, dk, dv>(choice, problem, args, x, workspace, stream)  \
                : scan_launch<__half, dk, dv>(choice, problem, args, x, workspace, stream);
  CASE(128, 128)
  CASE(64, 64)
  CASE(128, 64)
  CASE(64, 128)
#undef CASE
  return attn_cuda_fail(ATTN_INTERNAL, "recurrent: no scan of dim %lld and value_dim %lld",
                        (long long)x.q.columns, (long long)x.v.columns);
}

/* Segments of a sequence, from a model in units of one chunk's time in a block. Blocks go round by
 * round over their items, each of which costs some chunks' time to begin; finding the segments'
 * states costs about half as much for each chunk as the outputs, or little where decay is constant.
 */
void choose_segments(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                     attn_cuda_choice *choice) {
  const double ITEM = 2, STATES = problem->decay == ATTN_DECAY_HEAD ? 0.15 : 0.5, LAUNCHES = 4;
  const int64_t LEAST_CHUNKS = 8, MOST_SEGMENTS = 64;
  int64_t chunks = (problem->length + CHUNK - 1) / CHUNK;
  int64_t pairs = problem->batch * problem->value_heads;
  int64_t slots = device->multiprocessors * (problem->value_dim == 64 ? 2 : 1);
  double best = 0;
  for (int64_t segments = 1; segments <= MOST_SEGMENTS; segments++) {
    int64_t length = (chunks + segments - 1) / segments;
    if (segments > 1 && (length < LEAST_CHUNKS || (chunks + length - 1) / length != segments))
      continue;
    int64_t rounds = (pairs * segments + slots - 1) / slots;
    double cost = (double)rounds * ((double)length + ITEM);
    if (segments > 1) {
      cost += STATES * (double)(pairs * chunks) / (double)slots + LAUNCHES;
      cost += (double)(pairs * segments) / (double)slots; /* states written, chained and read */
    }
    if (segments > 1 && cost >= best) continue;
    best = cost;
    choice->values[SEGMENTS] = segments;
    choice->values[SEGMENT_CHUNKS] = length > 0 ? length : 1;
  }
  choice->values[MULTIPROCESSORS] = device->multiprocessors;
}

bool plan_any(const attn_cuda_device *device, const attn_recurrent_problem *problem) {
  return device->major == 9 && device->minor == 0 && problem->update == ATTN_UPDATE_ADDITIVE &&
         !problem->normalise && (problem->dtype == ATTN_BF16 || problem->dtype == ATTN_F16) &&
         problem->decay != ATTN_DECAY_CHANNEL && (problem->dim == 64 || problem->dim == 128) &&
         (problem->value_dim == 64 || problem->value_dim == 128) && problem->length >= 2 * CHUNK &&
         problem->length < (int64_t)1 << 30 &&
         problem->batch * problem->value_heads < (int64_t)1 << 24;
}

bool plan_forward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                  attn_cuda_choice *choice) {
  if (!plan_any(device, problem)) return false;
  choose_segments(device, problem, choice);
  choice->workspace_bytes = segments_bytes(problem, choice->values[SEGMENTS]);
  snprintf(choice->description, sizeof choice->description,
           "additive, wgmma, chunks of %d, %lld segments of %lld chunks", CHUNK,
           (long long)choice->values[SEGMENTS], (long long)choice->values[SEGMENT_CHUNKS]);
  return true;
}

bool suits_forward(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  return operand_suits(problem, &args->q) && operand_suits(problem, &args->k) &&
         operand_suits(problem, &args->v) && operand_suits(problem, &args->o);
}

attn_status run_forward(const attn_cuda_device *, const attn_cuda_choice *choice,
                        const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                        void *workspace, cudaStream_t stream) {
  scan_operands x = {operand_of(problem, &args->q),
                     operand_of(problem, &args->k),
                     operand_of(problem, &args->v),
                     operand_of(problem, &args->o),
                     view_of(&args->initial_state, false, 1),
                     view_of(&args->final_state, false, 1),
                     false};
  return scan_run(choice, problem, args, x, workspace, stream);
}

/* Parts of the backward pass's workspace, in bytes from its start. */
struct backward_layout {
  size_t d_q_parts, d_k_parts; /* for each value head, where several share queries and keys */
  size_t final_states;         /* for the decay's gradient */
  size_t bytes;
};

backward_layout layout_of(const attn_recurrent_problem *problem, int64_t segments) {
  const bool wants_decay = problem->decay == ATTN_DECAY_TOKEN;
  const int64_t rows = problem->value_heads * problem->batch;
  const size_t parts = problem->value_heads > problem->heads
                           ? align((size_t)(rows * problem->length * problem->dim) * 2)
                           : 0;
  backward_layout layout;
  layout.d_q_parts = segments_bytes(problem, segments);
  layout.d_k_parts = layout.d_q_parts + (wants_decay ? parts : 0);
  layout.final_states = layout.d_k_parts + parts;
  layout.bytes = layout.final_states;
  if (wants_decay)
    layout.bytes += align((size_t)(rows * problem->dim * problem->value_dim) * sizeof(float));
  return layout;
}

bool plan_backward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                   attn_cuda_choice *choice) {
  if (!plan_any(device, problem)) return false;
  choose_segments(device, problem, choice);
  choice->workspace_bytes = layout_of(problem, choice->values[SEGMENTS]).bytes;
  snprintf(choice->description, sizeof choice->description,
           "additive, wgmma, chunks of %d, %lld segments of %lld chunks", CHUNK,
           (long long)choice->values[SEGMENTS], (long long)choice->values[SEGMENT_CHUNKS]);
  return true;
}

bool suits_backward(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  const bool all = args->d_q.data && args->d_k.data && args->d_v.data;
  return operand_suits(problem, &args->q) && operand_suits(problem, &args->k) &&
         operand_suits(problem, &args->v) && operand_suits(problem, &args->d_o) &&
         operand_suits(problem, &args->d_q) && operand_suits(problem, &args->d_k) &&
         operand_suits(problem, &args->d_v) &&
         (!args->d_decay.data || (problem->decay == ATTN_DECAY_TOKEN && all)) &&
         (args->d_v.data || !args->d_initial_state.data);
}

/* The gradient of queries or keys that several value heads share: from `parts`, where each value
 * head has its own, into `target`. */
attn_status sum_parts(const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                      const void *parts, const attn_tensor *target, cudaStream_t stream) {
  operand sum = operand_of(problem, target);
  int group = (int)(problem->value_heads / problem->heads), heads = (int)problem->heads;
  int64_t tokens = problem->ragged ? args->q.shape[0] : problem->batch * problem->length;
  int64_t length = problem->ragged ? tokens : problem->length;
  int64_t words = tokens * heads * problem->dim / 2;
  if (!words) return ATTN_OK;
  const auto kernel = problem->dtype == ATTN_BF16 ? sum_groups<__nv_bfloat16> : sum_groups<__half>;
  kernel<<<(unsigned)((words + 255) / 256), 256, 0, stream>>>(
      parts, (void *)sum.data, tokens, length, heads, group, (int)problem->dim, sum.batch,
      sum.token, sum.head);
  ATTN_CUDA_TRY_LAUNCH("sum_groups");
  return ATTN_OK;
}

strides strides_of(const operand &x) {
  return strides{x.batch, x.token, x.head};
}

/* From the gradients of queries and keys, d_group value heads each, that of the decay per token. */
template <typename T>
attn_status decay_run(const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                      const operand &d_q, const operand &d_k, const float *final_states,
                      cudaStream_t stream) {
  const bool ragged = problem->ragged;
  const int64_t tokens = ragged ? args->q.shape[0] : problem->batch * problem->length;
  const int heads = (int)problem->value_heads, first = ragged ? 0 : 1;
  const strides step = {ragged ? 0 : args->d_decay.stride[0], args->d_decay.stride[first],
                        args->d_decay.stride[first + 1]};
  const operand q = operand_of(problem, &args->q), k = operand_of(problem, &args->k);
  const auto terms = problem->dim == 128 ? decay_terms<T, 128> : decay_terms<T, 64>;
  const int64_t threads = tokens * heads * problem->dim / 8;
  terms<<<(unsigned)((threads + 255) / 256), 256, 0, stream>>>(
      (const T *)q.data, (const T *)k.data, (const T *)d_q.data, (const T *)d_k.data,
      (float *)args->d_decay.data, tokens, ragged ? tokens : problem->length, heads,
      (int)(problem->value_heads / problem->heads), strides_of(q), strides_of(k), strides_of(d_q),
      strides_of(d_k), (int)(problem->value_heads / d_q.heads), step);
  ATTN_CUDA_TRY_LAUNCH("decay_terms");
  decay_sums<<<(unsigned)(problem->batch * heads), 1024, 0, stream>>>(
      (float *)args->d_decay.data, step, ragged ? args->offsets : NULL, problem->length, heads,
      final_states, view_of(&args->d_final_state, false, 1), (int)problem->dim,
      (int)problem->value_dim);
  ATTN_CUDA_TRY_LAUNCH("decay_sums");
  return ATTN_OK;
}

attn_status run_backward(const attn_cuda_device *, const attn_cuda_choice *choice,
                         const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                         void *workspace, cudaStream_t stream) {
  const operand q = operand_of(problem, &args->q), k = operand_of(problem, &args->k),
                v = operand_of(problem, &args->v), d_o = operand_of(problem, &args->d_o);
  const double scale = problem->scale;
  const bool grouped = problem->value_heads > problem->heads;
  const backward_layout layout = layout_of(problem, choice->values[SEGMENTS]);
  const int64_t row = problem->value_heads * problem->dim;
  operand d_q = {(char *)workspace + layout.d_q_parts,
                 problem->length * row,
                 row,
                 problem->dim,
                 problem->value_heads,
                 problem->dim};
  operand d_k = d_q;
  d_k.data = (char *)workspace + layout.d_k_parts;
  if (!grouped && args->d_q.data) d_q = operand_of(problem, &args->d_q);
  if (!grouped && args->d_k.data) d_k = operand_of(problem, &args->d_k);
  float *final_states = (float *)((char *)workspace + layout.final_states);
  attn_status status = ATTN_OK;
  if (args->d_q.data) {
    scan_operands x = {};
    x.q = d_o, x.k = v, x.v = k, x.o = d_q;
    x.initial = view_of(&args->initial_state, true, 1);
    if (args->d_decay.data && args->d_final_state.data)
      x.final = state_view{final_states,
                           problem->value_heads * problem->dim * problem->value_dim,
                           problem->dim * problem->value_dim,
                           1,
                           problem->value_dim,
                           1};
    status = scan_run(choice, problem, args, x, workspace, stream);
    if (status == ATTN_OK && grouped)
      status = sum_parts(problem, args, d_q.data, &args->d_q, stream);
    if (status != ATTN_OK) return status;
  }
  /* The reversed scan's state is the gradient's over the scale, which multiplies its outputs. */
  scan_operands values = {};
  values.q = k, values.k = q, values.v = d_o;
  values.initial = view_of(&args->d_final_state, false, 1 / scale);
  values.final = view_of(&args->d_initial_state, false, scale);
  values.reverse = true;
  if (args->d_v.data) values.o = operand_of(problem, &args->d_v);
  const bool together = args->d_k.data && args->d_v.data && problem->dim == problem->value_dim;
  if (together) {
    values.w = v, values.d_w = d_k;
  } else if (args->d_k.data) {
    scan_operands x = {};
    x.q = v, x.k = d_o, x.v = q, x.o = d_k;
    x.initial = view_of(&args->d_final_state, true, 1 / scale);
    x.reverse = true;
    status = scan_run(choice, problem, args, x, workspace, stream);
    if (status != ATTN_OK) return status;
  }
  if (args->d_v.data) status = scan_run(choice, problem, args, values, workspace, stream);
  if (status == ATTN_OK && grouped && args->d_k.data)
    status = sum_parts(problem, args, d_k.data, &args->d_k, stream);
  if (status != ATTN_OK || !args->d_decay.data) return status;
  const auto decay = problem->dtype == ATTN_BF16 ? decay_run<__nv_bfloat16> : decay_run<__half>;
  return decay(problem, args, d_q, d_k, final_states, stream);
}

} // namespace

extern const recurrent_algorithm recurrent_additive_sm90_forward;
const recurrent_algorithm recurrent_additive_sm90_forward = {
    "additive_sm90", ATTN_PASS_FORWARD, plan_forward, suits_forward, run_forward,
};
extern const recurrent_algorithm recurrent_additive_sm90_backward;
const recurrent_algorithm recurrent_additive_sm90_backward = {
    "additive_sm90", ATTN_PASS_BACKWARD, plan_backward, suits_backward, run_backward,
};
