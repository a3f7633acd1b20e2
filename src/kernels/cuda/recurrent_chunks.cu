/* The recurrence forward for bfloat16 and float16: DeltaNet, Gated DeltaNet, Kimi Delta Attention;
 * linear attention, Lightning Attention, GLA.
 *
 * With enough (sequence, head) pairs to fill the GPU, one kernel: a block walks over a sequence's
 * chunks, eight warps prepare the next chunk while the others, 16 value columns each, step over the
 * current one; memory traffic is the inputs and outputs once. With few pairs (long sequences), one
 * kernel prepares all chunks at once and a second one steps over them, value columns split over
 * more blocks. */
#include <cstdio>

#include "kernels/cuda/recurrent_chunks_step.cuh"

using namespace chunked;

namespace {

/* ---- Chunks in order, from the workspace ---- */

enum {
  LOADERS = 128,     /* threads that only fetch */
  STEP_MAX_SLABS = 4 /* of a block: two warps each */
};

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ void fetch(const parameters &p, const tiles<E, DIM, CHANNEL, DELTA> &tile, E *v,
                      const sequence &s, int64_t slot, int64_t chunk, int head, int column,
                      int columns, int thread) {
  using record_type = record<DIM, CHANNEL, DELTA>;
  int64_t first = chunk * CHUNK;
  int tokens = (int)min((int64_t)CHUNK, s.tokens - first);
  const char *from =
      p.prepared + ((slot * p.chunks + chunk) * p.value_heads + head) * record_type::FORWARD_BYTES;
  if (CHANNEL)
    copy_rows(tile.q(), pitch<DIM>(), (const E *)from, DIM, tile.ROWS, DIM, tile.ROWS, thread,
              LOADERS);
  else
    copy_keys(p, tile, s, first, tokens, head, thread, LOADERS);
  constexpr int SQUARES = record_type::SQUARES * CHUNK;
  copy_rows(tile.squares(), SQUARE, (const E *)(from + record_type::Y), CHUNK, SQUARES, CHUNK,
            SQUARES, thread, LOADERS);
  for (int at = thread; at < tile.NUMBERS / 4; at += LOADERS)
    copy_async(tile.numbers() + 4 * at, from + record_type::NUMBERS + 16 * at, true);
  rows<const E> all_v = as<E>(p.v);
  copy_rows(v, columns + 8, all_v.at(s.batch, s.first + first, head) + column, all_v.token, CHUNK,
            columns, tokens, thread, LOADERS);
  copy_commit();
}

/* The inputs of a chunk, towards the multiprocessors. */
template <typename E, int DIM, bool CHANNEL>
__device__ void prefetch_inputs(const parameters &p, const sequence &s, int64_t first, int head,
                                int thread, int threads) {
  if (first >= s.tokens) return;
  int tokens = (int)min((int64_t)CHUNK, s.tokens - first);
  rows<const E> q = as<E>(p.q), k = as<E>(p.k), v = as<E>(p.v);
  prefetch_rows(q.at(s.batch, s.first + first, head / p.group), q.token * 2, tokens, DIM * 2,
                thread, threads);
  prefetch_rows(k.at(s.batch, s.first + first, head / p.group), k.token * 2, tokens, DIM * 2,
                thread, threads);
  prefetch_rows(v.at(s.batch, s.first + first, head), v.token * 2, tokens, p.columns * 2, thread,
                threads);
  if (CHANNEL)
    prefetch_rows(p.decay.at(s.batch, s.first + first, head), p.decay.token * 4, tokens, DIM * 4,
                  thread, threads);
}

/* What fetch will read some chunks later, towards the multiprocessors. */
template <typename E, int DIM, bool CHANNEL, bool DELTA>
__device__ void prefetch(const parameters &p, const sequence &s, int64_t slot, int64_t chunk,
                         int head, int thread) {
  using record_type = record<DIM, CHANNEL, DELTA>;
  int64_t first = chunk * CHUNK;
  if (first >= s.tokens) return;
  const char *from =
      p.prepared + ((slot * p.chunks + chunk) * p.value_heads + head) * record_type::FORWARD_BYTES;
  prefetch_span(from, record_type::FORWARD_BYTES, thread, LOADERS);
  if (!CHANNEL) {
    prefetch_inputs<E, DIM, CHANNEL>(p, s, first, head, thread, LOADERS);
    return;
  }
  rows<const E> v = as<E>(p.v);
  prefetch_rows(v.at(s.batch, s.first + first, head), v.token * 2,
                (int)min((int64_t)CHUNK, s.tokens - first), p.columns * 2, thread, LOADERS);
}

template <typename E, int DIM, bool CHANNEL, bool DELTA> constexpr int step_bytes(int slabs) {
  return 2 * (tiles<E, DIM, CHANNEL, DELTA>::BYTES + CHUNK * (slabs * SLAB + 8) * 2) +
         slabs * (int)sizeof(handover<DIM, DELTA>);
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__global__ void __launch_bounds__(LOADERS + STEP_MAX_SLABS * 64, 1) step_kernel(parameters p) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL, DELTA>;
  int thread = threadIdx.x, lane = thread % 32, warp = thread / 32 - LOADERS / 32;
  int slabs = ((int)blockDim.x - LOADERS) / 64, columns = slabs * SLAB, ld_v = columns + 8;
  int column = blockIdx.x * columns, head = blockIdx.y;
  int stage_bytes = tile_type::BYTES + CHUNK * ld_v * 2;
  int64_t slot = blockIdx.z;
  sequence s = find_sequence(p.offsets, p.length, (int)slot);
  int64_t chunks = (s.tokens + CHUNK - 1) / CHUNK;
  auto tile_of = [&](int64_t chunk) { return tile_type{memory + chunk % 2 * stage_bytes}; };

  if (thread < LOADERS) {
    enum { AHEAD = 4 };
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      tile_type tile = tile_of(chunk);
      fetch(p, tile, (E *)(tile.base + tile_type::BYTES), s, slot, chunk, head, column, columns,
            thread);
      if (blockIdx.x == 0)
        prefetch<E, DIM, CHANNEL, DELTA>(p, s, slot, chunk + AHEAD, head, thread);
      copy_wait<0>();
      __syncthreads(); /* the chunk is there, the one before is done */
    }
    return;
  }
  int own = column + warp % slabs * SLAB;
  handover<DIM, DELTA> &between =
      ((handover<DIM, DELTA> *)(memory + 2 * stage_bytes))[warp % slabs];
  auto values_of = [&](const tile_type &tile) {
    return (E *)(tile.base + tile_type::BYTES) + warp % slabs * SLAB;
  };
  int barrier = 1 + warp % slabs;
  if (warp < slabs) {
    slab<DIM> state;
    load_slab(state, p.initial.data ? p.initial.at(slot, head) + own : NULL, p.initial.row, lane);
    hand_state<E>(between, state, lane);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      __syncthreads();
      tile_type tile = tile_of(chunk);
      state_step(state, between, tile, values_of(tile), ld_v, barrier, lane);
    }
    if (p.final.data) store_slab(state, p.final.at(slot, head) + own, p.final.row, lane);
    return;
  }
  rows<E> o = as<E>(p.o);
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    __syncthreads();
    tile_type tile = tile_of(chunk);
    E *v = values_of(tile);
    output_step(between, tile, v, ld_v, p.scale, barrier, lane);
    __syncwarp();
    int64_t first = chunk * CHUNK;
    write_slab(o.at(s.batch, s.first + first, head) + own, o.token, v, ld_v,
               (int)min((int64_t)CHUNK, s.tokens - first), lane);
  }
}

