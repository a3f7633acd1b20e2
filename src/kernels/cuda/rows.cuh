/* What the kernels of rows.h share: elements of run-time dtypes, vectors of eight of them, walks
 * over operands with any strides, and sums over the threads that share a row.
 *
 * Dtypes are switched at loads and stores, not by templates: memory is what these kernels wait for,
 * and a switch that is the same for all threads costs next to nothing beside it. */
#ifndef ATTN_KERNELS_CUDA_ROWS_CUH
#define ATTN_KERNELS_CUDA_ROWS_CUH

#include "kernels/cuda/common.cuh"

#include <cstdlib>
#include <cstring>

enum {
  VECTOR = 8, /* elements: 16 bytes of bfloat16, twice 16 of float32 */
  WARP = 32,
};

/* --- Elements --------------------------------------------------------------------------------- */

template <class real> __device__ inline real load_element(const void *data, int dtype, int64_t i) {
  switch (dtype) {
  case ATTN_F64: return (real)((const double *)data)[i];
  case ATTN_F32: return (real)((const float *)data)[i];
  case ATTN_BF16: return (real)__bfloat162float(((const __nv_bfloat16 *)data)[i]);
  default: return (real)__half2float(((const __half *)data)[i]);
  }
}

template <class real>
__device__ inline void store_element(void *data, int dtype, int64_t i, real value) {
  switch (dtype) {
  case ATTN_F64: ((double *)data)[i] = (double)value; break;
  case ATTN_F32: ((float *)data)[i] = (float)value; break;
  case ATTN_BF16: ((__nv_bfloat16 *)data)[i] = __float2bfloat16_rn((float)value); break;
  default: ((__half *)data)[i] = __float2half_rn((float)value);
  }
}

/* Eight elements as they lie in memory. Loads go first and conversions later, so that the loads of
 * all operands are in flight together. */
struct raw_vector {
  uint4 low, high; /* high: of float32 only */
};

__device__ inline raw_vector load_raw(const void *place, int dtype) {
  raw_vector raw;
  raw.low = *(const uint4 *)place;
  raw.high = make_uint4(0, 0, 0, 0);
  if (dtype == ATTN_F32) raw.high = ((const uint4 *)place)[1];
  return raw;
}

__device__ inline void unpack(float *x, const raw_vector &raw, int dtype) {
  const uint32_t word[8] = {raw.low.x,  raw.low.y,  raw.low.z,  raw.low.w,
                            raw.high.x, raw.high.y, raw.high.z, raw.high.w};
  if (dtype == ATTN_F32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) x[i] = __uint_as_float(word[i]);
  } else if (dtype == ATTN_BF16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(word[i] << 16);
      x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __half2 pair;
      memcpy(&pair, &word[i], sizeof pair);
      float2 two = __half22float2(pair);
      x[2 * i] = two.x;
      x[2 * i + 1] = two.y;
    }
  }
}

/* In assembly, because the compiler takes vector stores apart into words where it can. */
__device__ inline void store_words(void *place, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(place), "r"(a), "r"(b), "r"(c),
               "r"(d)
               : "memory");
}

__device__ inline void store_vector(void *place, int dtype, const float *x) {
  uint32_t word[8];
  if (dtype == ATTN_F32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) word[i] = __float_as_uint(x[i]);
    store_words((char *)place + 16, word[4], word[5], word[6], word[7]);
  } else if (dtype == ATTN_BF16) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __nv_bfloat162 pair = __floats2bfloat162_rn(x[2 * i], x[2 * i + 1]);
      memcpy(&word[i], &pair, sizeof pair);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __half2 pair = __floats2half2_rn(x[2 * i], x[2 * i + 1]);
      memcpy(&word[i], &pair, sizeof pair);
    }
  }
  store_words(place, word[0], word[1], word[2], word[3]);
}

/* V elements as `real` from a byte address; V is VECTOR only for float. */
template <class real, int V>
__device__ inline void load_all(real *x, const char *place, int dtype) {
  if constexpr (V == VECTOR)
    unpack(x, load_raw(place, dtype), dtype);
  else
    x[0] = load_element<real>(place, dtype, 0);
}

template <class real, int V>
__device__ inline void store_all(char *place, int dtype, const real *x) {
  if constexpr (V == VECTOR)
    store_vector(place, dtype, x);
  else
    store_element<real>(place, dtype, 0, x[0]);
}

__host__ __device__ inline int dtype_bytes(int dtype) {
  return dtype == ATTN_F64 ? 8 : dtype == ATTN_F32 ? 4 : 2;
}

/* --- Walks over several operands of one shape --------------------------------------------------
 */

