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

#include <cmath>
#include <cstdio>
#include <cstring>

using namespace hopper;

namespace {

constexpr int CHUNK = 64;
constexpr int TILE_BYTES = CHUNK * 128; /* 64 tokens by 64 columns */
constexpr float LOG2_E = 1.4426950408889634f;
/* 2^-256 is zero in float32; sums of 64 such exponents keep an error below 1e-3. */
constexpr float LEAST_LOG2 = -256.f;
/* Tokens that weigh less than 2^-32 beside the newest do not reach the state's 24 bits. */
constexpr float NEGLIGIBLE_LOG2 = -32.f;

/* A float32 state [rows, columns] for each sequence and head. */
struct state_view {
  float *data;
  int64_t batch, head, row, column; /* strides */
  float scale;                      /* multiplies what is read or written */
};

/* Strides in elements. */
struct scan_output {
  void *data;
  int64_t batch, token, head;
};

/* Strides in elements of a tensor [batch, length, heads, ...]; ragged: batch 0. */
struct strides {
  int64_t batch, token, head;
};

struct scan_parameters {
  CUtensorMap q, k, v, o;
  CUtensorMap w, d_w; /* for gradients: below */
  scan_output d_w_out;
  /* For the decay's gradient: each output row's product with the row of a tensor of its shape, for
   * every warpgroup [tokens, heads]. GRADIENTS take those of d_w and q. */
  const void *partner;
  strides partner_step;
  int partner_group;
  float *products;
  int64_t products_stride;       /* of a warpgroup's */
  scan_output out;               /* what o maps */
  int q_group, k_group, v_group; /* value heads for each head of q, k, v */
  const int32_t *offsets;
  int batch, heads, length;
  attn_decay decay_kind;
  const float *decay;
  int64_t decay_batch, decay_token, decay_head;
  /* A decay per channel: below. */
  strides decay_step;
  const float *factors;
  const uint8_t *sizes;
  state_view initial, final;
  /* With more than one segment: the state before each, [batch, heads, segments, rows, columns];
   * what each part of each segment adds to it, [batch, heads, segments, parts, rows, columns]; and
   * log2 of the parts' decays. */
  float *states, *added, *totals;
  int segments, segment_chunks, parts, part_chunks;
  int reverse;
  float log2_scale; /* of the outputs */
};

/* A segment of one sequence and head. */
struct work {
  int batch, head;
  int place, last;  /* among the sequence's segments in the order of the scan; whether the last */
  int64_t slot;     /* its place among the states */
  int64_t start;    /* the sequence's first token in the tensors */
  int length;       /* of the sequence */
  int first, count; /* chunks */
};

/* Log2 of a constant decay's step; 0 without one. */
__device__ float constant_decay(const scan_parameters &p, int head) {
  if (p.decay_kind != ATTN_DECAY_HEAD) return 0;
  float log2_decay = p.decay[head * p.decay_head] * LOG2_E;
  return log2_decay < LEAST_LOG2 ? LEAST_LOG2 : log2_decay;
}

/* Chunks [first, last) of a part of a segment of `count` chunks, counted in the order of the scan;
 * false where they are none, or too old to weigh in the state after the segment. */
__device__ bool part_range(const scan_parameters &p, float log2_decay, int count, int part,
                           int *first, int *last) {
  const float chunks = NEGLIGIBLE_LOG2 / (CHUNK * log2_decay) + 2;
  const int oldest = log2_decay < 0 && chunks < count ? count - (int)chunks : 0;
  *first = part * p.part_chunks;
  *last = min(*first + p.part_chunks, count);
  *first = max(*first, oldest);
  return *first < *last;
}

/* Item `item` of a launch. For states an item is a part of a segment that is not the last. */
template <bool STATES_ONLY> __device__ bool locate(const scan_parameters &p, int item, work *w) {
  int pairs = p.batch * p.heads, pair = item % pairs, part = 0;
  w->place = item / pairs;
  if (STATES_ONLY) {
    /* Heads differ in how many parts count: each block has them in turn. */
    pair = (pair + w->place) % pairs;
    part = w->place % p.parts;
    w->place /= p.parts;
  }
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
  w->slot = (int64_t)pair * p.segments + w->place;
  if (STATES_ONLY) {
    int first, last;
    if (w->last || !part_range(p, constant_decay(p, w->head), w->count, part, &first, &last))
      return false;
    w->first += p.reverse ? w->count - last : first;
    w->count = last - first;
    w->slot = w->slot * p.parts + part;
  }
  return true;
}

/* What a launch computes: the state after each segment; outputs; or the gradients of keys and
 * values, which share their operands. */
enum scan_kind { STATES, OUTPUTS, GRADIENTS };

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
  static constexpr int stage_bytes = w_offset + (KIND == GRADIENTS ? v_tiles * TILE_BYTES : 0);
  static constexpr int state_bytes = KIND == STATES ? 0 : k_tiles * v_tiles * TILE_BYTES;
  static constexpr int out_bytes = KIND == STATES    ? 0
                                   : KIND == OUTPUTS ? v_tiles * TILE_BYTES
                                                     : (k_tiles + v_tiles) * TILE_BYTES;
  static constexpr int weighed_bytes = k_tiles * TILE_BYTES; /* of one of two buffers */
  static constexpr int room = 224 * 1024 / blocks - state_bytes - out_bytes - 2 * weighed_bytes;
  static constexpr int stages = room / stage_bytes > 4 ? 4 : room / stage_bytes;
  static constexpr int state_offset = stages * stage_bytes;
  static constexpr int out_offset = state_offset + state_bytes;
  static constexpr int weighed_offset = out_offset + out_bytes;
  static constexpr int exponents_offset = weighed_offset + 2 * weighed_bytes;
  /* Of a stage: A, then G_all; the state's factors with a decay per channel. */
  static constexpr int exponents = CHUNK + 4 + (CHANNEL ? DK : 0);
  static constexpr int barriers_offset = exponents_offset + stages * exponents * 4;
  /* Barriers: full and empty of each stage; full and empty of each weighed buffer. */
  static constexpr int weighed_barriers_offset = barriers_offset + stages * 16;
  static constexpr int bytes = weighed_barriers_offset + 32;
  static_assert(bytes <= 227 * 1024 / blocks, "more shared memory than there is");
};

