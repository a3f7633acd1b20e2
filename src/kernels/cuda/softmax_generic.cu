/* Softmax attention for every problem of attn/softmax.h, by tiles of 64 queries and 64 keys in
 * shared memory, with the multiply-adds of the ordinary units (FlashAttention-2, arXiv 2307.08691,
 * algorithms 1 and 2). What faster algorithms refuse ends here.
 *
 * A dimension is walked in chunks of 64 columns, so that any dimension fits. The columns of a
 * result (o, d_q, d_k and d_v) are cut into slices of a few chunks; a block owns one slice and
 * recomputes the scores for it: with dimensions up to 256 (128 for d_k and d_v) there is one.
 *
 * Backward: P = exp(S - LSE), dP = dO V^T, dS = P (dP - delta), delta = dO . O - d_lse, then
 * through the cap, and dQ = scale dS K, dK = scale dS^T Q, dV = P^T dO. One kernel owns queries and
 * sums over keys, one owns keys and sums over the queries of all heads that read them, so every sum
 * has a fixed order. */
#include "kernels/cuda/block_list.cuh"
#include "kernels/cuda/elements.cuh"

#include <cmath>
#include <cstdio>

namespace {

enum {
  TILE = 64,     /* queries, keys and columns of a chunk */
  LD = TILE + 4, /* of a tile in shared memory: rows stay aligned to 16 bytes, banks differ */
  THREADS = 256, /* 16 x 16, each with 4 x 4 of a tile */
};

/* Rows of one tensor: `sequence`, `token` and `head` are strides in elements. */
struct token_rows {
  char *data;
  attn_dtype dtype;
  int64_t sequence, token, head;
};

struct parameters {
  int64_t queries, keys; /* of each sequence, or the longest */
  int64_t heads, kv_heads, dim, value_dim;
  double scale, soft_cap;
  bool causal;
  int64_t window_left, window_right;
  const int32_t *query_offsets, *key_offsets, *key_lengths;
  const int32_t *pages;
  int64_t pages_sequence, page_size, page_k, page_v; /* strides of a sequence in the table and of a
                                                        page in k and v */
  token_rows q, k, v, o, lse, bias, d_o, d_lse, d_q, d_k, d_v, d_bias;
  int64_t bias_key, d_bias_key;
  const float *alibi_slopes, *sinks;
  float *d_sinks;
  int64_t batch, slices;
  block_list list;
};

/* One sequence as a kernel sees it. */
struct sequence {
  int64_t index, query_start, key_start; /* starts: in packed tensors */
  int64_t queries, keys, stored_keys;
};

__device__ sequence find_sequence(const parameters &p, int64_t b) {
  sequence s = {b, 0, 0, p.queries, p.keys, p.keys};
  if (p.query_offsets) {
    s.query_start = p.query_offsets[b];
    s.queries = p.query_offsets[b + 1] - s.query_start;
    s.key_start = p.key_offsets[b];
    s.keys = s.stored_keys = p.key_offsets[b + 1] - s.key_start;
  }
  if (p.key_lengths) s.keys = p.key_lengths[b];
  return s;
}

/* Where rows of one head of one sequence lie. */
struct head_rows {
  const char *data;
  attn_dtype dtype;
  int64_t start, token;
  const int32_t *pages;
  int64_t page_size, page;
  __device__ int64_t row(int64_t i) const {
    if (pages) return start + pages[i / page_size] * page + i % page_size * token;
    return start + i * token;
  }
};

/* Of a tensor over tokens; packed ones have the sequence's first token at `first`. */
__device__ head_rows rows_of(const token_rows &t, const sequence &s, int64_t first, int64_t head) {
  return {t.data, t.dtype, s.index * t.sequence + first * t.token + head * t.head, t.token, NULL,
          0,      0};
}
__device__ head_rows key_rows(const parameters &p, const token_rows &t, int64_t page,
                              const sequence &s, int64_t head) {
  if (!p.pages) return rows_of(t, s, s.key_start, head);
  return {t.data,      t.dtype, head * t.head, t.token, p.pages + s.index * p.pages_sequence,
          p.page_size, page};
}

struct key_range {
  int64_t first, end;
};

/* The keys that query i sees; both ends grow with i. */
__device__ key_range visible(const parameters &p, const sequence &s, int64_t i) {
  int64_t at = i + s.keys - s.queries;
  key_range range = {0, s.keys};
  if (p.window_left >= 0) range.first = max(range.first, at - p.window_left);
  if (p.causal) range.end = min(range.end, at + 1);
  if (p.window_right >= 0) range.end = min(range.end, at + p.window_right + 1);
  return range;
}

/* What any of the queries first .. end - 1 sees. */
__device__ key_range visible_to_any(const parameters &p, const sequence &s, int64_t first,
                                    int64_t end) {
  return {visible(p, s, first).first, visible(p, s, end - 1).end};
}

/* Whether a tile of queries and keys may have pairs that are on the block list; the same for all
 * threads. Small blocks are not looked up: there are too many in a tile. */
__device__ bool tile_listed(const parameters &p, const sequence &s, int64_t head, int64_t first,
                            int64_t end, int64_t key) {
  const block_list &list = p.list;
  if (!list.offsets || list.queries < TILE / 4 || list.keys < TILE / 4) return true;
  int64_t key_end = min(key + TILE, s.keys);
  for (int64_t i = first / list.queries; i * list.queries < end; ++i)
    for (int64_t j = key / list.keys; j * list.keys < key_end; ++j)
      if (is_listed(list, s.index, head, i, j)) return true;
  return false;
}

/* tile[c][r] = element `column` + c of row `first` + r, 0 beyond `end` and `width`. A warp takes 8
 * columns of 4 rows: so no two of its stores meet in a bank. */
template <typename Real>
__device__ void load_turned(Real *tile, const head_rows &rows, int64_t first, int64_t end,
                            int64_t column, int64_t width) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  with_elements<Real>(rows.data, rows.dtype, [&](auto *data) {
#pragma unroll
    for (int i = 0; i < TILE; i += THREADS / 32 * 4) {
      int r = i + lane / 8 + warp * 4;
      bool inside = first + r < end;
      auto *row = data + (inside ? rows.row(first + r) + column : 0);
#pragma unroll
      for (int c = lane % 8; c < TILE; c += 8)
        tile[c * LD + r] = inside && column + c < width ? (Real)row[c] : (Real)0;
    }
  });
}

