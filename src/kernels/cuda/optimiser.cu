/* One step of AdamW (rows.h; Loshchilov and Hutter, arXiv 1711.05101). */
#include "kernels/cuda/rows.cuh"

enum { THREADS = 256 };

/* The numbers of a step; the divisions are done once, on the host. */
template <class real> struct adamw_step {
  real beta1, rest1, beta2, rest2, epsilon;
  real rate;  /* rate / correction1 */
  real root;  /* 1 / sqrt(correction2) */
  real decay; /* rate decay */
  real scale; /* of the gradient */
};

static __device__ inline float root(float x) {
  return sqrtf(x);
}
static __device__ inline double root(double x) {
  return sqrt(x);
}

template <class real, int V>
static __global__ void __launch_bounds__(THREADS)
    adamw_elements(real *w, real *g, real *m, real *v, operand copy, int64_t count,
                   const __grid_constant__ adamw_step<real> step) {
  struct alignas(sizeof(real) * V) many {
    real at[V];
  };
  int64_t i = ((int64_t)blockIdx.x * THREADS + threadIdx.x) * V;
  if (i >= count) return;
  many wi = *(const many *)(w + i), gi = *(const many *)(g + i);
  many mi = *(const many *)(m + i), vi = *(const many *)(v + i);
  many zero = {};
#pragma unroll
  for (int e = 0; e < V; ++e) {
    real clipped = step.scale * gi.at[e];
    real first = mi.at[e] = step.beta1 * mi.at[e] + step.rest1 * clipped;
    real second = vi.at[e] = step.beta2 * vi.at[e] + step.rest2 * clipped * clipped;
    wi.at[e] -=
        step.rate * first / (root(second) * step.root + step.epsilon) + step.decay * wi.at[e];
  }
  *(many *)(w + i) = wi;
  *(many *)(m + i) = mi;
  *(many *)(v + i) = vi;
  *(many *)(g + i) = zero;
  if (!copy.data) return;
  if (V == 4 && copy.dtype == ATTN_BF16) {
    __nv_bfloat162 pair[2] = {__floats2bfloat162_rn((float)wi.at[0], (float)wi.at[1 % V]),
                              __floats2bfloat162_rn((float)wi.at[2 % V], (float)wi.at[3 % V])};
    uint2 bits;
    memcpy(&bits, pair, sizeof bits);
    *(uint2 *)(copy.data + 2 * i) = bits;
    return;
  }
#pragma unroll
  for (int e = 0; e < V; ++e) store_element<real>(copy.data, copy.dtype, i + e, wi.at[e]);
}

/* Operands in the order w, g, m, v. */
template <class real, int V>
static void launch(const attn_tensor *const *all, operand copy, int64_t count,
                   const adamw_step<double> &step, cudaStream_t stream) {
  adamw_step<real> rounded = {(real)step.beta1, (real)step.rest1,   (real)step.beta2,
                              (real)step.rest2, (real)step.epsilon, (real)step.rate,
                              (real)step.root,  (real)step.decay,   (real)step.scale};
  int64_t threads = count / V;
  adamw_elements<real, V><<<(unsigned)((threads + THREADS - 1) / THREADS), THREADS, 0, stream>>>(
      (real *)all[0]->data, (real *)all[1]->data, (real *)all[2]->data, (real *)all[3]->data, copy,
      count, rounded);
}

static bool is_contiguous(const attn_tensor *tensor) {
  int64_t next = 1;
  for (int i = tensor->rank - 1; i >= 0; --i) {
    if (tensor->shape[i] != 1 && tensor->stride[i] != next) return false;
    next *= tensor->shape[i];
  }
  return true;
}

attn_status attn_cuda_adamw(const attn_tensor *w, const attn_tensor *g, const attn_tensor *m,
                            const attn_tensor *v, const attn_tensor *copy, double rate,
                            double beta1, double beta2, double epsilon, double decay,
                            double correction1, double correction2, double scale,
                            attn_cuda_stream stream) {
  const attn_tensor *all[] = {w, g, m, v, copy};
  static const char *const names[] = {"w", "g", "m", "v", "copy"};
  int64_t count = 1;
  for (int i = 0; i < w->rank; ++i) count *= w->shape[i];
  bool vectors = w->dtype == ATTN_F32 && count % 4 == 0;
  for (int i = 0; i < 5; ++i) {
    if (!all[i]) continue;
    ATTN_CUDA_CHECK(attn_cuda_check_operand("adamw", names[i], all[i], w));
    if (!is_contiguous(all[i]))
      return attn_cuda_fail(ATTN_INVALID_SHAPE, "adamw: %s is not contiguous", names[i]);
    if (i < 4 && all[i]->dtype != w->dtype)
      return attn_cuda_fail(ATTN_UNSUPPORTED, "adamw: w, g, m and v must have one dtype");
    vectors = vectors && (uintptr_t)all[i]->data % 16 == 0;
  }
  if (w->dtype != ATTN_F32 && w->dtype != ATTN_F64)
    return attn_cuda_fail(ATTN_UNSUPPORTED, "adamw: masters are float32 or float64");
  if (count == 0) return ATTN_OK;
  adamw_step<double> step = {
      beta1,        1 - beta1, beta2, 1 - beta2, epsilon, rate / correction1, 1 / sqrt(correction2),
      rate * decay, scale};
  auto kernel = w->dtype == ATTN_F64 ? launch<double, 1>
                : vectors            ? launch<float, 4>
                                     : launch<float, 1>;
  kernel(all, operand_of(copy), count, step, (cudaStream_t)stream);
  ATTN_CUDA_TRY_LAUNCH("adamw");
  return ATTN_OK;
}
