/* Softmax backward in bfloat16 and float16 by mma.m16n8k16, for dimensions up to 256 that are
 * multiples of 8 (FlashAttention-2, arXiv 2307.08691, section 3.1).
 *
 *   P = exp(S - LSE),  dP = dO V^T,  dS = P (.) (dP - delta),  delta_i = do_i . o_i - dLSE_i
 *   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K        (dS times the cap's slope, if any)
 *
 * Two kernels; in both, warps have 16 M rows of one kind, and tiles of the other kind stream past:
 *
 *   keys_kernel     rows are keys: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
 *   queries_kernel  rows are queries: S = Q K^T, dP = dO V^T, dQ += dS K
 *
 * So P and dS stay in registers, as operands A. S and dP are made twice (7 products for 5), and in
 * return no sum has an order that depends on timing.
 *
 * From a width of 128 on there are no registers for 32 keys (16 at 256) and both of their sums in
 * one warp. In pairs_kernel, which then takes the place of keys_kernel, two warps share their keys:
 * one makes S and dV, the other dP and dK, and the first hands P over through shared memory. */
#include "kernels/cuda/softmax_mma.cuh"

namespace {

enum { STAGES = 2 }; /* of Y in shared memory: one is worked on while the other is filled */

struct backward_parameters {
  parameters p; /* o and lse are read by the preparation alone */
  token_rows d_o, d_lse, d_q, d_k, d_v, bias, d_bias;
  int64_t bias_key, d_bias_key;
  float gradient_scale;
  float *lse, *delta; /* [batch, heads, padded]: LSE log2 e (+inf: weights of 0), delta */
  int padded;
  /* The block list turned round: [batch, heads, blocks of keys, words], a bit for each block of
   * queries that sees the block of keys. */
  uint32_t *seen_by;
  int key_blocks, words;
};

enum { PADDING = 128, PREPARE_THREADS = 256, LANES = 8, PREPARE_HEADS = 4 };
enum { PREPARE_QUERIES = PREPARE_THREADS / LANES / PREPARE_HEADS };

/* lse and delta; LANES lanes a row, no weight for rows behind the last query. Block: [sequence]
 * [queries][heads], a few of both: what is read lies together, and so does what is written. */
template <typename T>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(backward_parameters a) {
  const parameters &p = a.p;
  int head_tiles = (int)((p.heads + PREPARE_HEADS - 1) / PREPARE_HEADS);
  int tiles = a.padded / PREPARE_QUERIES, index = blockIdx.x;
  int lane = threadIdx.x % LANES, row = threadIdx.x / LANES;
  int head = index % head_tiles * PREPARE_HEADS + row % PREPARE_HEADS;
  int i = index / head_tiles % tiles * PREPARE_QUERIES + row / PREPARE_HEADS;
  int b = index / head_tiles / tiles;
  span s = find_span(p, b);
  bool there = i < s.queries && head < p.heads;
  int64_t token = s.query_start + i;
  float sum = 0;
  if (there) {
    const T *o = (const T *)p.o.data + b * p.o.sequence + token * p.o.token + head * p.o.head;
    const T *d_o =
        (const T *)a.d_o.data + b * a.d_o.sequence + token * a.d_o.token + head * a.d_o.head;
    for (int c = lane * 8; c < p.value_dim; c += LANES * 8) {
      uint4 x = *(const uint4 *)(o + c), y = *(const uint4 *)(d_o + c);
      const T *left = (const T *)&x, *right = (const T *)&y;
#pragma unroll
      for (int e = 0; e < 8; ++e) sum += (float)left[e] * (float)right[e];
    }
  }
#pragma unroll
  for (int mask = LANES / 2; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  if (lane || head >= p.heads) return;
  float lse = INFINITY;
  if (there) {
    lse = LOG2_E *
          ((const float *)p.lse.data)[b * p.lse.sequence + token * p.lse.token + head * p.lse.head];
    if (lse == -INFINITY) lse = INFINITY; /* it sees no key */
    if (a.d_lse.data)
      sum -= ((const float *)
                  a.d_lse.data)[b * a.d_lse.sequence + token * a.d_lse.token + head * a.d_lse.head];
  }
  int64_t at = ((int64_t)b * p.heads + head) * a.padded + i;
  a.lse[at] = lse, a.delta[at] = sum;
}

/* seen_by, which is zero before; a thread a list. */
__global__ void __launch_bounds__(PREPARE_THREADS) turn_list_kernel(backward_parameters a) {
  const block_list &list = a.p.list;
  int blocks = (int)((a.p.queries + list.queries - 1) / list.queries);
  int64_t index = blockIdx.x * (int64_t)PREPARE_THREADS + threadIdx.x, pair = index / blocks;
  int block = (int)(index % blocks);
  if (pair >= a.p.batch * a.p.heads) return;
  listed_blocks listed = find_listed(list, pair / a.p.heads, pair % a.p.heads, block);
  for (int i = 0; i < listed.count; ++i)
    atomicOr(a.seen_by + (pair * a.key_blocks + listed.first[i]) * a.words + block / 32,
             1u << block % 32);
}

/* d_sink = -sum exp(sink - LSE) delta over all rows of a head that see a key; a block a head. */
__global__ void __launch_bounds__(PREPARE_THREADS)
    sink_kernel(backward_parameters a, const float *sinks, float *d_sinks) {
  __shared__ double parts[PREPARE_THREADS];
  int64_t head = blockIdx.x;
  float sink = sinks[head] * LOG2_E;
  double sum = 0;
  for (int64_t b = 0; b < a.p.batch; ++b)
    for (int i = threadIdx.x; i < a.padded; i += PREPARE_THREADS) {
      int64_t at = (b * a.p.heads + head) * a.padded + i;
      if (a.lse[at] != INFINITY) sum -= exp2(sink - a.lse[at]) * a.delta[at];
    }
  parts[threadIdx.x] = sum;
  for (int half = PREPARE_THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) d_sinks[head] = (float)parts[0];
}

enum backward_kind { KEYS, PAIRS_OF_KEYS, QUERIES };

/* EXTRAS: a cap, a bias or ALiBi. LARGE: for GPUs with the shared memory of Hopper. */
template <backward_kind KIND_, bool EXTRAS_, bool LARGE_, int WIDTH_, int VALUES_, int M_,
          int WARPS_, int N_, int BLOCKS_>
struct backward_shape {
  static constexpr bool BY_KEYS = KIND_ != QUERIES, PAIRS = KIND_ == PAIRS_OF_KEYS,
                        EXTRAS = EXTRAS_, LARGE = LARGE_;
  enum {
    WIDTH = WIDTH_,   /* of queries and keys */
    VALUES = VALUES_, /* width of values, not above WIDTH */
    M = M_,           /* times 16 rows a warp */
    N = N_,           /* rows of a tile of Y */
    BLOCKS = BLOCKS_, /* of a multiprocessor, at least */
    THREADS = WARPS_ * 32,
    ROWS = (PAIRS ? WARPS_ / 2 : WARPS_) * M_ * 16,
    X1 = ROWS * rows_layout<WIDTH_>::PITCH, /* bytes */
    X2 = ROWS * rows_layout<VALUES_>::PITCH,
    Y1 = N_ * rows_layout<WIDTH_>::PITCH,
    Y2 = N_ * rows_layout<VALUES_>::PITCH,
    STATISTICS = BY_KEYS ? 2 * N_ * 4 : 0, /* lse and delta of the tile's queries */
    STAGE = Y1 + Y2 + STATISTICS,
    WEIGHTS = PAIRS ? ROWS * N_ * 4 : 0, /* P, from warp to warp */
    BYTES = X1 + X2 + STAGES * STAGE + WEIGHTS,
  };
};

/* 16 M rows of one gradient, from `first` of the block on; zeros from row `used` of the block on,
 * nothing from `count`. */
template <typename T, int M, int TILES>
__device__ __forceinline__ void store_rows(T *to, int64_t token, int first, int used, int count,
                                           int width, float scale, const float (&c)[M][TILES][4]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = first + m * 16 + half * 8 + lane / 4;
      if (row >= count) continue;
      T *at = to + row * token + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < TILES; ++n)
        if (n * 8 < width)
          *(unsigned *)(at + n * 8) =
              row < used ? pack<T>(c[m][n][half * 2] * scale, c[m][n][half * 2 + 1] * scale) : 0;
    }
}