/* tile[r][c], the same elements. */
template <typename Real>
__device__ void load_plain(Real *tile, const head_rows &rows, int64_t first, int64_t end,
                           int64_t column, int64_t width) {
  int c = threadIdx.x % TILE;
  with_elements<Real>(rows.data, rows.dtype, [&](auto *data) {
#pragma unroll
    for (int i = 0; i < TILE; i += THREADS / TILE) {
      int r = i + threadIdx.x / TILE;
      bool inside = first + r < end && column + c < width;
      tile[r * LD + c] = inside ? (Real)data[rows.row(first + r) + column + c] : (Real)0;
    }
  });
}

/* sum[i][j] += sum_k a[k][row + i] b[k][column + j] over the 64 k of two tiles. */
template <typename Real>
__device__ __forceinline__ void multiply(Real (&sum)[4][4], const Real *a, const Real *b) {
  const Real *a_column = a + threadIdx.x / 16 * 4, *b_column = b + threadIdx.x % 16 * 4;
#pragma unroll 8
  for (int k = 0; k < TILE; ++k) {
    Real x[4], y[4];
    if constexpr (sizeof(Real) == 4) {
      *(float4 *)x = *(const float4 *)(a_column + k * LD);
      *(float4 *)y = *(const float4 *)(b_column + k * LD);
    } else {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
        *(double2 *)(x + i) = *(const double2 *)(a_column + k * LD + i);
        *(double2 *)(y + i) = *(const double2 *)(b_column + k * LD + i);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum[i][j] += x[i] * y[j];
  }
}

/* sum = X Y^T for 64 rows of each, over `width` columns. */
template <typename Real>
__device__ void product(Real (&sum)[4][4], Real *a, Real *b, const head_rows &x, int64_t x_first,
                        int64_t x_end, const head_rows &y, int64_t y_first, int64_t y_end,
                        int64_t width) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sum[i][j] = 0;
  for (int64_t column = 0; column < width; column += TILE) {
    __syncthreads();
    load_turned(a, x, x_first, x_end, column, width);
    load_turned(b, y, y_first, y_end, column, width);
    __syncthreads();
    multiply(sum, a, b);
  }
}

