/* Running means with softmax weights (kernels/prefix.h), forward and backward: chunks of tokens
 * that warps walk, with a scan over what the chunks come to in between. A warp has a head of a
 * chunk, its lanes the channels; all lanes know the scores' numbers. graph/prefix_pass.c has the
 * formulas. */
#include "kernels/cuda/rows.cuh"

namespace {

enum { THREADS = 128, EACH = ATTN_PREFIX_MOST_DIM / WARP, CHUNK = ATTN_PREFIX_CHUNK };

/* An operand of [batch, length, heads, dim]: strides in bytes; channels lie together. */
struct heads_operand {
  char *data;
  int dtype;
  int64_t batch, token, head;
};

template <class real> struct problem {
  heads_operand v, o, d_o, dv;
  const real *s;
  real *greatest, *sum, *ds;
  real *state_greatest, *state_sum, *state_weighted; /* NULL: none */
  real *m, *u, *w;                                   /* of chunks: [batch, chunks, heads (, dim)] */
  real *start_m, *start_u, *start_w;                 /* before each chunk */
  int64_t batch, length, heads, chunks;
  int dim;
};

__device__ inline float exponential(float x) {
  return expf(x);
}
__device__ inline double exponential(double x) {
  return exp(x);
}

/* What the tokens so far come to: w has the lane's channels lane, lane + 32, ... */
template <class real> struct carried { real m, u, w[EACH]; };

template <class real> __device__ inline void clear(carried<real> *c) {
  c->m = c->u = 0;
#pragma unroll
  for (int k = 0; k < EACH; ++k) c->w[k] = 0;
}

template <class real>
__device__ inline void join(carried<real> *c, real m, real u, const real (&w)[EACH]) {
  real both = c->u == 0 || m > c->m ? m : c->m;
  real kept = c->u == 0 ? (real)0 : exponential(c->m - both), added = exponential(m - both);
  c->m = both;
  c->u = c->u * kept + u * added;
#pragma unroll
  for (int k = 0; k < EACH; ++k) c->w[k] = c->w[k] * kept + w[k] * added;
}

__device__ inline const char *place(const heads_operand &x, int64_t b, int64_t t, int64_t h) {
  return x.data + b * x.batch + t * x.token + h * x.head;
}

template <class real>
__device__ inline void load_head(real (&x)[EACH], const heads_operand &from, int64_t b, int64_t t,
                                 int64_t h, int dim) {
  const char *data = place(from, b, t, h);
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    x[k] = lane + k * WARP < dim ? load_element<real>(data, from.dtype, lane + k * WARP) : (real)0;
}

template <class real>
__device__ inline void store_head(const heads_operand &to, int64_t b, int64_t t, int64_t h, int dim,
                                  const real (&x)[EACH], real factor) {
  char *data = (char *)place(to, b, t, h);
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    if (lane + k * WARP < dim) store_element<real>(data, to.dtype, lane + k * WARP, x[k] * factor);
}

template <class real> __device__ inline void load_row(real (&x)[EACH], const real *from, int dim) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < EACH; ++k) x[k] = lane + k * WARP < dim ? from[lane + k * WARP] : (real)0;
}

template <class real> __device__ inline void store_row(real *to, int dim, const real (&x)[EACH]) {
  int lane = threadIdx.x % WARP;
#pragma unroll
  for (int k = 0; k < EACH; ++k)
    if (lane + k * WARP < dim) to[lane + k * WARP] = x[k];
}