/* Where the rows of a block and of the other kind are: row r sees r + shift - left .. r + shift +
 * right of the `others`. */
struct extent {
  int first, used, others, shift, left, right;
  int low, high;        /* tiles of N others that any of the rows sees */
  int all_from, all_to; /* others that all rows see */
};
template <int ROWS, int N>
__device__ __forceinline__ extent extent_of(int first, int used, int others, int shift, int left,
                                            int right) {
  int last = min(first + ROWS, used) - 1;
  extent x = {first, used, others, shift, left, right, 0, 0, 0, 0};
  x.all_from = last + shift - left, x.all_to = min(others, first + shift + right + 1);
  x.low = max(first + shift - left, 0) / N;
  x.high = (max(min(others, last + shift + right + 1), 0) + N - 1) / N;
  if (first >= used) x.high = x.low;
  return x;
}

__device__ __forceinline__ score_terms terms_of(const backward_parameters &a, int64_t b,
                                                int64_t head, int64_t own, int64_t other) {
  const float *bias = (const float *)a.bias.data;
  if (bias) bias += b * a.bias.sequence + head * a.bias.head;
  return terms_of(a.p, head, bias, own, other);
}

/* What a block of keys works on, and the tiles of queries that stream past: of each head that reads
 * the keys, those that see any of them. Block: [sequence][key head][tile of keys: under a causal
 * mask the first is the longest]. */
