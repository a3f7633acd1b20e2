/* attn compare: which mixer learns a task, with how much state and at what speed. */
#include "cli/compare.h"
#include "base/io.h"
#include "base/memory.h"
#include "base/progress.h"

#include <math.h>
#include <string.h>

typedef struct compare_options {
  attn_words mixers;
  attn_reals learning_rates;
  int64_t threads;
  bool json, quiet;
  const char *device, *html, *cab;
  attn_comparison_options comparison; /* without what the words above say */
} compare_options;

typedef struct compare_reporter {
  const attn_command *command;
  bool terminal, quiet;
} compare_reporter;

/* Progress --------------------------------------------------------------------------------------
 */

static void print_step(const attn_comparison_progress *p) {
  fprintf(stderr, "\r\033[K%d/%d %s %s", p->number, p->runs, p->mixer, p->training->line);
}

static void print_end(const compare_reporter *r, const attn_comparison_progress *p) {
  const attn_comparison_run *run = p->run;
  char accuracy[ATTN_FORMAT_SIZE], time[ATTN_FORMAT_SIZE];
  fprintf(stderr, "%s%d/%d %s, seed %llu, learning rate %.4g: ", r->terminal ? "\r\033[K" : "",
          p->number, p->runs, p->mixer, (unsigned long long)run->seed, run->learning_rate);
  if (run->stage == ATTN_RUN_FAILED)
    fprintf(stderr, "failed: %s", run->problem);
  else
    fprintf(stderr, "accuracy %s, validation %.4f, %s",
            attn_compare_percent(run->accuracy, accuracy), run->validation_loss,
            attn_format_duration(run->seconds, time, sizeof time));
  fprintf(stderr, "%s\n", run->earlier ? " (done before)" : "");
}

static bool report_progress(void *context, const attn_comparison_progress *p) {
  const compare_reporter *r = context;
  if (p->training && p->training->warning) {
    if (r->terminal) fputs("\r\033[K", stderr);
    attn_complain(r->command, "warning: %s: %s", p->run->name, p->training->warning);
  }
  if (r->quiet || (p->training && !r->terminal)) return true;
  if (p->training)
    print_step(p);
  else
    print_end(r, p);
  return true;
}

/* The end ---------------------------------------------------------------------------------------
 */

static attn_status write_files(const attn_comparison *c, const attn_comparison_row *rows,
                               const char *html) {
  ATTN_TRY(attn_comparison_write(c));
  char *path = html ? attn_strdup(html) : attn_path_join(c->options.output, "report.html");
  attn_status status = path ? attn_compare_write_html(c, rows, path) : ATTN_OUT_OF_MEMORY;
  attn_free(path);
  return status;
}

static int count_problems(const attn_comparison *c, const attn_comparison_row *rows) {
  int problems = 0;
  for (int i = 0; i < c->model_count; ++i) problems += !rows[i].finished;
  return problems;
}

static int show(const attn_command *command, const compare_options *o, const attn_comparison *c) {
  attn_comparison_row *rows = attn_alloc_array((size_t)c->model_count, sizeof *rows);
  if (!rows) return attn_report(command, ATTN_OUT_OF_MEMORY);
  attn_comparison_rows(c, rows);
  int code = ATTN_EXIT_OK, problems = count_problems(c, rows);
  attn_status status = write_files(c, rows, o->html);
  if (o->json)
    code = attn_print_json(command, attn_comparison_json(c), false);
  else
    attn_compare_print(c, rows);
  attn_free(rows);
  if (status != ATTN_OK) return attn_report(command, status);
  if (!problems) return code;
  attn_complain(command, "%d of %d mixers failed", problems, c->model_count);
  return ATTN_EXIT_FAILURE;
}

static int stopped(const attn_command *command, const attn_comparison *c) {
  int over = 0;
  for (int i = 0; i < c->run_count; ++i) over += c->runs[i].stage != ATTN_RUN_WAITING;
  attn_complain(command,
                "stopped after %d of %d runs; they are in %s, with the checkpoint of the next: the "
                "same command continues from there",
                over, c->run_count, c->options.output);
  return ATTN_EXIT_INTERRUPTED;
}

/* The command -----------------------------------------------------------------------------------
 */

/* "12/34 gated_delta_net " stands before the line of training. */
enum { PREFIX_COLUMNS = 24 };

