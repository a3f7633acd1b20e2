/* RMS norms of rows with what models do next to them in the same pass over memory (rows.h): the sum
 * that is normed, the gate that multiplies, the copy of a gradient in another dtype.
 *
 *   r = 1 / sqrt(x . x / divisor + epsilon),  y = r x (.) w (.) g
 *   dx = r u - r^3 x (u . x) / divisor,  u = dy (.) w (.) g,  dg = r x (.) w (.) dy
 *
 * Without sums over rows nothing lasts from one row to the next: `width` threads take one, each K
 * vectors of eight elements that are all in flight together, and the many groups hide the rest. */
#include "kernels/cuda/norm_rows.cuh"

enum {
  THREADS = 256,
  MOST_VECTORS = 2 * THREADS, /* of a row */
};

struct rms_operands {
  operand y, x, weight;
  operand other; /* what is added to x, or the gate */
  operand sum;   /* takes x + other */
  int64_t n;
  float inverse /* 1 / divisor */, epsilon;
  double *factor;
};

/* What is known of dtypes when a kernel is compiled, which saves registers and so loads in flight:
 * nothing; that all are bfloat16; that x (and dx, and the sum) are a residual stream of float32 and
 * the others bfloat16. */
enum mix { MIXED, HALVES, RESIDUAL };

template <mix MIX> static __device__ constexpr int known(int dtype, bool stream) {
  return MIX == MIXED ? dtype : MIX == RESIDUAL && stream ? (int)ATTN_F32 : (int)ATTN_BF16;
}

enum mode { PLAIN, ADDED /* of x + other */, GATED /* times other */ };

/* Walk: y, x, other, sum. */
template <int K, mode MODE, mix MIX>
static __global__ void __launch_bounds__(THREADS, MIX == MIXED ? 2 : 3)
    rms_rows(const __grid_constant__ walk<4> rows, const __grid_constant__ rms_operands all,
             int width) {
  __shared__ float shared[WARP];
  uint32_t row = blockIdx.x * (THREADS / width) + threadIdx.x / width;
  bool inside = row < rows.count; /* all lanes take part in the sums */
  int thread = threadIdx.x % width, n = (int)all.n;
  coordinates c = locate(rows, inside ? row : 0);
  const char *from = all.x.data + offset_of(rows, c, 1);
  const char *beside = all.other.data + offset_of(rows, c, 2);
  raw_vector raw[K], other[K];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    int at = (thread + k * width) * VECTOR;
    if (at >= n) continue;
    raw[k] = load_raw(from + at * all.x.step, known<MIX>(all.x.dtype, true));
    if (MODE != PLAIN)
      other[k] = load_raw(beside + at * all.other.step, known<MIX>(all.other.dtype, false));
  }
  float x[K][VECTOR], squares = 0;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if ((thread + k * width) * VECTOR >= n) continue;
    unpack(x[k], raw[k], known<MIX>(all.x.dtype, true));
    if (MODE == ADDED) {
      float added[VECTOR];
      unpack(added, other[k], known<MIX>(all.other.dtype, false));
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) x[k][i] += added[i];
    }
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) squares += x[k][i] * x[k][i];
  }
  squares = sum_group(squares, width, shared);
  float factor = 1 / sqrtf(squares * all.inverse + all.epsilon);
  if (!inside) return;
  if (thread == 0 && all.factor) all.factor[row] = (double)factor;
  char *to = all.y.data + offset_of(rows, c, 0), *sum = all.sum.data + offset_of(rows, c, 3);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    int at = (thread + k * width) * VECTOR;
    if (at >= n) continue;
    if (MODE == ADDED) store_vector(sum + at * all.sum.step, known<MIX>(all.sum.dtype, true), x[k]);
    float by[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) x[k][i] *= factor;
    if (all.weight.data) {
      load_all<float, VECTOR>(by, all.weight.data + at * all.weight.step, all.weight.dtype);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) x[k][i] *= by[i];
    }
    if (MODE == GATED) {
      unpack(by, other[k], known<MIX>(all.other.dtype, false));
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) x[k][i] *= by[i];
    }
    store_vector(to + at * all.y.step, known<MIX>(all.y.dtype, false), x[k]);
  }
}

struct rms_gradients {
  operand dx, x, dy, weight, copy, gate, d_gate;
  bool accumulate, accumulate_gate;
  int64_t n;
  float inverse;
  const double *factor;
};