template <typename T, typename S> struct key_block {
  enum { WIDTH = S::WIDTH, VALUES = S::VALUES, N = S::N, ROWS = S::ROWS };
  const backward_parameters &a;
  int b, kv_head, first, end; /* first: key of the block; end: of its block of the block list */
  span s;
  extent seen;
  unsigned x1, x2, ring; /* K, V and the stages in shared memory */
  int head, start, stop; /* whose copies are on their way or there; stop: end of the block of
                            queries on the block list */
  unsigned stage;

  /* One tile in shared memory. */
  struct tile {
    unsigned y1, y2;  /* Q, dO */
    const float *lse; /* of the queries; delta follows N later */
    int start, stop, head;
  };

  __device__ __forceinline__ explicit key_block(const backward_parameters &all) : a(all) {
    int tiles = tiles_of_rows(a.p.keys, ROWS, a.p.list.keys), index = blockIdx.x;
    row_tile own = find_tile(index % tiles, ROWS, a.p.list.keys);
    kv_head = index / tiles % (int)a.p.kv_heads, first = own.first, end = own.end;
    b = index / tiles / (int)a.p.kv_heads;
    s = find_span(a.p, b);
    seen = extent_of<ROWS, N>(first, min(s.keys, end), s.queries, -s.shift, s.right, s.left);
    x1 = (unsigned)__cvta_generic_to_shared(shared_memory), x2 = x1 + S::X1, ring = x2 + S::X2;
  }
  __device__ __forceinline__ T *rows(const token_rows &t, int64_t start, int64_t h) const {
    return (T *)t.data + b * t.sequence + start * t.token + h * t.head;
  }
  __device__ __forceinline__ bool more() const {
    return head < (kv_head + 1) * (int)a.p.group;
  }
  __device__ __forceinline__ void request() {
    const token_rows &q = a.p.q, &d_o = a.d_o;
    int there = s.queries - start;
    request_rows<T, WIDTH, N, S::THREADS>(stage, rows(q, s.query_start + start, head), q.token,
                                          there, (int)a.p.dim);
    request_rows<T, VALUES, N, S::THREADS>(stage + S::Y1, rows(d_o, s.query_start + start, head),
                                           d_o.token, there, (int)a.p.value_dim);
    if (threadIdx.x < N / 2) {
      const float *from = (threadIdx.x < N / 4 ? a.lse : a.delta) +
                          ((int64_t)b * a.p.heads + head) * a.padded + start;
      copy_chunk(stage + S::Y1 + S::Y2 + threadIdx.x * 16, from + threadIdx.x % (N / 4) * 4, true);
    }
  }
  /* The first tile of `head`, or of a head behind it, in the blocks of queries from `block` on. */
  __device__ __forceinline__ void find(int block) {
    const block_list &list = a.p.list;
    const int low = seen.low * N, high = min(seen.high * N, s.queries);
    start = low, stop = FAR;
    if (!list.offsets) return;
    const int blocks = (high + list.queries - 1) / list.queries;
    for (; more(); ++head, block = low / list.queries) {
      const uint32_t *words =
          a.seen_by +
          (((int64_t)b * a.p.heads + head) * a.key_blocks + first / list.keys) * a.words;
      for (uint32_t bits; block < blocks; block = (block / 32 + 1) * 32) {
        bits = words[block / 32] >> block % 32;
        if (!bits) continue;
        block += __ffs(bits) - 1;
        if (block >= blocks) break;
        start = block * list.queries, stop = start + list.queries;
        if (start < low) start += (low - start) / N * N;
        return;
      }
    }
  }
  __device__ __forceinline__ void step() {
    start += N;
    if (start < min(seen.high * N, stop)) return;
    if (a.p.list.offsets) {
      find(stop / a.p.list.queries);
    } else {
      start = seen.low * N, ++head;
    }
  }
  /* Queues K, V and the first tile. */
  __device__ __forceinline__ void begin() {
    const token_rows &k = a.p.k, &v = a.p.v;
    request_rows<T, WIDTH, ROWS, S::THREADS>(x1, rows(k, s.key_start + first, kv_head), k.token,
                                             s.keys - first, (int)a.p.dim);
    request_rows<T, VALUES, ROWS, S::THREADS>(x2, rows(v, s.key_start + first, kv_head), v.token,
                                              s.keys - first, (int)a.p.value_dim);
    stage = ring;
    head = (kv_head + (seen.low < seen.high ? 0 : 1)) * (int)a.p.group;
    find(a.p.list.offsets ? seen.low * N / a.p.list.queries : 0);
    if (more()) request();
    commit_copies();
  }
  /* Waits for the tile, and queues the one after it into the stage that all have left. */
  __device__ __forceinline__ tile next() {
    wait_copies<0>();
    __syncthreads();
    const char *statistics = shared_memory + (stage + S::Y1 + S::Y2 - x1);
    tile now = {stage, stage + S::Y1, (const float *)statistics, start, stop, head};
    step();
    stage = 2 * ring + S::STAGE - stage;
    if (more()) request();
    commit_copies();
    return now;
  }
};

