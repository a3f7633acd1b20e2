/* attn train: from a text to a model. */
#include "cli/cli.h"
#include "attn/training.h"
#include "base/memory.h"
#include "base/progress.h"
#include "base/io.h"
#include "tasks/task.h"

#include <math.h>
#include <string.h>

typedef struct train_options {
  attn_words data;
  const char *config, *device, *lora_kind;
  attn_words lora_targets, lora_trained;
  attn_lora_options lora;
  int schedule, lora_merge;
  int64_t threads;
  bool resume, fresh, json, quiet;
  attn_training_options training;
} train_options;

enum { MOST_CONFIG = 1 << 20 };

/* By attn_lora_kind. */
static const char *const lora_kinds[] = {"lora", "rslora", "dora", NULL};
enum { MERGE, DO_NOT_MERGE };
static const char *const merges[] = {"yes", "no", NULL};
static const char *const schedules[] = {"cosine", "wsd", "wsd-sqrt", "constant", NULL};

typedef struct reporter {
  const attn_command *command;
  const train_options *options;
  bool terminal;  /* one line that is overwritten, else a line now and then */
  double printed; /* when the last line was */
  bool failed;    /* standard output is gone */
} reporter;

static bool print_event(json_t *event) {
  bool written = event && json_dumpf(event, stdout, JSON_COMPACT) == 0 && putchar('\n') != EOF &&
                 fflush(stdout) == 0;
  json_decref(event);
  return written;
}

static json_t *progress_json(const attn_training_progress *p) {
  return json_pack(
      "{s:s, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:o, s:I, s:b}", "event", "progress",
      "step", (json_int_t)p->step, "steps", (json_int_t)p->steps, "tokens", (json_int_t)p->tokens,
      "loss", attn_json_real(p->loss), "smoothed_loss", attn_json_real(p->smoothed_loss),
      "learning_rate", attn_json_real(p->learning_rate), "gradient_norm",
      attn_json_real(p->gradient_norm), "tokens_per_second", attn_json_real(p->tokens_per_second),
      "seconds_left", p->seconds_left < 0 ? json_null() : attn_json_real(p->seconds_left),
      "validation_loss", attn_json_real(p->validation_loss), "best_validation",
      attn_json_real(p->best_validation), "skipped", (json_int_t)p->skipped, "checkpointed",
      p->checkpointed);
}

/* Lines of a log: at the start and the end, at validations, and now and then. */
static bool worth_a_line(const reporter *r, const attn_training_progress *p) {
  const double seconds_between_lines = 10;
  return p->step == 1 || p->step == p->steps || isfinite(p->validation_loss) ||
         attn_now() - r->printed >= seconds_between_lines;
}

static bool report_progress(void *context, const attn_training_progress *p) {
  reporter *r = context;
  if (p->warning) {
    if (r->terminal) fputs("\r\033[K", stderr);
    attn_complain(r->command, "warning: %s", p->warning);
  }
  if (r->options->json && !print_event(progress_json(p))) {
    r->failed = true;
    return false;
  }
  if (r->options->quiet || (r->options->json && !r->terminal)) return true;
  if (r->terminal) {
    fprintf(stderr, "\r\033[K%s", p->line);
    /* the line with a validation loss stays */
    if (isfinite(p->validation_loss) || p->step == p->steps) fputc('\n', stderr);
  } else if (worth_a_line(r, p)) {
    fprintf(stderr, "%s\n", p->line);
    r->printed = attn_now();
  }
  return true;
}

