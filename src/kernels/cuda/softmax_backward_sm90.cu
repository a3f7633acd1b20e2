/* The softmax engine's backward on Hopper, 16-bit elements with float32 accumulation.
 *
 *   P = exp(scale Q K^T - LSE),  dP = dO V^T,  dS = P (.) (dP - delta),
 *   delta_i = do_i . o_i - dLSE_i,
 *   dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K
 *
 * FlashAttention-2 (arXiv 2307.08691), section 3.1, on wgmma with the producer and consumers of
 * FlashAttention-3 (2407.08608). Three kernels: LSE and delta of the rows; the products; dQ's
 * rounding.
 *
 * A block owns 128 keys of a key head, 64 for each of its two consumer warpgroups, and goes through
 * the tiles of queries that see them, for all query heads that share the key head. S and dP are
 * computed transposed, [keys, queries], so that P and dS are A operands from registers for dV and
 * dK, whose sums stay in registers. For dQ = dS K, a sum over the keys of both groups, dS goes to
 * shared memory, and each group computes one half of the tile of dQ. A step's products overlap with
 * its exponentials: S of the next step is issued before this one ends.
 *
 * Halves of dQ leave by bulk copies that add to float32 sums in the workspace, issued by a writer
 * warp of each half. The order of a sum is fixed, key blocks from the last to the first: the
 * workspace has a count of contributions for every half tile, and a writer waits until those of all
 * later key blocks are in (the first one stores and does not add). To wait seldom, key blocks are
 * handed out from the last one to the first and each starts at the first queries that see it: under
 * a causal mask block j - 1 reaches a tile KEYS / WIDTH steps after block j (from the first to the
 * last, long ones before short ones, neighbours are one step apart and stall each other); without a
 * mask neighbours fall one step behind each other at the start, once.
 *
 * No deadlock: items (key blocks of a head) are numbered in the order in which running blocks draw
 * them from one counter. A writer waits for later key blocks of the same key head and the same
 * query tile only, which have smaller numbers. A block works on its items in the order of their
 * numbers. So the unfinished item with the smallest number is being worked on and waits for
 * nothing.
 *
 * With a block list a block visits the tiles on it, which the list turned round into bits tells;
 * the turn of a half tile is then the number of the key block that comes next, and a writer hands
 * it to the next lower one whose bit is set. The argument above holds as it stands. */
#include "kernels/cuda/block_list.cuh"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/softmax_sm90.cuh"

#include <cstdio>

namespace {

using namespace softmax_sm90;

/* Of a block list what blocks of keys visit, as bits: for each 64 keys (one consumer group's) the
 * tiles of queries [batch, heads, GROUPS blocks, tile_words], and for each tile the blocks that
 * contribute to it [batch, heads, tiles, block_words]. */
struct visits {
  uint32_t *tiles, *blocks; /* NULL: there is no list */
  int tile_words, block_words;
  unsigned long long *count, seen; /* visits, and as many as there would be without the list */
};

struct backward_parameters {
  CUtensorMap q, k, v, d_o;
  extents e;
  void *d_k, *d_v;
  int64_t d_k_batch, d_k_token, d_k_head, d_v_batch, d_v_token, d_v_head;
  const float *lse, *delta; /* [batch, heads, padded]: LSE log2 e (+inf: no such row), delta */
  float *d_q;               /* [batch, heads, padded / WIDTH, GROUPS, HALF]: sums */
  int *turns;               /* [batch, heads, padded / WIDTH, GROUPS]: contributions so far */
  int padded;
  float scale, scale_log2;
  int blocks, section, items;
  int *counter;
  visits listed;
};

constexpr int GROUPS = 2, THREADS = (GROUPS + 1) * 128;
constexpr int KEYS = GROUPS * GROUP_ROWS; /* of a block */
constexpr int WIDTH = 64;                 /* queries of a step */
constexpr int STAGES = 2;                 /* of every ring */
constexpr int LISTED_STEPS = 8;           /* of the ring of listed steps */

template <int DIM_, bool LISTED_> struct backward_shape {
  static constexpr int DIM = DIM_;
  static constexpr bool LISTED = LISTED_;      /* there is a block list */
  static constexpr int HALF = WIDTH * DIM / 2; /* elements of dQ that a group computes a step */
  static constexpr int group_bytes = DIM / 64 * TILE_BYTES; /* keys or values of one group */
  static constexpr int keys_bytes = GROUPS * group_bytes;
  static constexpr int tile_bytes = WIDTH * DIM * 2; /* Q or dO of a step */
  static constexpr int ds_bytes = KEYS * WIDTH * 2, rows_bytes = WIDTH * 4;
  static constexpr int k_offset = 0, v_offset = k_offset + STAGES * keys_bytes;
  static constexpr int q_offset = v_offset + keys_bytes;
  static constexpr int d_o_offset = q_offset + STAGES * tile_bytes;
  static constexpr int ds_offset = d_o_offset + STAGES * tile_bytes;
  static constexpr int d_q_offset = ds_offset + STAGES * ds_bytes;
  static constexpr int lse_offset = d_q_offset + GROUPS * HALF * 4;
  static constexpr int delta_offset = lse_offset + STAGES * rows_bytes;
  static constexpr int barriers_offset = delta_offset + STAGES * rows_bytes;
  static constexpr int items_offset = barriers_offset + (6 * STAGES + 2 + 2 * GROUPS) * 8;
  static constexpr int listed_offset = items_offset + STAGES * 64; /* see listed_step */
  static constexpr int bytes =
      listed_offset + (LISTED ? LISTED_STEPS * 8 : 0) + 1024; /* 1024: to align the base */
  static_assert(bytes <= 232448, "shared memory of one block");
};

/* A barrier of stage or group i is 8 i bytes further. */
struct backward_barriers {
  uint32_t item_full, item_empty;                /* an item's number, and its keys */
  uint32_t q_full, q_empty, d_o_full, d_o_empty; /* with LSE, with delta */
  uint32_t v_full, v_empty;
  uint32_t d_q_full, d_q_empty; /* one a group */
  __device__ __forceinline__ backward_barriers(uint32_t first) {
    item_full = first, item_empty = item_full + 8 * STAGES;
    q_full = item_empty + 8 * STAGES, q_empty = q_full + 8 * STAGES;
    d_o_full = q_empty + 8 * STAGES, d_o_empty = d_o_full + 8 * STAGES;
    v_full = d_o_empty + 8 * STAGES, v_empty = v_full + 8;
    d_q_full = v_empty + 8, d_q_empty = d_q_full + 8 * GROUPS;
  }
};

/* The stage of a ring's use number i, and the parity of its barriers. */
__device__ __forceinline__ int stage_of(uint32_t i) {
  return i % STAGES;
}
__device__ __forceinline__ uint32_t parity_of(uint32_t i) {
  return i / STAGES % 2;
}

/* One block of keys, in shared memory for all that work on it: registers are short. */
struct backward_work {
  int steps; /* -1: no more blocks */
  int batch, kv_head;
  int first, length;                  /* first: row in the sequence; length: with keys not in use */
  int query_start, key_start;         /* of the sequence, as below */
  int key_length, shift;              /* in use; query i is key i + shift */
  int low, high, full_low, full_high; /* tiles of queries that see it, entirely */
};
static_assert(sizeof(backward_work) <= 64, "size of an item in shared memory");

/* The tiles of queries that see some of a block's keys. */
__device__ __forceinline__ range tiles_seen(const extents &e, const sequence &s, int first) {
  range seen = queries_seen(e, s, first, KEYS, WIDTH);
  if (first >= s.key_length) seen.high = seen.low;
  return seen;
}

/* A warp's walk through the tiles that a block of keys visits with one query head after the other:
 * every lane has a word of each group's bits, so that looking at 32 of them costs as much as one.
 */
struct visit {
  const uint32_t *words; /* of the head's first group */
  int block_words;       /* words of a group of one block */
  int64_t head_words;    /* from a head to the next one */
  int first;             /* the first lane's word */
  uint32_t bits[GROUPS]; /* that are left of the lane's word */
  __device__ __forceinline__ visit(const visits &all, int blocks, int64_t head, int block)
      : block_words(all.tile_words), head_words((int64_t)blocks * GROUPS * all.tile_words) {
    words = all.tiles + head * head_words + (int64_t)block * GROUPS * block_words;
    load(0);
  }
  __device__ __forceinline__ void load(int word) {
    first = word;
    const int own = first + threadIdx.x % 32;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) bits[g] = own < block_words ? words[g * block_words + own] : 0;
  }
  __device__ __forceinline__ uint32_t any() const {
    uint32_t all = 0;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) all |= bits[g];
    return all;
  }
  /* The next tile, times 1 << GROUPS, and a bit for each group that it is listed for; *head goes on
   * where a head has no more. There is one. */
  __device__ __forceinline__ int next(int *head) {
    uint32_t lanes;
    while (!(lanes = __ballot_sync(~0u, any() != 0))) {
      if (first + 32 < block_words) {
        load(first + 32);
      } else {
        words += head_words, ++*head;
        load(0);
      }
    }
    const int lane = __ffs(lanes) - 1, bit = (__ffs(any()) - 1) & 31;
    int tile = ((first + lane) * 32 + bit) << GROUPS;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
      tile |= (bits[g] >> bit & 1) << g;
      if ((int)threadIdx.x % 32 == lane) bits[g] &= ~(1u << bit);
    }
    return __shfl_sync(~0u, tile, lane);
  }
};

