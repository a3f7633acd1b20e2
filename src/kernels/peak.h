/* The machine's limits, measured: what fractions of a peak are taken of. Each takes some tens of
 * milliseconds and uses `threads` threads. */
#ifndef ATTN_KERNELS_PEAK_H
#define ATTN_KERNELS_PEAK_H

/* Floating-point operations a second of the current path's multiply instructions on operands in the
 * first-level cache: for bfloat16 the raw rate of TDPBF16PS where there is AMX. */
double attn_kernels_peak_bf16(int threads);
double attn_kernels_peak_f32(int threads);
/* Bytes a second, read plus written, of copies between buffers larger than the caches. 0 when out
 * of memory. */
double attn_kernels_copy_bandwidth(int threads);

#endif
