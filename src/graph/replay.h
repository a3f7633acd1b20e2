/* A step that is run again and again on a GPU: its work is captured once and then queued whole, so
 * that the host neither walks through the operations nor pays for each launch.
 *
 *   attn_replay_begin; operations on the graph; attn_replay_end; then attn_replay_queue each time
 *
 * The operations are those of any other step. What differs from one time to the next they take by
 * attn_pass_live (passes.h), from memory of the host that lasts and that the caller brings up to
 * date before each attn_replay_queue; all else is as it was when it was captured. The graph's
 * memory holds the results, at the same places each time; other steps may use it in between. */
#ifndef ATTN_GRAPH_REPLAY_H
#define ATTN_GRAPH_REPLAY_H

#include "graph/graph.h"

typedef struct attn_replay attn_replay;

attn_status attn_replay_create(attn_device device, attn_replay **replay);
void attn_replay_destroy(attn_replay *replay);

/* Resets the graph, without recording. A step like it must have run before: the capture can take no
 * memory. */
attn_status attn_replay_begin(attn_replay *replay, attn_graph *graph);
/* Nothing has been done yet by then. ATTN_UNSUPPORTED or another error where the operations cannot
 * be captured, because the host takes part in them; they have to run as usual. */
attn_status attn_replay_end(attn_replay *replay, attn_graph *graph);
attn_status attn_replay_queue(attn_replay *replay);

/* Device memory that holds, whenever the replay is queued, what is at `host` then. NULL with the
 * message set. */
const void *attn_replay_live(attn_replay *replay, const void *host, size_t bytes);

#endif