/* Key heads a section. Blocks of one head wait for each other's turns: a chain of visits along
 * which tiles ascend and blocks descend, whose length falls with the root of the list's share only,
 * while the work falls with the share itself. So the sparser the list, the more heads at a time; of
 * dense ones what they read would not stay in the L2 cache. */
__device__ __forceinline__ int listed_section(const backward_parameters &p) {
  const float share = (float)*p.listed.count / (float)p.listed.seen;
  const int factor = share > 0.6f ? 1 : share > 0.15f ? 2 : 4;
  return min(p.section * factor, p.e.batch * p.e.kv_heads);
}

/* False: the sequence has no such block. With a list a whole warp calls it. */
template <bool LISTED>
__device__ __forceinline__ bool locate(const backward_parameters &p, int item,
                                       volatile backward_work &w) {
  const int all = p.e.batch * p.e.kv_heads, heads = LISTED ? listed_section(p) : p.section;
  const int section = item / (heads * p.blocks), rest = item % (heads * p.blocks);
  const int pair0 = section * heads, pairs = min(heads, all - pair0);
  const int pair = pair0 + rest % pairs, batch = pair / p.e.kv_heads;
  const int first = (p.blocks - 1 - rest / pairs) * KEYS; /* the last block first: see above */
  const sequence s = sequence_of(p.e, batch);
  const int length = p.e.key_offsets ? p.e.key_offsets[batch + 1] - s.key_start : p.e.key_length;
  if (first >= length) return false;
  const range seen = tiles_seen(p.e, s, first);
  const int sharing = p.e.heads / p.e.kv_heads;
  int steps = sharing * (seen.high - seen.low);
  if (LISTED && steps) {
    steps = 0;
    for (int h = 0; h < sharing; h++) {
      visit v(p.listed, p.blocks, (int64_t)pair * sharing + h, first / KEYS);
      steps += __popc(v.any());
      while (v.first + 32 < v.block_words) v.load(v.first + 32), steps += __popc(v.any());
    }
    steps = __reduce_add_sync(~0u, steps);
  }
  w.steps = steps;
  w.batch = batch, w.kv_head = pair % p.e.kv_heads, w.first = first, w.length = length;
  w.query_start = s.query_start, w.key_start = s.key_start;
  w.key_length = s.key_length, w.shift = s.shift;
  w.low = seen.low, w.high = seen.high;
  w.full_low = seen.full_low, w.full_high = seen.full_high;
  return true;
}

/* The work in a ring's stage. */
template <typename S> __device__ __forceinline__ backward_work *work_at(char *shared, int stage) {
  return (backward_work *)(shared + S::items_offset + stage * 64);
}

/* The last key block that contributes to a tile of queries. Those that do have numbers without a
 * gap: first and last tile (queries_seen) do not fall as the block's number grows. */
__device__ __forceinline__ int last_block(int tile, int key_length, int right, int shift) {
  /* Block j begins at tile (KEYS j - right - shift) / WIDTH, or 0. */
  return min(key_length - 1, (tile + 1) * WIDTH - 1 + right + shift) / KEYS;
}

__device__ __forceinline__ void bulk_load(uint32_t target, const void *source, uint32_t bytes,
                                          uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, "
               "[%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_store(void *target, uint32_t source, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(target),
               "r"(source), "r"(bytes)
               : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
/* Adds float32 elements to those at `target`. */
__device__ __forceinline__ void bulk_add(void *target, uint32_t source, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(target),
      "r"(source), "r"(bytes)
      : "memory");
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
__device__ __forceinline__ int load_acquire(const int *address) {
  int value;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}
__device__ __forceinline__ void store_release(int *address, int value) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(address), "r"(value) : "memory");
}