static json_t *result_json(const train_options *o, const attn_training_result *r, bool stopped) {
  return json_pack("{s:s, s:s, s:I, s:I, s:I, s:I, s:I, s:I, s:o, s:o, s:o, s:o, s:o, s:o, s:I}",
                   "event", stopped ? "interrupted" : "done", "model", o->training.output,
                   "parameters", (json_int_t)r->parameters, "trained", (json_int_t)r->trained,
                   "first_step", (json_int_t)r->first_step, "steps", (json_int_t)r->steps, "tokens",
                   (json_int_t)r->tokens, "skipped", (json_int_t)r->skipped, "loss",
                   attn_json_real(r->loss), "validation_loss", attn_json_real(r->validation_loss),
                   "best_validation", attn_json_real(r->best_validation), "seconds",
                   attn_json_real(r->seconds), "tokens_per_second",
                   attn_json_real(r->tokens_per_second), "flop_per_second",
                   attn_json_real(r->flop_per_second), "peak_bytes", (json_int_t)r->peak_bytes);
}

/* How to see what came of it. */
static void print_advice(const train_options *o) {
  const char *task = o->training.task, *output = o->training.output;
  fprintf(stderr, "try it: attn %s ", task ? "eval" : "run");
  if (o->lora_kind && o->lora_merge == DO_NOT_MERGE)
    fprintf(stderr, "%s --lora %s", o->training.model, output);
  else
    fputs(output, stderr);
  fprintf(stderr, "%s%s\n", task ? " --task " : "", task ? task : "");
}

static void print_result(const train_options *o, const attn_training_result *r) {
  char time[ATTN_FORMAT_SIZE], speed[ATTN_FORMAT_SIZE], peak[ATTN_FORMAT_SIZE];
  fprintf(stderr, "%s: %lld steps, loss %.4f", o->training.output, (long long)r->steps, r->loss);
  if (isfinite(r->validation_loss)) fprintf(stderr, ", validation %.4f", r->validation_loss);
  if (isfinite(r->validation_loss) && r->bytes_per_token > 0)
    fprintf(stderr, " (%.4f bits per byte)", r->validation_loss / log(2) / r->bytes_per_token);
  fprintf(stderr, "\n%s, %s tokens/s, %.3g TFLOP/s, memory %s\n",
          attn_format_duration(r->seconds, time, sizeof time),
          attn_format_count(r->tokens_per_second, speed, sizeof speed), r->flop_per_second / 1e12,
          attn_format_bytes((double)r->peak_bytes, peak, sizeof peak));
  if (o->lora_kind)
    fprintf(stderr, "trained %s of %s parameters\n",
            attn_format_count((double)r->trained, time, sizeof time),
            attn_format_count((double)r->parameters, speed, sizeof speed));
  print_advice(o);
}

static int finish(const reporter *r, attn_status status, const attn_training_result *result) {
  const train_options *o = r->options;
  bool stopped = status == ATTN_INTERRUPTED;
  if (r->terminal && status != ATTN_OK) fputc('\n', stderr);
  if (r->failed) {
    attn_complain(r->command, "stopped: cannot write to standard output; the checkpoint is in %s",
                  o->training.output);
    return ATTN_EXIT_FAILURE;
  }
  if (status != ATTN_OK && !stopped) return attn_report(r->command, status);
  if (o->json && !print_event(result_json(o, result, stopped))) return ATTN_EXIT_FAILURE;
  if (stopped) {
    attn_complain(r->command,
                  "stopped after step %lld of %lld; the checkpoint is in %s: the same "
                  "command continues from there",
                  (long long)result->steps, (long long)o->training.steps, o->training.output);
    return ATTN_EXIT_INTERRUPTED;
  }
  if (!o->quiet) print_result(o, result);
  return ATTN_EXIT_OK;
}

static attn_lora_options lora_options(const train_options *o) {
  attn_lora_options lora = o->lora;
  while (strcmp(lora_kinds[lora.kind], o->lora_kind) != 0) ++lora.kind;
  if (o->lora_targets.count) lora.targets = o->lora_targets.items;
  lora.target_count = o->lora_targets.count;
  lora.trained = o->lora_trained.items;
  lora.trained_count = o->lora_trained.count;
  return lora;
}

