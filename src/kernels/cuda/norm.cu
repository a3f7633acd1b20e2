/* RMS and layer norms over rows, forward and backward (rows.h).
 *
 * Rows that vectors of eight elements suit stay in registers: `width` threads share one, each with
 * K vectors, so that x (and dy) are read once. Backward gives each part of the rows to one block,
 * which keeps its column sums of d_weight and d_bias in registers all the way. Other rows (float64,
 * gaps between elements, odd or very long) take kernels that read them again. */
#include "kernels/cuda/norm_rows.cuh"
#include "kernels/cuda/reduce.cuh"

enum {
  THREADS = 256,
  FORWARD_VECTORS = 4 * 1024, /* of a row: what a block's registers hold */
  BACKWARD_VECTORS = 4 * 512,
};

/* --- Forward ------------------------------------------------------------------------------------
 */

struct norm_operands {
  operand y, x, weight, bias;
  int64_t n;
  double divisor, inverse /* 1 / divisor */, epsilon;
  double *factor, *mean; /* a number a row, or NULL */
};

/* Walk: y, x. */
template <int K, bool LAYER>
static __global__ void __launch_bounds__(1024)
    norm_vectors(const __grid_constant__ walk<2> rows, const __grid_constant__ norm_operands all,
                 int width) {
  __shared__ float shared[2][WARP];
  uint32_t row = blockIdx.x * (blockDim.x / width) + threadIdx.x / width;
  bool inside = row < rows.count; /* all lanes take part in the sums */
  int thread = threadIdx.x % width, vectors = (int)(all.n / VECTOR);
  coordinates c = locate(rows, inside ? row : 0);
  const char *from = all.x.data + offset_of(rows, c, 1);
  raw_vector raw[K];
  float x[K][VECTOR];
#pragma unroll
  for (int k = 0; k < K; ++k)
    if (thread + k * width < vectors)
      raw[k] = load_raw(from + (thread + k * width) * VECTOR * all.x.step, all.x.dtype);
  float sum = 0, squares = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (thread + k * width >= vectors) continue;
    unpack(x[k], raw[k], all.x.dtype);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (LAYER)
        sum += x[k][i];
      else
        squares += x[k][i] * x[k][i];
    }
  }
  float mean = 0;
  if (LAYER) {
    mean = sum_group(sum, width, shared[0]) * (float)all.inverse;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if (thread + k * width >= vectors) continue;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        x[k][i] -= mean;
        squares += x[k][i] * x[k][i];
      }
    }
  }
  squares = sum_group(squares, width, shared[1]);
  /* float64 roots and quotients in every thread would take longer than the row's memory. */
  float factor = 1 / sqrtf(squares * (float)all.inverse + (float)all.epsilon);
  if (!inside) return;
  if (thread == 0) {
    if (all.factor) all.factor[row] = (double)factor;
    if (LAYER) all.mean[row] = (double)mean;
  }
  char *to = all.y.data + offset_of(rows, c, 0);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    int at = (thread + k * width) * VECTOR;
    if (at >= all.n) continue;
    float w[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[k][i] *= factor;
    if (all.weight.data) {
      load_all<float, VECTOR>(w, all.weight.data + at * all.weight.step, all.weight.dtype);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) x[k][i] *= w[i];
    }
    if (LAYER && all.bias.data) {
      load_all<float, VECTOR>(w, all.bias.data + at * all.bias.step, all.bias.dtype);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) x[k][i] += w[i];
    }
    store_vector(to + at * all.y.step, all.y.dtype, x[k]);
  }
}