/* Where there is a list the producer says of each step which tile it is, as visit::next does, and
 * of which query head. The producer is at most STAGES steps ahead of the consumers and these are as
 * far ahead of the writers, who do not wait for the step's barriers but for `round`. */
struct listed_step {
  uint32_t code, head_round; /* 2 head + round: 1, 0, 1, ... each time that the ring is full */
};
__device__ __forceinline__ volatile uint64_t *listed_at(char *ring, uint32_t step) {
  return (volatile uint64_t *)ring + step % LISTED_STEPS;
}
__device__ __forceinline__ uint32_t round_of(uint32_t step) {
  return step / LISTED_STEPS % 2 ^ 1;
}
__device__ __forceinline__ void put_step(char *ring, uint32_t step, uint32_t code, uint32_t head) {
  *listed_at(ring, step) = (uint64_t)(2 * head + round_of(step)) << 32 | code;
}
__device__ __forceinline__ listed_step get_step(char *ring, uint32_t step) {
  uint64_t x;
  do x = *listed_at(ring, step);
  while ((uint32_t)(x >> 32) % 2 != round_of(step));
  return {(uint32_t)x, (uint32_t)(x >> 32)};
}

/* Turns of half tiles where there is a list: 1 + the block whose turn it is, negative where it is
 * the first one; ALL_DONE after the last; 0 if there are none. */
enum { ALL_DONE = 1 << 30 };
__device__ __forceinline__ int turn_after(const uint32_t *blocks, int block) {
  int word = block / 32;
  uint32_t bits = blocks[word] & ((1u << block % 32) - 1);
  while (!bits && word > 0) bits = blocks[--word];
  return bits ? word * 32 + 32 - __clz(bits) : ALL_DONE;
}

/* Draws items and loads what they need: one thread; with a list its warp, of which it is the
 * leader.
 */
template <typename S>
__device__ void backward_produce(const backward_parameters &p, char *shared, uint32_t base) {
  const backward_barriers barriers(base + S::barriers_offset);
  const bool leader = !S::LISTED || threadIdx.x == 0;
  uint32_t count = 0, step = 0; /* items, steps */
  for (;;) {
    const int at = stage_of(count);
    barrier_wait(barriers.item_empty + 8 * at, parity_of(count) ^ 1);
    int item = 0;
    if (leader) item = atomicAdd(p.counter, 1);
    if (S::LISTED) item = __shfl_sync(~0u, item, 0);
    volatile backward_work &w = *work_at<S>(shared, at);
    if (item >= p.items)
      w.steps = -1;
    else if (!locate<S::LISTED>(p, item, w))
      continue;
    if (S::LISTED) __syncwarp();
    if (w.steps <= 0) {
      if (leader) barrier_arrive(barriers.item_full + 8 * at);
      if (w.steps < 0) break;
    }
    const int batch = p.e.query_offsets ? 0 : w.batch;
    auto load_keys = [&](const CUtensorMap *map, uint32_t target, uint32_t full) {
      if (!leader) return;
      barrier_expect(full, S::keys_bytes);
#pragma unroll
      for (int g = 0; g < GROUPS; g++)
        tile_load<S::DIM>(target + g * S::group_bytes, map, full, GROUP_ROWS, GROUP_ROWS, w.kv_head,
                          w.key_start + w.first + g * GROUP_ROWS, batch);
    };
    if (w.steps)
      load_keys(&p.k, base + S::k_offset + at * S::keys_bytes, barriers.item_full + 8 * at);
    int n = w.low, head = w.kv_head * (p.e.heads / p.e.kv_heads);
    auto go_through = [&](auto next) {
#pragma unroll 1
      for (int i = 0; i < w.steps; i++, step++) {
        const int stage = stage_of(step);
        const uint32_t empty = parity_of(step) ^ 1;
        next();
        auto load_tile = [&](const CUtensorMap *map, int offset, const float *rows, int rows_offset,
                             uint32_t full) {
          if (!leader) return;
          barrier_expect(full, S::tile_bytes + S::rows_bytes);
          tile_load<S::DIM>(base + offset + stage * S::tile_bytes, map, full, WIDTH, WIDTH, head,
                            w.query_start + n * WIDTH, batch);
          const int64_t row = (int64_t)(w.batch * p.e.heads + head) * p.padded + n * WIDTH;
          bulk_load(base + rows_offset + stage * S::rows_bytes, rows + row, S::rows_bytes, full);
        };
        barrier_wait(barriers.q_empty + 8 * stage, empty);
        load_tile(&p.q, S::q_offset, p.lse, S::lse_offset, barriers.q_full + 8 * stage);
        if (i == 0) {
          barrier_wait(barriers.v_empty, (count & 1) ^ 1);
          load_keys(&p.v, base + S::v_offset, barriers.v_full);
        }
        barrier_wait(barriers.d_o_empty + 8 * stage, empty);
        load_tile(&p.d_o, S::d_o_offset, p.delta, S::delta_offset, barriers.d_o_full + 8 * stage);
        if (!S::LISTED && ++n == w.high) n = w.low, head++;
      }
    };
    if constexpr (S::LISTED) {
      if (w.steps) {
        visit listed(p.listed, p.blocks, (int64_t)w.batch * p.e.heads + head, w.first / KEYS);
        go_through([&] {
          const int code = listed.next(&head);
          n = code >> GROUPS;
          if (leader) put_step(shared + S::listed_offset, step, code, head);
        });
      }
    } else {
      go_through([] {});
    }
    if (w.steps == 0) {
      barrier_wait(barriers.v_empty, (count & 1) ^ 1);
      if (leader) barrier_arrive(barriers.v_full);
    }
    if (S::LISTED) __syncwarp(); /* all have read the item */
    count++;
  }
}

