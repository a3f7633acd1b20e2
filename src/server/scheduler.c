#include "server/scheduler.h"
#include "attn/prefix_cache.h"
#include "attn/text.h"
#include "base/memory.h"
#include "base/status.h"
#include "base/utf8.h"
#include "engines/plan.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

/* Rows that go through the layers at once: a longer piece would not be faster, and would keep the
 * others waiting. */
enum { PIECE_TOKENS = 512 };

struct attn_job {
  attn_scheduler *scheduler;
  attn_job *next; /* in the queue */
  attn_job_spec spec;

  /* The engine's own. */
  attn_session *session;
  int64_t read;  /* tokens of the prompt that the session has */
  int32_t token; /* the last one that was drawn */
  attn_utf8 utf8;
  attn_text assembled; /* characters on their way to the stops */
  attn_text ready;     /* to be handed over */

  /* Under the scheduler's lock. */
  pthread_cond_t changed;
  int users; /* who holds it: its submitter, the scheduler */
  bool released;
  attn_text text; /* handed over, not yet fetched */
  attn_job_news news;
};

struct attn_scheduler {
  const attn_model *model;
  attn_scheduler_options options;
  pthread_t thread;
  pthread_condattr_t monotonic;

  pthread_mutex_t lock; /* of what follows */
  pthread_cond_t work;
  attn_job *first, *last; /* the queue */
  attn_scheduler_counts counts;
  bool stopping;
  double deadline; /* of the jobs under way, when stopping */

  /* The engine's own. */
  attn_prefix_cache *cache; /* NULL: none */
  attn_job **active, **writing;
  attn_session **sessions; /* of a step, and their tokens */
  int32_t *tokens;
  int64_t active_count;
  int64_t turn; /* whose prompt is read next */
};

/* Jobs ------------------------------------------------------------------------------------------
 */

static void free_job(attn_job *job) {
  pthread_cond_destroy(&job->changed);
  attn_session_destroy(job->session);
  attn_free(job->spec.tokens);
  attn_stops_free(&job->spec.stops);
  attn_text_free(&job->assembled);
  attn_text_free(&job->ready);
  attn_text_free(&job->text);
  attn_free(job);
}

/* Under the lock. */
static void drop_user(attn_job *job) {
  if (--job->users == 0) free_job(job);
}

static attn_job *create_job(attn_scheduler *s, const attn_job_spec *spec) {
  attn_job *job = attn_alloc_zero(sizeof *job);
  if (!job) return NULL;
  job->scheduler = s;
  job->spec = *spec;
  job->news.prompt_tokens = spec->token_count;
  job->users = 2;
  pthread_cond_init(&job->changed, &s->monotonic);
  return job;
}

static void enqueue(attn_scheduler *s, attn_job *job) {
  if (s->last)
    s->last->next = job;
  else
    s->first = job;
  s->last = job;
  ++s->counts.waiting;
  pthread_cond_signal(&s->work);
}

attn_admission attn_scheduler_submit(attn_scheduler *s, attn_job_spec *spec, attn_job **result) {
  attn_job *job = create_job(s, spec);
  attn_admission admission = ATTN_ADMITTED;
  if (!job) return ATTN_NO_MEMORY;
  pthread_mutex_lock(&s->lock);
  if (s->stopping)
    admission = ATTN_STOPPING;
  else if (s->counts.active + s->counts.waiting >= s->options.sessions + s->options.waiting)
    admission = ATTN_QUEUE_FULL;
  else
    enqueue(s, job);
  pthread_mutex_unlock(&s->lock);
  if (admission == ATTN_ADMITTED) {
    *result = job;
    *spec = (attn_job_spec){0};
  } else {
    job->spec = (attn_job_spec){0}; /* still the caller's */
    free_job(job);
  }
  return admission;
}

static struct timespec time_after(double seconds) {
  const long second = 1000000000L;
  struct timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  long nanoseconds = time.tv_nsec + (long)((seconds - (double)(long)seconds) * (double)second);
  time.tv_sec += (time_t)seconds + nanoseconds / second;
  time.tv_nsec = nanoseconds % second;
  return time;
}

attn_job_news attn_job_wait(attn_job *job, double seconds, attn_text *text) {
  attn_scheduler *s = job->scheduler;
  struct timespec until = time_after(seconds);
  int late = 0;
  pthread_mutex_lock(&s->lock);
  while (job->news.end == ATTN_JOB_RUNNING && !job->text.length && !late)
    late = pthread_cond_timedwait(&job->changed, &s->lock, &until);
  if (job->text.length) attn_text_add(text, job->text.data, job->text.length);
  job->text.length = 0;
  attn_job_news news = job->news;
  pthread_mutex_unlock(&s->lock);
  return news;
}

