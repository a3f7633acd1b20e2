/* Sums over rows, columns and whole tensors (rows.h). */
#include "kernels/cuda/reduce.cuh"

enum {
  THREADS = 256,
  TILE_ROWS = THREADS / WARP,
  FEW_ROWS = 2048, /* that do not fill the GPU with a warp each */
};

/* --- Over columns: one number a row -------------------------------------------------------------
 */

/* `width` threads a row (sum_group), each with AHEAD pieces of V whose loads are in flight
 * together. Operands of the walk: y, a, b. */
template <class real, int V, int AHEAD>
static __global__ void __launch_bounds__(THREADS)
    dot_rows(const __grid_constant__ walk<3> rows, operand y, operand a, operand b, int64_t n,
             int width) {
  __shared__ real shared[TILE_ROWS];
  uint32_t row = blockIdx.x * (THREADS / width) + threadIdx.x / width;
  bool inside = row < rows.count;
  coordinates c = locate(rows, inside ? row : 0);
  const char *from_a = a.data + offset_of(rows, c, 1), *from_b = b.data + offset_of(rows, c, 2);
  real sum = 0;
  int64_t stride = (int64_t)width * V;
  for (int64_t start = (int64_t)(threadIdx.x % width) * V; start < n; start += AHEAD * stride) {
    real u[AHEAD][V], v[AHEAD][V];
    raw_vector raw_a[AHEAD], raw_b[AHEAD];
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      int64_t i = start + k * stride;
      if (i >= n) continue;
      if constexpr (V == VECTOR) {
        raw_a[k] = load_raw(from_a + i * a.step, a.dtype);
        raw_b[k] = load_raw(from_b + i * b.step, b.dtype);
      } else {
        u[k][0] = load_element<real>(from_a + i * a.step, a.dtype, 0);
        v[k][0] = load_element<real>(from_b + i * b.step, b.dtype, 0);
      }
    }
#pragma unroll
    for (int k = 0; k < AHEAD; ++k) {
      if (start + k * stride >= n) continue;
      if constexpr (V == VECTOR) {
        unpack(u[k], raw_a[k], a.dtype);
        unpack(v[k], raw_b[k], b.dtype);
      }
#pragma unroll
      for (int j = 0; j < V; ++j) sum += u[k][j] * v[k][j];
    }
  }
  sum = sum_group(sum, width, shared);
  if (inside && threadIdx.x % width == 0)
    store_element<real>(y.data + offset_of(rows, c, 0), y.dtype, 0, sum);
}

attn_status attn_cuda_row_dot(const attn_tensor *y, const attn_tensor *a, const attn_tensor *b,
                              attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_dot", "a", a, a));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_dot", "b", b, a));
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows("row_dot", a, &rows));
  attn_tensor leading = *a;
  leading.rank -= 1;
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_dot", "y", y, &leading));
  if (rows == 0) return ATTN_OK;
  int64_t n = a->shape[a->rank - 1];
  walk<3> all = walk_rows<3>(a, {y, a, b});
  bool wide = is_wide(y) || is_wide(a) || is_wide(b);
  bool vectors = !wide && rows_are_vectors(a) && rows_are_vectors(b);
  int64_t pieces = vectors ? n / VECTOR : n;
  /* Long rows take a whole block when there are few, others as many lanes as they have pieces. */
  int width = pieces > 8 * WARP && rows < FEW_ROWS
                  ? THREADS
                  : power_of_two_from(pieces < WARP ? pieces : WARP);
  unsigned blocks = (unsigned)((rows + THREADS / width - 1) / (THREADS / width));
  auto kernel = wide                 ? dot_rows<double, 1, 1>
                : !vectors           ? dot_rows<float, 1, 1>
                : pieces <= 2 * WARP ? dot_rows<float, VECTOR, 1>
                                     : dot_rows<float, VECTOR, 4>;
  kernel<<<blocks, THREADS, 0, (cudaStream_t)stream>>>(all, operand_of(y), operand_of(a),
                                                       operand_of(b), n, width);
  ATTN_CUDA_TRY_LAUNCH("row_dot");
  return ATTN_OK;
}

/* --- Over rows: one number a column -------------------------------------------------------------
 */

/* Block (x, y): columns 32 V x ..., rows of part y; warp w takes every eighth row of it from row w.
 * partial[part, c] = sum of factor (a - mean) b, where factor, mean (a number a row) and b are
 * optional. */
