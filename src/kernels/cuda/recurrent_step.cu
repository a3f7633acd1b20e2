/* A few tokens (decoding) for every decay and update of attn/recurrent.h: each state goes through
 * the registers once, read and written once, which is what bounds the time.
 *
 * A block owns 64 columns of one state; a thread 4 columns of R neighbouring rows, so that a row is
 * read 256 bytes at a time and all reads of a block are under way before the first is used. With
 * S~ = Diag(alpha) S the sums over rows are taken before the update,
 *   guess = S~^T k,  u = v  or  u = beta (v - guess),  o = scale (S~^T q + (k . q) u),
 * so that a token costs one exchange between the warps. Decays, q, k and v of all tokens are staged
 * in shared memory while the state is on its way. */
#include "kernels/cuda/elements.cuh"

#include <cmath>
#include <cstdio>

namespace {

enum {
  MOST_TOKENS = 4,
  COLUMNS = 64,            /* of a block */
  ROW_LANES = COLUMNS / 4, /* threads that share a row */
  MOST_DIM = 256,
  MOST_WARPS = 8,
};

/* `row`: the stride of a token, or of a key channel in states. */
struct rows {
  char *data;
  attn_dtype dtype;
  int64_t sequence, row, head;
};

struct parameters {
  int64_t batch, length, heads, value_heads, value_dim;
  int dim;
  float scale, epsilon;
  attn_decay decay_kind;
  bool delta, normalise;
  const int32_t *offsets;
  rows q, k, v, o, decay, beta, s0, s1, z0, z1;
};

/* Types are fixed at compile time here: a choice at every load would make the next one wait. */
__device__ __forceinline__ float to_float(float x) {
  return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
  return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
  return __half2float(x);
}

__device__ __forceinline__ float sum_warp(float x) {
#pragma unroll
  for (int mask = 16; mask; mask /= 2) x += __shfl_xor_sync(~0u, x, mask);
  return x;
}

/* The small inputs of a unit. */
template <int TOKENS> struct staged {
  float q[TOKENS][MOST_DIM], k[TOKENS][MOST_DIM], alpha[TOKENS][MOST_DIM];
  float z[TOKENS][MOST_DIM];
  float beta[TOKENS], k_dot_q[TOKENS], factor[TOKENS]; /* factor: scale / den */
  alignas(16) float parts[2][MOST_WARPS][2]
                         [COLUMNS]; /* guess and S~^T q of each warp; tokens take turns */
};

/* R rows a thread; blockDim.x / ROW_LANES groups of them make up the state. Block: [value head of a
 * sequence][slice of 64 columns], with a normaliser all slices of a head after one another, because
 * the final normaliser may lie where the initial one did. */
template <typename T, int R, int TOKENS>
__global__ void __launch_bounds__(32 * MOST_WARPS, R == 8 ? 3 : 2) step_kernel(parameters p) {
  __shared__ __align__(16) staged<TOKENS> shared;
  int64_t slices = (p.value_dim + COLUMNS - 1) / COLUMNS, blocks = p.normalise ? 1 : slices;
  int64_t unit = blockIdx.x / blocks, sequence = unit / p.value_heads, head = unit % p.value_heads;
  int64_t reader = head / (p.value_heads / p.heads), start = 0;
  int tokens = (int)p.length;
  if (p.offsets) {
    start = p.offsets[sequence];
    tokens = p.offsets[sequence + 1] - (int)start;
  }
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int depth = blockDim.x / ROW_LANES * R, first = threadIdx.x / ROW_LANES * R; /* rows */
  auto place = [&](const rows &x, int64_t reading_head, int64_t t) {
    return sequence * x.sequence + reading_head * x.head + (start + t) * x.row;
  };
  const float *s0 = (const float *)p.s0.data;
  float *s1 = (float *)p.s1.data;
  if (s0) s0 += sequence * p.s0.sequence + head * p.s0.head;
  if (s1) s1 += sequence * p.s1.sequence + head * p.s1.head;

  for (int64_t slice = blockIdx.x % blocks; slice < slices; slice += blocks) {
    int64_t column = slice * COLUMNS + threadIdx.x % ROW_LANES * 4;
    bool inside = column < p.value_dim;
    float s[R][4];
#pragma unroll
    for (int i = 0; i < R; ++i) {
      float4 x = make_float4(0, 0, 0, 0);
      if (s0 && inside && first + i < p.dim)
        x = __ldcs((const float4 *)(s0 + (first + i) * p.s0.row + column));
      s[i][0] = x.x, s[i][1] = x.y, s[i][2] = x.z, s[i][3] = x.w;
    }
    float v[TOKENS][4];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        v[t][j] = t < tokens && inside
                      ? to_float(((const T *)p.v.data)[place(p.v, head, t) + column + j])
                      : 0;

    if (slice < blocks) { /* the first slice of the block */
      for (int i = threadIdx.x; i < tokens * depth; i += blockDim.x) {
        int t = i / depth, c = i % depth;
        bool there = c < p.dim;
        shared.q[t][c] = there ? to_float(((const T *)p.q.data)[place(p.q, reader, t) + c]) : 0;
        shared.k[t][c] = there ? to_float(((const T *)p.k.data)[place(p.k, reader, t) + c]) : 0;
        float alpha = there ? 1 : 0;
        if (there && p.decay_kind != ATTN_DECAY_NONE) {
          int64_t at =
              p.decay_kind == ATTN_DECAY_HEAD ? head * p.decay.head : place(p.decay, head, t);
          alpha = expf(
              ((const float *)p.decay.data)[at + (p.decay_kind == ATTN_DECAY_CHANNEL ? c : 0)]);
        }
        shared.alpha[t][c] = alpha;
      }
      if (threadIdx.x < tokens && p.delta)
        shared.beta[threadIdx.x] = ((const float *)p.beta.data)[place(p.beta, head, threadIdx.x)];
      __syncthreads();
      /* z_t = alpha (.) z_{t-1} + k_t by channels, then the sums over channels by warps. */
      for (int c = threadIdx.x; p.normalise && c < p.dim; c += blockDim.x) {
        float z = p.z0.data
                      ? ((const float *)p.z0.data)[sequence * p.z0.sequence + head * p.z0.head + c]
                      : 0;
        for (int t = 0; t < tokens; ++t) {
          z = shared.alpha[t][c] * z + shared.k[t][c];
          shared.z[t][c] = z;
        }
        if (p.z1.data) ((float *)p.z1.data)[sequence * p.z1.sequence + head * p.z1.head + c] = z;
      }
      if (p.normalise) __syncthreads();
      for (int t = warp; t < tokens; t += warps) {
        float k_dot_q = 0, z_dot_q = 0;
        for (int c = lane; c < p.dim; c += 32) {
          k_dot_q += shared.k[t][c] * shared.q[t][c];
          if (p.normalise) z_dot_q += shared.z[t][c] * shared.q[t][c];
        }
        k_dot_q = sum_warp(k_dot_q);
        if (p.normalise) z_dot_q = sum_warp(z_dot_q);
        shared.k_dot_q[t] = k_dot_q;
        shared.factor[t] = p.normalise ? p.scale / (p.scale * z_dot_q + p.epsilon) : p.scale;
      }
      __syncthreads();
    }

#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
      if (t >= tokens) break;
      float guess[4] = {0, 0, 0, 0}, num[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < R; i += 4) {
        float4 a4 = *(const float4 *)&shared.alpha[t][first + i];
        float4 k4 = *(const float4 *)&shared.k[t][first + i];
        float4 q4 = *(const float4 *)&shared.q[t][first + i];
        const float alpha[4] = {a4.x, a4.y, a4.z, a4.w}, k[4] = {k4.x, k4.y, k4.z, k4.w};
        const float q[4] = {q4.x, q4.y, q4.z, q4.w};

#pragma unroll
        for (int l = 0; l < 4; ++l)
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            s[i + l][j] *= alpha[l];
            guess[j] += s[i + l][j] * k[l];
            num[j] += s[i + l][j] * q[l];
          }
      }
      float(*parts)[2][COLUMNS] = shared.parts[t % 2];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        guess[j] += __shfl_xor_sync(~0u, guess[j], ROW_LANES);
        num[j] += __shfl_xor_sync(~0u, num[j], ROW_LANES);
      }
      if (lane < ROW_LANES) {
        *(float4 *)&parts[warp][0][lane * 4] = make_float4(guess[0], guess[1], guess[2], guess[3]);
        *(float4 *)&parts[warp][1][lane * 4] = make_float4(num[0], num[1], num[2], num[3]);
      }
      __syncthreads();
      float u[4];
      int own = threadIdx.x % ROW_LANES * 4;
#pragma unroll
      for (int j = 0; j < 4; ++j) guess[j] = num[j] = 0;
      for (int w = 0; w < warps; ++w) {
        float4 x = *(const float4 *)&parts[w][0][own], y = *(const float4 *)&parts[w][1][own];
        guess[0] += x.x, guess[1] += x.y, guess[2] += x.z, guess[3] += x.w;
        num[0] += y.x, num[1] += y.y, num[2] += y.z, num[3] += y.w;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) u[j] = p.delta ? shared.beta[t] * (v[t][j] - guess[j]) : v[t][j];
      if (threadIdx.x < ROW_LANES && inside)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          store_element<float>(p.o.data, p.o.dtype, place(p.o, head, t) + column + j,
                               (num[j] + shared.k_dot_q[t] * u[j]) * shared.factor[t]);
#pragma unroll
      for (int i = 0; i < R; ++i) {
        float k = shared.k[t][first + i];
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] += k * u[j];
      }
    }
    if (s1 && inside)