/* Division of n < 2^31 by a constant: q = (mulhi(n, multiplier) + n) >> shift
 * (Granlund and Montgomery, Division by invariant integers using multiplication, 1994). */
struct division {
  uint32_t divisor, multiplier, shift;
};

inline division make_division(int64_t divisor) {
  division by = {(uint32_t)divisor, 0, 0};
  while ((1ull << by.shift) < (uint64_t)divisor) ++by.shift;
  by.multiplier =
      (uint32_t)(((1ull << 32) * ((1ull << by.shift) - (uint64_t)divisor)) / (uint64_t)divisor + 1);
  return by;
}

__device__ inline uint32_t divide(uint32_t n, const division &by) {
  return (__umulhi(n, by.multiplier) + n) >> by.shift;
}

/* Axes of up to N operands, outermost first; strides in elements. */
template <int N> struct axes {
  int rank;
  int64_t shape[ATTN_MAX_RANK];
  int64_t stride[N][ATTN_MAX_RANK];
};

/* The axes [0, rank) of the operands; absent ones (NULL) have strides 0. */
template <int N>
inline axes<N> axes_of(const attn_tensor *shape, int rank, const attn_tensor *const (&operand)[N]) {
  axes<N> all = {};
  all.rank = rank;
  for (int i = 0; i < rank; ++i) {
    all.shape[i] = shape->shape[i];
    for (int k = 0; k < N; ++k) all.stride[k][i] = operand[k] ? operand[k]->stride[i] : 0;
  }
  return all;
}

template <int N> inline int64_t count_of(const axes<N> &all) {
  int64_t count = 1;
  for (int i = 0; i < all.rank; ++i) count *= all.shape[i];
  return count;
}

/* Drops axes of one element and joins those that lie one after the other in every operand. */
template <int N> inline void collapse(axes<N> *all) {
  int kept = 0;
  for (int i = 0; i < all->rank; ++i) {
    if (all->shape[i] == 1) continue;
    bool joins = kept > 0;
    for (int k = 0; k < N && joins; ++k)
      joins = all->stride[k][kept - 1] == all->stride[k][i] * all->shape[i];
    int to = joins ? kept - 1 : kept++;
    all->shape[to] = (joins ? all->shape[to] : 1) * all->shape[i];
    for (int k = 0; k < N; ++k) all->stride[k][to] = all->stride[k][i];
  }
  all->rank = kept;
}

/* Axes go in the order of operand 0's memory, so that neighbouring threads write neighbours. */
template <int N> inline void sort_axes(axes<N> *all) {
  for (int i = 1; i < all->rank; ++i)
    for (int j = i; j > 0 && llabs(all->stride[0][j - 1]) < llabs(all->stride[0][j]); --j) {
      int64_t kept = all->shape[j];
      all->shape[j] = all->shape[j - 1];
      all->shape[j - 1] = kept;
      for (int k = 0; k < N; ++k) {
        kept = all->stride[k][j];
        all->stride[k][j] = all->stride[k][j - 1];
        all->stride[k][j - 1] = kept;
      }
    }
}

/* The same for a kernel: a linear index becomes coordinates, these a byte offset for each operand.
 */
template <int N> struct walk {
  int rank;
  uint32_t count;
  division extent[ATTN_MAX_RANK];   /* innermost first */
  int64_t stride[N][ATTN_MAX_RANK]; /* bytes */
};

struct coordinates {
  uint32_t at[ATTN_MAX_RANK];
};

template <int N> inline walk<N> make_walk(const axes<N> &all, const int (&bytes)[N]) {
  walk<N> result = {};
  result.rank = all.rank;
  result.count = (uint32_t)count_of(all);
  for (division &extent : result.extent) extent = make_division(1 << 30); /* of absent axes */
  for (int i = 0; i < all.rank; ++i) {
    result.extent[i] = make_division(all.shape[all.rank - 1 - i]);
    for (int k = 0; k < N; ++k) result.stride[k][i] = all.stride[k][all.rank - 1 - i] * bytes[k];
  }
  return result;
}

/* Two axes at most are the usual case, and then these are a few instructions. */
template <int N> __device__ inline coordinates locate(const walk<N> &all, uint32_t index) {
  coordinates c;
  c.at[1] = divide(index, all.extent[0]);
  c.at[0] = index - c.at[1] * all.extent[0].divisor;
  if (all.rank <= 2) return c;
#pragma unroll
  for (int i = 1; i + 1 < ATTN_MAX_RANK; ++i) {
    c.at[i + 1] = divide(c.at[i], all.extent[i]);
    c.at[i] -= c.at[i + 1] * all.extent[i].divisor;
  }
  return c;
}

