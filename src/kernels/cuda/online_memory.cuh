/* The sums and products of online_memory.inc for a block of threads, in the type `real`: included
 * once for each type, inside a namespace. They meet at their end. */

/* The same bits for all threads. */
FN real dot(const real *a, const real *b, int64_t n) {
  __shared__ real parts[THREADS / WARP];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  real sum = 0;
  EACH(i, n) sum += a[i] * b[i];
  sum = sum_lanes(sum);
  if (lane == 0) parts[warp] = sum;
  MEET;
  sum = sum_lanes(lane < THREADS / WARP ? parts[lane] : (real)0);
  MEET;
  return sum;
}

/* y = W x, a warp for each row. */
FN void multiply(real *y, const real *w, const real *x, int64_t rows, int64_t columns) {
  int lane = threadIdx.x % WARP;
  for (int64_t r = threadIdx.x / WARP; r < rows; r += THREADS / WARP) {
    real sum = 0;
    for (int64_t i = lane; i < columns; i += WARP) sum += w[r * columns + i] * x[i];
    sum = sum_lanes(sum);
    if (lane == 0) y[r] = sum;
  }
  MEET;
}

/* y (+)= W^T u */
FN void multiply_transposed(real *y, const real *w, const real *u, int64_t rows, int64_t columns,
                            int accumulate) {
  EACH(i, columns) {
    real sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += w[r * columns + i] * u[r];
    y[i] = accumulate ? y[i] + sum : sum;
  }
  MEET;
}

/* W = factor W + sum over j < count of s_j u_j x_j^T */
FN void update(real *w, real factor, int64_t count, const real *s, const real *u, const real *x,
               int64_t rows, int64_t columns) {
  EACH(e, rows * columns) {
    int r = (int)e / (int)columns, i = (int)e % (int)columns;
    real sum = factor * w[e];
    for (int64_t j = 0; j < count; ++j) sum += s[j] * u[j * rows + r] * x[j * columns + i];
    w[e] = sum;
  }
  MEET;
}

/* The same of momenta. */
FN void update_exact(double *w, real factor, int64_t count, const real *s, const real *u,
                     const real *x, int64_t rows, int64_t columns) {
  EACH(e, rows * columns) {
    int r = (int)e / (int)columns, i = (int)e % (int)columns;
    double sum = factor * w[e];
    for (int64_t j = 0; j < count; ++j) sum += (double)s[j] * u[j * rows + r] * x[j * columns + i];
    w[e] = sum;
  }
  MEET;
}

/* Of gradients and momenta. */
FN real dot_exact(const real *a, const double *b, int64_t n) {
  __shared__ double parts[THREADS / WARP];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  double sum = 0;
  EACH(i, n) sum += a[i] * b[i];
  sum = sum_lanes(sum);
  if (lane == 0) parts[warp] = sum;
  MEET;
  sum = sum_lanes(lane < THREADS / WARP ? parts[lane] : 0.0);
  MEET;
  return (real)sum;
}

FN real dot_wide(const double *a, const double *b, int64_t n) {
  __shared__ double parts[THREADS / WARP];
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  double sum = 0;
  EACH(i, n) sum += a[i] * b[i];
  sum = sum_lanes(sum);
  if (lane == 0) parts[warp] = sum;
  MEET;
  sum = sum_lanes(lane < THREADS / WARP ? parts[lane] : 0.0);
  MEET;
  return (real)sum;
}

/* y = W x, a warp for each row. */
FN void multiply_exact(double *y, const double *w, const real *x, int64_t rows, int64_t columns) {
  int lane = threadIdx.x % WARP;
  for (int64_t r = threadIdx.x / WARP; r < rows; r += THREADS / WARP) {
    double sum = 0;
    for (int64_t i = lane; i < columns; i += WARP) sum += w[r * columns + i] * x[i];
    sum = sum_lanes(sum);
    if (lane == 0) y[r] = sum;
  }
  MEET;
}

/* y += s W^T u */
FN void add_transposed_exact(real *y, const double *w, real s, const real *u, int64_t rows,
                             int64_t columns) {
  EACH(i, columns) {
    double sum = 0;
    for (int64_t r = 0; r < rows; ++r) sum += w[r * columns + i] * u[r];
    y[i] += (real)(s * sum);
  }
  MEET;
}

/* C = A B^T, a warp for each element. */
FN void times_transposed(real *c, const real *a, const real *b, int64_t m, int64_t n,
                         int64_t depth) {
  int lane = threadIdx.x % WARP;
  for (int e = threadIdx.x / WARP; e < m * n; e += THREADS / WARP) {
    int i = e / (int)n, j = e % (int)n;
    real sum = 0;
    for (int64_t d = lane; d < depth; d += WARP) sum += a[i * depth + d] * b[j * depth + d];
    sum = sum_lanes(sum);
    if (lane == 0) c[e] = sum;
  }
  MEET;
}

/* C = factor C + A B; what C holds does not matter where the factor is 0. */
FN void times(real *c, real factor, const real *a, const real *b, int64_t m, int64_t n,
              int64_t depth) {
  EACH(e, m * n) {
    int i = (int)e / (int)n, j = (int)e % (int)n;
    real sum = factor == 0 ? (real)0 : factor * c[e];
    for (int64_t d = 0; d < depth; ++d) sum += a[i * depth + d] * b[d * n + j];
    c[e] = sum;
  }
  MEET;
}

#include "kernels/newton_schulz.inc"
#include "kernels/online_memory.inc"

__global__ void __launch_bounds__(THREADS)
    run_forward(const __grid_constant__ memory_problem p, real *scratch, int64_t each) {
  int64_t i = blockIdx.x;
  walk_forward(&p, i / p.heads, i % p.heads, scratch + i * each);
}

__global__ void __launch_bounds__(THREADS)
    run_backward(const __grid_constant__ memory_problem p, real *scratch, int64_t each) {
  int64_t i = blockIdx.x;
  walk_backward(&p, i / p.heads, i % p.heads, scratch + i * each);
}

attn_status launch(const attn_online_memory *rule, const attn_online_memory_tensors *x,
                   const attn_online_memory_state *state, const attn_tensor *workspace, bool back,
                   cudaStream_t queue) {
  memory_problem problem = describe(rule, x, state);
  unsigned blocks = (unsigned)(x->sequences * problem.heads);
  real *scratch = (real *)workspace->data;
  int64_t each = attn_online_memory_scratch(rule, back);
  if (back)
    run_backward<<<blocks, THREADS, 0, queue>>>(problem, scratch, each);
  else
    run_forward<<<blocks, THREADS, 0, queue>>>(problem, scratch, each);
  ATTN_CUDA_TRY_LAUNCH("online_memory");
  return ATTN_OK;
}