/* c = -delta, which dP starts from; the columns are queries. */
template <int M, int N>
__device__ __forceinline__ void start_slopes(float (&c)[M][N / 8][4], const float *delta) {
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    float2 x = *(const float2 *)(delta + n * 8 + threadIdx.x % 4 * 2);
#pragma unroll
    for (int m = 0; m < M; ++m) c[m][n][0] = c[m][n][2] = -x.x, c[m][n][1] = c[m][n][3] = -x.y;
  }
}

/* P from S; `cap_slope` is set where there are EXTRAS. `row` is the thread's first key. */
template <typename T, typename S>
__device__ __forceinline__ void
weigh(float (&score)[S::M][S::N / 8][4], float (&cap_slope)[S::EXTRAS ? S::M : 1][S::N / 8][4],
      const key_block<T, S> &k, const typename key_block<T, S>::tile &now, int row) {
  enum { M = S::M, N = S::N };
  int column = threadIdx.x % 4 * 2;
  if constexpr (S::EXTRAS)
    finish_scores<true, M, N>(score, cap_slope,
                              terms_of(k.a, k.b, now.head, k.a.bias_key, k.a.bias.token), row,
                              k.s.keys, now.start + column, k.s.queries, k.seen.shift);
  if (now.start < k.seen.all_from || now.start + N > min(k.seen.all_to, now.stop))
    hide<M, N>(score, row, now.start + column, min(k.s.queries, now.stop), k.seen.shift,
               k.seen.left, k.seen.right);
  float scale = S::EXTRAS ? 1 : k.a.p.scale;
#pragma unroll
  for (int n = 0; n < N / 8; ++n) {
    float2 base = *(const float2 *)(now.lse + n * 8 + column);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        score[m][n][e] = exponential(fmaf(score[m][n][e], scale, e % 2 ? -base.y : -base.x));
  }
}

/* dK and dV of 16 M keys a warp. */
template <typename T, typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) keys_kernel(backward_parameters a) {
#ifdef __CUDA_ARCH__
  if constexpr (S::LARGE && __CUDA_ARCH__ < 900) return; /* it is not launched there */
#endif
  enum { WIDTH = S::WIDTH, M = S::M, N = S::N };
  static_assert(S::WIDTH == S::VALUES, "");
  key_block<T, S> k(a);
  if (k.first >= k.s.stored) return;
  int own = threadIdx.x / 32 * 16 * M; /* the warp's first row in the block */
  lane_row<WIDTH> left = left_rows<WIDTH>(own), right = right_rows<WIDTH>();
  lane_row<WIDTH> turned = turned_rows<WIDTH>();
  float d_k[M][WIDTH / 8][4] = {}, d_v[M][WIDTH / 8][4] = {};
  k.begin();
#pragma unroll 1
  while (k.more()) {
    typename key_block<T, S>::tile now = k.next();
    float score[M][N / 8][4] = {}, slope[M][N / 8][4]; /* S then P; dP - delta then dS */
    float cap_slope[S::EXTRAS ? M : 1][N / 8][4];
    multiply_rows<T, WIDTH, M, N>(score, left, k.x1, right, now.y1);
    start_slopes<M, N>(slope, now.lse + N);
    multiply_rows<T, WIDTH, M, N>(slope, left, k.x2, right, now.y2);
    weigh<T, S>(score, cap_slope, k, now, k.first + own + threadIdx.x % 32 / 4);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          slope[m][n][e] *=
              S::EXTRAS ? score[m][n][e] * cap_slope[S::EXTRAS ? m : 0][n][e] : score[m][n][e];
    unsigned operands[M][N / 16][4];
    pack_operands<T, M, N>(operands, score);
    multiply_turned<T, WIDTH, M, N>(d_v, operands, turned, now.y2);
    pack_operands<T, M, N>(operands, slope);
    multiply_turned<T, WIDTH, M, N>(d_k, operands, turned, now.y1);
  }
  wait_copies<0>();
  int used = min(k.s.keys, k.end) - k.first, count = min(k.s.stored, k.end) - k.first;
  int64_t token = k.s.key_start + k.first;
  if (a.d_k.data)
    store_rows<T>(k.rows(a.d_k, token, k.kv_head), a.d_k.token, own, used, count, (int)a.p.dim,
                  a.gradient_scale, d_k);
  if (a.d_v.data)
    store_rows<T>(k.rows(a.d_v, token, k.kv_head), a.d_v.token, own, used, count,
                  (int)a.p.value_dim, 1, d_v);
}

