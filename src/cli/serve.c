/* attn serve: a model behind HTTP. */
#include "cli/cli.h"
#include "base/memory.h"
#include "server/server.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

typedef struct serve_options {
  const char *host, *api_key, *name, *prefix_directory;
  attn_words origins;
  int64_t prefixes, port, sessions, queue, max_tokens, max_body, timeout, drain, threads;
  attn_dtype dtype;
  const char *device, *lora;
} serve_options;

/* What the API calls the model: the name of its file or directory. */
static char *name_of(const char *path) {
  char *real = realpath(path, NULL);
  const char *from = real ? real : path, *slash = strrchr(from, '/');
  char *name = attn_strdup(slash && slash[1] ? slash + 1 : from);
  free(real);
  return name;
}

static attn_server_options options_of(const serve_options *o, const char *name, const char *key) {
  return (attn_server_options){
      .host = o->host,
      .port = (int)o->port,
      .model_name = name,
      .access = {.key = key, .origins = o->origins.items, .origin_count = o->origins.count},
      .scheduler = {.sessions = o->sessions,
                    .waiting = o->queue,
                    .context = o->max_tokens,
                    .prefixes = o->prefixes,
                    .prefix_directory = o->prefix_directory},
      .most_body = (size_t)o->max_body,
      .idle_seconds = (int)o->timeout,
      .drain_seconds = (int)o->drain};
}

static void announce(const attn_command *command, const attn_server *server, const serve_options *o,
                     const char *name, const char *key) {
  bool six = strchr(o->host, ':') != NULL;
  printf("%s at http://%s%s%s:%d/ (%lld at once, %lld tokens each)\n", name, six ? "[" : "",
         o->host, six ? "]" : "", attn_server_port(server), (long long)o->sessions,
         (long long)o->max_tokens);
  fflush(stdout);
  if (!key && !attn_server_is_loopback(server))
    attn_complain(command, "anyone who reaches %s may use this server: it has no --api-key",
                  o->host);
}

/* The first SIGINT or SIGTERM stops the server, a second one ends the process at once. Threads that
 * are made while both are blocked leave them to this one. */
static sigset_t block_signals(void) {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, NULL);
  return signals;
}

static void await_signal(const sigset_t *signals) {
  int signal;
  sigwait(signals, &signal);
  pthread_sigmask(SIG_UNBLOCK, signals, NULL);
}

static attn_status serve(const attn_command *command, const serve_options *o, const char *given,
                         const char *key, attn_model **model) {
  char *path = NULL;
  attn_server *server;
  ATTN_TRY(attn_set_threads((int)o->threads));
  attn_status status = attn_open_text_model(given, o->lora, o->dtype, o->device, model, &path);
  char *name = status != ATTN_OK ? NULL : o->name ? attn_strdup(o->name) : name_of(path);
  if (status == ATTN_OK && !name) status = ATTN_OUT_OF_MEMORY;
  sigset_t signals = block_signals();
  attn_server_options options = options_of(o, name, key);
  if (status == ATTN_OK) status = attn_server_start(*model, &options, &server);
  if (status == ATTN_OK) {
    announce(command, server, o, name, key);
    await_signal(&signals);
    attn_server_stop(server);
  }
  attn_free(name);
  attn_free(path);
  return status;
}

/* A key is sent in a header. */
static bool is_key(const char *key) {
  for (const char *c = key; *c; ++c)
    if (*c <= ' ' || *c > '~') return false;
  return *key;
}

static int run_serve(const attn_command *command, void *options, const attn_words *words) {
  const serve_options *o = options;
  const char *key = o->api_key ? o->api_key : getenv("ATTN_API_KEY");
  attn_model *model = NULL;
  if (key && !is_key(key))
    return attn_misuse(command, "the API key has to be of printable ASCII characters, no spaces");
  attn_status status = serve(command, o, words->count ? words->items[0] : NULL, key, &model);
  attn_model_destroy(model);
  return status == ATTN_OK ? ATTN_EXIT_OK : attn_report(command, status);
}

