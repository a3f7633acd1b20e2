/* Models on the device that is tested. */
#ifndef ATTN_TEST_MODELS_H
#define ATTN_TEST_MODELS_H

#include "attn/model.h"

/* attn_model_load, and on to test_device(). */
attn_status test_model_load(const char *path, attn_dtype compute, attn_model **model);

#endif