/* Logits of a tile from its raw products, -inf where a query does not see the key. `slope` is the
 * derivative of the cap. */
template <typename Real>
__device__ void finish_scores(const parameters &p, const sequence &s, int64_t head, int64_t query,
                              int64_t key, Real (&score)[4][4], Real (*slope)[4]) {
  Real scale = (Real)p.scale, cap = (Real)p.soft_cap;
  Real alibi = p.alibi_slopes ? (Real)p.alibi_slopes[head] : 0;
  int64_t query_block = -1, key_block = -1; /* of the last look at the block list */
  bool listed = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int64_t row = query + i;
    key_range range = visible(p, s, row);
    if (row >= s.queries) range.end = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      int64_t column = key + j;
      bool seen = column >= range.first && column < range.end;
      if (seen && p.list.offsets) {
        int64_t own = row / p.list.queries, other = column / p.list.keys;
        if (own != query_block || other != key_block)
          listed = is_listed(p.list, s.index, head, own, other);
        query_block = own, key_block = other, seen = listed;
      }
      Real x = score[i][j] * scale;
      if (slope) slope[i][j] = 1;
      if (cap != 0) {
        Real ratio = tanh(x / cap);
        x = cap * ratio;
        if (slope) slope[i][j] = 1 - ratio * ratio;
      }
      if (seen && p.bias.data)
        x += ((const Real *)p.bias.data)[s.index * p.bias.sequence + head * p.bias.head +
                                         row * p.bias.token + column * p.bias_key];
      if (p.alibi_slopes) {
        int64_t distance = row + s.keys - s.queries - column;
        x -= alibi * (Real)(distance < 0 ? -distance : distance);
      }
      score[i][j] = seen ? x : -(Real)INFINITY;
    }
  }
}

