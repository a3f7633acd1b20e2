/* attn help, and the manual page: `attn help --roff` prints man/attn.1 (make docs). What the
 * commands' tables say is not said again here. */
#include "cli/manual.h"
#include "cli/cli.h"
#include "base/memory.h"

#include <string.h>

static const char summary[] = "efficient attention for language models";

static const char about[] =
    "attn runs, serves, trains, evaluates and measures language models whose attention is linear, "
    "sparse or exact. A model is a directory with config.json and model.safetensors, or a .gguf "
    "file. Without one named, "
    "commands take the small model that comes with attn.";

typedef struct entry {
  const char *name, *text;
} entry;

static const entry exit_codes[] = {
    {"0", "success"},
    {"1", "failure: the message on standard error says what was expected and what was found"},
    {"2", "wrong usage: an unknown command or option, or a value out of its range"},
    {"130", "interrupted by Ctrl-C, after everything was put in order"},
};

static const entry environment[] = {
    {"ATTN_MODELS", "directory in which the model " ATTN_DEFAULT_MODEL " is looked for"},
    {"ATTN_KERNELS", "the kernels to use instead of the fastest ones that the processor has: "
                     "generic, avx2, avx512 or amx"},
    {"ATTN_API_KEY", "the key that attn serve asks for, where --api-key does not say"},
    {"OMP_NUM_THREADS", "threads, where --threads does not say"},
    {"ATTN_WISDOM", "file of what planning by measurement has found; otherwise "
                    "$XDG_CACHE_HOME/attn/wisdom or ~/.cache/attn/wisdom"},
    {"NO_COLOR", "if set, charts in the terminal have no colours"},
};

void attn_manual_overview(attn_text *text) {
  attn_text_print(text, "usage: attn COMMAND [OPTIONS] ...\n\n");
  attn_text_wrap(text, about, 0, 0);
  attn_text_print(text, "\ncommands:\n");
  for (int i = 0; i < attn_command_count; ++i)
    attn_text_print(text, "  %-8s %s\n", attn_commands[i]->name, attn_commands[i]->summary);
  attn_text_print(text, "\n'attn COMMAND --help' explains a command; 'attn --version' prints the "
                        "version.\n\nexamples:\n"
                        "  attn run --prompt \"In the beginning\"\n"
                        "  attn bench\n");
}

/* Roff ------------------------------------------------------------------------------------------
 */

/* Text with what roff would take for its own escaped: backslashes, hyphens of options, and dots and
 * quotes at the start of a line. */
static void escaped(attn_text *out, const char *text, size_t size) {
  bool fresh = true;
  for (size_t i = 0; i < size; ++i) {
    char c = text[i];
    if (fresh && (c == '.' || c == '\'')) attn_text_print(out, "\\&");
    fresh = c == '\n';
    if (c == '\\')
      attn_text_print(out, "\\e");
    else if (c == '-')
      attn_text_print(out, "\\-");
    else
      attn_text_add(out, &c, 1);
  }
}

static void prose(attn_text *out, const char *text) {
  for (const char *part = text; *part;) {
    const char *end = strstr(part, "\n\n");
    size_t size = end ? (size_t)(end - part) : strlen(part);
    escaped(out, part, size);
    attn_text_print(out, "\n%s", end ? ".PP\n" : "");
    part += size + (end ? 2 : 0);
  }
}

static void roff_option(attn_text *out, const attn_command *command, const attn_option *o) {
  char value[128];
  attn_text_print(out, ".TP\n.B ");
  if (o->letter) attn_text_print(out, "\\-%c, ", o->letter);
  attn_text_print(out, "\\-\\-");
  escaped(out, o->name, strlen(o->name));
  if (o->argument) attn_text_print(out, " \\fI%s\\fR", o->argument);
  attn_text_print(out, "\n");
  escaped(out, o->help, strlen(o->help));
  for (int i = 0; o->choices && o->choices[i]; ++i)
    attn_text_print(out, "%s%s", i == 0 ? ": " : o->choices[i + 1] ? ", " : " or ", o->choices[i]);
  attn_option_default(command, o, value, sizeof value);
  if (value[0]) {
    attn_text_print(out, " (default ");
    escaped(out, value, strlen(value));
    attn_text_print(out, ")");
  }
  attn_text_print(out, "\n");
}

static void roff_command(attn_text *out, const attn_command *command) {
  attn_text_print(out, ".SS \"attn %s [OPTIONS] %s\"\n", command->name, command->usage);
  prose(out, command->description);
  for (int i = 0; i < command->option_count; ++i)
    if (command->options[i].help) roff_option(out, command, &command->options[i]);
  attn_text_print(out, ".PP\nExamples:\n");
  for (const char *line = command->examples; *line;) {
    size_t size = strcspn(line, "\n"), words = strcspn(line, "\t");
    attn_text_print(out, ".TP\n.B ");
    escaped(out, line, words < size ? words : size);
    attn_text_print(out, "\n");
    if (words < size) escaped(out, line + words + 1, size - words - 1);
    attn_text_print(out, "\n");
    line += size + (line[size] == '\n');
  }
}

static void roff_entries(attn_text *out, const char *title, const entry *entries, int count) {
  attn_text_print(out, ".SH %s\n", title);
  for (int i = 0; i < count; ++i) {
    attn_text_print(out, ".TP\n.B %s\n", entries[i].name);
    prose(out, entries[i].text);
  }
}

static void roff(attn_text *out) {
  attn_text_print(out,
                  ".\\\" Written by `attn help --roff` (make docs) from src/cli/.\n"
                  ".TH ATTN 1 \"\" \"libattn %s\" \"User Commands\"\n"
                  ".SH NAME\nattn \\- %s\n"
                  ".SH SYNOPSIS\n.B attn\n\\fICOMMAND\\fR [\\fIOPTIONS\\fR] ...\n"
                  ".SH DESCRIPTION\n",
                  attn_version(), summary);
  prose(out, about);
  attn_text_print(out, ".SH COMMANDS\n");
  for (int i = 0; i < attn_command_count; ++i) roff_command(out, attn_commands[i]);
  roff_entries(out, "EXIT STATUS", exit_codes, ATTN_COUNT(exit_codes));
  roff_entries(out, "ENVIRONMENT", environment, ATTN_COUNT(environment));
}

int attn_manual_print(void) {
  attn_text text = {0};
  char *result;
  roff(&text);
  attn_status status = attn_text_take(&text, &result);
  if (status != ATTN_OK) return attn_report(NULL, status);
  fputs(result, stdout);
  attn_free(result);
  return ATTN_EXIT_OK;
}
