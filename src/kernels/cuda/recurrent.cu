/* The recurrent engine's algorithms on the GPU, best first. */
#include "kernels/cuda/algorithms.cuh"

/* The last ones accept every problem. */
extern const recurrent_algorithm recurrent_step, recurrent_additive_sm90_forward,
    recurrent_additive_sm90_backward, recurrent_delta_sm90_forward, recurrent_chunks_forward,
    recurrent_chunks_backward, recurrent_generic_forward, recurrent_generic_backward;

static const recurrent_algorithm *const algorithms[] = {
    &recurrent_step,
    &recurrent_additive_sm90_forward,
    &recurrent_additive_sm90_backward,
    &recurrent_delta_sm90_forward,
    &recurrent_chunks_forward,
    &recurrent_chunks_backward,
    &recurrent_generic_forward,
    &recurrent_generic_backward,
};

attn_status attn_cuda_recurrent_plan(const attn_cuda_device *device,
                                     const attn_recurrent_problem *problem, attn_pass pass,
                                     attn_cuda_choice *choice) {
  return plan_algorithm("recurrent", algorithms, device, problem, pass, choice);
}

attn_status attn_cuda_recurrent_run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                                    const attn_recurrent_problem *problem, attn_pass pass,
                                    const attn_recurrent_args *args, void *workspace,
                                    attn_cuda_stream stream) {
  return run_algorithm("recurrent", algorithms, device, choice, problem, pass, args, workspace,
                       stream);
}
