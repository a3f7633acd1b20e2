/* Few queries over latents on Hopper: the problem of softmax_latent.cu (multi-head latent
 * attention, DeepSeek-V2, arXiv 2405.04434, section 2.1; one key head of 512 + 64 dimensions whose
 * first 512 are the values too) with products by wgmma.
 *
 * A block has 64 rows (query, head), M of wgmma, and streams blocks of 64 latents through a ring in
 * shared memory with the bulk tensor copies. A block of latents, 9 swizzled tiles of 64 latents by
 * 64 elements, is read once and is both operands: K of S = Q K^T with its rows as N, and V of
 * O += P V with its rows as K (a transposed descriptor). The work is divided by products: one
 * warpgroup has Q in registers, computes S, weighs it and hands P over in shared memory; two others
 * hold 256 columns of the float32 output each and multiply P by V. So S of one block overlaps P V
 * of the one before, and shared memory, which every product reads, is read for P, K and V alone
 * (and for the dimensions of Q that registers do not suffice for). P takes the place of the last
 * tile of its block, which is no value.
 *
 * Where fewer rows fill the block, memory decides and the empty rows cost nothing. The keys are
 * split among blocks as in softmax_decode.cu. */
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/softmax_sm90.cuh"

namespace {

using namespace hopper;

enum {
  ROWS = 64, /* of a block */
  DIM = 576,
  WIDTH = 512, /* of a value */
  KEYS = 64,   /* of a stage */
  STAGES = 3,
  LAST_STAGES = 2, /* of the last tile of a block, and the weights after it */
  GROUP_COLUMNS = 256,
  THREADS = 384,
  SPLIT_KEYS = 128, /* a split is not worth less */
  SCORES_REGISTERS = 184,
  OUTPUT_REGISTERS = 160,
  SOURCE_WARP = 4, /* of the outputs', which have registers left */
};
const int TILE = KEYS * 128, LATENT_TILES = WIDTH / 64;
const int REGISTER_TILES = 7; /* of Q; the others lie in shared memory */

/* Shared memory, in bytes from a multiple of 1024. */
struct layout {
  enum {
    LATENT_BYTES = LATENT_TILES * TILE,
    LAST = STAGES * LATENT_BYTES,
    QUERIES = LAST + LAST_STAGES * TILE,
    FACTORS = QUERIES + (DIM / 64 - REGISTER_TILES) * TILE, /* [2][row]: what older results take */
    CHANGED = FACTORS + 2 * ROWS * 4, /* [2][warp]: whether any factor of its rows is not 1 */
    BOUNDS = CHANGED + 2 * 4 * 4,     /* [row][2]: the keys it sees */
    STATISTICS = BOUNDS + ROWS * 8,   /* [row][2]: maximum (base 2) and sum */
    SHARE = STATISTICS + ROWS * 8,
    FULL = SHARE + 64, /* barriers of the stages: what is copied has arrived */
    LAST_FULL = FULL + STAGES * 8,
    BYTES = LAST_FULL + LAST_STAGES * 8 + 1024,
  };
};
static_assert((int)layout::BYTES <= 232448, "shared memory of one block");

enum {
  READY_BARRIER = 1,
  /* two, in turn */ DONE_BARRIER = 3,
  QUERIES_BARRIER,
  SCORES_BARRIER,
  END_BARRIER
};

struct latent_parameters {
  CUtensorMap k;
  parameters p;
  int box;     /* latents that lie together in a page, 64 at most, and that one copy takes */
  bool packed; /* ragged keys that are not paged */
};

/* What one block computes. Lies in shared memory: registers are scarce. */
struct share {
  int b, tile, split, query_start, key_start;
  int first_row, rows;
  int first, end;           /* keys that any row sees */
  int full_first, full_end; /* that all see */
  int low, high;            /* blocks of keys */
};

static_assert(sizeof(share) <= 64, "its place in shared memory");

__device__ __forceinline__ share find_share(const parameters &p) {
  share w;
  int splits = (int)p.splits, tiles = (int)p.tiles;
  w.split = blockIdx.x % splits, w.tile = blockIdx.x / splits % tiles;
  w.b = blockIdx.x / splits / tiles;
  const sequence s = find_sequence(p, w.b);
  w.query_start = (int)s.query_start, w.key_start = (int)s.key_start;
  w.first_row = w.tile * ROWS;
  w.rows = min((int)ROWS, (int)(s.queries * p.group) - w.first_row);
  w.first = w.end = w.full_first = w.full_end = w.low = w.high = 0;
  if (w.rows <= 0) return w;
  key_range top = visible(p, s, w.first_row / (int)p.group);
  key_range bottom = visible(p, s, (w.first_row + w.rows - 1) / (int)p.group);
  w.first = (int)min(top.first, s.keys), w.end = (int)max(bottom.end, (int64_t)0);
  w.full_first = (int)min(bottom.first, s.keys), w.full_end = (int)max(top.end, (int64_t)0);
  int low = w.first / KEYS, high = w.end > w.first ? (w.end + KEYS - 1) / KEYS : low;
  int each = (high - low + splits - 1) / splits;
  w.low = min(low + w.split * each, high), w.high = min(w.low + each, high);
  return w;
}

/* Copies blocks of latents: each lane a box of them. */
struct source {
  const latent_parameters &l;
  const int32_t *pages;
  int key_start, b, end;
  uint32_t base;
  int lane;
  struct place {
    int token, page;
  };

