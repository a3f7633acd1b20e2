/* Hopper's own instructions (sm_90a) as functions: mbarriers, the bulk tensor copies, ldmatrix and
 * stmatrix, wgmma; and the tensor maps on the host's side.
 *
 * Tiles in shared memory are [rows][64 elements of 16 bits] with the 128-byte swizzle: the 16-byte
 * piece b of row r lies at r * 128 + ((b ^ (r % 8)) * 16). Tiles start at multiples of 1024 bytes.
 * (PTX ISA 8.x, "Asynchronous warpgroup level matrix instructions".) */
#ifndef ATTN_KERNELS_CUDA_HOPPER_CUH
#define ATTN_KERNELS_CUDA_HOPPER_CUH

#include <cuda.h>

#include "kernels/cuda/common.cuh"

namespace hopper {

__device__ __forceinline__ uint32_t shared_address(const void *pointer) {
  return (uint32_t)__cvta_generic_to_shared(pointer);
}

/* mbarriers, by shared address. */
__device__ __forceinline__ void barrier_init(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile("{\n"
               ".reg .pred ready;\n"
               "again:\n"
               "mbarrier.try_wait.parity.shared::cta.b64 ready, [%0], %1;\n"
               "@ready bra done;\n"
               "bra again;\n"
               "done:\n"
               "}\n" ::"r"(barrier),
               "r"(parity)
               : "memory");
}

/* Barriers among the warps of a part of the block. */
__device__ __forceinline__ void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
/* Orders this thread's ordinary shared-memory stores before later reads by copies and wgmma. */
__device__ __forceinline__ void proxy_fence() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void tensor_load(uint32_t target, const CUtensorMap *map,
                                            uint32_t barrier, int column, int head, int token,
                                            int batch) {
  asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
               "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(target),
               "l"(map), "r"(barrier), "r"(column), "r"(head), "r"(token), "r"(batch)
               : "memory");
}
__device__ __forceinline__ void tensor_store(const CUtensorMap *map, uint32_t source, int column,
                                             int head, int token, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(
          map),
      "r"(source), "r"(column), "r"(head), "r"(token), "r"(batch)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Waits until this thread's stores have read their shared memory. */
__device__ __forceinline__ void tensor_store_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}
__device__ __forceinline__ void tensor_store_wait() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

template <int count> __device__ __forceinline__ void registers_more() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count> __device__ __forceinline__ void registers_fewer() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

