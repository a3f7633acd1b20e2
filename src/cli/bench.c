/* attn bench: how fast each attention mechanism is on this machine, and what the machine allows. */
#include "cli/bench.h"
#include "base/memory.h"
#include "kernels/peak.h"
#include "tensor/device.h"

#include <math.h>
#include <string.h>

typedef struct bench_options {
  attn_words mixers, passes, dtypes;
  attn_numbers lengths;
  int64_t batch, heads, kv_heads, dim, threads;
  double budget, seconds;
  int path, plan;
  bool layer, efficiency, quiet, demo, json, explain;
  const char *svg, *html, *device;
} bench_options;

enum { PATH_BEST = 0 };
static const char *const paths[] = {"best", "generic", "avx2", "avx512", "amx", NULL};
static const char *const plans[] = {"estimate", "measure", NULL};

/* What is to be measured: all lengths of one series grow together. */
typedef struct bench_series {
  attn_bench_case c;
  double seconds; /* of the last row, and its length; 0 before the first */
  int64_t length;
} bench_series;

enum { MOST_SERIES = 192 };

typedef struct bencher {
  const attn_command *command;
  const bench_options *options;
  bench_series series[MOST_SERIES];
  int series_count;
  attn_bench_report report;
  double start;
  attn_device device;
} bencher;

/* Options ---------------------------------------------------------------------------------------
 */

typedef struct names {
  const char *what;
  const char *(*name)(const void *context, int64_t i);
  int count;
} names;

static const char *mixer_name(const void *context, int64_t i) {
  (void)context;
  return attn_bench_operators[i].name;
}

static const char *pass_name(const void *context, int64_t i) {
  (void)context;
  return attn_bench_passes[i];
}

static const char *dtype_name(const void *context, int64_t i) {
  (void)context;
  return attn_compute_dtypes[i];
}

/* The index of `wanted`, -1 after a message. */
static int find_name(const attn_command *command, const names *among, const char *wanted) {
  char hint[ATTN_HINT_SIZE];
  for (int i = 0; i < among->count; ++i)
    if (strcmp(among->name(NULL, i), wanted) == 0) return i;
  attn_text known = {0};
  for (int i = 0; i < among->count; ++i)
    attn_text_print(&known, "%s%s", i ? ", " : "", among->name(NULL, i));
  attn_misuse(command, "%s '%s' is unknown; there are %s%s", among->what, wanted,
              known.failed ? "others" : known.data,
              attn_close_names(wanted, among->name, NULL, among->count, hint));
  attn_text_free(&known);
  return -1;
}

static bool add_series(bencher *b, int mixer, int pass, int dtype) {
  const bench_options *o = b->options;
  if (attn_bench_operators[mixer].layer && !o->layer) {
    attn_misuse(b->command, "%s is measured as a layer: --layer", attn_bench_operators[mixer].name);
    return false;
  }
  if (b->series_count == MOST_SERIES) {
    attn_misuse(b->command, "more than %d combinations of mixers, passes and dtypes", MOST_SERIES);
    return false;
  }
  attn_bench_case *c = &b->series[b->series_count++].c;
  c->op = &attn_bench_operators[mixer];
  c->pass = (attn_bench_pass)pass;
  attn_dtype_parse(attn_compute_dtypes[dtype], &c->dtype);
  c->planning = o->plan ? ATTN_PLAN_MEASURE : ATTN_PLAN_ESTIMATE;
  c->batch = o->batch;
  c->heads = o->heads;
  c->kv_heads = o->kv_heads ? o->kv_heads : o->heads;
  c->dim = o->dim;
  c->device = b->device;
  return true;
}