template <scan_kind KIND> __device__ int item_count(const scan_parameters &p) {
  return p.batch * p.heads * (KIND == STATES ? (p.segments - 1) * p.parts : p.segments);
}

/* Tokens before a sequence in an array [tokens, ...] of all of them. */
__device__ int64_t flat_start(const scan_parameters &p, const work &w) {
  return p.offsets ? w.start : (int64_t)w.batch * p.length;
}

/* The place of a sequence's first chunk in an array of all of them. */
__device__ int64_t flat_chunk(const scan_parameters &p, const work &w) {
  return flat_start(p, w) / CHUNK + w.batch;
}

/* Log2 of a channel's decay. Weights below 2^-96 beside a step are none. */
constexpr float CHANNEL_LEAST_LOG2 = -96;
__device__ __forceinline__ float channel_log2(float log_decay) {
  const float log2_decay = log_decay * LOG2_E;
  return log2_decay < CHANNEL_LEAST_LOG2 ? CHANNEL_LEAST_LOG2 : log2_decay;
}

/* Walks through the chunks of a work in the order of the scan. With a decay per channel a chunk may
 * have to be taken in pieces: `sizes` tells of how many tokens. */
struct cursor {
  int chunk = -1, piece = 0, pieces = 0; /* in the order of the scan */
  int size = CHUNK;
  int token, valid; /* the first token, from the sequence's start; how many there are */
};

template <bool CHANNEL>
__device__ bool advance(const scan_parameters &p, const work &w, cursor *c) {
  if (++c->piece >= c->pieces) {
    if (++c->chunk >= w.count) return false;
    c->piece = 0;
    c->pieces = 1;
  }
  const int chunk = w.first + (p.reverse ? w.count - 1 - c->chunk : c->chunk);
  c->token = chunk * CHUNK;
  c->valid = min(w.length - c->token, CHUNK);
  if (CHANNEL) {
    if (c->piece == 0) {
      c->size = p.sizes[(flat_chunk(p, w) + chunk) * p.heads + w.head];
      c->pieces = (c->valid + c->size - 1) / c->size;
    }
    const int first = (p.reverse ? c->pieces - 1 - c->piece : c->piece) * c->size;
    c->token += first;
    c->valid = min(c->valid - first, c->size);
  }
  return true;
}

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

/* Writes 2^{G_all - A_j} K beside each chunk, for the state, and zeros into the rows after the
 * sequence's end: what lies there may be anything, NaN too. Three warps. */
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
      for (int j = thread; j < PIECES; j += 96) {
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

/* The same where columns are contiguous and pairs of them aligned, as in the workspace. */
template <int count>
__device__ void pairs_read(float (&values)[count], const float *data, int row_stride) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    const float2 pair =
        *(const float2 *)(data + (row + i % 4 / 2 * 8) * row_stride + i / 4 * 8 + lane % 4 * 2);
    values[i] = pair.x, values[i + 1] = pair.y;
  }
}

