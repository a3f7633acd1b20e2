/* The recurrent engine: linear attention with a carried state, by blocks.
 *
 *   S~_t = Diag(alpha_t) S_{t-1}
 *   additive:  S_t = S~_t + k_t v_t^T
 *   delta:     S_t = S~_t + k_t beta_t (v_t - S~_t^T k_t)^T
 *   o_t  = scale S_t^T q_t,   divided by (scale z_t . q_t + epsilon) with the normaliser,
 *          z_t = alpha_t (.) z_{t-1} + k_t
 *
 * S is [dim, value_dim] for each value head, float32 (float64 for float64). alpha_t = exp(g_t), g
 * <= 0: none (alpha = 1), a constant per head, per token and head, or per token, head and key
 * channel. Instances: linear attention, Lightning Attention (arXiv 2401.04658, 2405.17381), GLA
 * (2312.06635), DeltaNet (2406.06484), Gated DeltaNet (2412.06464), Kimi Delta Attention
 * (2510.26692).
 *
 * Inside a block the quadratic form, between blocks the state: cost O(length), memory O(length).
 * Layout [batch, length, heads, dim], innermost dimension contiguous, other strides free. Value
 * head h reads query and key head h / (value_heads / heads). */
#ifndef ATTN_RECURRENT_H
#define ATTN_RECURRENT_H

#include "attn/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum attn_decay {
  ATTN_DECAY_NONE = 0,
  ATTN_DECAY_HEAD,    /* constant: log decay [value_heads]; no gradient by default */
  ATTN_DECAY_TOKEN,   /* log decay [batch, length, value_heads] */
  ATTN_DECAY_CHANNEL, /* log decay [batch, length, value_heads, dim] */
} attn_decay;

typedef enum attn_update { ATTN_UPDATE_ADDITIVE = 0, ATTN_UPDATE_DELTA } attn_update;

typedef struct attn_recurrent_problem {
  size_t struct_size;
  attn_dtype dtype; /* of q, k, v, o and their gradients: float64, float32 or bfloat16 */
  int passes;
  int64_t batch, length;      /* when ragged: sequences and the longest */
  int64_t heads, value_heads; /* value_heads is a multiple of heads */
  int64_t dim, value_dim;     /* 1 to 256 */
  double scale;               /* of the query; 0 means 1 (no scaling) */
  attn_decay decay;
  attn_update update;
  bool normalise;
  double epsilon;     /* of the normaliser; 0 means 1e-6 */
  bool ragged;        /* packed: args.offsets is given */
  int64_t block;      /* tokens a block; 0: the plan chooses, as it always does on a GPU */
  attn_device device; /* where the tensors lie; {0}: the processor */
  attn_planning planning;
} attn_recurrent_problem;

#define ATTN_RECURRENT_PROBLEM_INIT                                                                \
  {                                                                                                \
    .struct_size = sizeof(attn_recurrent_problem), .dtype = ATTN_F32, .passes = ATTN_PASS_FORWARD, \
    .batch = 1, .heads = 1, .value_heads = 1                                                       \
  }

typedef struct attn_recurrent_args {
  attn_tensor q, k;  /* [batch, length, heads, dim]; ragged: [total, heads, dim] */
  attn_tensor v, o;  /* [batch, length, value_heads, value_dim]; ragged: [total, ...] */
  attn_tensor decay; /* log decay g <= 0, float32 (float64 for float64); shape by attn_decay, with
                        [total, ...] for [batch, length, ...] when ragged */
  attn_tensor beta;  /* delta: float32 (float64 for float64) [batch, length, value_heads] */
  attn_tensor initial_state; /* optional, [batch, value_heads, dim, value_dim] float32 (float64) */
  attn_tensor final_state;   /* optional, the same shape; may be the same memory as initial_state */
  attn_tensor initial_normaliser, final_normaliser; /* with normalise: [batch, value_heads, dim] */
  const int32_t *offsets; /* ragged: batch + 1 cumulative lengths, on the problem's device */
  /* Backward. d_final_state is optional (zero when absent); the rest, where present, are
   * overwritten. d_decay has the shape of decay. */
  attn_tensor d_o, d_final_state, d_final_normaliser;
  attn_tensor d_q, d_k, d_v, d_decay, d_beta, d_initial_state, d_initial_normaliser;
} attn_recurrent_args;

/* On a GPU the dtype may be float16 too; a call queues its work and returns, the workspace is
 * memory of the device (aligned to 256), and offsets, which lie there, are not checked. */
ATTN_API attn_status attn_recurrent_plan(const attn_recurrent_problem *problem, attn_plan **plan);
ATTN_API attn_status attn_recurrent_forward(const attn_plan *plan, const attn_recurrent_args *args,
                                            void *workspace);
ATTN_API attn_status attn_recurrent_backward(const attn_plan *plan, const attn_recurrent_args *args,
                                             void *workspace);

#ifdef __cplusplus
}
#endif
#endif
