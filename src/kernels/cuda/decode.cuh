/* What the algorithms for few queries against many keys share (softmax_decode.cu,
 * softmax_latent.cu, softmax_few.cu): how rows (query, head) of a key head make tiles, what they
 * see, products and copies of 16-bit elements, and the merge of the parts that the keys are split
 * into.
 */
#ifndef ATTN_KERNELS_CUDA_DECODE_CUH
#define ATTN_KERNELS_CUDA_DECODE_CUH

#include "kernels/cuda/block_list.cuh"
#include "kernels/cuda/elements.cuh"

#include <cmath>
#include <cstdio>
#include <type_traits>

namespace {

enum {

  MOST_QUERIES = 8,
  MERGE_THREADS = 128,
  MOST_MERGED = 64, /* splits of a unit that its last block merges */
};

/* Strides in elements. */
struct token_rows {
  char *data;
  attn_dtype dtype;
  int64_t sequence, token, head;
};

struct parameters {
  int64_t batch, queries, keys; /* of each sequence, or the longest */
  int64_t heads, kv_heads, group, tiles, splits, dim, value_dim;
  float scale, soft_cap; /* scale includes log2(e) where there is no cap */
  bool causal;
  int64_t window_left, window_right;
  const int32_t *query_offsets, *key_offsets, *key_lengths, *pages;
  int64_t pages_sequence, page_k, page_v;
  unsigned page_size;
  token_rows q, k, v, o, lse;
  const float *alibi_slopes, *sinks;
  float *partial_o; /* [sequence][key head][tile][split][ROWS][width] */
  float *partial;   /* the same with [ROWS][2]: maximum (base 2) and sum */
  /* [sequence][key head][tile][split], of merge_if_last; NULL: a kernel merges */
  unsigned long long *finished;
  block_list list; /* of the kernels that tile queries */
};

const float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;

struct sequence {
  int64_t query_start, key_start, queries, keys;
};

__device__ sequence find_sequence(const parameters &p, int64_t b) {
  sequence s = {0, 0, p.queries, p.keys};
  if (p.query_offsets) {
    s.query_start = p.query_offsets[b];
    s.queries = p.query_offsets[b + 1] - s.query_start;
    s.key_start = p.key_offsets[b];
    s.keys = p.key_offsets[b + 1] - s.key_start;
  }
  if (p.key_lengths) s.keys = p.key_lengths[b];
  return s;
}

struct key_range {
  int64_t first, end;
};

__device__ key_range visible(const parameters &p, const sequence &s, int64_t i) {
  int64_t at = i + s.keys - s.queries;
  key_range range = {0, s.keys};
  if (p.window_left >= 0) range.first = max(range.first, at - p.window_left);
  if (p.causal) range.end = min(range.end, at + 1);
  if (p.window_right >= 0) range.end = min(range.end, at + p.window_right + 1);
  return range;
}

__device__ __forceinline__ float exponential(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* c[16 x 8] += a[16 x 16] b[16 x 8] */
template <typename T>
__device__ __forceinline__ void multiply(float (&c)[4], unsigned a0, unsigned a1, unsigned a2,
                                         unsigned a3, unsigned b0, unsigned b1) {
  if constexpr (std::is_same<T, __half>::value)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename T> __device__ __forceinline__ unsigned pack(float low, float high) {
  if constexpr (std::is_same<T, __half>::value) {
    __half2 x = __floats2half2_rn(low, high);
    return *(unsigned *)&x;
  } else {
    __nv_bfloat162 x = __floats2bfloat162_rn(low, high);
    return *(unsigned *)&x;
  }
}

/* 16 bytes to shared memory, zeros when !there. */
__device__ __forceinline__ void copy_async(void *to, const void *from, bool there) {
  asm volatile(
      "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((unsigned)__cvta_generic_to_shared(to)),
      "l"(from), "r"(there ? 16 : 0)
      : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

/* Column c of a row's result: x and `total` are sums of weights 2^(score - top). Into o and lse, or
 * where the keys are split into row `part` of the partial results. The sink of the head takes part
 * when all keys are there. */
__device__ __forceinline__ void store_result(const parameters &p, const sequence &s, int64_t b,
                                             int64_t query, int64_t head, int64_t part, int64_t c,
                                             float x, float top, float total) {
  if (p.splits > 1) {
    p.partial_o[part * p.value_dim + c] = x;
    if (c == 0) p.partial[part * 2] = top, p.partial[part * 2 + 1] = total;
    return;
  }
  bool any = top != -INFINITY;
  if (any && p.sinks) {
    float sink = p.sinks[head] * LOG2_E, higher = fmaxf(top, sink);
    float own = exponential(top - higher);
    total = total * own + exponential(sink - higher);
    x *= own, top = higher;
  }
  int64_t token = s.query_start + query;
  store_element<float>(p.o.data, p.o.dtype,
                       b * p.o.sequence + token * p.o.token + head * p.o.head + c,
                       any ? x / total : 0);
  if (p.lse.data && c == 0)
    ((float *)p.lse.data)[b * p.lse.sequence + token * p.lse.token + head * p.lse.head] =
        any ? (top + log2f(total)) * LN_2 : -INFINITY;
}

/* A block for each (sequence, key head, tile, row): the splits' results in a fixed order, every
 * fourth by a warp. WIDTH: at least value_dim, a multiple of 128. */
template <int ROWS, int WIDTH>
__global__ void __launch_bounds__(MERGE_THREADS) merge_kernel(parameters p) {
  enum { WARPS = MERGE_THREADS / 32 };
  __shared__ __align__(16) float results[WARPS][WIDTH];
  __shared__ float tops[WARPS], totals[WARPS];
  int64_t index = blockIdx.x, r = index % ROWS, unit = index / ROWS, tile = unit % p.tiles;
  int64_t kv_head = unit / p.tiles % p.kv_heads, b = unit / p.tiles / p.kv_heads;
  int64_t splits = p.splits;
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  sequence s = find_sequence(p, b);
  int64_t row = tile * ROWS + r, query = row / p.group, head = kv_head * p.group + row % p.group;
  if (query >= s.queries) return;
  auto place = [&](int64_t split) { return (unit * splits + split) * ROWS + r; };
  float top = -INFINITY, total = 0;
  for (int64_t split = threadIdx.x; split < splits; split += MERGE_THREADS)
    top = fmaxf(top, p.partial[place(split) * 2]);
#pragma unroll
  for (int mask = 16; mask; mask /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, mask));
  if (lane == 0) tops[warp] = top;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w]);
  float4 o[WIDTH / 128];
#pragma unroll
  for (int c = 0; c < WIDTH / 128; ++c) o[c] = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int64_t split = warp; split < splits; split += WARPS) {
    float2 part = *(const float2 *)(p.partial + place(split) * 2);
    float weight = top == -INFINITY ? 0 : exponential(part.x - top);
    total += weight * part.y;
#pragma unroll
    for (int c = 0; c < WIDTH / 128; ++c)
      if (c * 128 + lane * 4 < p.value_dim) {
        float4 x = *(const float4 *)(p.partial_o + place(split) * p.value_dim + c * 128 + lane * 4);
        o[c].x += weight * x.x, o[c].y += weight * x.y;
        o[c].z += weight * x.z, o[c].w += weight * x.w;
      }
  }
  if (lane == 0) totals[warp] = total;
#pragma unroll
  for (int c = 0; c < WIDTH / 128; ++c) *(float4 *)&results[warp][c * 128 + lane * 4] = o[c];
  __syncthreads();
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) total += totals[w];
  p.splits = 1; /* from here on it is as if they had not been split */
  for (int c = threadIdx.x; c < p.value_dim; c += MERGE_THREADS) {
    float x = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) x += results[w][c];
    store_result(p, s, b, query, head, 0, c, x, top, total);
  }
}

