/* Few queries over latents: multi-head latent attention as it decodes (DeepSeek-V2, arXiv
 * 2405.04434, section 2.1), one key head of 512 + 64 dimensions whose first 512 are the values too.
 * Every latent is read from memory once for up to 64 rows (query, head), and the keys are split
 * among blocks as in softmax_decode.cu.
 *
 * A block has 1, 2 or 4 tiles of 16 rows, 4 warps each, and a ring of stages of 64 or 32 latents
 * in shared memory. Of a stage each warp of a tile weighs a quarter with all dimensions, the tile's
 * warps exchange maxima and weights, and each sums 128 of the 512 columns. Fragments are permuted
 * as in softmax_decode.cu, so that a stage serves as keys and as values as it is. */
#include "kernels/cuda/decode.cuh"

namespace {

enum {
  ROWS = 16, /* of a tile */
  DIM = 576,
  WIDTH = 512, /* of a value */
  TILE_WARPS = 4,
  CHUNKS = DIM / 8, /* of 16 bytes in a row */
  WARP_COLUMNS = WIDTH / TILE_WARPS,
  SPLIT_KEYS = 128, /* a split is not worth less */
};

/* Where a chunk of a row lies: the 8 threads that read at once take 4 chunks of 2 neighbouring rows
 * (as keys) or 2 chunks of every other of 8 rows (as values), and never meet in a bank. */
__device__ __forceinline__ int place(int row, int chunk) {
  return row * CHUNKS + (chunk ^ (row / 2 % 4 * 2) ^ (row % 2 * 4));
}

template <int TILES> struct layout {
  enum {
    KEYS = TILES < 4 ? 64 : 32, /* of a stage */
    STAGES = TILES < 4 ? 2 : 3,
    WARP_KEYS = KEYS / TILE_WARPS,
    WEIGHTS_LD = KEYS / 2 + 4, /* pairs of weights; 8 rows meet different banks */
    THREADS = TILES * TILE_WARPS * 32,
    QUERIES = TILES * ROWS * CHUNKS * 16, /* bytes */
    RING = STAGES * KEYS * CHUNKS * 16,
    WEIGHTS = TILES * ROWS * WEIGHTS_LD * 4,
    MAXIMA = TILES * TILE_WARPS * ROWS * 4,
    BYTES = QUERIES + RING + WEIGHTS + MAXIMA,
  };
};

extern __shared__ __align__(16) char shared_memory[];

/* Among the 4 warps of a tile. */
__device__ __forceinline__ void synchronise_tile(int tile) {
  asm volatile("bar.sync %0, %1;" ::"r"(tile + 1), "n"(TILE_WARPS * 32) : "memory");
}

/* Block: [sequence][TILES tiles of rows][split]. */
template <typename T, int TILES>
__global__ void __launch_bounds__(layout<TILES>::THREADS, 1) latent_kernel(parameters p) {
  typedef layout<TILES> l;
  enum {
    KEYS = l::KEYS,
    STAGES = l::STAGES,
    WEIGHTS_LD = l::WEIGHTS_LD,
    GROUPS = l::WARP_KEYS / 8
  };
  int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
  int own_tile = threadIdx.x / (TILE_WARPS * 32), warp = threadIdx.x / 32 % TILE_WARPS;
  int64_t index = blockIdx.x, split = index % p.splits, group = index / p.splits;
  int64_t groups = p.tiles / TILES, b = group / groups;
  int64_t first_row = group % groups * TILES * ROWS; /* of the block */
  sequence s = find_sequence(p, b);
  int64_t rows = min((int64_t)TILES * ROWS, s.queries * p.group - first_row);
  uint4 *queries = (uint4 *)shared_memory, *ring = queries + l::QUERIES / 16;
  unsigned *weights = (unsigned *)(ring + l::RING / 16) + own_tile * ROWS * WEIGHTS_LD;
  float *maxima =
      (float *)(shared_memory + l::QUERIES + l::RING + l::WEIGHTS) + own_tile * TILE_WARPS * ROWS;

  key_range range = {0, 0};
  if (rows > 0) {
    range.first = visible(p, s, first_row / p.group).first;
    range.end = visible(p, s, (first_row + rows - 1) / p.group).end;
  }
  int64_t share = max(range.end - range.first, (int64_t)0);
  share = (share + p.splits * KEYS - 1) / (p.splits * KEYS) * KEYS;
  range.first += split * share;
  range.end = min(range.end, range.first + share);

  for (int i = threadIdx.x; i < TILES * ROWS * CHUNKS; i += l::THREADS) {
    int r = i / CHUNKS, chunk = i % CHUNKS;
    int64_t query = (first_row + r) / p.group, head = (first_row + r) % p.group;
    const T *from = (const T *)p.q.data + b * p.q.sequence + (s.query_start + query) * p.q.token +
                    head * p.q.head + chunk * 8;
    queries[place(r, chunk)] = r < rows ? *(const uint4 *)from : make_uint4(0, 0, 0, 0);
  }
  int from_key[2], to_key[2], position[2]; /* what the rows see */
  float slope[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int r = own_tile * ROWS + row + half * 8;
    int64_t i = (first_row + r) / p.group, head = (first_row + r) % p.group;
    bool there = r < rows;
    key_range seen = there ? visible(p, s, i) : key_range{0, 0};
    from_key[half] = (int)min(seen.first, s.keys), to_key[half] = (int)max(seen.end, (int64_t)0);
    position[half] = (int)(i + s.keys - s.queries);
    slope[half] = there && p.alibi_slopes ? p.alibi_slopes[head] : 0;
  }

  /* A lane looks up where one or two latents of a stage lie. */
  struct places {
    int64_t at[KEYS / 32];
  };
  const int32_t *pages = p.pages ? p.pages + b * p.pages_sequence : NULL;
  const T *latents = (const T *)p.k.data;
  if (!pages) latents += b * p.k.sequence + s.key_start * p.k.token;
  auto look_up = [&](int64_t first) {
    places found;
#pragma unroll
    for (int i = 0; i < KEYS / 32; ++i) {
      int64_t key = first + i * 32 + lane;
      unsigned page = pages ? (unsigned)key / p.page_size : 0;
      found.at[i] = key >= range.end ? 0
                    : pages
                        ? pages[page] * p.page_k + ((unsigned)key - page * p.page_size) * p.k.token
                        : key * p.k.token;
    }
    return found;
  };
  auto request = [&](int stage, int64_t first, const places &found) {
    uint4 *to = ring + stage * KEYS * CHUNKS;
#pragma unroll
    for (int part = 0; part < KEYS / 32; ++part)
      for (int i = threadIdx.x; i < 32 * CHUNKS; i += l::THREADS) { /* whole warps */
        int r = i / CHUNKS, chunk = i % CHUNKS;
        int64_t from = __shfl_sync(~0u, found.at[part], r);
        copy_async(to + place(part * 32 + r, chunk), latents + from + chunk * 8,
                   first + part * 32 + r < range.end);
      }
  };
  int64_t ahead = range.first;
  places at = look_up(ahead);
#pragma unroll
  for (int i = 0; i < STAGES - 1; ++i) {
    if (ahead < range.end) request(i, ahead, at);
    commit_copies();
    ahead += KEYS;
    at = look_up(ahead);
  }

  float o[WARP_COLUMNS / 8][4] = {}, maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};
  int stage = 0;
  for (int64_t key = range.first; key < range.end; key += KEYS) {
    wait_copies<STAGES - 2>();
    __syncthreads();
    if (ahead < range.end) request(stage == 0 ? STAGES - 1 : stage - 1, ahead, at);
    commit_copies();
    ahead += KEYS;
    at = look_up(ahead);
    const uint4 *keys = ring + stage * KEYS * CHUNKS;

    float part[GROUPS][4 / GROUPS][4] = {}; /* by 8 latents; sums that do not wait for each other */
#pragma unroll
    for (int c = 0; c < DIM / 32; ++c) {
      uint4 low = queries[place(own_tile * ROWS + row, c * 4 + quad)];
      uint4 high = queries[place(own_tile * ROWS + row + 8, c * 4 + quad)];
#pragma unroll
      for (int n = 0; n < GROUPS; ++n) {
        uint4 k = keys[place(warp * l::WARP_KEYS + n * 8 + row, c * 4 + quad)];
        const int first = c * 2 % (4 / GROUPS), second = (c * 2 + 1) % (4 / GROUPS);
        multiply<T>(part[n][first], low.x, high.x, low.y, high.y, k.x, k.y);
        multiply<T>(part[n][second], low.z, high.z, low.w, high.w, k.z, k.w);
      }
    }
    float score[GROUPS][4], top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < GROUPS; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        int half = e / 2, j = (int)key + warp * l::WARP_KEYS + n * 8 + quad * 2 + e % 2;
        float x = 0;
#pragma unroll
        for (int i = 0; i < 4 / GROUPS; ++i) x += part[n][i][e];
        x *= p.scale;
        if (p.soft_cap != 0) x = p.soft_cap * tanhf(x / p.soft_cap) * LOG2_E;
        if (p.alibi_slopes) x -= slope[half] * fabsf((float)(position[half] - j)) * LOG2_E;
        score[n][e] = j >= from_key[half] && j < to_key[half] ? x : -INFINITY;
        top[half] = fmaxf(top[half], score[n][e]);
      }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 1));
      top[half] = fmaxf(top[half], __shfl_xor_sync(~0u, top[half], 2));
      if (quad == 0) maxima[warp * ROWS + row + half * 8] = top[half];
    }
    synchronise_tile(own_tile);
    float base[2];
    bool changed = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      top[half] = maximum[half];