template <int count>
__device__ void pairs_write(const float (&values)[count], float *data, int row_stride) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i += 2)
    *(float2 *)(data + (row + i % 4 / 2 * 8) * row_stride + i / 4 * 8 + lane % 4 * 2) =
        make_float2(values[i], values[i + 1]);
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

/* Sixteen rows of 64 (the warp's) by 64 k as the A operands of wgmma. */
template <int steps>
__device__ __forceinline__ void rows_load(uint32_t (&a)[steps][4], uint32_t tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int k = 0; k < steps; k++)
    matrix_load(a[k],
                tile + k / 4 * TILE_BYTES + swizzled(16 * warp + lane % 16, k % 4 * 2 + lane / 16));
}

/* Scores [64, 64] times 2^{A_i - A_j} where row i sees column j, else 0, as A operands; `exponent0`
 * and `exponent1` are A_i of the thread's rows. */
template <typename T>
__device__ __forceinline__ void weigh(uint32_t (&a)[CHUNK / 16][4], const float (&scores)[32],
                                      const float *exponents, float exponent0, float exponent1,
                                      int reverse) {
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
#pragma unroll
  for (int k = 0; k < CHUNK / 16; k++) {
    /* The warp has rows 16 warp and on: columns before them, on the diagonal, or after. */
    const int distance = reverse ? k - warp : warp - k;
    if (distance < 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[k][i] = 0;
      continue;
    }
    float weighed[8];
#pragma unroll
    for (int i = 0; i < 8; i++) weighed[i] = scores[8 * k + i];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float2 exponent = *(const float2 *)&exponents[16 * k + 8 * j + lane % 4 * 2];
      weighed[4 * j] *= exp2_approximate(exponent0 - exponent.x);
      weighed[4 * j + 1] *= exp2_approximate(exponent0 - exponent.y);
      weighed[4 * j + 2] *= exp2_approximate(exponent1 - exponent.x);
      weighed[4 * j + 3] *= exp2_approximate(exponent1 - exponent.y);
    }
    if (distance == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (reverse ? column < row : column > row) weighed[i] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) a[k][i] = element<T>::pack(weighed[2 * i], weighed[2 * i + 1]);
  }
}

/* The warpgroup's output tiles of a chunk to memory. All of its threads call it, after a barrier
 * that follows the writes to the tiles. */