static int train(reporter *r, const train_options *o) {
  attn_training_options options = o->training;
  attn_lora_options lora;
  attn_training_result result = {0};
  char *config = NULL;
  attn_status status = attn_set_threads((int)o->threads);
  if (status == ATTN_OK && o->config)
    status = attn_file_read(o->config, MOST_CONFIG, &config, NULL);
  if (status == ATTN_OK) status = attn_device_parse(o->device, &options.device);
  if (status != ATTN_OK) return attn_report(r->command, status);
  options.config = config;
  if (o->lora_kind) {
    lora = lora_options(o);
    options.lora = &lora;
    options.lora_merge = o->lora_merge == MERGE;
  }
  options.data = o->data.items;
  options.data_count = o->data.count;
  options.schedule = schedules[o->schedule];
  options.start = o->resume ? ATTN_START_RESUME : o->fresh ? ATTN_START_FRESH : ATTN_START_AUTO;
  options.line_columns = attn_terminal_columns(stderr) - 1;
  options.interrupt = &attn_interrupted;
  attn_catch_interrupts();
  status = attn_train(&options, report_progress, r, &result);
  int code = finish(r, status, &result);
  attn_free(config);
  return code;
}

static const train_options defaults = {.training = ATTN_TRAINING_OPTIONS_INIT,
                                       .lora = ATTN_LORA_OPTIONS_INIT,
                                       .device = ATTN_DEVICE_AUTO};

static bool says_how_to_adapt(const train_options *o) {
  return o->lora.rank != defaults.lora.rank || o->lora.alpha != defaults.lora.alpha ||
         o->lora_targets.count || o->lora_trained.count || o->lora_merge != MERGE;
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  const train_options *o = options;
  (void)words;
  if (o->training.task && o->data.count)
    return attn_misuse(command, "--data and --task exclude each other");
  bool has_fraction = o->training.validation_fraction != defaults.training.validation_fraction;
  if (o->training.task && has_fraction)
    return attn_misuse(command, "--validation is for texts: a task has examples of its own for it");
  if (!o->training.task && (o->training.task_pairs || o->training.task_vocabulary ||
                            o->training.task_power != 0 || o->training.task_zeros))
    return attn_misuse(command, "--pairs, --vocabulary, --power and --zeros need --task");
  if (!o->training.task && !o->data.count)
    return attn_misuse(command, "--data is missing: the text to train on");
  if (!o->training.output)
    return attn_misuse(command, "--out is missing: the directory for the model");
  if (o->config && o->training.model)
    return attn_misuse(command, "--config and --model exclude each other");
  if (o->lora_kind && !o->training.model)
    return attn_misuse(command, "--lora needs --model: the one that is adapted");
  if (!o->lora_kind && says_how_to_adapt(o))
    return attn_misuse(command, "--lora-rank, --lora-alpha, --lora-targets, --lora-trained and "
                                "--lora-merge need --lora");
  if (o->resume && o->fresh) return attn_misuse(command, "--resume and --fresh exclude each other");
  reporter r = {.command = command, .options = o};
  r.terminal = !o->quiet && attn_is_terminal(stderr);
  return train(&r, o);
}

static const char *const save_dtypes[] = {"bfloat16", "float32", "float16", NULL};

