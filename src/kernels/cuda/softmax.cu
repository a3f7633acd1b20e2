/* The softmax engine's algorithms on the GPU, best first, and the choice among them. */
#include "kernels/cuda/common.cuh"

/* The last ones accept every problem. */
extern const softmax_algorithm softmax_decode, softmax_latent, softmax_few, softmax_sm90_forward,
    softmax_sm90_backward, softmax_mma_forward, softmax_generic_forward, softmax_generic_backward;

static const softmax_algorithm *const algorithms[] = {
    &softmax_decode,          &softmax_latent,           &softmax_few,
    &softmax_sm90_forward,    &softmax_sm90_backward,    &softmax_mma_forward,
    &softmax_generic_forward, &softmax_generic_backward,
};

/* The best algorithm for the pass, after `after` where that is not NULL. */
static const softmax_algorithm *find(const attn_cuda_device *device,
                                     const attn_softmax_problem *problem, attn_pass pass,
                                     const softmax_algorithm *after, attn_cuda_choice *choice) {
  for (const softmax_algorithm *algorithm : algorithms) {
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

static attn_status missing(const attn_softmax_problem *problem) {
  return attn_cuda_fail(ATTN_UNSUPPORTED, "softmax: not offered on the GPU (dtype %d)",
                        (int)problem->dtype);
}

attn_status attn_cuda_softmax_plan(const attn_cuda_device *device,
                                   const attn_softmax_problem *problem, attn_pass pass,
                                   attn_cuda_choice *choice) {
  const softmax_algorithm *best = find(device, problem, pass, NULL, choice);
  if (!best) return missing(problem);
  /* Tensors may turn out not to suit the best one: the workspace serves the others too. */
  attn_cuda_choice other;
  for (const softmax_algorithm *next = best; next->suits;) {
    next = find(device, problem, pass, next, &other);
    if (!next) break;
    if (other.workspace_bytes > choice->workspace_bytes)
      choice->workspace_bytes = other.workspace_bytes;
  }
  return ATTN_OK;
}

attn_status attn_cuda_softmax_run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                                  const attn_softmax_problem *problem, attn_pass pass,
                                  const attn_softmax_args *args, void *workspace,
                                  attn_cuda_stream stream) {
  const softmax_algorithm *algorithm = (const softmax_algorithm *)choice->algorithm;
  attn_cuda_choice other = *choice;
  ATTN_CUDA_TRY(cudaSetDevice(device->index));
  while (algorithm->suits && !algorithm->suits(problem, args)) {
    algorithm = find(device, problem, pass, algorithm, &other);
    if (!algorithm) return missing(problem);
  }
  return algorithm->run(device, &other, problem, args, workspace, (cudaStream_t)stream);
}