template <typename T, bool CHANNEL>
__device__ __forceinline__ void out_store(const scan_parameters &p, const work &w,
                                          const CUtensorMap *map, const scan_output &out,
                                          const char *shared, uint32_t base, uint32_t tile,
                                          int tiles, int column0, int token, int valid) {
  if ((p.offsets || CHANNEL) && valid < CHUNK) {
    /* The next sequence's or piece's rows follow. */
    T *rows = (T *)out.data + (p.offsets ? 0 : w.batch * out.batch) +
              (w.start + token) * out.token + w.head * out.head + column0;
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

/* Sums over four lanes of the thread's two rows, to p.products. */
__device__ __forceinline__ void products_write(const scan_parameters &p, const work &w,
                                               float (&sums)[2], int token, int valid, int group) {
  const int lane = threadIdx.x % 32, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
    sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
    if (lane % 4 == 0 && row0 + 8 * i < valid)
      p.products[group * p.products_stride + (flat_start(p, w) + token + row0 + 8 * i) * p.heads +
                 w.head] = sums[i];
  }
}

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
      const uint32_t weighed_tile = base + S::weighed_offset + buffer * S::weighed_bytes;
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
      if (OUTPUT) {
        const float exponent0 = exponents[row0] + p.log2_scale;
        const float exponent1 = exponents[row0 + 8] + p.log2_scale;
        const float weight0 = exp2_approximate(exponent0), weight1 = exp2_approximate(exponent1);
        wgmma_wait<1>();
        pin(scores);
        weigh<T>(weights, scores, exponents, exponent0, exponent1, p.reverse);
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

/* A decay per channel (GLA, arXiv 2312.06635) enters through the operands: with G_i the sum of its
 * log2 from a chunk's start to token i,
 *
 *   o_i = scale sum_{j <= i} (2^{G_i} q_i . 2^{-G_j} k_j) v_j + ...
 *
 * so the scan without decay does it, with 2^{G_i} q_i and 2^{-G_j} k_j for q_i and k_j, if the
 * state is then multiplied by 2^{G_all}, for each of its rows. bfloat16 has float32's exponents: it
 * can hold both while no channel's G_all is below -96. A chunk where one is lower is taken in
 * pieces of 16, 4 or single tokens.
 *
 * A block does a chunk of one value head. Writes [tokens, heads, DK], the pieces' sizes [chunks,
 * heads] and, for whole chunks, the factors 2^{G_all} [chunks, heads, DK]. */
struct channel_parameters {
  const void *q, *k;
  strides q_step, k_step, decay_step;
  int group; /* value heads for each head */
  const float *decay;
  void *q_out, *k_out;
  float *factors;
  uint8_t *sizes;
};

template <typename T, int DK>
__global__ void __launch_bounds__(256)
    channel_operands(const __grid_constant__ scan_parameters p,
                     const __grid_constant__ channel_parameters x) {
  constexpr int PAIRS = DK / 2, GROUPS = 256 / PAIRS, TOKENS = CHUNK / GROUPS;
  __shared__ float2 totals[GROUPS][PAIRS];
  const int pair = threadIdx.x % PAIRS, group = threadIdx.x / PAIRS;
  work w;
  w.batch = blockIdx.z, w.head = blockIdx.y;
  w.start = p.offsets ? p.offsets[w.batch] : 0;
  w.length = p.offsets ? (int)(p.offsets[w.batch + 1] - w.start) : p.length;
  const int first = blockIdx.x * CHUNK + group * TOKENS, valid = w.length - first;
  if ((int)blockIdx.x * CHUNK >= w.length) return;
  const auto at = [&](const strides &step, int head) {
    return (p.offsets ? 0 : w.batch * step.batch) + (w.start + first) * step.token +
           head * step.head + 2 * pair;
  };
  const float *decay = x.decay + at(x.decay_step, w.head);
  const T *q = (const T *)x.q + at(x.q_step, w.head / x.group);
  const T *k = (const T *)x.k + at(x.k_step, w.head / x.group);
  float2 sums[TOKENS]; /* from the group's first token */
  uint32_t queries[TOKENS], keys[TOKENS];
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    sums[i] = make_float2(0, 0);
    queries[i] = keys[i] = 0;
    if (i >= valid) continue;
    sums[i] = *(const float2 *)(decay + i * x.decay_step.token);
    queries[i] = *(const uint32_t *)(q + i * x.q_step.token);
    keys[i] = *(const uint32_t *)(k + i * x.k_step.token);
  }
  float least[3] = {0, 0, 0}; /* sums over 4 tokens, 16 and the chunk */
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    sums[i] = make_float2(channel_log2(sums[i].x), channel_log2(sums[i].y));
    if (i > 0) sums[i].x += sums[i - 1].x, sums[i].y += sums[i - 1].y;
    if (i % 4 == 3) {
      const float2 before = i > 3 ? sums[i - 4] : make_float2(0, 0);
      least[0] = fminf(least[0], fminf(sums[i].x - before.x, sums[i].y - before.y));
    }
  }
  totals[group][pair] = sums[TOKENS - 1];
  __syncthreads();
  float2 before = make_float2(0, 0), before16 = before, all = before;
#pragma unroll
  for (int g = 0; g < GROUPS; g++) {
    const float2 total = totals[g][pair];
    all.x += total.x, all.y += total.y;
    if (g < group) before.x += total.x, before.y += total.y;
    const bool same = g * TOKENS / 16 == group * TOKENS / 16;
    if (same && g < group) before16.x += total.x, before16.y += total.y;
    if (same && g == group) least[1] = fminf(before16.x + total.x, before16.y + total.y);
  }
  least[2] = fminf(all.x, all.y);
  int size = CHUNK;
  if (__syncthreads_or(!(least[2] >= CHANNEL_LEAST_LOG2))) {
    size = 16;
    before = before16;
    if (__syncthreads_or(!(least[1] >= CHANNEL_LEAST_LOG2))) {
      size = __syncthreads_or(!(least[0] >= CHANNEL_LEAST_LOG2)) ? 1 : 4;
      before = make_float2(0, 0);
    }
  }
  const int64_t chunk = flat_chunk(p, w) + blockIdx.x, token = flat_start(p, w) + first;
  if (threadIdx.x == 0) x.sizes[chunk * p.heads + w.head] = (uint8_t)size;
  if (group == 0)
    *(float2 *)(x.factors + (chunk * p.heads + w.head) * DK + 2 * pair) =
        make_float2(exp2_approximate(all.x), exp2_approximate(all.y));
  uint32_t *q_out = (uint32_t *)((T *)x.q_out + (token * p.heads + w.head) * DK) + pair;
  uint32_t *k_out = (uint32_t *)((T *)x.k_out + (token * p.heads + w.head) * DK) + pair;
#pragma unroll
  for (int i = 0; i < TOKENS; i++) {
    if (i >= valid) continue;
    float2 sum = make_float2(before.x + sums[i].x, before.y + sums[i].y);
    if (size < 16) { /* from the piece's start */
      const float2 before4 = i >= 4 ? sums[i / 4 * 4 - 1] : make_float2(0, 0);
      const float2 before1 = i >= 1 ? sums[i - 1] : make_float2(0, 0);
      sum.x -= size == 4 ? before4.x : before1.x;
      sum.y -= size == 4 ? before4.y : before1.y;
    }
    const float2 a = element<T>::unpack(queries[i]), b = element<T>::unpack(keys[i]);
    q_out[(int64_t)i * p.heads * PAIRS] =
        element<T>::pack(a.x * exp2_approximate(sum.x), a.y * exp2_approximate(sum.y));
    k_out[(int64_t)i * p.heads * PAIRS] =
        element<T>::pack(b.x * exp2_approximate(-sum.x), b.y * exp2_approximate(-sum.y));
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

/* ------------------------------------------------------------------------------ host's side */

/* choice->values */
enum { SEGMENTS, SEGMENT_CHUNKS, PARTS, PART_CHUNKS, MULTIPROCESSORS };

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
  operand partner; /* and the products with it, if they are wanted */
  float *products;
  float *factors; /* with a decay per channel, which also overwrites q and k */
  uint8_t *sizes;
};

size_t align(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/* Where the segments' states lie in the workspace, in bytes from its start. */
struct segments_layout {
  size_t added, totals, bytes;
};

segments_layout segments_layout_of(const attn_recurrent_problem *problem,
                                   const attn_cuda_choice *choice) {
  const int64_t slots = problem->batch * problem->value_heads * choice->values[SEGMENTS];
  const int64_t size = problem->dim * problem->value_dim;
  int64_t parts = slots * choice->values[PARTS];
  segments_layout layout = {};
  if (choice->values[SEGMENTS] < 2) return layout;
  layout.added = align((size_t)(slots * size) * sizeof(float));
  layout.totals = layout.added + align((size_t)(parts * size) * sizeof(float));
  if (problem->decay == ATTN_DECAY_CHANNEL) parts *= problem->dim;
  layout.bytes = layout.totals + align((size_t)parts * sizeof(float));
  return layout;
}

template <typename T, scan_kind KIND, int DK, int DV, bool CHANNEL>
attn_status launch(const attn_cuda_choice *choice, const scan_parameters &p, cudaStream_t stream) {
  typedef shape<KIND, DK, DV, CHANNEL> S;
  int items = p.batch * p.heads * (KIND == STATES ? (p.segments - 1) * p.parts : p.segments);
  int most = (int)choice->values[MULTIPROCESSORS] * S::blocks;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(scan<T, KIND, DK, DV, CHANNEL>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes));
  const int grid = items < most ? items : most;
  scan<T, KIND, DK, DV, CHANNEL><<<grid, S::threads, S::bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("scan");
  return ATTN_OK;
}

template <typename T, int DK, int DV, bool CHANNEL>
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
  p.out = scan_output{(void *)x.o.data, x.o.batch, x.o.token, x.o.head};
  p.d_w_out = scan_output{(void *)x.d_w.data, x.d_w.batch, x.d_w.token, x.d_w.head};
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
  if (x.products) {
    p.products = x.products;
    p.products_stride = batch * tokens * problem->value_heads;
    p.partner = x.partner.data;
    p.partner_step = strides{x.partner.batch, x.partner.token, x.partner.head};
    p.partner_group = (int)(problem->value_heads / x.partner.heads);
  }
  if (CHANNEL) {
    const int first = problem->ragged ? 0 : 1;
    p.decay_step = strides{problem->ragged ? 0 : args->decay.stride[0], args->decay.stride[first],
                           args->decay.stride[first + 1]};
    p.factors = x.factors;
    p.sizes = x.sizes;
  }
  p.segments = (int)choice->values[SEGMENTS];
  p.segment_chunks = (int)choice->values[SEGMENT_CHUNKS];
  p.reverse = x.reverse;
  p.parts = (int)choice->values[PARTS];
  p.part_chunks = (int)choice->values[PART_CHUNKS];
  p.log2_scale = (float)log2(problem->scale);

  if constexpr (CHANNEL) {
    const operand q = operand_of(problem, &args->q), k = operand_of(problem, &args->k);
    const channel_parameters operands = {q.data,
                                         k.data,
                                         {q.batch, q.token, q.head},
                                         {k.batch, k.token, k.head},
                                         p.decay_step,
                                         (int)(problem->value_heads / q.heads),
                                         p.decay,
                                         (void *)x.q.data,
                                         (void *)x.k.data,
                                         x.factors,
                                         x.sizes};
    const dim3 grid((unsigned)((problem->length + CHUNK - 1) / CHUNK), p.heads, p.batch);
    channel_operands<T, DK><<<grid, 256, 0, stream>>>(p, operands);
    ATTN_CUDA_TRY_LAUNCH("channel_operands");
  }
  int pairs = p.batch * p.heads;
  if (p.segments > 1) {
    const segments_layout layout = segments_layout_of(problem, choice);
    p.states = (float *)workspace;
    p.added = (float *)((char *)workspace + layout.added);
    p.totals = (float *)((char *)workspace + layout.totals);
    attn_status status = launch<T, STATES, DK, DV, CHANNEL>(choice, p, stream);
    if (status != ATTN_OK) return status;
    chain_segments<DK, DV, CHANNEL><<<dim3(DK * DV / 4 / 256, pairs), 256, 0, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("chain_segments");
  }
  if constexpr (DK == DV && !CHANNEL)
    if (x.w.data) return launch<T, GRADIENTS, DK, DV, CHANNEL>(choice, p, stream);
  return launch<T, OUTPUTS, DK, DV, CHANNEL>(choice, p, stream);
}