/* Walk: dx, x, dy, copy, gate, d_gate. */
template <int K, bool GATE, mix MIX>
static __global__ void __launch_bounds__(THREADS, MIX == HALVES ? 3 : 2)
    rms_backward(const __grid_constant__ walk<6> rows, const __grid_constant__ rms_gradients all,
                 int width) {
  __shared__ float shared[WARP];
  uint32_t row = blockIdx.x * (THREADS / width) + threadIdx.x / width;
  bool inside = row < rows.count; /* all lanes take part in the sums */
  int thread = threadIdx.x % width, n = (int)all.n;
  coordinates c = locate(rows, inside ? row : 0);
  const char *x_row = all.x.data + offset_of(rows, c, 1);
  const char *dy_row = all.dy.data + offset_of(rows, c, 2);
  const char *gate_row = all.gate.data + (GATE ? offset_of(rows, c, 4) : 0);
  char *dx_row = all.dx.data + offset_of(rows, c, 0);
  char *d_gate_row = all.d_gate.data + (GATE ? offset_of(rows, c, 5) : 0);
  raw_vector raw_x[K], raw_dy[K], old[K], raw_gate[GATE ? K : 1];
#pragma unroll
  for (int k = 0; k < K; ++k) {
    int at = (thread + k * width) * VECTOR;
    if (at >= n) continue;
    raw_x[k] = load_raw(x_row + at * all.x.step, known<MIX>(all.x.dtype, true));
    raw_dy[k] = load_raw(dy_row + at * all.dy.step, known<MIX>(all.dy.dtype, false));
    if (GATE)
      raw_gate[k] = load_raw(gate_row + at * all.gate.step, known<MIX>(all.gate.dtype, false));
    if (all.accumulate)
      old[k] = load_raw(dx_row + at * all.dx.step, known<MIX>(all.dx.dtype, true));
  }
  float r = (float)all.factor[inside ? row : 0], projection = 0;
  /* Vector k: x, and u without the gate. */
  auto take = [&](int k, float(&x)[VECTOR], float(&u)[VECTOR]) {
    int at = (thread + k * width) * VECTOR;
    unpack(x, raw_x[k], known<MIX>(all.x.dtype, true));
    unpack(u, raw_dy[k], known<MIX>(all.dy.dtype, false));
    if (!all.weight.data) return;
    float w[VECTOR];
    load_all<float, VECTOR>(w, all.weight.data + at * all.weight.step, all.weight.dtype);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) u[i] *= w[i];
  };
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if ((thread + k * width) * VECTOR >= n) continue;
    float x[VECTOR], u[VECTOR], gate[VECTOR];
    take(k, x, u);
    if (GATE) unpack(gate, raw_gate[k], known<MIX>(all.gate.dtype, false));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) projection += x[i] * (GATE ? u[i] * gate[i] : u[i]);
  }
  projection = sum_group(projection, width, shared);
  if (!inside) return;
  float pull = r * r * r * projection * all.inverse;
#pragma unroll
  for (int k = 0; k < K; ++k) {
    int at = (thread + k * width) * VECTOR;
    if (at >= n) continue;
    float x[VECTOR], u[VECTOR], dx[VECTOR] = {};
    take(k, x, u);
    if (GATE) {
      float gate[VECTOR], d_gate[VECTOR] = {};
      char *place = d_gate_row + at * all.d_gate.step;
      unpack(gate, raw_gate[k], known<MIX>(all.gate.dtype, false));
      if (all.accumulate_gate)
        load_all<float, VECTOR>(d_gate, place, known<MIX>(all.d_gate.dtype, false));
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        d_gate[i] += r * x[i] * u[i];
        u[i] *= gate[i];
      }
      store_vector(place, known<MIX>(all.d_gate.dtype, false), d_gate);
    }
    if (all.accumulate) unpack(dx, old[k], known<MIX>(all.dx.dtype, true));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) dx[i] += r * u[i] - pull * x[i];
    store_vector(dx_row + at * all.dx.step, known<MIX>(all.dx.dtype, true), dx);
    if (!GATE && all.copy.data)
      store_vector(all.copy.data + offset_of(rows, c, 3) + at * all.copy.step,
                   known<MIX>(all.copy.dtype, false), dx);
  }
}

/* How a row is shared: by `width` threads with one or two vectors each. */
struct sharing {
  int k, width;
  unsigned blocks;
};