template <class real, int V>
static __global__ void __launch_bounds__(THREADS, 3)
    column_parts(const __grid_constant__ walk<2> rows, operand a, operand b, int64_t n,
                 const double *factor, const double *mean, double *partial) {
  constexpr int AHEAD = 2; /* rows whose loads are in flight together */
  __shared__ real shared[TILE_ROWS][WARP * V];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  int64_t column = ((int64_t)blockIdx.x * WARP + lane) * V;
  uint32_t from = (uint32_t)((uint64_t)rows.count * blockIdx.y / gridDim.y);
  uint32_t to = (uint32_t)((uint64_t)rows.count * (blockIdx.y + 1) / gridDim.y);
  real sum[V] = {};
  for (uint32_t start = from + warp; start < to && column < n; start += AHEAD * TILE_ROWS) {
    real u[AHEAD][V], v[AHEAD][V];
    raw_vector raw_a[AHEAD], raw_b[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      uint32_t row = start + j * TILE_ROWS;
      if (row >= to) continue;
      coordinates c = locate(rows, row);
      const char *from_a = a.data + offset_of(rows, c, 0) + column * a.step;
      const char *from_b = b.data + offset_of(rows, c, 1) + column * b.step;
      if constexpr (V == VECTOR) {
        raw_a[j] = load_raw(from_a, a.dtype);
        if (b.data) raw_b[j] = load_raw(from_b, b.dtype);
      } else {
        u[j][0] = load_element<real>(from_a, a.dtype, 0);
        if (b.data) v[j][0] = load_element<real>(from_b, b.dtype, 0);
      }
    }
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      uint32_t row = start + j * TILE_ROWS;
      if (row >= to) continue;
      if constexpr (V == VECTOR) {
        unpack(u[j], raw_a[j], a.dtype);
        if (b.data) unpack(v[j], raw_b[j], b.dtype);
      }
      real scale = factor ? (real)factor[row] : 1, centre = mean ? (real)mean[row] : 0;
#pragma unroll
      for (int i = 0; i < V; ++i) {
        real value = factor ? scale * (u[j][i] - centre) : u[j][i];
        sum[i] += b.data ? value * v[j][i] : value;
      }
    }
  }
#pragma unroll
  for (int i = 0; i < V; ++i) shared[warp][i * WARP + lane] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < WARP * V; i += THREADS) {
    double total = 0;
    for (int w = 0; w < TILE_ROWS; ++w) total += (double)shared[w][i];
    int64_t to_column = ((int64_t)blockIdx.x * WARP + i % WARP) * V + i / WARP;
    if (to_column < n) partial[blockIdx.y * n + to_column] = total;
  }
}

attn_status attn_cuda_column_sums(const attn_tensor *y, bool accumulate, const attn_tensor *a,
                                  const attn_tensor *b, const double *factor, const double *mean,
                                  double *partial, cudaStream_t stream) {
  int64_t rows, n = y->shape[0];
  ATTN_CUDA_CHECK(attn_cuda_count_rows("column_dot", a, &rows));
  if (n == 0) return ATTN_OK;
  int64_t parts = (rows + TILE_ROWS - 1) / TILE_ROWS;
  if (parts > ATTN_CUDA_PARTS) parts = ATTN_CUDA_PARTS;
  walk<2> all = walk_rows<2>(a, {a, b});
  bool wide = is_wide(y) || is_wide(a) || is_wide(b);
  bool vectors = !wide && rows_are_vectors(a) && rows_are_vectors(b);
  int64_t columns = vectors ? WARP * VECTOR : WARP;
  if (parts > 0) {
    auto kernel = wide      ? column_parts<double, 1>
                  : vectors ? column_parts<float, VECTOR>
                            : column_parts<float, 1>;
    dim3 grid((unsigned)((n + columns - 1) / columns), (unsigned)parts);
    kernel<<<grid, THREADS, 0, stream>>>(all, operand_of(a), operand_of(b), n, factor, mean,
                                         partial);
    ATTN_CUDA_TRY_LAUNCH("column_dot");
  }
  return attn_cuda_add_parts(y, accumulate, partial, (int)parts, stream);
}