  __device__ __forceinline__ place look_up(int block) const {
    int key = block * KEYS + lane * l.box;
    place at = {key_start + key, b};
    if (!pages || lane * l.box >= KEYS) return at;
    unsigned index = (unsigned)key / l.p.page_size;
    at.token = (int)((unsigned)key - index * l.p.page_size);
    at.page = key < end ? pages[index] : -1; /* beyond the tensor: zeros */
    return at;
  }
  __device__ __forceinline__ void request(uint32_t to, uint32_t full, int first_tile, int tiles,
                                          place at) const {
    if (lane == 0) barrier_expect(full, tiles * TILE);
    __syncwarp();
    if (lane * l.box < KEYS)
#pragma unroll 1
      for (int c = 0; c < tiles; ++c)
        tensor_load(to + c * TILE + lane * l.box * 128, &l.k, full, (first_tile + c) * 64, 0,
                    at.token, at.page);
    __syncwarp();
  }
  __device__ __forceinline__ void request_latents(int stage, place at) const {
    request(base + stage * layout::LATENT_BYTES, base + layout::FULL + stage * 8, 0, LATENT_TILES,
            at);
  }
  __device__ __forceinline__ void request_last(int stage, place at) const {
    request(base + layout::LAST + stage * TILE, base + layout::LAST_FULL + stage * 8, LATENT_TILES,
            1, at);
  }
};

/* Positions in the ring of stages. */
struct ring_position {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

/* S = Q K^T and the weights of each block of latents. */
template <typename T>
__device__ __forceinline__ void weigh_blocks(const latent_parameters &l, const volatile share &w,
                                             char *shared, uint32_t base) {
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;
  uint32_t q[REGISTER_TILES * 4][4];
#pragma unroll
  for (int k = 0; k < REGISTER_TILES * 4; ++k)
    matrix_load(q[k], base + (STAGES - 1) * layout::LATENT_BYTES + k / 4 * TILE +
                          swizzled(warp * 16 + lane % 16, k % 4 * 2 + lane / 16));
  proxy_fence(); /* these reads before the copies into the last stage */
  softmax_sm90::named_arrive(QUERIES_BARRIER, 160);

  const float scale = l.p.scale;
  softmax_sm90::row_state state = {{-INFINITY, -INFINITY}, {0, 0}};
  ring_position at;
  const int count = w.high - w.low;
#pragma unroll 1
  for (int n = 0; n < count; ++n, at.next()) {
    float scores[KEYS / 2], factor[2];
    const uint32_t latents = base + at.stage * layout::LATENT_BYTES;
    const uint32_t last = base + layout::LAST + n % LAST_STAGES * TILE;
    barrier_wait(base + layout::FULL + at.stage * 8, at.phase);
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < REGISTER_TILES * 4; ++k)
      wgmma<T, 0>(scores, q[k], descriptor(latents + k / 4 * TILE + k % 4 * 32), k > 0);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<T, 0, 0>(scores, descriptor(base + layout::QUERIES + k * 32),
                     descriptor(latents + REGISTER_TILES * TILE + k * 32), 1);
    barrier_wait(base + layout::LAST_FULL + n % LAST_STAGES * 8, n / LAST_STAGES % 2);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<T, 0, 0>(scores, descriptor(base + layout::QUERIES + TILE + k * 32),
                     descriptor(last + k * 32), 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(scores);

    const int key = (w.low + n) * KEYS;
    if (key < w.full_first || key + KEYS > w.full_end) {
      int low[2], high[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int *bounds = (const int *)(shared + layout::BOUNDS) + (row + half * 8) * 2;
        low[half] = bounds[0] - key - lane % 4 * 2, high[half] = bounds[1] - key - lane % 4 * 2;
      }
      softmax_sm90::hide(scores, low, high);
    }
    softmax_sm90::weigh(scores, &state, factor, scale);
    uint32_t weights[KEYS / 16][4];
    softmax_sm90::operands<T>(weights, scores);
    named_sync(SCORES_BARRIER, 128); /* all have read the keys, whose place changes */
    if (key < w.first || key + KEYS > w.end) {
      /* Latents that no row sees may be anything, NaN too, which weights of 0 would not remove. */
      for (int i = threadIdx.x; i < KEYS * LATENT_TILES * 8; i += 128) {
        int r = i / (LATENT_TILES * 8), piece = i % (LATENT_TILES * 8);
        if (key + r < w.first || key + r >= w.end)
          *(uint4 *)(shared + at.stage * layout::LATENT_BYTES + piece / 8 * TILE + r * 128 +
                     piece % 8 * 16) = make_uint4(0, 0, 0, 0);
      }
    }

    bool changed = __any_sync(~0u, factor[0] != 1 || factor[1] != 1);
    if (lane == 0) ((int *)(shared + layout::CHANGED))[n % 2 * 4 + warp] = changed;
    if (changed && lane % 4 == 0) {
      float *factors = (float *)(shared + layout::FACTORS) + n % 2 * ROWS + row;
      factors[0] = factor[0], factors[8] = factor[1];
    }
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
      matrix_store(last + swizzled(warp * 16 + lane % 16, k * 2 + lane / 16), weights[k][0],
                   weights[k][1], weights[k][2], weights[k][3]);
    proxy_fence();
    softmax_sm90::named_arrive(READY_BARRIER + n % 2, THREADS);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float total = softmax_sm90::quad_sum(state.sum[half]);
    if (lane % 4 == 0)
      ((float2 *)(shared + layout::STATISTICS))[row + half * 8] =
          make_float2(state.top[half] * scale, total);
  }
  softmax_sm90::named_arrive(END_BARRIER, THREADS);
}

/* O += P V, of 256 columns, and the results. */
template <typename T>
__device__ __forceinline__ void sum_blocks(const latent_parameters &l, const volatile share &w,
                                           char *shared, uint32_t base, const source &from) {
  const parameters &p = l.p;
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1;
  const int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0), lane = threadIdx.x % 32;
  const int row = warp * 16 + lane / 4;
  float out[GROUP_COLUMNS / 2];
#pragma unroll
  for (int i = 0; i < GROUP_COLUMNS / 2; ++i) out[i] = 0;
  ring_position at;
  const int count = w.high - w.low;
  const bool copies = threadIdx.x / 32 == SOURCE_WARP;
  source::place next[2] = {}; /* where the second block and the third from here on lie */
  if (copies) {
    next[0] = from.look_up(w.low + 2), next[1] = from.look_up(w.low + 3);
    named_sync(QUERIES_BARRIER, 160);
    if (count > 2) from.request_latents(2, next[0]);
  }
#pragma unroll 1
  for (int n = 0; n < count; ++n, at.next()) {
    named_sync(READY_BARRIER + n % 2, THREADS);
    barrier_wait(base + layout::FULL + at.stage * 8, at.phase);
    if (((volatile int *)(shared + layout::CHANGED))[n % 2 * 4 + warp]) {
      const volatile float *factors =
          (const volatile float *)(shared + layout::FACTORS) + n % 2 * ROWS + row;
      const float factor[2] = {factors[0], factors[8]};
#pragma unroll
      for (int i = 0; i < GROUP_COLUMNS / 2; ++i) out[i] *= factor[i % 4 / 2];
    }
    const uint32_t values =
        base + at.stage * layout::LATENT_BYTES + group * (GROUP_COLUMNS / 64) * TILE;
    pin(out);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < KEYS / 16; ++k)
      wgmma<T, 0, 1>(out, descriptor(base + layout::LAST + n % LAST_STAGES * TILE + k * 32),
                     descriptor(values + k * 2048, TILE), 1);
    wgmma_commit();
    wgmma_wait<0>();
    pin(out);
    /* When both groups are done, the stage is free, and the last tile, where the weights were. */
    if (n + 2 < count && !copies) softmax_sm90::named_arrive(DONE_BARRIER, 256);
    if (n + 2 < count && copies) {
      named_sync(DONE_BARRIER, 256);
      from.request_last(n % LAST_STAGES, next[0]);
      if (n + 3 < count) from.request_latents(at.stage, next[1]);
      next[0] = next[1], next[1] = from.look_up(w.low + n + 4);
    }
  }