/* The word "all" stands for every mixer that there is an operator of, or a layer. */
static bool collect(bencher *b) {
  const bench_options *o = b->options;
  const names mixers = {"mixer", mixer_name, attn_bench_layer_count};
  const names passes = {"pass", pass_name, 3}, dtypes = {"dtype", dtype_name, 3};
  bool all = o->mixers.count == 1 && strcmp(o->mixers.items[0], "all") == 0;
  int every = o->layer ? attn_bench_layer_count : attn_bench_operator_count;
  int mixer_count = all ? every : o->mixers.count;
  for (int p = 0; p < o->passes.count; ++p)
    for (int d = 0; d < o->dtypes.count; ++d)
      for (int m = 0; m < mixer_count; ++m) {
        int mixer = all ? m : find_name(b->command, &mixers, o->mixers.items[m]);
        int pass = mixer < 0 ? -1 : find_name(b->command, &passes, o->passes.items[p]);
        int dtype = pass < 0 ? -1 : find_name(b->command, &dtypes, o->dtypes.items[d]);
        if (dtype < 0 || !add_series(b, mixer, pass, dtype)) return false;
      }
  return true;
}

/* Rows ------------------------------------------------------------------------------------------
 */

/* Seconds of one execution at `length`, from the row before; 0 when unknown. */
static double expected_seconds(const bench_series *s, int64_t length) {
  double ratio = s->length ? (double)length / (double)s->length : 0;
  bool quadratic = !s->c.op->recurrent && s->c.pass != ATTN_BENCH_STEP;
  return s->seconds * ratio * (quadratic ? ratio : 1);
}

/* The rates of arithmetic around a row: the mean of before and after; of moments in which nobody
 * disturbs, the better. */
static attn_bench_limits around(const attn_bench_limits *before, const attn_bench_limits *after,
                                bool quiet) {
  attn_bench_limits l = *after;
  if (quiet) return l; /* never less than before: attn_bench_measure_rates */
  l.bf16_flops = 0.5 * (before->bf16_flops + after->bf16_flops);
  l.f32_flops = 0.5 * (before->f32_flops + after->f32_flops);
  return l;
}

static attn_status measure_row(bencher *b, bench_series *s, int64_t length, int rows_left) {
  const double least = 0.05;
  const double executions = 3; /* the check, what a backward needs before it, one timed */
  double left = b->options->budget - (attn_now() - b->start);
  if (left <= 0 || expected_seconds(s, length) * executions > left) {
    ++b->report.skipped;
    return ATTN_OK;
  }
  attn_bench_row *row = &b->report.rows[b->report.count];
  s->c.length = length;
  bool quiet = b->options->quiet;
  attn_bench_effort effort = {fmin(b->options->seconds, fmax(least, left / rows_left / 2)), quiet};
  attn_status (*measure)(const attn_bench_case *, const attn_bench_limits *,
                         const attn_bench_effort *, attn_bench_row *) =
      b->options->layer ? attn_bench_measure_layer : attn_bench_measure;
  /* Processors change their clock: the limit is taken where the row is. */
  attn_bench_limits before = b->report.limits, after;
  bool on_gpu = attn_is_cuda(b->device); /* whose rates take longer, and stay */
  if (!on_gpu) attn_bench_measure_rates(&before, quiet);
  ATTN_TRY(measure(&s->c, &before, &effort, row));
  after = before;
  if (!on_gpu) attn_bench_measure_rates(&after, quiet);
  attn_bench_limits limits = around(&before, &after, quiet);
  attn_bench_rate(row, &limits);
  s->seconds = row->seconds;
  s->length = length;
  ++b->report.count;
  if (!b->options->json) attn_bench_print_row(row, b->options->explain);
  return ATTN_OK;
}

static attn_status measure_rows(bencher *b) {
  const attn_numbers *lengths = &b->options->lengths;
  int rows = lengths->count * b->series_count, done = 0;
  b->report.rows = attn_alloc_array((size_t)rows, sizeof *b->report.rows);
  if (!b->report.rows) return ATTN_OUT_OF_MEMORY;
  for (int l = 0; l < lengths->count; ++l)
    for (int s = 0; s < b->series_count; ++s, ++done) {
      if (attn_interrupted) return attn_fail(ATTN_INTERRUPTED, "interrupted");
      ATTN_TRY(measure_row(b, &b->series[s], lengths->items[l], rows - done));
    }
  return ATTN_OK;
}