static attn_status make_options(compare_options *o) {
  attn_comparison_options *c = &o->comparison;
  ATTN_TRY(attn_set_threads((int)o->threads));
  ATTN_TRY(attn_device_parse(o->device, &c->training.device));
  c->mixers = o->mixers.items;
  c->mixer_count = o->mixers.count;
  c->learning_rates = o->learning_rates.items;
  c->rate_count = o->learning_rates.count;
  c->training.line_columns = attn_terminal_columns(stderr) - 1 - PREFIX_COLUMNS;
  c->training.interrupt = &attn_interrupted;
  return ATTN_OK;
}

static int compare(const attn_command *command, compare_options *o) {
  compare_reporter r = {.command = command, .quiet = o->quiet};
  attn_comparison c = {0};
  r.terminal = !o->quiet && attn_is_terminal(stderr);
  attn_catch_interrupts();
  attn_status status = make_options(o);
  if (status == ATTN_OK) status = attn_comparison_open(&o->comparison, &c);
  if (status == ATTN_OK) status = attn_comparison_run_all(&c, report_progress, &r);
  if (status != ATTN_OK && r.terminal) fputc('\n', stderr);
  int code = status == ATTN_OK            ? show(command, o, &c)
             : status == ATTN_INTERRUPTED ? stopped(command, &c)
                                          : attn_report(command, status);
  attn_comparison_close(&c);
  return code;
}

/* The word "all" stands for every mixer. */
static void take_all(attn_words *mixers) {
  attn_mixer_info info;
  if (mixers->count != 1 || strcmp(mixers->items[0], "all") != 0) return;
  mixers->count = 0;
  for (int i = 0; i < attn_mixer_count() && attn_mixer_get_info(i, &info) == ATTN_OK; ++i)
    mixers->items[mixers->count++] = info.name;
}

static bool mixers_are_known(const attn_command *command, const attn_words *mixers) {
  for (int i = 0, index; i < mixers->count; ++i)
    if (attn_mixer_find(mixers->items[i], &index) != ATTN_OK) {
      attn_misuse(command, "--mixers: %s", attn_error_message());
      return false;
    }
  return true;
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  compare_options *o = options;
  (void)words;
  if (o->cab) {
    if (o->comparison.task || o->mixers.count || o->comparison.output || o->html)
      return attn_misuse(command, "--task, --mixers, --out and --html do not go with --cab");
    return attn_compare_cab(command, o->cab, o->json);
  }
  if (!o->comparison.task) return attn_misuse(command, "--task is missing: what is to be learnt");
  if (!o->mixers.count) return attn_misuse(command, "--mixers is missing: names, or all");
  if (!o->comparison.output)
    return attn_misuse(command, "--out is missing: the directory for runs and results");
  take_all(&o->mixers);
  if (!mixers_are_known(command, &o->mixers)) return ATTN_EXIT_USAGE;
  return compare(command, o);
}

static const compare_options defaults = {.learning_rates = {{1e-3, 3e-3, 1e-2}, 3},
                                         .device = ATTN_DEVICE_AUTO,
                                         .comparison = {.width = 64,
                                                        .layers = 2,
                                                        .heads = 1,
                                                        .seeds = 3,
                                                        .test_examples = 1000,
                                                        .training = ATTN_TRAINING_OPTIONS_INIT}};

