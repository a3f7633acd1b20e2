/* Element-wise operations (rows.h) over operands of any strides and dtypes.
 *
 * Operands are walked in the order of the target's memory with axes joined where all allow it. When
 * every operand's rows are contiguous and aligned, or repeat one element, a thread takes vectors of
 * eight elements (VECTOR); else one element. Kernels are instantiated by operation, not by dtype.
 */
#include "kernels/cuda/rows.cuh"

enum { THREADS = 256 };

/* --- The functions and their slopes, as in kernels/cpu/rows_real.inc ----------------------------
 */

static __device__ inline float reciprocal(float x) {
  float y;
  asm("rcp.approx.f32 %0, %1;" : "=f"(y) : "f"(x)); /* within 1 ulp, inf gives 0 */
  return y;
}
static __device__ inline double reciprocal(double x) {
  return 1 / x;
}

/* ROUGH: for results that bfloat16 rounds, within 2^-20 for |x| < 16 and 2^-17 for all x. */
template <bool ROUGH> static __device__ inline float exponential(float x) {
  return ROUGH ? __expf(x) : expf(x);
}
template <bool ROUGH> static __device__ inline double exponential(double x) {
  return exp(x);
}

/* log(1 + u) for u in [0, 1]: 2 atanh(w), w = u / (2 + u) <= 1/3 */
static __device__ inline float log1p_of(float u) {
  float w = u * reciprocal(2.0f + u), s = w * w;
  float p = 1.0f / 13;
  p = p * s + 1.0f / 11;
  p = p * s + 1.0f / 9;
  p = p * s + 1.0f / 7;
  p = p * s + 1.0f / 5;
  p = p * s + 1.0f / 3;
  p = p * s + 1.0f;
  return 2.0f * w * p;
}
static __device__ inline double log1p_of(double u) {
  return log1p(u);
}

/* erfc(a) for a >= 0, given exp(-a^2): the polynomial of kernels/cpu/rows.inc */
static __device__ inline float erfc_of(float a, float exponential) {
  float t = reciprocal(1.0f + 0.4f * a);
  float p = 0.05026941f;
  p = p * t - 0.18292923f;
  p = p * t + 0.16912782f;
  p = p * t - 0.0056404797f;
  p = p * t + 0.14144503f;
  p = p * t + 0.16853921f;
  p = p * t + 0.20784290f;
  p = p * t + 0.22566959f;
  p = p * t + 0.22567587f;
  return p * t * exponential;
}
static __device__ inline double erfc_of(double a, double) {
  return erfc(a);
}

static __device__ inline float expm1_of(float x) {
  return expm1f(x);
}
static __device__ inline double expm1_of(double x) {
  return expm1(x);
}

static __device__ inline float tanh_of(float x) {
  return tanhf(x);
}
static __device__ inline double tanh_of(double x) {
  return tanh(x);
}

template <bool ROUGH, class real> static __device__ inline real sigmoid(real x) {
  return reciprocal(1 + exponential<ROUGH>(-x));
}

