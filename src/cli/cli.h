/* What the subcommands of `attn` share: exit codes, messages, interruption, output, models. */
#ifndef ATTN_CLI_CLI_H
#define ATTN_CLI_CLI_H

#include "attn/attn.h"
#include "base/status.h"
#include "base/text.h"
#include "cli/options.h"

#include <jansson.h>
#include <signal.h>
#include <stdio.h>

enum {
  ATTN_EXIT_OK = 0,
  ATTN_EXIT_FAILURE = 1,      /* a file, a model, the machine: the message says what */
  ATTN_EXIT_USAGE = 2,        /* the command line is wrong */
  ATTN_EXIT_INTERRUPTED = 130 /* by Ctrl-C, after everything was put in order */
};

/* The table of commands (main.c). */
extern const attn_command *const attn_commands[];
extern const int attn_command_count;

/* Messages. "attn run: ..." on stderr. */
void attn_complain(const attn_command *command, const char *format, ...) ATTN_PRINTF(2, 3);
/* The library's message, and the exit code. */
int attn_report(const attn_command *command, attn_status status);
/* A wrong combination of options: the message and where to read more. */
int attn_misuse(const attn_command *command, const char *format, ...) ATTN_PRINTF(2, 3);

/* Ctrl-C and SIGTERM: the first sets the flag, the second ends the process. */
void attn_catch_interrupts(void);
extern volatile sig_atomic_t attn_interrupted;

double attn_now(void); /* seconds of a monotonic clock */

/* Output. */
bool attn_is_terminal(FILE *file);
bool attn_has_colour(FILE *file);      /* a terminal, and NO_COLOR is not set */
int attn_terminal_columns(FILE *file); /* 80 when it is not a terminal */
/* One JSON value and a line break on stdout; takes the reference. */
int attn_print_json(const attn_command *command, json_t *value, bool one_line);
/* A number, or null when it is not finite. */
json_t *attn_json_real(double value);

/* Models. */

/* The directory of the model: `given`, or (NULL) the one that comes with attn, whose name is
 * ATTN_DEFAULT_MODEL below $ATTN_MODELS or one of the places relative to the executable. NULL
 * (message set) when there is none. To be freed by attn_free. */
#define ATTN_DEFAULT_MODEL "lightning-english"
char *attn_find_model(const char *given);
/* Finds, loads, adds the adapters of the directory `lora` (NULL: none) to the weights, and brings
 * to a device (attn_device_parse). *path (may be NULL) as from attn_find_model. */
attn_status attn_open_model(const char *given, const char *lora, attn_dtype compute,
                            const char *device, attn_model **model, char **path);
/* One that reads and writes text: by its tokenizer, or bytes. */
attn_status attn_open_text_model(const char *given, const char *lora, attn_dtype compute,
                                 const char *device, attn_model **model, char **path);

/* The row of the option --lora of commands that run a model. */
#define ATTN_LORA_OPTION(offset)                                                                   \
  {                                                                                                \
    "lora", 0, ATTN_OPTION_TEXT, "DIR",                                                            \
        "Add the adapters of this directory (adapter_config.json, adapter_model.safetensors, as "  \
        "attn train --lora and PEFT write them) to the model's weights.",                          \
        offset, 0, 0, NULL                                                                         \
  }

/* The row of the option --device. */
#define ATTN_DEVICE_AUTO "auto"
#define ATTN_DEVICE_OPTION(offset)                                                                 \
  {                                                                                                \
    "device", 0, ATTN_OPTION_TEXT, "DEVICE",                                                       \
        "Where it runs: cpu, cuda, cuda:N, or auto, which takes a GPU where there is one.",        \
        offset, 0, 0, NULL                                                                         \
  }

/* The rows of the options that say what a task (src/tasks/) is like; needs tasks/task.h. */
#define ATTN_TASK_OPTION(offset)                                                                   \
  {                                                                                                \
    "task", 't', ATTN_OPTION_NAME, "NAME", "Examples made by a rule instead of a text", offset, 0, \
        0, attn_task_names                                                                         \
  }
#define ATTN_PAIRS_OPTION(offset)                                                                  \
  {                                                                                                \
    "pairs", 0, ATTN_OPTION_INT, "N",                                                              \
        "Of the task: what has to be remembered, be it keys with values, symbols, digits or "      \
        "needles; 0: as many as is usual.",                                                        \
        offset, 0, 1 << 22, NULL                                                                   \
  }
#define ATTN_POWER_OPTION(offset)                                                                  \
  {                                                                                                \
    "power", 0, ATTN_OPTION_REAL, "A",                                                             \
        "Of mqar: slots of queries are drawn in proportion to j^(A-1); 1: evenly, 0: 0.01.",       \
        offset, 0, 1e6, NULL                                                                       \
  }
#define ATTN_ZEROS_OPTION(offset)                                                                  \
  {                                                                                                \
    "zeros", 0, ATTN_OPTION_FLAG, NULL, "Of mqar: fill up with 0 instead of random tokens.",       \
        offset, 0, 0, NULL                                                                         \
  }

/* dtypes that models and operators compute in */
extern const char *const attn_compute_dtypes[];

#define ATTN_COUNT(array)        ((int)(sizeof(array) / sizeof *(array)))
#define ATTN_FIELD(type, member) offsetof(type, member)
#define ATTN_ANY                 1e18 /* no upper bound of a number */

#endif