/* Over the 16 threads that share rows. */
template <typename Real> __device__ Real row_maximum(Real x) {
#pragma unroll
  for (int mask = 8; mask; mask /= 2) x = max(x, __shfl_xor_sync(~0u, x, mask));
  return x;
}
template <typename Real> __device__ Real row_sum(Real x) {
#pragma unroll
  for (int mask = 8; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

/* sum[chunk] += W^T X for the chunks of a slice: the first index of W, which is in tile a, and the
 * rows of X are what is summed over. */
template <typename Real, int CHUNKS>
__device__ void add_products(Real (&sum)[CHUNKS][4][4], const Real *a, Real *b, const head_rows &x,
                             int64_t first, int64_t end, int64_t slice, int64_t width) {
#pragma unroll
  for (int chunk = 0; chunk < CHUNKS; ++chunk) {
    if (slice + chunk * TILE >= width) break;
    if (chunk) __syncthreads();
    load_plain(b, x, first, end, slice + chunk * TILE, width);
    __syncthreads();
    multiply(sum[chunk], a, b);
  }
}

template <typename Real, int CHUNKS>
__device__ void store_slice(const token_rows &tensor, const head_rows &target, int64_t first,
                            int64_t end, int64_t slice, int64_t width, Real factor,
                            const Real (&sum)[CHUNKS][4][4]) {
  int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        int64_t c = slice + chunk * TILE + column + j;
        if (first + row + i < end && c < width)
          store_element<Real>(tensor.data, tensor.dtype, target.row(first + row + i) + c,
                              sum[chunk][i][j] * factor);
      }
}

extern __shared__ __align__(16) char shared_memory[];

/* Block: [sequence][head][slice][tile of queries, last first]. o = softmax(S) V for CHUNKS chunks
 * of value columns. */
template <typename Real, int CHUNKS>
__global__ void __launch_bounds__(THREADS) forward_kernel(parameters p) {
  Real *a = (Real *)shared_memory, *b = a + TILE * LD;
  int64_t tiles = ceil_divide(p.queries, TILE), index = blockIdx.x;
  int64_t first = (tiles - 1 - index % tiles) * TILE;
  int64_t slice = index / tiles % p.slices * CHUNKS * TILE;
  int64_t head = index / tiles / p.slices % p.heads;
  sequence s = find_sequence(p, index / tiles / p.slices / p.heads);
  if (first >= s.queries) return;
  int64_t end = min(first + TILE, s.queries), kv_head = head / (p.heads / p.kv_heads);
  head_rows q = rows_of(p.q, s, s.query_start, head), k = key_rows(p, p.k, p.page_k, s, kv_head);
  head_rows v = key_rows(p, p.v, p.page_v, s, kv_head);
  int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4; /* of this thread in a tile */

  Real o[CHUNKS][4][4] = {}, maximum[4], sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) maximum[i] = -(Real)INFINITY;
  key_range range = visible_to_any(p, s, first, end);
  for (int64_t key = range.first / TILE * TILE; key < range.end; key += TILE) {
    if (!tile_listed(p, s, head, first, end, key)) continue;
    Real score[4][4];
    product(score, a, b, q, first, end, k, key, s.keys, p.dim);
    finish_scores<Real>(p, s, head, first + row, key + column, score, NULL);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Real top = max(max(score[i][0], score[i][1]), max(score[i][2], score[i][3]));
      top = max(maximum[i], row_maximum(top));
      Real base = top == -(Real)INFINITY ? 0 : top; /* nothing seen so far: all weights are 0 */
      Real factor = exp(maximum[i] - base), total = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        Real weight = exp(score[i][j] - base);
        a[(column + j) * LD + row + i] = weight;
        total += weight;
      }
      sum[i] = sum[i] * factor + row_sum(total);
      maximum[i] = top;
#pragma unroll
      for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
        for (int j = 0; j < 4; ++j) o[chunk][i][j] *= factor;
    }
    add_products(o, a, b, v, key, s.keys, slice, p.value_dim);
  }

  head_rows lse = rows_of(p.lse, s, s.query_start, head);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Real weight = 0, log_sum = -(Real)INFINITY;
    if (maximum[i] != -(Real)INFINITY) {
      Real sink = p.sinks ? (Real)p.sinks[head] : -(Real)INFINITY, top = max(maximum[i], sink);
      Real own = exp(maximum[i] - top), total = sum[i] * own + exp(sink - top);
      weight = own / total;
      log_sum = top + log(total);
    }
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; ++chunk)
#pragma unroll
      for (int j = 0; j < 4; ++j) o[chunk][i][j] *= weight;
    if (p.lse.data && slice == 0 && column == 0 && first + row + i < end)
      ((Real *)p.lse.data)[lse.row(first + row + i)] = log_sum;
  }
  store_slice<Real, CHUNKS>(p.o, rows_of(p.o, s, s.query_start, head), first, end, slice,
                            p.value_dim, 1, o);
}

/* delta[sequence][head][query] = dO . O - d_lse, a warp each. */
template <typename Real> __global__ void delta_kernel(parameters p, Real *delta) {
  int64_t index = (blockIdx.x * (int64_t)blockDim.x + threadIdx.x) / 32, query = index % p.queries;
  int64_t head = index / p.queries % p.heads, b = index / p.queries / p.heads;
  if (b >= p.batch) return;
  sequence s = find_sequence(p, b);
  if (query >= s.queries) return;
  int64_t o = rows_of(p.o, s, s.query_start, head).row(query);
  int64_t d_o = rows_of(p.d_o, s, s.query_start, head).row(query);
  Real sum = 0;
  for (int64_t c = threadIdx.x % 32; c < p.value_dim; c += 32)
    sum += load_element<Real>(p.o.data, p.o.dtype, o + c) *
           load_element<Real>(p.d_o.data, p.d_o.dtype, d_o + c);
#pragma unroll
  for (int mask = 16; mask; mask /= 2) sum += __shfl_xor_sync(~0u, sum, mask);
  if (threadIdx.x % 32) return;
  if (p.d_lse.data)
    sum -= ((const Real *)p.d_lse.data)[rows_of(p.d_lse, s, s.query_start, head).row(query)];
  delta[index] = sum;
}