/* One block a row. */
template <class real>
static __global__ void __launch_bounds__(THREADS)
    norm_elements(const __grid_constant__ walk<2> rows, const __grid_constant__ norm_operands all) {
  __shared__ real shared[2][THREADS / WARP];
  uint32_t row = blockIdx.x;
  coordinates c = locate(rows, row);
  const char *from = all.x.data + offset_of(rows, c, 1);
  char *to = all.y.data + offset_of(rows, c, 0);
  auto x_at = [&](int64_t i) { return load_element<real>(from + i * all.x.step, all.x.dtype, 0); };
  real mean = 0, squares = 0;
  if (all.mean) {
    real sum = 0;
    for (int64_t i = threadIdx.x; i < all.n; i += THREADS) sum += x_at(i);
    double exact = (double)sum_group(sum, THREADS, shared[0]) / (double)all.n;
    mean = (real)exact;
    if (threadIdx.x == 0) all.mean[row] = exact;
  }
  for (int64_t i = threadIdx.x; i < all.n; i += THREADS) {
    real u = x_at(i) - mean;
    squares += u * u;
  }
  squares = sum_group(squares, THREADS, shared[1]);
  double exact = 1 / sqrt((double)squares / all.divisor + all.epsilon);
  if (threadIdx.x == 0 && all.factor) all.factor[row] = exact;
  real factor = (real)exact;
  for (int64_t i = threadIdx.x; i < all.n; i += THREADS) {
    real value = factor * (x_at(i) - mean);
    if (all.weight.data)
      value *= load_element<real>(all.weight.data + i * all.weight.step, all.weight.dtype, 0);
    if (all.bias.data)
      value += load_element<real>(all.bias.data + i * all.bias.step, all.bias.dtype, 0);
    store_element<real>(to + i * all.y.step, all.y.dtype, 0, value);
  }
}

attn_status attn_cuda_norm(const attn_tensor *y, const attn_tensor *x, const attn_tensor *weight,
                           const attn_tensor *bias, double divisor, double epsilon, double *factor,
                           double *mean, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("norm", "x", x, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("norm", "y", y, x));
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows("norm", x, &rows));
  int64_t n = x->shape[x->rank - 1];
  ATTN_CUDA_CHECK(attn_cuda_check_vector("norm", "weight", weight, n));
  ATTN_CUDA_CHECK(attn_cuda_check_vector("norm", "bias", bias, n));
  if (bias && !mean)
    return attn_cuda_fail(ATTN_INVALID_ARGUMENT, "norm: a bias belongs to layer norm, which needs "
                                                 "a mean");
  cudaStream_t queue = (cudaStream_t)stream;
  if (rows == 0 || n == 0) return ATTN_OK;
  if (!mean && attn_cuda_rms_rows(y, x, weight, rows, divisor, epsilon, factor, queue)) {
    ATTN_CUDA_TRY_LAUNCH("norm");
    return ATTN_OK;
  }
  norm_operands all = {operand_of(y),
                       operand_of(x),
                       operand_of(weight),
                       operand_of(bias),
                       n,
                       mean ? (double)n : divisor,
                       1 / (mean ? (double)n : divisor),
                       epsilon,
                       factor,
                       mean};
  walk<2> walk_all = walk_rows<2>(x, {y, x});
  bool wide = is_wide(y) || is_wide(x) || is_wide(weight) || is_wide(bias);
  int64_t vectors = n / VECTOR;
  if (wide || vectors > FORWARD_VECTORS || !rows_are_vectors(x) || !rows_are_vectors(y) ||
      !rows_are_vectors(weight) || !rows_are_vectors(bias)) {
    auto kernel = wide ? norm_elements<double> : norm_elements<float>;
    kernel<<<(unsigned)rows, THREADS, 0, queue>>>(walk_all, all);
    ATTN_CUDA_TRY_LAUNCH("norm");
    return ATTN_OK;
  }
  /* Up to four vectors a thread: a warp at most while that is enough. */
  int k = vectors <= WARP ? 1 : vectors <= 2 * WARP ? 2 : 4;
  int width = power_of_two_from((vectors + k - 1) / k);
  int threads = width > THREADS ? width : THREADS, each = threads / width;
  auto kernel = mean ? (k == 1   ? norm_vectors<1, true>
                        : k == 2 ? norm_vectors<2, true>
                                 : norm_vectors<4, true>)
                     : (k == 1   ? norm_vectors<1, false>
                        : k == 2 ? norm_vectors<2, false>
                                 : norm_vectors<4, false>);
  kernel<<<(unsigned)((rows + each - 1) / each), threads, 0, queue>>>(walk_all, all, width);
  ATTN_CUDA_TRY_LAUNCH("norm");
  return ATTN_OK;
}

