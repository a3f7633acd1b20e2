/* Few queries against many keys for what softmax_decode.cu refuses: float32, other dimensions up to
 * 256, a bias. Ordinary multiply-adds, and every key and value read once for 8 rows (query, head)
 * of a key head.
 *
 * A warp takes 4 keys at a time, straight from memory into registers, a thread 4 neighbouring
 * elements of each 128. The 4 x 8 sums over the lanes are made by halving: in each of 5 exchanges a
 * thread gives away half of its sums and adds up the other half, so that lane l ends with the score
 * of key l / 8 and row l % 8. The keys are split among blocks as in softmax_decode.cu. */
#include "kernels/cuda/decode.cuh"

namespace {

enum {
  ROWS = 8, /* of a tile */
  KEYS = 4, /* of a warp's step */
  WARPS = 4,
  BLOCKS = 3,     /* of a multiprocessor */
  MOST_ROWS = 64, /* beyond, tiles read the same keys too often */
  MOST_WIDTH = 256,
  SPLIT_KEYS = 64, /* a split is not worth less */
};

/* Four neighbours as float32. */
__device__ __forceinline__ float4 load4(const float *from) {
  return *(const float4 *)from;
}
__device__ __forceinline__ float4 load4(const __nv_bfloat16 *from) {
  uint2 x = *(const uint2 *)from;
  return make_float4(__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000u),
                     __uint_as_float(x.y << 16), __uint_as_float(x.y & 0xffff0000u));
}
__device__ __forceinline__ float4 load4(const __half *from) {
  uint2 x = *(const uint2 *)from;
  float2 low = __half22float2(*(__half2 *)&x.x), high = __half22float2(*(__half2 *)&x.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

/* With HALF = 16: sums[0] of lane l becomes the sum over all lanes of sums[l]. */
template <int HALF> __device__ __forceinline__ void sum_transposed(float (&sums)[32], int lane) {
  bool upper = lane & HALF;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    float given = upper ? sums[i] : sums[i + HALF], kept = upper ? sums[i + HALF] : sums[i];
    sums[i] = kept + __shfl_xor_sync(~0u, given, HALF);
  }
  if constexpr (HALF > 1) sum_transposed<HALF / 2>(sums, lane);
}

/* Block: [sequence][key head][tile of rows][split]. CHUNKS: of 128 elements in a row. */
template <typename T, int CHUNKS>
__global__ void __launch_bounds__(32 * WARPS, CHUNKS == 1 ? BLOCKS : 2)
    few_kernel(parameters p, token_rows bias, int64_t bias_key) {
  __shared__ __align__(16) float results[WARPS][ROWS][CHUNKS * 128];
  __shared__ float statistics[WARPS][ROWS][2];
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t index = blockIdx.x, split = index % p.splits, tile = index / p.splits % p.tiles;
  int64_t kv_head = index / p.splits / p.tiles % p.kv_heads;
  int64_t b = index / p.splits / p.tiles / p.kv_heads;
  sequence s = find_sequence(p, b);
  int64_t first_row = tile * ROWS;
  int64_t rows = min((int64_t)ROWS, s.queries * p.group - first_row);
  key_range range = {0, 0};
  if (rows > 0) {
    range.first = visible(p, s, first_row / p.group).first;
    range.end = visible(p, s, (first_row + rows - 1) / p.group).end;
  }
  int64_t share = max(range.end - range.first, (int64_t)0);
  share = (share + p.splits * WARPS * KEYS - 1) / (p.splits * WARPS * KEYS) * WARPS * KEYS;
  range.first += split * share;
  range.end = min(range.end, range.first + share);

  const float4 zero = make_float4(0, 0, 0, 0);
  float4 q[ROWS][CHUNKS], o[ROWS][CHUNKS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      int64_t query = (first_row + r) / p.group;
      int64_t head = kv_head * p.group + (first_row + r) % p.group;
      int column = c * 128 + lane * 4;
      q[r][c] = r < rows && column < p.dim
                    ? load4((const T *)p.q.data + b * p.q.sequence +
                            (s.query_start + query) * p.q.token + head * p.q.head + column)
                    : zero;
      o[r][c] = zero;
    }
  /* The lane's own row for scores. */
  int own = lane % ROWS;
  int64_t own_query = (first_row + own) / p.group;
  int64_t own_head = kv_head * p.group + (first_row + own) % p.group;
  key_range seen = own < rows ? visible(p, s, own_query) : key_range{0, 0};
  int64_t position = own_query + s.keys - s.queries;
  float slope = own < rows && p.alibi_slopes ? p.alibi_slopes[own_head] : 0;
  const float *bias_row = (const float *)bias.data;
  if (bias_row) bias_row += b * bias.sequence + own_head * bias.head + own_query * bias.token;

  const int32_t *pages = p.pages ? p.pages + b * p.pages_sequence : NULL;
  const T *k = (const T *)p.k.data + kv_head * p.k.head;
  const T *v = (const T *)p.v.data + kv_head * p.v.head;
  if (!pages) {
    k += b * p.k.sequence + s.key_start * p.k.token;
    v += b * p.v.sequence + s.key_start * p.v.token;
  }
  float maximum = -INFINITY, sum = 0; /* of the lane's row, base 2; the sum of the lane's keys */
  for (int64_t key = range.first + warp * KEYS; key < range.end; key += WARPS * KEYS) {
    float4 keys[KEYS][CHUNKS], values[KEYS][CHUNKS];
#pragma unroll
    for (int i = 0; i < KEYS; ++i) {
      bool there = key + i < range.end;
      int64_t from_k = (key + i) * p.k.token, from_v = (key + i) * p.v.token;
      if (pages && there) {
        unsigned page = (unsigned)(key + i) / p.page_size;
        unsigned token = (unsigned)(key + i) - page * p.page_size;
        from_k = pages[page] * p.page_k + token * p.k.token;
        from_v = pages[page] * p.page_v + token * p.v.token;
      }
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        int column = c * 128 + lane * 4;
        keys[i][c] = there && column < p.dim ? load4(k + from_k + column) : zero;
        values[i][c] = there && column < p.value_dim ? load4(v + from_v + column) : zero;
      }
    }
    float sums[KEYS * ROWS];
#pragma unroll
    for (int i = 0; i < KEYS; ++i)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float x = 0;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
          x += q[r][c].x * keys[i][c].x + q[r][c].y * keys[i][c].y + q[r][c].z * keys[i][c].z +
               q[r][c].w * keys[i][c].w;
        sums[i * ROWS + r] = x;
      }
    sum_transposed<16>(sums, lane);
    float score = sums[0] * p.scale;
    int64_t j = key + lane / ROWS;
    bool visible_here = j >= seen.first && j < min(seen.end, range.end);
    if (p.soft_cap != 0) score = p.soft_cap * tanhf(score / p.soft_cap) * LOG2_E;
    if (bias_row && visible_here) score += bias_row[j * bias_key] * LOG2_E;
    if (p.alibi_slopes) score -= slope * fabsf((float)(position - j)) * LOG2_E;
    if (!visible_here) score = -INFINITY;
    float top = fmaxf(score, __shfl_xor_sync(~0u, score, 8));
    top = fmaxf(maximum, fmaxf(top, __shfl_xor_sync(~0u, top, 16)));
    float base = top == -INFINITY ? 0 : top, factor = exp2f(maximum - base);
    float weight = exp2f(score - base);
    sum = sum * factor + weight;
    if (__any_sync(~0u, top != maximum))
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float f = __shfl_sync(~0u, factor, r);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
          o[r][c].x *= f, o[r][c].y *= f, o[r][c].z *= f, o[r][c].w *= f;
      }
    maximum = top;