/* d_sink = -sum exp(sink - LSE) delta over all rows of a head that see a key; a block a head. */
template <typename Real> __global__ void sink_kernel(parameters p, const Real *delta) {
  __shared__ double parts[THREADS];
  int64_t head = blockIdx.x;
  double sum = 0, sink = p.sinks[head];
  for (int64_t b = 0; b < p.batch; ++b) {
    sequence s = find_sequence(p, b);
    head_rows lse = rows_of(p.lse, s, s.query_start, head);
    for (int64_t i = threadIdx.x; i < s.queries; i += THREADS) {
      double log_sum = ((const Real *)p.lse.data)[lse.row(i)];
      if (log_sum != -INFINITY)
        sum -= exp(sink - log_sum) * delta[(b * p.heads + head) * p.queries + i];
    }
  }
  parts[threadIdx.x] = sum;
  for (int half = THREADS / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) parts[threadIdx.x] += parts[threadIdx.x + half];
  }
  if (threadIdx.x == 0) p.d_sinks[head] = (float)parts[0];
}

/* Of a tile: score becomes P, d_score becomes what flows into the products before the scale, and
 * `plain` = P (dP - delta) is the gradient of the bias. */
template <typename Real>
__device__ void finish_gradients(const parameters &p, const sequence &s, int64_t head,
                                 int64_t query, int64_t key, const Real *delta, Real (&score)[4][4],
                                 Real (&d_score)[4][4], Real (*plain)[4]) {
  Real slope[4][4];
  finish_scores<Real>(p, s, head, query, key, score, slope);
  head_rows lse = rows_of(p.lse, s, s.query_start, head);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bool inside = query + i < s.queries;
    Real base = inside ? ((const Real *)p.lse.data)[lse.row(query + i)] : 0;
    Real mean = inside ? delta[(s.index * p.heads + head) * p.queries + query + i] : 0;
    if (base == -(Real)INFINITY) base = (Real)INFINITY; /* no key: no weight */
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      score[i][j] = exp(score[i][j] - base);
      Real gradient = score[i][j] * (d_score[i][j] - mean);
      if (plain) plain[i][j] = gradient;
      d_score[i][j] = gradient * slope[i][j];
    }
  }
}

/* Block: [sequence][head][slice][tile of queries]. d_q of CHUNKS chunks of columns; the first slice
 * also writes d_bias, zeros for keys that are not seen included. */
template <typename Real, int CHUNKS>
__global__ void __launch_bounds__(THREADS) query_gradient_kernel(parameters p, const Real *delta) {
  Real *a = (Real *)shared_memory, *b = a + TILE * LD;
  int64_t tiles = ceil_divide(p.queries, TILE), index = blockIdx.x;
  int64_t first = (tiles - 1 - index % tiles) * TILE;
  int64_t slice = index / tiles % p.slices * CHUNKS * TILE;
  int64_t head = index / tiles / p.slices % p.heads;
  sequence s = find_sequence(p, index / tiles / p.slices / p.heads);
  if (first >= s.queries) return;
  int64_t end = min(first + TILE, s.queries), kv_head = head / (p.heads / p.kv_heads);
  head_rows q = rows_of(p.q, s, s.query_start, head), k = key_rows(p, p.k, p.page_k, s, kv_head);
  head_rows v = key_rows(p, p.v, p.page_v, s, kv_head);
  head_rows d_o = rows_of(p.d_o, s, s.query_start, head);
  int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;

  Real d_q[CHUNKS][4][4] = {};
  key_range seen = visible_to_any(p, s, first, end), range = seen;
  bool with_bias = p.d_bias.data && slice == 0;
  if (with_bias) range = {0, p.keys};
  for (int64_t key = range.first / TILE * TILE; key < range.end; key += TILE) {
    Real score[4][4] = {}, d_score[4][4] = {}, plain[4][4] = {};
    bool any =
        key < seen.end && key + TILE > seen.first && tile_listed(p, s, head, first, end, key);
    if (any) {
      product(score, a, b, q, first, end, k, key, s.keys, p.dim);
      product(d_score, a, b, d_o, first, end, v, key, s.keys, p.value_dim);
      finish_gradients<Real>(p, s, head, first + row, key + column, delta, score, d_score, plain);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (with_bias && first + row + i < end && key + column + j < p.keys)
          ((Real *)p.d_bias.data)[s.index * p.d_bias.sequence + head * p.d_bias.head +
                                  (first + row + i) * p.d_bias.token +
                                  (key + column + j) * p.d_bias_key] = plain[i][j];
    if (!any || !p.d_q.data) continue;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) a[(column + j) * LD + row + i] = d_score[i][j];
    add_products(d_q, a, b, k, key, s.keys, slice, p.dim);
  }
  if (!p.d_q.data) return;
  store_slice<Real, CHUNKS>(p.d_q, rows_of(p.d_q, s, s.query_start, head), first, end, slice, p.dim,
                            (Real)p.scale, d_q);
}