/* f(x) and f'(x); the compiler drops the one that is not asked for. */
template <attn_activation F, bool ROUGH, class real>
static __device__ inline void activation(real x, real *value, real *slope) {
  if constexpr (F == ATTN_IDENTITY) {
    *value = x;
    *slope = 1;
  } else if constexpr (F == ATTN_SILU) {
    real s = sigmoid<ROUGH>(x);
    *value = x * s;
    *slope = s * (1 + x * (1 - s));
  } else if constexpr (F == ATTN_SIGMOID) {
    real s = sigmoid<ROUGH>(x);
    *value = s;
    *slope = s * (1 - s);
  } else if constexpr (F == ATTN_GELU) {
    real e = exponential<ROUGH>((real)-0.5 * x * x);
    real tail = (real)0.5 * erfc_of((x < 0 ? -x : x) * (real)0.70710678118654752, e);
    real below = x < 0 ? tail : 1 - tail; /* Phi(x) */
    *value = x * below;
    *slope = below + x * (real)0.39894228040143268 * e;
  } else if constexpr (F == ATTN_RELU) {
    *value = x > 0 ? x : 0;
    *slope = x > 0 ? 1 : 0;
  } else if constexpr (F == ATTN_SOFTPLUS || F == ATTN_LOG_SIGMOID) {
    real z = F == ATTN_SOFTPLUS ? x : -x;
    real tail = log1p_of(exponential<ROUGH>(z < 0 ? z : -z));
    real plus = z > 0 ? z + tail : tail;
    *value = F == ATTN_SOFTPLUS ? plus : -plus;
    *slope = sigmoid<ROUGH>(z);
  } else if constexpr (F == ATTN_ELU) {
    *value = x > 0 ? x : expm1_of(x);
    *slope = x > 0 ? 1 : exponential<ROUGH>(x);
  } else if constexpr (F == ATTN_ELU_PLUS_ONE) {
    *slope = x > 0 ? 1 : exponential<ROUGH>(x);
    *value = x > 0 ? x + 1 : *slope;
  } else if constexpr (F == ATTN_EXP) {
    *value = *slope = exponential<ROUGH>(x);
  } else { /* (1 + tanh(u)) / 2 is sigmoid<ROUGH>(2 u) */
    real s = sigmoid<ROUGH>((real)1.5957691216057308 * x * (1 + (real)0.044715 * x * x));
    real near = x < -16 ? -16 : x > 16 ? 16 : x; /* beyond, s (1 - s) is 0 and must stay that */
    real inner = (real)1.5957691216057308 * (1 + (real)0.134145 * near * near);
    *value = x * s;
    *slope = s + s * (1 - s) * near * inner;
  }
}

template <attn_activation F, int V, bool ROUGH, class real>
static __device__ inline void activate_all(const real *x, real *value, real *slope) {
#pragma unroll
  for (int i = 0; i < V; ++i) activation<F, ROUGH>(x[i], &value[i], &slope[i]);
}

template <int V, bool ROUGH, class real>
static __device__ inline void activate_all(attn_activation f, const real *x, real *value,
                                           real *slope) {
  switch (f) {
  case ATTN_IDENTITY: activate_all<ATTN_IDENTITY, V, ROUGH>(x, value, slope); break;
  case ATTN_SILU: activate_all<ATTN_SILU, V, ROUGH>(x, value, slope); break;
  case ATTN_SIGMOID: activate_all<ATTN_SIGMOID, V, ROUGH>(x, value, slope); break;
  case ATTN_GELU: activate_all<ATTN_GELU, V, ROUGH>(x, value, slope); break;
  case ATTN_RELU: activate_all<ATTN_RELU, V, ROUGH>(x, value, slope); break;
  case ATTN_SOFTPLUS: activate_all<ATTN_SOFTPLUS, V, ROUGH>(x, value, slope); break;
  case ATTN_LOG_SIGMOID: activate_all<ATTN_LOG_SIGMOID, V, ROUGH>(x, value, slope); break;
  case ATTN_EXP: activate_all<ATTN_EXP, V, ROUGH>(x, value, slope); break;
  case ATTN_GELU_TANH: activate_all<ATTN_GELU_TANH, V, ROUGH>(x, value, slope); break;
  case ATTN_ELU: activate_all<ATTN_ELU, V, ROUGH>(x, value, slope); break;
  case ATTN_ELU_PLUS_ONE: activate_all<ATTN_ELU_PLUS_ONE, V, ROUGH>(x, value, slope); break;
  }
}

/* --- The operations: V elements of each target from V of each input -----------------------------
 */

struct add_operation {
  enum { TARGETS = 1, INPUTS = 2 };
  double alpha, beta;
  bool two;
  template <bool ROUGH, int V, class real>
  __device__ void operator()(real (&out)[1][V], const real (&in)[2][V]) const {
    real p = (real)alpha, q = (real)beta;
#pragma unroll
    for (int i = 0; i < V; ++i) out[0][i] = two ? p * in[0][i] + q * in[1][i] : p * in[0][i];
  }
};

struct activate_operation {
  enum { TARGETS = 1, INPUTS = 1 };
  attn_activation f;
  template <bool ROUGH, int V, class real>
  __device__ void operator()(real (&out)[1][V], const real (&in)[1][V]) const {
    real slope[V];
    activate_all<V, ROUGH>(f, in[0], out[0], slope);
  }
};