/* dK and dV of 16 M keys a pair of warps. */
template <typename T, typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) pairs_kernel(backward_parameters a) {
#ifdef __CUDA_ARCH__
  if constexpr (S::LARGE && __CUDA_ARCH__ < 900) return; /* it is not launched there */
#endif
  enum { WIDTH = S::WIDTH, VALUES = S::VALUES, M = S::M, N = S::N };
  key_block<T, S> k(a);
  if (k.first >= k.s.stored) return;
  int lane = threadIdx.x % 32, pair = threadIdx.x / 64;
  int own = pair * 16 * M;            /* the pair's first row in the block */
  bool slopes = threadIdx.x / 32 % 2; /* this warp makes dP and dK */
  float4 *weights = (float4 *)(shared_memory + S::X1 + S::X2 + STAGES * S::STAGE) +
                    pair * (M * N / 8) * 32 + lane;
  lane_row<WIDTH> left = left_rows<WIDTH>(own), right = right_rows<WIDTH>();
  lane_row<WIDTH> turned = turned_rows<WIDTH>();
  float sum[M][WIDTH / 8][4] = {}; /* dV or dK */
  k.begin();
#pragma unroll 1
  while (k.more()) {
    typename key_block<T, S>::tile now = k.next();
    float score[M][N / 8][4] = {}; /* S then P, or dP - delta then dS */
    if (slopes) start_slopes<M, N>(score, now.lse + N);
    if constexpr (WIDTH == VALUES) {
      multiply_rows<T, WIDTH, M, N>(score, left, slopes ? k.x2 : k.x1, right,
                                    slopes ? now.y2 : now.y1);
    } else if (slopes) {
      multiply_rows<T, VALUES, M, N>(score, left_rows<VALUES>(own), k.x2, right_rows<VALUES>(),
                                     now.y2);
    } else {
      multiply_rows<T, WIDTH, M, N>(score, left, k.x1, right, now.y1);
    }
    if (slopes) {
      asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory");
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          float4 weight = weights[(m * (N / 8) + n) * 32];
          float(&x)[4] = score[m][n];
          x[0] *= weight.x, x[1] *= weight.y, x[2] *= weight.z, x[3] *= weight.w;
        }
    } else {
      float cap_slope[S::EXTRAS ? M : 1][N / 8][4];
      weigh<T, S>(score, cap_slope, k, now, k.first + own + lane / 4);
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          const float(&x)[4] = score[m][n], (&y)[4] = cap_slope[S::EXTRAS ? m : 0][n];
          weights[(m * (N / 8) + n) * 32] =
              S::EXTRAS ? make_float4(x[0] * y[0], x[1] * y[1], x[2] * y[2], x[3] * y[3])
                        : make_float4(x[0], x[1], x[2], x[3]);
        }
      asm volatile("bar.arrive %0, 64;" ::"r"(pair + 1) : "memory");
    }
    unsigned operands[M][N / 16][4];
    pack_operands<T, M, N>(operands, score);
    if constexpr (WIDTH == VALUES)
      multiply_turned<T, WIDTH, M, N>(sum, operands, turned, slopes ? now.y1 : now.y2);
    else if (slopes)
      multiply_turned<T, WIDTH, M, N>(sum, operands, turned, now.y1);
    else
      multiply_turned<T, VALUES, M, N>(sum, operands, turned_rows<VALUES>(), now.y2);
  }
  wait_copies<0>();
  const token_rows &t = slopes ? a.d_k : a.d_v;
  if (t.data)
    store_rows<T>(k.rows(t, k.s.key_start + k.first, k.kv_head), t.token, own,
                  min(k.s.keys, k.end) - k.first, min(k.s.stored, k.end) - k.first,
                  (int)(slopes ? a.p.dim : a.p.value_dim), slopes ? a.gradient_scale : 1, sum);
}