/* Adds the group's halves of dQ to their sums, in order: one thread a group. */
template <typename S>
__device__ void backward_write(const backward_parameters &p, char *shared, uint32_t base,
                               int group) {
  const backward_barriers barriers(base + S::barriers_offset);
  const uint32_t source = base + S::d_q_offset + group * S::HALF * 4;
  const uint32_t full = barriers.d_q_full + 8 * group, empty = barriers.d_q_empty + 8 * group;
  uint32_t step = 0;
  for (uint32_t count = 0;; count++) {
    const int at = stage_of(count);
    barrier_wait(barriers.item_full + 8 * at, parity_of(count));
    const volatile backward_work &w = *work_at<S>(shared, at);
    const int steps = w.steps, block = w.first / KEYS, low = w.low, high = w.high;
    const int key_length = w.key_length, shift = w.shift;
    int head = w.kv_head * (p.e.heads / p.e.kv_heads);
    const int head0 = w.batch * p.e.heads;
    barrier_arrive(barriers.item_empty + 8 * at);
    if (steps < 0) break;
    int n = low;
    for (int i = 0; i < steps; i++, step++) {
      if (S::LISTED) {
        const listed_step x = get_step(shared + S::listed_offset, step);
        n = x.code >> GROUPS, head = x.head_round / 2;
      }
      const int64_t tile = (int64_t)(head0 + head) * (p.padded / WIDTH) + n;
      const int64_t half = tile * GROUPS + group;
      bool store; /* the first contribution */
      int next;   /* the turn after this one */
      if (S::LISTED) {
        next = turn_after(p.listed.blocks + tile * p.listed.block_words, block);
        int turn;
        while (turn = load_acquire(p.turns + half), abs(turn) != block + 1) {
        }
        store = turn < 0;
      } else {
        const int before = last_block(n, key_length, p.e.right, shift) - block;
        while (load_acquire(p.turns + half) != before) {
        }
        store = before == 0, next = before + 1;
      }
      /* What others have added comes before what the bulk copy adds, and what the group has stored
       * before what it reads: a fence here, where both have been seen, orders them all. */
      asm volatile("fence.proxy.async.global;" ::: "memory");
      barrier_wait(full, step & 1);
      proxy_fence();
      if (store)
        bulk_store(p.d_q + half * S::HALF, source, S::HALF * 4);
      else
        bulk_add(p.d_q + half * S::HALF, source, S::HALF * 4);
      tensor_store_read();
      barrier_arrive(empty);
      tensor_store_wait();
      store_release(p.turns + half, next);
      if (!S::LISTED && ++n == high) n = low, head++;
    }
  }
}

/* The descriptor of what lies some bytes further: cheaper than a new one. */
__device__ __forceinline__ uint64_t further(uint64_t descriptor, int bytes) {
  return descriptor + (bytes >> 4);
}

/* d [64, WIDTH] = x [64, DIM] y [WIDTH, DIM]^T, both in shared memory. */
template <typename T, typename S>
__device__ __forceinline__ void scores_issue(float (&d)[WIDTH / 2], uint32_t x, uint32_t y) {
  const uint64_t x_tile = descriptor(x), y_tile = descriptor(y);
#pragma unroll
  for (int k = 0; k < S::DIM / 16; k++)
    wgmma<T, 0, 0>(d, further(x_tile, k / 4 * TILE_BYTES + k % 4 * 32),
                   further(y_tile, k / 4 * WIDTH * 128 + k % 4 * 32), k > 0);
  wgmma_commit();
}

/* d [64, DIM] += a [64, WIDTH] y [WIDTH, DIM], a in registers. */
template <typename T, typename S>
__device__ __forceinline__ void gradient_issue(float (&d)[S::DIM / 2],
                                               const uint32_t (&a)[WIDTH / 16][4], uint32_t y) {
  const uint64_t tile = descriptor(y, WIDTH * 128);
#pragma unroll
  for (int k = 0; k < WIDTH / 16; k++) wgmma<T, 1>(d, a[k], further(tile, k * 2048), 1);
  wgmma_commit();
}

/* d [WIDTH, DIM / 2] = dS k for the group's half of the columns. */
template <typename T, typename S>
__device__ __forceinline__ void query_gradient_issue(float (&d)[S::DIM / 4], uint32_t ds,
                                                     uint32_t k, int group) {
  const uint64_t ds_tile = descriptor(ds);
  const uint64_t k_tile = descriptor(k + group * (S::DIM == 128 ? TILE_BYTES : 64));
#pragma unroll
  for (int i = 0; i < KEYS / 16; i++)
    wgmma<T, 1, 1>(d, further(ds_tile, i * 2048),
                   further(k_tile, i / 4 * S::group_bytes + i % 4 * 2048), i > 0);
  wgmma_commit();
}

/* Stores rows r and r + 8 of an accumulator [64, DIM] at `to`: the four lanes of a row exchange
 * words, so that each has 16 bytes in one piece. */
template <typename T, int DIM>
__device__ __forceinline__ void gradient_store(T *to, int64_t token, int valid,
                                               const float (&values)[DIM / 2], float scale) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int row = 0; row < 2; row++)
#pragma unroll
    for (int j = 0; j < DIM / 8; j += 4) {
      uint32_t word[4]; /* of columns 8 (j + i) + 2 lane; afterwards 8 (j + lane) + 2 i */
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int at = 4 * (j + i) + 2 * row;
        word[i] = element<T>::pack(values[at] * scale, values[at + 1] * scale);
      }
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (i & bit) continue;
          const bool upper = lane & bit;
          const uint32_t got = __shfl_xor_sync(~0u, upper ? word[i] : word[i + bit], bit);
          if (upper)
            word[i] = got;
          else
            word[i + bit] = got;
        }
      if (8 * row < valid)
        *(uint4 *)(to + 8 * row * token + 8 * (j + lane)) =
            make_uint4(word[0], word[1], word[2], word[3]);
    }
}

enum { STEP_BARRIER = 1, GROUP_BARRIER = 2 }; /* of both groups; of one: one a group */

/* Zeroes the group's keys and values from `valid` on: they follow the sequence's last key and may
 * be anything, NaN too, which factors of 0 would not remove. */
template <typename S>
__device__ __forceinline__ void keys_clear(char *keys, char *values, int group, int valid) {
  valid = max(valid, 0);
  const int pieces = (GROUP_ROWS - valid) * 8;
  for (int i = threadIdx.x % 128; i < pieces * (2 * S::DIM / 64); i += 128) {
    const int tile = i / pieces, c = tile % (S::DIM / 64);
    *(uint4 *)((tile < S::DIM / 64 ? keys : values) + group * S::group_bytes + c * TILE_BYTES +
               valid * 128 + i % pieces * 16) = make_uint4(0, 0, 0, 0);
  }
  proxy_fence();
  named_sync(GROUP_BARRIER + group, 128);
}

/* Scores of pairs that do not see each other: -inf. `row`: the thread's first key in the block,
 * `start`: its first query. listed: false where the list keeps all of them from each other. */
__device__ __forceinline__ void mask(float (&scores)[WIDTH / 2], const backward_parameters &p,
                                     const volatile backward_work &w, int row, int start,
                                     bool listed) {
  const int shift = w.shift;
  int low[2], high[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int key = w.first + row + 8 * i;
    low[i] = key - p.e.right - shift - start;
    high[i] = listed && key < w.key_length ? key + p.e.left - shift + 1 - start : low[i];
  }
  hide(scores, low, high);
}

