/* The softmax engine's forward on Hopper, 16-bit elements with float32 accumulation.
 *
 *   O = softmax(scale Q K^T) V,   LSE_i = ln sum_j exp(scale q_i . k_j)
 *
 * FlashAttention-3 (arXiv 2407.08608). A block owns 64 queries of one head for each of its two or
 * three consumer warpgroups. One thread of the producer warpgroup streams blocks of keys and values
 * through rings in shared memory with the bulk tensor copies. A consumer overlaps the scores of a
 * block and the previous block's product with V (both on the matrix units) with its softmax, and
 * the consumers take turns at issuing products, so that one's exponentials run beside the others'
 * products. Weights P stay in registers: they are the A operand of P V.
 *
 * With a block list, whose blocks are multiples of a kernel's own, the blocks of keys on it take
 * the place of all that are seen.
 *
 * Blocks of queries are work items that the multiprocessors draw from a counter, in sections of
 * heads whose keys and values fit in the L2 cache together and longest first inside a section. The
 * order of items touches no result. */
#include "kernels/cuda/block_list.cuh"
#include "kernels/cuda/softmax_sm90.cuh"

#include <cstdio>
#include <type_traits>

namespace {

using namespace softmax_sm90;

struct forward_parameters {
  CUtensorMap q, k, v, o;
  extents e;
  void *out; /* o once more, for the last rows of ragged sequences */
  int64_t out_token, out_head;
  float *lse;
  int64_t lse_batch, lse_head, lse_row;
  float scale, scale_log2; /* scale_log2 = scale log2 e */
  int blocks;              /* of queries a sequence has at most */
  int section;             /* heads a section */
  int items;
  int *counter;
  block_list list;
};

template <int DIM_, int WIDTH_, int GROUPS_, int STAGES_, bool LISTED_ = false>
struct forward_shape {
  static constexpr bool LISTED = LISTED_; /* there is a block list */
  static constexpr int DIM = DIM_, WIDTH = WIDTH_, GROUPS = GROUPS_, STAGES = STAGES_;
  static constexpr int ROWS = GROUPS * GROUP_ROWS, THREADS = (GROUPS + 1) * 128;
  static constexpr int BLOCKS = GROUPS == 1 ? 2 : 1; /* a multiprocessor */
  static constexpr int PRODUCER_REGISTERS = GROUPS == 1 ? 40 : GROUPS == 2 ? 24 : 32;
  static constexpr int CONSUMER_REGISTERS = GROUPS == 1 ? 216 : GROUPS == 2 ? 240 : 160;
  static constexpr int q_bytes = DIM / 64 * TILE_BYTES; /* of one group */
  static constexpr int block_bytes = WIDTH * DIM * 2;
  static constexpr int k_offset = GROUPS * q_bytes, v_offset = k_offset + STAGES * block_bytes;
  static constexpr int end = v_offset + STAGES * block_bytes;
  /* The output is staged in its own memory where that fits, else in that of the queries. */
  static constexpr bool o_apart = end + GROUPS * q_bytes + 2048 <= 232448;
  static constexpr int o_offset = o_apart ? end : 0;
  static constexpr int barriers_offset = o_apart ? end + GROUPS * q_bytes : end;
  static constexpr int barriers = 2 * GROUPS + 4 * STAGES;
  static constexpr int items_offset = barriers_offset + barriers * 8;
  static constexpr int bytes = items_offset + GROUPS * 4 + 1024; /* 1024: to align the base */
  static_assert(bytes * BLOCKS <= 232448, "shared memory of a multiprocessor");
};

/* One block of queries. */
struct forward_work {
  int batch, head, kv_head, first; /* first: row in the sequence */
  sequence s;
  range keys; /* blocks of keys, or their places in the list */
  const int32_t *list;
  int blocks_listed; /* of keys, in a block of the list */
  template <typename S> __device__ __forceinline__ int block(int i) const {
    return S::LISTED ? list[i / blocks_listed] * blocks_listed + i % blocks_listed : i;
  }
};

/* From blocks of keys to their places in the list. */
template <typename S> __device__ void find_places(const block_list &all, forward_work *w) {
  const listed_blocks listed = find_listed(all, w->batch, w->head, w->first / all.queries);
  w->list = listed.first;
  w->blocks_listed = all.keys / S::WIDTH;
  const range seen = w->keys;
  range &r = w->keys;
  r.low = 0, r.high = listed.count * w->blocks_listed;
  while (r.high > 0 && w->block<S>(r.high - 1) >= seen.high) r.high--;
  while (r.low < r.high && w->block<S>(r.low) < seen.low) r.low++;
  r.full_high = r.high;
  while (r.full_high > r.low && w->block<S>(r.full_high - 1) >= seen.full_high) r.full_high--;
  r.full_low = r.low;
  while (r.full_low < r.full_high && w->block<S>(r.full_low) < seen.full_low) r.full_low++;
}

template <typename S>
__device__ __forceinline__ bool locate(const forward_parameters &p, int item, forward_work *w) {
  const int section = item / (p.section * p.blocks), rest = item % (p.section * p.blocks);
  const int all = p.e.batch * p.e.heads, pair0 = section * p.section;
  const int pairs = min(p.section, all - pair0);
  const int pair = pair0 + rest % pairs;
  w->batch = pair / p.e.heads;
  w->head = pair % p.e.heads;
  w->kv_head = w->head / (p.e.heads / p.e.kv_heads);
  w->first = (p.blocks - 1 - rest / pairs) * S::ROWS;
  w->s = sequence_of(p.e, w->batch);
  if (w->first >= w->s.query_length) return false;
  w->keys = keys_seen(p.e, w->s, w->first, S::ROWS, S::WIDTH);
  if constexpr (S::LISTED) find_places<S>(p.list, w);
  return true;
}

/* Positions in the rings. */
template <int STAGES> struct ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

template <typename S> struct forward_barriers {
  uint32_t q_full, q_empty, k_full, k_empty, v_full, v_empty;
  __device__ __forceinline__ forward_barriers(uint32_t base) {
    q_full = base + S::barriers_offset;
    q_empty = q_full + 8 * S::GROUPS;
    k_full = q_empty + 8 * S::GROUPS;
    k_empty = k_full + 8 * S::STAGES;
    v_full = k_empty + 8 * S::STAGES;
    v_empty = v_full + 8 * S::STAGES;
  }
};

template <typename S>
__device__ void forward_produce(const forward_parameters &p, char *shared, uint32_t base) {
  constexpr int BOX = S::WIDTH;
  const forward_barriers<S> barriers(base);
  volatile int *items = (volatile int *)(shared + S::items_offset);
  ring<S::STAGES> k_ring, v_ring;
  uint32_t q_phase = 0;
  int item = blockIdx.x, next;
  for (;; item = next) {
    if (item >= p.items) break;
    next = (int)gridDim.x + atomicAdd(p.counter, 1);
    forward_work w;
    if (!locate<S>(p, item, &w)) continue;
    const int batch = p.e.query_offsets ? 0 : w.batch;
    auto load_k = [&](int i) {
      const int n = w.block<S>(i);
      barrier_wait(barriers.k_empty + 8 * k_ring.stage, k_ring.phase ^ 1);
      const uint32_t full = barriers.k_full + 8 * k_ring.stage;
      barrier_expect(full, S::block_bytes);
      tile_load<S::DIM>(base + S::k_offset + k_ring.stage * S::block_bytes, &p.k, full, S::WIDTH,
                        BOX, w.kv_head, w.s.key_start + n * S::WIDTH, batch);
      k_ring.next();
    };
    auto load_v = [&](int i) {
      const int n = w.block<S>(i);
      barrier_wait(barriers.v_empty + 8 * v_ring.stage, v_ring.phase ^ 1);
      const uint32_t full = barriers.v_full + 8 * v_ring.stage;
      barrier_expect(full, S::block_bytes);
      tile_load<S::DIM>(base + S::v_offset + v_ring.stage * S::block_bytes, &p.v, full, S::WIDTH,
                        BOX, w.kv_head, w.s.key_start + n * S::WIDTH, batch);
      v_ring.next();
    };
    const bool any = w.keys.high > w.keys.low;
    if (any) load_k(w.keys.high - 1);
    for (int g = 0; g < S::GROUPS; g++) {
      barrier_wait(barriers.q_empty + 8 * g, q_phase ^ 1);
      items[g] = item;
      const uint32_t full = barriers.q_full + 8 * g;
      barrier_expect(full, S::q_bytes);
      tile_load<S::DIM>(base + g * S::q_bytes, &p.q, full, GROUP_ROWS, GROUP_ROWS, w.head,
                        w.s.query_start + w.first + g * GROUP_ROWS, batch);
    }
    q_phase ^= 1;
    if (!any) continue;
    for (int n = w.keys.high - 2; n >= w.keys.low; n--) {
      load_k(n);
      load_v(n + 1);
    }
    load_v(w.keys.low);
  }
  for (int g = 0; g < S::GROUPS; g++) {
    barrier_wait(barriers.q_empty + 8 * g, q_phase ^ 1);
    items[g] = -1;
    barrier_arrive(barriers.q_full + 8 * g);
  }
}

template <typename T, typename S>
__device__ __forceinline__ void scores_issue(float (&scores)[S::WIDTH / 2], uint32_t q_tile,
                                             uint32_t k_tile) {
#pragma unroll
  for (int k = 0; k < S::DIM / 16; k++)
    scores_wgmma<T>(scores, descriptor(q_tile + k / 4 * TILE_BYTES + k % 4 * 32),
                    descriptor(k_tile + k / 4 * S::WIDTH * 128 + k % 4 * 32), k > 0);
  wgmma_commit();
}

template <typename T, typename S>
__device__ __forceinline__ void output_issue(float (&out)[S::DIM / 2],
                                             const uint32_t (&weights)[S::WIDTH / 16][4],
                                             uint32_t v_tile) {
#pragma unroll
  for (int k = 0; k < S::WIDTH / 16; k++)
    wgmma<T, 1>(out, weights[k], descriptor(v_tile + k * 2048, S::WIDTH * 128), 1);
  wgmma_commit();
}

/* Zeroes the values of rows [valid, WIDTH) of a block: they follow the sequence's last key and may
 * be anything, NaN too, which weights of 0 would not remove. */
template <typename S> __device__ __forceinline__ void values_clear(char *tile, int valid) {
  const int row_pieces = (S::WIDTH - valid) * 8;
  for (int i = threadIdx.x - 128; i < row_pieces * (S::DIM / 64); i += S::GROUPS * 128)
    *(uint4 *)(tile + i / row_pieces * S::WIDTH * 128 + valid * 128 + i % row_pieces * 16) =
        make_uint4(0, 0, 0, 0);
  proxy_fence();
  named_sync(1, S::GROUPS * 128);
}

enum { TURN_BARRIER = 2, OUTPUT_BARRIER = 5 }; /* one a group each */

template <typename T, typename S>
__device__ void forward_consume(const forward_parameters &p, char *shared, uint32_t base) {
  constexpr int DIM = S::DIM, WIDTH = S::WIDTH;
  const forward_barriers<S> barriers(base);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32;
  const int row0 = group * GROUP_ROWS + threadIdx.x % 128 / 32 * 16 + lane / 4;
  const int column0 = lane % 4 * 2;
  const bool leader = threadIdx.x % 128 == 0;
  const int turn = TURN_BARRIER + group, next_turn = TURN_BARRIER + (group + 1) % S::GROUPS;
  const uint32_t q_tile = base + group * S::q_bytes;
  const uint32_t o_tile = base + S::o_offset + group * S::q_bytes;
  const volatile int *items = (const volatile int *)(shared + S::items_offset);
  ring<S::STAGES> k_ring, v_ring;

  if (group == S::GROUPS - 1) named_arrive(TURN_BARRIER, 256); /* the first group's first turn */
  for (uint32_t q_phase = 0;; q_phase ^= 1) {
    barrier_wait(barriers.q_full + 8 * group, q_phase);
    const int item = __shfl_sync(~0u, items[group], 0); /* uniform, as the compiler can see */
    if (item < 0) break;
    forward_work w;
    locate<S>(p, item, &w);

    float out[DIM / 2];
    row_state rows = {{-INFINITY, -INFINITY}, {0, 0}};
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) out[i] = 0;

    if (w.keys.high > w.keys.low) {
      float scores[WIDTH / 2], factor[2];
      uint32_t weights[WIDTH / 16][4];
      const int position = w.first + row0 + w.s.shift; /* i' of the first row */
      auto mask = [&](int i) {
        const int n = w.block<S>(i);
        int low[2], high[2];
#pragma unroll
        for (int row = 0; row < 2; row++) {
          const int start = n * WIDTH + column0, at = position + 8 * row;
          low[row] = at - p.e.left - start;
          high[row] = min(w.s.key_length, at + p.e.right + 1) - start;
        }
        hide(scores, low, high);
      };
      auto k_tile = [&] { return base + S::k_offset + k_ring.stage * S::block_bytes; };
      auto v_tile = [&] { return base + S::v_offset + v_ring.stage * S::block_bytes; };
      auto k_release = [&] {
        if (lane == 0) barrier_arrive(barriers.k_empty + 8 * k_ring.stage);
        k_ring.next();
      };
      auto v_release = [&] {
        if (lane == 0) barrier_arrive(barriers.v_empty + 8 * v_ring.stage);
        v_ring.next();
      };

      int n = w.keys.high - 1;
      barrier_wait(barriers.k_full + 8 * k_ring.stage, k_ring.phase);
      pin(scores);
      wgmma_fence();
      scores_issue<T, S>(scores, q_tile, k_tile());
      wgmma_wait<0>();
      pin(scores);
      k_release();
      if (n >= w.keys.full_high || n < w.keys.full_low) mask(n);
      weigh(scores, &rows, factor, p.scale_log2);
      operands<T>(weights, scores);
      const int first_key = w.block<S>(n) * WIDTH;
      if ((p.e.key_offsets || p.e.key_lengths) && first_key + WIDTH > w.s.key_length) {
        barrier_wait(barriers.v_full + 8 * v_ring.stage, v_ring.phase);
        values_clear<S>(shared + (v_tile() - base), w.s.key_length - first_key);
      }

      /* Scores of block n beside the product of block n + 1's weights with V. */
      auto step = [&](auto masked) {
        barrier_wait(barriers.k_full + 8 * k_ring.stage, k_ring.phase);
        named_sync(turn, 256);
        pin(scores);
        pin(out);
        wgmma_fence();
        scores_issue<T, S>(scores, q_tile, k_tile());
        barrier_wait(barriers.v_full + 8 * v_ring.stage, v_ring.phase);
        wgmma_fence();
        output_issue<T, S>(out, weights, v_tile());
        named_arrive(next_turn, 256);
        wgmma_wait<1>();
        pin(scores);
        k_release();
        if (decltype(masked)::value) mask(n);
        weigh(scores, &rows, factor, p.scale_log2);
        wgmma_wait<0>();
        pin(out);
        v_release();
        operands<T>(weights, scores);
        if (__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
          for (int i = 0; i < DIM / 2; i++) out[i] *= factor[i % 4 / 2];
        }
      };
      n--;
#pragma unroll 1
      for (; n >= max(w.keys.full_high, w.keys.low); n--) step(std::true_type());
#pragma unroll 1
      for (; n >= max(w.keys.full_low, w.keys.low); n--) step(std::false_type());
#pragma unroll 1
      for (; n >= w.keys.low; n--) step(std::true_type());

      if (S::o_apart && lane == 0) barrier_arrive(barriers.q_empty + 8 * group);
      barrier_wait(barriers.v_full + 8 * v_ring.stage, v_ring.phase);
      pin(out);
      wgmma_fence();
      output_issue<T, S>(out, weights, v_tile());
      wgmma_wait<0>();
      pin(out);
      v_release();
    } else if (S::o_apart && lane == 0) {
      barrier_arrive(barriers.q_empty + 8 * group);
    }

    float inverse[2];
#pragma unroll
    for (int row = 0; row < 2; row++) {
      const float sum = quad_sum(rows.sum[row]);
      const int at = w.first + row0 + 8 * row;
      inverse[row] = sum > 0 ? 1 / sum : 0;
      if (p.lse && lane % 4 == 0 && at < w.s.query_length) {
        float *lse = p.lse + w.head * p.lse_head;
        lse += p.e.query_offsets ? (w.s.query_start + at) * p.lse_row
                                 : w.batch * p.lse_batch + at * p.lse_row;
        *lse = sum > 0 ? rows.top[row] * p.scale + LN_2 * log2f(sum) : -INFINITY;
      }
    }

    /* The output through shared memory, once the previous one has left it and, where it is that of
     * the queries, all warps of the group have read these. */
    if (S::o_apart && leader) tensor_store_read();
    named_sync(OUTPUT_BARRIER + group, 128);
    const int row = threadIdx.x % 128 / 32 * 16 + lane % 16;
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 2) {
      uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; i++)
        words[i] = element<T>::pack(out[4 * j + 2 * i] * inverse[i % 2],
                                    out[4 * j + 2 * i + 1] * inverse[i % 2]);
      matrix_store(o_tile + j / 8 * TILE_BYTES + swizzled(row, j % 8 + lane / 16), words[0],
                   words[1], words[2], words[3]);
    }
    proxy_fence();
    named_sync(OUTPUT_BARRIER + group, 128);
    const int first = w.first + group * GROUP_ROWS, valid = w.s.query_length - first;
    if (p.e.query_offsets && valid < GROUP_ROWS) {
      /* The next sequence's rows follow. */
      T *to = (T *)p.out + (int64_t)(w.s.query_start + first) * p.out_token + w.head * p.out_head;
      for (int i = threadIdx.x % 128; i < valid * (DIM / 8); i += 128) {
        const int r = i / (DIM / 8), piece = i % (DIM / 8);
        *(uint4 *)(to + r * p.out_token + piece * 8) =
            *(uint4 *)(shared + (o_tile - base) + piece / 8 * TILE_BYTES + swizzled(r, piece % 8));
      }
    } else if (leader && valid > 0) {
#pragma unroll
      for (int c = 0; c < DIM / 64; c++)
        tensor_store(&p.o, o_tile + c * TILE_BYTES, 64 * c, w.head, w.s.query_start + first,
                     p.e.query_offsets ? 0 : w.batch);
    }
    if (!S::o_apart) {
      if (leader) tensor_store_read();
      named_sync(OUTPUT_BARRIER + group, 128);
      if (lane == 0) barrier_arrive(barriers.q_empty + 8 * group);
    }
  }
  if (leader) tensor_store_wait();
}