__device__ inline void keep_tile(float *tile, const float (&x)[4][4]) {
  int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i) *(float4 *)(tile + (row + i) * LD + column) = *(const float4 *)x[i];
}
__device__ inline void keep_tile(double *tile, const double (&x)[4][4]) {
  int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) tile[(row + i) * LD + column + j] = x[i][j];
}

/* Block: [sequence][key head][slice][tile of keys]. d_k and d_v of CHUNKS chunks of columns each.
 * Keys that are stored but not in use get zeros. */
template <typename Real, int CHUNKS>
__global__ void __launch_bounds__(THREADS) key_gradient_kernel(parameters p, const Real *delta) {
  Real *a = (Real *)shared_memory, *b = a + TILE * LD;
  int64_t tiles = ceil_divide(p.keys, TILE), index = blockIdx.x, key = index % tiles * TILE;
  int64_t slice = index / tiles % p.slices * CHUNKS * TILE;
  int64_t kv_head = index / tiles / p.slices % p.kv_heads, group = p.heads / p.kv_heads;
  sequence s = find_sequence(p, index / tiles / p.slices / p.kv_heads);
  if (key >= s.stored_keys) return;
  head_rows k = key_rows(p, p.k, p.page_k, s, kv_head), v = key_rows(p, p.v, p.page_v, s, kv_head);
  int row = threadIdx.x / 16 * 4, column = threadIdx.x % 16 * 4;

  Real d_k[CHUNKS][4][4] = {}, d_v[CHUNKS][4][4] = {};
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    head_rows q = rows_of(p.q, s, s.query_start, head);
    head_rows d_o = rows_of(p.d_o, s, s.query_start, head);
    for (int64_t first = 0; first < s.queries; first += TILE) {
      int64_t end = min(first + TILE, s.queries);
      key_range seen = visible_to_any(p, s, first, end);
      if (key >= seen.end || key + TILE <= seen.first) continue;
      if (!tile_listed(p, s, head, first, end, key)) continue;
      Real score[4][4], d_score[4][4];
      product(score, a, b, q, first, end, k, key, s.keys, p.dim);
      product(d_score, a, b, d_o, first, end, v, key, s.keys, p.value_dim);
      finish_gradients<Real>(p, s, head, first + row, key + column, delta, score, d_score, NULL);
      if (p.d_v.data && slice < p.value_dim) {
        __syncthreads();
        keep_tile(a, score);
        add_products(d_v, a, b, d_o, first, end, slice, p.value_dim);
      }
      if (p.d_k.data && slice < p.dim) {
        __syncthreads();
        keep_tile(a, d_score);
        add_products(d_k, a, b, q, first, end, slice, p.dim);
      }
    }
  }
  int64_t end = min(key + TILE, s.stored_keys);
  if (p.d_k.data)
    store_slice<Real, CHUNKS>(p.d_k, rows_of(p.d_k, s, s.key_start, kv_head), key, end, slice,
                              p.dim, (Real)p.scale, d_k);
  if (p.d_v.data)
    store_slice<Real, CHUNKS>(p.d_v, rows_of(p.d_v, s, s.key_start, kv_head), key, end, slice,
                              p.value_dim, 1, d_v);
}

