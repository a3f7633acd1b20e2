/* What the additive scan's consumers do with matrices: between registers, tiles in shared memory
 * and the tensors. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_TILES_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_TILES_CUH

#include "kernels/cuda/recurrent_additive_work.cuh"

namespace additive {

/* Accumulators of a warpgroup for 64 rows: element i of a thread is in row 16 warp + lane / 4 (and
 * 8 below for i % 4 >= 2) and column 8 (i / 4) + 2 (lane % 4) + i % 2. */

/* From the float32 matrix at `data`. */
template <int count>
__device__ void matrix_read(float (&values)[count], const float *data, int64_t row_stride,
                            int64_t column_stride, float scale) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i++)
    values[i] = scale * data[(row + i % 4 / 2 * 8) * row_stride +
                             (i / 4 * 8 + lane % 4 * 2 + i % 2) * column_stride];
}

template <int count>
__device__ void matrix_write(const float (&values)[count], float *data, int64_t row_stride,
                             int64_t column_stride, float scale) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i++)
    data[(row + i % 4 / 2 * 8) * row_stride + (i / 4 * 8 + lane % 4 * 2 + i % 2) * column_stride] =
        scale * values[i];
}

/* The same where columns are contiguous and pairs of them aligned, as in the workspace. */
template <int count>
__device__ void pairs_read(float (&values)[count], const float *data, int row_stride) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i += 2) {
    const float2 pair =
        *(const float2 *)(data + (row + i % 4 / 2 * 8) * row_stride + i / 4 * 8 + lane % 4 * 2);
    values[i] = pair.x, values[i + 1] = pair.y;
  }
}

template <int count>
__device__ void pairs_write(const float (&values)[count], float *data, int row_stride) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < count; i += 2)
    *(float2 *)(data + (row + i % 4 / 2 * 8) * row_stride + i / 4 * 8 + lane % 4 * 2) =
        make_float2(values[i], values[i + 1]);
}

/* Rounded, into swizzled tiles of 64 columns that lie `tile_stride` bytes apart. */
template <typename T, int count>
__device__ __forceinline__ void tile_write(uint32_t tile, int tile_stride,
                                           const float (&values)[count]) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
  for (int j = 0; j < count / 4; j += 2)
    matrix_store(tile + j / 8 * tile_stride + swizzled(row, j % 8 + lane / 16),
                 element<T>::pack(values[4 * j], values[4 * j + 1]),
                 element<T>::pack(values[4 * j + 2], values[4 * j + 3]),
                 element<T>::pack(values[4 * j + 4], values[4 * j + 5]),
                 element<T>::pack(values[4 * j + 6], values[4 * j + 7]));
}

/* The address that a view has for a sequence and head. */
__device__ float *state_at(const state_view &view, const work &w) {
  return view.data + w.batch * view.batch + w.head * view.head;
}

/* Sixteen rows of 64 (the warp's) by 64 k as the A operands of wgmma. */
template <int steps>
__device__ __forceinline__ void rows_load(uint32_t (&a)[steps][4], uint32_t tile) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
#pragma unroll
  for (int k = 0; k < steps; k++)
    matrix_load(a[k],
                tile + k / 4 * TILE_BYTES + swizzled(16 * warp + lane % 16, k % 4 * 2 + lane / 16));
}

/* Scores [64, 64] times 2^{A_i - A_j} where row i sees column j, else 0, as A operands; `exponent0`
 * and `exponent1` are A_i of the thread's rows. */
template <typename T>
__device__ __forceinline__ void weigh(uint32_t (&a)[CHUNK / 16][4], const float (&scores)[32],
                                      const float *exponents, float exponent0, float exponent1,
                                      int reverse) {
  const int lane = threadIdx.x % 32, warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
#pragma unroll
  for (int k = 0; k < CHUNK / 16; k++) {
    /* The warp has rows 16 warp and on: columns before them, on the diagonal, or after. */
    const int distance = reverse ? k - warp : warp - k;
    if (distance < 0) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[k][i] = 0;
      continue;
    }
    float weighed[8];
#pragma unroll
    for (int i = 0; i < 8; i++) weighed[i] = scores[8 * k + i];
#pragma unroll
    for (int j = 0; j < 2; j++) {
      float2 exponent = *(const float2 *)&exponents[16 * k + 8 * j + lane % 4 * 2];
      weighed[4 * j] *= exp2_approximate(exponent0 - exponent.x);
      weighed[4 * j + 1] *= exp2_approximate(exponent0 - exponent.y);
      weighed[4 * j + 2] *= exp2_approximate(exponent1 - exponent.x);
      weighed[4 * j + 3] *= exp2_approximate(exponent1 - exponent.y);
    }
    if (distance == 0) {
#pragma unroll
      for (int i = 0; i < 8; i++) {
        const int row = lane / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (reverse ? column < row : column > row) weighed[i] = 0;
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) a[k][i] = element<T>::pack(weighed[2 * i], weighed[2 * i + 1]);
  }
}

/* The warpgroup's output tiles of a chunk to memory. All of its threads call it, after a barrier
 * that follows the writes to the tiles. */
template <typename T, bool CHANNEL>
__device__ __forceinline__ void out_store(const scan_parameters &p, const work &w,
                                          const CUtensorMap *map, const scan_output &out,
                                          const char *shared, uint32_t base, uint32_t tile,
                                          int tiles, int column0, int token, int valid) {
  if ((p.offsets || CHANNEL) && valid < CHUNK) {
    /* The next sequence's or piece's rows follow. */
    T *rows = (T *)out.data + (p.offsets ? 0 : w.batch * out.batch) +
              (w.start + token) * out.token + w.head * out.head + column0;
    for (int i = threadIdx.x % 128; i < valid * tiles * 8; i += 128) {
      int row = i / (tiles * 8), piece = i % (tiles * 8);
      *(uint4 *)(rows + row * out.token + piece * 8) =
          *(uint4 *)(shared + (tile - base) + piece / 8 * TILE_BYTES + swizzled(row, piece % 8));
    }
  } else if (threadIdx.x % 128 == 0) {
    for (int i = 0; i < tiles; i++)
      tensor_store(map, tile + i * TILE_BYTES, column0 + 64 * i, w.head, (int)w.start + token,
                   p.offsets ? 0 : w.batch);
  }
}

/* Sums over four lanes of the thread's two rows, to p.products. */
__device__ __forceinline__ void products_write(const scan_parameters &p, const work &w,
                                               float (&sums)[2], int token, int valid, int group) {
  const int lane = threadIdx.x % 32, row0 = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    sums[i] += __shfl_xor_sync(~0u, sums[i], 1);
    sums[i] += __shfl_xor_sync(~0u, sums[i], 2);
    if (lane % 4 == 0 && row0 + 8 * i < valid)
      p.products[group * p.products_stride + (flat_start(p, w) + token + row0 + 8 * i) * p.heads +
                 w.head] = sums[i];
  }
}

} // namespace additive

#endif
