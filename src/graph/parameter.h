/* Parameters: what a model learns. */
#ifndef ATTN_GRAPH_PARAMETER_H
#define ATTN_GRAPH_PARAMETER_H

#include "attn/tensor.h"
#include "tensor/blocks.h"

struct attn_adapter;
struct attn_weight;

typedef struct attn_parameter {
  const char *name;
  attn_tensor value;  /* the master: as in the model file, or float32 (float64) when training */
  const void *blocks; /* instead, of a matrix: quantised rows, as files have them (then value has a
                       * shape and no data); for inference only */
  attn_block_type block_type;
  const float *scales; /* of float8, owned: one for each block of scale_rows x scale_columns, as
                        * attn_weight_set_scaled has them; NULL: none */
  int64_t scale_rows, scale_columns;
  attn_tensor gradient; /* float32 (float64), summed by backward; data is NULL at inference */
  bool statistic; /* not learnt but measured: a running mean. Its "gradient" is its distance from
                   * what was measured, a share of which each step takes off (optimiser.h) */
  bool decay;     /* whether weight decay applies (matrices: yes; norms and biases: no) */
  struct attn_weight *weight; /* of a matrix: its compute form, packed for products; else NULL */
  const struct attn_adapter *adapter; /* of a matrix: what its products are adapted by, or NULL */
} attn_parameter;

/* What changes the products of a matrix w that stays as it is (layers/lora.h): attn_op_linear makes
 * y = x w^T and gives what `apply` makes of it. An adapter puts its own data behind this. */
struct attn_graph;
struct attn_var;
typedef struct attn_adapter {
  struct attn_var *(*apply)(struct attn_graph *graph, attn_parameter *w, struct attn_var *x,
                            struct attn_var *y);
} attn_adapter;

/* Row r of a matrix as float32, from whichever form it has. */
attn_status attn_parameter_row(const attn_parameter *parameter, int64_t r, float *row);
/* A new tensor with all the values in `dtype`. */
attn_status attn_parameter_copy(const attn_parameter *parameter, attn_dtype dtype,
                                attn_tensor *copy);

#endif
