/* The delta rule forward for bfloat16 and float16: DeltaNet, Gated DeltaNet, Kimi Delta Attention.
 *
 * With enough (sequence, head) pairs to fill the GPU, one kernel: a block walks over a sequence's
 * chunks, four warps prepare the next chunk while the others, 16 value columns each, step over the
 * current one; memory traffic is the inputs and outputs once. With few pairs (long sequences), one
 * kernel prepares all chunks at once and a second one steps over them, value columns split over
 * more blocks. */
#include <cstdio>

#include "kernels/cuda/recurrent_delta_step.cuh"

using namespace delta;

namespace {

/* ---- Chunks in order, from the workspace ---- */

template <typename E, int DIM, bool CHANNEL> struct stage {
  tiles<E, DIM, CHANNEL> tile;
  E *v;
};

template <typename E, int DIM, bool CHANNEL>
__device__ void fetch(const parameters &p, const stage<E, DIM, CHANNEL> &to, const sequence &s,
                      int64_t slot, int64_t chunk, int head, int column, int columns) {
  using record_type = record<DIM, CHANNEL>;
  int thread = threadIdx.x, threads = blockDim.x;
  int64_t first = chunk * CHUNK;
  int tokens = (int)min((int64_t)CHUNK, s.tokens - first);
  const char *from =
      p.prepared + ((slot * p.chunks + chunk) * p.value_heads + head) * record_type::FORWARD_BYTES;
  if (CHANNEL)
    copy_rows((E *)to.tile.base, pitch<DIM>(), (const E *)from, DIM, 3 * CHUNK, DIM, 3 * CHUNK,
              thread, threads);
  else
    copy_keys(p, to.tile, s, first, tokens, head, thread, threads);
  copy_rows(to.tile.y(), SQUARE, (const E *)(from + record_type::Y), CHUNK, 2 * CHUNK, CHUNK,
            2 * CHUNK, thread, threads);
  for (int at = thread; at < to.tile.NUMBERS / 4; at += threads)
    copy_async(to.tile.beta() + 4 * at, from + record_type::NUMBERS + 16 * at, true);
  rows<const E> v = as<E>(p.v);
  copy_rows(to.v, columns + 8, v.at(s.batch, s.first + first, head) + column, v.token, CHUNK,
            columns, tokens, thread, threads);
  copy_commit();
}

template <typename E, int DIM, bool CHANNEL>
__global__ void __launch_bounds__(256) step_kernel(parameters p) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL>;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int columns = blockDim.x / 32 * SLAB, column = blockIdx.x * columns, head = blockIdx.y;
  int stage_bytes = tile_type::BYTES + CHUNK * (columns + 8) * 2;
  int64_t slot = blockIdx.z;
  sequence s = find_sequence(p.offsets, p.length, (int)slot);
  int64_t chunks = (s.tokens + CHUNK - 1) / CHUNK;
  int own = column + warp * SLAB; /* first column of this warp */

  slab<DIM> state;
  const float *initial = p.initial.data ? p.initial.at(slot, head) + own : NULL;
  load_slab(state, initial, p.initial.row, lane);
  auto stage_of = [&](int64_t chunk) {
    char *at = memory + chunk % 2 * stage_bytes;
    return stage<E, DIM, CHANNEL>{{at}, (E *)(at + tile_type::BYTES)};
  };
  if (chunks) fetch(p, stage_of(0), s, slot, 0, head, column, columns);
  rows<E> o = as<E>(p.o);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    stage<E, DIM, CHANNEL> now = stage_of(chunk);
    if (chunk + 1 < chunks)
      fetch(p, stage_of(chunk + 1), s, slot, chunk + 1, head, column, columns);
    else
      copy_commit();
    copy_wait<1>();
    __syncthreads();
    E *v = now.v + warp * SLAB;
    step(state, now.tile, v, columns + 8, p.scale, lane);
    __syncwarp();
    int64_t first = chunk * CHUNK;
    write_slab(o.at(s.batch, s.first + first, head) + own, o.token, v, columns + 8,
               (int)min((int64_t)CHUNK, s.tokens - first), lane);
    __syncthreads();
  }
  if (p.final.data) store_slab(state, p.final.at(slot, head) + own, p.final.row, lane);
}

/* ---- One kernel ---- */

