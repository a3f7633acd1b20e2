/* Windows of exact attention beside a linear part (kernels/window.h), forward and backward: a warp
 * has a head of a row, its lanes the channels. graph/window_pass.c has the same for the processor.
 */
#include "kernels/cuda/rows.cuh"

namespace {

enum { THREADS = 128 };

/* An operand of [rows, heads (, channels)]: strides in bytes; channels lie together. */
struct heads_operand {
  char *data;
  int dtype;
  int64_t row, head;
};

__device__ inline char *place_of(const heads_operand &x, int64_t r, int64_t h) {
  return x.data + r * x.row + h * x.head;
}

template <class real> __device__ inline real number(const heads_operand &x, int64_t r, int64_t h) {
  return load_element<real>(place_of(x, r, h), x.dtype, 0);
}

template <class real> __device__ inline real sum_lanes(real value) {
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

template <class real>
__device__ inline real dot(const char *a, int a_dtype, const char *b, int b_dtype, int n) {
  real sum = 0;
  for (int c = threadIdx.x % WARP; c < n; c += WARP)
    sum += load_element<real>(a, a_dtype, c) * load_element<real>(b, b_dtype, c);
  return sum_lanes(sum);
}

/* The warp's row and head, or false for all of the warp. */
__device__ inline bool take_item(int64_t rows, int64_t heads, int64_t *r, int64_t *h) {
  int64_t item = (int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  *r = item / heads;
  *h = item % heads;
  return *r < rows;
}

unsigned blocks_of(int64_t items) {
  const int64_t each = THREADS / WARP;
  return (unsigned)((items + each - 1) / each);
}

heads_operand operand_of_heads(const attn_tensor *x) {
  heads_operand all = {};
  if (!x) return all;
  int64_t bytes = dtype_bytes(x->dtype);
  all.data = (char *)x->data;
  all.dtype = (int)x->dtype;
  all.row = x->stride[0] * bytes;
  all.head = x->rank > 1 ? x->stride[1] * bytes : 0;
  return all;
}

/* --- The greatest score ----------------------------------------------------------------------- */

struct greatest_problem {
  heads_operand q, k, greatest, dg, dq, dk;
  int32_t *place; /* [rows, heads] */
  const int32_t *first, *end, *from, *until;
  int64_t rows, keys, heads, kv_heads;
  int dim;
  double scale;
};

template <class real>
__global__ void __launch_bounds__(THREADS)
    find_greatest(const __grid_constant__ greatest_problem p) {
  int64_t r, h;
  if (!take_item(p.rows, p.heads, &r, &h)) return;
  int64_t key = h * p.kv_heads / p.heads;
  const char *q = place_of(p.q, r, h);
  real greatest = 0;
  int32_t place = -1;
  for (int32_t j = p.first[r]; j < p.end[r]; ++j) {
    real score = (real)p.scale * dot<real>(q, p.q.dtype, place_of(p.k, j, key), p.k.dtype, p.dim);
    if (place >= 0 && !(score > greatest)) continue;
    greatest = score;
    place = j;
  }
  if (threadIdx.x % WARP) return;
  store_element<real>(place_of(p.greatest, r, h), p.greatest.dtype, 0, greatest);
  p.place[r * p.heads + h] = place;
}

template <class real>
__global__ void __launch_bounds__(THREADS)
    greatest_to_queries(const __grid_constant__ greatest_problem p) {
  int64_t r, h;
  if (!take_item(p.rows, p.heads, &r, &h)) return;
  const char *k = place_of(p.k, p.place[r * p.heads + h], h * p.kv_heads / p.heads);
  char *to = place_of(p.dq, r, h);
  real factor = (real)p.scale * number<real>(p.dg, r, h);
  for (int c = threadIdx.x % WARP; c < p.dim; c += WARP)
    store_element<real>(to, p.dq.dtype, c, factor * load_element<real>(k, p.k.dtype, c));
}

/* A warp has a key; queries in their order, so that the sum's order is fixed. */
template <class real>
__global__ void __launch_bounds__(THREADS)
    greatest_to_keys(const __grid_constant__ greatest_problem p) {
  int64_t j, key;
  if (!take_item(p.keys, p.kv_heads, &j, &key)) return;
  int64_t group = p.heads / p.kv_heads;
  char *to = place_of(p.dk, j, key);
  for (int start = 0; start < p.dim; start += WARP) {
    int c = start + threadIdx.x % WARP;
    real sum = 0;
    for (int64_t r = p.from[j]; r < p.until[j]; ++r)
      for (int64_t h = key * group; h < (key + 1) * group; ++h) {
        if (p.place[r * p.heads + h] != j || c >= p.dim) continue;
        sum += (real)p.scale * number<real>(p.dg, r, h) *
               load_element<real>(place_of(p.q, r, h), p.q.dtype, c);
      }
    if (c < p.dim) store_element<real>(to, p.dk.dtype, c, sum);
  }
}

greatest_problem describe(const attn_window_ranges *ranges, const attn_greatest_tensors *x) {
  greatest_problem p = {};
  p.q = operand_of_heads(x->q);
  p.k = operand_of_heads(x->k);
  p.greatest = operand_of_heads(x->greatest);
  p.dg = operand_of_heads(x->dg);
  p.dq = operand_of_heads(x->dq);
  p.dk = operand_of_heads(x->dk);
  p.place = (int32_t *)x->place->data;
  p.first = ranges->first, p.end = ranges->end;
  p.from = ranges->from, p.until = ranges->until;
  p.rows = x->q->shape[0], p.keys = x->k->shape[0];
  p.heads = x->q->shape[1], p.kv_heads = x->k->shape[1];
  p.dim = (int)x->q->shape[2];
  p.scale = x->scale;
  return p;
}

attn_status check_heads(const char *name, const attn_tensor *x) {
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "rows of heads", x, x));
  if (x->rank == 3 && (x->stride[2] == 1 || x->shape[2] == 1) && x->shape[1] > 0) return ATTN_OK;
  return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: expected [rows, heads, n] with n contiguous",
                        name);
}

