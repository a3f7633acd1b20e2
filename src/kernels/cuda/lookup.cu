/* Look-ups by row: gather, its transpose scatter_add, and tables of angles (rows.h).
 *
 * scatter_add has to add the rows of x that share an index in a fixed order. So it sorts the row
 * numbers by index first, stably, with a radix sort (Merrill and Grimshaw, High performance and
 * scalable radix sorting, 2011): for each digit, blocks count the digits of their rows, one block
 * sums the counts up to places, and the blocks move their rows there. Then the rows of an index lie
 * together in row order, and one warp adds them, or a block where they are many. */
#include "kernels/cuda/rows.cuh"

enum { THREADS = 256 };

/* --- Gather -------------------------------------------------------------------------------------
 */

/* `width` threads a row. */
template <class real, int V>
static __global__ void __launch_bounds__(THREADS)
    gather_rows(operand y, int64_t y_stride, operand table, int64_t table_stride,
                const int32_t *index, double factor, int64_t rows, int64_t n, int width) {
  int64_t row = (int64_t)blockIdx.x * (THREADS / width) + threadIdx.x / width;
  if (row >= rows) return;
  int32_t place = index[row];
  const char *from = table.data + (place < 0 ? 0 : place) * table_stride;
  char *to = y.data + row * y_stride;
  real scale = (real)factor;
  for (int64_t i = (int64_t)(threadIdx.x % width) * V; i < n; i += (int64_t)width * V) {
    real x[V];
    load_all<real, V>(x, from + i * table.step, table.dtype);
#pragma unroll
    for (int e = 0; e < V; ++e) x[e] = place < 0 ? (real)0 : x[e] * scale;
    store_all<real, V>(to + i * y.step, y.dtype, x);
  }
}

/* table [m, n] and rows [rows, n] */
static attn_status check_pair(const char *function, const attn_tensor *table, const char *name,
                              const attn_tensor *rows) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "table", table, table));
  if (table->rank != 2 || rows->rank != 2 || table->shape[1] != rows->shape[1])
    return attn_cuda_fail(ATTN_INVALID_SHAPE,
                          "%s: table has rank %d and %s rank %d with rows of "
                          "%lld and %lld, expected two matrices of one width",
                          function, table->rank, name, rows->rank,
                          table->rank == 2 ? (long long)table->shape[1] : 0ll,
                          rows->rank == 2 ? (long long)rows->shape[1] : 0ll);
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, name, rows, rows));
  int64_t count;
  ATTN_CUDA_CHECK(attn_cuda_count_rows(function, table, &count));
  return attn_cuda_count_rows(function, rows, &count);
}

static int64_t row_bytes(const attn_tensor *tensor) {
  return tensor->stride[0] * dtype_bytes(tensor->dtype);
}

attn_status attn_cuda_gather(const attn_tensor *y, double factor, const attn_tensor *table,
                             const int32_t *index, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check_pair("gather", table, "y", y));
  int64_t rows = y->shape[0], n = y->shape[1];
  if (rows == 0 || n == 0) return ATTN_OK;
  bool wide = is_wide(y) || is_wide(table);
  bool vectors = !wide && rows_are_vectors(y) && rows_are_vectors(table);
  int64_t pieces = vectors ? n / VECTOR : n;
  int width = power_of_two_from(pieces < THREADS ? pieces : THREADS), each = THREADS / width;
  auto kernel = wide      ? gather_rows<double, 1>
                : vectors ? gather_rows<float, VECTOR>
                          : gather_rows<float, 1>;
  kernel<<<(unsigned)((rows + each - 1) / each), THREADS, 0, (cudaStream_t)stream>>>(
      operand_of(y), row_bytes(y), operand_of(table), row_bytes(table), index, factor, rows, n,
      width);
  ATTN_CUDA_TRY_LAUNCH("gather");
  return ATTN_OK;
}

/* --- Sorting the rows by their index ------------------------------------------------------------
 */

enum {
  MAX_BITS = 9, /* of a digit: 512 counters a warp in shared memory */
  SORT_WARPS = 16,
  SORT_THREADS = SORT_WARPS * WARP,
  MAX_SORT_BLOCKS = 64,
  SCAN_THREADS = 1024,
};

/* Digit `shift`, `bits` wide, of the index of the row at place i; rows NULL: row i. Block b has the
 * places [count b / blocks, count (b + 1) / blocks). */
struct sort_pass {
  const int32_t *index, *rows;
  int64_t count;
  int shift, bits;
};

static __device__ inline int32_t row_at(const sort_pass &pass, int64_t i) {
  return pass.rows ? pass.rows[i] : (int32_t)i;
}

