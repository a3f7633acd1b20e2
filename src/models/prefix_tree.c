#include "models/prefix_tree.h"
#include "base/memory.h"
#include "base/status.h"

#include <string.h>

static attn_prefix_node *find_child(const attn_prefix_node *node, int32_t token) {
  attn_prefix_node *child = node->child;
  while (child && child->tokens[0] != token) child = child->sibling;
  return child;
}

static int64_t in_common(const int32_t *a, const int32_t *b, int64_t most) {
  int64_t same = 0;
  while (same < most && a[same] == b[same]) ++same;
  return same;
}

static attn_prefix_node *new_node(const int32_t *tokens, int64_t count) {
  attn_prefix_node *node = attn_alloc_zero(sizeof *node);
  int32_t *copy = attn_alloc_array((size_t)count, sizeof *copy);
  if (!node || !copy) {
    attn_free(node);
    attn_free(copy);
    return NULL;
  }
  memcpy(copy, tokens, (size_t)count * sizeof *copy);
  node->tokens = copy;
  node->count = count;
  return node;
}

static void attach(attn_prefix_node *parent, attn_prefix_node *node) {
  node->parent = parent;
  node->depth = parent->depth + node->count;
  node->sibling = parent->child;
  parent->child = node;
}

static void detach(attn_prefix_node *node) {
  attn_prefix_node **at = &node->parent->child;
  while (*at != node) at = &(*at)->sibling;
  *at = node->sibling;
}

static void free_node(attn_prefix_node *node) {
  attn_free(node->tokens);
  attn_free(node);
}

/* Puts a node after the first `count` tokens of the edge to `node`. */
static attn_prefix_node *split(attn_prefix_node *node, int64_t count) {
  attn_prefix_node *middle = new_node(node->tokens, count);
  if (!middle) return NULL;
  detach(node);
  attach(node->parent, middle);
  node->count -= count;
  memmove(node->tokens, node->tokens + count, (size_t)node->count * sizeof *node->tokens);
  attach(middle, node);
  return middle;
}

attn_status attn_prefix_tree_insert(attn_prefix_tree *tree, const int32_t *tokens, int64_t count,
                                    attn_prefix_node **result) {
  attn_prefix_node *node = &tree->root;
  while (node->depth < count) {
    int64_t at = node->depth;
    attn_prefix_node *child = find_child(node, tokens[at]);
    if (!child) {
      child = new_node(tokens + at, count - at);
      if (!child) return ATTN_OUT_OF_MEMORY;
      attach(node, child);
    } else {
      int64_t most = child->count < count - at ? child->count : count - at;
      int64_t same = in_common(child->tokens, tokens + at, most);
      if (same < child->count) child = split(child, same);
      if (!child) return ATTN_OUT_OF_MEMORY;
    }
    node = child;
  }
  *result = node;
  return ATTN_OK;
}

/* A node without an entry and with one child only is no branch: its edge joins the child's. Where
 * memory is short it stays, which does no harm. */
static void join(attn_prefix_node *node) {
  attn_prefix_node *child = node->child;
  if (!node->parent || node->entry || !child || child->sibling) return;
  int32_t *tokens =
      attn_realloc(node->tokens, (size_t)(node->count + child->count) * sizeof *tokens);
  if (!tokens) return;
  memcpy(tokens + node->count, child->tokens, (size_t)child->count * sizeof *tokens);
  detach(node);
  attn_free(child->tokens);
  child->tokens = tokens;
  child->count += node->count;
  attach(node->parent, child);
  attn_free(node);
}

void attn_prefix_tree_remove(attn_prefix_node *node) {
  node->entry = NULL;
  while (node->parent && !node->entry && !node->child) {
    attn_prefix_node *parent = node->parent;
    detach(node);
    free_node(node);
    node = parent;
  }
  join(node);
}

int64_t attn_prefix_tree_match(const attn_prefix_tree *tree, const int32_t *tokens, int64_t count,
                               attn_prefix_node **below, attn_prefix_node **above) {
  const attn_prefix_node *node = &tree->root;
  int64_t matched = 0;
  *below = *above = NULL;
  while (matched < count) {
    attn_prefix_node *child = find_child(node, tokens[matched]);
    if (!child) break;
    int64_t most = child->count < count - matched ? child->count : count - matched;
    int64_t same = in_common(child->tokens, tokens + matched, most);
    matched += same;
    node = child;
    if (same < child->count) break;
    if (child->entry) *above = child;
  }
  while (node && matched && !node->entry) node = node->child;
  if (matched && node) *below = (attn_prefix_node *)(uintptr_t)node;
  return matched;
}

void attn_prefix_tree_sequence(const attn_prefix_node *node, int32_t *tokens) {
  for (; node->parent; node = node->parent)
    memcpy(tokens + node->depth - node->count, node->tokens, (size_t)node->count * sizeof *tokens);
}

void attn_prefix_tree_free(attn_prefix_tree *tree) {
  attn_prefix_node *node = &tree->root;
  while (node) {
    if (node->child) {
      node = node->child;
      continue;
    }
    attn_prefix_node *parent = node->parent;
    if (parent) {
      parent->child = node->sibling;
      free_node(node);
    }
    node = parent;
  }
}