/* The group's half of dQ to shared memory, in the order of its accumulators. */
template <int count>
__device__ __forceinline__ void half_store(char *target, const float (&d_q)[count]) {
  float4 *out = (float4 *)target + threadIdx.x % 128;
#pragma unroll
  for (int i = 0; i < count / 4; i++)
    out[i * 128] = make_float4(d_q[4 * i], d_q[4 * i + 1], d_q[4 * i + 2], d_q[4 * i + 3]);
}

template <typename T, typename S>
__device__ void backward_consume(const backward_parameters &p, char *shared, uint32_t base) {
  constexpr int DIM = S::DIM;
  const backward_barriers barriers(base + S::barriers_offset);
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0) - 1, lane = threadIdx.x % 32;
  const int warp_row = group * GROUP_ROWS + threadIdx.x % 128 / 32 * 16;
  const int row0 = warp_row + lane / 4, column0 = lane % 4 * 2;
  uint32_t count = 0, step = 0;               /* items, steps */
  int left;                                   /* steps of item number `count` */
  float scores[WIDTH / 2], slopes[WIDTH / 2]; /* S then P; dP then dS */

  auto work = [&]() -> const volatile backward_work & {
    return *work_at<S>(shared, stage_of(count));
  };
  auto k_tile = [&] { return base + S::k_offset + stage_of(count) * S::keys_bytes; };
  auto q_tile = [&] { return base + S::q_offset + stage_of(step) * S::tile_bytes; };
  /* Waits for item number `count` and, if it has steps, what its first scores need. */
  auto open = [&] {
    barrier_wait(barriers.item_full + 8 * stage_of(count), parity_of(count));
    left = __shfl_sync(~0u, work().steps, 0); /* uniform, as the compiler can see */
    if (left > 0) barrier_wait(barriers.q_full + 8 * stage_of(step), parity_of(step));
  };
  auto scores_start = [&] {
    pin(scores);
    wgmma_fence();
    scores_issue<T, S>(scores, k_tile() + group * S::group_bytes, q_tile());
  };

  open();
  scores_start();
  while (left >= 0) {
    const bool any = left > 0;
    float d_k[DIM / 2], d_v[DIM / 2];
#pragma unroll
    for (int i = 0; i < DIM / 2; i++) d_k[i] = d_v[i] = 0;
    barrier_wait(barriers.v_full, count & 1);
    if (p.e.key_offsets || p.e.key_lengths)
      keys_clear<S>(shared + (k_tile() - base), shared + S::v_offset, group,
                    work().key_length - work().first - group * GROUP_ROWS);
    int n = work().low;
    bool last = !any;
#pragma unroll 1
    while (!last) {
      const int at = stage_of(step);
      const uint32_t d_o = base + S::d_o_offset + at * S::tile_bytes;
      const uint32_t ds = base + S::ds_offset + at * S::ds_bytes;
      const float *lse = (const float *)(shared + S::lse_offset) + at * WIDTH + column0;
      const float *delta = (const float *)(shared + S::delta_offset) + at * WIDTH + column0;
      uint32_t p_operands[WIDTH / 16][4], ds_operands[WIDTH / 16][4];

      barrier_wait(barriers.d_o_full + 8 * at, parity_of(step));
      wgmma_wait<0>();
      pin(scores);
      pin(slopes);
      wgmma_fence();
      scores_issue<T, S>(slopes, base + S::v_offset + group * S::group_bytes, d_o);
      bool listed = true;
      if (S::LISTED) {
        const int code = __shfl_sync(~0u, (int)*listed_at(shared + S::listed_offset, step), 0);
        n = code >> GROUPS, listed = code >> group & 1;
      }
      if (n < work().full_low || n >= work().full_high || !listed)
        mask(scores, p, work(), row0, n * WIDTH + column0, listed);
#pragma unroll
      for (int i = 0; i < WIDTH / 2; i += 2) {
        const float2 row_lse = *(const float2 *)&lse[i / 4 * 8];
        scores[i] = exp2_approximate(fmaf(scores[i], p.scale_log2, -row_lse.x));
        scores[i + 1] = exp2_approximate(fmaf(scores[i + 1], p.scale_log2, -row_lse.y));
      }
      operands<T>(p_operands, scores);
      pin(d_v);
      wgmma_fence();
      gradient_issue<T, S>(d_v, p_operands, d_o);
      wgmma_wait<1>();
      pin(slopes);
      last = left == 1;
      if (last && lane == 0) barrier_arrive(barriers.v_empty);
#pragma unroll
      for (int i = 0; i < WIDTH / 2; i += 2) {
        const float2 row_delta = *(const float2 *)&delta[i / 4 * 8];
        slopes[i] = scores[i] * (slopes[i] - row_delta.x);
        slopes[i + 1] = scores[i + 1] * (slopes[i + 1] - row_delta.y);
      }
      operands<T>(ds_operands, slopes);
#pragma unroll
      for (int i = 0; i < WIDTH / 16; i++)
        matrix_store(ds + swizzled(warp_row + lane % 16, i * 2 + lane / 16), ds_operands[i][0],
                     ds_operands[i][1], ds_operands[i][2], ds_operands[i][3]);
      proxy_fence();
      named_sync(STEP_BARRIER, GROUPS * 128);
      float d_q[DIM / 4];
      pin(d_q);
      pin(d_k);
      wgmma_fence();
      query_gradient_issue<T, S>(d_q, ds, k_tile(), group);
      wgmma_wait<1>();
      pin(d_v);
      gradient_issue<T, S>(d_k, ds_operands, q_tile());
      if (lane == 0) barrier_arrive(barriers.d_o_empty + 8 * at);
      barrier_wait(barriers.d_q_empty + 8 * group, step & 1 ^ 1);
      /* What the next step's scores need: asked before the stores below, behind which the answer
       * would queue. */
      step++, n++;
      if (last) {
        count++;
        open();
      } else {
        left--;
        if (!S::LISTED && n == work().high) n = work().low; /* the next query head */
        barrier_wait(barriers.q_full + 8 * stage_of(step), parity_of(step));
      }
      wgmma_wait<1>();
      pin(d_q);
      /* Beside dK's product, which reads shared memory least. */
      half_store(shared + S::d_q_offset + group * S::HALF * 4, d_q);
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.d_q_full + 8 * group);
      /* Registers do not suffice for the operands of dK beside S. */
      wgmma_wait<0>();
      pin(d_k);
      if (lane == 0) barrier_arrive(barriers.q_empty + 8 * at);
      scores_start(); /* of nothing in particular, and not looked at, when there is no next step */
    }

    const int at = stage_of(count - any);
    const volatile backward_work &w = *work_at<S>(shared, at);
    const int batch = p.e.query_offsets ? 0 : w.batch, head = w.kv_head, from = w.first + row0;
    const int valid = w.length - from;
    const int64_t row = w.key_start + from;
    __syncwarp();
    if (lane == 0) {
      barrier_arrive(barriers.item_empty + 8 * at);
      if (!any) barrier_arrive(barriers.v_empty);
    }
    gradient_store<T, DIM>((T *)p.d_k + batch * p.d_k_batch + row * p.d_k_token + head * p.d_k_head,
                           p.d_k_token, valid, d_k, p.scale);
    gradient_store<T, DIM>((T *)p.d_v + batch * p.d_v_batch + row * p.d_v_token + head * p.d_v_head,
                           p.d_v_token, valid, d_v, 1);
    if (!any) {
      wgmma_wait<0>();
      count++;
      open();
      scores_start();
    }
  }
  wgmma_wait<0>();
}