/* in: x, dy */
struct activate_backward_operation {
  enum { TARGETS = 1, INPUTS = 2 };
  attn_activation f;
  template <bool ROUGH, int V, class real>
  __device__ void operator()(real (&out)[1][V], const real (&in)[2][V]) const {
    real value[V];
    activate_all<V, ROUGH>(f, in[0], value, out[0]);
#pragma unroll
    for (int i = 0; i < V; ++i) out[0][i] *= in[1][i];
  }
};

/* in: a, b */
struct gate_operation {
  enum { TARGETS = 1, INPUTS = 2 };
  attn_activation f;
  template <bool ROUGH, int V, class real>
  __device__ void operator()(real (&out)[1][V], const real (&in)[2][V]) const {
    real slope[V];
    activate_all<V, ROUGH>(f, in[0], out[0], slope);
#pragma unroll
    for (int i = 0; i < V; ++i) out[0][i] *= in[1][i];
  }
};

/* out: da, db, y; in: a, b, dy */
struct gate_backward_operation {
  enum { TARGETS = 3, INPUTS = 3 };
  attn_activation f;
  template <bool ROUGH, int V, class real>
  __device__ void operator()(real (&out)[3][V], const real (&in)[3][V]) const {
    activate_all<V, ROUGH>(f, in[0], out[1], out[0]);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      out[0][i] *= in[1][i] * in[2][i];
      out[2][i] = out[1][i] * in[1][i];
      out[1][i] *= in[2][i];
    }
  }
};

struct cap_operation {
  enum { TARGETS = 1, INPUTS = 1 };
  double cap;
  template <bool ROUGH, int V, class real>
  __device__ void operator()(real (&out)[1][V], const real (&in)[1][V]) const {
    real bound = (real)cap, inverse = (real)(1 / cap);
#pragma unroll
    for (int i = 0; i < V; ++i) out[0][i] = bound * tanh_of(in[0][i] * inverse);
  }
};

/* --- The kernels --------------------------------------------------------------------------------
 */

template <int N> struct operands {
  char *data[N]; /* NULL: absent */
  int dtype[N];
  bool repeats[N]; /* one element for a whole vector */
  bool accumulate[N];
};

/* What is known of the operands' dtypes when a kernel is compiled. */
enum mix { MIXED, ALL_BF16 /* and none repeats an element */ };

/* V elements of an operand before they are converted. */
template <class real, int V, mix MIX> struct piece {
  raw_vector raw;
  __device__ void load(const char *place, int dtype) {
    raw = load_raw(place, dtype);
  }
  __device__ void get(real *x, int dtype) const {
    unpack(x, raw, dtype);
  }
};
template <> struct piece<float, VECTOR, ALL_BF16> {
  uint4 raw;
  __device__ void load(const char *place, int) {
    raw = *(const uint4 *)place;
  }
  __device__ void get(float *x, int) const {
    unpack(x, raw_vector{raw, raw}, ATTN_BF16);
  }
};
template <class real, mix MIX> struct piece<real, 1, MIX> {
  real value;
  __device__ void load(const char *place, int dtype) {
    value = load_element<real>(place, dtype, 0);
  }
  __device__ void get(real *x, int) const {
    x[0] = value;
  }
};

/* How many vectors a thread has in flight: as many as registers allow. */
template <int N, int V, mix MIX> __host__ __device__ constexpr int unroll_of() {
  return V == 1 || N > 3 ? 1 : MIX == ALL_BF16 ? 4 : 2;
}

template <class real, int V, mix MIX, class operation>
static __global__ void __launch_bounds__(THREADS)
    map(const __grid_constant__ walk<operation::TARGETS + operation::INPUTS> all,
        const __grid_constant__ operands<operation::TARGETS + operation::INPUTS> operand,
        operation apply) {
  constexpr int T = operation::TARGETS, N = T + operation::INPUTS, UNROLL = unroll_of<N, V, MIX>();
  uint32_t first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
  char *place[UNROLL][N];
  piece<real, V, MIX> loaded[UNROLL][N];
  auto repeats = [&](int k) { return MIX == MIXED && operand.repeats[k]; };
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    uint32_t index = first + u * THREADS;
    if (index >= all.count) continue;
    coordinates c = locate(all, index);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      place[u][k] = operand.data[k] + offset_of(all, c, k);
      if (operand.data[k] && !repeats(k) && (k >= T || operand.accumulate[k]))
        loaded[u][k].load(place[u][k], operand.dtype[k]);
    }
  }