#pragma unroll
    for (int i = 0; i < KEYS; ++i)
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float w = __shfl_sync(~0u, weight, i * ROWS + r);
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
          o[r][c].x += w * values[i][c].x, o[r][c].y += w * values[i][c].y;
          o[r][c].z += w * values[i][c].z, o[r][c].w += w * values[i][c].w;
        }
      }
  }

  sum += __shfl_xor_sync(~0u, sum, 8);
  sum += __shfl_xor_sync(~0u, sum, 16);
  if (lane < ROWS) statistics[warp][lane][0] = maximum, statistics[warp][lane][1] = sum;
#pragma unroll
  for (int r = 0; r < ROWS; ++r)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) *(float4 *)&results[warp][r][c * 128 + lane * 4] = o[r][c];
  __syncthreads();
  for (int i = threadIdx.x; i < rows * CHUNKS * 128; i += 32 * WARPS) {
    int r = i / (CHUNKS * 128), c = i % (CHUNKS * 128);
    if (c >= p.value_dim) continue;
    float top = -INFINITY, total = 0, x = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = fmaxf(top, statistics[w][r][0]);
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      float weight = top == -INFINITY ? 0 : exp2f(statistics[w][r][0] - top);
      total += weight * statistics[w][r][1];
      x += weight * results[w][r][c];
    }
    int64_t query = (first_row + r) / p.group, head = kv_head * p.group + (first_row + r) % p.group;
    store_result(p, s, b, query, head, index * ROWS + r, c, x, top, total);
  }
}

