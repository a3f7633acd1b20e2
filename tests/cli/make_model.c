/* Makes a small model for the tests of the command:  make_model DIRECTORY CONFIG [SEED] */
#include "attn/attn.h"

#include <stdio.h>
#include <stdlib.h>

int main(int argc, char **argv) {
  attn_model *model;
  if (argc < 3) {
    fprintf(stderr, "usage: make_model DIRECTORY CONFIG [SEED]\n");
    return 2;
  }
  uint64_t seed = argc > 3 ? strtoull(argv[3], NULL, 10) : 1;
  attn_status status = attn_model_create(argv[2], seed, ATTN_F32, &model);
  if (status == ATTN_OK) {
    status = attn_model_save(model, argv[1], ATTN_F32);
    attn_model_destroy(model);
  }
  if (status == ATTN_OK) return 0;
  fprintf(stderr, "make_model: %s\n", attn_error_message());
  return 1;
}
