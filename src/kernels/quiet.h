/* Timing on a machine that others share. A core whose other hardware thread works for somebody else
 * multiplies tiles at a third of its rate, and which cores are left alone changes from second to
 * second. So: threads go to the processors that are quietest, and a sample counts when they were
 * quiet before and after it.
 *
 * Quiet is a chain of additions at nearly the best rate seen: it halves when a core is shared. */
#ifndef ATTN_KERNELS_QUIET_H
#define ATTN_KERNELS_QUIET_H

#include <stdbool.h>

/* Whether the processors under `threads` threads are left alone; takes some tens of microseconds.
 */
bool attn_quiet_now(int threads);
/* Moves the threads to the quietest processors that the program was started with, one to each, and
 * leaves them bound there. Nothing on systems that cannot bind threads. */
void attn_quiet_move(int threads);
/* Whether it is quiet; else moves. Before a sample: what runs after a move finds cold caches and
 * must not count either. */
bool attn_quiet_or_move(int threads);

#endif
