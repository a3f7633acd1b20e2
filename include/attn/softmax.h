/* The softmax engine: exact attention by tiles.
 *
 *   s_ij = cap(scale * q_i . k_j) + bias_ij - slope * |i' - j|       cap(x) = c tanh(x / c)
 *   o_i  = sum_j exp(s_ij - LSE_i) v_j,    LSE_i = log(sum_j exp(s_ij) + exp(sink))
 *
 * over the keys j that query i may see; i' = i + key_length - query_length aligns the last query
 * with the last key. With a block list, a block of list_queries queries of a head sees of these
 * keys only those in the blocks of list_keys keys that are on its list: every sparse method that
 * chooses blocks ends here. Sources: FlashAttention (arXiv 2205.14135), FlashAttention-2
 * (2307.08691), FlashDecoding; ALiBi (2108.12409); soft cap as in Gemma 2 (2408.00118); sinks as in
 * GPT-OSS: one logit a head that takes mass and has no value.
 *
 * Layout [batch, length, heads, dim] (BLHD), innermost dimension contiguous, other strides free.
 * Query head h reads key head h / (heads / kv_heads). Memory is O(length): no score matrix. */
#ifndef ATTN_SOFTMAX_H
#define ATTN_SOFTMAX_H

#include "attn/plan.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct attn_softmax_problem {
  size_t struct_size; /* sizeof(attn_softmax_problem); set by ATTN_SOFTMAX_PROBLEM_INIT */
  attn_dtype dtype;   /* of q, k, v, o and their gradients: float64, float32 or bfloat16 */
  int passes;         /* ATTN_PASS_FORWARD, with | ATTN_PASS_BACKWARD for training */
  int64_t batch;      /* sequences */
  int64_t query_length, key_length; /* of each sequence; when ragged or paged: the longest */
  int64_t heads, kv_heads;          /* heads is a multiple of kv_heads */
  int64_t dim, value_dim;           /* 1 to 1024 */
  double scale;                     /* 0 means 1 / sqrt(dim) */
  bool causal;                      /* query i sees keys j <= i' */
  int64_t window_left;              /* sees keys j >= i' - window_left; -1: all */
  int64_t window_right;             /* sees keys j <= i' + window_right; -1: all */
  double soft_cap;                  /* c; 0: none */
  bool bias;                        /* args.bias is given */
  bool alibi;                       /* args.alibi_slopes is given */
  bool sinks;                       /* args.sinks is given */
  bool ragged;                      /* packed: args.query_offsets and key_offsets are given */
  bool paged;                       /* keys and values in pages: args.page_table is given */
  int64_t page_size;                /* tokens a page, when paged */
  int64_t list_queries, list_keys;  /* queries and keys a block of the block list; 0: there is none.
                                       Any sizes; with the backward pass list_keys is a multiple of
                                       32. On a GPU multiples of 128 are fastest, then of 64. */
  int64_t splits;                   /* over keys; 0: the plan chooses, as it always does on a GPU */
  attn_device device;               /* where the tensors lie; {0}: the processor */
  attn_planning planning;
} attn_softmax_problem;

#define ATTN_SOFTMAX_PROBLEM_INIT                                                                  \
  {                                                                                                \
    .struct_size = sizeof(attn_softmax_problem), .dtype = ATTN_F32, .passes = ATTN_PASS_FORWARD,   \
    .batch = 1, .heads = 1, .kv_heads = 1, .window_left = -1, .window_right = -1                   \
  }

/* Tensors of one execution. Those that the problem does not mention stay zero (data == NULL). */
typedef struct attn_softmax_args {
  attn_tensor q;    /* [batch, query_length, heads, dim];     ragged: [total queries, heads, dim] */
  attn_tensor k;    /* [batch, key_length, kv_heads, dim];    ragged: [total keys, kv_heads, dim];
                       paged: [pages, page_size, kv_heads, dim] */
  attn_tensor v;    /* as k, with value_dim */
  attn_tensor o;    /* as q, with value_dim; written by forward, read by backward */
  attn_tensor lse;  /* float32 (float64 for float64): [batch, heads, query_length]; ragged: [heads,
                       total queries]. Natural log; -inf for a row that sees no key (its o is 0).
                       Optional in forward, needed by backward. */
  attn_tensor bias; /* float32 (float64 for float64) [batch, heads, query_length, key_length],
                       any stride may be 0 to broadcast. Not with ragged. */
  attn_tensor alibi_slopes;                   /* float32 [heads] */
  attn_tensor sinks;                          /* float32 [heads] */
  const int32_t *query_offsets, *key_offsets; /* ragged: batch + 1 cumulative lengths each */
  const int32_t *key_lengths;                 /* optional, [batch]: keys in use, <= key_length */
                                              /* these three on the problem's device */
  attn_tensor page_table;                     /* paged: int32 [batch, pages a sequence] */
  /* The block list. Block b of a head's queries, of the ceil(query_length / list_queries) that the
   * sequence has, sees the blocks of keys block_indices[offset[b] .. offset[b + 1] - 1], which
   * ascend; blocks are counted from the sequence's first query and first key. */
  attn_tensor block_offsets; /* int32 [batch, heads, blocks + 1]; the first two strides may be 0 */
  attn_tensor block_indices; /* int32 [entries] */

  /* Backward: gradients of the loss. d_lse is optional (zero when absent). d_q, d_k, d_v are
   * overwritten; d_bias and d_sinks, optional, are overwritten too; d_bias has full shape. */
  attn_tensor d_o, d_lse;
  attn_tensor d_q, d_k, d_v, d_bias, d_sinks;
} attn_softmax_args;

/* Checks the problem and makes a plan. On a GPU the dtype may be float16 too; a call queues its
 * work and returns, the workspace is memory of the device (aligned to 256), and offsets, lengths,
 * page tables and block lists, which lie there, are not checked. ATTN_INVALID_ARGUMENT or
 * ATTN_INVALID_SHAPE names the field.
 */
ATTN_API attn_status attn_softmax_plan(const attn_softmax_problem *problem, attn_plan **plan);

/* Runs the plan. `workspace` has the bytes that attn_plan_get_info reports (NULL when 0), aligned
 * to 64. Shapes, dtypes and offsets are checked; nothing is allocated. */
ATTN_API attn_status attn_softmax_forward(const attn_plan *plan, const attn_softmax_args *args,
                                          void *workspace);
ATTN_API attn_status attn_softmax_backward(const attn_plan *plan, const attn_softmax_args *args,
                                           void *workspace);

/* Merges partial results over disjoint key sets: o [parts, rows, value_dim] and lse [parts, rows]
 * float32 (or float64), contiguous, into o [rows, value_dim], lse [rows] (optional).
 * O = sum_r exp(LSE_r - LSE) O_r, LSE = logsumexp_r LSE_r; all parts empty gives 0 and -inf. */
ATTN_API attn_status attn_softmax_merge(const attn_tensor *partial_o,
                                        const attn_tensor *partial_lse, const attn_tensor *o,
                                        const attn_tensor *lse);

#ifdef __cplusplus
}
#endif
#endif