#pragma unroll
      for (int i = 0; i < R; ++i)
        if (first + i < p.dim)
          __stcs((float4 *)(s1 + (first + i) * p.s1.row + column),
                 make_float4(s[i][0], s[i][1], s[i][2], s[i][3]));
    __syncthreads(); /* parts are free again */
  }
}

/* choice->values */
enum { ROWS = 0 /* of a thread: 8 or 16 */ };

bool plan(const attn_cuda_device *device, const attn_recurrent_problem *problem,
          attn_cuda_choice *choice) {
  if (problem->length > MOST_TOKENS || problem->value_dim % 4 != 0 ||
      (problem->dtype != ATTN_F32 && problem->dtype != ATTN_BF16 && problem->dtype != ATTN_F16))
    return false;
  int64_t blocks = problem->batch * problem->value_heads * ceil_divide(problem->value_dim, COLUMNS);
  /* Few blocks: more threads for each. */
  choice->values[ROWS] = problem->dim <= 128 && blocks < 4 * device->multiprocessors ? 8 : 16;
  snprintf(choice->description, sizeof choice->description,
           "step: up to %d tokens, the state read and written once", (int)MOST_TOKENS);
  return true;
}

/* Rows of states are read 16 bytes at a time. */
bool aligned(const attn_tensor &state) {
  if (!state.data) return true;
  bool fits = (uintptr_t)state.data % 16 == 0;
  for (int i = 0; i < 3; ++i) fits = fits && (state.stride[i] % 4 == 0 || state.shape[i] <= 1);
  return fits;
}
bool suits(const attn_recurrent_problem *, const attn_recurrent_args *args) {
  return aligned(args->initial_state) && aligned(args->final_state);
}

