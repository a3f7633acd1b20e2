/* The memory that learns while it reads (kernels/online_memory.h), forward and backward: a block of
 * threads walks one head of one sequence, as a thread of the processor does, with its scratch in
 * the workspace. Inside of a step all threads work on the weights. */
#include "kernels/cuda/rows.cuh"

namespace {

enum { THREADS = 256 };

template <class real> __device__ inline real sum_lanes(real value) {
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

#define FN                       __device__ inline
#define HOST                     inline
#define EACH(i, n)               for (int64_t i = threadIdx.x; i < (n); i += THREADS)
#define MEET                     __syncthreads()
#define SQRT(x)                  sqrt(x)
#define EXP(x)                   exp(x)
#define ERFC(x)                  erfc(x)
#define LOAD(data, dtype, i)     load_element<real>(data, dtype, i)
#define STORE(data, dtype, i, x) store_element<real>(data, dtype, i, x)

namespace in_double {
typedef double real;
#define EXACT(name) name
#include "kernels/cuda/online_memory.cuh"
#undef EXACT
} // namespace in_double

namespace in_float {
typedef float real;
#define EXACT(name) in_double::name
#include "kernels/cuda/online_memory.cuh"
#undef EXACT
} // namespace in_float

attn_status check(const attn_online_memory *rule, const attn_online_memory_tensors *x,
                  const attn_tensor *workspace, bool back) {
  const char *name = back ? "online_memory_backward" : "online_memory";
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "k", x->k, x->q));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "o", x->o, x->v));
  if (back) ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "d_o", x->d_o, x->v));
  attn_tensor leading = *x->v;
  leading.rank = 2;
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "alpha", x->alpha, &leading));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "theta", x->theta, &leading));
  ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "gamma", x->gamma, &leading));
  if (x->eta) ATTN_CUDA_CHECK(attn_cuda_check_operand(name, "eta", x->eta, &leading));
  attn_dtype wide = is_wide(x->v) ? ATTN_F64 : ATTN_F32;
  int64_t walks = x->sequences * x->v->shape[1], weights = attn_online_memory_weights(rule);
  if (x->alpha->dtype != wide || workspace->dtype != wide || walks > INT32_MAX ||
      weights > INT32_MAX || x->q->shape[2] != rule->features || x->v->shape[2] != rule->value_dim)
    return attn_cuda_fail(ATTN_UNSUPPORTED,
                          "%s: %lld heads of %lld weights, with gates of dtype %d", name,
                          (long long)walks, (long long)weights, (int)x->alpha->dtype);
  return ATTN_OK;
}

attn_status run(const attn_online_memory *rule, const attn_online_memory_tensors *x,
                const attn_online_memory_state *state, const attn_tensor *workspace, bool back,
                attn_cuda_stream stream) {
  ATTN_CUDA_CHECK(check(rule, x, workspace, back));
  cudaStream_t queue = (cudaStream_t)stream;
  if (is_wide(x->v)) return in_double::launch(rule, x, state, workspace, back, queue);
  return in_float::launch(rule, x, state, workspace, back, queue);
}

} // namespace

attn_status attn_cuda_online_memory(const attn_online_memory *rule,
                                    const attn_online_memory_tensors *x,
                                    const attn_online_memory_state *state,
                                    const attn_tensor *workspace, attn_cuda_stream stream) {
  return run(rule, x, state, workspace, false, stream);
}

attn_status attn_cuda_online_memory_backward(const attn_online_memory *rule,
                                             const attn_online_memory_tensors *x,
                                             const attn_tensor *workspace,
                                             attn_cuda_stream stream) {
  return run(rule, x, NULL, workspace, true, stream);
}
