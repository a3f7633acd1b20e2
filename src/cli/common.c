#include "cli/cli.h"
#include "base/memory.h"
#include "engines/plan.h"
#include "base/io.h"
#include "models/model.h"

#include <math.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

const char *const attn_compute_dtypes[] = {"bfloat16", "float32", "float64", NULL};

/* Messages --------------------------------------------------------------------------------------
 */

static void complain(const attn_command *command, const char *format, va_list arguments) {
  fflush(stdout);
  fprintf(stderr, "attn%s%s: ", command ? " " : "", command ? command->name : "");
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
}

void attn_complain(const attn_command *command, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  complain(command, format, arguments);
  va_end(arguments);
}

int attn_report(const attn_command *command, attn_status status) {
  const char *message = attn_error_message();
  attn_complain(command, "%s", message[0] ? message : attn_status_name(status));
  if (status == ATTN_INTERNAL) fputs("this is a bug in libattn: please report it\n", stderr);
  return status == ATTN_INTERRUPTED ? ATTN_EXIT_INTERRUPTED : ATTN_EXIT_FAILURE;
}

int attn_misuse(const attn_command *command, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  complain(command, format, arguments);
  va_end(arguments);
  if (command)
    fprintf(stderr, "'attn %s --help' lists what it takes\n", command->name);
  else
    fputs("'attn help' lists the commands\n", stderr);
  return ATTN_EXIT_USAGE;
}

/* Interruption ----------------------------------------------------------------------------------
 */

volatile sig_atomic_t attn_interrupted;

static void interrupt(int signal) {
  (void)signal;
  attn_interrupted = 1;
}

void attn_catch_interrupts(void) {
  /* RESETHAND: a second Ctrl-C meets the default action, which ends the process. */
  struct sigaction action = {.sa_handler = interrupt, .sa_flags = SA_RESETHAND};
  sigemptyset(&action.sa_mask);
  sigaction(SIGINT, &action, NULL);
  sigaction(SIGTERM, &action, NULL);
}

double attn_now(void) {
  return attn_seconds();
}

/* Output ----------------------------------------------------------------------------------------
 */

bool attn_is_terminal(FILE *file) {
  return isatty(fileno(file)) == 1;
}

bool attn_has_colour(FILE *file) {
  const char *none = getenv("NO_COLOR"), *kind = getenv("TERM");
  return attn_is_terminal(file) && !(none && *none) && !(kind && strcmp(kind, "dumb") == 0);
}

int attn_terminal_columns(FILE *file) {
  const int usual = 80, fewest = 40;
  struct winsize size;
  if (ioctl(fileno(file), TIOCGWINSZ, &size) != 0 || !size.ws_col) return usual;
  return size.ws_col < fewest ? fewest : size.ws_col;
}

int attn_print_json(const attn_command *command, json_t *value, bool one_line) {
  size_t flags = one_line ? JSON_COMPACT : JSON_INDENT(2);
  bool written = value && json_dumpf(value, stdout, flags | JSON_ENCODE_ANY) == 0;
  json_decref(value);
  if (!written) {
    attn_complain(command, "the JSON could not be written to standard output");
    return ATTN_EXIT_FAILURE;
  }
  putchar('\n');
  fflush(stdout);
  return ATTN_EXIT_OK;
}

json_t *attn_json_real(double value) {
  return isfinite(value) ? json_real(value) : json_null();
}

/* Models ----------------------------------------------------------------------------------------
 */

static char *join_three(const char *a, const char *b, const char *c) {
  char *start = attn_path_join(a, b);
  char *path = start ? attn_path_join(start, c) : NULL;
  attn_free(start);
  return path;
}

static bool is_model(const char *path) {
  char *config = attn_path_join(path, "config.json");
  bool found = config && attn_path_exists(config);
  attn_free(config);
  return found;
}

/* Without "..", as people would write it. Takes `path`. */
static char *tidy(char *path) {
  char *real = realpath(path, NULL);
  char *own = real ? attn_strdup(real) : NULL;
  free(real);
  if (!own) return path;
  attn_free(path);
  return own;
}

/* The directory of the executable; NULL where the system does not tell. */
static char *executable_directory(void) {
  char path[4096];
  ssize_t size = readlink("/proc/self/exe", path, sizeof path - 1);
  if (size <= 0) return NULL;
  path[size] = '\0';
  return attn_path_directory(path);
}

