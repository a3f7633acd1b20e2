/* What the softmax engine's kernels for Hopper share: a problem as kernels take it, the part of it
 * that one block of queries or keys sees, and tensor maps. */
#ifndef ATTN_KERNELS_CUDA_SOFTMAX_SM90_CUH
#define ATTN_KERNELS_CUDA_SOFTMAX_SM90_CUH

#include "kernels/cuda/hopper.cuh"

namespace softmax_sm90 {

using namespace hopper;

constexpr int GROUP_ROWS = 64;       /* rows of a warpgroup: M of wgmma */
constexpr int TILE_BYTES = 64 * 128; /* 64 rows of 64 elements */
constexpr int FAR = 1 << 29;         /* a window that is no limit */
constexpr float LOG2_E = 1.44269504088896340736f, LN_2 = 0.69314718055994530942f;

/* Lengths, windows and orders that all kernels take. */
struct extents {
  int batch, heads, kv_heads;
  int query_length, key_length;               /* longest when ragged */
  int left, right;                            /* query i' sees keys i' - left to i' + right */
  const int32_t *query_offsets, *key_offsets; /* ragged, else NULL */
  const int32_t *key_lengths;                 /* keys in use, or NULL */
  int64_t query_total;                        /* rows of lse a head */
};

/* One sequence. */
struct sequence {
  int query_start, query_length; /* start: 0 unless ragged */
  int key_start, key_length;
  int shift; /* i' = i + shift */
};

__device__ __forceinline__ sequence sequence_of(const extents &e, int batch) {
  sequence s = {0, e.query_length, 0, e.key_length, 0};
  if (e.query_offsets) {
    s.query_start = e.query_offsets[batch];
    s.query_length = e.query_offsets[batch + 1] - s.query_start;
    s.key_start = e.key_offsets[batch];
    s.key_length = e.key_offsets[batch + 1] - s.key_start;
  }
  if (e.key_lengths) s.key_length = e.key_lengths[batch];
  s.shift = s.key_length - s.query_length;
  return s;
}

/* Blocks [low, high) along the other axis that a block sees; those in [full_low, full_high) it sees
 * entirely. */
struct range {
  int low, high, full_low, full_high;
};

/* Queries [first, first + rows) of a sequence: the blocks of `width` keys. */
__device__ __forceinline__ range keys_seen(const extents &e, const sequence &s, int first, int rows,
                                           int width) {
  const int top = first + s.shift, bottom = min(first + rows, s.query_length) - 1 + s.shift;
  range r;
  r.low = max(top - e.left, 0) / width;
  r.high = (max(min(s.key_length, bottom + e.right + 1), 0) + width - 1) / width;
  r.full_low = (max(bottom - e.left, 0) + width - 1) / width;
  r.full_high = max(min(s.key_length, top + e.right + 1), 0) / width;
  r.low = min(r.low, r.high);
  return r;
}

/* Keys [first, first + columns): the blocks of `width` queries. */
__device__ __forceinline__ range queries_seen(const extents &e, const sequence &s, int first,
                                              int columns, int width) {
  const int last = min(first + columns, s.key_length) - 1;
  range r;
  /* Query i sees keys i + shift - left to i + shift + right. */
  r.low = max(first - e.right - s.shift, 0) / width;
  r.high = (max(min(s.query_length, last + e.left - s.shift + 1), 0) + width - 1) / width;
  r.full_low = (max(last - e.right - s.shift, 0) + width - 1) / width;
  r.full_high = max(min(s.query_length, first + e.left - s.shift + 1), 0) / width;
  if (first + columns > s.key_length) r.full_high = 0;
  r.low = min(r.low, r.high);
  return r;
}

__device__ __forceinline__ void named_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

/* A row keeps its old maximum while weights stay below 2^SLACK, which float16 holds with room to
 * spare; so the output is rarely rescaled. */
constexpr float SLACK = 8;

/* Reference (a maximum of raw scores, at most SLACK behind) and this thread's part of the sum of
 * each of its two rows. */
struct row_state {
  float top[2], sum[2];
};

/* Scores to weights 2^{(s - max) scale log2 e}, in place; the factors that older results take. */
template <int count>
__device__ __forceinline__ void weigh(float (&scores)[count], row_state *rows, float (&factor)[2],
                                      float scale_log2) {
  float offset[2];
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float top = fmaxf(scores[2 * row], scores[2 * row + 1]);
#pragma unroll
    for (int i = 4; i < count; i += 4)
      top = fmaxf(top, fmaxf(scores[i + 2 * row], scores[i + 2 * row + 1]));
    top = fmaxf(rows->top[row], quad_max(top));
    if ((top - rows->top[row]) * scale_log2 <= SLACK) top = rows->top[row];
    /* A row that has seen no key yet: any finite maximum makes its weights 0. */
    offset[row] = top == -INFINITY ? 0 : top * scale_log2;
    factor[row] = exp2_approximate(rows->top[row] * scale_log2 - offset[row]);
    rows->top[row] = top;
  }
#pragma unroll
  for (int i = 0; i < count; i++)
    scores[i] = exp2_approximate(fmaf(scores[i], scale_log2, -offset[i % 4 / 2]));
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float sum[2] = {scores[2 * row], scores[2 * row + 1]};
#pragma unroll
    for (int i = 4; i < count; i += 4)
      sum[0] += scores[i + 2 * row], sum[1] += scores[i + 2 * row + 1];
    rows->sum[row] = fmaf(rows->sum[row], factor[row], sum[0] + sum[1]);
  }
}