#pragma unroll
  for (int u = 0; u < UNROLL; ++u) {
    if (first + u * THREADS >= all.count) continue;
    real in[N - T][V], out[T][V];
#pragma unroll
    for (int k = T; k < N; ++k) {
      if (!operand.data[k]) continue;
      if (repeats(k)) {
        real value = load_element<real>(place[u][k], operand.dtype[k], 0);
#pragma unroll
        for (int i = 0; i < V; ++i) in[k - T][i] = value;
      } else {
        loaded[u][k].get(in[k - T], operand.dtype[k]);
      }
    }
    apply.template operator()<MIX == ALL_BF16>(out, in);
#pragma unroll
    for (int k = 0; k < T; ++k) {
      if (!operand.data[k]) continue;
      if (operand.accumulate[k]) {
        real old[V];
        loaded[u][k].get(old, operand.dtype[k]);
#pragma unroll
        for (int i = 0; i < V; ++i) out[k][i] += old[i];
      }
      store_all<real, V>(place[u][k], MIX == ALL_BF16 ? ATTN_BF16 : operand.dtype[k], out[k]);
    }
  }
}

enum { TERMS = 8 };

/* Operand 0 is y, 1 + j is a[j], 1 + TERMS + j is b[j]. */
template <class real, int V, mix MIX>
static __global__ void __launch_bounds__(THREADS)
    add_products(const __grid_constant__ walk<1 + 2 * TERMS> all,
                 const __grid_constant__ operands<1 + 2 * TERMS> operand, int count) {
  uint32_t index = blockIdx.x * THREADS + threadIdx.x;
  if (index >= all.count) return;
  coordinates c = locate(all, index);
  real sum[V] = {};
  auto repeats = [&](int k) { return MIX == MIXED && operand.repeats[k]; };
  auto fetch = [&](int k, real *x, const piece<real, V, MIX> &loaded, const char *place) {
    if (!repeats(k)) {
      loaded.get(x, operand.dtype[k]);
      return;
    }
    real value = load_element<real>(place, operand.dtype[k], 0);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = value;
  };
#pragma unroll 2
  for (int j = 0; j < count; ++j) {
    int p = 1 + j, q = 1 + TERMS + j;
    const char *place_a = operand.data[p] + offset_of(all, c, p);
    const char *place_b = operand.data[q] + offset_of(all, c, q);
    piece<real, V, MIX> a, b;
    if (!repeats(p)) a.load(place_a, operand.dtype[p]);
    if (!repeats(q)) b.load(place_b, operand.dtype[q]);
    real u[V], v[V];
    fetch(p, u, a, place_a);
    fetch(q, v, b, place_b);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += u[i] * v[i];
  }
  char *place = operand.data[0] + offset_of(all, c, 0);
  if (operand.accumulate[0]) {
    real old[V];
    load_all<real, V>(old, place, operand.dtype[0]);
#pragma unroll
    for (int i = 0; i < V; ++i) sum[i] += old[i];
  }
  store_all<real, V>(place, operand.dtype[0], sum);
}

/* --- Launching ----------------------------------------------------------------------------------
 */

/* What is launched: the kernel for vectors of any dtypes, of bfloat16, for single floats and for
 * single doubles. */
template <int N> struct launcher {
  void (*vectors)(const launcher &, const walk<N> &, const operands<N> &, cudaStream_t);
  void (*halves)(const launcher &, const walk<N> &, const operands<N> &, cudaStream_t);
  void (*singles)(const launcher &, const walk<N> &, const operands<N> &, cudaStream_t);
  void (*doubles)(const launcher &, const walk<N> &, const operands<N> &, cudaStream_t);
  const void *extra; /* the operation, or the number of terms */
};

/* Elements of one launch: indices stay below 2^31. */
static const int64_t LAUNCH_LIMIT = (int64_t)1 << 30;