#define AT(field) ATTN_FIELD(train_options, field)
#define OF(field) ATTN_FIELD(train_options, training.field)
static const attn_option table[] = {
    {"data", 'd', ATTN_OPTION_WORDS, "PATH...", "The text: files, and directories of files.",
     AT(data), 0, 0, NULL},
    ATTN_TASK_OPTION(OF(task)),
    ATTN_PAIRS_OPTION(OF(task_pairs)),
    ATTN_POWER_OPTION(OF(task_power)),
    ATTN_ZEROS_OPTION(OF(task_zeros)),
    {"vocabulary", 0, ATTN_OPTION_INT, "N", "Of the task; 0: the model's.", OF(task_vocabulary), 0,
     1 << 30, NULL},
    {"out", 'o', ATTN_OPTION_TEXT, "DIR",
     "Directory for the model, its checkpoint and the loss "
     "curve (loss.svg, loss.csv); made if needed.",
     OF(output), 0, 0, NULL},
    {"config", 'c', ATTN_OPTION_TEXT, "FILE",
     "The config.json of a fresh model; without it, a "
     "small one with Lightning Attention.",
     AT(config), 0, 0, NULL},
    {"model", 'm', ATTN_OPTION_TEXT, "DIR", "Train this model further instead of a fresh one.",
     OF(model), 0, 0, NULL},
    {"lora", 0, ATTN_OPTION_NAME, "KIND",
     "Train low-rank adapters of --model alone, whose weights stay as they are", AT(lora_kind), 0,
     0, lora_kinds},
    {"lora-rank", 0, ATTN_OPTION_INT, "R", "Of the adapters.", AT(lora.rank), 1, 1 << 16, NULL},
    {"lora-alpha", 0, ATTN_OPTION_REAL, "A",
     "They are scaled by A / R; those of rslora by A / sqrt(R).", AT(lora.alpha), 1e-9, 1e9, NULL},
    {"lora-targets", 0, ATTN_OPTION_LIST, "NAMES",
     "The matrices that get one, by the ends of their names, e.g. q_proj,mlp.down_proj; all: every "
     "one in a layer. Without it q_proj,k_proj,v_proj,o_proj.",
     AT(lora_targets), 0, 0, NULL},
    {"lora-trained", 0, ATTN_OPTION_LIST, "NAMES",
     "Parameters that are trained themselves besides, e.g. norm.", AT(lora_trained), 0, 0, NULL},
    {"lora-merge", 0, ATTN_OPTION_CHOICE, "WHETHER",
     "Also write the model with the adapters in its weights", AT(lora_merge), 0, 0, merges},
    {"steps", 'n', ATTN_OPTION_INT, "N", "Steps in all.", OF(steps), 1, ATTN_ANY, NULL},
    {"batch", 'b', ATTN_OPTION_INT, "N", "Windows of text in a micro-batch.", OF(batch), 1, 1 << 20,
     NULL},
    {"length", 'l', ATTN_OPTION_INT, "N", "Tokens of a window.", OF(length), 1, 1 << 30, NULL},
    {"accumulation", 0, ATTN_OPTION_INT, "N", "Micro-batches in a step.", OF(accumulation), 1,
     1 << 20, NULL},
    {"learning-rate", 'r', ATTN_OPTION_REAL, "R", "At its peak.", OF(learning_rate), 0, 1e3, NULL},
    {"schedule", 0, ATTN_OPTION_CHOICE, "NAME", "Of the learning rate after the warm-up",
     AT(schedule), 0, 0, schedules},
    {"warmup", 0, ATTN_OPTION_INT, "N",
     "Steps in which the learning rate rises; -1: a twentieth, "
     "at most 500.",
     OF(warmup), -1, ATTN_ANY, NULL},
    {"decay", 0, ATTN_OPTION_INT, "N", "Steps in which it falls at the end (wsd); -1: a fifth.",
     OF(decay), -1, ATTN_ANY, NULL},
    {"final-rate", 0, ATTN_OPTION_REAL, "F", "Fraction of the peak that is left at the end.",
     OF(final_rate), 0, 1, NULL},
    {"weight-decay", 0, ATTN_OPTION_REAL, "W", "Of matrices.", OF(weight_decay), 0, 1e3, NULL},
    {"beta1", 0, ATTN_OPTION_REAL, "B", "Of AdamW.", OF(beta1), 0, 1, NULL},
    {"beta2", 0, ATTN_OPTION_REAL, "B", "Of AdamW.", OF(beta2), 0, 1, NULL},
    {"epsilon", 0, ATTN_OPTION_REAL, "E", "Of AdamW.", OF(epsilon), 0, 1, NULL},
    {"clip", 0, ATTN_OPTION_REAL, "C", "Largest norm of the gradient; 0: any.", OF(clip), 0, 1e9,
     NULL},
    {"validation", 0, ATTN_OPTION_REAL, "F",
     "Fraction of the text, at its end, that is never "
     "trained on.",
     OF(validation_fraction), 0, 0.999, NULL},
    {"validate-every", 0, ATTN_OPTION_INT, "N", "Steps; 0: at the end only.", OF(validation_every),
     0, ATTN_ANY, NULL},
    {"validation-windows", 0, ATTN_OPTION_INT, "N", "Windows of one validation.",
     OF(validation_windows), 1, 1 << 30, NULL},
    {"checkpoint-every", 0, ATTN_OPTION_INT, "N", "Steps; 0: at the end only.",
     OF(checkpoint_every), 0, ATTN_ANY, NULL},
    {"checkpoint-activations", 0, ATTN_OPTION_FLAG, NULL,
     "Keep less and compute it again: less "
     "memory, about a third slower.",
     OF(checkpoint_activations), 0, 0, NULL},
    {"seed", 's', ATTN_OPTION_SEED, "S", "Of fresh weights and the order of the text.", OF(seed), 0,
     0, NULL},
    {"dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the computation", OF(compute), 0, 0,
     attn_compute_dtypes},
    ATTN_DEVICE_OPTION(AT(device)),
    {"save-dtype", 0, ATTN_OPTION_DTYPE, "TYPE", "Of the weights in the model's file",
     OF(save_dtype), 0, 0, save_dtypes},
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"resume", 0, ATTN_OPTION_FLAG, NULL,
     "Continue from the checkpoint in --out; an error if there "
     "is none.",
     AT(resume), 0, 0, NULL},
    {"fresh", 0, ATTN_OPTION_FLAG, NULL, "Begin anew even if there is one.", AT(fresh), 0, 0, NULL},
    {"json", 0, ATTN_OPTION_FLAG, NULL,
     "Print JSON lines on standard output: one a step, and one "
     "at the end.",
     AT(json), 0, 0, NULL},
    {"quiet", 'q', ATTN_OPTION_FLAG, NULL, "No progress.", AT(quiet), 0, 0, NULL},
};