#pragma unroll
      for (int w = 0; w < TILE_WARPS; ++w)
        top[half] = fmaxf(top[half], maxima[w * ROWS + row + half * 8]);
      base[half] = top[half] == -INFINITY ? 0 : top[half];
      changed |= top[half] != maximum[half];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] *= exponential(maximum[half] - base[half]);
#pragma unroll
      for (int n = 0; n < GROUPS; ++n) {
        float low = exponential(score[n][half * 2] - base[half]);
        float high = exponential(score[n][half * 2 + 1] - base[half]);
        sum[half] += low + high;
        weights[(row + half * 8) * WEIGHTS_LD + warp * (l::WARP_KEYS / 2) + n * 4 + quad] =
            pack<T>(low, high);
      }
    }
    synchronise_tile(own_tile);
    if (__any_sync(~0u, changed)) {
      float factor[2] = {exponential(maximum[0] - base[0]), exponential(maximum[1] - base[1])};
#pragma unroll
      for (int c = 0; c < WARP_COLUMNS / 8; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[c][e] *= factor[e / 2];
      maximum[0] = top[0], maximum[1] = top[1];
    }
#pragma unroll
    for (int step = 0; step < KEYS / 16; ++step) {
      const unsigned *w = weights + row * WEIGHTS_LD + step * 8 + quad;
      unsigned w0 = w[0], w1 = w[8 * WEIGHTS_LD], w2 = w[4], w3 = w[8 * WEIGHTS_LD + 4];
#pragma unroll
      for (int c = 0; c < WARP_COLUMNS / 64; ++c) {
        uint4 v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i)
          v[i] = keys[place(step * 16 + quad * 2 + i % 2 + i / 2 * 8,
                            warp * (WARP_COLUMNS / 8) + c * 8 + row)];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          auto word = [&](const uint4 &x) {
            return j / 2 == 0 ? x.x : j / 2 == 1 ? x.y : j / 2 == 2 ? x.z : x.w;
          };
          unsigned selector = j % 2 ? 0x7632 : 0x5410;
          multiply<T>(o[c * 8 + j], w0, w1, w2, w3, __byte_perm(word(v[0]), word(v[1]), selector),
                      __byte_perm(word(v[2]), word(v[3]), selector));
        }
      }
    }
    stage = stage == STAGES - 1 ? 0 : stage + 1;
  }

  /* The warps of a tile have the same maxima; their sums become one. */
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
    sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    if (quad == 0) maxima[warp * ROWS + row + half * 8] = sum[half];
  }
  __syncthreads();
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    int r = own_tile * ROWS + row + half * 8;
    if (r >= rows) continue;
    int64_t query = (first_row + r) / p.group, head = (first_row + r) % p.group;
    float total = 0;
