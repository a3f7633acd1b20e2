/* The recurrent engine's algorithms on the GPU, best first, and the choice among them. */
#include "kernels/cuda/common.cuh"

/* The last ones accept every problem. */
extern const recurrent_algorithm recurrent_step, recurrent_additive_sm90_forward,
    recurrent_additive_sm90_backward, recurrent_delta_forward, recurrent_delta_backward,
    recurrent_generic_forward, recurrent_generic_backward;

static const recurrent_algorithm *const algorithms[] = {
    &recurrent_step,
    &recurrent_additive_sm90_forward,
    &recurrent_additive_sm90_backward,
    &recurrent_delta_forward,
    &recurrent_delta_backward,
    &recurrent_generic_forward,
    &recurrent_generic_backward,
};

/* The best algorithm for the pass, after `after` where that is not NULL. */
static const recurrent_algorithm *find(const attn_cuda_device *device,
                                       const attn_recurrent_problem *problem, attn_pass pass,
                                       const recurrent_algorithm *after, attn_cuda_choice *choice) {
  for (const recurrent_algorithm *algorithm : algorithms) {
    if (after) {
      if (algorithm == after) after = NULL;
      continue;
    }
    *choice = attn_cuda_choice{};
    if (algorithm->pass != pass || !algorithm->plan(device, problem, choice)) continue;
    choice->algorithm = algorithm;
    return algorithm;
  }
  return NULL;
}

static attn_status missing(const attn_recurrent_problem *problem) {
  return attn_cuda_fail(ATTN_UNSUPPORTED, "recurrent: not offered on the GPU (dtype %d)",
                        (int)problem->dtype);
}

attn_status attn_cuda_recurrent_plan(const attn_cuda_device *device,
                                     const attn_recurrent_problem *problem, attn_pass pass,
                                     attn_cuda_choice *choice) {
  const recurrent_algorithm *best = find(device, problem, pass, NULL, choice);
  if (!best) return missing(problem);
  /* Tensors may turn out not to suit the best one: the workspace serves the others too. */
  attn_cuda_choice other;
  for (const recurrent_algorithm *next = best; next->suits;) {
    next = find(device, problem, pass, next, &other);
    if (!next) break;
    if (other.workspace_bytes > choice->workspace_bytes)
      choice->workspace_bytes = other.workspace_bytes;
  }
  return ATTN_OK;
}

attn_status attn_cuda_recurrent_run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                                    const attn_recurrent_problem *problem, attn_pass pass,
                                    const attn_recurrent_args *args, void *workspace,
                                    attn_cuda_stream stream) {
  const recurrent_algorithm *algorithm = (const recurrent_algorithm *)choice->algorithm;
  attn_cuda_choice other = *choice;
  ATTN_CUDA_TRY(cudaSetDevice(device->index));
  while (algorithm->suits && !algorithm->suits(problem, args)) {
    algorithm = find(device, problem, pass, algorithm, &other);
    if (!algorithm) return missing(problem);
  }
  return algorithm->run(device, &other, problem, args, workspace, (cudaStream_t)stream);
}