  named_sync(END_BARRIER, THREADS);
  const int columns = group * GROUP_COLUMNS + lane % 4 * 2;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int r = row + half * 8;
    if (r >= w.rows) continue;
    const int query = (w.first_row + r) / (int)p.group, head = (w.first_row + r) % (int)p.group;
    float2 statistics = ((const float2 *)(shared + layout::STATISTICS))[r];
    float top = statistics.x, total = statistics.y;
    if (p.splits > 1) {
      int64_t part = ((w.b * p.tiles + w.tile) * p.splits + w.split) * ROWS + r;
      float *to = p.partial_o + part * WIDTH + columns;
#pragma unroll
      for (int j = 0; j < GROUP_COLUMNS / 8; ++j)
        *(float2 *)(to + j * 8) = make_float2(out[j * 4 + half * 2], out[j * 4 + half * 2 + 1]);
      if (columns == 0) *(float2 *)(p.partial + part * 2) = statistics;
      continue;
    }
    bool any = top != -INFINITY;
    float own = 1;
    if (any && p.sinks) {
      float sink = p.sinks[head] * LOG2_E, higher = fmaxf(top, sink);
      own = exponential(top - higher);
      total = total * own + exponential(sink - higher);
      top = higher;
    }
    int64_t token = w.query_start + query;
    const float inverse = any ? own / total : 0;
    T *to = (T *)p.o.data + w.b * p.o.sequence + token * p.o.token + head * p.o.head + columns;
#pragma unroll
    for (int j = 0; j < GROUP_COLUMNS / 8; ++j)
      *(uint32_t *)(to + j * 8) = hopper::element<T>::pack(out[j * 4 + half * 2] * inverse,
                                                           out[j * 4 + half * 2 + 1] * inverse);
    if (p.lse.data && columns == 0)
      ((float *)p.lse.data)[w.b * p.lse.sequence + token * p.lse.token + head * p.lse.head] =
          any ? (top + log2f(total)) * LN_2 : -INFINITY;
  }
}