template <typename T, typename S>
__global__
__launch_bounds__(S::THREADS,
                  S::BLOCKS) void forward_kernel(const __grid_constant__ forward_parameters p) {
  extern __shared__ char memory[];
  const uint32_t start = shared_address(memory), base = (start + 1023) / 1024 * 1024;
  char *shared = memory + (base - start);
  if (threadIdx.x == 0) {
    const forward_barriers<S> barriers(base);
    for (int g = 0; g < S::GROUPS; g++) {
      barrier_init(barriers.q_full + 8 * g, 1);
      barrier_init(barriers.q_empty + 8 * g, 4);
    }
    for (int i = 0; i < S::STAGES; i++) {
      barrier_init(barriers.k_full + 8 * i, 1);
      barrier_init(barriers.k_empty + 8 * i, 4 * S::GROUPS);
      barrier_init(barriers.v_full + 8 * i, 1);
      barrier_init(barriers.v_empty + 8 * i, 4 * S::GROUPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_fewer<S::PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) forward_produce<S>(p, shared, base);
  } else {
    registers_more<S::CONSUMER_REGISTERS>();
    forward_consume<T, S>(p, shared, base);
  }
}

/* Queries of a work item: of a block of the block list, where there is one. */
int item_rows(const attn_softmax_problem *problem) {
  if (problem->list_keys) return problem->list_queries % 128 ? 64 : 128;
  return problem->dim == 64 ? 192 : 128;
}

bool forward_plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
                  attn_cuda_choice *choice) {
  /* Fewer queries leave most rows of a block empty: decoding has its own algorithms. */
  const int64_t fewest_queries = 16;
  if (!offered(device, problem) || problem->query_length < fewest_queries) return false;
  if (problem->list_queries % 64 || problem->list_keys % 64) return false;
  choice->workspace_bytes = 256; /* the counter of work items */
  snprintf(choice->description, sizeof choice->description,
           "wgmma, warp-specialised, blocks of %d queries, %d multiprocessors", item_rows(problem),
           device->multiprocessors);
  return true;
}