template <class real> __device__ inline real sum_lanes(real value) {
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

template <class real> __device__ inline real dot(const real (&a)[EACH], const real (&b)[EACH]) {
  real sum = 0;
#pragma unroll
  for (int k = 0; k < EACH; ++k) sum += a[k] * b[k];
  return sum_lanes(sum);
}

/* The warp's item of `count`, or false for all of the warp. */
__device__ inline bool take_item(int64_t count, int64_t *item) {
  *item = (int64_t)blockIdx.x * (THREADS / WARP) + threadIdx.x / WARP;
  return *item < count;
}

/* Item i of [batch, chunks, heads]. */
template <class real> struct chunk_place {
  int64_t b, chunk, h, first, end;
  __device__ chunk_place(const problem<real> &p, int64_t i) {
    h = i % p.heads;
    chunk = i / p.heads % p.chunks;
    b = i / p.heads / p.chunks;
    first = chunk * CHUNK;
    end = first + CHUNK < p.length ? first + CHUNK : p.length;
  }
};

/* --- Forward ---------------------------------------------------------------------------------- */

template <class real>
__global__ void __launch_bounds__(THREADS) sum_chunks(const __grid_constant__ problem<real> p) {
  int64_t item;
  if (!take_item(p.batch * p.chunks * p.heads, &item)) return;
  chunk_place<real> at(p, item);
  carried<real> c;
  clear(&c);
  for (int64_t t = at.first; t < at.end; ++t) {
    real v[EACH];
    load_head(v, p.v, at.b, t, at.h, p.dim);
    join(&c, p.s[(at.b * p.length + t) * p.heads + at.h], (real)1, v);
  }
  p.m[item] = c.m;
  p.u[item] = c.u;
  store_row(p.w + item * p.dim, p.dim, c.w);
}

template <class real>
__device__ inline void load_state(carried<real> *c, const problem<real> &p, int64_t h) {
  clear(c);
  if (!p.state_sum) return;
  c->m = p.state_greatest[h];
  c->u = p.state_sum[h];
  load_row(c->w, p.state_weighted + h * p.dim, p.dim);
}

template <class real>
__global__ void __launch_bounds__(THREADS) scan_chunks(const __grid_constant__ problem<real> p) {
  int64_t item;
  if (!take_item(p.batch * p.heads, &item)) return;
  int64_t b = item / p.heads, h = item % p.heads;
  carried<real> c;
  load_state(&c, p, h);
  for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
    int64_t i = (b * p.chunks + chunk) * p.heads + h;
    real w[EACH];
    p.start_m[i] = c.m;
    p.start_u[i] = c.u;
    store_row(p.start_w + i * p.dim, p.dim, c.w);
    load_row(w, p.w + i * p.dim, p.dim);
    join(&c, p.m[i], p.u[i], w);
  }
}

template <class real>
__global__ void __launch_bounds__(THREADS) walk_chunks(const __grid_constant__ problem<real> p) {
  int64_t item;
  if (!take_item(p.batch * p.chunks * p.heads, &item)) return;
  chunk_place<real> at(p, item);
  carried<real> c;
  if (p.chunks > 1) {
    c.m = p.start_m[item];
    c.u = p.start_u[item];
    load_row(c.w, p.start_w + item * p.dim, p.dim);
  } else {
    load_state(&c, p, at.h);
  }
  for (int64_t t = at.first; t < at.end; ++t) {
    int64_t row = (at.b * p.length + t) * p.heads + at.h;
    real v[EACH];
    load_head(v, p.v, at.b, t, at.h, p.dim);
    join(&c, p.s[row], (real)1, v);
    p.greatest[row] = c.m;
    p.sum[row] = c.u;
    store_head(p.o, at.b, t, at.h, p.dim, c.w, 1 / c.u);
  }
  if (!p.state_sum || at.end < p.length) return;
  p.state_greatest[at.h] = c.m;
  p.state_sum[at.h] = c.u;
  store_row(p.state_weighted + at.h * p.dim, p.dim, c.w);
}

/* --- Backward: R in w and E in u, of the first token of each chunk -----------------------------
 */

template <class real> __device__ inline real share(const problem<real> &p, int64_t i, int64_t j) {
  return exponential(p.greatest[i] - p.greatest[j]) * (p.sum[i] / p.sum[j]);
}

/* R := do_t + factor R, E := do_t . o_t + factor E */
template <class real>
__device__ inline void step_back(const problem<real> &p, real (&r)[EACH], real *e, real factor,
                                 const chunk_place<real> &at, int64_t t) {
  real d_o[EACH], o[EACH];
  load_head(d_o, p.d_o, at.b, t, at.h, p.dim);
  load_head(o, p.o, at.b, t, at.h, p.dim);
  *e = dot(d_o, o) + factor * *e;
#pragma unroll
  for (int k = 0; k < EACH; ++k) r[k] = d_o[k] + factor * r[k];
}

