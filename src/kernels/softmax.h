/* Kernels of the softmax engine. */
#ifndef ATTN_KERNELS_SOFTMAX_H
#define ATTN_KERNELS_SOFTMAX_H

#include <stdint.h>

#define ATTN_SOFTMAX_KERNELS(K)

#endif