static __device__ inline int digit_of(const sort_pass &pass, int32_t row) {
  return pass.index[row] >> pass.shift & ((1 << pass.bits) - 1);
}

/* counts[digit, block] */
static __global__ void __launch_bounds__(SORT_THREADS)
    count_digits(sort_pass pass, int32_t *counts) {
  __shared__ int32_t bin[1 << MAX_BITS];
  for (int d = threadIdx.x; d < 1 << pass.bits; d += SORT_THREADS) bin[d] = 0;
  __syncthreads();
  int64_t from = pass.count * blockIdx.x / gridDim.x,
          to = pass.count * (blockIdx.x + 1) / gridDim.x;
  for (int64_t i = from + threadIdx.x; i < to; i += SORT_THREADS)
    atomicAdd(&bin[digit_of(pass, row_at(pass, i))], 1);
  __syncthreads();
  for (int d = threadIdx.x; d < 1 << pass.bits; d += SORT_THREADS)
    counts[d * gridDim.x + blockIdx.x] = bin[d];
}

/* counts[i] becomes the sum of those before it. One block; each thread takes a run. */
static __global__ void __launch_bounds__(SCAN_THREADS) scan_counts(int32_t *counts, int n) {
  __shared__ int32_t warp_sum[WARP];
  int each = (n + SCAN_THREADS - 1) / SCAN_THREADS, lane = threadIdx.x % WARP;
  int from = threadIdx.x * each, to = from + each < n ? from + each : n;
  int32_t mine = 0;
#pragma unroll 8
  for (int i = from; i < to; ++i) mine += counts[i];
  int32_t through = mine; /* up to and with this thread */
  for (int step = 1; step < WARP; step *= 2) {
    int32_t before = __shfl_up_sync(~0u, through, step);
    if (lane >= step) through += before;
  }
  if (lane == WARP - 1) warp_sum[threadIdx.x / WARP] = through;
  __syncthreads();
  int32_t sum = through - mine;
  for (int w = 0; w < (int)threadIdx.x / WARP; ++w) sum += warp_sum[w];
  enum { AHEAD = 8 }; /* loads in flight together: the stores might change what is loaded */
  for (int start = from; start < to; start += AHEAD) {
    int32_t count[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) count[i] = start + i < to ? counts[start + i] : 0;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i) {
      if (start + i < to) counts[start + i] = sum;
      sum += count[i];
    }
  }
}

/* Moves rows to their places: tiles of SORT_THREADS rows in order; in a tile, warps in order; in a
 * warp, lanes in order. */
static __global__ void __launch_bounds__(SORT_THREADS)
    move_rows(sort_pass pass, const int32_t *places, int32_t *sorted) {
  __shared__ int32_t next[1 << MAX_BITS];                 /* the next free place of each digit */
  __shared__ uint16_t in_warp[SORT_WARPS][1 << MAX_BITS]; /* rows of a digit in each warp, then in
                                                             the warps before it */
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, bins = 1 << pass.bits;
  for (int d = threadIdx.x; d < bins; d += SORT_THREADS)
    next[d] = places[d * gridDim.x + blockIdx.x];
  int64_t from = pass.count * blockIdx.x / gridDim.x,
          to = pass.count * (blockIdx.x + 1) / gridDim.x;
  for (int64_t start = from; start < to; start += SORT_THREADS) {
    int64_t i = start + threadIdx.x;
    bool inside = i < to;
    int32_t row = inside ? row_at(pass, i) : 0;
    int digit = inside ? digit_of(pass, row) : bins; /* those outside match among themselves */
    for (int d = lane; d < bins; d += WARP) in_warp[warp][d] = 0;
    __syncwarp();
    unsigned same = __match_any_sync(~0u, digit);
    int rank = __popc(same & ((1u << lane) - 1));
    if (inside && rank == 0) in_warp[warp][digit] = (uint16_t)__popc(same);
    __syncthreads();
    int32_t in_tile = 0;
    if ((int)threadIdx.x < bins)
      for (int w = 0; w < SORT_WARPS; ++w) {
        uint16_t count = in_warp[w][threadIdx.x];
        in_warp[w][threadIdx.x] = (uint16_t)in_tile;
        in_tile += count;
      }
    __syncthreads();
    if (inside) sorted[next[digit] + in_warp[warp][digit] + rank] = row;
    __syncthreads();
    if ((int)threadIdx.x < bins) next[threadIdx.x] += in_tile;
  }
}
static_assert(SORT_THREADS >= 1 << MAX_BITS, "move_rows gives each digit a thread");

/* --- Adding the rows of each index --------------------------------------------------------------
 */

enum { ADD_WARPS = THREADS / WARP };

/* Where the run of `key` ends, one warp searching from `from`, which is in it: 32 places at a time.
 */