/* choice->values */
enum { SPLITS = 0 };

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  int64_t tiles = tiles_of(problem, ROWS);
  int64_t units = problem->batch * problem->kv_heads * tiles;
  int64_t width = problem->dim > problem->value_dim ? problem->dim : problem->value_dim;
  if ((problem->dtype != ATTN_F32 && problem->dtype != ATTN_BF16 && problem->dtype != ATTN_F16) ||
      width > MOST_WIDTH || problem->dim % 4 || problem->list_keys || problem->value_dim % 4 ||
      problem->query_length > MOST_QUERIES || tiles * ROWS > MOST_ROWS ||
      problem->key_length > INT32_MAX || units == 0)
    return false;
  int64_t blocks = width <= 128 ? BLOCKS : 2;
  int64_t splits =
      choose_splits(units, device->multiprocessors * blocks, problem->key_length, SPLIT_KEYS);
  choice->values[SPLITS] = splits;
  if (splits > 1)
    choice->workspace_bytes =
        (size_t)(units * splits * ROWS * (problem->value_dim + 2)) * sizeof(float);
  snprintf(choice->description, sizeof choice->description,
           "few queries: %lld splits of the keys, ordinary multiply-adds", (long long)splits);
  return true;
}

bool suits(const attn_softmax_problem *, const attn_softmax_args *args) {
  return aligned(args->q, 4) && aligned(args->k, 4) && aligned(args->v, 4);
}

template <typename T, int CHUNKS>
attn_status launch(const parameters &p, const token_rows &bias, int64_t bias_key,
                   cudaStream_t stream) {
  int64_t units = p.batch * p.kv_heads * p.tiles;
  few_kernel<T, CHUNKS><<<(unsigned)(units * p.splits), 32 * WARPS, 0, stream>>>(p, bias, bias_key);
  ATTN_CUDA_TRY_LAUNCH("softmax_few");
  return merge<ROWS, CHUNKS * 128>(p, stream);
}

attn_status run(const attn_cuda_device *, const attn_cuda_choice *choice,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *workspace,
                cudaStream_t stream) {
  parameters p = parameters_of(problem, args, choice->values[SPLITS], tiles_of(problem, ROWS), ROWS,
                               workspace);
  token_rows bias = problem->bias ? over_heads(args->bias, false) : token_rows{};
  int64_t bias_key = problem->bias ? args->bias.stride[3] : 0;
  bool wide = p.dim > 128 || p.value_dim > 128;
  auto each = problem->dtype == ATTN_F32 ? (wide ? launch<float, 2> : launch<float, 1>)
              : problem->dtype == ATTN_F16
                  ? (wide ? launch<__half, 2> : launch<__half, 1>)
                  : (wide ? launch<__nv_bfloat16, 2> : launch<__nv_bfloat16, 1>);
  return each(p, bias, bias_key, stream);
}

} // namespace

extern const softmax_algorithm softmax_few = {"few", ATTN_PASS_FORWARD, plan, suits, run};