/* --- Backward -----------------------------------------------------------------------------------
 *
 * With u = dy (.) weight and the normalised row h = r (x - mean), mean = 0 for RMS norm:
 *   RMS norm:    dx = r u - r^3 x (u . x) / divisor
 *   layer norm:  dx = r (u - sum u / n - h (u . h) / n)
 *   d_weight = sum over rows of h (.) dy, d_bias = sum over rows of dy */

struct norm_gradients {
  operand dx, x, weight, dy;
  bool accumulate;
  int64_t n;
  double divisor, inverse /* 1 / divisor */;
  const double *factor, *mean;
  double *d_weight, *d_bias; /* [parts, n], or NULL */
};

/* A vector as it lies in memory, of any dtype or of those of two bytes. */
static __device__ inline void load_as(raw_vector &raw, const void *place, int dtype) {
  raw = load_raw(place, dtype);
}
static __device__ inline void load_as(uint4 &raw, const void *place, int) {
  raw = *(const uint4 *)place;
}
static __device__ inline void unpack_as(float *x, const raw_vector &raw, int dtype) {
  unpack(x, raw, dtype);
}
static __device__ inline void unpack_as(float *x, const uint4 &raw, int dtype) {
  unpack(x, raw_vector{raw, raw}, dtype == ATTN_BF16 ? ATTN_BF16 : ATTN_F16);
}

/* A group's own barrier, so that groups do not wait for each other. The numbers are constants for
 * the sake of occupancy: a block reserves every barrier that it could name. */
static __device__ inline void meet(int group, int width) {
  switch (group) {
  case 0: asm volatile("bar.sync 1, %0;" ::"r"(width) : "memory"); break;
  case 1: asm volatile("bar.sync 2, %0;" ::"r"(width) : "memory"); break;
  case 2: asm volatile("bar.sync 3, %0;" ::"r"(width) : "memory"); break;
  default: asm volatile("bar.sync 4, %0;" ::"r"(width) : "memory");
  }
}

/* Blocks of a processor: two where the registers hold them. */
template <int SIZE, int K, bool LAYER, class vector> constexpr int blocks_at_once() {
  bool narrow = sizeof(vector) == 16;
  return narrow && (K == 1 || (SIZE == 256 && (K == 2 || !LAYER))) ? 2 : 1;
}

/* Block p does the rows of part p, groups of `width` threads take them in turn. x and dy stay as
 * they were read, which takes half the registers for bfloat16. Walk: dx, x, dy. */
