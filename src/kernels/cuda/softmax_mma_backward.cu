/* Softmax backward in bfloat16 and float16 by mma.m16n8k16, for dimensions up to 256 that are
 * multiples of 8 (FlashAttention-2, arXiv 2307.08691, section 3.1).
 *
 *   P = exp(S - LSE),  dP = dO V^T,  dS = P (.) (dP - delta),  delta_i = do_i . o_i - dLSE_i
 *   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K        (dS times the cap's slope, if any)
 *
 * Kernels of one body: a warp has 16 M rows of X1 and X2, and tiles of Y1 and Y2 stream past:
 *
 *   S = X1 Y1^T, dP = X2 Y2^T, then accumulators += dS Y1 and, for values, += P Y2
 *
 *   rows are keys:     X = K, V    Y = Q, dO    accumulators dK, dV   (S and dP are transposed)
 *   rows are queries:  X = Q, dO   Y = K, V     accumulator dQ
 *
 * So P and dS stay in registers, as operands A. S and dP are made twice (7 products for 5), and in
 * return no sum has an order that depends on timing. At a width of 256 the accumulators of dK and
 * dV do not fit together: each has a kernel of its own (8 products). */
#include "kernels/cuda/softmax_mma.cuh"

namespace {

enum backward_kind { KEYS_AND_VALUES, KEYS_ALONE, VALUES_ALONE, QUERIES };

enum { STAGES = 2 }; /* of Y in shared memory: one is worked on while the other is filled */

struct backward_parameters {
  parameters p; /* o and lse are read by the preparation alone */
  token_rows d_o, d_lse, d_q, d_k, d_v, bias, d_bias;
  int64_t bias_key, d_bias_key;
  float gradient_scale;
  float *lse, *delta; /* [batch, heads, padded]: LSE log2 e (+inf: weights of 0), delta */
  int padded;
};

enum { PADDING = 128, PREPARE_THREADS = 256, LANES = 8 };

/* lse and delta; LANES lanes a row, zeros of weight for rows behind the last query. */
template <typename T>
__global__ void __launch_bounds__(PREPARE_THREADS) prepare_kernel(backward_parameters a) {
  const parameters &p = a.p;
  int64_t index = (blockIdx.x * (int64_t)PREPARE_THREADS + threadIdx.x) / LANES;
  int lane = threadIdx.x % LANES, i = (int)(index % a.padded);
  int64_t head = index / a.padded % p.heads, b = index / a.padded / p.heads;
  if (b >= p.batch) return;
  span s = find_span(p, b);
  bool there = i < s.queries;
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
  if (lane) return;
  float lse = INFINITY;
  if (there) {
    lse =
        ((const float *)p.lse.data)[b * p.lse.sequence + token * p.lse.token + head * p.lse.head] *
        LOG2_E;
    if (lse == -INFINITY) lse = INFINITY; /* it sees no key */
    if (a.d_lse.data)
      sum -= ((const float *)
                  a.d_lse.data)[b * a.d_lse.sequence + token * a.d_lse.token + head * a.d_lse.head];
  }
  a.lse[index] = lse, a.delta[index] = sum;
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

/* EXTRAS: a cap, a bias or ALiBi. LARGE: for GPUs with the shared memory of Hopper. */
template <backward_kind KIND_, bool EXTRAS_, bool LARGE_, int WIDTH_, int VALUES_, int M_,
          int WARPS_, int N_, int BLOCKS_>
struct backward_shape {
  static constexpr bool EXTRAS = EXTRAS_, LARGE = LARGE_, BY_KEYS = KIND_ != QUERIES,
                        SLOPES = KIND_ != VALUES_ALONE,               /* dP and dS are made */
      VALUE_SUMS = KIND_ == VALUES_ALONE || KIND_ == KEYS_AND_VALUES; /* += P Y2 */
  enum {
    WIDTH = WIDTH_,   /* of queries and keys */
    VALUES = VALUES_, /* width of values, not above WIDTH */
    M = M_,           /* times 16 rows a warp */
    N = N_,           /* rows of a tile of Y */
    BLOCKS = BLOCKS_, /* of a multiprocessor, at least */
    THREADS = WARPS_ * 32,
    ROWS = WARPS_ * M_ * 16,
    X1 = ROWS * rows_layout<WIDTH_>::PITCH, /* bytes */
    X2 = SLOPES ? ROWS * rows_layout<VALUES_>::PITCH : 0,
    Y1 = N_ * rows_layout<WIDTH_>::PITCH,
    Y2 = N_ * rows_layout<VALUES_>::PITCH,
    STATISTICS = BY_KEYS ? 2 * N_ * 4 : 0, /* lse and delta of the tile's queries */
    STAGE = Y1 + Y2 + STATISTICS,
    BYTES = X1 + X2 + STAGES * STAGE,
  };
};

/* 16 M rows a warp of one gradient; zeros from row `used` of the block on, nothing from `count`. */
template <typename T, int M, int WIDTH>
__device__ __forceinline__ void store_rows(T *to, int64_t token, int used, int count, int width,
                                           float scale, const float (&c)[M][WIDTH / 8][4]) {
  int lane = threadIdx.x % 32;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      int row = (threadIdx.x / 32 * M + m) * 16 + half * 8 + lane / 4;
      if (row >= count) continue;
      T *at = to + row * token + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n)
        if (n * 8 < width)
          *(unsigned *)(at + n * 8) =
              row < used ? pack<T>(c[m][n][half * 2] * scale, c[m][n][half * 2 + 1] * scale) : 0;
    }
}

