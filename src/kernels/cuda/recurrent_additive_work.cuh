/* What the blocks of the additive scan (recurrent_additive_scan.cuh) work on.
 *
 * Where there are fewer sequences and heads than multiprocessors, sequences are cut into segments:
 * a first launch finds what each segment adds to the state, a second one the state before each
 * segment. With a constant decay the first reads no more tokens of a segment than still weigh. */
#ifndef ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_WORK_CUH
#define ATTN_KERNELS_CUDA_RECURRENT_ADDITIVE_WORK_CUH

#include "kernels/cuda/hopper.cuh"

namespace additive {

using namespace hopper;

constexpr int CHUNK = 64;
constexpr int TILE_BYTES = CHUNK * 128; /* 64 tokens by 64 columns */
constexpr float LOG2_E = 1.4426950408889634f;
/* 2^-256 is zero in float32; sums of 64 such exponents keep an error below 1e-3. */
constexpr float LEAST_LOG2 = -256.f;
/* Tokens that weigh less than 2^-32 beside the newest do not reach the state's 24 bits. */
constexpr float NEGLIGIBLE_LOG2 = -32.f;

/* A float32 state [rows, columns] for each sequence and head. */
struct state_view {
  float *data;
  int64_t batch, head, row, column; /* strides */
  float scale;                      /* multiplies what is read or written */
};

/* Strides in elements. */
struct scan_output {
  void *data;
  int64_t batch, token, head;
};

/* Strides in elements of a tensor [batch, length, heads, ...]; ragged: batch 0. */
struct strides {
  int64_t batch, token, head;
};

struct scan_parameters {
  CUtensorMap q, k, v, o;
  CUtensorMap w, d_w;  /* for gradients: below */
  CUtensorMap weights; /* P, with a decay per channel */
  scan_output d_w_out;
  /* For the decay's gradient: each output row's product with the row of a tensor of its shape, for
   * every warpgroup [tokens, heads]. GRADIENTS take those of d_w and q. */
  const void *partner;
  strides partner_step;
  int partner_group;
  float *products;
  int64_t products_stride;       /* of a warpgroup's */
  scan_output out;               /* what o maps */
  int q_group, k_group, v_group; /* value heads for each head of q, k, v */
  const int32_t *offsets;
  int batch, heads, length;
  attn_decay decay_kind;
  const float *decay;
  int64_t decay_batch, decay_token, decay_head;
  /* A decay per channel: below. */
  strides decay_step;
  const float *factors;
  const uint8_t *sizes;
  state_view initial, final;
  /* With more than one segment: the state before each, [batch, heads, segments, rows, columns];
   * what each part of each segment adds to it, [batch, heads, segments, parts, rows, columns]; and
   * log2 of the parts' decays. */
  float *states, *added, *totals;
  int segments, segment_chunks, parts, part_chunks;
  int reverse;
  float log2_scale; /* of the outputs */
};

/* A segment of one sequence and head. */
struct work {
  int batch, head;
  int place, last;  /* among the sequence's segments in the order of the scan; whether the last */
  int64_t slot;     /* its place among the states */
  int64_t start;    /* the sequence's first token in the tensors */
  int length;       /* of the sequence */
  int first, count; /* chunks */
};

/* Log2 of a constant decay's step; 0 without one. */
__device__ float constant_decay(const scan_parameters &p, int head) {
  if (p.decay_kind != ATTN_DECAY_HEAD) return 0;
  float log2_decay = p.decay[head * p.decay_head] * LOG2_E;
  return log2_decay < LEAST_LOG2 ? LEAST_LOG2 : log2_decay;
}

/* Chunks [first, last) of a part of a segment of `count` chunks, counted in the order of the scan;
 * false where they are none, or too old to weigh in the state after the segment. */
__device__ bool part_range(const scan_parameters &p, float log2_decay, int count, int part,
                           int *first, int *last) {
  const float chunks = NEGLIGIBLE_LOG2 / (CHUNK * log2_decay) + 2;
  const int oldest = log2_decay < 0 && chunks < count ? count - (int)chunks : 0;
  *first = part * p.part_chunks;
  *last = min(*first + p.part_chunks, count);
  *first = max(*first, oldest);
  return *first < *last;
}

/* Item `item` of a launch. For states an item is a part of a segment that is not the last. */
template <bool STATES_ONLY> __device__ bool locate(const scan_parameters &p, int item, work *w) {
  int pairs = p.batch * p.heads, pair = item % pairs, part = 0;
  w->place = item / pairs;
  if (STATES_ONLY) {
    /* Heads differ in how many parts count: each block has them in turn. */
    pair = (pair + w->place) % pairs;
    part = w->place % p.parts;
    w->place /= p.parts;
  }
  w->head = pair % p.heads;
  w->batch = pair / p.heads;
  w->start = p.offsets ? p.offsets[w->batch] : 0;
  w->length = p.offsets ? (int)(p.offsets[w->batch + 1] - w->start) : p.length;
  int chunks = (w->length + CHUNK - 1) / CHUNK;
  int segments = max(1, (chunks + p.segment_chunks - 1) / p.segment_chunks);
  if (w->place >= segments) return false;
  w->last = w->place == segments - 1;
  w->first = (p.reverse ? segments - 1 - w->place : w->place) * p.segment_chunks;
  w->count = min(chunks - w->first, p.segment_chunks);
  w->slot = (int64_t)pair * p.segments + w->place;
  if (STATES_ONLY) {
    int first, last;
    if (w->last || !part_range(p, constant_decay(p, w->head), w->count, part, &first, &last))
      return false;
    w->first += p.reverse ? w->count - last : first;
    w->count = last - first;
    w->slot = w->slot * p.parts + part;
  }
  return true;
}

/* What a launch computes: the state after each segment; outputs; or the gradients of keys and
 * values, which share their operands. */
enum scan_kind { STATES, OUTPUTS, GRADIENTS };

template <scan_kind KIND> __device__ int item_count(const scan_parameters &p) {
  return p.batch * p.heads * (KIND == STATES ? (p.segments - 1) * p.parts : p.segments);
}

/* Tokens before a sequence in an array [tokens, ...] of all of them. */
__device__ int64_t flat_start(const scan_parameters &p, const work &w) {
  return p.offsets ? w.start : (int64_t)w.batch * p.length;
}

/* The place of a sequence's first chunk in an array of all of them. */
__device__ int64_t flat_chunk(const scan_parameters &p, const work &w) {
  return flat_start(p, w) / CHUNK + w.batch;
}

/* Log2 of a channel's decay. Weights below 2^-96 beside a step are none. */
constexpr float CHANNEL_LEAST_LOG2 = -96;
__device__ __forceinline__ float channel_log2(float log_decay) {
  const float log2_decay = log_decay * LOG2_E;
  return log2_decay < CHANNEL_LEAST_LOG2 ? CHANNEL_LEAST_LOG2 : log2_decay;
}

/* Walks through the chunks of a work in the order of the scan. With a decay per channel a chunk may
 * have to be taken in pieces: `sizes` tells of how many tokens. */
struct cursor {
  int chunk = -1, piece = 0, pieces = 0; /* in the order of the scan */
  int size = CHUNK;
  int token, valid; /* the first token, from the sequence's start; how many there are */
};

template <bool CHANNEL>
__device__ bool advance(const scan_parameters &p, const work &w, cursor *c) {
  if (++c->piece >= c->pieces) {
    if (++c->chunk >= w.count) return false;
    c->piece = 0;
    c->pieces = 1;
  }
  const int chunk = w.first + (p.reverse ? w.count - 1 - c->chunk : c->chunk);
  c->token = chunk * CHUNK;
  c->valid = min(w.length - c->token, CHUNK);
  if (CHANNEL) {
    if (c->piece == 0) {
      c->size = p.sizes[(flat_chunk(p, w) + chunk) * p.heads + w.head];
      c->pieces = (c->valid + c->size - 1) / c->size;
    }
    const int first = (p.reverse ? c->pieces - 1 - c->piece : c->piece) * c->size;
    c->token += first;
    c->valid = min(c->valid - first, c->size);
  }
  return true;
}

} // namespace additive

#endif