attn_status scan_run(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                     const attn_recurrent_args *args, const scan_operands &x, void *workspace,
                     cudaStream_t stream) {
  const bool bf16 = problem->dtype == ATTN_BF16;
  const bool channel = problem->decay == ATTN_DECAY_CHANNEL;
#define CASE(dk, dv)                                                                               \
  if (!channel && x.q.columns == dk && x.v.columns == dv)                                          \
    return bf16 ? scan_launch<__nv_bfloat16, dk, dv, false>(choice, problem, args, x, workspace,   \
                                                            stream)                                \
                : scan_launch<__half, dk, dv, false>(choice, problem, args, x, workspace, stream);
#define CASE_CHANNEL(dk, dv)                                                                       \
  if (channel && x.q.columns == dk && x.v.columns == dv)                                           \
    return scan_launch<__nv_bfloat16, dk, dv, true>(choice, problem, args, x, workspace, stream);
  CASE_CHANNEL(128, 128)
  CASE_CHANNEL(64, 64)
#undef CASE_CHANNEL
  CASE(128, 128)
  CASE(64, 64)
  CASE(128, 64)
  CASE(64, 128)
#undef CASE
  return attn_cuda_fail(ATTN_INTERNAL, "recurrent: no scan of dim %lld and value_dim %lld",
                        (long long)x.q.columns, (long long)x.v.columns);
}