attn_status check_greatest(const char *name, const attn_greatest_tensors *x, bool back) {
  ATTN_CUDA_CHECK(check_heads(name, x->q));
  ATTN_CUDA_CHECK(check_heads(name, x->k));
  if (x->q->shape[1] % x->k->shape[1] || x->q->shape[2] != x->k->shape[2])
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: q and k do not fit each other", name);
  attn_tensor leading = *x->q;
  leading.rank = 2;
  if (!back) return attn_cuda_check_operand(name, "greatest", x->greatest, &leading);
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "dg", x->dg, &leading));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "dq", x->dq, x->q));
  return attn_cuda_check_operand(name, "dk", x->dk, x->k);
}

/* --- Both parts under one normaliser ---------------------------------------------------------- */

struct join_problem {
  heads_operand window, linear, lse, greatest, factor, y, dy, d_window, d_linear, d_log;
  int64_t rows, heads;
  int dim, width;
};

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}
__device__ inline float logarithm(float x) {
  return logf(x);
}
__device__ inline double logarithm(double x) {
  return log(x);
}

/* The window's share of the weights, and 1 / (e + d). */
template <class real>
__device__ inline void weigh(const join_problem &p, int64_t r, int64_t h, real *share,
                             real *factor) {
  real d = load_element<real>(place_of(p.linear, r, h), p.linear.dtype, p.dim);
  *share = 1;
  *factor = 0;
  if (!(d > 0)) return;
  real odds = number<real>(p.factor, h, 0) +
              (number<real>(p.lse, r, h) - number<real>(p.greatest, r, h)) - logarithm(d);
  *share = 1 / (1 + exponential(-odds));
  *factor = 1 / (1 + exponential(odds)) / d;
}

template <class real>
__global__ void __launch_bounds__(THREADS) join_parts(const __grid_constant__ join_problem p) {
  int64_t r, h;
  if (!take_item(p.rows, p.heads, &r, &h)) return;
  real share, factor;
  weigh(p, r, h, &share, &factor);
  const char *window = place_of(p.window, r, h), *linear = place_of(p.linear, r, h);
  char *y = place_of(p.y, r, h);
  for (int c = threadIdx.x % WARP; c < p.dim; c += WARP)
    store_element<real>(y, p.y.dtype, c,
                        share * load_element<real>(window, p.window.dtype, c) +
                            factor * load_element<real>(linear, p.linear.dtype, c));
}

template <class real>
__global__ void __launch_bounds__(THREADS) join_back(const __grid_constant__ join_problem p) {
  int64_t r, h;
  if (!take_item(p.rows, p.heads, &r, &h)) return;
  real share, factor;
  weigh(p, r, h, &share, &factor);
  const char *dy = place_of(p.dy, r, h);
  real window = dot<real>(dy, p.dy.dtype, place_of(p.window, r, h), p.window.dtype, p.dim);
  real linear = factor * dot<real>(dy, p.dy.dtype, place_of(p.linear, r, h), p.linear.dtype, p.dim);
  char *d_window = place_of(p.d_window, r, h), *d_linear = place_of(p.d_linear, r, h);
  int lane = threadIdx.x % WARP;
  for (int c = lane; c < p.width; c += WARP) {
    real upstream = c < p.dim ? load_element<real>(dy, p.dy.dtype, c) : (real)0;
    if (c < p.dim) store_element<real>(d_window, p.d_window.dtype, c, share * upstream);
    real rest = c == p.dim ? -factor * (share * window + linear) : (real)0;
    store_element<real>(d_linear, p.d_linear.dtype, c, c < p.dim ? factor * upstream : rest);
  }
  if (lane == 0)
    store_element<real>(place_of(p.d_log, r, h), p.d_log.dtype, 0,
                        share * (window - share * window - linear));
}

