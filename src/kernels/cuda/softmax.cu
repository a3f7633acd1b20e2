/* The softmax engine's algorithms on the GPU, best first. */
#include "kernels/cuda/algorithms.cuh"

/* The last ones accept every problem. */
extern const softmax_algorithm softmax_decode, softmax_latent_sm90, softmax_latent, softmax_few,
    softmax_sm90_forward, softmax_sm90_backward, softmax_mma_forward, softmax_mma_backward,
    softmax_generic_forward, softmax_generic_backward;

static const softmax_algorithm *const algorithms[] = {
    &softmax_decode,          &softmax_latent_sm90,
    &softmax_latent,          &softmax_few,
    &softmax_sm90_forward,    &softmax_sm90_backward,
    &softmax_mma_forward,     &softmax_mma_backward,
    &softmax_generic_forward, &softmax_generic_backward,
};

attn_status attn_cuda_softmax_plan(const attn_cuda_device *device,
                                   const attn_softmax_problem *problem, attn_pass pass,
                                   attn_cuda_choice *choice) {
  return plan_algorithm("softmax", algorithms, device, problem, pass, choice);
}

attn_status attn_cuda_softmax_run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                                  const attn_softmax_problem *problem, attn_pass pass,
                                  const attn_softmax_args *args, void *workspace,
                                  attn_cuda_stream stream) {
  return run_algorithm("softmax", algorithms, device, choice, problem, pass, args, workspace,
                       stream);
}