void attn_job_release(attn_job *job) {
  attn_scheduler *s = job->scheduler;
  pthread_mutex_lock(&s->lock);
  job->released = true;
  drop_user(job);
  pthread_mutex_unlock(&s->lock);
}

/* The text of a job -----------------------------------------------------------------------------
 */

/* Hands over the text that is ready, with the end. */
static void report(attn_scheduler *s, attn_job *job, attn_job_end end, const char *message) {
  pthread_mutex_lock(&s->lock);
  if (job->ready.length) attn_text_add(&job->text, job->ready.data, job->ready.length);
  job->ready.length = 0;
  if (job->text.failed && end != ATTN_JOB_CANCELLED) {
    end = ATTN_JOB_FAILED;
    message = "out of memory";
  }
  job->news.end = end;
  if (message) snprintf(job->news.message, sizeof job->news.message, "%s", message);
  pthread_cond_signal(&job->changed);
  pthread_mutex_unlock(&s->lock);
}

static void fail(attn_scheduler *s, attn_job *job, attn_status status) {
  const char *message = attn_error_message();
  report(s, job, ATTN_JOB_FAILED, message[0] ? message : attn_status_name(status));
}

static attn_status decode(const attn_model *model, int32_t token, attn_utf8 *utf8,
                          attn_text *text) {
  char some[256], *bytes = some;
  size_t size = 0;
  const unsigned flags = ATTN_DECODE_SKIP_SPECIAL;
  ATTN_TRY(attn_model_decode(model, &token, 1, flags, some, sizeof some, &size));
  if (size > sizeof some) {
    bytes = attn_alloc(size);
    if (!bytes) return ATTN_OUT_OF_MEMORY;
    attn_status status = attn_model_decode(model, &token, 1, flags, bytes, size, &size);
    if (status != ATTN_OK) size = 0;
  }
  for (size_t i = 0; i < size; ++i) attn_utf8_push(utf8, (unsigned char)bytes[i], text);
  if (bytes != some) attn_free(bytes);
  return text->failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

/* Moves whole characters past the stops; true when one was met. */
static bool pass_stops(attn_job *job) {
  attn_text *text = &job->assembled;
  bool met = attn_stops_push(&job->spec.stops, text->data, text->length, &job->ready);
  text->length = 0;
  return met;
}

static void finish_text(attn_job *job) {
  attn_utf8_finish(&job->utf8, &job->assembled);
  if (!pass_stops(job)) attn_stops_finish(&job->spec.stops, &job->ready);
}

/* Draws a job's next token and hands its text over; *end says whether that was the last. */
static attn_status write_token(attn_scheduler *s, attn_job *job, attn_job_end *end) {
  *end = ATTN_JOB_RUNNING;
  ATTN_TRY(attn_session_sample(job->session, &job->spec.sampling, &job->token));
  if (attn_model_is_end(s->model, job->token)) {
    *end = ATTN_JOB_STOP;
    finish_text(job);
    return ATTN_OK;
  }
  ATTN_TRY(decode(s->model, job->token, &job->utf8, &job->assembled));
  int64_t written = job->news.text_tokens + 1; /* only this thread changes it */
  if (pass_stops(job)) {
    *end = ATTN_JOB_STOP;
  } else if (written == job->spec.most_tokens) {
    *end = ATTN_JOB_LENGTH;
    finish_text(job);
  }
  pthread_mutex_lock(&s->lock);
  job->news.text_tokens = written;
  ++s->counts.text_tokens;
  pthread_mutex_unlock(&s->lock);
  return job->ready.failed ? ATTN_OUT_OF_MEMORY : ATTN_OK;
}

/* Turns -----------------------------------------------------------------------------------------
 */

/* A session that has read nothing of the prompt, or the beginning of it (job->read). */
static attn_status open_session(attn_scheduler *s, attn_job *job) {
  const attn_job_spec *spec = &job->spec;
  if (s->cache) {
    ATTN_TRY(attn_prefix_cache_open(s->cache, spec->tokens, spec->token_count, &job->session));
    job->read = attn_session_position(job->session);
    pthread_mutex_lock(&s->lock);
    s->counts.reused_tokens += job->read;
    job->news.reused_tokens = job->read;
    pthread_mutex_unlock(&s->lock);
    return ATTN_OK;
  }
  attn_session_options options = ATTN_SESSION_OPTIONS_INIT;
  options.forks = 1;
  options.checkpoints = 0; /* a job never goes back */
  options.max_tokens = spec->token_count + spec->most_tokens;
  job->read = 0;
  return attn_session_create(s->model, &options, &job->session);
}

/* Advances every job's session by its token. */
static void step(attn_scheduler *s, attn_job **jobs, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    s->sessions[i] = jobs[i]->session;
    s->tokens[i] = jobs[i]->token;
  }
  attn_status status = count ? attn_session_step(s->sessions, s->tokens, count) : ATTN_OK;
  for (int64_t i = 0; i < count && status != ATTN_OK; ++i) fail(s, jobs[i], status);
}