static sharing share_rows(int64_t rows, int64_t n) {
  int64_t vectors = n / VECTOR;
  sharing s;
  s.k = vectors <= WARP ? 1 : 2;
  s.width = power_of_two_from((vectors + s.k - 1) / s.k);
  int64_t each = THREADS / s.width;
  s.blocks = (unsigned)((rows + each - 1) / each);
  return s;
}

/* `streams` are x, dx and the sum, `others` the rest; weights may be of any dtype. */
static mix mix_of(const attn_tensor *const (&streams)[2], const attn_tensor *const (&others)[4]) {
  bool halves = true, residual = true;
  for (const attn_tensor *t : streams) {
    halves = halves && (!t || t->dtype == ATTN_BF16);
    residual = residual && (!t || t->dtype == ATTN_F32);
  }
  for (const attn_tensor *t : others) {
    bool half = !t || t->dtype == ATTN_BF16;
    halves = halves && half, residual = residual && half;
  }
  return halves ? HALVES : residual ? RESIDUAL : MIXED;
}

template <mode MODE, mix MIX> static auto forward_kernel(int k) {
  return k == 1 ? rms_rows<1, MODE, MIX> : rms_rows<2, MODE, MIX>;
}
template <mode MODE> static auto forward_kernel(int k, mix known) {
  return known == HALVES     ? forward_kernel<MODE, HALVES>(k)
         : known == RESIDUAL ? forward_kernel<MODE, RESIDUAL>(k)
                             : forward_kernel<MODE, MIXED>(k);
}
template <bool GATE, mix MIX> static auto backward_kernel(int k) {
  return k == 1 ? rms_backward<1, GATE, MIX> : rms_backward<2, GATE, MIX>;
}
template <bool GATE> static auto backward_kernel(int k, mix known) {
  return known == HALVES     ? backward_kernel<GATE, HALVES>(k)
         : known == RESIDUAL ? backward_kernel<GATE, RESIDUAL>(k)
                             : backward_kernel<GATE, MIXED>(k);
}

static bool suit(int64_t rows, int64_t n, const attn_tensor *const *tensors, int count) {
  if (rows == 0 || n == 0 || n / VECTOR > MOST_VECTORS) return false;
  for (int i = 0; i < count; ++i)
    if (!rows_are_vectors(tensors[i])) return false;
  return true;
}

/* The common part of norm, add_norm and norm_gate. */
static bool forward(mode what, const attn_tensor *sum, const attn_tensor *y, const attn_tensor *x,
                    const attn_tensor *other, const attn_tensor *weight, int64_t rows,
                    double divisor, double epsilon, double *factor, cudaStream_t stream) {
  const attn_tensor *all_tensors[] = {sum, y, x, other, weight};
  int64_t n = x->shape[x->rank - 1];
  if (!suit(rows, n, all_tensors, 5) || (sum && sum->dtype != ATTN_F32)) return false;
  rms_operands all = {operand_of(y),        operand_of(x),   operand_of(weight),
                      operand_of(other),    operand_of(sum), n,
                      (float)(1 / divisor), (float)epsilon,  factor};
  walk<4> walk_all = walk_rows<4>(x, {y, x, other, sum});
  sharing s = share_rows(rows, n);
  mix known = mix_of({x, sum}, {y, other, NULL, NULL});
  auto kernel = what == ADDED   ? forward_kernel<ADDED>(s.k, known)
                : what == GATED ? forward_kernel<GATED>(s.k, known)
                                : forward_kernel<PLAIN>(s.k, known);
  kernel<<<s.blocks, THREADS, 0, stream>>>(walk_all, all, s.width);
  return true;
}

bool attn_cuda_rms_rows(const attn_tensor *y, const attn_tensor *x, const attn_tensor *weight,
                        int64_t rows, double divisor, double epsilon, double *factor,
                        cudaStream_t stream) {
  return forward(PLAIN, NULL, y, x, NULL, weight, rows, divisor, epsilon, factor, stream);
}