/* Block: [sequence][head of the rows' kind][tile of rows, the longest under a causal mask first].
 */
template <typename T, typename S>
__global__ void __launch_bounds__(S::THREADS, S::BLOCKS) gradient_kernel(backward_parameters a) {
#ifdef __CUDA_ARCH__
  if constexpr (S::LARGE && __CUDA_ARCH__ < 900) return; /* it is not launched there */
#endif
  enum { WIDTH = S::WIDTH, VALUES = S::VALUES, M = S::M, N = S::N, ROWS = S::ROWS };
  constexpr bool BY_KEYS = S::BY_KEYS;
  const parameters &p = a.p;
  int tiles = (int)(((BY_KEYS ? p.keys : p.queries) + ROWS - 1) / ROWS), index = blockIdx.x;
  int heads = (int)(BY_KEYS ? p.kv_heads : p.heads), row_head = index / tiles % heads;
  int first = (BY_KEYS ? index % tiles : tiles - 1 - index % tiles) * ROWS;
  int b = index / tiles / heads;
  span s = find_span(p, b);
  int count = (BY_KEYS ? s.stored : s.queries) - first; /* rows from the first one on */
  if (count <= 0) return;
  int group = (int)p.group, kv_head = BY_KEYS ? row_head : row_head / group;
  int head = BY_KEYS ? row_head * group : row_head; /* BY_KEYS: the first of the group */
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
  unsigned x1 = (unsigned)__cvta_generic_to_shared(shared_memory);
  unsigned x2 = x1 + S::X1, ring = x2 + S::X2;

  auto rows_of = [&](const token_rows &t, int64_t start, int64_t h) {
    return (T *)t.data + b * t.sequence + start * t.token + h * t.head;
  };
  const T *q = rows_of(p.q, s.query_start, head), *d_o = rows_of(a.d_o, s.query_start, head);
  const T *k = rows_of(p.k, s.key_start, kv_head), *v = rows_of(p.v, s.key_start, kv_head);
  {
    int there = (BY_KEYS ? s.keys : s.queries) - first;
    const token_rows &t1 = BY_KEYS ? p.k : p.q, &t2 = BY_KEYS ? p.v : a.d_o;
    request_rows<T, WIDTH, ROWS, S::THREADS>(x1, (BY_KEYS ? k : q) + first * t1.token, t1.token,
                                             there, (int)p.dim);
    if (S::SLOPES)
      request_rows<T, VALUES, ROWS, S::THREADS>(x2, (BY_KEYS ? v : d_o) + first * t2.token,
                                                t2.token, there, (int)p.value_dim);
  }

  /* Row r sees r + shift - left .. r + shift + right of the other kind; tiles of Y that any of the
   * rows sees, and what all see. */
  int used = BY_KEYS ? s.keys : s.queries, others = BY_KEYS ? s.queries : s.keys;
  int shift = BY_KEYS ? -s.shift : s.shift;
  int left = BY_KEYS ? s.right : s.left, right = BY_KEYS ? s.left : s.right;
  int last = min(first + ROWS, used) - 1;
  int all_from = last + shift - left, all_to = min(others, first + shift + right + 1);
  int low = max(first + shift - left, 0) / N;
  int high = (max(min(others, last + shift + right + 1), 0) + N - 1) / N;
  if (first >= used) high = low;
  if (S::EXTRAS && !BY_KEYS && a.d_bias.data) /* every pair has its gradient */
    low = 0, high = (int)((p.keys + N - 1) / N);

  /* Tile `tile` of Y; of the queries of head `h` where the rows are keys. */
  auto request = [&](unsigned to, int h, int tile) {
    int start = tile * N;
    const token_rows &t1 = BY_KEYS ? p.q : p.k, &t2 = BY_KEYS ? a.d_o : p.v;
    const T *y1 = BY_KEYS ? q + (h - head) * p.q.head : k;
    const T *y2 = BY_KEYS ? d_o + (h - head) * a.d_o.head : v;
    request_rows<T, WIDTH, N, S::THREADS>(to, y1 + start * t1.token, t1.token, others - start,
                                          (int)p.dim);
    request_rows<T, VALUES, N, S::THREADS>(to + S::Y1, y2 + start * t2.token, t2.token,
                                           others - start, (int)p.value_dim);
    if (BY_KEYS && threadIdx.x < N / 2) {
      int part = threadIdx.x % (N / 4) * 4;
      const float *from = (threadIdx.x < N / 4 ? a.lse : a.delta) +
                          ((int64_t)b * p.heads + h) * a.padded + start + part;
      copy_chunk(to + S::Y1 + S::Y2 + threadIdx.x * 16, from, true);
    }
  };

  /* The thread's rows are `row` + 8 half + 16 m of the block. */
  int row = warp * 16 * M + lane / 4;
  lane_row<WIDTH> left_row = left_rows<WIDTH>(warp * 16 * M), right_row = right_rows<WIDTH>();
  lane_row<VALUES> left_value = left_rows<VALUES>(warp * 16 * M),
                   right_value = right_rows<VALUES>();
  lane_row<WIDTH> turned = turned_rows<WIDTH>();
  lane_row<VALUES> turned_value = turned_rows<VALUES>();
  float row_lse[M][2], row_delta[M][2];
  if (!BY_KEYS) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        int64_t at = ((int64_t)b * p.heads + head) * a.padded + first + row + m * 16 + half * 8;
        row_lse[m][half] = a.lse[at], row_delta[m][half] = a.delta[at];
      }
  }
  float sum1[S::SLOPES ? M : 1][WIDTH / 8][4] = {}; /* += dS Y1 */
  float sum2[S::VALUE_SUMS ? M : 1][VALUES / 8][4] = {};

  int h = head, last_head = BY_KEYS ? head + group - 1 : head, tile = low;
  unsigned y1 = ring; /* the stage that is worked on; the other one is filled meanwhile */
  bool more = low < high;
  if (more) request(y1, h, tile);
  commit_copies();