/* Segments of a sequence, from a model in units of one chunk's time in a block. Blocks go round by
 * round over their items, each of which costs some chunks' time to begin; a chunk costs about half
 * as much in the pass that finds the segments' states. With a constant decay few of them count. */
void choose_segments(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                     attn_cuda_choice *choice) {
  const double ITEM = 2, STATE_CHUNK = 0.5, STATE_ITEM = 6, LAUNCHES = 6;
  const int64_t LEAST_CHUNKS = 8, MOST_SEGMENTS = 64, HEAD_CHUNKS = 24, MOST_PARTS = 16;
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
      bool few = problem->decay == ATTN_DECAY_HEAD && length > HEAD_CHUNKS;
      int64_t read = pairs * (segments - 1) * (few ? HEAD_CHUNKS : length);
      cost += LAUNCHES + STATE_CHUNK * (double)read / (double)slots;
      cost += (double)(pairs * segments) / (double)slots; /* states written, chained and read */
    }
    if (segments > 1 && cost >= best) continue;
    best = cost;
    choice->values[SEGMENTS] = segments;
    choice->values[SEGMENT_CHUNKS] = length > 0 ? length : 1;
  }
  /* Parts of segments, small where most are skipped; otherwise few, since each writes a state. */
  const int64_t length = choice->values[SEGMENT_CHUNKS];
  int64_t most = (length + LEAST_CHUNKS - 1) / LEAST_CHUNKS;
  if (most > MOST_PARTS) most = MOST_PARTS;
  for (int64_t parts = problem->decay == ATTN_DECAY_HEAD ? most : 1; parts <= most; parts++) {
    int64_t part = (length + parts - 1) / parts;
    int64_t rounds = ((choice->values[SEGMENTS] - 1) * pairs * parts + slots - 1) / slots;
    double cost = (double)rounds * ((double)part + STATE_ITEM);
    if (choice->values[PARTS] && cost >= best) continue;
    best = cost;
    choice->values[PARTS] = (length + part - 1) / part;
    choice->values[PART_CHUNKS] = part;
  }
  choice->values[MULTIPROCESSORS] = device->multiprocessors;
}