/* Scores of pairs that do not see each other: -inf. Rows r and r + 8 of the thread see the columns
 * [low, high) of the block, counted from the thread's own first column. */
template <int count>
__device__ __forceinline__ void hide(float (&scores)[count], const int (&low)[2],
                                     const int (&high)[2]) {
#pragma unroll
  for (int i = 0; i < count; i++) {
    const int column = i / 4 * 8 + i % 2, row = i % 4 / 2;
    if (column < low[row] || column >= high[row]) scores[i] = -INFINITY;
  }
}

/* Accumulators [64, count * 2] as A operands. */
template <typename T, int count>
__device__ __forceinline__ void operands(uint32_t (&a)[count / 8][4],
                                         const float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; i += 2)
    a[i / 8][i % 8 / 2] = element<T>::pack(values[i], values[i + 1]);
}

template <typename T, int count>
__device__ __forceinline__ void scores_wgmma(float (&d)[count], uint64_t a, uint64_t b, int add) {
  wgmma<T, 0, 0>(d, a, b, add);
}

/* Loads a [rows, dim] tile of one head, as dim / 64 swizzled tiles of 64 columns each, in boxes of
 * `box` rows. */
template <int DIM>
__device__ __forceinline__ void tile_load(uint32_t target, const CUtensorMap *map, uint32_t barrier,
                                          int rows, int box, int head, int token, int batch) {
#pragma unroll
  for (int c = 0; c < DIM / 64; c++)
    for (int r = 0; r < rows; r += box)
      tensor_load(target + (c * rows + r) * 128, map, barrier, 64 * c, head, token + r, batch);
}

/* The map of q, k, v or a tensor like them, in boxes of `rows` tokens by 64 columns. */
inline bool map_make(CUtensorMap *map, const attn_tensor &t, bool ragged, int rows) {
  typedef CUresult encode_tiled(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static encode_tiled *const encode = [] {
    void *found = NULL;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess)
      cudaGetLastError();
    return (encode_tiled *)found;
  }();
  if (!encode) return false;
  const int64_t *shape = t.shape + !ragged, *stride = t.stride + !ragged; /* token, head, column */
  const int64_t batch = ragged ? 1 : t.shape[0], width = shape[2] * 2;
  /* A dimension of one element may have any stride: give it one that is valid. */
  cuuint64_t lengths[4] = {(cuuint64_t)shape[2], (cuuint64_t)shape[1], (cuuint64_t)shape[0],
                           (cuuint64_t)batch};
  cuuint64_t strides[3] = {(cuuint64_t)(shape[1] > 1 ? stride[1] * 2 : width),
                           (cuuint64_t)(shape[0] > 1 ? stride[0] * 2 : width),
                           (cuuint64_t)(batch > 1 ? t.stride[0] * 2 : width)};
  cuuint32_t box[4] = {64, 1, (cuuint32_t)rows, 1}, steps[4] = {1, 1, 1, 1};
  CUtensorMapDataType type =
      t.dtype == ATTN_BF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  return encode(map, type, 4, t.data, lengths, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* Whether map_make can describe it. */
inline bool map_suits(const attn_tensor &t, bool ragged) {
  const int64_t *shape = t.shape + !ragged, *stride = t.stride + !ragged;
  return map_possible(t.data, shape[1], shape[0], ragged ? 1 : t.shape[0], stride[1], stride[0],
                      ragged ? 0 : t.stride[0]);
}

/* What both passes ask of a problem. */
inline bool offered(const attn_cuda_device *device, const attn_softmax_problem *problem) {
  const int64_t longest = FAR / 2;
  return device->major == 9 && (problem->dtype == ATTN_BF16 || problem->dtype == ATTN_F16) &&
         (problem->dim == 64 || problem->dim == 128) && problem->value_dim == problem->dim &&
         problem->scale > 0 && problem->soft_cap == 0 && !problem->bias && !problem->alibi &&
         !problem->sinks && !problem->paged && problem->splits <= 1 && problem->query_length > 0 &&
         problem->key_length > 0 && problem->query_length < longest &&
         problem->key_length < longest &&
         problem->batch * problem->heads * ((problem->query_length + 63) / 64) < longest &&
         problem->batch * problem->heads * ((problem->key_length + 63) / 64) < longest;
}

inline extents extents_of(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  auto limit = [](int64_t window) { return window < 0 || window > FAR ? FAR : (int)window; };
  extents e = {};
  e.batch = (int)problem->batch;
  e.heads = (int)problem->heads;
  e.kv_heads = (int)problem->kv_heads;
  e.query_length = (int)problem->query_length;
  e.key_length = (int)problem->key_length;
  e.left = limit(problem->window_left);
  e.right = problem->causal ? 0 : limit(problem->window_right);
  if (problem->ragged) {
    e.query_offsets = args->query_offsets;
    e.key_offsets = args->key_offsets;
  }
  e.key_lengths = args->key_lengths;
  e.query_total = problem->ragged ? args->q.shape[0] : problem->query_length;
  return e;
}

} // namespace softmax_sm90

#endif
