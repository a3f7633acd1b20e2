#include "support/models.h"

#include "base/status.h"
#include "support/test.h"

attn_status test_model_load(const char *path, attn_dtype compute, attn_model **model) {
  ATTN_TRY(attn_model_load(path, compute, model));
  return attn_model_move(*model, test_device());
}