bool plan_any(const attn_cuda_device *device, const attn_recurrent_problem *problem) {
  return device->major == 9 && device->minor == 0 && problem->update == ATTN_UPDATE_ADDITIVE &&
         !problem->normalise && (problem->dtype == ATTN_BF16 || problem->dtype == ATTN_F16) &&
         (problem->dim == 64 || problem->dim == 128) &&
         (problem->value_dim == 64 || problem->value_dim == 128) && problem->scale > 0 &&
         problem->length >= 2 * CHUNK && problem->length < (int64_t)1 << 30 &&
         problem->batch * problem->value_heads < (int64_t)1 << 24;
}

/* Where a decay per channel keeps its operands, in bytes from the workspace's start. */
struct channel_layout {
  size_t q, k, factors, sizes, bytes;
};

channel_layout channel_layout_of(const attn_recurrent_problem *problem,
                                 const attn_cuda_choice *choice) {
  const size_t rows = (size_t)(problem->batch * problem->length * problem->value_heads);
  const size_t chunks = (size_t)((problem->batch * problem->length / CHUNK + problem->batch + 1) *
                                 problem->value_heads);
  channel_layout layout;
  layout.q = segments_layout_of(problem, choice).bytes;
  layout.k = layout.q + align(rows * problem->dim * 2);
  layout.factors = layout.k + align(rows * problem->dim * 2);
  layout.sizes = layout.factors + align(chunks * problem->dim * sizeof(float));
  layout.bytes = layout.sizes + align(chunks);
  return layout;
}

bool plan_forward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                  attn_cuda_choice *choice) {
  if (!plan_any(device, problem)) return false;
  const bool channel = problem->decay == ATTN_DECAY_CHANNEL;
  /* float16 has too few exponents for the operands. */
  if (channel && (problem->dtype != ATTN_BF16 || problem->dim != problem->value_dim)) return false;
  if (channel && (problem->batch > 65535 || problem->value_heads > 65535)) return false;
  choose_segments(device, problem, choice);
  choice->workspace_bytes = channel ? channel_layout_of(problem, choice).bytes
                                    : segments_layout_of(problem, choice).bytes;
  snprintf(choice->description, sizeof choice->description,
           "additive, wgmma, chunks of %d, %lld segments of %lld chunks in %lld parts", CHUNK,
           (long long)choice->values[SEGMENTS], (long long)choice->values[SEGMENT_CHUNKS],
           (long long)choice->values[PARTS]);
  return true;
}

/* Pairs of channels are read at once. */
bool decay_suits(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  if (problem->decay != ATTN_DECAY_CHANNEL) return true;
  bool even = (uintptr_t)args->decay.data % 8 == 0;
  for (int i = 0; i < args->decay.rank - 1; i++)
    even = even && (args->decay.shape[i] == 1 || args->decay.stride[i] % 2 == 0);
  return even;
}

bool suits_forward(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  return operand_suits(problem, &args->q) && operand_suits(problem, &args->k) &&
         operand_suits(problem, &args->v) && operand_suits(problem, &args->o) &&
         decay_suits(problem, args);
}

attn_status run_forward(const attn_cuda_device *, const attn_cuda_choice *choice,
                        const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                        void *workspace, cudaStream_t stream) {
  scan_operands x = {};
  x.q = operand_of(problem, &args->q);
  x.k = operand_of(problem, &args->k);
  x.v = operand_of(problem, &args->v);
  x.o = operand_of(problem, &args->o);
  x.initial = view_of(&args->initial_state, false, 1);
  x.final = view_of(&args->final_state, false, 1);
  if (problem->decay == ATTN_DECAY_CHANNEL) {
    const channel_layout layout = channel_layout_of(problem, choice);
    const int64_t row = problem->value_heads * problem->dim;
    x.q = operand{(char *)workspace + layout.q, problem->length * row, row, problem->dim,
                  problem->value_heads,         problem->dim};
    x.k = x.q;
    x.k.data = (char *)workspace + layout.k;
    x.factors = (float *)((char *)workspace + layout.factors);
    x.sizes = (uint8_t *)workspace + layout.sizes;
  }
  return scan_run(choice, problem, args, x, workspace, stream);
}

/* Parts of the backward pass's workspace, in bytes from its start. */
struct backward_layout {
  size_t parts;                  /* d_q, then d_k, of each value head where several share them */
  size_t final_states, products; /* for the decay's gradient */
  size_t bytes;
};

backward_layout backward_layout_of(const attn_recurrent_problem *problem,
                                   const attn_cuda_choice *choice) {
  const int64_t rows = problem->value_heads * problem->batch;
  backward_layout layout;
  layout.parts = segments_layout_of(problem, choice).bytes;
  layout.final_states = layout.parts;
  if (problem->value_heads > problem->heads)
    layout.final_states += align((size_t)(rows * problem->length * problem->dim) * 2);
  layout.products = layout.bytes = layout.final_states;
  if (problem->decay == ATTN_DECAY_TOKEN) {
    layout.products += align((size_t)(rows * problem->dim * problem->value_dim) * sizeof(float));
    layout.bytes = layout.products + align((size_t)(4 * rows * problem->length) * sizeof(float));
  }
  return layout;
}