/* Block: [sequence][head][tile of queries, last first: under a causal mask it is the longest]. */
template <typename T, typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) queries_kernel(backward_parameters a) {
#ifdef __CUDA_ARCH__
  if constexpr (S::LARGE && __CUDA_ARCH__ < 900) return; /* it is not launched there */
#endif
  enum { WIDTH = S::WIDTH, VALUES = S::VALUES, M = S::M, N = S::N, ROWS = S::ROWS };
  const parameters &p = a.p;
  int tiles = tiles_of_rows(p.queries, ROWS, p.list.queries), index = blockIdx.x;
  row_tile tile = find_tile(tiles - 1 - index % tiles, ROWS, p.list.queries);
  int head = index / tiles % (int)p.heads, first = tile.first;
  int b = index / tiles / (int)p.heads, kv_head = head / (int)p.group;
  span s = find_span(p, b);
  if (first >= s.queries) return;
  int lane = threadIdx.x % 32, quad = lane % 4;
  int own = threadIdx.x / 32 * 16 * M; /* the warp's first row in the block */
  unsigned x1 = (unsigned)__cvta_generic_to_shared(shared_memory), x2 = x1 + S::X1;
  unsigned ring = x2 + S::X2;

  auto rows_of = [&](const token_rows &t, int64_t start, int64_t h) {
    return (T *)t.data + b * t.sequence + start * t.token + h * t.head;
  };
  request_rows<T, WIDTH, ROWS, S::THREADS>(x1, rows_of(p.q, s.query_start + first, head), p.q.token,
                                           s.queries - first, (int)p.dim);
  request_rows<T, VALUES, ROWS, S::THREADS>(x2, rows_of(a.d_o, s.query_start + first, head),
                                            a.d_o.token, s.queries - first, (int)p.value_dim);
  const T *k = rows_of(p.k, s.key_start, kv_head), *v = rows_of(p.v, s.key_start, kv_head);
  int used = min(s.queries, tile.end); /* rows of the block */
  extent seen = extent_of<ROWS, N>(first, used, s.keys, s.shift, s.left, s.right);
  if (S::EXTRAS && a.d_bias.data) /* every pair has its gradient */
    seen.low = 0, seen.high = (int)((p.keys + N - 1) / N);
  key_walk<N> walk(p.list, b, head, first, seen.low * N, seen.high * N);

  auto request = [&](unsigned to, int key) {
    request_rows<T, WIDTH, N, S::THREADS>(to, k + key * p.k.token, p.k.token, s.keys - key,
                                          (int)p.dim);
    request_rows<T, VALUES, N, S::THREADS>(to + S::Y1, v + key * p.v.token, p.v.token, s.keys - key,
                                           (int)p.value_dim);
  };

  lane_row<WIDTH> left = left_rows<WIDTH>(own), right = right_rows<WIDTH>();
  lane_row<WIDTH> turned = turned_rows<WIDTH>();
  lane_row<VALUES> left_value = left_rows<VALUES>(own), right_value = right_rows<VALUES>();
  float lse[M][2], delta[M][2];
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int i = first + own + lane / 4 + m * 16 + half * 8;
      int64_t at = ((int64_t)b * p.heads + head) * a.padded + i;
      lse[m][half] = a.lse[at], delta[m][half] = a.delta[at];
    }
  float sum[M][WIDTH / 8][4] = {}; /* dQ */

  unsigned y1 = ring; /* the stage that is worked on; the other one is filled meanwhile */
  if (walk.more()) request(y1, walk.key);
  commit_copies();
#pragma unroll 1
  while (walk.more()) {
    const int start = walk.key, block_end = walk.end;
    walk.step();
    wait_copies<0>();
    __syncthreads();
    unsigned other = 2 * ring + S::STAGE - y1, y2 = y1 + S::Y1;
    if (walk.more()) request(other, walk.key);
    commit_copies();

    float score[M][N / 8][4] = {}, slope[M][N / 8][4]; /* S then P; dP - delta then dS */
    multiply_rows<T, WIDTH, M, N>(score, left, x1, right, y1);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e) slope[m][n][e] = -delta[m][e / 2];
    multiply_rows<T, VALUES, M, N>(slope, left_value, x2, right_value, y2);

    float cap_slope[S::EXTRAS ? M : 1][N / 8][4];
    if constexpr (S::EXTRAS)
      finish_scores<true, M, N>(score, cap_slope, terms_of(a, b, head, a.bias.token, a.bias_key),
                                first + own + lane / 4, s.queries, start + quad * 2, s.keys,
                                s.shift);
    if (start < seen.all_from || start + N > min(seen.all_to, block_end))
      hide<M, N>(score, first + own + lane / 4, start + quad * 2, min(s.keys, block_end), s.shift,
                 s.left, s.right);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          slope[m][n][e] *=
              exponential(fmaf(score[m][n][e], S::EXTRAS ? 1 : p.scale, -lse[m][e / 2]));
    if constexpr (S::EXTRAS) {
      float *d_bias = (float *)a.d_bias.data + b * a.d_bias.sequence + head * a.d_bias.head;
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int i = first + own + lane / 4 + m * 16 + e / 2 * 8,
                j = start + n * 8 + quad * 2 + e % 2;
            if (a.d_bias.data && i < s.queries && j < p.keys)
              d_bias[i * a.d_bias.token + j * a.d_bias_key] = slope[m][n][e];
            slope[m][n][e] *= cap_slope[m][n][e];
          }
    }
    unsigned operands[M][N / 16][4];
    pack_operands<T, M, N>(operands, slope);
    multiply_turned<T, WIDTH, M, N>(sum, operands, turned, y1);
    y1 = other;
  }
  wait_copies<0>();
  if (a.d_q.data)
    store_rows<T>(rows_of(a.d_q, s.query_start + first, head), a.d_q.token, own, used - first,
                  used - first, (int)p.dim, a.gradient_scale, sum);
}