template <int SIZE, int K, bool LAYER, class vector>
static __global__ void __launch_bounds__(SIZE, blocks_at_once<SIZE, K, LAYER, vector>())
    norm_backward_vectors(const __grid_constant__ walk<3> rows,
                          const __grid_constant__ norm_gradients all, int width) {
  constexpr bool ALONE = SIZE == 512 && K == 4;            /* one group: n > 256 K VECTOR */
  __shared__ float columns[ALONE ? 1 : SIZE * K * VECTOR]; /* [groups, n] */
  __shared__ float shared[2][SIZE / WARP];
  int groups = SIZE / width, group = threadIdx.x / width;
  int thread = threadIdx.x % width, n = (int)all.n;
  uint32_t from = (uint32_t)((uint64_t)rows.count * blockIdx.x / gridDim.x);
  uint32_t to = (uint32_t)((uint64_t)rows.count * (blockIdx.x + 1) / gridDim.x);
  auto barrier = [=] { meet(group, width); };
  float by_column[K][VECTOR] = {}, bias_column[LAYER ? K : 1][VECTOR] = {};
  int turn = 0; /* which half of `shared` */
  for (uint32_t first = from; first < to; first += groups, turn ^= 1) {
    uint32_t row = first + group;
    bool inside = row < to;
    if (!inside) row = first; /* all lanes take part in the sums */
    coordinates c = locate(rows, row);
    const char *x_row = all.x.data + offset_of(rows, c, 1);
    const char *dy_row = all.dy.data + offset_of(rows, c, 2);
    vector raw_x[K], raw_dy[K];
#pragma unroll
    for (int k = 0; k < K; ++k) {
      int at = (thread + k * width) * VECTOR;
      if (at >= n) continue;
      load_as(raw_x[k], x_row + at * all.x.step, all.x.dtype);
      load_as(raw_dy[k], dy_row + at * all.dy.step, all.dy.dtype);
    }
    float r = (float)all.factor[row], mean = LAYER ? (float)all.mean[row] : 0;
    /* Vector k: h (x itself for RMS norm), dy and u. */
    auto take = [&](int k, float(&h)[VECTOR], float(&dy)[VECTOR], float(&u)[VECTOR]) {
      int at = (thread + k * width) * VECTOR;
      unpack_as(h, raw_x[k], all.x.dtype);
      unpack_as(dy, raw_dy[k], all.dy.dtype);
      if (all.weight.data)
        load_all<float, VECTOR>(u, all.weight.data + at * all.weight.step, all.weight.dtype);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        u[i] = all.weight.data ? dy[i] * u[i] : dy[i];
        if (LAYER) h[i] = r * (h[i] - mean);
      }
    };
    float sum = 0, projection = 0;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      if ((thread + k * width) * VECTOR >= n) continue;
      float h[VECTOR], dy[VECTOR], u[VECTOR];
      take(k, h, dy, u);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        if (inside) {
          by_column[k][i] += (LAYER ? h[i] : r * h[i]) * dy[i];
          if (LAYER) bias_column[k][i] += dy[i];
        }
        projection += h[i] * u[i];
        if (LAYER) sum += u[i];
      }
    }
    if (!all.dx.data) continue;
    projection = sum_group(projection, width, shared[LAYER ? 0 : turn], barrier);
    if (LAYER) sum = sum_group(sum, width, shared[1], barrier);
    if (!inside) continue;
    float shift = r * sum * (float)all.inverse;
    float pull = (LAYER ? r : r * r * r) * projection * (float)all.inverse;
    char *dx_row = all.dx.data + offset_of(rows, c, 0);
#pragma unroll
    for (int k = 0; k < K; ++k) {
      int at = (thread + k * width) * VECTOR;
      if (at >= n) continue;
      float h[VECTOR], dy[VECTOR], u[VECTOR], dx[VECTOR] = {};
      take(k, h, dy, u);
      char *place = dx_row + at * all.dx.step;
      if (all.accumulate) load_all<float, VECTOR>(dx, place, all.dx.dtype);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) dx[i] += r * u[i] - (LAYER ? shift : 0) - pull * h[i];
      store_vector(place, all.dx.dtype, dx);
    }
  }
  /* The groups' column sums, added in the order of the groups. */
  auto put = [&](double *target, float(&column)[K][VECTOR]) {
    if (!target) return;
#pragma unroll
    for (int k = 0; k < K; ++k)
      if ((thread + k * width) * VECTOR < n)
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          int at = (thread + k * width) * VECTOR + i;
          if (ALONE)
            target[(int64_t)blockIdx.x * n + at] = (double)column[k][i];
          else
            columns[group * n + at] = column[k][i];
        }
    if (ALONE) return;
    __syncthreads();
    for (int at = threadIdx.x; at < n; at += SIZE) {
      double total = 0;
      for (int g = 0; g < groups; ++g) total += (double)columns[g * n + at];
      target[(int64_t)blockIdx.x * n + at] = total;
    }
    __syncthreads();
  };
  put(all.d_weight, by_column);
  if constexpr (LAYER) put(all.d_bias, bias_column);
}