static const serve_options defaults = {.host = "127.0.0.1",
                                       .port = 8080,
                                       .sessions = 4,
                                       .queue = 64,
                                       .prefixes = 16,
                                       .max_tokens = 8192,
                                       .max_body = 4 << 20,
                                       .timeout = 30,
                                       .drain = 10,
                                       .dtype = ATTN_BF16,
                                       .device = ATTN_DEVICE_AUTO};

#define AT(field) ATTN_FIELD(serve_options, field)
static const attn_option table[] = {
    {"host", 0, ATTN_OPTION_TEXT, "ADDRESS", "Where to listen; 0.0.0.0 is every network.", AT(host),
     0, 0, NULL},
    {"port", 'p', ATTN_OPTION_INT, "N", "The TCP port; 0: any that is free.", AT(port), 0, 65535,
     NULL},
    {"api-key", 0, ATTN_OPTION_TEXT, "KEY",
     "Ask for this key. Others on this machine see it in the list of processes: the variable "
     "ATTN_API_KEY is better.",
     AT(api_key), 0, 0, NULL},
    {"allow-origin", 0, ATTN_OPTION_LIST, "ORIGINS",
     "Let pages of these origins use the server, e.g. https://example.org; *: all.", AT(origins), 0,
     0, NULL},
    {"name", 0, ATTN_OPTION_TEXT, "NAME",
     "What the API calls the model; otherwise the name of its file.", AT(name), 0, 0, NULL},
    {"sessions", 0, ATTN_OPTION_INT, "N", "Texts to write at once.", AT(sessions), 1, 1024, NULL},
    {"queue", 0, ATTN_OPTION_INT, "N", "Requests that may wait besides; more are refused.",
     AT(queue), 0, 4096, NULL},
    {"max-tokens", 0, ATTN_OPTION_INT, "N", "Tokens of a request: prompt and text.", AT(max_tokens),
     2, INT32_MAX, NULL},
    {"prefixes", 0, ATTN_OPTION_INT, "N",
     "Remember the last N texts: what begins as one of them is not read again. 0: none.",
     AT(prefixes), 0, 4000, NULL},
    {"prefix-dir", 0, ATTN_OPTION_TEXT, "DIRECTORY",
     "Keep those that are put away, and all at the end, in files for later.", AT(prefix_directory),
     0, 0, NULL},
    {"max-body", 0, ATTN_OPTION_INT, "BYTES", "Of a request.", AT(max_body), 1, 1 << 30, NULL},
    {"timeout", 0, ATTN_OPTION_INT, "SECONDS", "Close connections on which nothing moves.",
     AT(timeout), 1, 86400, NULL},
    {"drain", 0, ATTN_OPTION_INT, "SECONDS",
     "When stopped, give texts under way this long to be finished.", AT(drain), 0, 86400, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", AT(dtype), 0, 0,
     attn_compute_dtypes},
    ATTN_DEVICE_OPTION(AT(device)),
    ATTN_LORA_OPTION(AT(lora)),
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
};

const attn_command attn_command_serve = {
    .name = "serve",
    .summary = "answer requests by HTTP, as OpenAI's API does",
    .usage = "[MODEL]",
    .description =
        "Serves a model to several clients at once: /v1/chat/completions, /v1/completions and "
        "/v1/models in the shapes of OpenAI's API, a page to chat with at /, and /health. MODEL "
        "is as for attn run.\n\nWithout --host, only programs on this machine reach the server. "
        "Ctrl-C or SIGTERM stops it: requests under way are finished first, a second one ends it "
        "at once.",
    .examples = "attn serve model.gguf\tthen open http://127.0.0.1:8080/\n"
                "ATTN_API_KEY=secret attn serve model.gguf --host 0.0.0.0\tfor the whole network",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .most_words = 1,
    .run = run_serve,
};