#pragma unroll 1
  while (more) {
    wait_copies<0>();
    __syncthreads();
    int start = tile * N;
    [[maybe_unused]] int this_head = h;
    if (++tile == high) tile = low, ++h;
    more = h <= last_head;
    unsigned other = 2 * ring + S::STAGE - y1, y2 = y1 + S::Y1;
    if (more) request(other, h, tile);
    commit_copies();
    const float *statistics = (const float *)(shared_memory + (y2 + S::Y2 - x1));

    float score[M][N / 8][4] = {}, slope[S::SLOPES ? M : 1][N / 8][4]; /* then P and dS */
    multiply_rows<T, WIDTH, M, N>(score, left_row, x1, right_row, y1);
    if constexpr (S::SLOPES) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
          float2 delta;
          if (BY_KEYS) delta = *(const float2 *)(statistics + N + n * 8 + quad * 2);
#pragma unroll
          for (int e = 0; e < 4; ++e)
            slope[m][n][e] = -(!BY_KEYS ? row_delta[m][e / 2] : e % 2 ? delta.y : delta.x);
        }
      multiply_rows<T, VALUES, M, N>(slope, left_value, x2, right_value, y2);
    }

    float cap_slope[S::EXTRAS && S::SLOPES ? M : 1][N / 8][4];
    if constexpr (S::EXTRAS) {
      const float *bias = (const float *)a.bias.data;
      score_terms terms =
          terms_of(p, this_head, bias ? bias + b * a.bias.sequence + this_head * a.bias.head : NULL,
                   BY_KEYS ? a.bias_key : a.bias.token, BY_KEYS ? a.bias.token : a.bias_key);
      finish_scores<S::SLOPES, M, N>(score, cap_slope, terms, first + row, used, start + quad * 2,
                                     others, shift);
    }
    if (start < all_from || start + N > all_to)
      hide<M, N>(score, first + row, start + quad * 2, others, shift, left, right);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
      for (int n = 0; n < N / 8; ++n) {
        float2 lse;
        if (BY_KEYS) lse = *(const float2 *)(statistics + n * 8 + quad * 2);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float base = !BY_KEYS ? row_lse[m][e / 2] : e % 2 ? lse.y : lse.x;
          score[m][n][e] = exponential(fmaf(score[m][n][e], S::EXTRAS ? 1 : p.scale, -base));
          if constexpr (S::SLOPES) slope[m][n][e] *= score[m][n][e];
        }
      }
    if constexpr (S::EXTRAS && S::SLOPES) {
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N / 8; ++n)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            int i = first + row + m * 16 + e / 2 * 8, j = start + n * 8 + quad * 2 + e % 2;
            if (!BY_KEYS && a.d_bias.data && i < s.queries && j < p.keys)
              ((float *)a.d_bias.data)[b * a.d_bias.sequence + head * a.d_bias.head +
                                       i * a.d_bias.token + j * a.d_bias_key] = slope[m][n][e];
            slope[m][n][e] *= cap_slope[m][n][e];
          }
    }

    if constexpr (S::VALUE_SUMS) {
      unsigned operands[M][N / 16][4];
      pack_operands<T, M, N>(operands, score);
      multiply_turned<T, VALUES, M, N>(sum2, operands, turned_value, y2);
    }
    if constexpr (S::SLOPES) {
      unsigned operands[M][N / 16][4];
      pack_operands<T, M, N>(operands, slope);
      multiply_turned<T, WIDTH, M, N>(sum1, operands, turned, y1);
    }
    y1 = other;
  }
  wait_copies<0>();

  if constexpr (S::SLOPES) {
    const token_rows &t = BY_KEYS ? a.d_k : a.d_q;
    if (t.data)
      store_rows<T, M, WIDTH>(rows_of(t, (BY_KEYS ? s.key_start : s.query_start) + first, row_head),
                              t.token, used - first, count, (int)p.dim, a.gradient_scale, sum1);
  }
  if constexpr (S::VALUE_SUMS)
    if (a.d_v.data)
      store_rows<T, M, VALUES>(rows_of(a.d_v, s.key_start + first, row_head), a.d_v.token,
                               used - first, count, (int)p.value_dim, 1, sum2);
}