/* What a block of the unit (sequence, key head, tile) writes when its part is there. The workspace
 * holds anything when a call begins, so a word may not have this value by chance: 2^-64. */
const unsigned long long FINISHED = 0x9b6c3f58d1e7a425ull;

/* The end of a block whose part of a unit is written: whoever finds the parts of all splits there
 * merges them, in the order of the splits. Each block announces its part before it looks for the
 * others', so the last one finds them all; should two find them, both write the same. The words are
 * cleared behind it: a block that looks later finds too few, rightly, and none are left for the
 * next call. Splits: up to MOST_MERGED, as one block reads all their parts. */
template <int ROWS, int WIDTH, int THREADS>
__device__ __forceinline__ void merge_if_last(parameters p, const sequence &s, int b, int kv_head,
                                              int first_row, int rows, int64_t unit, int split) {
  enum { BATCH = WIDTH > 128 ? 8 : 16 }; /* parts read at once */
  const int splits = (int)p.splits;
  unsigned long long *finished = p.finished + unit * splits;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    atomicExch(finished + split, FINISHED);
    __threadfence();
  }
  __syncthreads();
  bool all = true;
  for (int i = threadIdx.x; i < splits; i += THREADS)
    all = all && *(const volatile unsigned long long *)(finished + i) == FINISHED;
  if (!__syncthreads_and(all)) return;
  __threadfence();
  for (int i = threadIdx.x; i < splits; i += THREADS) finished[i] = 0;

  const float2 *statistics = (const float2 *)p.partial + unit * splits * ROWS;
  const float4 *results = (const float4 *)p.partial_o + unit * splits * ROWS * (WIDTH / 4);
  p.splits = 1; /* from here on it is as if they had not been split */
  for (int i = threadIdx.x; i < rows * (WIDTH / 4); i += THREADS) {
    int r = i / (WIDTH / 4), c = i % (WIDTH / 4) * 4;
    float top = -INFINITY, total = 0, x[4] = {};
    for (int first = 0; first < splits; first += BATCH) {
      float2 part[BATCH];
      float4 o[BATCH];
      float before = top;
#pragma unroll
      for (int n = 0; n < BATCH; ++n) {
        bool there = first + n < splits;
        int row = (first + n) * ROWS + r;
        part[n] = there ? __ldcg(statistics + row) : make_float2(-INFINITY, 0);
        o[n] = there ? __ldcg(results + row * (WIDTH / 4) + c / 4) : make_float4(0, 0, 0, 0);
      }
#pragma unroll
      for (int n = 0; n < BATCH; ++n) top = fmaxf(top, part[n].x);
      float base = top == -INFINITY ? 0 : top, factor = exponential(before - base);
      total *= factor, x[0] *= factor, x[1] *= factor, x[2] *= factor, x[3] *= factor;
#pragma unroll
      for (int n = 0; n < BATCH; ++n) {
        float weight = exponential(part[n].x - base);
        total += weight * part[n].y;
        x[0] += weight * o[n].x, x[1] += weight * o[n].y;
        x[2] += weight * o[n].z, x[3] += weight * o[n].w;
      }
    }
    int query = (first_row + r) / (int)p.group;
    int head = kv_head * (int)p.group + (first_row + r) % (int)p.group;
#pragma unroll
    for (int e = 0; e < 4; ++e) store_result(p, s, b, query, head, 0, c + e, x[e], top, total);
  }
}

