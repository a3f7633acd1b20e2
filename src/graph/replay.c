#include "graph/replay.h"
#include "base/status.h"

#include <string.h>

enum { LIVE_BYTES = 1 << 16, LIVE_ALIGNMENT = 8 };

typedef struct live_part {
  const void *host;
  size_t at, bytes;
} live_part;

struct attn_replay {
  attn_device device;
  attn_gpu *gpu;
  attn_cuda_replay work; /* NULL: none that can be queued */
  char *memory;          /* LIVE_BYTES on the device, and what they are going to be */
  char *next;
  live_part *parts;
  size_t count, capacity, used;
};

attn_status attn_replay_create(attn_device device, attn_replay **replay) {
  attn_gpu *gpu = attn_gpu_open(device.index);
  if (!gpu) return ATTN_UNSUPPORTED;
  attn_replay *made = attn_alloc_zero(sizeof *made);
  if (!made) return ATTN_OUT_OF_MEMORY;
  *made = (attn_replay){.device = device, .gpu = gpu};
  made->memory = attn_device_alloc(device, LIVE_BYTES);
  made->next = attn_alloc(LIVE_BYTES);
  if (!made->memory || !made->next) {
    attn_replay_destroy(made);
    return ATTN_OUT_OF_MEMORY;
  }
  *replay = made;
  return ATTN_OK;
}

void attn_replay_destroy(attn_replay *replay) {
  if (!replay) return;
  (void)replay->gpu->cuda->replay_destroy(replay->device.index, replay->work);
  attn_device_free(replay->device, replay->memory);
  attn_free(replay->next);
  attn_free(replay->parts);
  attn_free(replay);
}

attn_status attn_replay_begin(attn_replay *replay, attn_graph *graph) {
  attn_graph_reset(graph, false);
  replay->count = replay->used = 0;
  ATTN_TRY(attn_gpu_capture_begin(replay->gpu));
  graph->replay = replay;
  return ATTN_OK;
}

attn_status attn_replay_end(attn_replay *replay, attn_graph *graph) {
  graph->replay = NULL;
  attn_status failed = attn_graph_status(graph);
  attn_status status = attn_gpu_capture_end(replay->gpu, &replay->work);
  return failed != ATTN_OK ? failed : status;
}

const void *attn_replay_live(attn_replay *replay, const void *host, size_t bytes) {
  for (size_t i = 0; i < replay->count; ++i)
    if (replay->parts[i].host == host && replay->parts[i].bytes == bytes)
      return replay->memory + replay->parts[i].at;
  size_t needed = (bytes + LIVE_ALIGNMENT - 1) / LIVE_ALIGNMENT * LIVE_ALIGNMENT;
  if (needed > LIVE_BYTES - replay->used) {
    (void)attn_fail(ATTN_UNSUPPORTED, "replay: more than %d bytes change in a step", LIVE_BYTES);
    return NULL;
  }
  if (replay->count == replay->capacity) {
    size_t capacity = replay->capacity ? 2 * replay->capacity : 64;
    live_part *parts = attn_realloc(replay->parts, capacity * sizeof *parts);
    if (!parts) return NULL;
    replay->parts = parts;
    replay->capacity = capacity;
  }
  replay->parts[replay->count++] = (live_part){host, replay->used, bytes};
  replay->used += needed;
  return replay->memory + replay->used - needed;
}

attn_status attn_replay_queue(attn_replay *replay) {
  const attn_cuda *cuda = replay->gpu->cuda;
  attn_cuda_stream stream = attn_gpu_stream(replay->gpu);
  if (!replay->work) return attn_fail(ATTN_INTERNAL, "replay: nothing was captured");
  for (size_t i = 0; i < replay->count; ++i) {
    const live_part *part = &replay->parts[i];
    memcpy(replay->next + part->at, part->host, part->bytes);
  }
  for (size_t at = 0; at < replay->used; at += ATTN_CUDA_STORE) {
    size_t left = replay->used - at, bytes = left < ATTN_CUDA_STORE ? left : ATTN_CUDA_STORE;
    ATTN_TRY(attn_gpu_check(replay->gpu, cuda->store(replay->device.index, replay->memory + at,
                                                     replay->next + at, bytes, stream)));
  }
  return attn_gpu_check(replay->gpu,
                        cuda->replay_queue(replay->device.index, replay->work, stream));
}