enum { PREPARE = 1, READY = 3, FREE = 5 }; /* named barriers; one for each stage of the last two */

template <typename E, int DIM, bool CHANNEL> constexpr int fused_bytes(int columns) {
  return 2 * (tiles<E, DIM, CHANNEL>::BYTES + CHUNK * (columns + 8) * 2) +
         prepare_floats<DIM, CHANNEL>() * 4;
}

template <typename E, int DIM, bool CHANNEL>
__global__ void __launch_bounds__(384, 1) fused_kernel(parameters p) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL>;
  int thread = threadIdx.x, threads = blockDim.x, head = blockIdx.x, columns = p.columns;
  int stage_bytes = tile_type::BYTES + CHUNK * (columns + 8) * 2;
  int64_t slot = blockIdx.y;
  sequence s = find_sequence(p.offsets, p.length, (int)slot);
  int64_t chunks = (s.tokens + CHUNK - 1) / CHUNK;

  if (thread < PREPARE_THREADS) {
    float *scratch = (float *)(memory + 2 * stage_bytes);
    rows<const E> v = as<E>(p.v);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int at = (int)(chunk % 2);
      tile_type tile = {memory + at * stage_bytes};
      if (chunk >= 2) barrier_sync(FREE + at, threads);
      chunk_gates gates = gates_of(p, s, chunk * CHUNK, head);
      copy_keys(p, tile, s, chunk * CHUNK, gates.tokens, head, thread, PREPARE_THREADS);
      copy_rows((E *)(tile.base + tile_type::BYTES), columns + 8,
                v.at(s.batch, s.first + chunk * CHUNK, head), v.token, CHUNK, columns, gates.tokens,
                thread, PREPARE_THREADS);
      prepare(tile, scratch, gates, true, thread, PREPARE);
      barrier_arrive(READY + at, threads);
    }
    return;
  }
  int warp = (thread - PREPARE_THREADS) / 32, lane = thread % 32, own = warp * SLAB;
  slab<DIM> state;
  load_slab(state, p.initial.data ? p.initial.at(slot, head) + own : NULL, p.initial.row, lane);
  rows<E> o = as<E>(p.o);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    int at = (int)(chunk % 2);
    tile_type tile = {memory + at * stage_bytes};
    E *v = (E *)(tile.base + tile_type::BYTES) + own;
    barrier_sync(READY + at, threads);
    step(state, tile, v, columns + 8, p.scale, lane);
    __syncwarp();
    int64_t first = chunk * CHUNK;
    write_slab(o.at(s.batch, s.first + first, head) + own, o.token, v, columns + 8,
               (int)min((int64_t)CHUNK, s.tokens - first), lane);
    if (chunk + 2 < chunks) barrier_arrive(FREE + at, threads);
  }
  if (p.final.data) store_slab(state, p.final.at(slot, head) + own, p.final.row, lane);
}

/* ---- Planning ---- */

enum { FUSED, SLABS }; /* of choice->values: whether fused, and slabs of a block */

template <int DIM, bool CHANNEL>
void plan_for(const attn_cuda_device *device, const attn_recurrent_problem *problem,
              attn_cuda_choice *choice) {
  int64_t pairs = problem->batch * problem->value_heads, columns = problem->value_dim;
  int64_t chunks = (problem->length + CHUNK - 1) / CHUNK;
  int stage = tiles<__half, DIM, CHANNEL>::BYTES;
  size_t fused = (size_t)fused_bytes<__half, DIM, CHANNEL>((int)columns);
  if (pairs * 10 >= device->multiprocessors * 7 && columns <= 128 &&
      fused <= device->shared_bytes) {
    choice->values[FUSED] = 1;
    snprintf(choice->description, sizeof choice->description,
             "delta rule, chunks of %d, prepared and stepped in one kernel", CHUNK);
    return;
  }
  /* Fewer columns a block while multiprocessors would be idle; 32 at least, since every block
   * reads all keys. */
  int64_t slabs = columns / SLAB;
  while (slabs > 8 && slabs % 2 == 0) slabs /= 2;
  while (slabs % 2 == 0 && slabs > 2 &&
         pairs * (columns / SLAB / slabs) * 2 <= device->multiprocessors)
    slabs /= 2;
  if (slabs > 8) slabs = 1;
  while (slabs % 2 == 0 &&
         (size_t)(2 * (stage + CHUNK * (slabs * SLAB + 8) * 2)) > device->shared_bytes)
    slabs /= 2;
  choice->values[FUSED] = 0;
  choice->values[SLABS] = slabs;
  choice->workspace_bytes = (size_t)(problem->batch * chunks * problem->value_heads) *
                            (size_t)record<DIM, CHANNEL>::FORWARD_BYTES;
  snprintf(choice->description, sizeof choice->description,
           "delta rule, chunks of %d prepared at once, then %d value columns a block in order",
           CHUNK, (int)slabs * SLAB);
}