template <typename T, typename S>
__global__
__launch_bounds__(THREADS, 1) void backward_kernel(const __grid_constant__ backward_parameters p) {
  extern __shared__ char memory[];
  const uint32_t start = shared_address(memory), base = (start + 1023) / 1024 * 1024;
  char *shared = memory + (base - start);
  if (threadIdx.x == 0) {
    const backward_barriers barriers(base + S::barriers_offset);
    for (int i = 0; S::LISTED && i < LISTED_STEPS; i++)
      *listed_at(shared + S::listed_offset, i) = 0;
    for (int i = 0; i < STAGES; i++) {
      barrier_init(barriers.item_full + 8 * i, 1);
      barrier_init(barriers.item_empty + 8 * i, 4 * GROUPS + GROUPS);
      barrier_init(barriers.q_full + 8 * i, 1);
      barrier_init(barriers.q_empty + 8 * i, 4 * GROUPS);
      barrier_init(barriers.d_o_full + 8 * i, 1);
      barrier_init(barriers.d_o_empty + 8 * i, 4 * GROUPS);
    }
    barrier_init(barriers.v_full, 1);
    barrier_init(barriers.v_empty, 4 * GROUPS);
    for (int g = 0; g < GROUPS; g++) {
      barrier_init(barriers.d_q_full + 8 * g, 4);
      barrier_init(barriers.d_q_empty + 8 * g, 1);
    }
    barrier_init_fence();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    registers_fewer<24>();
    if (threadIdx.x == 0 || (S::LISTED && threadIdx.x < 32))
      backward_produce<S>(p, shared, base);
    else if (threadIdx.x % 32 == 0 && threadIdx.x / 32 <= GROUPS)
      backward_write<S>(p, shared, base, threadIdx.x / 32 - 1);
  } else {
    registers_more<240>();
    backward_consume<T, S>(p, shared, base);
  }
}

/* dQ = scale times its sum, rounded; 0 where no key block contributed. A block does one half of a
 * tile, which has the order of a group's accumulators: [columns / 8][128 threads][4]. */
struct query_parameters {
  extents e;
  const float *sums;
  const int *turns;
  void *d_q;
  int64_t batch, token, head;
  int tiles; /* a sequence and head */
  float scale;
};

template <typename T, typename S>
__global__ __launch_bounds__(2 * S::DIM) void query_kernel(const query_parameters p) {
  const int64_t half = blockIdx.x;
  const int group = half % GROUPS, tile = half / GROUPS % p.tiles;
  const int pair = half / GROUPS / p.tiles, batch = pair / p.e.heads, head = pair % p.e.heads;
  constexpr int PIECES = S::DIM / 16;
  const int piece = threadIdx.x % PIECES, quad = threadIdx.x / PIECES;
  const int row = tile * WIDTH + quad / 8 * 16 + quad % 8;
  const int column = group * (S::DIM / 2) + piece * 8;
  const sequence s = sequence_of(p.e, batch);
  if (row >= s.query_length) return;
  float4 words[4] = {};
  if (p.turns[half]) {
    const float4 *from = (const float4 *)(p.sums + half * S::HALF) + piece * 128 + quad * 4;
#pragma unroll
    for (int i = 0; i < 4; i++) words[i] = from[i];
  }
  const float x = p.scale;
  T *to = (T *)p.d_q + (p.e.query_offsets ? 0 : batch) * p.batch + (s.query_start + row) * p.token +
          head * p.head + column;
  auto pack = [&](float a, float b) { return element<T>::pack(a * x, b * x); };
  *(uint4 *)to = make_uint4(pack(words[0].x, words[0].y), pack(words[1].x, words[1].y),
                            pack(words[2].x, words[2].y), pack(words[3].x, words[3].y));
  if (row + 8 < s.query_length)
    *(uint4 *)(to + 8 * p.token) =
        make_uint4(pack(words[0].z, words[0].w), pack(words[1].z, words[1].w),
                   pack(words[2].z, words[2].w), pack(words[3].z, words[3].w));
}

/* LSE log2 e and delta of every query, padded to `padded` rows a sequence and head: +inf, which
 * makes weights 0, and 0 where there is no query or it sees no key. DIM / 8 lanes a row, 64 rows of
 * one head a block. */
struct rows_parameters {
  extents e;
  const void *o, *d_o;
  int64_t o_batch, o_token, o_head, d_o_batch, d_o_token, d_o_head;
  const float *lse, *d_lse; /* d_lse may be NULL */
  int64_t lse_batch, lse_head, lse_row, d_lse_batch, d_lse_head, d_lse_row;
  float *lse_out, *delta_out; /* [batch, heads, padded] */
  int padded;
};

