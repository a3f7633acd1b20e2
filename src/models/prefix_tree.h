/* A radix tree over sequences of tokens: which sequence with an entry has the longest beginning in
 * common with another, and which entries lie on the way. */
#ifndef ATTN_MODELS_PREFIX_TREE_H
#define ATTN_MODELS_PREFIX_TREE_H

#include "attn/base.h"

typedef struct attn_prefix_node {
  struct attn_prefix_node *parent, *child, *sibling; /* first child, next sibling */
  int32_t *tokens;                                   /* of the edge that leads here */
  int64_t count;
  int64_t depth; /* tokens from the root to here */
  void *entry;   /* NULL: none; a leaf has one */
} attn_prefix_node;

typedef struct attn_prefix_tree {
  attn_prefix_node root;
} attn_prefix_tree;

/* The node of a sequence of at least one token, made if needed. */
attn_status attn_prefix_tree_insert(attn_prefix_tree *tree, const int32_t *tokens, int64_t count,
                                    attn_prefix_node **node);
/* Takes the entry out; nodes without use go with it. */
void attn_prefix_tree_remove(attn_prefix_node *node);
/* How many of the tokens some sequence in the tree begins with; *below is a node with an entry
 * whose sequence has that beginning (NULL when it is empty), *above the deepest node with an entry
 * that is a beginning of the tokens itself (NULL: none). */
int64_t attn_prefix_tree_match(const attn_prefix_tree *tree, const int32_t *tokens, int64_t count,
                               attn_prefix_node **below, attn_prefix_node **above);
/* Writes the node's sequence, [depth]. */
void attn_prefix_tree_sequence(const attn_prefix_node *node, int32_t *tokens);
/* Frees the nodes; entries are the caller's. */
void attn_prefix_tree_free(attn_prefix_tree *tree);

#endif