/* Block: [sequence][tile of 64 rows][split]. */
template <typename T>
__global__ void __launch_bounds__(THREADS, 1)
    latent_kernel(const __grid_constant__ latent_parameters l) {
  extern __shared__ char memory[];
  const uint32_t start = shared_address(memory), base = (start + 1023) / 1024 * 1024;
  char *shared = memory + (base - start);
  const parameters &p = l.p;
  share w = find_share(p);
  if (w.rows <= 0) return;
  const int lane = threadIdx.x % 32;
  source from = {l,
                 p.pages ? p.pages + w.b * p.pages_sequence : NULL,
                 p.pages ? 0 : w.key_start,
                 l.packed ? 0 : w.b,
                 w.end,
                 base,
                 lane};
  if (threadIdx.x / 32 == SOURCE_WARP) {
    if (lane == 0) {
      for (int i = 0; i < STAGES + LAST_STAGES; ++i) barrier_init(base + layout::FULL + i * 8, 1);
      barrier_init_fence();
    }
    __syncwarp();
    for (int i = 0; i < 2; ++i)
      if (w.low + i < w.high) {
        source::place at = from.look_up(w.low + i);
        from.request_latents(i, at), from.request_last(i, at);
      }
  }
  /* Q through the last stage, where nothing is copied to yet, except its last tiles. */
  for (int i = threadIdx.x; i < ROWS * (DIM / 8); i += THREADS) {
    int r = i / (DIM / 8), chunk = i % (DIM / 8);
    int query = (w.first_row + r) / (int)p.group, head = (w.first_row + r) % (int)p.group;
    const T *data = (const T *)p.q.data + w.b * p.q.sequence + (w.query_start + query) * p.q.token +
                    head * p.q.head + chunk * 8;
    int to = chunk / 8 < REGISTER_TILES
                 ? (STAGES - 1) * layout::LATENT_BYTES + chunk / 8 * TILE
                 : (int)layout::QUERIES + (chunk / 8 - REGISTER_TILES) * TILE;
    *(uint4 *)(shared + to + swizzled(r, chunk % 8)) =
        r < w.rows ? *(const uint4 *)data : make_uint4(0, 0, 0, 0);
  }
  if (threadIdx.x < ROWS) {
    int r = min((int)threadIdx.x, w.rows - 1);
    const sequence s = find_sequence(p, w.b);
    key_range seen = visible(p, s, (w.first_row + r) / (int)p.group);
    int *bounds = (int *)(shared + layout::BOUNDS) + threadIdx.x * 2;
    bounds[0] = (int)min(seen.first, s.keys), bounds[1] = (int)max(seen.end, (int64_t)0);
  }
  if (threadIdx.x == ROWS) *(share *)(shared + layout::SHARE) = w;
  proxy_fence();
  __syncthreads();
  const volatile share &kept = *(const volatile share *)(shared + layout::SHARE);
  if (threadIdx.x < 128) {
    registers_more<SCORES_REGISTERS>();
    weigh_blocks<T>(l, kept, shared, base);
  } else {
    registers_fewer<OUTPUT_REGISTERS>();
    sum_blocks<T>(l, kept, shared, base, from);
  }
}