bool plan_backward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                   attn_cuda_choice *choice) {
  if (!plan_any(device, problem) || problem->decay == ATTN_DECAY_CHANNEL) return false;
  choose_segments(device, problem, choice);
  choice->workspace_bytes = backward_layout_of(problem, choice).bytes;
  snprintf(choice->description, sizeof choice->description,
           "additive, wgmma, chunks of %d, %lld segments of %lld chunks in %lld parts", CHUNK,
           (long long)choice->values[SEGMENTS], (long long)choice->values[SEGMENT_CHUNKS],
           (long long)choice->values[PARTS]);
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

attn_status run_backward(const attn_cuda_device *, const attn_cuda_choice *choice,
                         const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                         void *workspace, cudaStream_t stream) {
  const operand q = operand_of(problem, &args->q), k = operand_of(problem, &args->k),
                v = operand_of(problem, &args->v), d_o = operand_of(problem, &args->d_o);
  const double scale = problem->scale;
  const int64_t dim = problem->dim, value_dim = problem->value_dim, heads = problem->value_heads;
  const int64_t tokens = problem->ragged ? args->q.shape[0] : problem->batch * problem->length;
  const bool grouped = heads > problem->heads, wants_decay = args->d_decay.data != NULL;
  const backward_layout layout = backward_layout_of(problem, choice);
  const operand parts = {(char *)workspace + layout.parts,
                         problem->length * heads * dim,
                         heads * dim,
                         dim,
                         heads,
                         dim};
  float *final_states = (float *)((char *)workspace + layout.final_states);
  float *products = (float *)((char *)workspace + layout.products);
  const int q_products = (int)dim / 64;
  int k_products = q_products;
  attn_status status = ATTN_OK;
  if (args->d_q.data) {
    scan_operands x = {};
    x.q = d_o, x.k = v, x.v = k;
    x.o = grouped ? parts : operand_of(problem, &args->d_q);
    x.initial = view_of(&args->initial_state, true, 1);
    if (wants_decay) {
      x.partner = q, x.products = products;
      if (args->d_final_state.data)
        x.final =
            state_view{final_states, heads * dim * value_dim, dim * value_dim, 1, value_dim, 1};
    }
    status = scan_run(choice, problem, args, x, workspace, stream);
    if (status == ATTN_OK && grouped)
      status = sum_parts(problem, args, parts.data, &args->d_q, stream);
    if (status != ATTN_OK) return status;
  }
  /* The reversed scan's state is the gradient's over the scale, which multiplies its outputs. */
  scan_operands values = {};
  values.q = k, values.k = q, values.v = d_o;
  values.initial = view_of(&args->d_final_state, false, 1 / scale);
  values.final = view_of(&args->d_initial_state, false, scale);
  values.reverse = true;
  if (args->d_v.data) values.o = operand_of(problem, &args->d_v);
  if (args->d_k.data) {
    scan_operands keys = {};
    keys.q = v, keys.k = d_o, keys.v = q;
    keys.o = grouped ? parts : operand_of(problem, &args->d_k);
    keys.initial = view_of(&args->d_final_state, true, 1 / scale);
    keys.reverse = true;
    const bool together = args->d_v.data && dim == value_dim;
    if (together) {
      values.w = v, values.d_w = keys.o;
      keys = values;
      k_products = 1;
    }
    if (wants_decay) keys.partner = k, keys.products = products + q_products * tokens * heads;
    status = scan_run(choice, problem, args, keys, workspace, stream);
    if (status == ATTN_OK && grouped)
      status = sum_parts(problem, args, parts.data, &args->d_k, stream);
    if (together) values.o.data = NULL;
    if (status != ATTN_OK) return status;
  }
  if (values.o.data) status = scan_run(choice, problem, args, values, workspace, stream);
  if (status != ATTN_OK || !wants_decay) return status;
  const int first = problem->ragged ? 0 : 1;
  const strides step = {problem->ragged ? 0 : args->d_decay.stride[0], args->d_decay.stride[first],
                        args->d_decay.stride[first + 1]};
  decay_sums<<<(unsigned)(problem->batch * heads), 1024, 0, stream>>>(
      products, q_products, k_products, tokens, (float *)args->d_decay.data, step,
      problem->ragged ? args->offsets : NULL, problem->length, (int)heads, final_states,
      view_of(&args->d_final_state, false, 1), (int)dim, (int)value_dim);
  ATTN_CUDA_TRY_LAUNCH("decay_sums");
  return ATTN_OK;
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
