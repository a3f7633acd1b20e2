/* Causal attention over a packed batch of two sequences: describe the problem, plan, execute. */
#include <attn/attn.h>

#include <stdio.h>
#include <stdlib.h>

int main(void) {
  enum { HEADS = 8, KV_HEADS = 2, DIM = 64, TOTAL = 300 + 500 };
  const int32_t offsets[] = {0, 300, 800};
  attn_softmax_problem problem = ATTN_SOFTMAX_PROBLEM_INIT;
  problem.batch = 2;
  problem.query_length = problem.key_length = 500; /* the longest */
  problem.heads = HEADS;
  problem.kv_heads = KV_HEADS;
  problem.dim = problem.value_dim = DIM;
  problem.causal = problem.ragged = true;

  attn_plan *plan;
  attn_plan_info info;
  if (attn_softmax_plan(&problem, &plan) || attn_plan_get_info(plan, &info)) goto failed;
  printf("plan: %s\n", info.description);

  const int64_t q_shape[] = {TOTAL, HEADS, DIM}, kv_shape[] = {TOTAL, KV_HEADS, DIM};
  attn_softmax_args args = {.query_offsets = offsets, .key_offsets = offsets};
  if (attn_tensor_create(ATTN_F32, 3, q_shape, &args.q) ||
      attn_tensor_create(ATTN_F32, 3, kv_shape, &args.k) ||
      attn_tensor_create(ATTN_F32, 3, kv_shape, &args.v) ||
      attn_tensor_create(ATTN_F32, 3, q_shape, &args.o))
    goto failed;
  attn_tensor_fill(&args.q, 0.5);
  attn_tensor_fill(&args.k, 0.25);
  attn_tensor_fill(&args.v, 2.0);

  void *workspace = aligned_alloc(64, (info.workspace_bytes + 127) / 64 * 64);
  if (!workspace || attn_softmax_forward(plan, &args, workspace)) goto failed;
  /* a mean of equal values is that value */
  printf("o[799][7][63] = %g\n", attn_tensor_get(&args.o, (int64_t[]){799, 7, 63}));

  free(workspace);
  attn_tensor_destroy(&args.q);
  attn_tensor_destroy(&args.k);
  attn_tensor_destroy(&args.v);
  attn_tensor_destroy(&args.o);
  attn_plan_destroy(plan);
  return 0;

failed:
  fprintf(stderr, "%s\n", attn_error_message());
  return 1;
}