template <typename T, int DIM>
__global__ __launch_bounds__(256) void rows_kernel(const rows_parameters p) {
  constexpr int LANES = DIM / 8, ROWS = 256 / LANES, REPEATS = 64 / ROWS;
  const int pair = blockIdx.x % (p.e.batch * p.e.heads),
            block = blockIdx.x / (p.e.batch * p.e.heads);
  const int batch = pair / p.e.heads, head = pair % p.e.heads;
  const int lane = threadIdx.x % LANES;
  const sequence s = sequence_of(p.e, batch);
  const int64_t outer = p.e.query_offsets ? 0 : batch;
  const T *o = (const T *)p.o + outer * p.o_batch + head * p.o_head + lane * 8;
  const T *d_o = (const T *)p.d_o + outer * p.d_o_batch + head * p.d_o_head + lane * 8;
  uint4 a[REPEATS] = {}, b[REPEATS] = {};
  float natural[REPEATS], d_lse[REPEATS];
#pragma unroll
  for (int i = 0; i < REPEATS; i++) {
    const int row = block * 64 + i * ROWS + threadIdx.x / LANES;
    natural[i] = -INFINITY, d_lse[i] = 0;
    if (row >= s.query_length) continue;
    const int64_t at = s.query_start + row;
    a[i] = *(const uint4 *)(o + at * p.o_token);
    b[i] = *(const uint4 *)(d_o + at * p.d_o_token);
    natural[i] = p.lse[outer * p.lse_batch + head * p.lse_head + at * p.lse_row];
    if (p.d_lse) d_lse[i] = p.d_lse[outer * p.d_lse_batch + head * p.d_lse_head + at * p.d_lse_row];
  }
#pragma unroll
  for (int i = 0; i < REPEATS; i++) {
    const int row = block * 64 + i * ROWS + threadIdx.x / LANES;
    float lse = INFINITY, delta = 0;
    const uint32_t x[4] = {a[i].x, a[i].y, a[i].z, a[i].w}, y[4] = {b[i].x, b[i].y, b[i].z, b[i].w};
#pragma unroll
    for (int j = 0; j < 4; j++) {
      const float2 u = element<T>::unpack(x[j]), v = element<T>::unpack(y[j]);
      delta = fmaf(u.x, v.x, fmaf(u.y, v.y, delta));
    }
#pragma unroll
    for (int j = LANES / 2; j; j /= 2) delta += __shfl_xor_sync(~0u, delta, j);
    if (lane) continue;
    if (natural[i] != -INFINITY) lse = natural[i] * LOG2_E, delta -= d_lse[i];
    const int64_t out = (int64_t)pair * p.padded + row;
    p.lse_out[out] = lse;
    p.delta_out[out] = delta;
  }
}

/* The list turned round; a warp has one block of queries of a head. All bits are 0 beforehand. */
__global__ void visits_kernel(extents e, block_list list, visits out, int blocks, int tiles) {
  const int64_t warp = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
  const int lists = (e.query_length + list.queries - 1) / list.queries;
  const int64_t pair = warp / lists;
  const int query_block = warp % lists, batch = pair / e.heads, head = pair % e.heads;
  if (batch >= e.batch) return;
  const sequence s = sequence_of(e, batch);
  const int first_tile = query_block * (list.queries / WIDTH);
  if (first_tile * WIDTH >= s.query_length) return;
  const listed_blocks listed = find_listed(list, batch, head, query_block);
  const int parts = list.keys / GROUP_ROWS;
  for (int i = threadIdx.x % 32; i < listed.count * parts; i += 32) {
    const int group = listed.first[i / parts] * parts + i % parts, block = group / GROUPS;
    if (block >= blocks) continue;
    const range seen = tiles_seen(e, s, block * KEYS);
    for (int n = 0; n < list.queries / WIDTH; n++) {
      const int tile = first_tile + n;
      if (tile < seen.low || tile >= seen.high) continue;
      atomicOr(out.tiles + (pair * blocks * GROUPS + group) * out.tile_words + tile / 32,
               1u << tile % 32);
      atomicOr(out.blocks + (pair * tiles + tile) * out.block_words + block / 32, 1u << block % 32);
    }
  }
}

/* The first turn of every half tile, in the order of `turns`; adds up the visits. */
__global__ void first_turns_kernel(visits of, int *turns, int64_t tiles) {
  const int64_t tile = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  unsigned count = 0;
  if (tile < tiles) {
    const uint32_t *blocks = of.blocks + tile * of.block_words;
    int first = 0;
    for (int word = 0; word < of.block_words; word++) {
      const uint32_t bits = blocks[word];
      if (bits) first = word * 32 + 32 - __clz(bits);
      count += __popc(bits);
    }
    for (int g = 0; g < GROUPS; g++) turns[tile * GROUPS + g] = -first;
  }
  count = __reduce_add_sync(~0u, count);
  if (threadIdx.x % 32 == 0) atomicAdd(of.count, count);
}

int padded_rows(const attn_softmax_problem *problem) {
  return (int)((problem->query_length + 127) / 128 * 128);
}

struct backward_memory {
  int *counters; /* of items, then the turns of dQ's half tiles, then a list's visits */
  visits listed;
  float *lse, *delta, *d_q;
  size_t counters_bytes, bytes; /* counters_bytes: with visits */
};

backward_memory memory_of(const attn_softmax_problem *problem, void *workspace) {
  const size_t rows = (size_t)(problem->batch * problem->heads) * padded_rows(problem);
  workspace_cutter cutter = {(char *)workspace, 0};
  backward_memory m;
  m.counters = (int *)cutter.take(256 + rows / WIDTH * GROUPS * sizeof(int));
  m.listed = {};
  if (problem->list_keys) {
    const size_t pairs = (size_t)(problem->batch * problem->heads);
    const size_t blocks = (size_t)((problem->key_length + KEYS - 1) / KEYS);
    const size_t tiles = (size_t)(padded_rows(problem) / WIDTH);
    m.listed.tile_words = (int)((tiles + 31) / 32),
    m.listed.block_words = (int)((blocks + 31) / 32);
    m.listed.tiles = (uint32_t *)cutter.take(pairs * blocks * GROUPS * m.listed.tile_words * 4);
    m.listed.blocks = (uint32_t *)cutter.take(pairs * tiles * m.listed.block_words * 4);
  }
  m.counters_bytes = cutter.used;
  m.lse = (float *)cutter.take(rows * sizeof(float));
  m.delta = (float *)cutter.take(rows * sizeof(float));
  m.d_q = (float *)cutter.take(rows * problem->dim * sizeof(float));
  m.bytes = cutter.used;
  return m;
}

bool backward_plan(const attn_cuda_device *device, const attn_softmax_problem *problem,
                   attn_cuda_choice *choice) {
  if (!offered(device, problem)) return false;
  if (problem->list_queries % WIDTH || problem->list_keys % GROUP_ROWS) return false;
  choice->workspace_bytes = memory_of(problem, NULL).bytes;
  snprintf(choice->description, sizeof choice->description,
           "wgmma, warp-specialised, blocks of %d keys, dQ in order in float32", KEYS);
  return true;
}