/* [batch, length, heads, width], or [total, heads, width] when packed. */
token_rows over_tokens(const attn_tensor &t, bool packed) {
  if (packed) return {(char *)t.data, t.dtype, 0, t.stride[0], t.stride[1]};
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2]};
}
/* [batch, heads, length], or [heads, total] when packed. */
token_rows over_heads(const attn_tensor &t, bool packed) {
  if (packed) return {(char *)t.data, t.dtype, 0, t.stride[1], t.stride[0]};
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[2], t.stride[1]};
}

parameters parameters_of(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  parameters p = {};
  bool packed = problem->ragged;
  p.queries = problem->query_length, p.keys = problem->key_length;
  p.heads = problem->heads, p.kv_heads = problem->kv_heads, p.batch = problem->batch;
  p.dim = problem->dim, p.value_dim = problem->value_dim;
  p.scale = problem->scale, p.soft_cap = problem->soft_cap;
  p.causal = problem->causal;
  p.window_left = problem->window_left, p.window_right = problem->window_right;
  if (packed) p.query_offsets = args->query_offsets, p.key_offsets = args->key_offsets;
  p.key_lengths = args->key_lengths;
  p.q = over_tokens(args->q, packed), p.o = over_tokens(args->o, packed);
  p.d_o = over_tokens(args->d_o, packed), p.d_q = over_tokens(args->d_q, packed);
  p.d_k = over_tokens(args->d_k, packed), p.d_v = over_tokens(args->d_v, packed);
  p.lse = over_heads(args->lse, packed), p.d_lse = over_heads(args->d_lse, packed);
  p.k = over_tokens(args->k, packed && !problem->paged);
  p.v = over_tokens(args->v, packed && !problem->paged);
  if (problem->paged) {
    p.pages = (const int32_t *)args->page_table.data;
    p.pages_sequence = args->page_table.stride[0];
    p.page_size = problem->page_size;
    p.page_k = args->k.stride[0], p.page_v = args->v.stride[0];
  }
  if (problem->bias) {
    p.bias = over_heads(args->bias, false), p.bias_key = args->bias.stride[3];
    p.d_bias = over_heads(args->d_bias, false), p.d_bias_key = args->d_bias.stride[3];
  }
  if (problem->alibi) p.alibi_slopes = (const float *)args->alibi_slopes.data;
  if (problem->sinks) {
    p.sinks = (const float *)args->sinks.data;
    p.d_sinks = (float *)args->d_sinks.data;
  }
  p.list = block_list_of(problem, args);
  return p;
}

/* Launches a kernel over `tiles` times the slices of `width` columns, `chunks` chunks a slice. */
template <typename Real, typename... Arguments>
attn_status launch(void (*kernel)(parameters, Arguments...), parameters p, int64_t tiles,
                   int64_t width, int chunks, cudaStream_t stream, Arguments... arguments) {
  size_t bytes = 2 * TILE * LD * sizeof(Real);
  p.slices = ceil_divide(width, chunks * TILE);
  if (tiles == 0) return ATTN_OK;
  ATTN_CUDA_TRY(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)bytes));
  kernel<<<(unsigned)(tiles * p.slices), THREADS, bytes, stream>>>(p, arguments...);
  ATTN_CUDA_TRY_LAUNCH("softmax_generic");
  return ATTN_OK;
}

bool offered(const attn_softmax_problem *problem) {
  return problem->dtype == ATTN_F64 || problem->dtype == ATTN_F32 || problem->dtype == ATTN_BF16 ||
         problem->dtype == ATTN_F16;
}

bool plan_forward(const attn_cuda_device *, const attn_softmax_problem *problem,
                  attn_cuda_choice *choice) {
  if (!offered(problem)) return false;
  snprintf(choice->description, sizeof choice->description,
           "generic: tiles of %d queries and %d keys, ordinary multiply-adds", TILE, TILE);
  return true;
}