/* Shapes by width. A warp has 32 rows where its sums leave the registers for them. */
template <bool EXTRAS, bool LARGE, int WIDTH, int VALUES> struct shapes;
template <bool LARGE> struct shapes<false, LARGE, 32, 32> {
  typedef backward_shape<KEYS, false, false, 32, 32, 2, 4, 32, 2> keys;
  typedef backward_shape<QUERIES, false, false, 32, 32, 2, 4, 64, 2> queries;
};
template <bool LARGE> struct shapes<false, LARGE, 64, 64> {
  typedef backward_shape<KEYS, false, false, 64, 64, 2, 4, 32, 2> keys;
  typedef backward_shape<QUERIES, false, false, 64, 64, 2, 4, 64, 2> queries;
};
template <int WIDTH> struct narrow_shapes {
  typedef backward_shape<KEYS, true, false, WIDTH, WIDTH, 1, 4, 32, 3> keys;
  typedef backward_shape<QUERIES, true, false, WIDTH, WIDTH, 1, 4, 32, 3> queries;
};
template <bool LARGE> struct shapes<true, LARGE, 32, 32> : narrow_shapes<32> {};
template <bool LARGE> struct shapes<true, LARGE, 64, 64> : narrow_shapes<64> {};
template <bool EXTRAS, bool LARGE> struct shapes<EXTRAS, LARGE, 96, 96> {
  typedef backward_shape<KEYS, EXTRAS, LARGE, 96, 96, 1, 4, LARGE ? 64 : 32, 2> keys;
  typedef backward_shape<QUERIES, EXTRAS, LARGE, 96, 96, LARGE && !EXTRAS ? 2 : 1, 4,
                         LARGE && EXTRAS ? 64 : 32, 2>
      queries;
};
template <bool LARGE> struct shapes<false, LARGE, 128, 128> {
  typedef backward_shape<PAIRS_OF_KEYS, false, LARGE, 128, 128, 2, 4, LARGE ? 64 : 32, 2> keys;
  typedef backward_shape<QUERIES, false, LARGE, 128, 128, LARGE ? 2 : 1, 4, 32, 2> queries;
};
template <bool LARGE> struct shapes<true, LARGE, 128, 128> {
  typedef backward_shape<KEYS, true, LARGE, 128, 128, 1, 4, LARGE ? 64 : 32, 2> keys;
  typedef backward_shape<QUERIES, true, LARGE, 128, 128, 1, 4, LARGE ? 64 : 32, 2> queries;
};
template <bool EXTRAS, bool LARGE> struct shapes<EXTRAS, LARGE, 192, 128> {
  typedef backward_shape<PAIRS_OF_KEYS, EXTRAS, false, 192, 128, 1, 4, 32, 2> keys;
  typedef backward_shape<QUERIES, EXTRAS, false, 192, 128, 1, 4, 32, 2> queries;
};
template <bool EXTRAS, bool LARGE> struct shapes<EXTRAS, LARGE, 256, 256> {
  enum { N = LARGE ? 32 : 16 };
  typedef backward_shape<PAIRS_OF_KEYS, EXTRAS, LARGE, 256, 256, 1, 4, N, 2> keys;
  typedef backward_shape<QUERIES, EXTRAS, LARGE, 256, 256, 1, LARGE ? 8 : 4, N, 1> queries;
};

/* With a block list tiles begin at blocks, and the last one may end this much later. */
int64_t padded_of(const attn_softmax_problem *problem) {
  return (ceil_divide(problem->query_length, PADDING) + (problem->list_keys ? 1 : 0)) * PADDING;
}

/* Words of seen_by, of a row of it and in all. */
int64_t row_words(const attn_softmax_problem *problem) {
  return ceil_divide(ceil_divide(problem->query_length, problem->list_queries), 32);
}
int64_t list_words(const attn_softmax_problem *problem) {
  if (!problem->list_keys) return 0;
  return problem->batch * problem->heads * row_words(problem) *
         ceil_divide(problem->key_length, problem->list_keys);
}

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  const int bytes = (int)shapes<false, false, 256, 256>::queries::BYTES; /* no shape needs more */
  if (!offered(problem) || problem->paged || (size_t)bytes > device->shared_bytes) return false;
  /* Rows are copied four statistics at a time; and d_bias needs all pairs. */
  if (problem->list_queries % 4 || (problem->list_keys && problem->bias)) return false;
  widths w = widths_of(problem);
  choice->workspace_bytes =
      2 * sizeof(float) * (size_t)(problem->batch * problem->heads * padded_of(problem)) +
      sizeof(uint32_t) * (size_t)list_words(problem);
  snprintf(
      choice->description, sizeof choice->description,
      "mma.sync: dimensions filled up to %d and %d, scores made for keys and again for queries",
      w.keys, w.values);
  return true;
}

bool suits(const attn_softmax_problem *, const attn_softmax_args *args) {
  return aligned(args->q, 8) && aligned(args->k, 8) && aligned(args->v, 8) && aligned(args->o, 8) &&
         aligned(args->d_o, 8) && aligned(args->d_q, 2) && aligned(args->d_k, 2) &&
         aligned(args->d_v, 2);
}

template <typename T, typename S>
attn_status launch(const backward_parameters &a, cudaStream_t stream) {
  int tiles = S::BY_KEYS ? tiles_of_rows(a.p.keys, S::ROWS, a.p.list.keys)
                         : tiles_of_rows(a.p.queries, S::ROWS, a.p.list.queries);
  int64_t blocks = a.p.batch * (S::BY_KEYS ? a.p.kv_heads : a.p.heads) * tiles;
  if (blocks == 0) return ATTN_OK;
  void (*kernel)(backward_parameters);
  if constexpr (S::PAIRS)
    kernel = pairs_kernel<T, S>;
  else if constexpr (S::BY_KEYS)
    kernel = keys_kernel<T, S>;
  else
    kernel = queries_kernel<T, S>;
  ATTN_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)S::BYTES));
  kernel<<<(unsigned)blocks, S::THREADS, S::BYTES, stream>>>(a);
  ATTN_CUDA_TRY_LAUNCH("softmax_mma backward");
  return ATTN_OK;
}