static attn_status measure_limits(bencher *b) {
  attn_bench_limits *limits = &b->report.limits;
  if (attn_is_cuda(b->device)) return attn_bench_measure_gpu(b->device, limits);
  limits->copy_bytes = attn_kernels_copy_bandwidth(attn_get_threads());
  attn_bench_measure_rates(limits, b->options->quiet);
  return limits->copy_bytes > 0 ? ATTN_OK : ATTN_OUT_OF_MEMORY;
}

static attn_status measure(bencher *b) {
  const bench_options *o = b->options;
  attn_kernel_path path;
  ATTN_TRY(attn_set_threads((int)o->threads));
  if (o->path != PATH_BEST) {
    path = (attn_kernel_path)(o->path - 1);
    ATTN_TRY(attn_set_kernel_path(path));
  }
  b->report.layer = o->layer;
  b->report.device = b->device;
  ATTN_TRY(measure_limits(b));
  if (!o->json) attn_bench_print_heading(&b->report);
  ATTN_TRY(measure_rows(b));
  return o->plan ? attn_wisdom_save() : ATTN_OK;
}

static const char moral[] =
    "Exact attention compares each token with all before it: the longer the text, the fewer tokens "
    "a second. Lightning Attention keeps what it has read in a state of fixed size: its speed does "
    "not depend on the length.";

static attn_status show(const bencher *b) {
  const bench_options *o = b->options;
  if (b->report.skipped && !o->json)
    printf("%d rows left out: they would take longer than the budget of %g s (--budget)\n",
           b->report.skipped, o->budget);
  if (!o->json && o->efficiency) attn_bench_print_lengths(&b->report);
  if (!o->json) ATTN_TRY(attn_bench_print_chart(&b->report));
  if (o->svg) ATTN_TRY(attn_bench_write_svg(&b->report, o->svg));
  if (o->html) ATTN_TRY(attn_bench_write_html(&b->report, o->html));
  if (o->json || !o->demo) return ATTN_OK;
  attn_text text = {0};
  attn_text_print(&text, "\n");
  attn_text_wrap(&text, moral, 0, 0);
  if (o->svg) attn_text_print(&text, "The chart is also in %s.\n", o->svg);
  if (!text.failed) fputs(text.data, stdout);
  attn_text_free(&text);
  return ATTN_OK;
}

static const bench_options defaults = {
    .mixers = {{"softmax", "lightning"}, 2},
    .passes = {{"forward"}, 1},
    .dtypes = {{"bfloat16"}, 1},
    .lengths = {{1 << 10, 1 << 11, 1 << 12, 1 << 13, 1 << 14, 1 << 15, 1 << 16}, 7},
    .batch = 1,
    .heads = 8,
    .dim = 128,
    .budget = 60,
    .seconds = 2,
    .device = "cpu",
};

/* What an efficiency length needs: layers, exact attention among them, and, if none are given,
 * CAB's lengths. */
static int prepare_efficiency(const attn_command *command, bench_options *o) {
  static const attn_numbers lengths = {{256, 512, 1 << 10, 1 << 11, 1 << 12, 1 << 13}, 6};
  attn_words *m = &o->mixers;
  bool has_exact = false;
  for (int i = 0; i < m->count; ++i)
    has_exact |= strcmp(m->items[i], "softmax") == 0 || strcmp(m->items[i], "all") == 0;
  for (int i = 0; i < o->passes.count; ++i)
    if (strcmp(o->passes.items[i], attn_bench_passes[ATTN_BENCH_STEP]) == 0)
      return attn_misuse(command, "--efficiency-length is of whole sequences, not of a step");
  if (!has_exact && m->count < ATTN_MOST_WORDS) {
    memmove(m->items + 1, m->items, (size_t)m->count * sizeof *m->items);
    m->items[0] = "softmax";
    ++m->count;
  }
  if (memcmp(&o->lengths, &defaults.lengths, sizeof o->lengths) == 0) o->lengths = lengths;
  o->layer = true;
  return ATTN_EXIT_OK;
}