/* One block a row: dx only. */
template <class real>
static __global__ void __launch_bounds__(THREADS)
    norm_backward_elements(const __grid_constant__ walk<3> rows,
                           const __grid_constant__ norm_gradients all) {
  __shared__ real shared[2][THREADS / WARP];
  uint32_t row = blockIdx.x;
  coordinates c = locate(rows, row);
  char *dx_row = all.dx.data + offset_of(rows, c, 0);
  const char *x_row = all.x.data + offset_of(rows, c, 1);
  const char *dy_row = all.dy.data + offset_of(rows, c, 2);
  double exact = all.factor[row];
  real r = (real)exact, mean = all.mean ? (real)all.mean[row] : 0;
  auto normal_at = [&](int64_t i) {
    return r * (load_element<real>(x_row + i * all.x.step, all.x.dtype, 0) - mean);
  };
  auto pulled_at = [&](int64_t i) {
    real value = load_element<real>(dy_row + i * all.dy.step, all.dy.dtype, 0);
    if (all.weight.data)
      value *= load_element<real>(all.weight.data + i * all.weight.step, all.weight.dtype, 0);
    return value;
  };
  real sum = 0, projection = 0;
  for (int64_t i = threadIdx.x; i < all.n; i += THREADS) {
    real u = pulled_at(i);
    sum += u;
    projection += u * normal_at(i);
  }
  projection = sum_group(projection, THREADS, shared[0]);
  sum = sum_group(sum, THREADS, shared[1]);
  real shift = all.mean ? (real)((double)sum / (double)all.n) : 0;
  real pull = (real)((double)projection / all.divisor);
  for (int64_t i = threadIdx.x; i < all.n; i += THREADS) {
    char *place = dx_row + i * all.dx.step;
    real value = r * (pulled_at(i) - shift - normal_at(i) * pull);
    if (all.accumulate) value += load_element<real>(place, all.dx.dtype, 0);
    store_element<real>(place, all.dx.dtype, 0, value);
  }
}

typedef void norm_backward_kernel(const walk<3>, const norm_gradients, int);

template <class vector> static norm_backward_kernel *choose_backward(int k, int size, bool layer) {
  if (k == 1)
    return layer ? norm_backward_vectors<512, 1, true, vector>
                 : norm_backward_vectors<512, 1, false, vector>;
  if (k == 2) return norm_backward_vectors<256, 2, true, vector>;
  if (size == 256)
    return layer ? norm_backward_vectors<256, 4, true, vector>
                 : norm_backward_vectors<256, 4, false, vector>;
  return layer ? norm_backward_vectors<512, 4, true, vector>
               : norm_backward_vectors<512, 4, false, vector>;
}