static __device__ inline int64_t end_of_run(const int32_t *index, const int32_t *sorted,
                                            int32_t key, int64_t from, int64_t rows) {
  int64_t low = from, high = rows; /* low is in the run, high is not */
  int lane = threadIdx.x % WARP;
  while (high - low > 1) {
    int64_t step = (high - low + WARP - 1) / WARP, at = low + (lane + 1) * step;
    bool in_run = at < high && index[sorted[at]] == key;
    int count = __popc(__ballot_sync(~0u, in_run)); /* indices are sorted: the first ones are */
    int64_t next = low + (count + 1) * step;
    low += count * step;
    high = next < high ? next : high;
  }
  return high;
}

/* sum += scale x[row] for the sorted rows [from, to), in order; a column (or V) a lane. */
template <class real, int V>
static __device__ inline void add_rows(real (&sum)[V], const char *x, int dtype, int64_t stride,
                                       const int32_t *sorted, int64_t from, int64_t to, real scale,
                                       bool active) {
  constexpr int AHEAD = 4; /* rows whose loads are in flight together */
  int lane = threadIdx.x % WARP;
  int32_t next = from + lane < to ? sorted[from + lane] : 0;
  for (int64_t start = from; start < to; start += WARP) {
    int32_t mine = next;
    if (start + WARP < to) next = start + WARP + lane < to ? sorted[start + WARP + lane] : 0;
    int count = to - start < WARP ? (int)(to - start) : WARP;
    for (int j = 0; j < count; j += AHEAD) {
      raw_vector raw[AHEAD];
      real value[AHEAD][V];
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) {
        int32_t row = __shfl_sync(~0u, mine, (j + k) % WARP);
        if (j + k >= count || !active) continue;
        if constexpr (V == VECTOR)
          raw[k] = load_raw(x + row * stride, dtype);
        else
          value[k][0] = load_element<real>(x + row * stride, dtype, 0);
      }
#pragma unroll
      for (int k = 0; k < AHEAD; ++k) {
        if (j + k >= count || !active) continue;
        if constexpr (V == VECTOR) unpack(value[k], raw[k], dtype);
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += scale * value[k][e];
      }
    }
  }
}

/* A warp for each place of the sorted rows; it adds the run of equal indices that begins there, if
 * one does. A run longer than a warp is shared by the block: each warp adds a stretch of it, and
 * the stretches are added in order. blockIdx.y: which 32 V columns. */
template <class real, int V>
static __global__ void __launch_bounds__(THREADS, 3)
    add_runs(operand table, int64_t table_stride, operand x, int64_t x_stride, const int32_t *index,
             const int32_t *sorted, double factor, int64_t rows, int64_t n) {
  __shared__ int64_t long_end[ADD_WARPS]; /* 0: no long run begins at the warp's place */
  __shared__ real part[ADD_WARPS][V][WARP];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int64_t first = (int64_t)blockIdx.x * ADD_WARPS, i = first + warp;
  int64_t column = ((int64_t)blockIdx.y * WARP + lane) * V;
  bool active = column < n;
  const char *from = x.data + column * x.step;
  char *to = table.data + column * table.step;
  real scale = (real)factor;
  auto put = [&](int32_t key, const real(&sum)[V]) {
    if (active) store_all<real, V>(to + key * table_stride, table.dtype, sum);
  };
  auto get = [&](int32_t key, real(&sum)[V]) {
    if (active) load_all<real, V>(sum, to + key * table_stride, table.dtype);
  };
  if (lane == 0) long_end[warp] = 0;
  if (i < rows) {
    int32_t key = index[sorted[i]];
    bool head = i == 0 || index[sorted[i - 1]] != key;
    if (head) {
      bool same = i + lane < rows && index[sorted[i + lane]] == key;
      int count = __popc(__ballot_sync(~0u, same));
      if (count < WARP) {
        real sum[V];
        get(key, sum);
        add_rows<real, V>(sum, from, x.dtype, x_stride, sorted, i, i + count, scale, active);
        put(key, sum);
      } else {
        int64_t end = end_of_run(index, sorted, key, i + WARP - 1, rows);
        if (lane == 0) long_end[warp] = end;
      }
    }
  }
  __syncthreads();
  for (int w = 0; w < ADD_WARPS; ++w) {
    int64_t begin = first + w, length = long_end[w] - begin;
    if (long_end[w] == 0) continue;
    real sum[V] = {};
    add_rows<real, V>(sum, from, x.dtype, x_stride, sorted, begin + length * warp / ADD_WARPS,
                      begin + length * (warp + 1) / ADD_WARPS, scale, active);
#pragma unroll
    for (int e = 0; e < V; ++e) part[warp][e][lane] = sum[e];
    __syncthreads();
    if (warp == 0) {
      int32_t key = index[sorted[begin]];
      get(key, sum);
      for (int other = 0; other < ADD_WARPS; ++other)
#pragma unroll
        for (int e = 0; e < V; ++e) sum[e] += part[other][e][lane];
      put(key, sum);
    }
    __syncthreads();
  }
}