template <class real>
__global__ void __launch_bounds__(THREADS) return_chunks(const __grid_constant__ problem<real> p) {
  int64_t item;
  if (!take_item(p.batch * p.chunks * p.heads, &item)) return;
  chunk_place<real> at(p, item);
  real r[EACH] = {}, e = 0;
  for (int64_t t = at.end - 1; t >= at.first; --t) {
    int64_t row = (at.b * p.length + t) * p.heads + at.h;
    step_back(p, r, &e, t + 1 < at.end ? share(p, row, row + p.heads) : (real)0, at, t);
  }
  p.u[item] = e;
  store_row(p.w + item * p.dim, p.dim, r);
}

template <class real>
__global__ void __launch_bounds__(THREADS) scan_returns(const __grid_constant__ problem<real> p) {
  int64_t item;
  if (!take_item(p.batch * p.heads, &item)) return;
  int64_t b = item / p.heads, h = item % p.heads;
  real r[EACH] = {}, e = 0;
  for (int64_t chunk = p.chunks - 1; chunk >= 0; --chunk) {
    int64_t i = (b * p.chunks + chunk) * p.heads + h;
    int64_t row = (b * p.length + chunk * CHUNK) * p.heads + h;
    real own[EACH], factor = chunk + 1 < p.chunks ? share(p, row, row + CHUNK * p.heads) : (real)0;
    load_row(own, p.w + i * p.dim, p.dim);
    e = p.u[i] + factor * e;
#pragma unroll
    for (int k = 0; k < EACH; ++k) r[k] = own[k] + factor * r[k];
    __syncwarp(); /* every lane has read u[i] */
    p.u[i] = e;
    store_row(p.w + i * p.dim, p.dim, r);
  }
}

template <class real>
__global__ void __launch_bounds__(THREADS) walk_back(const __grid_constant__ problem<real> p) {
  int64_t item;
  if (!take_item(p.batch * p.chunks * p.heads, &item)) return;
  chunk_place<real> at(p, item);
  real r[EACH] = {}, e = 0;
  if (at.end < p.length) {
    e = p.u[item + p.heads];
    load_row(r, p.w + (item + p.heads) * p.dim, p.dim);
  }
  for (int64_t t = at.end - 1; t >= at.first; --t) {
    int64_t row = (at.b * p.length + t) * p.heads + at.h;
    step_back(p, r, &e, t + 1 < p.length ? share(p, row, row + p.heads) : (real)0, at, t);
    real v[EACH], a = exponential(p.s[row] - p.greatest[row]) / p.sum[row];
    load_head(v, p.v, at.b, t, at.h, p.dim);
    p.ds[row] = a * (dot(r, v) - e);
    store_head(p.dv, at.b, t, at.h, p.dim, r, a);
  }
}

/* --- Calls ------------------------------------------------------------------------------------ */

heads_operand operand_of_heads(const attn_tensor *x) {
  heads_operand all = {};
  if (!x) return all;
  int64_t bytes = dtype_bytes(x->dtype);
  all.data = (char *)x->data;
  all.dtype = (int)x->dtype;
  all.batch = x->stride[0] * bytes;
  all.token = x->stride[1] * bytes;
  all.head = x->stride[2] * bytes;
  return all;
}