template <int N>
static void launch(const launcher<N> &kernels, bool wide, axes<N> all, operands<N> operand,
                   cudaStream_t stream) {
  int64_t count = count_of(all);
  if (count == 0) return;
  if (all.rank == 0) { /* one element */
    all.rank = 1;
    all.shape[0] = 1;
  }
  int bytes[N];
  for (int k = 0; k < N; ++k) bytes[k] = dtype_bytes(operand.dtype[k]);
  auto advanced = [&](int64_t start) { /* along the outermost axis */
                                       operands<N> rest = operand;
                                       for (int k = 0; k < N; ++k)
                                         if (rest.data[k])
                                           rest.data[k] += start * all.stride[k][0] * bytes[k];
                                       return rest;
  };
  if (count > LAUNCH_LIMIT) {
    int64_t half = all.shape[0] / 2;
    if (half > VECTOR) half -= half % VECTOR;
    axes<N> part = all;
    part.shape[0] = half;
    launch(kernels, wide, part, operand, stream);
    part.shape[0] = all.shape[0] - half;
    launch(kernels, wide, part, advanced(half), stream);
    return;
  }
  int inner = all.rank - 1;
  bool halves = true;
  bool vectors = !wide && all.shape[inner] >= VECTOR && all.stride[0][inner] == 1;
  for (int k = 0; k < N && vectors; ++k) {
    if (!operand.data[k]) continue;
    operand.repeats[k] = all.stride[k][inner] == 0;
    halves = halves && operand.dtype[k] == ATTN_BF16 && !operand.repeats[k];
    vectors =
        operand.repeats[k] || (all.stride[k][inner] == 1 && (uintptr_t)operand.data[k] % 16 == 0);
    for (int i = 0; i < inner && vectors && !operand.repeats[k]; ++i)
      vectors = all.stride[k][i] * bytes[k] % 16 == 0;
  }
  if (!vectors || (inner > 0 && all.shape[inner] % VECTOR != 0)) {
    for (int k = 0; k < N; ++k) operand.repeats[k] = false;
    (wide ? kernels.doubles : kernels.singles)(kernels, make_walk(all, bytes), operand, stream);
    return;
  }
  int64_t whole = all.shape[inner] / VECTOR * VECTOR;
  if (whole < all.shape[inner]) { /* one axis: the last few elements */
    axes<N> tail = all;
    tail.shape[0] -= whole;
    launch(kernels, wide, tail, advanced(whole), stream);
  }
  all.shape[inner] = whole / VECTOR;
  for (int k = 0; k < N; ++k) all.stride[k][inner] *= VECTOR;
  (halves ? kernels.halves : kernels.vectors)(kernels, make_walk(all, bytes), operand, stream);
}

template <int N>
static attn_status run(const char *function, const launcher<N> &kernels,
                       const attn_tensor *const (&tensor)[N], const bool (&accumulate)[N],
                       cudaStream_t stream) {
  const attn_tensor *shape = NULL;
  for (int k = 0; k < N && !shape; ++k) shape = tensor[k];
  if (!shape) return ATTN_OK;
  bool wide = false;
  operands<N> operand = {};
  for (int k = 0; k < N; ++k) {
    if (!tensor[k]) continue;
    ATTN_CUDA_CHECK(attn_cuda_check_operand(function, "an operand", tensor[k], shape));
    operand.data[k] = (char *)tensor[k]->data;
    operand.dtype[k] = tensor[k]->dtype;
    operand.accumulate[k] = accumulate[k];
    wide = wide || is_wide(tensor[k]);
  }
  axes<N> all = axes_of<N>(shape, shape->rank, tensor);
  sort_axes(&all);
  collapse(&all);
  launch(kernels, wide, all, operand, stream);
  return attn_cuda_check(cudaGetLastError(), function);
}

template <class real, int V, mix MIX, class operation>
static void launch_map(const launcher<operation::TARGETS + operation::INPUTS> &kernels,
                       const walk<operation::TARGETS + operation::INPUTS> &all,
                       const operands<operation::TARGETS + operation::INPUTS> &operand,
                       cudaStream_t stream) {
  constexpr int N = operation::TARGETS + operation::INPUTS;
  constexpr uint32_t each = THREADS * unroll_of<N, V, MIX>();
  map<real, V, MIX, operation><<<(all.count + each - 1) / each, THREADS, 0, stream>>>(
      all, operand, *(const operation *)kernels.extra);
}