bool forward_suits(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  return map_suits(args->q, problem->ragged) && map_suits(args->k, problem->ragged) &&
         map_suits(args->v, problem->ragged) && map_suits(args->o, problem->ragged);
}

template <typename T, typename S>
attn_status forward_launch(const attn_cuda_device *device, const attn_softmax_problem *problem,
                           const attn_softmax_args *args, void *workspace, cudaStream_t stream) {
  forward_parameters p = {};
  const bool ragged = problem->ragged;
  if (!map_make(&p.q, args->q, ragged, GROUP_ROWS) || !map_make(&p.k, args->k, ragged, S::WIDTH) ||
      !map_make(&p.v, args->v, ragged, S::WIDTH) || !map_make(&p.o, args->o, ragged, GROUP_ROWS))
    return attn_cuda_fail(ATTN_INTERNAL, "softmax: the driver refuses a tensor map");
  p.e = extents_of(problem, args);
  p.out = args->o.data;
  p.out_token = args->o.stride[!ragged];
  p.out_head = args->o.stride[1 + !ragged];
  if (args->lse.data) {
    p.lse = (float *)args->lse.data;
    p.lse_batch = ragged ? 0 : args->lse.stride[0];
    p.lse_head = args->lse.stride[!ragged];
    p.lse_row = args->lse.stride[1 + !ragged];
  }
  p.scale = (float)problem->scale;
  p.scale_log2 = (float)(problem->scale * LOG2_E);
  p.blocks = (int)((problem->query_length + S::ROWS - 1) / S::ROWS);
  /* A section's keys and values take half of the L2 cache at most. */
  const int64_t pairs = problem->batch * problem->heads,
                sharing = problem->heads / problem->kv_heads;
  const int64_t kv_bytes = problem->key_length * problem->dim * 2 * 2;
  int64_t section = (int64_t)(device->l2_bytes / 2) / kv_bytes * sharing;
  if (section < sharing) section = sharing;
  p.section = (int)(section < pairs ? section : pairs);
  p.items = (int)(pairs * p.blocks);
  p.counter = (int *)workspace;
  p.list = block_list_of(problem, args);
  const int places = device->multiprocessors * S::BLOCKS;
  const int grid = p.items < places ? p.items : places;
  if (grid == 0) return ATTN_OK;
  ATTN_CUDA_TRY(cudaMemsetAsync(workspace, 0, sizeof(int), stream));
  ATTN_CUDA_TRY(cudaFuncSetAttribute(forward_kernel<T, S>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes));
  forward_kernel<T, S><<<grid, S::THREADS, S::bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("softmax forward");
  return ATTN_OK;
}

