/* Low-rank adapters: a model's matrices stay as they are, and small ones beside them are trained.
 *
 *   LoRA    y = W x + s B (A x),  s = alpha / r         (arXiv 2106.09685)
 *   rsLoRA  the same with         s = alpha / sqrt(r)   (arXiv 2312.03732)
 *   DoRA    y = m (.) V x / ||V||,  V = W + (alpha / r) B A, the norm of each row of V, which is a
 *           constant to the gradient                    (arXiv 2402.09353)
 *
 * with A [r, inputs] and B [outputs, r] for W [outputs, inputs]; m [outputs]. */
#ifndef ATTN_LORA_H
#define ATTN_LORA_H

#include "attn/model.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum attn_lora_kind {
  ATTN_LORA_PLAIN = 0,
  ATTN_LORA_RANK_STABLE,
  ATTN_LORA_DORA,
} attn_lora_kind;

typedef struct attn_lora_options {
  size_t struct_size;
  attn_lora_kind kind;
  int64_t rank; /* r; above the smaller side of a matrix it adds nothing */
  double alpha;
  /* Which matrices: names of modules in the model's file, or their ends behind a dot, as PEFT's
   * target_modules: "q_proj", "mlp.down_proj". The one target "all": every matrix that a layer
   * multiplies by. NULL: q_proj, k_proj, v_proj and o_proj, as far as there are any. */
  const char *const *targets;
  int target_count;
  /* Parameters that are trained themselves besides, found by the same rule: the new ones of a
   * mixer, norms, a head ("lm_head"). */
  const char *const *trained;
  int trained_count;
} attn_lora_options;

#define ATTN_LORA_OPTIONS_INIT                                                                     \
  { .struct_size = sizeof(attn_lora_options), .rank = 8, .alpha = 16 }

/* Adds an adapter in the format of PEFT, a directory with adapter_config.json and
 * adapter_model.safetensors, to the weights of a model on the processor: the matrices that it
 * changes become W + s B A, plain numbers of the compute dtype, whatever they lay in. A token then
 * costs what it costs without an adapter. No session of the model may be there. After an error,
 * which names the tensor or key that does not fit (ATTN_BAD_FORMAT, ATTN_UNSUPPORTED,
 * ATTN_NOT_FOUND), the model can only be destroyed. */
ATTN_API attn_status attn_model_load_lora(attn_model *model, const char *directory);

#ifdef __cplusplus
}
#endif
#endif