const attn_command attn_command_train = {
    .name = "train",
    .summary = "train a model on a text",
    .usage = "--data PATH... | --task NAME --out DIR",
    .description =
        "Trains a language model on a text, in bytes or in the tokens of the model that it starts "
        "from, and writes config.json and model.safetensors "
        "into DIR, with the loss curve. If DIR has a checkpoint of the same run, training "
        "continues from it, to the same bits as without the interruption.\n\nCtrl-C writes a "
        "checkpoint and stops; a second Ctrl-C stops at once. With --json, each line is an object "
        "with the key \"event\": \"progress\", \"done\" or \"interrupted\".\n\n"
        "With --task, examples are made by a rule instead of taken from a text, and what the model "
        "has to give is said at some positions; `attn eval --task` counts how often it does. "
        "docs/tasks.md describes the tasks.\n\n"
        "With --lora, DIR gets adapter_config.json and adapter_model.safetensors in the format of "
        "PEFT; `attn run MODEL --lora DIR` adds them to the model's weights.",
    .examples =
        "attn train --data book.txt --out runs/mine\tthe small default model\n"
        "attn train --data texts/ --out runs/gdn --config gdn.json --steps 5000\tanother one\n"
        "attn train --data new.txt --model runs/mine --out runs/next -r 2e-4\tfurther\n"
        "attn train --data new.txt --model m --out runs/a --lora dora -r 2e-4\tits adapters alone\n"
        "attn train --task mqar --pairs 8 --length 128 --out runs/recall\tassociative recall",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .run = run,
};