/* In a build folder inside the sources, in the sources, and as installed. */
static const char *const model_places[] = {"../models", "models", "../../models",
                                           "../share/attn/models"};

static char *find_default(void) {
  const char *models = getenv("ATTN_MODELS");
  if (models && *models) {
    char *path = attn_path_join(models, ATTN_DEFAULT_MODEL);
    if (path && is_model(path)) return path;
    attn_free(path);
    attn_fail(ATTN_NOT_FOUND, "$ATTN_MODELS is %s, which has no model %s; name a model's directory",
              models, ATTN_DEFAULT_MODEL);
    return NULL;
  }
  char *base = executable_directory();
  for (int i = 0; base && i < ATTN_COUNT(model_places); ++i) {
    char *path = join_three(base, model_places[i], ATTN_DEFAULT_MODEL);
    if (path && is_model(path)) {
      attn_free(base);
      return tidy(path);
    }
    attn_free(path);
  }
  attn_free(base);
  attn_fail(ATTN_NOT_FOUND,
            "the model %s, which comes with attn, was not found beside the command; name a model's "
            "directory, or set ATTN_MODELS to the directory that holds it",
            ATTN_DEFAULT_MODEL);
  return NULL;
}

char *attn_find_model(const char *given) {
  if (!given) return find_default();
  if (!attn_path_exists(given)) {
    attn_fail(ATTN_NOT_FOUND,
              "there is no model %s: expected a directory with config.json and "
              "model.safetensors, or a .gguf file",
              given);
    return NULL;
  }
  if (!attn_path_is_directory(given) && !attn_is_gguf(given)) {
    attn_fail(ATTN_NOT_FOUND,
              "%s is a file: expected the directory of a model, with config.json "
              "and model.safetensors, or a .gguf file",
              given);
    return NULL;
  }
  return attn_strdup(given);
}

/* "auto" takes a GPU only where the model has room. */
static attn_status move_to(attn_model *model, const char *name) {
  attn_device device;
  ATTN_TRY(attn_device_parse(name, &device));
  attn_status status = attn_model_move(model, device);
  if (status == ATTN_OK || strcmp(name, ATTN_DEVICE_AUTO) != 0) return status;
  fprintf(stderr, "attn: the model stays on the processor: %s\n", attn_error_message());
  return ATTN_OK;
}

/* attn train --lora leaves a model beside the adapters that has them already. */
static attn_status check_base(const char *model, const char *lora) {
  char *base = realpath(model, NULL), *adapters = realpath(lora, NULL);
  bool same = base && adapters && strcmp(base, adapters) == 0;
  free(base);
  free(adapters);
  if (!same) return ATTN_OK;
  return attn_fail(ATTN_INVALID_ARGUMENT,
                   "--lora: the model in %s has these adapters in its weights; name the model that "
                   "they were trained for",
                   lora);
}

static attn_status load(const char *path, const char *lora, attn_dtype compute,
                        attn_model **model) {
  if (lora) ATTN_TRY(check_base(path, lora));
  ATTN_TRY(attn_model_load(path, compute, model));
  return lora ? attn_model_load_lora(*model, lora) : ATTN_OK;
}

attn_status attn_open_model(const char *given, const char *lora, attn_dtype compute,
                            const char *device, attn_model **model, char **path) {
  char *found = attn_find_model(given);
  if (!found) return ATTN_NOT_FOUND;
  attn_status status = load(found, lora, compute, model);
  if (status == ATTN_OK) status = move_to(*model, device);
  if (path && status == ATTN_OK)
    *path = found;
  else
    attn_free(found);
  return status;
}

attn_status attn_open_text_model(const char *given, const char *lora, attn_dtype compute,
                                 const char *device, attn_model **model, char **path) {
  enum { BYTES = 256 }; /* the vocabulary of a model without a tokenizer */
  attn_model_info info;
  ATTN_TRY(attn_open_model(given, lora, compute, device, model, path));
  ATTN_TRY(attn_model_get_info(*model, &info));
  if ((*model)->text.tokenizer || info.vocabulary <= BYTES) return ATTN_OK;
  return attn_fail(ATTN_UNSUPPORTED,
                   "%s has a vocabulary of %lld tokens and no tokenizer.json; without one tokens "
                   "are bytes (vocab_size at most %d)",
                   *path, (long long)info.vocabulary, BYTES);
}
