/* The choice among an engine's algorithms, which are listed best first: the first whose plan
 * accepts the problem, or, where the tensors of a call do not suit it, the next that accepts it. */
#ifndef ATTN_KERNELS_CUDA_ALGORITHMS_CUH
#define ATTN_KERNELS_CUDA_ALGORITHMS_CUH

#include "kernels/cuda/common.cuh"

/* The best one for the pass, behind `after` where that is not NULL; NULL: there is none. */
template <class Algorithm, class Problem, size_t COUNT>
const Algorithm *find_algorithm(const Algorithm *const (&all)[COUNT],
                                const attn_cuda_device *device, const Problem *problem,
                                attn_pass pass, const Algorithm *after, attn_cuda_choice *choice) {
  for (const Algorithm *algorithm : all) {
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

inline attn_status no_algorithm(const char *engine, attn_dtype dtype) {
  return attn_cuda_fail(ATTN_UNSUPPORTED, "%s: not offered on the GPU (dtype %d)", engine,
                        (int)dtype);
}

template <class Algorithm, class Problem, size_t COUNT>
attn_status plan_algorithm(const char *engine, const Algorithm *const (&all)[COUNT],
                           const attn_cuda_device *device, const Problem *problem, attn_pass pass,
                           attn_cuda_choice *choice) {
  const Algorithm *best =
      find_algorithm(all, device, problem, pass, (const Algorithm *)NULL, choice);
  if (!best) return no_algorithm(engine, problem->dtype);
  /* Tensors may turn out not to suit the best one: the workspace serves the others too. */
  attn_cuda_choice other;
  for (const Algorithm *next = best; next->suits;) {
    next = find_algorithm(all, device, problem, pass, next, &other);
    if (!next) break;
    if (other.workspace_bytes > choice->workspace_bytes)
      choice->workspace_bytes = other.workspace_bytes;
  }
  return ATTN_OK;
}

template <class Algorithm, class Problem, class Args, size_t COUNT>
attn_status run_algorithm(const char *engine, const Algorithm *const (&all)[COUNT],
                          const attn_cuda_device *device, const attn_cuda_choice *choice,
                          const Problem *problem, attn_pass pass, const Args *args, void *workspace,
                          attn_cuda_stream stream) {
  const Algorithm *algorithm = (const Algorithm *)choice->algorithm;
  attn_cuda_choice own = *choice;
  ATTN_CUDA_TRY(cudaSetDevice(device->index));
  while (algorithm->suits && !algorithm->suits(problem, args)) {
    algorithm = find_algorithm(all, device, problem, pass, algorithm, &own);
    if (!algorithm) return no_algorithm(engine, problem->dtype);
  }
  return algorithm->run(device, &own, problem, args, workspace, (cudaStream_t)stream);
}

#endif