/* [batch, length, heads, ...], or [total, heads, ...] when packed. */
rows over_tokens(const attn_tensor &t, bool packed) {
  if (packed) return {(char *)t.data, t.dtype, 0, t.stride[0], t.stride[1]};
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[1], t.stride[2]};
}
/* [batch, value_heads, dim, ...]. */
rows over_channels(const attn_tensor &t) {
  return {(char *)t.data, t.dtype, t.stride[0], t.stride[2], t.stride[1]};
}

typedef void kernel(parameters p);

template <typename T>
kernel *choose(const attn_cuda_choice *choice, const attn_recurrent_problem *problem) {
  if (choice->values[ROWS] == 8)
    return problem->length == 1 ? step_kernel<T, 8, 1> : step_kernel<T, 8, MOST_TOKENS>;
  return problem->length == 1 ? step_kernel<T, 16, 1> : step_kernel<T, 16, MOST_TOKENS>;
}

attn_status run(const attn_cuda_device *, const attn_cuda_choice *choice,
                const attn_recurrent_problem *problem, const attn_recurrent_args *args, void *,
                cudaStream_t stream) {
  parameters p = {};
  bool packed = problem->ragged;
  p.batch = problem->batch, p.length = problem->length;
  p.heads = problem->heads, p.value_heads = problem->value_heads;
  p.dim = (int)problem->dim, p.value_dim = problem->value_dim;
  p.scale = (float)problem->scale, p.epsilon = (float)problem->epsilon;
  p.decay_kind = problem->decay;
  p.delta = problem->update == ATTN_UPDATE_DELTA, p.normalise = problem->normalise;
  if (packed) p.offsets = args->offsets;
  p.q = over_tokens(args->q, packed), p.k = over_tokens(args->k, packed);
  p.v = over_tokens(args->v, packed), p.o = over_tokens(args->o, packed);
  if (p.decay_kind == ATTN_DECAY_HEAD)
    p.decay = {(char *)args->decay.data, args->decay.dtype, 0, 0, args->decay.stride[0]};
  else if (p.decay_kind != ATTN_DECAY_NONE)
    p.decay = over_tokens(args->decay, packed);
  if (p.delta) p.beta = over_tokens(args->beta, packed);
  p.s0 = over_channels(args->initial_state), p.s1 = over_channels(args->final_state);
  if (p.normalise)
    p.z0 = over_channels(args->initial_normaliser), p.z1 = over_channels(args->final_normaliser);
  int64_t slices = p.normalise ? 1 : ceil_divide(p.value_dim, COLUMNS);
  unsigned blocks = (unsigned)(p.batch * p.value_heads * slices);
  if (blocks == 0) return ATTN_OK;
  int threads = (int)(ceil_divide(p.dim, choice->values[ROWS]) * ROW_LANES + 31) / 32 * 32;
  kernel *function = problem->dtype == ATTN_F32   ? choose<float>(choice, problem)
                     : problem->dtype == ATTN_F16 ? choose<__half>(choice, problem)
                                                  : choose<__nv_bfloat16>(choice, problem);
  function<<<blocks, threads, 0, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("recurrent_step");
  return ATTN_OK;
}

} // namespace

extern const recurrent_algorithm recurrent_step = {"step", ATTN_PASS_FORWARD, plan, suits, run};
