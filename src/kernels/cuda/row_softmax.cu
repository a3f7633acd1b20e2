/* exp(x - max x) of each row, divided by its sum or not, and its gradient (rows.h): feature maps,
 * whose rows are short. A warp or a part of one takes a row, which is read again from the caches
 * for each of the passes. */
#include "kernels/cuda/rows.cuh"

enum { THREADS = 256 };

static __device__ inline float exponential(float x) {
  return expf(x);
}
static __device__ inline double exponential(double x) {
  return exp(x);
}

/* What a row is compared and divided by. `place` is that of the maximum, the first one. */
template <class real> struct peak {
  real greatest, factor;
  int64_t place;
};

/* The `width` lanes of a row call it together. */
template <class real>
static __device__ inline peak<real> find_peak(const char *x, const operand &form, int64_t n,
                                              int width, bool divide) {
  peak<real> found = {(real)-INFINITY, 1, 0};
  int lane = threadIdx.x % width;
  for (int64_t i = lane; i < n; i += width) {
    real value = load_element<real>(x + i * form.step, form.dtype, 0);
    if (value > found.greatest) {
      found.greatest = value;
      found.place = i;
    }
  }
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) {
    if (step >= width) break;
    real greatest = __shfl_xor_sync(~0u, found.greatest, step);
    int64_t place = __shfl_xor_sync(~0u, found.place, step);
    bool first = greatest == found.greatest && place < found.place;
    if (greatest > found.greatest || first) {
      found.greatest = greatest;
      found.place = place;
    }
  }
  if (!divide) return found;
  real sum = 0;
  for (int64_t i = lane; i < n; i += width)
    sum += exponential(load_element<real>(x + i * form.step, form.dtype, 0) - found.greatest);
  found.factor = 1 / sum_group<real>(sum, width, NULL);
  return found;
}

/* Walk: y, x. */
template <class real>
static __global__ void __launch_bounds__(THREADS)
    softmax_rows(const __grid_constant__ walk<2> rows, operand y, operand x, int64_t n, int width,
                 bool divide, real least) {
  uint32_t row = blockIdx.x * (THREADS / width) + threadIdx.x / width;
  bool inside = row < rows.count;
  coordinates c = locate(rows, inside ? row : 0); /* the others help the sums of their warp */
  const char *from = x.data + offset_of(rows, c, 1);
  char *to = y.data + offset_of(rows, c, 0);
  peak<real> found = find_peak<real>(from, x, n, width, divide);
  for (int64_t i = threadIdx.x % width; inside && i < n; i += width) {
    real value = load_element<real>(from + i * x.step, x.dtype, 0);
    real p = exponential(value - found.greatest) * found.factor;
    store_element<real>(to + i * y.step, y.dtype, 0, p < least ? least : p);
  }
}

/* Walk: dx, x, dy. With p = y, g = dy where y is above the floor, else 0: p (g - p . g), or p g and
 * -p . g for the maximum. */
template <class real>
static __global__ void __launch_bounds__(THREADS)
    softmax_backward_rows(const __grid_constant__ walk<3> rows, operand dx, bool accumulate,
                          operand x, operand dy, int64_t n, int width, bool divide, real least) {
  uint32_t row = blockIdx.x * (THREADS / width) + threadIdx.x / width;
  bool inside = row < rows.count;
  coordinates c = locate(rows, inside ? row : 0);
  const char *from = x.data + offset_of(rows, c, 1), *upstream = dy.data + offset_of(rows, c, 2);
  char *to = dx.data + offset_of(rows, c, 0);
  peak<real> found = find_peak<real>(from, x, n, width, divide);
  real pull = 0;
  for (int64_t i = threadIdx.x % width; i < n; i += width) {
    real value = load_element<real>(from + i * x.step, x.dtype, 0);
    real p = exponential(value - found.greatest) * found.factor;
    if (!(p < least)) pull += p * load_element<real>(upstream + i * dy.step, dy.dtype, 0);
  }
  pull = sum_group<real>(pull, width, NULL);
  for (int64_t i = threadIdx.x % width; inside && i < n; i += width) {
    real value = load_element<real>(from + i * x.step, x.dtype, 0);
    real p = exponential(value - found.greatest) * found.factor;
    real g = p < least ? (real)0 : load_element<real>(upstream + i * dy.step, dy.dtype, 0);
    real out = p * (divide ? g - pull : g);
    if (!divide && i == found.place) out -= pull;
    if (accumulate) out += load_element<real>(to + i * dx.step, dx.dtype, 0);
    store_element<real>(to + i * dx.step, dx.dtype, 0, out);
  }
}

/* Lanes of a row, and blocks for all rows. */
static int lanes_of(int64_t n) {
  return power_of_two_from(n < WARP ? n : WARP);
}
static unsigned blocks_of(int64_t rows, int width) {
  int64_t each = THREADS / width;
  return (unsigned)((rows + each - 1) / each);
}

attn_status attn_cuda_row_softmax(const attn_tensor *y, const attn_tensor *x, bool divide,
                                  double floor, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_softmax", "x", x, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_softmax", "y", y, x));
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows("row_softmax", x, &rows));
  int64_t n = x->shape[x->rank - 1];
  if (rows == 0 || n == 0) return ATTN_OK;
  walk<2> all = walk_rows<2>(x, {y, x});
  int width = lanes_of(n);
  cudaStream_t queue = (cudaStream_t)stream;
  if (is_wide(x) || is_wide(y))
    softmax_rows<double><<<blocks_of(rows, width), THREADS, 0, queue>>>(
        all, operand_of(y), operand_of(x), n, width, divide, floor);
  else
    softmax_rows<float><<<blocks_of(rows, width), THREADS, 0, queue>>>(
        all, operand_of(y), operand_of(x), n, width, divide, (float)floor);
  ATTN_CUDA_TRY_LAUNCH("row_softmax");
  return ATTN_OK;
}

attn_status attn_cuda_row_softmax_backward(const attn_tensor *dx, bool accumulate,
                                           const attn_tensor *x, const attn_tensor *dy, bool divide,
                                           double floor, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_softmax_backward", "x", x, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_softmax_backward", "dx", dx, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand("row_softmax_backward", "dy", dy, x));
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_count_rows("row_softmax_backward", x, &rows));
  int64_t n = x->shape[x->rank - 1];
  if (rows == 0 || n == 0) return ATTN_OK;
  walk<3> all = walk_rows<3>(x, {dx, x, dy});
  int width = lanes_of(n);
  cudaStream_t queue = (cudaStream_t)stream;
  if (is_wide(x) || is_wide(dx) || is_wide(dy))
    softmax_backward_rows<double><<<blocks_of(rows, width), THREADS, 0, queue>>>(
        all, operand_of(dx), accumulate, operand_of(x), operand_of(dy), n, width, divide, floor);
  else
    softmax_backward_rows<float><<<blocks_of(rows, width), THREADS, 0, queue>>>(
        all, operand_of(dx), accumulate, operand_of(x), operand_of(dy), n, width, divide,
        (float)floor);
  ATTN_CUDA_TRY_LAUNCH("row_softmax_backward");
  return ATTN_OK;
}