attn_status attn_cuda_add_norm(const attn_tensor *sum, const attn_tensor *y, const attn_tensor *a,
                               const attn_tensor *b, const attn_tensor *weight, double divisor,
                               double epsilon, double *factor, attn_cuda_stream stream) {
  static const char function[] = "add_norm";
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "a", a, a));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "b", b, a));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "sum", sum, a));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "y", y, a));
  ATTN_CUDA_CHECK(attn_cuda_check_vector(function, "weight", weight, a->shape[a->rank - 1]));
  ATTN_CUDA_CHECK(attn_cuda_count_rows(function, a, &rows));
  if (forward(ADDED, sum, y, a, b, weight, rows, divisor, epsilon, factor, (cudaStream_t)stream)) {
    ATTN_CUDA_TRY_LAUNCH("add_norm");
    return ATTN_OK;
  }
  ATTN_CUDA_CHECK(attn_cuda_add(sum, 1, a, 1, b, stream));
  return attn_cuda_norm(y, sum, weight, NULL, divisor, epsilon, factor, NULL, stream);
}

attn_status attn_cuda_norm_gate(const attn_tensor *y, const attn_tensor *x, const attn_tensor *gate,
                                double divisor, double epsilon, double *factor,
                                attn_cuda_stream stream) {
  static const char function[] = "norm_gate";
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "x", x, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "gate", gate, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "y", y, x));
  ATTN_CUDA_CHECK(attn_cuda_count_rows(function, x, &rows));
  if (forward(GATED, NULL, y, x, gate, NULL, rows, divisor, epsilon, factor,
              (cudaStream_t)stream)) {
    ATTN_CUDA_TRY_LAUNCH("norm_gate");
    return ATTN_OK;
  }
  ATTN_CUDA_CHECK(attn_cuda_norm(y, x, NULL, NULL, divisor, epsilon, factor, NULL, stream));
  return attn_cuda_multiply_sum(y, false, 1, y, gate, stream);
}

/* The common part of norm_backward and norm_gate_backward; gate NULL: not gated. */
static bool backward(const attn_tensor *dx, bool accumulate, const attn_tensor *copy,
                     const attn_tensor *d_gate, bool accumulate_gate, const attn_tensor *x,
                     const attn_tensor *weight, const attn_tensor *gate, const attn_tensor *dy,
                     double divisor, const double *factor, cudaStream_t stream) {
  const attn_tensor *all_tensors[] = {dx, copy, d_gate, x, weight, gate, dy};
  int64_t n = x->shape[x->rank - 1], rows = 1;
  for (int i = 0; i + 1 < x->rank; ++i) rows *= x->shape[i];
  if (!suit(rows, n, all_tensors, 7)) return false;
  rms_gradients all = {operand_of(dx),       operand_of(x),
                       operand_of(dy),       operand_of(weight),
                       operand_of(copy),     operand_of(gate),
                       operand_of(d_gate),   accumulate,
                       accumulate_gate,      n,
                       (float)(1 / divisor), factor};
  walk<6> walk_all = walk_rows<6>(x, {dx, x, dy, copy, gate, d_gate});
  sharing s = share_rows(rows, n);
  mix known = mix_of({x, dx}, {dy, copy, gate, d_gate});
  auto kernel = gate ? backward_kernel<true>(s.k, known) : backward_kernel<false>(s.k, known);
  kernel<<<s.blocks, THREADS, 0, stream>>>(walk_all, all, s.width);
  return true;
}

bool attn_cuda_rms_backward_rows(const attn_tensor *dx, bool accumulate, const attn_tensor *copy,
                                 const attn_tensor *x, const attn_tensor *weight,
                                 const attn_tensor *dy, double divisor, const double *factor,
                                 cudaStream_t stream) {
  return backward(dx, accumulate, copy, NULL, false, x, weight, NULL, dy, divisor, factor, stream);
}

attn_status attn_cuda_norm_gate_backward(const attn_tensor *dx, bool accumulate,
                                         const attn_tensor *d_gate, bool accumulate_gate,
                                         const attn_tensor *x, const attn_tensor *gate,
                                         const attn_tensor *dy, double divisor,
                                         const double *factor, attn_cuda_stream stream) {
  static const char function[] = "norm_gate_backward";
  int64_t rows;
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "x", x, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "gate", gate, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "dy", dy, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "dx", dx, x));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "d_gate", d_gate, x));
  ATTN_CUDA_CHECK(attn_cuda_count_rows(function, x, &rows));
  if (!backward(dx, accumulate, NULL, d_gate, accumulate_gate, x, NULL, gate, dy, divisor, factor,
                (cudaStream_t)stream))
    return attn_cuda_fail(ATTN_UNSUPPORTED, "norm_gate_backward: rows of %lld elements, or apart",
                          (long long)x->shape[x->rank - 1]);
  ATTN_CUDA_TRY_LAUNCH("norm_gate_backward");
  return ATTN_OK;
}
