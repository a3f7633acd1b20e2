/* Leaky integrate-and-fire neurons and their surrogate gradients (kernels/spikes.h): a thread has a
 * channel of a sequence and walks its tokens; neighbours have neighbouring channels, so that a
 * token is read by whole lines. graph/lif_pass.c has the same for the processor. */
#include "kernels/cuda/rows.cuh"

namespace {

enum { THREADS = 128 };

/* An operand of [batch, length, n]: strides in bytes; channels lie together. NULL: absent. */
struct sequences {
  char *data;
  int dtype;
  int64_t batch, token;
};

struct problem {
  sequences x, spikes, potential, d_spikes, dx;
  void *state;
  int64_t batch, length, n;
  double tau, threshold;
};

template <class real>
__device__ inline real load(const sequences &x, int64_t b, int64_t t, int64_t c) {
  return load_element<real>(x.data + b * x.batch + t * x.token, x.dtype, c);
}

template <class real>
__device__ inline void store(const sequences &x, int64_t b, int64_t t, int64_t c, real value) {
  store_element<real>(x.data + b * x.batch + t * x.token, x.dtype, c, value);
}

/* The thread's sequence and channel, or false. */
__device__ inline bool take_neuron(const problem &p, int64_t *b, int64_t *c) {
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  *b = i / p.n;
  *c = i % p.n;
  return i < p.batch * p.n;
}

template <class real>
__global__ void __launch_bounds__(THREADS) walk(const __grid_constant__ problem p) {
  int64_t b, c;
  if (!take_neuron(p, &b, &c)) return;
  const real rate = (real)(1 / p.tau), least = (real)p.threshold;
  real v = p.state ? ((const real *)p.state)[c] : (real)0;
  for (int64_t t = 0; t < p.length; ++t) {
    real h = v + (load<real>(p.x, b, t, c) - v) * rate;
    real s = h >= least ? (real)1 : (real)0;
    store(p.spikes, b, t, c, s);
    if (p.potential.data) store(p.potential, b, t, c, h);
    v = h * (1 - s);
  }
  if (p.state) ((real *)p.state)[c] = v;
}

template <class real>
__global__ void __launch_bounds__(THREADS) walk_back(const __grid_constant__ problem p) {
  int64_t b, c;
  if (!take_neuron(p, &b, &c)) return;
  const real rate = (real)(1 / p.tau), least = (real)p.threshold;
  const real slope = (real)ATTN_SURROGATE_SLOPE;
  real dv = 0;
  for (int64_t t = p.length - 1; t >= 0; --t) {
    real h = load<real>(p.potential, b, t, c), ds = load<real>(p.d_spikes, b, t, c);
    real sigmoid = 1 / (1 + (real)exp(-(double)(slope * (h - least))));
    real kept = h >= least ? (real)0 : dv;
    real dh = ds * slope * sigmoid * (1 - sigmoid) + kept;
    store(p.dx, b, t, c, dh * rate);
    dv = dh * (1 - rate);
  }
}

template <class real>
__global__ void __launch_bounds__(THREADS)
    invert(char *y, int y_dtype, const char *x, int x_dtype, int64_t n, double epsilon) {
  int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
  if (i >= n) return;
  store_element<real>(y, y_dtype, i,
                      (real)(1 / sqrt(load_element<double>(x, x_dtype, i) + epsilon)));
}

sequences sequences_of(const attn_tensor *x) {
  sequences all = {};
  if (!x) return all;
  int64_t bytes = dtype_bytes(x->dtype);
  all.data = (char *)x->data;
  all.dtype = (int)x->dtype;
  all.batch = x->stride[0] * bytes;
  all.token = x->stride[1] * bytes;
  return all;
}

attn_status run(const attn_lif_tensors *x, bool back, attn_cuda_stream stream) {
  const char *name = back ? "lif_backward" : "lif";
  const attn_tensor *all = back ? x->dx : x->x;
  const attn_tensor *operands[] = {x->x, x->spikes, x->potential, x->d_spikes, x->dx};
  for (const attn_tensor *one : operands)
    ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "an operand", one, all));
  if (all->rank != 3 || (all->dtype != ATTN_F32 && all->dtype != ATTN_F64) ||
      (x->state && (x->state->dtype != all->dtype || all->shape[0] != 1)))
    return attn_cuda_fail(ATTN_UNSUPPORTED, "%s: rank %d of dtype %d", name, all->rank,
                          (int)all->dtype);
  problem p = {};
  p.x = sequences_of(x->x);
  p.spikes = sequences_of(x->spikes);
  p.potential = sequences_of(x->potential);
  p.d_spikes = sequences_of(x->d_spikes);
  p.dx = sequences_of(x->dx);
  p.state = x->state ? x->state->data : NULL;
  p.batch = all->shape[0];
  p.length = all->shape[1];
  p.n = all->shape[2];
  p.tau = x->tau;
  p.threshold = x->threshold;
  unsigned blocks = (unsigned)((p.batch * p.n + THREADS - 1) / THREADS);
  cudaStream_t queue = (cudaStream_t)stream;
  if (all->dtype == ATTN_F64 && back)
    walk_back<double><<<blocks, THREADS, 0, queue>>>(p);
  else if (all->dtype == ATTN_F64)
    walk<double><<<blocks, THREADS, 0, queue>>>(p);
  else if (back)
    walk_back<float><<<blocks, THREADS, 0, queue>>>(p);
  else
    walk<float><<<blocks, THREADS, 0, queue>>>(p);
  ATTN_CUDA_TRY_LAUNCH("lif");
  return ATTN_OK;
}

} // namespace

attn_status attn_cuda_lif(const attn_lif_tensors *tensors, attn_cuda_stream stream) {
  return run(tensors, false, stream);
}

attn_status attn_cuda_lif_backward(const attn_lif_tensors *tensors, attn_cuda_stream stream) {
  return run(tensors, true, stream);
}

attn_status attn_cuda_inverse_root(const attn_tensor *y, const attn_tensor *x, double epsilon,
                                   attn_cuda_stream stream) {
  int64_t n = y->shape[0];
  ATTN_CUDA_CHECK(attn_cuda_check_vector("inverse_root", "y", y, n));
  ATTN_CUDA_CHECK(attn_cuda_check_vector("inverse_root", "x", x, n));
  unsigned blocks = (unsigned)((n + THREADS - 1) / THREADS);
  cudaStream_t queue = (cudaStream_t)stream;
  if (y->dtype == ATTN_F64)
    invert<double><<<blocks, THREADS, 0, queue>>>((char *)y->data, (int)y->dtype,
                                                  (const char *)x->data, (int)x->dtype, n, epsilon);
  else
    invert<float><<<blocks, THREADS, 0, queue>>>((char *)y->data, (int)y->dtype,
                                                 (const char *)x->data, (int)x->dtype, n, epsilon);
  ATTN_CUDA_TRY_LAUNCH("inverse_root");
  return ATTN_OK;
}