/* choice->values */
enum { SPLITS = 0 };

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  const int64_t longest = 1 << 30;
  bool pages = !problem->paged || problem->page_size % KEYS == 0 || problem->page_size == 8 ||
               problem->page_size == 16 || problem->page_size == 32;
  if (device->major != 9 || (problem->dtype != ATTN_BF16 && problem->dtype != ATTN_F16) ||
      problem->dim != DIM || problem->value_dim != WIDTH || problem->kv_heads != 1 ||
      problem->bias || problem->list_keys || problem->alibi || problem->soft_cap != 0 ||
      !(problem->scale > 0) || problem->query_length > MOST_QUERIES ||
      problem->key_length > longest || !pages || problem->batch * problem->query_length == 0)
    return false;
  int64_t tiles = tiles_of(problem, ROWS), units = problem->batch * tiles;
  int64_t splits = choose_splits(units, device->multiprocessors, problem->key_length, SPLIT_KEYS);
  choice->values[SPLITS] = splits;
  if (splits > 1)
    choice->workspace_bytes = (size_t)(units * splits * ROWS * (WIDTH + 2)) * sizeof(float);
  snprintf(choice->description, sizeof choice->description,
           "latent: wgmma, %lld splits of the keys, %d rows a block", (long long)splits, (int)ROWS);
  return true;
}

/* Values lie where the keys are. */
bool suits(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  bool packed = problem->ragged && !problem->paged, same = args->k.data == args->v.data;
  for (int i = 0; i < (packed ? 1 : 2); ++i)
    same = same && (args->k.stride[i] == args->v.stride[i] || args->k.shape[i] <= 1);
  return same && aligned(args->q, 8) && aligned(args->o, 2) &&
         softmax_sm90::map_suits(args->k, packed);
}

template <typename T> attn_status launch(const latent_parameters &l, cudaStream_t stream) {
  const parameters &p = l.p;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(latent_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                     (int)layout::BYTES));
  latent_kernel<T>
      <<<(unsigned)(p.batch * p.tiles * p.splits), THREADS, (size_t)layout::BYTES, stream>>>(l);
  ATTN_CUDA_TRY_LAUNCH("softmax_latent_sm90");
  return merge<ROWS, WIDTH>(p, stream);
}

attn_status run(const attn_cuda_device *, const attn_cuda_choice *choice,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *workspace,
                cudaStream_t stream) {
  latent_parameters l = {};
  l.p = parameters_of(problem, args, choice->values[SPLITS], tiles_of(problem, ROWS), ROWS,
                      workspace);
  l.packed = problem->ragged && !problem->paged;
  l.box = problem->paged && problem->page_size < KEYS ? (int)problem->page_size : (int)KEYS;
  if (!softmax_sm90::map_make(&l.k, args->k, l.packed, l.box))
    return attn_cuda_fail(ATTN_INTERNAL, "softmax: the driver refuses a tensor map");
  return problem->dtype == ATTN_BF16 ? launch<__nv_bfloat16>(l, stream) : launch<__half>(l, stream);
}

} // namespace

extern const softmax_algorithm softmax_latent_sm90 = {"latent sm90", ATTN_PASS_FORWARD, plan, suits,
                                                      run};