static attn_status norm_backward(const attn_tensor *dx, bool accumulate,
                                 const attn_tensor *d_weight, const attn_tensor *d_bias,
                                 const attn_tensor *x, const attn_tensor *weight,
                                 const attn_tensor *dy, double divisor, const double *factor,
                                 const double *mean, void *workspace, attn_cuda_stream stream) {
  static const char function[] = "norm_backward";
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "x", x, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "dy", dy, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "dx", dx, x));
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows(function, x, &rows));
  int64_t n = x->shape[x->rank - 1];
  ATTN_CUDA_CHECK(attn_cuda_check_vector(function, "weight", weight, n));
  ATTN_CUDA_CHECK(attn_cuda_check_vector(function, "d_weight", d_weight, n));
  ATTN_CUDA_CHECK(attn_cuda_check_vector(function, "d_bias", d_bias, n));
  if (n == 0) return ATTN_OK;
  cudaStream_t queue = (cudaStream_t)stream;
  double *partial = (double *)workspace;
  bool wide = is_wide(dx) || is_wide(d_weight) || is_wide(d_bias) || is_wide(x) ||
              is_wide(weight) || is_wide(dy);
  norm_gradients all = {operand_of(dx),
                        operand_of(x),
                        operand_of(weight),
                        operand_of(dy),
                        accumulate,
                        n,
                        mean ? (double)n : divisor,
                        1 / (mean ? (double)n : divisor),
                        factor,
                        mean,
                        d_weight ? partial : NULL,
                        d_bias ? partial + ATTN_CUDA_PARTS * n : NULL};
  walk<3> walk_all = walk_rows<3>(x, {dx, x, dy});
  int64_t vectors = n / VECTOR;
  /* d_bias without a mean is RMS norm with a bias, which there is not; the sums still serve. */
  if (rows == 0 || wide || vectors > BACKWARD_VECTORS || (d_bias && !mean) ||
      !rows_are_vectors(x) || !rows_are_vectors(dy) || !rows_are_vectors(dx) ||
      !rows_are_vectors(weight)) {
    /* The columns first: dx may be the memory of x or dy. */
    if (d_weight)
      ATTN_CUDA_CHECK(attn_cuda_column_sums(d_weight, false, x, dy, factor, mean, partial, queue));
    if (d_bias)
      ATTN_CUDA_CHECK(attn_cuda_column_sums(d_bias, false, dy, NULL, NULL, NULL,
                                            partial + ATTN_CUDA_PARTS * n, queue));
    if (!dx || rows == 0) return ATTN_OK;
    auto kernel = wide ? norm_backward_elements<double> : norm_backward_elements<float>;
    kernel<<<(unsigned)rows, THREADS, 0, queue>>>(walk_all, all);
    ATTN_CUDA_TRY_LAUNCH("norm_backward");
    return ATTN_OK;
  }
  /* Narrow rows: many at once, so that enough loads are in flight. Layer norm has twice the column
   * sums in registers. */
  int k = vectors <= WARP ? 1 : mean && vectors <= 512 ? 2 : 4;
  int width = power_of_two_from((vectors + k - 1) / k);
  int size = k == 1 || width > 256 ? 512 : 256, groups = size / width;
  int64_t parts = (rows + groups - 1) / groups;
  if (parts > ATTN_CUDA_PARTS) parts = ATTN_CUDA_PARTS;
  bool narrow = x->dtype != ATTN_F32 && dy->dtype != ATTN_F32;
  auto kernel =
      narrow ? choose_backward<uint4>(k, size, mean) : choose_backward<raw_vector>(k, size, mean);
  kernel<<<(unsigned)parts, size, 0, queue>>>(walk_all, all, width);
  ATTN_CUDA_TRY_LAUNCH("norm_backward");
  if (d_weight)
    ATTN_CUDA_CHECK(attn_cuda_add_parts(d_weight, false, all.d_weight, (int)parts, queue));
  if (d_bias) ATTN_CUDA_CHECK(attn_cuda_add_parts(d_bias, false, all.d_bias, (int)parts, queue));
  return ATTN_OK;
}

attn_status attn_cuda_norm_backward(const attn_tensor *dx, bool accumulate, const attn_tensor *copy,
                                    const attn_tensor *d_weight, const attn_tensor *d_bias,
                                    const attn_tensor *x, const attn_tensor *weight,
                                    const attn_tensor *dy, double divisor, const double *factor,
                                    const double *mean, void *workspace, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("norm_backward", "copy", copy, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("norm_backward", "dx", dx, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("norm_backward", "dy", dy, x));
  ATTN_CUDA_CHECK(attn_cuda_check_vector("norm_backward", "weight", weight, x->shape[x->rank - 1]));
  if (dx && !d_weight && !d_bias && !mean &&
      attn_cuda_rms_backward_rows(dx, accumulate, copy, x, weight, dy, divisor, factor,
                                  (cudaStream_t)stream)) {
    ATTN_CUDA_TRY_LAUNCH("norm_backward");
    return ATTN_OK;
  }
  ATTN_CUDA_CHECK(norm_backward(dx, accumulate, d_weight, d_bias, x, weight, dy, divisor, factor,
                                mean, workspace, stream));
  return copy && dx ? attn_cuda_add(copy, 1, dx, 0, NULL, stream) : ATTN_OK;
}