/* Shapes by width. A warp has 32 rows where the sums leave the registers for them. */
template <bool EXTRAS, bool LARGE, int WIDTH, int VALUES> struct shapes {
  typedef backward_shape<KEYS_AND_VALUES, EXTRAS, false, WIDTH, VALUES, EXTRAS ? 1 : 2, 4, 32, 2>
      keys;
  typedef backward_shape<QUERIES, EXTRAS, false, WIDTH, VALUES, EXTRAS ? 1 : 2, 4, EXTRAS ? 32 : 64,
                         2>
      queries;
};
template <bool LARGE, int WIDTH, int VALUES> struct middle_shapes {
  typedef backward_shape<KEYS_AND_VALUES, false, LARGE, WIDTH, VALUES, 1, 4, LARGE ? 64 : 32, 2>
      keys;
  typedef backward_shape<QUERIES, false, LARGE, WIDTH, VALUES, LARGE ? 2 : 1, 4, 32, 2> queries;
};
template <bool LARGE> struct shapes<false, LARGE, 96, 96> : middle_shapes<LARGE, 96, 96> {};
template <bool LARGE> struct shapes<false, LARGE, 128, 128> : middle_shapes<LARGE, 128, 128> {};
template <bool EXTRAS, bool LARGE> struct shapes<EXTRAS, LARGE, 192, 128> {
  typedef backward_shape<KEYS_AND_VALUES, EXTRAS, false, 192, 128, 1, 4, 32, 2> keys;
  typedef backward_shape<QUERIES, EXTRAS, false, 192, 128, 1, 4, 32, 2> queries;
};
template <bool EXTRAS, bool LARGE> struct shapes<EXTRAS, LARGE, 256, 256> {
  enum { WARPS = LARGE ? 8 : 4, N = LARGE ? 32 : 16 };
  typedef backward_shape<KEYS_ALONE, EXTRAS, LARGE, 256, 256, 1, WARPS, N, 1> keys;
  typedef backward_shape<VALUES_ALONE, EXTRAS, LARGE, 256, 256, 1, 4, N, 2> values;
  typedef backward_shape<QUERIES, EXTRAS, LARGE, 256, 256, 1, WARPS, N, 1> queries;
};

