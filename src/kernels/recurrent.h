/* Kernels of the recurrent engine. */
#ifndef ATTN_KERNELS_RECURRENT_H
#define ATTN_KERNELS_RECURRENT_H

#include <stdint.h>

#define ATTN_RECURRENT_KERNELS(K)

#endif
