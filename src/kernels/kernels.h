/* The kernel table: everything machine-specific, one slot a kernel.
 *
 * Each family has a header with the list of its kernels: matmul.h, convert.h, matvec.h, blocks.h,
 * rows.h, softmax.h, recurrent.h, newton_schulz.h, online_memory.h. Kernel `x` of path `p` is the
 * function attn_p_x in src/kernels/cpu/p/. `generic` has all of them, in portable C; the other
 * paths have some, and a slot that a path lacks is filled from the next slower path. See
 * docs/kernels.md for how to add one. */
#ifndef ATTN_KERNELS_KERNELS_H
#define ATTN_KERNELS_KERNELS_H

#include "attn/base.h"
#include "attn/tensor.h"
#include "kernels/convert.h"
#include "kernels/matmul.h"
#include "kernels/matvec.h"
#include "kernels/blocks.h"
#include "kernels/rows.h"
#include "kernels/softmax.h"
#include "kernels/recurrent.h"
#include "kernels/online_memory.h"

/* K(result, name, (parameters)) for every kernel. */
#define ATTN_KERNEL_LIST(K)                                                                        \
  ATTN_CONVERT_KERNELS(K)                                                                          \
  ATTN_MATMUL_KERNELS(K)                                                                           \
  ATTN_MATVEC_KERNELS(K)                                                                           \
  ATTN_BLOCKS_KERNELS(K)                                                                           \
  ATTN_ROWS_KERNELS(K)                                                                             \
  ATTN_SOFTMAX_KERNELS(K)                                                                          \
  ATTN_RECURRENT_KERNELS(K)                                                                        \
  ATTN_NEWTON_SCHULZ_KERNELS(K)                                                                    \
  ATTN_ONLINE_MEMORY_KERNELS(K)

typedef struct attn_kernels {
  attn_kernel_path path;
  /* Called by each thread before and after it runs kernels: AMX needs its tiles configured and,
   * afterwards, released. Cheap; nothing on the other paths. Not to be held across oneDNN calls. */
  void (*begin)(void);
  void (*end)(void);
#define ATTN_KERNEL_MEMBER(result, name, parameters) result(*name) parameters;
  ATTN_KERNEL_LIST(ATTN_KERNEL_MEMBER)
#undef ATTN_KERNEL_MEMBER
} attn_kernels;

/* The table of the process's current path, complete; and of a given available path. */
const attn_kernels *attn_kernels_get(void);
const attn_kernels *attn_kernels_of(attn_kernel_path path);

#define ATTN_DECLARE_GENERIC(result, name, parameters) result attn_generic_##name parameters;
#define ATTN_DECLARE_AVX2(result, name, parameters)    result attn_avx2_##name parameters;
#define ATTN_DECLARE_AVX512(result, name, parameters)  result attn_avx512_##name parameters;
#define ATTN_DECLARE_BF16(result, name, parameters)    result attn_avx512bf16_##name parameters;
#define ATTN_DECLARE_VNNI(result, name, parameters)    result attn_avx512vnni_##name parameters;
#define ATTN_DECLARE_AMX(result, name, parameters)     result attn_amx_##name parameters;
ATTN_KERNEL_LIST(ATTN_DECLARE_GENERIC)
ATTN_KERNEL_LIST(ATTN_DECLARE_AVX2)
ATTN_KERNEL_LIST(ATTN_DECLARE_AVX512)
ATTN_KERNEL_LIST(ATTN_DECLARE_BF16)
ATTN_KERNEL_LIST(ATTN_DECLARE_VNNI)
ATTN_KERNEL_LIST(ATTN_DECLARE_AMX)

/* The paths' own, incomplete tables (src/kernels/cpu/<path>/table.c). avx512vnni and avx512bf16
 * are not paths of their own: their kernels go into the avx512 and amx paths of machines that have
 * the instructions. */
extern const attn_kernels attn_kernels_generic;
#if defined(__x86_64__)
extern const attn_kernels attn_kernels_avx2, attn_kernels_avx512, attn_kernels_avx512vnni,
    attn_kernels_avx512bf16, attn_kernels_amx;
#endif

#endif