template <int ROWS, int WIDTH> attn_status merge(const parameters &p, cudaStream_t stream) {
  if (p.splits == 1) return ATTN_OK;
  int64_t rows = p.batch * p.kv_heads * p.tiles * ROWS;
  merge_kernel<ROWS, WIDTH><<<(unsigned)rows, MERGE_THREADS, 0, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("softmax merge");
  return ATTN_OK;
}

/* Tiles of `rows` rows. */
inline int64_t tiles_of(const attn_softmax_problem *problem, int64_t rows) {
  return ceil_divide(problem->query_length * (problem->heads / problem->kv_heads), rows);
}

/* The number of splits, of at least `least` keys, that leaves the fewest multiprocessors idle,
 * weighed over whole waves. */
inline int64_t choose_splits(int64_t units, int64_t places, int64_t keys, int64_t least) {
  int64_t most = keys / least < 1 ? 1 : keys / least, best = 1;
  double best_use = 0;
  for (int64_t splits = 1; splits <= most; ++splits) {
    int64_t blocks = units * splits;
    double use = (double)blocks / (double)(ceil_divide(blocks, places) * places);
    /* More splits only for a gain that pays for merging them. */
    if (use > best_use * 1.03) best = splits, best_use = use;
    if (blocks > 4 * places) break;
  }
  return best;
}