attn_status attn_cuda_column_dot(const attn_tensor *y, bool accumulate, const attn_tensor *a,
                                 const attn_tensor *b, void *workspace, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("column_dot", "a", a, a));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("column_dot", "b", b, a));
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows("column_dot", a, &rows));
  ATTN_CUDA_CHECK(attn_cuda_check_vector("column_dot", "y", y, a->shape[a->rank - 1]));
  return attn_cuda_column_sums(y, accumulate, a, b, NULL, NULL, (double *)workspace,
                               (cudaStream_t)stream);
}

/* --- Over everything ----------------------------------------------------------------------------
 */

enum { TOTAL_THREADS = 1024 };

/* One block: thread t adds values t, t + 1024, ... */
static __global__ void __launch_bounds__(TOTAL_THREADS)
    add_all(const double *values, int64_t n, double scale, void *sum, int dtype) {
  __shared__ double shared[WARP];
  double total = 0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += TOTAL_THREADS) total += values[i];
  total = sum_group(total, TOTAL_THREADS, shared);
  if (threadIdx.x == 0) store_element<double>(sum, dtype, 0, scale * total);
}

attn_status attn_cuda_total(const double *values, int64_t n, double scale, void *sum,
                            attn_dtype dtype, attn_cuda_stream stream) {
  add_all<<<1, TOTAL_THREADS, 0, (cudaStream_t)stream>>>(values, n, scale, sum, (int)dtype);
  ATTN_CUDA_TRY_LAUNCH("total");
  return ATTN_OK;
}

enum { SQUARES_THREADS = 512, AHEAD = 4 };

template <class real, int V>
static __global__ void __launch_bounds__(SQUARES_THREADS)
    square_parts(const __grid_constant__ walk<1> all, operand x, double *partial) {
  __shared__ double shared[SQUARES_THREADS / WARP];
  uint32_t step = gridDim.x * SQUARES_THREADS;
  double total = 0;
  for (uint32_t first = blockIdx.x * SQUARES_THREADS + threadIdx.x; first < all.count;
       first += AHEAD * step) {
    raw_vector raw[AHEAD];
    real u[V];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      uint32_t index = first + j * step;
      if (index >= all.count) continue;
      const char *place = x.data + offset_of(all, locate(all, index), 0);
      if constexpr (V == VECTOR) {
        raw[j] = load_raw(place, x.dtype);
      } else {
        u[0] = load_element<real>(place, x.dtype, 0);
        total += (double)u[0] * (double)u[0];
      }
    }
    if constexpr (V == VECTOR) {
#pragma unroll
      for (int j = 0; j < AHEAD; ++j) {
        if (first + j * step >= all.count) continue;
        unpack(u, raw[j], x.dtype);
        real sum = 0;
#pragma unroll
        for (int i = 0; i < V; ++i) sum += u[i] * u[i];
        total += (double)sum;
      }
    }
  }
  total = sum_group(total, SQUARES_THREADS, shared);
  if (threadIdx.x == 0) partial[blockIdx.x] = total;
}

attn_status attn_cuda_sum_squares(const attn_tensor *x, double *sum, void *workspace,
                                  attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("sum_squares", "x", x, x));
  axes<1> all = axes_of<1>(x, x->rank, {x});
  sort_axes(&all);
  collapse(&all);
  int bytes[1] = {dtype_bytes(x->dtype)};
  int64_t count = count_of(all);
  int inner = all.rank - 1;
  bool vectors = x->dtype != ATTN_F64 && all.rank > 0 && all.shape[inner] % VECTOR == 0 &&
                 all.stride[0][inner] == 1 && (uintptr_t)x->data % 16 == 0;
  for (int i = 0; i < inner && vectors; ++i) vectors = all.stride[0][i] * bytes[0] % 16 == 0;
  if (vectors) {
    all.shape[inner] /= VECTOR;
    all.stride[0][inner] *= VECTOR;
    count /= VECTOR;
  }
  /* Indices run up to AHEAD steps past the end. */
  if (count > INT32_MAX - AHEAD * ATTN_CUDA_PARTS * SQUARES_THREADS)
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "sum_squares: %lld elements that are not contiguous",
                          (long long)count);
  auto kernel = x->dtype == ATTN_F64 ? square_parts<double, 1>
                : vectors            ? square_parts<float, VECTOR>
                                     : square_parts<float, 1>;
  kernel<<<ATTN_CUDA_PARTS, SQUARES_THREADS, 0, (cudaStream_t)stream>>>(
      make_walk(all, bytes), operand_of(x), (double *)workspace);
  ATTN_CUDA_TRY_LAUNCH("sum_squares");
  return attn_cuda_total((const double *)workspace, ATTN_CUDA_PARTS, 1, sum, ATTN_F64, stream);
}

