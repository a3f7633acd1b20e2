/* Softmax forward in bfloat16 and float16 by mma.m16n8k16, for every problem with dimensions up to
 * 256 that are multiples of 8: what runs where there are no wgmma instructions, or where the
 * kernels made of them refuse (FlashAttention-2, arXiv 2307.08691, algorithm 1).
 *
 * A block has 64 queries of a head, a warp 16 of them. Keys and values go through two stages in
 * shared memory, filled by cp.async while the other is worked on; scores and weights stay in
 * registers. Dimensions are filled up to 64, 128 or 256 with zeros. */
#include "kernels/cuda/decode.cuh"

namespace {

enum { QUERIES = 64, THREADS = 128, STAGES = 2 };

template <int WIDTH> struct layout {
  enum {
    KEYS = WIDTH == 256 ? 32 : 64, /* of a stage */
    CHUNKS = WIDTH / 8,            /* of 16 bytes in a row */
    STAGE = 2 * KEYS * CHUNKS,     /* chunks of keys and values */
    BYTES = (QUERIES * CHUNKS + STAGES * STAGE) * 16,
  };
};

/* Where a chunk of a row lies: 8 rows of one chunk meet 8 different groups of banks. */
template <int WIDTH> __device__ __forceinline__ int place(int row, int chunk) {
  return row * (WIDTH / 8) + (chunk ^ row % 8);
}

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void load_matrices(unsigned (&x)[4], const uint4 *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
}
__device__ __forceinline__ void load_turned_matrices(unsigned (&x)[4], const uint4 *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
}

extern __shared__ __align__(16) char shared_memory[];

/* Rows first .. first + count - 1 of keys or values, zeros beyond `end` and `width`. */
template <typename T, int WIDTH>
__device__ __forceinline__ void request(const parameters &p, uint4 *to, const T *from,
                                        int64_t token, int64_t page_stride, const int32_t *pages,
                                        int64_t first, int64_t end, int width) {
  const int chunks = layout<WIDTH>::CHUNKS;
#pragma unroll
  for (int i = 0; i < layout<WIDTH>::KEYS * chunks / THREADS; ++i) {
    int index = i * THREADS + threadIdx.x, r = index / chunks, chunk = index % chunks;
    bool there = first + r < end && chunk * 8 < width;
    int64_t at = 0;
    if (there && pages) {
      unsigned page = (unsigned)(first + r) / p.page_size;
      at = pages[page] * page_stride + ((unsigned)(first + r) - page * p.page_size) * token;
    } else if (there) {
      at = (first + r) * token;
    }
    copy_async(to + place<WIDTH>(r, chunk), there ? from + at + chunk * 8 : from, there);
  }
}

/* Block: [sequence][head][tile of queries, last first]. */
template <typename T, int WIDTH>
__global__ void __launch_bounds__(THREADS, 2)
    mma_kernel(parameters p, token_rows bias, int64_t bias_key) {
  typedef layout<WIDTH> l;
  enum { KEYS = l::KEYS };
  int64_t tiles = (p.queries + QUERIES - 1) / QUERIES, index = blockIdx.x;
  int64_t first = (tiles - 1 - index % tiles) * QUERIES;
  int64_t head = index / tiles % p.heads, b = index / tiles / p.heads;
  sequence s = find_sequence(p, b);
  if (first >= s.queries) return;
  int64_t end = min(first + QUERIES, s.queries), kv_head = head / p.group;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, quad = lane % 4;
  uint4 *queries = (uint4 *)shared_memory, *ring = queries + QUERIES * l::CHUNKS;

  const T *q = (const T *)p.q.data + b * p.q.sequence + s.query_start * p.q.token + head * p.q.head;
  const T *k = (const T *)p.k.data + kv_head * p.k.head;
  const T *v = (const T *)p.v.data + kv_head * p.v.head;
  const int32_t *pages = p.pages ? p.pages + b * p.pages_sequence : NULL;
  if (!pages) {
    k += b * p.k.sequence + s.key_start * p.k.token;
    v += b * p.v.sequence + s.key_start * p.v.token;
  }
  for (int i = threadIdx.x; i < QUERIES * l::CHUNKS; i += THREADS) {
    int r = i / l::CHUNKS, chunk = i % l::CHUNKS;
    bool there = first + r < end && chunk * 8 < p.dim;
    copy_async(queries + place<WIDTH>(r, chunk),
               there ? q + (first + r) * p.q.token + chunk * 8 : q, there);
  }

  /* The thread's rows are `row` and `row` + 8 of the tile. */
  int row = warp * 16 + lane / 4;
  int from_key[2], to_key[2], position[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int64_t i = first + row + half * 8;
    key_range seen = i < end ? visible(p, s, i) : key_range{0, 0};
    from_key[half] = (int)min(seen.first, s.keys), to_key[half] = (int)max(seen.end, (int64_t)0);
    position[half] = (int)(i + s.keys - s.queries);
  }
  int all_from = (int)min(visible(p, s, end - 1).first, s.keys); /* what all queries see */
  int all_to = (int)max(visible(p, s, first).end, (int64_t)0);
  if (end < first + QUERIES) all_to = 0;
  key_range range = {visible(p, s, first).first / KEYS * KEYS, visible(p, s, end - 1).end};
  float slope = p.alibi_slopes ? p.alibi_slopes[head] * LOG2_E : 0;
  bool plain = p.soft_cap == 0 && !p.alibi_slopes && !bias.data;

  auto request_stage = [&](int stage, int64_t key) {
    uint4 *keys = ring + stage * l::STAGE;
    if (key < range.end) {
      request<T, WIDTH>(p, keys, k, p.k.token, p.page_k, pages, key, s.keys, (int)p.dim);
      request<T, WIDTH>(p, keys + KEYS * l::CHUNKS, v, p.v.token, p.page_v, pages, key, s.keys,
                        (int)p.value_dim);
    }
    commit_copies();
  };
  float o[WIDTH / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  int stage = 0;
  request_stage(0, range.first);
  for (int64_t key = range.first; key < range.end; key += KEYS) {
    wait_copies<0>();
    __syncthreads();
    request_stage(stage ^ 1, key + KEYS);
    const uint4 *keys = ring + stage * l::STAGE, *values = keys + KEYS * l::CHUNKS;

    float score[KEYS / 8][4] = {};
#pragma unroll
    for (int step = 0; step < WIDTH / 16; ++step) {
      unsigned a[4];
      load_matrices(a, queries + place<WIDTH>(warp * 16 + lane % 16, step * 2 + lane / 16));
#pragma unroll
      for (int n = 0; n < KEYS / 16; ++n) {
        unsigned x[4]; /* keys n 16 + 0 .. 7 and + 8 .. 15, each by two chunks */
        load_matrices(
            x, keys + place<WIDTH>(n * 16 + lane / 16 * 8 + lane % 8, step * 2 + lane / 8 % 2));
        multiply<T>(score[n * 2], a[0], a[1], a[2], a[3], x[0], x[1]);
        multiply<T>(score[n * 2 + 1], a[0], a[1], a[2], a[3], x[2], x[3]);
      }
    }
    bool all = key >= all_from && key + KEYS <= all_to;
    float top[2] = {maximum[0], maximum[1]};
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int half = e / 2, j = (int)key + n * 8 + quad * 2 + e % 2;
        float x = score[n][e] * p.scale;
        bool seen = all || (j >= from_key[half] && j < to_key[half]);
        if (!plain) {
          if (p.soft_cap != 0) x = p.soft_cap * tanhf(x / p.soft_cap) * LOG2_E;
          if (bias.data && seen)
            x += LOG2_E *
                 ((const float *)bias.data)[b * bias.sequence + head * bias.head +
                                            (first + row + half * 8) * bias.token + j * bias_key];
          x -= slope * fabsf((float)(position[half] - j));
        }
        score[n][e] = seen ? x : -INFINITY;
        top[half] = fmaxf(top[half], score[n][e]);
      }
    float base[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
      base[half] = top[half] == -INFINITY ? 0 : top[half];
      float factor = exponential(maximum[half] - base[half]);
      sum[half] *= factor, maximum[half] = top[half];
#pragma unroll
      for (int n = 0; n < WIDTH / 8; ++n) o[n][half * 2] *= factor, o[n][half * 2 + 1] *= factor;
    }
#pragma unroll
    for (int n = 0; n < KEYS / 8; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[n][e] = exponential(score[n][e] - base[e / 2]);
        sum[e / 2] += score[n][e];
      }
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      const float(&low)[4] = score[step * 2], (&high)[4] = score[step * 2 + 1];
      unsigned w[4] = {pack<T>(low[0], low[1]), pack<T>(low[2], low[3]), pack<T>(high[0], high[1]),
                       pack<T>(high[2], high[3])};
#pragma unroll
      for (int n = 0; n < WIDTH / 16; ++n) {
        unsigned x[4]; /* columns n 16 + 0 .. 7 and + 8 .. 15, each of 16 keys */
        load_turned_matrices(x, values + place<WIDTH>(step * 16 + lane % 16, n * 2 + lane / 16));
        multiply<T>(o[n * 2], w[0], w[1], w[2], w[3], x[0], x[1]);
        multiply<T>(o[n * 2 + 1], w[0], w[1], w[2], w[3], x[2], x[3]);
      }
    }
    stage ^= 1;
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
    sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    int64_t i = first + row + half * 8;
    if (i >= end) continue;
    float weight = 0, log_sum = -INFINITY;
    if (maximum[half] != -INFINITY) {
      float sink = p.sinks ? p.sinks[head] * LOG2_E : -INFINITY;
      float highest = fmaxf(maximum[half], sink), own = exponential(maximum[half] - highest);
      float total = sum[half] * own + exponential(sink - highest);
      weight = own / total;
      log_sum = (highest + log2f(total)) * LN_2;
    }
    T *to = (T *)p.o.data + b * p.o.sequence + (s.query_start + i) * p.o.token + head * p.o.head;
#pragma unroll
    for (int n = 0; n < WIDTH / 8; ++n)
      if (n * 8 < p.value_dim)
        *(unsigned *)(to + n * 8 + quad * 2) =
            pack<T>(o[n][half * 2] * weight, o[n][half * 2 + 1] * weight);
    if (p.lse.data && quad == 0)
      ((float *)
           p.lse.data)[b * p.lse.sequence + (s.query_start + i) * p.lse.token + head * p.lse.head] =
          log_sum;
  }
}

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  int64_t width = problem->dim > problem->value_dim ? problem->dim : problem->value_dim;
  if ((problem->dtype != ATTN_BF16 && problem->dtype != ATTN_F16) || width > 256 ||
      problem->dim % 8 || problem->value_dim % 8 || problem->key_length > INT32_MAX ||
      (size_t)layout<256>::BYTES > device->shared_bytes)
    return false;
  snprintf(choice->description, sizeof choice->description,
           "mma.sync: tiles of %d queries, dimensions filled up to %d", QUERIES,
           width <= 64    ? 64
           : width <= 128 ? 128
                          : 256);
  return true;
}