template <int N>
__device__ inline int64_t offset_of(const walk<N> &all, const coordinates &c, int operand) {
  int64_t offset =
      (int64_t)c.at[0] * all.stride[operand][0] + (int64_t)c.at[1] * all.stride[operand][1];
  if (all.rank <= 2) return offset;
#pragma unroll
  for (int i = 2; i < ATTN_MAX_RANK; ++i) offset += (int64_t)c.at[i] * all.stride[operand][i];
  return offset;
}

/* A walk over rows: all axes but the innermost. */
template <int N>
inline walk<N> walk_rows(const attn_tensor *shape, const attn_tensor *const (&operand)[N]) {
  axes<N> all = axes_of<N>(shape, shape->rank - 1, operand);
  collapse(&all);
  int bytes[N];
  for (int k = 0; k < N; ++k) bytes[k] = operand[k] ? dtype_bytes(operand[k]->dtype) : 0;
  return make_walk(all, bytes);
}

/* Whether rows of n elements can be read eight elements at a time: contiguous, aligned, no
 * float64. A tensor that is not there can. A single row is asked for its stride too: it has to be
 * summed as it would be among others. */
inline bool rows_are_vectors(const attn_tensor *tensor) {
  if (!tensor) return true;
  int inner = tensor->rank - 1, bytes = dtype_bytes(tensor->dtype);
  if (tensor->dtype == ATTN_F64 || tensor->shape[inner] % VECTOR != 0 ||
      (tensor->stride[inner] != 1) || (uintptr_t)tensor->data % 16 != 0)
    return false;
  for (int i = 0; i < inner; ++i)
    if (tensor->stride[i] * bytes % 16 != 0) return false;
  return true;
}

/* --- Operands of a call -------------------------------------------------------------------------
 */

struct operand {
  char *data; /* NULL: absent */
  int dtype;
  int64_t step; /* bytes between elements of a row */
};

inline operand operand_of(const attn_tensor *tensor) {
  if (!tensor) return operand{NULL, ATTN_F32, 0};
  return operand{(char *)tensor->data, (int)tensor->dtype,
                 tensor->rank > 0 ? tensor->stride[tensor->rank - 1] * dtype_bytes(tensor->dtype)
                                  : 0};
}

inline bool is_wide(const attn_tensor *tensor) {
  return tensor && tensor->dtype == ATTN_F64;
}

/* Refuses what is no floating dtype, and other shapes than `shape`'s. */
attn_status attn_cuda_check_operand(const char *function, const char *name,
                                    const attn_tensor *tensor, const attn_tensor *shape);
/* Refuses a vector that does not have n elements. */
attn_status attn_cuda_check_vector(const char *function, const char *name,
                                   const attn_tensor *tensor, int64_t n);
/* More rows than a grid of 32-bit indices takes are refused. */
attn_status attn_cuda_count_rows(const char *function, const attn_tensor *tensor, int64_t *rows);

#define ATTN_CUDA_CHECK(call)                                                                      \
  do {                                                                                             \
    attn_status attn_try_status = (call);                                                          \
    if (attn_try_status != ATTN_OK) return attn_try_status;                                        \
  } while (0)

/* --- Sums over the threads that share a row ----------------------------------------------------
 */

/* `width` threads, a power of two: some lanes of a warp, or consecutive warps of the block, which
 * meet at `barrier`. Those of a group get the same bits. `shared` holds a number for each warp of
 * the block and must not be the one of the sum before. */
template <class real, class meet>
__device__ inline real sum_group(real value, int width, real *shared, meet barrier) {
#pragma unroll
  for (int step = 1; step < WARP; step *= 2)
    if (step < width) value += __shfl_xor_sync(~0u, value, step);
  if (width <= WARP) return value;
  int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
  int warps = width / WARP, group = warp / warps;
  if (lane == 0) shared[warp] = value;
  barrier();
  value = lane < warps ? shared[group * warps + lane] : (real)0;
#pragma unroll
  for (int step = 1; step < WARP; step *= 2) value += __shfl_xor_sync(~0u, value, step);
  return value;
}

/* All threads of the block call it. */
template <class real> __device__ inline real sum_group(real value, int width, real *shared) {
  return sum_group(value, width, shared, [] { __syncthreads(); });
}

inline int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

/* y[c] (+)= the sum over `parts` of partial[part, c], in order. */
attn_status attn_cuda_add_parts(const attn_tensor *y, bool accumulate, const double *partial,
                                int parts, cudaStream_t stream);

#endif