/* Many arrays at once: for the gradients of a model one launch each would cost as much again. */

struct square_table {
  const float *x[ATTN_CUDA_TABLE];
  int64_t vectors[ATTN_CUDA_TABLE];
};

/* Part blockIdx.x of array blockIdx.y, as square_parts has it. */
static __global__ void __launch_bounds__(SQUARES_THREADS)
    square_table_parts(const __grid_constant__ square_table table, double *partial) {
  __shared__ double shared[SQUARES_THREADS / WARP];
  const uint4 *x = (const uint4 *)table.x[blockIdx.y];
  int64_t count = table.vectors[blockIdx.y], step = (int64_t)gridDim.x * SQUARES_THREADS;
  double total = 0;
  for (int64_t first = (int64_t)blockIdx.x * SQUARES_THREADS + threadIdx.x; first < count;
       first += AHEAD * step) {
    raw_vector raw[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; ++j)
      if (first + j * step < count)
        raw[j] = raw_vector{x[2 * (first + j * step)], x[2 * (first + j * step) + 1]};
#pragma unroll
    for (int j = 0; j < AHEAD; ++j) {
      if (first + j * step >= count) continue;
      float u[VECTOR], sum = 0;
      unpack(u, raw[j], ATTN_F32);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) sum += u[i] * u[i];
      total += (double)sum;
    }
  }
  total = sum_group(total, SQUARES_THREADS, shared);
  if (threadIdx.x == 0) partial[(int64_t)blockIdx.y * gridDim.x + blockIdx.x] = total;
}

/* sums[blockIdx.x] of ATTN_CUDA_PARTS parts, a thread each. */
static __global__ void __launch_bounds__(ATTN_CUDA_PARTS)
    add_square_parts(const double *partial, double *sums) {
  __shared__ double shared[ATTN_CUDA_PARTS / WARP];
  double part = partial[blockIdx.x * ATTN_CUDA_PARTS + threadIdx.x];
  part = sum_group(part, ATTN_CUDA_PARTS, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = part;
}

static bool is_plain(const attn_tensor *x, int64_t *count) {
  int64_t next = 1;
  for (int i = x->rank - 1; i >= 0; --i) {
    if (x->shape[i] != 1 && x->stride[i] != next) return false;
    next *= x->shape[i];
  }
  *count = next;
  return x->dtype == ATTN_F32 && next % VECTOR == 0 && (uintptr_t)x->data % 16 == 0;
}

attn_status attn_cuda_sum_squares_all(const attn_tensor *const *x, int count, double *sums,
                                      void *workspace, attn_cuda_stream stream) {
  double *partial = (double *)workspace;
  bool plain = true;
  int64_t elements;
  for (int i = 0; i < count; ++i) plain = plain && is_plain(x[i], &elements);
  for (int i = 0; i < count && !plain; ++i)
    ATTN_CUDA_CHECK(attn_cuda_sum_squares(x[i], &sums[i], workspace, stream));
  for (int first = 0; first < count && plain; first += ATTN_CUDA_TABLE) {
    square_table table = {};
    int many = count - first < ATTN_CUDA_TABLE ? count - first : ATTN_CUDA_TABLE;
    for (int i = 0; i < many; ++i) {
      (void)is_plain(x[first + i], &elements);
      table.x[i] = (const float *)x[first + i]->data;
      table.vectors[i] = elements / VECTOR;
    }
    square_table_parts<<<dim3(ATTN_CUDA_PARTS, (unsigned)many), SQUARES_THREADS, 0,
                         (cudaStream_t)stream>>>(table, partial);
    ATTN_CUDA_TRY_LAUNCH("sum_squares_all");
    add_square_parts<<<(unsigned)many, ATTN_CUDA_PARTS, 0, (cudaStream_t)stream>>>(partial,
                                                                                   sums + first);
    ATTN_CUDA_TRY_LAUNCH("sum_squares_all");
  }
  return ATTN_OK;
}
