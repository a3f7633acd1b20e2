/* Parameters: what a model learns. */
#ifndef ATTN_GRAPH_PARAMETER_H
#define ATTN_GRAPH_PARAMETER_H

#include "attn/tensor.h"

struct attn_weight;

typedef struct attn_parameter {
  const char *name;
  attn_tensor value;    /* the master: as in the model file, or float32 (float64) when training */
  attn_tensor gradient; /* float32 (float64), summed by backward; data is NULL at inference */
  bool decay;           /* whether weight decay applies (matrices: yes; norms and biases: no) */
  struct attn_weight *weight; /* of a matrix: its compute form, packed for products; else NULL */
} attn_parameter;

#endif