/* Digits as wide as possible such that their counters, one for each block, fit m + 1 numbers.
 * Narrow ones for few blocks would leave most of the GPU idle, hence at least some blocks. */
static void choose_digits(int64_t m, int *bits, int *passes, int *blocks) {
  int all = 1;
  while (all < 31 && ((int64_t)1 << all) < m) ++all;
  for (*passes = (all + MAX_BITS - 1) / MAX_BITS;; ++*passes) {
    *bits = (all + *passes - 1) / *passes;
    int64_t fit = (m + 1) >> *bits;
    *blocks = (int)(fit < MAX_SORT_BLOCKS ? fit : MAX_SORT_BLOCKS);
    if (*blocks >= 8 || *bits == 1) return;
  }
}

attn_status attn_cuda_scatter_add(const attn_tensor *table, double factor, const attn_tensor *x,
                                  const int32_t *index, void *workspace, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check_pair("scatter_add", table, "x", x));
  int64_t rows = x->shape[0], n = x->shape[1], m = table->shape[0];
  if (rows == 0 || n == 0 || m == 0) return ATTN_OK;
  cudaStream_t queue = (cudaStream_t)stream;
  int32_t *counts = (int32_t *)workspace, *sorted = counts + m + 1, *other = sorted + rows;
  int bits, passes, blocks;
  choose_digits(m, &bits, &passes, &blocks);
  sort_pass pass = {index, NULL, rows, 0, bits};
  for (int p = 0; p < passes; ++p, pass.shift += bits) {
    count_digits<<<blocks, SORT_THREADS, 0, queue>>>(pass, counts);
    scan_counts<<<1, SCAN_THREADS, 0, queue>>>(counts, blocks << bits);
    move_rows<<<blocks, SORT_THREADS, 0, queue>>>(pass, counts, sorted);
    ATTN_CUDA_TRY_LAUNCH("scatter_add");
    pass.rows = sorted;
    sorted = other;
    other = (int32_t *)pass.rows;
  }
  bool wide = is_wide(table) || is_wide(x);
  bool vectors = !wide && rows_are_vectors(table) && rows_are_vectors(x);
  int64_t columns = vectors ? WARP * VECTOR : WARP;
  dim3 grid((unsigned)((rows + ADD_WARPS - 1) / ADD_WARPS),
            (unsigned)((n + columns - 1) / columns));
  auto kernel = wide ? add_runs<double, 1> : vectors ? add_runs<float, VECTOR> : add_runs<float, 1>;
  kernel<<<grid, THREADS, 0, queue>>>(operand_of(table), row_bytes(table), operand_of(x),
                                      row_bytes(x), index, pass.rows, factor, rows, n);
  ATTN_CUDA_TRY_LAUNCH("scatter_add");
  return ATTN_OK;
}

/* --- Angles -------------------------------------------------------------------------------------
 */

static __global__ void __launch_bounds__(THREADS)
    make_angles(operand cosines, int64_t cosine_stride, operand sines, int64_t sine_stride,
                const double *theta, int64_t first, const int64_t *position, int64_t count,
                int64_t width) {
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= count * width) return;
  int64_t row = i / width, column = i % width;
  int64_t at = first + row + (position ? *position : 0);
  double sine, cosine;
  sincos((double)at * theta[column], &sine, &cosine);
  store_element<double>(cosines.data + row * cosine_stride + column * cosines.step, cosines.dtype,
                        0, cosine);
  store_element<double>(sines.data + row * sine_stride + column * sines.step, sines.dtype, 0, sine);
}

attn_status attn_cuda_angles(const attn_tensor *cosines, const attn_tensor *sines,
                             const double *theta, int64_t first, const int64_t *position,
                             attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("angles", "cosines", cosines, cosines));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("angles", "sines", sines, cosines));
  if (cosines->rank != 2)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "angles: cosines has rank %d, expected 2",
                          cosines->rank);
  int64_t count = cosines->shape[0], width = cosines->shape[1];
  if (count == 0 || width == 0) return ATTN_OK;
  make_angles<<<(unsigned)((count * width + THREADS - 1) / THREADS), THREADS, 0,
                (cudaStream_t)stream>>>(operand_of(cosines), row_bytes(cosines), operand_of(sines),
                                        row_bytes(sines), theta, first, position, count, width);
  ATTN_CUDA_TRY_LAUNCH("angles");
  return ATTN_OK;
}