join_problem describe(const attn_join_tensors *x) {
  join_problem p = {};
  p.window = operand_of_heads(x->window);
  p.linear = operand_of_heads(x->linear);
  p.lse = operand_of_heads(x->lse);
  p.greatest = operand_of_heads(x->greatest);
  p.factor = operand_of_heads(x->factor);
  p.y = operand_of_heads(x->y);
  p.dy = operand_of_heads(x->dy);
  p.d_window = operand_of_heads(x->d_window);
  p.d_linear = operand_of_heads(x->d_linear);
  p.d_log = operand_of_heads(x->d_log);
  p.rows = x->window->shape[0], p.heads = x->window->shape[1];
  p.dim = (int)x->window->shape[2], p.width = (int)x->linear->shape[2];
  return p;
}

attn_status check_join(const char *name, const attn_join_tensors *x, bool back) {
  ATTN_CUDA_CHECK(check_heads(name, x->window));
  ATTN_CUDA_CHECK(check_heads(name, x->linear));
  if (x->linear->shape[2] <= x->window->shape[2])
    return attn_cuda_fail(ATTN_INVALID_SHAPE, "%s: the linear part has no sums of weights", name);
  attn_tensor leading = *x->window;
  leading.rank = 2;
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "lse", x->lse, &leading));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "greatest", x->greatest, &leading));
  ATTN_CUDA_CHECK(attn_cuda_check_vector(name, "factor", x->factor, x->window->shape[1]));
  if (!back) return attn_cuda_check_operand(name, "y", x->y, x->window);
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "dy", x->dy, x->window));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "d_window", x->d_window, x->window));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "d_linear", x->d_linear, x->linear));
  return attn_cuda_check_operand(name, "d_log", x->d_log, &leading);
}

} // namespace

attn_status attn_cuda_window_greatest(const attn_window_ranges *ranges,
                                      const attn_greatest_tensors *x, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check_greatest("window_greatest", x, false));
  greatest_problem p = describe(ranges, x);
  if (p.rows == 0) return ATTN_OK;
  auto kernel = is_wide(x->q) ? find_greatest<double> : find_greatest<float>;
  kernel<<<blocks_of(p.rows * p.heads), THREADS, 0, (cudaStream_t)stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("window_greatest");
  return ATTN_OK;
}

attn_status attn_cuda_window_greatest_backward(const attn_window_ranges *ranges,
                                               const attn_greatest_tensors *x,
                                               attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check_greatest("window_greatest_backward", x, true));
  greatest_problem p = describe(ranges, x);
  if (p.rows == 0 || p.keys == 0) return ATTN_OK;
  auto to_queries = is_wide(x->q) ? greatest_to_queries<double> : greatest_to_queries<float>;
  auto to_keys = is_wide(x->q) ? greatest_to_keys<double> : greatest_to_keys<float>;
  to_queries<<<blocks_of(p.rows * p.heads), THREADS, 0, (cudaStream_t)stream>>>(p);
  to_keys<<<blocks_of(p.keys * p.kv_heads), THREADS, 0, (cudaStream_t)stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("window_greatest_backward");
  return ATTN_OK;
}

attn_status attn_cuda_window_join(const attn_join_tensors *x, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check_join("window_join", x, false));
  join_problem p = describe(x);
  if (p.rows == 0) return ATTN_OK;
  auto kernel = is_wide(x->window) ? join_parts<double> : join_parts<float>;
  kernel<<<blocks_of(p.rows * p.heads), THREADS, 0, (cudaStream_t)stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("window_join");
  return ATTN_OK;
}

attn_status attn_cuda_window_join_backward(const attn_join_tensors *x, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check_join("window_join_backward", x, true));
  join_problem p = describe(x);
  if (p.rows == 0) return ATTN_OK;
  auto kernel = is_wide(x->window) ? join_back<double> : join_back<float>;
  kernel<<<blocks_of(p.rows * p.heads), THREADS, 0, (cudaStream_t)stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("window_join_backward");
  return ATTN_OK;
}