#pragma unroll
    for (int w = 0; w < TILE_WARPS; ++w) total += maxima[w * ROWS + row + half * 8];
    int64_t tile = group % groups * TILES + own_tile;
    int64_t part = ((b * p.tiles + tile) * p.splits + split) * ROWS + row + half * 8;
#pragma unroll
    for (int c = 0; c < WARP_COLUMNS / 64; ++c)
#pragma unroll
      for (int e = 0; e < 2; ++e)
#pragma unroll
        for (int j = 0; j < 8; ++j)
          store_result(p, s, b, query, head, part,
                       warp * WARP_COLUMNS + c * 64 + (quad * 2 + e) * 8 + j,
                       o[c * 8 + j][half * 2 + e], maximum[half], total);
  }
}

/* choice->values */
enum { SPLITS = 0, TILES_OF_BLOCK };

bool plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
          attn_cuda_choice *choice) {
  if ((problem->dtype != ATTN_BF16 && problem->dtype != ATTN_F16) || problem->dim != DIM ||
      problem->value_dim != WIDTH || problem->kv_heads != 1 || problem->bias ||
      problem->list_keys || problem->query_length > MOST_QUERIES ||
      problem->key_length > INT32_MAX || problem->batch * problem->query_length == 0)
    return false;
  int64_t tiles = tiles_of(problem, ROWS), together = tiles == 1 ? 1 : tiles == 2 ? 2 : 4;
  size_t bytes = together == 1   ? (size_t)layout<1>::BYTES
                 : together == 2 ? (size_t)layout<2>::BYTES
                                 : (size_t)layout<4>::BYTES;
  if (bytes > device->shared_bytes) return false;
  tiles = ceil_divide(tiles, together) * together;
  int64_t units = problem->batch * tiles / together;
  int64_t splits = choose_splits(units, device->multiprocessors, problem->key_length, SPLIT_KEYS);
  choice->values[SPLITS] = splits;
  choice->values[TILES_OF_BLOCK] = together;
  if (splits > 1)
    choice->workspace_bytes =
        (size_t)(problem->batch * tiles * splits * ROWS * (WIDTH + 2)) * sizeof(float);
  snprintf(choice->description, sizeof choice->description,
           "latent: %lld splits of the keys, %lld rows a block", (long long)splits,
           (long long)(together * ROWS));
  return true;
}