/* 16-bit element types: two floats into a word, and back. */
template <typename T> struct element;
template <> struct element<__nv_bfloat16> {
  static constexpr CUtensorMapDataType map_type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
  }
};
template <> struct element<__half> {
  static constexpr CUtensorMapDataType map_type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  static __device__ __forceinline__ uint32_t pack(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  static __device__ __forceinline__ float2 unpack(uint32_t word) {
    return __half22float2(*reinterpret_cast<__half2 *>(&word));
  }
};

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* Four 8 x 8 matrices; lane l gives the address of row l % 8 of matrix l / 8. */
__device__ __forceinline__ void matrix_load(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void matrix_load_transposed(uint32_t (&words)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void matrix_store(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

/* Where 16-byte piece `piece` of `row` lies in a swizzled tile. */
__device__ __forceinline__ uint32_t swizzled(int row, int piece) {
  return (uint32_t)(row * 128 + ((piece ^ (row & 7)) << 4));
}

/* Descriptor of a swizzled tile: eight rows are 1024 bytes; `blocks` bytes lie between tiles of 64
 * columns, for operands whose contiguous dimension is M or N and longer than 64. */
__device__ __forceinline__ uint64_t descriptor(uint32_t address, uint32_t blocks = 16) {
  return (uint64_t)((address & 0x3ffff) >> 4) | (uint64_t)(blocks >> 4) << 16 |
         (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}
/* Keeps the compiler from moving uses of the registers across this point. */
template <int count> __device__ __forceinline__ void pin(float (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+f"(values[i])::"memory");
}
template <int count> __device__ __forceinline__ void pin(uint32_t (&values)[count]) {
#pragma unroll
  for (int i = 0; i < count; i++) asm volatile("" : "+r"(values[i])::"memory");
}

#define HOPPER_8(d, i)                                                                             \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),      \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define HOPPER_32(d, i) HOPPER_8(d, i), HOPPER_8(d, i + 8), HOPPER_8(d, i + 16), HOPPER_8(d, i + 24)
#define HOPPER_WGMMA_64(type)                                                                      \
  asm volatile("{\n"                                                                               \
               ".reg .pred add;\n"                                                                 \
               "setp.ne.b32 add, %37, 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                     \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
               "{%32, %33, %34, %35}, %36, add, 1, 1, %38;\n"                                      \
               "}\n"                                                                               \
               : HOPPER_32(d, 0)                                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(transposed))
#define HOPPER_WGMMA_128(type)                                                                     \
  asm volatile("{\n"                                                                               \
               ".reg .pred add;\n"                                                                 \
               "setp.ne.b32 add, %69, 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                    \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
               "{%64, %65, %66, %67}, %68, add, 1, 1, %70;\n"                                      \
               "}\n"                                                                               \
               : HOPPER_32(d, 0), HOPPER_32(d, 32)                                                 \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(transposed))
#define HOPPER_WGMMA_32_SHARED(type)                                                               \
  asm volatile("{\n"                                                                               \
               ".reg .pred add;\n"                                                                 \
               "setp.ne.b32 add, %18, 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " "                     \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "          \
               "%16, %17, add, 1, 1, %19, %20;\n"                                                  \
               "}\n"                                                                               \
               : HOPPER_8(d, 0), HOPPER_8(d, 8)                                                    \
               : "l"(a), "l"(b), "r"(add), "n"(a_transposed), "n"(transposed))
#define HOPPER_WGMMA_64_SHARED(type)                                                               \
  asm volatile("{\n"                                                                               \
               ".reg .pred add;\n"                                                                 \
               "setp.ne.b32 add, %34, 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "                     \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, " \
               "%32, %33, add, 1, 1, %35, %36;\n"                                                  \
               "}\n"                                                                               \
               : HOPPER_32(d, 0)                                                                   \
               : "l"(a), "l"(b), "r"(add), "n"(a_transposed), "n"(transposed))
#define HOPPER_WGMMA_128_SHARED(type)                                                              \
  asm volatile("{\n"                                                                               \
               ".reg .pred add;\n"                                                                 \
               "setp.ne.b32 add, %66, 0;\n"                                                        \
               "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "                    \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, " \
               "%64, %65, add, 1, 1, %67, %68;\n"                                                  \
               "}\n"                                                                               \
               : HOPPER_32(d, 0), HOPPER_32(d, 32)                                                 \
               : "l"(a), "l"(b), "r"(add), "n"(a_transposed), "n"(transposed))
#define HOPPER_WGMMA_256_SHARED(type)                                                              \
  asm volatile("{\n"                                                                               \
               ".reg .pred add;\n"                                                                 \
               "setp.ne.b32 add, %130, 0;\n"                                                       \
               "wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " "                    \
               "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
               "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
               "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
               "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "  \
               "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "  \
               "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "  \
               "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, "  \
               "%110, %111, "                                                                      \
               "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, "    \
               "%125, %126, %127}, "                                                               \
               "%128, %129, add, 1, 1, %131, %132;\n"                                              \
               "}\n"                                                                               \
               : HOPPER_32(d, 0), HOPPER_32(d, 32), HOPPER_32(d, 64), HOPPER_32(d, 96)             \
               : "l"(a), "l"(b), "r"(add), "n"(a_transposed), "n"(transposed))

/* d [64, N] (+)= a [64, 16] b [16, N] in a warpgroup, N = 64 or 128, or 32 or 256 with both in
 * shared memory; a in registers or in shared memory. `transposed`: b's contiguous dimension in
 * shared memory is the columns (N) rather than the rows (K), and a's the rows (M) rather than the
 * columns (K). */
template <typename T, int transposed>
__device__ __forceinline__ void wgmma(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int add) {
  if constexpr (element<T>::map_type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    HOPPER_WGMMA_64("bf16");
  else
    HOPPER_WGMMA_64("f16");
}
template <typename T, int a_transposed, int transposed>
__device__ __forceinline__ void wgmma(float (&d)[16], uint64_t a, uint64_t b, int add) {
  if constexpr (element<T>::map_type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    HOPPER_WGMMA_32_SHARED("bf16");
  else
    HOPPER_WGMMA_32_SHARED("f16");
}
template <typename T, int a_transposed, int transposed>
__device__ __forceinline__ void wgmma(float (&d)[32], uint64_t a, uint64_t b, int add) {
  if constexpr (element<T>::map_type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    HOPPER_WGMMA_64_SHARED("bf16");
  else
    HOPPER_WGMMA_64_SHARED("f16");
}
template <typename T, int transposed>
__device__ __forceinline__ void wgmma(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int add) {
  if constexpr (element<T>::map_type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    HOPPER_WGMMA_128("bf16");
  else
    HOPPER_WGMMA_128("f16");
}
template <typename T, int a_transposed, int transposed>
__device__ __forceinline__ void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add) {
  if constexpr (element<T>::map_type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    HOPPER_WGMMA_128_SHARED("bf16");
  else
    HOPPER_WGMMA_128_SHARED("f16");
}
template <typename T, int a_transposed, int transposed>
__device__ __forceinline__ void wgmma(float (&d)[128], uint64_t a, uint64_t b, int add) {
  if constexpr (element<T>::map_type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
    HOPPER_WGMMA_256_SHARED("bf16");
  else
    HOPPER_WGMMA_256_SHARED("f16");
}

/* A tensor [batch, length, heads, columns] of 16-bit elements, copied in boxes of 64 tokens by 64
 * columns of one head. Strides in elements. */
inline bool map_encode(CUtensorMap *map, CUtensorMapDataType type, const void *data,
                       int64_t columns, int64_t heads, int64_t tokens, int64_t batch,
                       int64_t head_stride, int64_t token_stride, int64_t batch_stride) {
  typedef CUresult encode_tiled(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                                const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                                const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
  static encode_tiled *const encode = [] {
    void *found = NULL;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess)
      cudaGetLastError();
    return (encode_tiled *)found;
  }();
  if (!encode) return false;
  /* A dimension of one element may have any stride: give it one that is valid. */
  int64_t width = columns * 2;
  int64_t head_bytes = heads > 1 ? head_stride * 2 : width;
  int64_t token_bytes = tokens > 1 ? token_stride * 2 : width;
  int64_t batch_bytes = batch > 1 ? batch_stride * 2 : width;
  cuuint64_t extents[4] = {(cuuint64_t)columns, (cuuint64_t)heads, (cuuint64_t)tokens,
                           (cuuint64_t)batch};
  cuuint64_t strides[3] = {(cuuint64_t)head_bytes, (cuuint64_t)token_bytes,
                           (cuuint64_t)batch_bytes};
  cuuint32_t box[4] = {64, 1, 64, 1}, steps[4] = {1, 1, 1, 1};
  return encode(map, type, 4, (void *)data, extents, strides, box, steps,
                CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

/* Whether map_encode can describe it: 16-byte alignment of the base and of the strides. */
inline bool map_possible(const void *data, int64_t heads, int64_t tokens, int64_t batch,
                         int64_t head_stride, int64_t token_stride, int64_t batch_stride) {
  const int64_t limit = (int64_t)1 << 38; /* the hardware's strides have 40 bits */
  auto fits = [&](int64_t extent, int64_t stride) {
    return extent <= 1 || (stride > 0 && stride % 8 == 0 && stride < limit);
  };
  return (uintptr_t)data % 16 == 0 && fits(heads, head_stride) && fits(tokens, token_stride) &&
         fits(batch, batch_stride);
}

} // namespace hopper

#endif
