/* The scheduler: one thread that owns every session and lets them advance together.
 *
 * A job is one text to be written. Threads submit jobs and wait for their text; the engine's thread
 * admits up to `sessions` of them, in order of arrival, and takes turns: a piece of one prompt,
 * then one token for every job that is writing, all in one step. So a long prompt does not hold up
 * the others. What a job has read and written stays in a prefix cache, for those that begin alike.
 */
#ifndef ATTN_SERVER_SCHEDULER_H
#define ATTN_SERVER_SCHEDULER_H

#include "attn/model.h"
#include "base/text.h"
#include "server/stops.h"

typedef struct attn_scheduler attn_scheduler;
typedef struct attn_job attn_job;

typedef struct attn_scheduler_options {
  int64_t sessions;             /* jobs at once */
  int64_t waiting;              /* jobs in the queue besides */
  int64_t context;              /* tokens of a job: prompt and text */
  int64_t prefixes;             /* states that the prefix cache keeps; 0: there is none */
  const char *prefix_directory; /* for those that leave it; NULL: they are forgotten */
} attn_scheduler_options;

attn_status attn_scheduler_start(const attn_model *model, const attn_scheduler_options *options,
                                 attn_scheduler **scheduler);
/* Takes no more jobs, lets those under way finish for up to `seconds`, then cancels them; returns
 * when the thread has ended. */
void attn_scheduler_stop(attn_scheduler *scheduler, double seconds);
/* After all jobs were released. */
void attn_scheduler_destroy(attn_scheduler *scheduler);

typedef struct attn_scheduler_counts {
  int64_t active, waiting;             /* now */
  int64_t finished, cancelled, failed; /* jobs so far */
  int64_t prompt_tokens, text_tokens;  /* of those, and of the active ones */
  int64_t reused_tokens;               /* of the prompts: known from earlier jobs */
} attn_scheduler_counts;
attn_scheduler_counts attn_scheduler_count(attn_scheduler *scheduler);

typedef struct attn_job_spec {
  int32_t *tokens; /* the prompt, 1 or more, of the model's vocabulary */
  int64_t token_count;
  int64_t most_tokens; /* to write, 1 or more; with the prompt within the context */
  attn_sampling sampling;
  attn_stops stops;
} attn_job_spec;

typedef enum attn_admission {
  ATTN_ADMITTED = 0,
  ATTN_QUEUE_FULL,
  ATTN_STOPPING,
  ATTN_NO_MEMORY
} attn_admission;

/* Takes tokens and stops out of the specification when it is admitted. */
attn_admission attn_scheduler_submit(attn_scheduler *scheduler, attn_job_spec *spec,
                                     attn_job **job);

typedef enum attn_job_end {
  ATTN_JOB_RUNNING = 0,
  ATTN_JOB_STOP,      /* the model ended the text, or a stop string did */
  ATTN_JOB_LENGTH,    /* most_tokens are written */
  ATTN_JOB_CANCELLED, /* by the end of the scheduler */
  ATTN_JOB_FAILED
} attn_job_end;

typedef struct attn_job_news {
  attn_job_end end;
  int64_t prompt_tokens, text_tokens; /* what was written so far */
  int64_t reused_tokens;              /* of the prompt: not read again */
  char message[256];                  /* why it failed */
} attn_job_news;

/* Waits until there is more text or the end, at most `seconds`; appends the text to `text`. */
attn_job_news attn_job_wait(attn_job *job, double seconds, attn_text *text);
/* Cancels a job that is under way. */
void attn_job_release(attn_job *job);

#endif