static int run(const attn_command *command, void *options, const attn_words *words) {
  bench_options *o = options;
  if (o->efficiency && prepare_efficiency(command, o) != ATTN_EXIT_OK) return ATTN_EXIT_USAGE;
  bencher b = {.command = command, .options = o, .start = attn_now()};
  (void)words;
  if (o->kv_heads && o->heads % o->kv_heads)
    return attn_misuse(command, "--heads %lld is not a multiple of --kv-heads %lld",
                       (long long)o->heads, (long long)o->kv_heads);
  if (attn_device_parse(o->device, &b.device) != ATTN_OK)
    return attn_report(command, ATTN_UNSUPPORTED);
  const char *of_cpu = o->path != PATH_BEST ? "--path"
                       : o->plan            ? "--plan"
                       : o->quiet           ? "--quiet"
                                            : NULL;
  if (attn_is_cuda(b.device) && of_cpu)
    return attn_misuse(command, "%s is for the processor; a GPU's plan chooses by itself", of_cpu);
  if (!collect(&b)) return ATTN_EXIT_USAGE;
  attn_catch_interrupts();
  attn_status status = measure(&b), shown = ATTN_OK;
  bool stopped = status == ATTN_INTERRUPTED;
  int code = ATTN_EXIT_OK;
  if (status == ATTN_OK || (stopped && b.report.count)) shown = show(&b);
  if (status != ATTN_OK && !stopped)
    code = attn_report(command, status);
  else if (shown != ATTN_OK)
    code = attn_report(command, shown);
  if (o->json && (status == ATTN_OK || stopped)) {
    json_t *all = attn_bench_json(&b.report);
    if (o->efficiency)
      json_object_set_new(all, "efficiency_lengths", attn_bench_lengths_json(&b.report));
    int printed = attn_print_json(command, all, false);
    if (code == ATTN_EXIT_OK) code = printed;
  }
  attn_free(b.report.rows);
  return stopped && code == ATTN_EXIT_OK ? ATTN_EXIT_INTERRUPTED : code;
}