/* ---- One kernel ---- */

enum { PREPARE = 1, READY = 3, FREE = 5 }; /* named barriers; one for each stage of the last two */

template <typename E, int DIM, bool CHANNEL, bool DELTA> constexpr int fused_bytes(int columns) {
  return 2 * (tiles<E, DIM, CHANNEL, DELTA>::BYTES + CHUNK * (columns + 8) * 2) +
         prepare_floats<E, DIM, CHANNEL, DELTA>() * 4;
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
__global__ void __launch_bounds__(PREPARE_THREADS + 256, 1) fused_kernel(parameters p) {
  extern __shared__ __align__(16) char memory[];
  using tile_type = tiles<E, DIM, CHANNEL, DELTA>;
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
      chunk_gates gates = gates_of<E>(p, s, chunk * CHUNK, head);
      copy_keys(p, tile, s, chunk * CHUNK, gates.tokens, head, thread, PREPARE_THREADS);
      copy_rows((E *)(tile.base + tile_type::BYTES), columns + 8,
                v.at(s.batch, s.first + chunk * CHUNK, head), v.token, CHUNK, columns, gates.tokens,
                thread, PREPARE_THREADS);
      prefetch_inputs<E, DIM, CHANNEL>(p, s, (chunk + 1) * CHUNK, head, thread, PREPARE_THREADS);
      prepare<true>(tile, scratch, gates, thread, PREPARE);
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

template <int DIM, bool CHANNEL, bool DELTA>
bool plan_for(const attn_cuda_device *device, const attn_recurrent_problem *problem,
              attn_cuda_choice *choice) {
  int64_t pairs = problem->batch * problem->value_heads, columns = problem->value_dim;
  int64_t chunks = (problem->length + CHUNK - 1) / CHUNK;
  size_t shared = device->shared_bytes;
  if (pairs * 10 >= device->multiprocessors * 7 && columns <= 128 &&
      (size_t)fused_bytes<__half, DIM, CHANNEL, DELTA>((int)columns) <= shared) {
    choice->values[FUSED] = 1;
    snprintf(choice->description, sizeof choice->description,
             "%s, chunks of %d, prepared and stepped in one kernel", rule_name(DELTA), CHUNK);
    return true;
  }
  /* Fewer columns a block while multiprocessors would be idle; 32 at least, since every block
   * reads all keys. */
  int64_t slabs = columns / SLAB, all = slabs;
  auto fits = [&](int64_t n) {
    return (size_t)step_bytes<__nv_bfloat16, DIM, CHANNEL, DELTA>((int)n) <= shared;
  };
  while (slabs % 2 == 0 && (slabs > STEP_MAX_SLABS || !fits(slabs) ||
                            (slabs > 2 && pairs * (all / slabs) * 2 <= device->multiprocessors)))
    slabs /= 2;
  if (slabs > STEP_MAX_SLABS) slabs = 1;
  if (!fits(slabs) || (size_t)prepare_bytes<__half, DIM, CHANNEL, DELTA>() > shared) return false;
  choice->values[FUSED] = 0;
  choice->values[SLABS] = slabs;
  choice->workspace_bytes = (size_t)(problem->batch * chunks * problem->value_heads) *
                            (size_t)record<DIM, CHANNEL, DELTA>::FORWARD_BYTES;
  snprintf(choice->description, sizeof choice->description,
           "%s, chunks of %d prepared at once, then %d value columns a block in order",
           rule_name(DELTA), CHUNK, (int)slabs * SLAB);
  return true;
}

bool plan(const attn_cuda_device *device, const attn_recurrent_problem *problem,
          attn_cuda_choice *choice) {
  return accepts(device, problem, ATTN_PASS_FORWARD) &&
         with_instance(problem, [&](auto dim, auto channel, auto delta) {
           return plan_for<dim.value, channel.value, delta.value>(device, problem, choice);
         });
}

bool suits(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  return reads_aligned(problem, args) && aligned(args->o, 8);
}

template <typename E, int DIM, bool CHANNEL, bool DELTA>
attn_status launch(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                   const parameters &p, cudaStream_t stream) {
  if (choice->values[FUSED]) {
    int bytes = fused_bytes<E, DIM, CHANNEL, DELTA>(p.columns);
    attn_status status = allow_shared(fused_kernel<E, DIM, CHANNEL, DELTA>, bytes);
    if (status != ATTN_OK) return status;
    dim3 grid((unsigned)p.value_heads, (unsigned)problem->batch);
    fused_kernel<E, DIM, CHANNEL, DELTA>
        <<<grid, PREPARE_THREADS + p.columns / SLAB * 32, bytes, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("the recurrence by chunks");
    return ATTN_OK;
  }
  int bytes = prepare_bytes<E, DIM, CHANNEL, DELTA>();
  attn_status status = allow_shared(prepare_kernel<E, DIM, CHANNEL, DELTA, false>, bytes);
  if (status != ATTN_OK) return status;
  dim3 all((unsigned)(problem->batch * p.chunks), (unsigned)p.value_heads);
  prepare_kernel<E, DIM, CHANNEL, DELTA, false><<<all, PREPARE_THREADS, bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the preparation of chunks");
  int slabs = (int)choice->values[SLABS];
  bytes = step_bytes<E, DIM, CHANNEL, DELTA>(slabs);
  status = allow_shared(step_kernel<E, DIM, CHANNEL, DELTA>, bytes);
  if (status != ATTN_OK) return status;
  dim3 grid((unsigned)(p.columns / SLAB / slabs), (unsigned)p.value_heads,
            (unsigned)problem->batch);
  step_kernel<E, DIM, CHANNEL, DELTA><<<grid, LOADERS + slabs * 64, bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("the steps over chunks");
  return ATTN_OK;
}

template <typename E>
attn_status launch_any(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                       const parameters &p, cudaStream_t stream) {
  return with_instance(problem, [&](auto dim, auto channel, auto delta) {
    return launch<E, dim.value, channel.value, delta.value>(choice, problem, p, stream);
  });
}

attn_status run(const attn_cuda_device *device, const attn_cuda_choice *choice,
                const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                void *workspace, cudaStream_t stream) {
  (void)device;
  parameters p = parameters_of(problem, args);
  p.o = rows_of<void>(args->o, problem->ragged);
  if (args->final_state.data) p.final = states_of(args->final_state);
  p.prepared = (char *)workspace;
  return problem->dtype == ATTN_BF16 ? launch_any<__nv_bfloat16>(choice, problem, p, stream)
                                     : launch_any<__half>(choice, problem, p, stream);
}

} // namespace

extern const recurrent_algorithm recurrent_chunks_forward = {"recurrence by chunks",
                                                             ATTN_PASS_FORWARD, plan, suits, run};
