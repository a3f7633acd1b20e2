/* What every test includes: cmocka with its prerequisites, and helpers for numbers. */
#ifndef ATTN_TEST_H
#define ATTN_TEST_H

#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

#include <cmocka.h>

#include "attn/base.h"
#include "attn/device.h"
#include "attn/tensor.h"

/* Fails with the library's message when the call does. */
#define assert_ok(expression)                                                                      \
  do {                                                                                             \
    attn_status test_status_ = (expression);                                                       \
    if (test_status_ != ATTN_OK)                                                                   \
      fail_msg("%s: %s (%s)", #expression, attn_status_name(test_status_), attn_error_message());  \
  } while (0)

/* Fresh normal numbers: the n-th call with one seed always gives the same. */
void test_fill_normal(double *x, int64_t count, double mean, double deviation, uint64_t seed);

/* ||a - b|| / ||b||, infinite if any element of a is not finite. 0 when both are zero. */
double test_relative_error(const double *a, const double *b, int64_t count);

/* The device that laws, operations and models are tested on: $ATTN_TEST_DEVICE, or the processor. A
 * test of what only the processor does (kernel paths, faults of its allocator) begins with
 * test_needs_cpu, which skips it elsewhere. */
attn_device test_device(void);
#define test_needs_cpu()                                                                           \
  do {                                                                                             \
    if (test_device().kind != ATTN_CPU) skip();                                                    \
  } while (0)

/* All elements of a tensor of any strides and floating dtype, in row-major order; malloc'd. */
double *test_to_doubles(const attn_tensor *tensor);
/* A new contiguous tensor of dtype from doubles (rounded) on that device; destroy with
 * attn_tensor_destroy. */
attn_tensor test_from_doubles(const double *x, attn_dtype dtype, int rank, const int64_t *shape);

/* Runs `body` once on every kernel path of this machine, restoring the path afterwards. */
void test_on_every_path(void (*body)(void *context), void *context);

#endif
