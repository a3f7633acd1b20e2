/* Low-rank adaptation of a linear layer whose matrix W [outputs, inputs] stays as it is, in
 * whatever form it lies (attn/lora.h has the equations). An attn_lora is the adapter of a
 * parameter: attn_op_linear applies it wherever a product with W is made. */
#ifndef ATTN_LAYERS_LORA_H
#define ATTN_LAYERS_LORA_H

#include "attn/lora.h"
#include "graph/graph.h"

typedef struct attn_lora {
  attn_adapter adapter; /* first: what w->adapter points to */
  attn_lora_kind kind;
  int64_t rank;
  double scale;             /* s */
  attn_parameter a, b;      /* A [rank, inputs], B [outputs, rank] */
  attn_parameter magnitude; /* m [outputs]; of DoRA */
  double *squares;          /* W_j . W_j of each row [outputs]; of DoRA */
} attn_lora;

/* s = alpha / rank, of rsLoRA alpha / sqrt(rank). */
double attn_lora_scale(attn_lora_kind kind, int64_t rank, double alpha);

enum { ATTN_LORA_MOST_RANK = 1 << 16 };

/* An adapter that changes nothing yet: A uniform in +-1 / sqrt(inputs) (Kaiming's with a = sqrt 5),
 * from (seed, stream); B zero; m the norms of W's rows. Names are those of PEFT behind w's without
 * ".weight". W is on the processor; its values, not its name or weight, are read here. `compute` is
 * the dtype of products; A, B and m are float32 (float64 for float64), without gradients.
 * A rank above min(outputs, inputs) is allowed, as in PEFT, and adds nothing.
 * ATTN_INVALID_ARGUMENT: the rank is not in 1 .. ATTN_LORA_MOST_RANK, alpha not above 0. */
attn_status attn_lora_create(attn_lora_kind kind, int64_t rank, double alpha,
                             const attn_parameter *w, attn_dtype compute, uint64_t seed,
                             uint64_t stream, attn_lora **lora);
void attn_lora_destroy(attn_lora *lora); /* NULL is fine */

/* Its parameters, A, B and m where there is one; how many. */
enum { ATTN_LORA_PARAMETERS = 3 };
int attn_lora_list(attn_lora *lora, attn_parameter *list[ATTN_LORA_PARAMETERS]);

/* y = x W^T, made without the adapter, to what the adapter makes of it, in y's dtype. x [..,
 * inputs], y [.., outputs]. While recording, y's value is not to be read afterwards. */
attn_var *attn_layer_lora(attn_graph *graph, attn_lora *lora, attn_parameter *w, attn_var *x,
                          attn_var *y);

/* W + s B A, of DoRA diag(m / n) of it, in a new tensor of `dtype` on the processor; sums are
 * float64. */
attn_status attn_lora_merge(const attn_lora *lora, const attn_parameter *w, attn_dtype dtype,
                            attn_tensor *merged);

#endif