/* The backward workspace: delta. */
bool plan_backward(const attn_cuda_device *device, const attn_softmax_problem *problem,
                   attn_cuda_choice *choice) {
  if (problem->paged || !plan_forward(device, problem, choice)) return false;
  choice->workspace_bytes = (size_t)(problem->batch * problem->heads * problem->query_length) *
                            (problem->dtype == ATTN_F64 ? sizeof(double) : sizeof(float));
  return true;
}

/* Chunks of a slice by what fits in registers: doubles take two. */
template <typename Real>
attn_status forward(const attn_softmax_problem *problem, const attn_softmax_args *args,
                    cudaStream_t stream) {
  parameters p = parameters_of(problem, args);
  int64_t tiles = p.batch * p.heads * ceil_divide(p.queries, TILE), width = p.value_dim;
  if (width <= TILE) return launch<Real>(forward_kernel<Real, 1>, p, tiles, width, 1, stream);
  if constexpr (sizeof(Real) == 4)
    if (width > 2 * TILE) return launch<Real>(forward_kernel<Real, 4>, p, tiles, width, 4, stream);
  return launch<Real>(forward_kernel<Real, 2>, p, tiles, width, 2, stream);
}

attn_status run_forward(const attn_cuda_device *, const attn_cuda_choice *,
                        const attn_softmax_problem *problem, const attn_softmax_args *args, void *,
                        cudaStream_t stream) {
  return problem->dtype == ATTN_F64 ? forward<double>(problem, args, stream)
                                    : forward<float>(problem, args, stream);
}

template <typename Real>
attn_status backward(const attn_softmax_problem *problem, const attn_softmax_args *args,
                     void *workspace, cudaStream_t stream) {
  parameters p = parameters_of(problem, args);
  Real *delta = (Real *)workspace;
  const Real *kept = delta;
  int64_t rows = p.batch * p.heads * p.queries;
  if (rows) {
    delta_kernel<Real><<<(unsigned)ceil_divide(rows * 32, THREADS), THREADS, 0, stream>>>(p, delta);
    ATTN_CUDA_TRY_LAUNCH("softmax_generic delta");
  }
  if (p.d_sinks) {
    sink_kernel<Real><<<(unsigned)p.heads, THREADS, 0, stream>>>(p, kept);
    ATTN_CUDA_TRY_LAUNCH("softmax_generic sinks");
  }
  int64_t query_tiles = p.batch * p.heads * ceil_divide(p.queries, TILE);
  int64_t key_tiles = p.batch * p.kv_heads * ceil_divide(p.keys, TILE);
  int64_t width = p.dim > p.value_dim ? p.dim : p.value_dim;
  attn_status status = ATTN_OK;
  if (p.d_q.data || p.d_bias.data) {
    if (p.dim <= TILE)
      status = launch<Real>(query_gradient_kernel<Real, 1>, p, query_tiles, p.dim, 1, stream, kept);
    else
      status = launch<Real>(query_gradient_kernel<Real, 2>, p, query_tiles, p.dim, 2, stream, kept);
    if (status != ATTN_OK) return status;
  }
  if (!p.d_k.data && !p.d_v.data) return ATTN_OK;
  if constexpr (sizeof(Real) == 4)
    if (width > TILE)
      return launch<Real>(key_gradient_kernel<Real, 2>, p, key_tiles, width, 2, stream, kept);
  return launch<Real>(key_gradient_kernel<Real, 1>, p, key_tiles, width, 1, stream, kept);
}

attn_status run_backward(const attn_cuda_device *, const attn_cuda_choice *,
                         const attn_softmax_problem *problem, const attn_softmax_args *args,
                         void *workspace, cudaStream_t stream) {
  return problem->dtype == ATTN_F64 ? backward<double>(problem, args, workspace, stream)
                                    : backward<float>(problem, args, workspace, stream);
}

} // namespace

extern const softmax_algorithm softmax_generic_forward = {"generic", ATTN_PASS_FORWARD,
                                                          plan_forward, NULL, run_forward};
extern const softmax_algorithm softmax_generic_backward = {"generic", ATTN_PASS_BACKWARD,
                                                           plan_backward, NULL, run_backward};