bool backward_suits(const attn_softmax_problem *problem, const attn_softmax_args *args) {
  const attn_tensor *tensors[] = {&args->q,   &args->k,   &args->v,   &args->o,
                                  &args->d_o, &args->d_q, &args->d_k, &args->d_v};
  for (const attn_tensor *tensor : tensors)
    if (!map_suits(*tensor, problem->ragged)) return false;
  return true;
}

template <typename T, int DIM, bool LISTED>
attn_status backward_all(const attn_cuda_device *device, const attn_softmax_problem *problem,
                         const attn_softmax_args *args, void *workspace, cudaStream_t stream) {
  typedef backward_shape<DIM, LISTED> S;
  const bool ragged = problem->ragged;
  auto strides = [&](const attn_tensor &t, int64_t *batch, int64_t *second, int64_t *third) {
    *batch = ragged ? 0 : t.stride[0];
    *second = t.stride[!ragged], *third = t.stride[1 + !ragged];
  };
  const int64_t pairs = problem->batch * problem->heads;
  const int64_t kv_pairs = problem->batch * problem->kv_heads;
  if (pairs == 0) return ATTN_OK;
  const backward_memory m = memory_of(problem, workspace);
  rows_parameters r = {};
  r.e = extents_of(problem, args);
  r.o = args->o.data, r.d_o = args->d_o.data;
  r.lse = (const float *)args->lse.data, r.d_lse = (const float *)args->d_lse.data;
  strides(args->o, &r.o_batch, &r.o_token, &r.o_head);
  strides(args->d_o, &r.d_o_batch, &r.d_o_token, &r.d_o_head);
  strides(args->lse, &r.lse_batch, &r.lse_head, &r.lse_row);
  if (r.d_lse) strides(args->d_lse, &r.d_lse_batch, &r.d_lse_head, &r.d_lse_row);
  r.padded = padded_rows(problem);
  r.lse_out = m.lse, r.delta_out = m.delta;
  ATTN_CUDA_TRY(cudaMemsetAsync(m.counters, 0, m.counters_bytes, stream));
  rows_kernel<T, DIM><<<(unsigned)(pairs * (r.padded / 64)), 256, 0, stream>>>(r);
  ATTN_CUDA_TRY_LAUNCH("softmax backward, rows");

  backward_parameters p = {};
  if (!map_make(&p.q, args->q, ragged, WIDTH) || !map_make(&p.k, args->k, ragged, GROUP_ROWS) ||
      !map_make(&p.v, args->v, ragged, GROUP_ROWS) || !map_make(&p.d_o, args->d_o, ragged, WIDTH))
    return attn_cuda_fail(ATTN_INTERNAL, "softmax: the driver refuses a tensor map");
  p.e = r.e;
  p.d_k = args->d_k.data, p.d_v = args->d_v.data;
  strides(args->d_k, &p.d_k_batch, &p.d_k_token, &p.d_k_head);
  strides(args->d_v, &p.d_v_batch, &p.d_v_token, &p.d_v_head);
  p.lse = m.lse, p.delta = m.delta, p.padded = r.padded;
  p.d_q = m.d_q, p.counter = m.counters, p.turns = m.counters + 64;
  p.scale = (float)problem->scale;
  p.scale_log2 = (float)(problem->scale * LOG2_E);
  p.blocks = (int)((problem->key_length + KEYS - 1) / KEYS);
  /* What a section's heads stream, Q, dO and the sums of dQ, takes half of the L2 cache at most. */
  const int64_t sharing = problem->heads / problem->kv_heads;
  const int64_t section =
      (int64_t)(device->l2_bytes / 2) / (problem->query_length * sharing * DIM * (2 + 2 + 4));
  p.section = (int)(section < 1 ? 1 : section < kv_pairs ? section : kv_pairs);
  p.items = (int)(kv_pairs * p.blocks);
  if (LISTED && problem->key_length) {
    const block_list list = block_list_of(problem, args);
    const int64_t warps = pairs * ((problem->query_length + list.queries - 1) / list.queries);
    const int64_t tiles = r.padded / WIDTH;
    p.listed = m.listed;
    p.listed.count = (unsigned long long *)(m.counters + 2);
    p.listed.seen = (unsigned long long)(pairs * tiles * p.blocks) / (problem->causal ? 2 : 1) + 1;
    visits_kernel<<<(unsigned)((warps + 3) / 4), 128, 0, stream>>>(p.e, list, p.listed, p.blocks,
                                                                   (int)tiles);
    ATTN_CUDA_TRY_LAUNCH("softmax backward, block list");
    first_turns_kernel<<<(unsigned)((pairs * tiles + 127) / 128), 128, 0, stream>>>(
        p.listed, p.turns, pairs * tiles);
    ATTN_CUDA_TRY_LAUNCH("softmax backward, turns");
  }
  const int grid = p.items < device->multiprocessors ? p.items : device->multiprocessors;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(backward_kernel<T, S>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes));
  backward_kernel<T, S><<<grid, THREADS, S::bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("softmax backward");

  query_parameters q = {};
  q.e = r.e;
  q.sums = p.d_q, q.turns = p.turns, q.d_q = args->d_q.data;
  strides(args->d_q, &q.batch, &q.token, &q.head);
  q.tiles = r.padded / WIDTH, q.scale = p.scale;
  query_kernel<T, S><<<(unsigned)(pairs * q.tiles * GROUPS), 2 * DIM, 0, stream>>>(q);
  ATTN_CUDA_TRY_LAUNCH("softmax backward, dQ");
  return ATTN_OK;
}

template <typename T>
attn_status backward_choose(const attn_cuda_device *device, const attn_softmax_problem *problem,
                            const attn_softmax_args *args, void *workspace, cudaStream_t stream) {
  auto all = problem->dim == 64 ? backward_all<T, 64, false> : backward_all<T, 128, false>;
  if (problem->list_keys)
    all = problem->dim == 64 ? backward_all<T, 64, true> : backward_all<T, 128, true>;
  return all(device, problem, args, workspace, stream);
}

attn_status backward_run(const attn_cuda_device *device, const attn_cuda_choice *,
                         const attn_softmax_problem *problem, const attn_softmax_args *args,
                         void *workspace, cudaStream_t stream) {
  return problem->dtype == ATTN_BF16
             ? backward_choose<__nv_bfloat16>(device, problem, args, workspace, stream)
             : backward_choose<__half>(device, problem, args, workspace, stream);
}

} // namespace

extern const softmax_algorithm softmax_sm90_backward;
const softmax_algorithm softmax_sm90_backward = {
    "sm90 backward", ATTN_PASS_BACKWARD, backward_plan, backward_suits, backward_run,
};