#define AT(field) ATTN_FIELD(bench_options, field)
static const attn_option table[] = {
    {"mixer", 'm', ATTN_OPTION_LIST, "NAMES",
     "Mixers with commas between them, or all. Some are measured with --layer only.", AT(mixers), 0,
     0, NULL},
    {"pass", 'p', ATTN_OPTION_LIST, "NAMES",
     "forward, backward, and step: one more token behind "
     "the others.",
     AT(passes), 0, 0, NULL},
    {"lengths", 'l', ATTN_OPTION_NUMBERS, "N,...", "Tokens, shortest first.", AT(lengths), 1,
     1LL << 32, NULL},
    {"dtype", 0, ATTN_OPTION_LIST, "NAMES", "bfloat16, float32, float64.", AT(dtypes), 0, 0, NULL},
    {"batch", 'b', ATTN_OPTION_INT, "N", "Sequences.", AT(batch), 1, 1 << 20, NULL},
    {"heads", 0, ATTN_OPTION_INT, "N", "Heads.", AT(heads), 1, 1 << 14, NULL},
    {"kv-heads", 0, ATTN_OPTION_INT, "N",
     "Heads of keys and values, where a mixer has fewer of them; 0: as many.", AT(kv_heads), 0,
     1 << 14, NULL},
    {"dim", 0, ATTN_OPTION_INT, "D", "Dimension of a head.", AT(dim), 1, 256, NULL},
    {"budget", 0, ATTN_OPTION_REAL, "SECONDS",
     "Time for everything; rows that would take longer "
     "are left out.",
     AT(budget), 0.1, 1e9, NULL},
    {"seconds", 0, ATTN_OPTION_REAL, "SECONDS", "At most so long for a row, but for one execution.",
     AT(seconds), 1e-3, 1e9, NULL},
    {"path", 0, ATTN_OPTION_CHOICE, "NAME", "Kernels", AT(path), 0, 0, paths},
    {"plan", 0, ATTN_OPTION_CHOICE, "HOW",
     "Plans from a model of the machine, or from "
     "measurements, which are remembered",
     AT(plan), 0, 0, plans},
    {"device", 0, ATTN_OPTION_TEXT, "DEVICE", "What is measured: cpu, cuda, cuda:N or auto.",
     AT(device), 0, 0, NULL},
    {"threads", 0, ATTN_OPTION_INT, "N", "Threads; 0: as many as there are processors.",
     AT(threads), 0, 4096, NULL},
    {"layer", 0, ATTN_OPTION_FLAG, NULL, "The whole layer: norm, projections, gates and operator.",
     AT(layer), 0, 0, NULL},
    {"efficiency-length", 0, ATTN_OPTION_FLAG, NULL,
     "Of whole layers: from how many tokens on each is cheaper than exact attention, in time and "
     "in "
     "memory (CAB, arXiv 2210.07661); --lengths are 256 to 8K unless given.",
     AT(efficiency), 0, 0, NULL},
    {"quiet", 0, ATTN_OPTION_FLAG, NULL,
     "On a machine that others share: run on its quietest processors, bound there, and let only "
     "executions count during which they were left alone. Takes longer.",
     AT(quiet), 0, 0, NULL},
    {"demo", 0, ATTN_OPTION_FLAG, NULL, "Say what the chart shows.", AT(demo), 0, 0, NULL},
    {"json", 0, ATTN_OPTION_FLAG, NULL, "Print a JSON object.", AT(json), 0, 0, NULL},
    {"svg", 0, ATTN_OPTION_TEXT, "FILE", "Write the chart.", AT(svg), 0, 0, NULL},
    {"html", 0, ATTN_OPTION_TEXT, "FILE", "Write a page with chart and table.", AT(html), 0, 0,
     NULL},
    {"explain", 0, ATTN_OPTION_FLAG, NULL, "Print the plan of each row.", AT(explain), 0, 0, NULL},
};

const attn_command attn_command_bench = {
    .name = "bench",
    .summary = "measure attention mechanisms and the machine's limits",
    .usage = "",
    .description =
        "Times the operator of each mixer (queries, keys, values and gates are projected already) "
        "at several lengths, beside two limits that it measures itself: the rate of "
        "multiply-adds (before and after each row, as clocks change), and of copying memory. "
        "Before a row is timed its result is compared with "
        "the float64 engine; a wrong one ends the run with exit code 1.\n\nThe table: median time "
        "of an execution, tokens a second, memory beside inputs and outputs, floating-point "
        "operations a second, and the fractions of the two limits. Inputs rotate among buffers "
        "larger than the caches.",
    .examples = "attn bench\texact attention and Lightning from 1K to 64K tokens, with a chart\n"
                "attn bench --mixer all --pass forward,backward,step --lengths 4K\tall mixers\n"
                "attn bench --layer --mixer all --lengths 4K\twith norms and projections\n"
                "attn bench --efficiency-length --mixer all --batch 4 --dim 64\tagainst exact "
                "attention, as "
                "CAB has it\n"
                "attn bench --mixer softmax --dtype float32 --dim 64 --json\tfor programs",
    .options = table,
    .option_count = ATTN_COUNT(table),
    .defaults = &defaults,
    .size = sizeof defaults,
    .run = run,
};