bool suits(const attn_softmax_problem *, const attn_softmax_args *args) {
  return aligned(args->q, 8) && aligned(args->k, 8) && aligned(args->v, 8) && aligned(args->o, 2);
}

template <typename T, int WIDTH>
attn_status launch(const parameters &p, const token_rows &bias, int64_t bias_key,
                   cudaStream_t stream) {
  int64_t blocks = p.batch * p.heads * ceil_divide(p.queries, QUERIES);
  if (blocks == 0) return ATTN_OK;
  const int bytes = layout<WIDTH>::BYTES;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(mma_kernel<T, WIDTH>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  mma_kernel<T, WIDTH><<<(unsigned)blocks, THREADS, bytes, stream>>>(p, bias, bias_key);
  ATTN_CUDA_TRY_LAUNCH("softmax_mma");
  return ATTN_OK;
}

attn_status run(const attn_cuda_device *, const attn_cuda_choice *,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *,
                cudaStream_t stream) {
  parameters p = parameters_of(problem, args, 1, 0, 0, NULL);
  token_rows bias = problem->bias ? over_heads(args->bias, false) : token_rows{};
  int64_t bias_key = problem->bias ? args->bias.stride[3] : 0;
  int64_t width = p.dim > p.value_dim ? p.dim : p.value_dim;
  bool half = problem->dtype == ATTN_F16;
  auto each = width <= 64    ? (half ? launch<__half, 64> : launch<__nv_bfloat16, 64>)
              : width <= 128 ? (half ? launch<__half, 128> : launch<__nv_bfloat16, 128>)
                             : (half ? launch<__half, 256> : launch<__nv_bfloat16, 256>);
  return each(p, bias, bias_key, stream);
}

} // namespace

extern const softmax_algorithm softmax_mma_forward = {"mma", ATTN_PASS_FORWARD, plan, suits, run};