template <typename T, bool EXTRAS, bool LARGE, int WIDTH, int VALUES>
attn_status run_shapes(const backward_parameters &a, cudaStream_t stream) {
  typedef shapes<EXTRAS, LARGE, WIDTH, VALUES> all;
  attn_status status = ATTN_OK;
  if (a.d_k.data || a.d_v.data) status = launch<T, typename all::keys>(a, stream);
  if (status == ATTN_OK && (a.d_q.data || a.d_bias.data))
    status = launch<T, typename all::queries>(a, stream);
  return status;
}

template <typename T, int WIDTH, int VALUES>
attn_status run_widths(const backward_parameters &a, bool extras, bool large, cudaStream_t stream) {
  if (large)
    return extras ? run_shapes<T, true, true, WIDTH, VALUES>(a, stream)
                  : run_shapes<T, false, true, WIDTH, VALUES>(a, stream);
  return extras ? run_shapes<T, true, false, WIDTH, VALUES>(a, stream)
                : run_shapes<T, false, false, WIDTH, VALUES>(a, stream);
}

template <typename T>
attn_status run_dtype(const backward_parameters &a, int width, bool extras, bool large,
                      cudaStream_t stream) {
  int64_t blocks = a.p.batch * (a.padded / PREPARE_QUERIES) * ceil_divide(a.p.heads, PREPARE_HEADS);
  if (blocks) {
    prepare_kernel<T><<<(unsigned)blocks, PREPARE_THREADS, 0, stream>>>(a);
    ATTN_CUDA_TRY_LAUNCH("softmax_mma prepare");
  }
  switch (width) {
  case 32: return run_widths<T, 32, 32>(a, extras, large, stream);
  case 64: return run_widths<T, 64, 64>(a, extras, large, stream);
  case 96: return run_widths<T, 96, 96>(a, extras, large, stream);
  case 128: return run_widths<T, 128, 128>(a, extras, large, stream);
  case 192: return run_widths<T, 192, 128>(a, extras, large, stream);
  default: return run_widths<T, 256, 256>(a, extras, large, stream);
  }
}

attn_status run(const attn_cuda_device *device, const attn_cuda_choice *,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *workspace,
                cudaStream_t stream) {
  bool packed = problem->ragged;
  backward_parameters a = {};
  a.p = parameters_of(problem, args, 1, 0, 0, NULL);
  a.d_o = over_tokens(args->d_o, packed), a.d_lse = over_heads(args->d_lse, packed);
  a.d_q = over_tokens(args->d_q, packed);
  a.d_k = over_tokens(args->d_k, packed), a.d_v = over_tokens(args->d_v, packed);
  if (problem->bias) {
    a.bias = over_heads(args->bias, false), a.bias_key = args->bias.stride[3];
    a.d_bias = over_heads(args->d_bias, false), a.d_bias_key = args->d_bias.stride[3];
  }
  a.gradient_scale = (float)problem->scale;
  a.padded = (int)padded_of(problem);
  a.lse = (float *)workspace;
  a.delta = a.lse + problem->batch * problem->heads * a.padded;
  if (problem->list_keys) {
    a.seen_by = (uint32_t *)(a.delta + problem->batch * problem->heads * a.padded);
    a.key_blocks = (int)ceil_divide(problem->key_length, problem->list_keys);
    a.words = (int)row_words(problem);
    ATTN_CUDA_TRY(
        cudaMemsetAsync(a.seen_by, 0, sizeof(uint32_t) * (size_t)list_words(problem), stream));
    int64_t lists =
        problem->batch * problem->heads * ceil_divide(problem->query_length, problem->list_queries);
    turn_list_kernel<<<(unsigned)ceil_divide(lists, PREPARE_THREADS), PREPARE_THREADS, 0, stream>>>(
        a);
    ATTN_CUDA_TRY_LAUNCH("softmax_mma block list");
  }
  auto run_type = problem->dtype == ATTN_F16 ? run_dtype<__half> : run_dtype<__nv_bfloat16>;
  attn_status status =
      run_type(a, widths_of(problem).keys, extras_of(problem), large(device), stream);
  if (status != ATTN_OK || !problem->sinks || !args->d_sinks.data) return status;
  sink_kernel<<<(unsigned)problem->heads, PREPARE_THREADS, 0, stream>>>(
      a, a.p.sinks, (float *)args->d_sinks.data);
  ATTN_CUDA_TRY_LAUNCH("softmax_mma sinks");
  return ATTN_OK;
}

} // namespace

extern const softmax_algorithm softmax_mma_backward = {"mma", ATTN_PASS_BACKWARD, plan, suits, run};