#define AT(field) ATTN_FIELD(compare_options, field)
#define OF(field) ATTN_FIELD(compare_options, comparison.field)
static const attn_option table[] = {
    ATTN_TASK_OPTION(OF(task)),
    {"mixers", 'm', ATTN_OPTION_LIST, "NAMES", "Mixers with commas between them, or all.",
     AT(mixers), 0, 0, NULL},
    {"out", 'o', ATTN_OPTION_TEXT, "DIR",
     "Directory for the runs, results.json and report.html; made if needed.", OF(output), 0, 0,
     NULL},
    {"length", 'l', ATTN_OPTION_INT, "N", "Tokens of an example; 0: as is usual for the task.",
     OF(task_options.length), 0, 1 << 24, NULL},
    ATTN_PAIRS_OPTION(OF(task_options.pairs)),
    {"vocabulary", 0, ATTN_OPTION_INT, "N", "Of task and models; 0: as is usual for the task.",
     OF(task_options.vocabulary), 0, 1 << 24, NULL},
    ATTN_POWER_OPTION(OF(task_options.power)),
    ATTN_ZEROS_OPTION(OF(task_options.zeros)),
    {"width", 'w', ATTN_OPTION_INT, "N", "Of the models.", OF(width), 1, 1 << 14, NULL},
    {"layers", 0, ATTN_OPTION_INT, "N", "Of the models.", OF(layers), 1, 1 << 10, NULL},
    {"heads", 0, ATTN_OPTION_INT, "N", "Of a layer.", OF(heads), 1, 1 << 10, NULL},
    {"feed-forward", 0, ATTN_OPTION_INT, "N",
     "Width of the feed-forward of the model with most parameters; the others have wider ones. 0: "
     "twice the width.",
     OF(feed_forward), 0, 1 << 20, NULL},
    {"seeds", 0, ATTN_OPTION_INT, "N", "Runs of each mixer and learning rate.", OF(seeds), 1, 1000,
     NULL},
    {"seed", 's', ATTN_OPTION_SEED, "S", "The first of them.", OF(training.seed), 0, 0, NULL},
    {"learning-rates", 'r', ATTN_OPTION_REALS, "R,...",
     "Each is tried; the one with the lowest validation loss counts.", AT(learning_rates), 0, 1e3,
     NULL},
    {"steps", 'n', ATTN_OPTION_INT, "N", "Steps of a run.", OF(training.steps), 1, ATTN_ANY, NULL},
    {"batch", 'b', ATTN_OPTION_INT, "N", "Examples of a step.", OF(training.batch), 1, 1 << 20,
     NULL},
    {"weight-decay", 0, ATTN_OPTION_REAL, "W", "Of matrices.", OF(training.weight_decay), 0, 1e3,
     NULL},
    {"test-examples", 0, ATTN_OPTION_INT, "N", "That accuracy is counted on.", OF(test_examples), 1,
     1 << 24, NULL},
    {"validation-examples", 0, ATTN_OPTION_INT, "N", "That learning rates are chosen by.",
     OF(training.validation_windows), 1, 1 << 24, NULL},
    {"checkpoint-every", 0, ATTN_OPTION_INT, "N", "Steps; 0: on interruption only.",
     OF(training.checkpoint_every), 0, ATTN_ANY, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", OF(training.compute), 0, 0,
     attn_compute_dtypes},
    ATTN_DEVICE_OPTION(AT(device)),
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"fresh", 0, ATTN_OPTION_FLAG, NULL, "Do all runs anew, even if they are in --out.", OF(fresh),
     0, 0, NULL},
    {"html", 0, ATTN_OPTION_TEXT, "FILE", "Where the report goes, instead of DIR/report.html.",
     AT(html), 0, 0, NULL},
    {"cab", 0, ATTN_OPTION_TEXT, "FILE",
     "Train nothing: print the compositional index of CAB (arXiv 2210.07661) of the metrics in "
     "this "
     "JSON file, for each pattern of attention, and how far it is above the baseline's; "
     "docs/tasks.md has the format.",
     AT(cab), 0, 0, NULL},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON object, which is also in DIR/results.json.",
     AT(json), 0, 0, NULL},
    {"quiet", 'q', ATTN_OPTION_FLAG, NULL, "No progress.", AT(quiet), 0, 0, NULL},
};

const attn_command attn_command_compare = {
    .name = "compare",
    .summary = "train mixers on a task and compare what they learn",
    .usage = "--task NAME --mixers NAMES --out DIR",
    .description =
        "Trains a small model with each mixer on a task, from several seeds, and tests it on "
        "examples that it has not seen. The models are alike but for the mixer, and have the same "
        "number of parameters, within 2 %: where a mixer has fewer, the feed-forward is "
        "wider.\n\nThe table: accuracy (mean over the seeds, from least to most, standard "
        "deviation), parameters, bytes of state that decoding keeps behind an example, the "
        "learning rate that was best, tokens a second in training and in decoding one sequence, "
        "and the most memory in training. The page shows accuracy against state.\n\nCtrl-C "
        "stops, with a checkpoint; the same command continues. Runs that are over are not done "
        "again, so that mixers and seeds may be added; with other options they are refused. A "
        "mixer that fails does not keep the others from being compared: its row says why, and the "
        "exit code is 1. docs/tasks.md describes the tasks.",
    .examples =
        "attn compare --task mqar --mixers softmax,lightning,kda --vocabulary 256 --out "
        "runs/recall\ta first picture\n"
        "attn compare --task mqar --mixers all --length 256 --pairs 16 --width 128 -r "
        "1e-4,4.6e-4,2.2e-3,1e-2 --out runs/zoology\tas in Zoology, with its learning rates\n"
        "attn compare --task parity --mixers all --out runs/parity --json\tfor programs\n"
        "attn compare --cab examples/cab.json\tthe compositional index of measured metrics",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .run = run,
};