template <class real>
problem<real> describe(const attn_prefix_tensors *x, const attn_prefix_state *state,
                       const attn_tensor *workspace) {
  problem<real> p = {};
  p.batch = x->v->shape[0];
  p.length = x->v->shape[1];
  p.heads = x->v->shape[2];
  p.dim = (int)x->v->shape[3];
  p.chunks = (p.length + CHUNK - 1) / CHUNK;
  p.v = operand_of_heads(x->v);
  p.o = operand_of_heads(x->o);
  p.d_o = operand_of_heads(x->d_o);
  p.dv = operand_of_heads(x->dv);
  p.s = (const real *)x->s->data;
  p.greatest = (real *)x->greatest->data;
  p.sum = (real *)x->sum->data;
  p.ds = x->ds ? (real *)x->ds->data : NULL;
  if (state) {
    p.state_greatest = (real *)state->greatest.data;
    p.state_sum = (real *)state->sum.data;
    p.state_weighted = (real *)state->weighted.data;
  }
  int64_t items = p.batch * p.chunks * p.heads;
  p.m = (real *)workspace->data;
  p.u = p.m + items;
  p.w = p.u + items;
  p.start_m = p.w + items * p.dim;
  p.start_u = p.start_m + items;
  p.start_w = p.start_u + items;
  return p;
}

unsigned blocks_of(int64_t items) {
  const int64_t each = THREADS / WARP;
  return (unsigned)((items + each - 1) / each);
}

template <class real> attn_status forward(const problem<real> &p, cudaStream_t queue) {
  int64_t items = p.batch * p.chunks * p.heads;
  if (p.chunks > 1) {
    sum_chunks<real><<<blocks_of(items), THREADS, 0, queue>>>(p);
    scan_chunks<real><<<blocks_of(p.batch * p.heads), THREADS, 0, queue>>>(p);
  }
  walk_chunks<real><<<blocks_of(items), THREADS, 0, queue>>>(p);
  ATTN_CUDA_TRY_LAUNCH("prefix_softmax");
  return ATTN_OK;
}

template <class real> attn_status backward(const problem<real> &p, cudaStream_t queue) {
  int64_t items = p.batch * p.chunks * p.heads;
  if (p.chunks > 1) {
    return_chunks<real><<<blocks_of(items), THREADS, 0, queue>>>(p);
    scan_returns<real><<<blocks_of(p.batch * p.heads), THREADS, 0, queue>>>(p);
  }
  walk_back<real><<<blocks_of(items), THREADS, 0, queue>>>(p);
  ATTN_CUDA_TRY_LAUNCH("prefix_softmax_backward");
  return ATTN_OK;
}

attn_status check(const attn_prefix_tensors *x, const attn_tensor *workspace, bool back) {
  const char *name = back ? "prefix_softmax_backward" : "prefix_softmax";
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "v", x->v, x->v));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "o", x->o, x->v));
  if (back) ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "d_o", x->d_o, x->v));
  if (back) ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "dv", x->dv, x->v));
  attn_tensor leading = *x->v;
  leading.rank = 3;
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "s", x->s, &leading));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "greatest", x->greatest, &leading));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "sum", x->sum, &leading));
  attn_dtype wide = is_wide(x->v) ? ATTN_F64 : ATTN_F32;
  if (x->v->rank != 4 || x->v->shape[3] > ATTN_PREFIX_MOST_DIM || x->s->dtype != wide ||
      workspace->dtype != wide)
    return attn_cuda_fail(ATTN_UNSUPPORTED, "%s: %lld channels of rank %d with scores of dtype %d",
                          name, (long long)x->v->shape[x->v->rank - 1], x->v->rank,
                          (int)x->s->dtype);
  return ATTN_OK;
}

} // namespace

attn_status attn_cuda_prefix_softmax(const attn_prefix_tensors *x, const attn_prefix_state *state,
                                     const attn_tensor *workspace, attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check(x, workspace, false));
  cudaStream_t queue = (cudaStream_t)stream;
  if (is_wide(x->s)) return forward(describe<double>(x, state, workspace), queue);
  return forward(describe<float>(x, state, workspace), queue);
}

attn_status attn_cuda_prefix_softmax_backward(const attn_prefix_tensors *x,
                                              const attn_tensor *workspace,
                                              attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check(x, workspace, true));
  cudaStream_t queue = (cudaStream_t)stream;
  if (is_wide(x->s)) return backward(describe<double>(x, NULL, workspace), queue);
  return backward(describe<float>(x, NULL, workspace), queue);
}