template <class operation>
static attn_status
run_operation(const char *function, const operation &apply,
              const attn_tensor *const (&tensor)[operation::TARGETS + operation::INPUTS],
              const bool (&accumulate)[operation::TARGETS + operation::INPUTS],
              attn_cuda_stream stream) {
  constexpr int N = operation::TARGETS + operation::INPUTS;
  launcher<N> kernels = {
      launch_map<float, VECTOR, MIXED, operation>, launch_map<float, VECTOR, ALL_BF16, operation>,
      launch_map<float, 1, MIXED, operation>, launch_map<double, 1, MIXED, operation>, &apply};
  return run<N>(function, kernels, tensor, accumulate, (cudaStream_t)stream);
}

template <class real, int V, mix MIX>
static void launch_products(const launcher<1 + 2 * TERMS> &kernels, const walk<1 + 2 * TERMS> &all,
                            const operands<1 + 2 * TERMS> &operand, cudaStream_t stream) {
  add_products<real, V, MIX><<<(all.count + THREADS - 1) / THREADS, THREADS, 0, stream>>>(
      all, operand, *(const int *)kernels.extra);
}

/* --- The module's functions ---------------------------------------------------------------------
 */

attn_status attn_cuda_add(const attn_tensor *y, double alpha, const attn_tensor *a, double beta,
                          const attn_tensor *b, attn_cuda_stream stream) {
  return run_operation("add", add_operation{alpha, beta, b != NULL}, {y, a, b}, {}, stream);
}

attn_status attn_cuda_multiply_sum(const attn_tensor *y, bool accumulate, int count,
                                   const attn_tensor *a, const attn_tensor *b,
                                   attn_cuda_stream stream) {
  if (count < 1 || count > TERMS)
    return attn_cuda_fail(ATTN_INVALID_ARGUMENT, "multiply_sum: %d terms; 1 to %d are offered",
                          count, TERMS);
  const attn_tensor *tensor[1 + 2 * TERMS] = {y};
  for (int j = 0; j < count; ++j) {
    tensor[1 + j] = &a[j];
    tensor[1 + TERMS + j] = &b[j];
  }
  const bool add[1 + 2 * TERMS] = {accumulate};
  launcher<1 + 2 *TERMS> kernels = {
      launch_products<float, VECTOR, MIXED>, launch_products<float, VECTOR, ALL_BF16>,
      launch_products<float, 1, MIXED>, launch_products<double, 1, MIXED>, &count};
  return run<1 + 2 * TERMS>("multiply_sum", kernels, tensor, add, (cudaStream_t)stream);
}

attn_status attn_cuda_activate(attn_activation f, const attn_tensor *y, const attn_tensor *x,
                               attn_cuda_stream stream) {
  return run_operation("activate", activate_operation{f}, {y, x}, {}, stream);
}

attn_status attn_cuda_activate_backward(attn_activation f, const attn_tensor *dx, bool accumulate,
                                        const attn_tensor *x, const attn_tensor *dy,
                                        attn_cuda_stream stream) {
  return run_operation("activate_backward", activate_backward_operation{f}, {dx, x, dy},
                       {accumulate}, stream);
}

attn_status attn_cuda_gate(attn_activation f, const attn_tensor *y, const attn_tensor *a,
                           const attn_tensor *b, attn_cuda_stream stream) {
  return run_operation("gate", gate_operation{f}, {y, a, b}, {}, stream);
}

attn_status attn_cuda_gate_backward(attn_activation f, const attn_tensor *da, bool accumulate_a,
                                    const attn_tensor *db, bool accumulate_b, const attn_tensor *y,
                                    const attn_tensor *a, const attn_tensor *b,
                                    const attn_tensor *dy, attn_cuda_stream stream) {
  return run_operation("gate_backward", gate_backward_operation{f}, {da, db, y, a, b, dy},
                       {accumulate_a, accumulate_b, false}, stream);
}

attn_status attn_cuda_cap(const attn_tensor *x, double cap, attn_cuda_stream stream) {
  return run_operation("cap", cap_operation{cap}, {x, x}, {}, stream);
}