bool large(const attn_cuda_device *device) {
  return device->major >= 9 &&
         device->shared_bytes >= (size_t)shapes<false, true, 256, 256>::keys::BYTES;
}
int64_t padded_of(const attn_softmax_problem *problem) {
  return ceil_divide(problem->query_length, PADDING) * PADDING;
}

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  const int bytes = (int)shapes<false, false, 256, 256>::keys::BYTES; /* no shape needs more */
  if (!offered(problem) || problem->paged || (size_t)bytes > device->shared_bytes) return false;
  widths w = widths_of(problem);
  choice->workspace_bytes =
      2 * sizeof(float) * (size_t)(problem->batch * problem->heads * padded_of(problem));
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
  int64_t heads = S::BY_KEYS ? a.p.kv_heads : a.p.heads;
  int64_t blocks = a.p.batch * heads * ceil_divide(S::BY_KEYS ? a.p.keys : a.p.queries, S::ROWS);
  if (blocks == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(gradient_kernel<T, S>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, (int)S::BYTES));
  gradient_kernel<T, S><<<(unsigned)blocks, S::THREADS, S::BYTES, stream>>>(a);
  ATTN_CUDA_TRY_LAUNCH("softmax_mma backward");
  return ATTN_OK;
}

template <typename T, bool EXTRAS, bool LARGE, int WIDTH, int VALUES>
attn_status run_shapes(const backward_parameters &a, cudaStream_t stream) {
  typedef shapes<EXTRAS, LARGE, WIDTH, VALUES> all;
  attn_status status = ATTN_OK;
  if constexpr (WIDTH == 256) {
    if (a.d_k.data) status = launch<T, typename all::keys>(a, stream);
    if (status == ATTN_OK && a.d_v.data) status = launch<T, typename all::values>(a, stream);
  } else if (a.d_k.data || a.d_v.data) {
    status = launch<T, typename all::keys>(a, stream);
  }
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
  int64_t rows = a.p.batch * a.p.heads * a.padded;
  if (rows) {
    prepare_kernel<T>
        <<<(unsigned)ceil_divide(rows * LANES, PREPARE_THREADS), PREPARE_THREADS, 0, stream>>>(a);
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