/* Whether rows can be read `elements` at a time. */
inline bool aligned(const attn_tensor &t, int64_t elements) {
  size_t bytes = (size_t)elements * (t.dtype == ATTN_F32 ? 4 : 2);
  bool fits = (uintptr_t)t.data % bytes == 0;
  for (int i = 0; i < t.rank - 1; ++i)
    fits = fits && (t.stride[i] % elements == 0 || t.shape[i] <= 1);
  return fits;
}
inline token_rows over_tokens(const attn_tensor &t, bool packed) {
  if (packed) return {(char *)t.data, t.dtype, 0, t.stride[0], t.stride[1]};
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2]};
}
inline token_rows over_heads(const attn_tensor &t, bool packed) {
  if (packed) return {(char *)t.data, t.dtype, 0, t.stride[1], t.stride[0]};
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[2], t.stride[1]};
}

inline parameters parameters_of(const attn_softmax_problem *problem, const attn_softmax_args *args,
                                int64_t splits, int64_t tiles, int64_t rows, void *workspace) {
  parameters p = {};
  bool packed = problem->ragged;
  p.batch = problem->batch, p.queries = problem->query_length, p.keys = problem->key_length;
  p.heads = problem->heads, p.kv_heads = problem->kv_heads;
  p.group = problem->heads / problem->kv_heads;
  p.dim = problem->dim, p.value_dim = problem->value_dim;
  p.tiles = tiles, p.splits = splits;
  p.soft_cap = (float)problem->soft_cap;
  p.scale = (float)problem->scale * (p.soft_cap != 0 ? 1 : LOG2_E);
  p.causal = problem->causal;
  p.window_left = problem->window_left, p.window_right = problem->window_right;
  if (packed) p.query_offsets = args->query_offsets, p.key_offsets = args->key_offsets;
  p.key_lengths = args->key_lengths;
  p.q = over_tokens(args->q, packed), p.o = over_tokens(args->o, packed);
  p.k = over_tokens(args->k, packed && !problem->paged);
  p.v = over_tokens(args->v, packed && !problem->paged);
  p.lse = over_heads(args->lse, packed);
  if (problem->paged) {
    p.pages = (const int32_t *)args->page_table.data;
    p.pages_sequence = args->page_table.stride[0];
    p.page_size = (unsigned)problem->page_size;
    p.page_k = args->k.stride[0], p.page_v = args->v.stride[0];
  }
  if (problem->alibi) p.alibi_slopes = (const float *)args->alibi_slopes.data;
  if (problem->sinks) p.sinks = (const float *)args->sinks.data;
  p.list = block_list_of(problem, args);
  p.partial_o = (float *)workspace;
  int64_t parts = p.batch * p.kv_heads * p.tiles * p.splits;
  p.partial = p.partial_o + parts * rows * problem->value_dim;
  if (splits <= MOST_MERGED) p.finished = (unsigned long long *)(p.partial + parts * rows * 2);
  return p;
}

} // namespace

#endif