static bool is_reading(const attn_job *job) {
  return job->read < job->spec.token_count;
}

/* One token for every job whose prompt is read. */
static void write_all(attn_scheduler *s) {
  int64_t count = 0;
  for (int64_t i = 0; i < s->active_count; ++i) {
    attn_job *job = s->active[i];
    attn_job_end end;
    if (is_reading(job) || job->news.end != ATTN_JOB_RUNNING) continue;
    attn_status status = write_token(s, job, &end);
    if (status == ATTN_OK)
      report(s, job, end, NULL);
    else
      fail(s, job, status);
    if (status == ATTN_OK && end == ATTN_JOB_RUNNING) s->writing[count++] = job;
  }
  step(s, s->writing, count);
}

/* A piece of the prompt of the next job that has one to read. */
static void read_piece(attn_scheduler *s) {
  for (int64_t i = 0; i < s->active_count; ++i) {
    attn_job *job = s->active[s->turn++ % s->active_count];
    if (!is_reading(job)) continue;
    int64_t piece = job->spec.token_count - job->read;
    if (piece > PIECE_TOKENS) piece = PIECE_TOKENS;
    attn_status status = attn_session_feed(job->session, job->spec.tokens + job->read, piece);
    job->read += piece;
    if (status != ATTN_OK) fail(s, job, status);
    pthread_mutex_lock(&s->lock);
    s->counts.prompt_tokens += piece;
    pthread_mutex_unlock(&s->lock);
    return;
  }
}

/* Under the lock. */
static void count_end(attn_scheduler *s, const attn_job *job) {
  attn_job_end end = job->news.end;
  if (end == ATTN_JOB_FAILED)
    ++s->counts.failed;
  else if (end == ATTN_JOB_RUNNING || end == ATTN_JOB_CANCELLED)
    ++s->counts.cancelled;
  else
    ++s->counts.finished;
}

/* Lets jobs go that have ended or that nobody waits for. Under the lock. */
static void retire(attn_scheduler *s) {
  int64_t kept = 0;
  for (int64_t i = 0; i < s->active_count; ++i) {
    attn_job *job = s->active[i];
    if (job->news.end == ATTN_JOB_RUNNING && !job->released) {
      s->active[kept++] = job;
      continue;
    }
    count_end(s, job);
    attn_session_destroy(job->session);
    job->session = NULL;
    drop_user(job);
  }
  s->active_count = s->counts.active = kept;
}

/* Drops jobs from the queue that nobody waits for. Under the lock. */
static void tidy_queue(attn_scheduler *s) {
  attn_job *job = s->first;
  s->first = s->last = NULL;
  s->counts.waiting = 0;
  while (job) {
    attn_job *next = job->next;
    job->next = NULL;
    if (job->released) {
      count_end(s, job);
      drop_user(job);
    } else {
      enqueue(s, job);
    }
    job = next;
  }
}

/* Under the lock. */
static attn_job *dequeue(attn_scheduler *s) {
  attn_job *job = s->first;
  s->first = job->next;
  if (!s->first) s->last = NULL;
  job->next = NULL;
  --s->counts.waiting;
  return job;
}

/* Takes the next jobs in. Under the lock. */
static void admit(attn_scheduler *s) {
  while (s->first && s->active_count < s->options.sessions) {
    s->active[s->active_count++] = dequeue(s);
    s->counts.active = s->active_count;
  }
}

/* Waits for work; false when there will be none. Under the lock. */
static bool await_work(attn_scheduler *s) {
  while (!s->first && !s->active_count && !s->stopping) pthread_cond_wait(&s->work, &s->lock);
  return s->first || s->active_count;
}

/* Everything under way ends here. Under the lock. */
static void cancel_all(attn_scheduler *s) {
  while (s->first && s->active_count < s->options.sessions + s->options.waiting)
    s->active[s->active_count++] = dequeue(s);
  for (int64_t i = 0; i < s->active_count; ++i) {
    attn_job *job = s->active[i];
    if (job->news.end == ATTN_JOB_RUNNING) job->news.end = ATTN_JOB_CANCELLED;
    pthread_cond_signal(&job->changed);
  }
  retire(s);
}

