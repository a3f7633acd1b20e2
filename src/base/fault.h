/* Fault injection, for tests: makes the n-th allocation or file operation from now on fail. */
#ifndef ATTN_BASE_FAULT_H
#define ATTN_BASE_FAULT_H

#include <stdbool.h>
#include <stdint.h>

typedef enum attn_fault_kind {
  ATTN_FAULT_ALLOC = 0,
  ATTN_FAULT_IO,
  ATTN_FAULT_KINDS
} attn_fault_kind;

/* The operation after `skip` successful ones fails, and every later one too until disarmed. */
void attn_fault_arm(attn_fault_kind kind, int64_t skip);
/* Stops injecting; returns whether a fault was delivered since attn_fault_arm. */
bool attn_fault_disarm(attn_fault_kind kind);
/* Called by the code under test: whether this operation has to fail. */
bool attn_fault_hit(attn_fault_kind kind);

#endif
