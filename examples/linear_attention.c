/* The recurrent engine by itself: Lightning Attention over a long sequence, then one decode step
 * from the state that it leaves. */
#include <attn/attn.h>

#include <stdio.h>
#include <stdlib.h>

int main(void) {
  enum { HEADS = 4, DIM = 64, LENGTH = 4096 };
  const int64_t whole[] = {1, LENGTH, HEADS, DIM}, one[] = {1, 1, HEADS, DIM};
  const int64_t heads[] = {HEADS}, square[] = {1, HEADS, DIM, DIM};
  attn_recurrent_args args = {0}, step = {0};
  attn_plan *plans[2] = {NULL, NULL};
  void *workspaces[2] = {NULL, NULL};

  for (int i = 0; i < 2; ++i) {
    attn_recurrent_problem problem = ATTN_RECURRENT_PROBLEM_INIT;
    attn_plan_info info;
    problem.length = i ? 1 : LENGTH;
    problem.heads = problem.value_heads = HEADS;
    problem.dim = problem.value_dim = DIM;
    problem.decay = ATTN_DECAY_HEAD;
    if (attn_recurrent_plan(&problem, &plans[i]) || attn_plan_get_info(plans[i], &info))
      goto failed;
    printf("%s: %s, %.3g FLOP\n", i ? "step" : "prefill", info.description, info.flops);
    workspaces[i] = aligned_alloc(64, (info.workspace_bytes + 127) / 64 * 64);
  }
  if (attn_tensor_create(ATTN_F32, 4, whole, &args.q) ||
      attn_tensor_create(ATTN_F32, 4, whole, &args.k) ||
      attn_tensor_create(ATTN_F32, 4, whole, &args.v) ||
      attn_tensor_create(ATTN_F32, 4, whole, &args.o) ||
      attn_tensor_create(ATTN_F32, 1, heads, &args.decay) ||
      attn_tensor_create(ATTN_F32, 4, square, &args.final_state) ||
      attn_tensor_create(ATTN_F32, 4, one, &step.o))
    goto failed;
  attn_tensor_fill(&args.q, 0.1);
  attn_tensor_fill(&args.k, 0.1);
  attn_tensor_fill(&args.v, 1.0);
  attn_tensor_fill(&args.decay, -0.5); /* alpha = exp(-0.5) a token */
  if (attn_recurrent_forward(plans[0], &args, workspaces[0])) goto failed;

  step.q = step.k = step.v = args.q;
  attn_tensor_slice(&args.q, 1, 0, 1, &step.q);
  attn_tensor_slice(&args.k, 1, 0, 1, &step.k);
  attn_tensor_slice(&args.v, 1, 0, 1, &step.v);
  step.decay = args.decay;
  step.initial_state = step.final_state = args.final_state; /* updated in place */
  if (attn_recurrent_forward(plans[1], &step, workspaces[1])) goto failed;
  printf("o = %.6f (limit: 0.64 / (1 - exp(-0.5)) = 1.626559)\n",
         attn_tensor_get(&step.o, (int64_t[]){0, 0, 3, 63}));
  return 0; /* the system takes the memory back */

failed:
  fprintf(stderr, "%s\n", attn_error_message());
  return 1;
}