/* What changes between two turns; false when the scheduler has come to its end. */
static bool prepare_turn(attn_scheduler *s) {
  pthread_mutex_lock(&s->lock);
  retire(s);
  tidy_queue(s);
  bool more = await_work(s);
  if (more && s->stopping && attn_seconds() >= s->deadline) {
    cancel_all(s);
    more = false;
  }
  admit(s);
  pthread_mutex_unlock(&s->lock);
  return more;
}

/* What jobs that have ended leave behind. A failure to remember costs only time later. */
static void remember(attn_scheduler *s) {
  for (int64_t i = 0; i < s->active_count && s->cache; ++i) {
    attn_job *job = s->active[i];
    if (job->session && job->news.end != ATTN_JOB_RUNNING && job->news.end != ATTN_JOB_FAILED)
      (void)attn_prefix_cache_keep(s->cache, job->session);
  }
}

static void open_sessions(attn_scheduler *s) {
  for (int64_t i = 0; i < s->active_count; ++i) {
    attn_job *job = s->active[i];
    if (job->session) continue;
    attn_status status = open_session(s, job);
    if (status == ATTN_OK) continue;
    job->read = job->spec.token_count; /* nothing more is done for it */
    fail(s, job, status);
  }
}

static void *run_engine(void *scheduler) {
  attn_scheduler *s = scheduler;
  while (prepare_turn(s)) {
    open_sessions(s);
    read_piece(s);
    write_all(s);
    remember(s);
  }
  return NULL;
}

/* The scheduler ---------------------------------------------------------------------------------
 */

/* An encoder, which has no sessions, has no cache either. */
static attn_status make_cache(attn_scheduler *s) {
  const attn_scheduler_options *o = &s->options;
  attn_prefix_cache_options options = ATTN_PREFIX_CACHE_OPTIONS_INIT;
  if (!o->prefixes) return ATTN_OK;
  options.session.max_tokens = o->context;
  options.session.forks = o->sessions;
  options.entries = o->prefixes;
  options.directory = o->prefix_directory;
  attn_status status = attn_prefix_cache_create(s->model, &options, &s->cache);
  return status == ATTN_UNSUPPORTED ? ATTN_OK : status;
}

static attn_status start(attn_scheduler *s) {
  size_t most = (size_t)(s->options.sessions + s->options.waiting);
  s->active = attn_alloc_array(most, sizeof(attn_job *));
  s->writing = attn_alloc_array(most, sizeof(attn_job *));
  s->sessions = attn_alloc_array(most, sizeof(attn_session *));
  s->tokens = attn_alloc_array(most, sizeof *s->tokens);
  if (!s->active || !s->writing || !s->sessions || !s->tokens) return ATTN_OUT_OF_MEMORY;
  ATTN_TRY(make_cache(s));
  int error = pthread_create(&s->thread, NULL, run_engine, s);
  return error ? attn_fail(ATTN_OUT_OF_MEMORY, "no thread: %s", strerror(error)) : ATTN_OK;
}

attn_status attn_scheduler_start(const attn_model *model, const attn_scheduler_options *options,
                                 attn_scheduler **scheduler) {
  attn_scheduler *s = attn_alloc_zero(sizeof *s);
  if (!s) return ATTN_OUT_OF_MEMORY;
  s->model = model;
  s->options = *options;
  pthread_condattr_init(&s->monotonic);
  pthread_condattr_setclock(&s->monotonic, CLOCK_MONOTONIC);
  pthread_mutex_init(&s->lock, NULL);
  pthread_cond_init(&s->work, &s->monotonic);
  attn_status status = start(s);
  if (status == ATTN_OK)
    *scheduler = s;
  else
    attn_scheduler_destroy(s);
  return status;
}

void attn_scheduler_stop(attn_scheduler *s, double seconds) {
  pthread_mutex_lock(&s->lock);
  s->stopping = true;
  s->deadline = attn_seconds() + seconds;
  pthread_cond_signal(&s->work);
  pthread_mutex_unlock(&s->lock);
  pthread_join(s->thread, NULL);
}

void attn_scheduler_destroy(attn_scheduler *s) {
  if (!s) return;
  pthread_cond_destroy(&s->work);
  pthread_mutex_destroy(&s->lock);
  pthread_condattr_destroy(&s->monotonic);
  attn_prefix_cache_destroy(s->cache);
  attn_free(s->active);
  attn_free(s->writing);
  attn_free(s->sessions);
  attn_free(s->tokens);
  attn_free(s);
}

attn_scheduler_counts attn_scheduler_count(attn_scheduler *s) {
  pthread_mutex_lock(&s->lock);
  attn_scheduler_counts counts = s->counts;
  pthread_mutex_unlock(&s->lock);
  return counts;
}
