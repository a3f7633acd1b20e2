/* How the next token is chosen from a model's logits. */
#ifndef ATTN_SAMPLING_H
#define ATTN_SAMPLING_H

#include "attn/base.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The steps stand in the order in which they are taken (that of llama.cpp):
 *   repetition penalty  the logit l of every token among the last `repetition_window` ones becomes
 *                       l / penalty when positive, l * penalty otherwise (Keskar et al.,
 *                       arXiv:1909.05858)
 *   top-k               the k largest logits stay
 *   top-p               of those, the fewest whose probabilities sum to at least p stay, largest
 *                       first (Holtzman et al., arXiv:1904.09751)
 *   min-p               of those, the ones of at least min_p times the largest probability stay
 *                       (Nguyen et al., arXiv:2407.01082)
 *   temperature         what stays is drawn with probability proportional to exp(l / temperature)
 * Probabilities of top-p and min-p are those at temperature 1. */
typedef struct attn_sampling {
  size_t struct_size;        /* sizeof(attn_sampling), set by ATTN_SAMPLING_INIT */
  double temperature;        /* >= 0; 0: the largest logit (greedy) */
  int64_t top_k;             /* >= 0; 0: off */
  double top_p;              /* (0, 1]; 1: off */
  double min_p;              /* [0, 1]; 0: off */
  double repetition_penalty; /* > 0; 1: off */
  int64_t repetition_window; /* >= 0: the last n tokens; 0: all */
  uint64_t seed;
} attn_sampling;

/* The distribution of the model itself. */
#define ATTN_SAMPLING_INIT                                                                         \
  { sizeof(attn_sampling), 1.0, 0, 1.0, 0.0, 1.0, 0, 0 }

/* ATTN_INVALID_ARGUMENT, with the field and its range, when one is out of it. */
ATTN_API attn_status attn_sampling_check(const attn_sampling *sampling);

#ifdef __cplusplus
}
#endif
#endif