template <typename T>
attn_status forward_choose(const attn_cuda_device *device, const attn_softmax_problem *problem,
                           const attn_softmax_args *args, void *workspace, cudaStream_t stream) {
  const bool wide = problem->dim == 128;
  const bool rows_64 = problem->list_queries % 128, keys_64 = problem->list_keys % 128;
  auto launch = wide ? forward_launch<T, forward_shape<128, 128, 2, 2>>
                     : forward_launch<T, forward_shape<64, 128, 3, 2>>;
  if (problem->list_keys && rows_64)
    launch = wide ? forward_launch<T, forward_shape<128, 64, 1, 2, true>>
                  : forward_launch<T, forward_shape<64, 64, 1, 4, true>>;
  else if (problem->list_keys && keys_64)
    launch = wide ? forward_launch<T, forward_shape<128, 64, 2, 4, true>>
                  : forward_launch<T, forward_shape<64, 64, 2, 4, true>>;
  else if (problem->list_keys)
    launch = wide ? forward_launch<T, forward_shape<128, 128, 2, 2, true>>
                  : forward_launch<T, forward_shape<64, 128, 2, 2, true>>;
  return launch(device, problem, args, workspace, stream);
}

attn_status forward_run(const attn_cuda_device *device, const attn_cuda_choice *,
                        const attn_softmax_problem *problem, const attn_softmax_args *args,
                        void *workspace, cudaStream_t stream) {
  return problem->dtype == ATTN_BF16
             ? forward_choose<__nv_bfloat16>(device, problem, args, workspace, stream)
             : forward_choose<__half>(device, problem, args, workspace, stream);
}

} // namespace

extern const softmax_algorithm softmax_sm90_forward;
const softmax_algorithm softmax_sm90_forward = {
    "sm90 forward", ATTN_PASS_FORWARD, forward_plan, forward_suits, forward_run,
};