/* Rows are read 16 bytes at a time, and values where the keys are. */
bool suits(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  bool same = args->k.data == args->v.data;
  for (int i = 0; i < (problem->ragged && !problem->paged ? 1 : 2); ++i)
    same = same && (args->k.stride[i] == args->v.stride[i] || args->k.shape[i] <= 1);
  return same && aligned(args->q, 8) && aligned(args->k, 8);
}

template <typename T, int TILES> attn_status launch(const parameters &p, cudaStream_t stream) {
  typedef layout<TILES> l;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(latent_kernel<T, TILES>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, (int)l::BYTES));
  latent_kernel<T, TILES><<<(unsigned)(p.batch * p.tiles / TILES * p.splits), (int)l::THREADS,
                            (size_t)l::BYTES, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("softmax_latent");
  return merge<ROWS, WIDTH>(p, stream);
}

attn_status run(const attn_cuda_device *, const attn_cuda_choice *choice,
                const attn_softmax_problem *problem, const attn_softmax_args *args, void *workspace,
                cudaStream_t stream) {
  int64_t together = choice->values[TILES_OF_BLOCK];
  parameters p =
      parameters_of(problem, args, choice->values[SPLITS],
                    ceil_divide(tiles_of(problem, ROWS), together) * together, ROWS, workspace);

  bool half = problem->dtype == ATTN_F16;
  auto each = together == 1   ? (half ? launch<__half, 1> : launch<__nv_bfloat16, 1>)
              : together == 2 ? (half ? launch<__half, 2> : launch<__nv_bfloat16, 2>)
                              : (half ? launch<__half, 4> : launch<__nv_bfloat16, 4>);
  return each(p, stream);
}

} // namespace

extern const softmax_algorithm softmax_latent = {"latent", ATTN_PASS_FORWARD, plan, suits, run};
