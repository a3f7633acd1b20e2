/* Low-rank adapters of a whole model (layers/lora.h): beside which matrices, and their files. */
#ifndef ATTN_MODELS_LORA_H
#define ATTN_MODELS_LORA_H

#include "layers/lora.h"
#include "models/model.h"

/* Gives the matrices that the options name adapters that change nothing yet, with gradients, and
 * makes the parameters that they name trainable; nothing else is trained then. The model is on the
 * processor and ready for products. ATTN_INVALID_ARGUMENT: a name fits no matrix (the message lists
 * what there is), rank or alpha is out of its range; ATTN_UNSUPPORTED: a matrix that the file keeps
 * as a part of another, so that no file of adapters could say whose it is. After an error the model
 * can only be destroyed. */
attn_status attn_model_attach_lora(attn_model *model, const attn_lora_options *options,
                                   uint64_t seed);
/* Puts every adapter into its matrix, which becomes plain numbers of the compute dtype. */
attn_status attn_model_merge_lora(attn_model *model);

/* An adapter of parameter `index`, without gradients, that changes nothing yet. */
attn_status attn_model_adapt(attn_model *model, int64_t index, attn_lora_kind kind, int64_t rank,
                             double alpha, uint64_t seed);

/* Whether a parameter's name is `pattern`, or ends in it behind a dot, without regard to the
 * ".weight" or ".bias" at its end. */
bool attn_lora_names(const char *name, const char *pattern);

/* The targets that the options name, or the usual ones where they name none. */
const char *const *attn_lora_targets(const attn_lora_options *options, int *count);
bool attn_lora_targets_all(const attn_lora_options *options);

/* The format of PEFT (huggingface/peft: LoraConfig, save_pretrained): a directory with
 * adapter_config.json and adapter_model.safetensors, whose tensors are called
 *
 *   base_model.model.MODULE.lora_A.weight  [r, inputs]      .lora_B.weight  [outputs, r]
 *   base_model.model.MODULE.lora_magnitude_vector  [outputs]             (DoRA)
 *   base_model.model.MODULE.weight                       (trained itself: modules_to_save)
 *
 * after the modules of the base model's file. */
extern const char attn_lora_config_file[], attn_lora_weights_file[], attn_lora_prefix[];

/* Writes both files to a directory that is there (lora_save.c; attn_model_load_lora is
 * lora_load.c). `base` is what the configuration calls the model. */
attn_status attn_model_save_lora(const attn_model *model, const attn_lora_options *options,
                                 const char *base, const char *directory);

#endif