bool plan(const attn_cuda_device *device, const attn_recurrent_problem *problem,
          attn_cuda_choice *choice) {
  bool channel = problem->decay == ATTN_DECAY_CHANNEL;
  if (!accepts(device, problem)) return false;
  if (problem->dim == 64)
    channel ? plan_for<64, true>(device, problem, choice)
            : plan_for<64, false>(device, problem, choice);
  else
    channel ? plan_for<128, true>(device, problem, choice)
            : plan_for<128, false>(device, problem, choice);
  return true;
}

bool suits(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  return reads_aligned(problem, args) && aligned(args->o, 8);
}

template <typename E, int DIM, bool CHANNEL>
attn_status launch(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                   const parameters &p, cudaStream_t stream) {
  using tile_type = tiles<E, DIM, CHANNEL>;
  if (choice->values[FUSED]) {
    int bytes = fused_bytes<E, DIM, CHANNEL>(p.columns);
    attn_status status = allow_shared(fused_kernel<E, DIM, CHANNEL>, bytes);
    if (status != ATTN_OK) return status;
    dim3 grid((unsigned)p.value_heads, (unsigned)problem->batch);
    fused_kernel<E, DIM, CHANNEL>
        <<<grid, PREPARE_THREADS + p.columns / SLAB * 32, bytes, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("the delta rule's kernel");
    return ATTN_OK;
  }
  int bytes = tile_type::BYTES + prepare_floats<DIM, CHANNEL>() * 4;
  attn_status status = allow_shared(prepare_kernel<E, DIM, CHANNEL, false>, bytes);
  if (status != ATTN_OK) return status;
  dim3 all((unsigned)(problem->batch * p.chunks), (unsigned)p.value_heads);
  prepare_kernel<E, DIM, CHANNEL, false><<<all, PREPARE_THREADS, bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's preparation");
  int slabs = (int)choice->values[SLABS];
  bytes = 2 * (tile_type::BYTES + CHUNK * (slabs * SLAB + 8) * 2);
  status = allow_shared(step_kernel<E, DIM, CHANNEL>, bytes);
  if (status != ATTN_OK) return status;
  dim3 grid((unsigned)(p.columns / SLAB / slabs), (unsigned)p.value_heads,
            (unsigned)problem->batch);
  step_kernel<E, DIM, CHANNEL><<<grid, slabs * 32, bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the delta rule's steps");
  return ATTN_OK;
}

template <typename E, int DIM>
attn_status launch_decay(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                         const parameters &p, cudaStream_t stream) {
  return problem->decay == ATTN_DECAY_CHANNEL ? launch<E, DIM, true>(choice, problem, p, stream)
                                              : launch<E, DIM, false>(choice, problem, p, stream);
}

template <typename E>
attn_status launch_dim(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                       const parameters &p, cudaStream_t stream) {
  return problem->dim == 64 ? launch_decay<E, 64>(choice, problem, p, stream)
                            : launch_decay<E, 128>(choice, problem, p, stream);
}

attn_status run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                void *workspace, cudaStream_t stream) {
  (void)device;
  parameters p = parameters_of(problem, args);
  p.o = rows_of<void>(args->o, problem->ragged);
  if (args->final_state.data) p.final = states_of(args->final_state);
  p.prepared = (char *)workspace;
  return problem->dtype == ATTN_BF16 ? launch_dim<__nv_bfloat16>(choice, problem, p, stream)
                                     : launch_dim<__half>(choice, problem, p, stream);
}

} // namespace

extern const recurrent_algorithm recurrent_delta_forward = {"delta rule by chunks",
                                                            ATTN_PASS_FORWARD, plan, suits, run};
