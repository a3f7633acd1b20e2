/* The block list of a softmax problem (attn/softmax.h) as kernels take it. */
#ifndef ATTN_KERNELS_CUDA_BLOCK_LIST_CUH
#define ATTN_KERNELS_CUDA_BLOCK_LIST_CUH

#include "attn/softmax.h"

struct block_list {
  const int32_t *offsets, *indices; /* NULL: there is none */
  int64_t sequence, head, block;    /* strides of offsets */
  int queries, keys;                /* of a block */
};

/* Blocks of keys, ascending. */
struct listed_blocks {
  const int32_t *first;
  int count;
};

inline block_list block_list_of(const attn_softmax_problem *problem,
                                const attn_softmax_args *args) {
  if (!problem->list_keys) return {};
  const attn_tensor &offsets = args->block_offsets;
  return {(const int32_t *)offsets.data,
          (const int32_t *)args->block_indices.data,
          offsets.stride[0],
          offsets.stride[1],
          offsets.stride[2],
          (int)problem->list_queries,
          (int)problem->list_keys};
}

/* What is on the list of a block of a head's queries. */
__device__ __forceinline__ listed_blocks find_listed(const block_list &list, int64_t sequence,
                                                     int64_t head, int64_t query_block) {
  const int32_t *offset =
      list.offsets + sequence * list.sequence + head * list.head + query_block * list.block;
  int first = offset[0];
  return {list.indices + first, offset[list.block] - first};
}

__device__ inline bool is_listed(const block_list &list, int64_t sequence, int64_t head,
                                 int64_t query_block, int64_t key_block) {
  listed_blocks all = find_listed(list, sequence, head, query_block);
  int low = 0, high = all.count;
  while (low < high) {
    int middle = low + (high - low) / 2;
    if (all.first[middle] < key_block)
      low = middle + 1;
    else
      high = middle;
  }
  return low < all.count && all.first[low] == key_block;
}

#endif
