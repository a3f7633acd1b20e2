/* The network of LMUFormer (arXiv 2402.04882), for whole sequences and for streams: one path, in
 * which only what looks at neighbours in time asks for the stream's state.
 *
 * A centred convolution can give a frame's result when the next frame is there. In a stream it
 * keeps its last two inputs and gives what has become known, perhaps nothing; so each is one frame
 * behind the one before it, until the end, beyond which all is 0. */
#include "base/memory.h"
#include "base/status.h"
#include "models/classifier.h"

#include <math.h>
#include <string.h>

enum { CONVOLUTIONS = ATTN_CLASSIFIER_CONVOLUTIONS, TAPS = ATTN_CLASSIFIER_TAPS };

struct attn_classifier_stream {
  attn_classifier *c;
  attn_tensor tail[CONVOLUTIONS]; /* [2, inputs], wide: the last inputs, */
  int64_t seen[CONVOLUTIONS];     /* of so many */
  attn_tensor *neurons;           /* potentials of each group, wide */
  attn_state **states;            /* of each layer */
  double *sums;                   /* of scores, [classes] */
  int64_t counted;
  bool ended, failed;
};

typedef struct network {
  attn_graph *g;
  const attn_classifier *c;
  attn_layout layout; /* of the rows at this place; none in a stream that is not there yet */
  attn_classifier_stream *stream;
  bool last; /* no frames follow */
  int64_t group;
} network;

/* Neurons ---------------------------------------------------------------------------------------
 */

/* Four in the embedding, two a layer, one before the head. */
int64_t attn_classifier_neurons(const attn_classifier *c) {
  return c->spiking ? CONVOLUTIONS - 1 + 2 * c->layer_count + 1 : 0;
}

int64_t attn_classifier_neuron_width(const attn_classifier *c, int64_t group) {
  int64_t of_layers = group - (CONVOLUTIONS - 1);
  bool down = of_layers >= 0 && of_layers < 2 * c->layer_count && of_layers % 2 == 1;
  return down ? c->width : c->hidden;
}

static attn_var *normalised(const network *n, attn_var *x, const attn_norm_parameters *p) {
  attn_batch_norm norm = {.mean = p->mean, .variance = p->variance, .epsilon = n->c->epsilon};
  return attn_layer_batch_norm(n->g, x, attn_graph_parameter(n->g, p->weight),
                               attn_graph_parameter(n->g, p->bias), &norm, n->g->wide);
}

/* LIF(BN(x)) */
static attn_var *fire(network *n, attn_var *x, const attn_norm_parameters *norm) {
  const attn_mixer_options *o = &n->c->options;
  attn_lif neuron = {.tau = o->spike_tau, .threshold = o->spike_threshold};
  const attn_tensor *past = n->stream ? &n->stream->neurons[n->group] : NULL;
  ++n->group;
  return attn_op_lif(n->g, &n->layout, &neuron, normalised(n, x, norm), n->g->compute, past);
}

/* Convolutions ----------------------------------------------------------------------------------
 */

/* The last rows of `all` become the tail. */
static void keep_tail(const network *n, int i, const attn_tensor *all) {
  attn_tensor *tail = &n->stream->tail[i];
  int64_t kept = all->shape[0] < 2 ? all->shape[0] : 2;
  attn_tensor from, to;
  if (attn_tensor_slice(all, 0, all->shape[0] - kept, kept, &from) == ATTN_OK &&
      attn_tensor_slice(tail, 0, 0, kept, &to) == ATTN_OK)
    attn_add_tensor(n->g, &to, &from, 1, false);
}

/* Of a stream: the inputs of the frames that can be given now, with their neighbours, [rows, inputs
 * 3]; *x are these inputs alone, of which the first `channels` are convolved. NULL where there are
 * none, and no error. */
static attn_var *window(network *n, attn_var **x, int i, int64_t channels) {
  attn_classifier_stream *s = n->stream;
  int64_t kept = s->seen[i] < 2 ? s->seen[i] : 2, fresh = *x ? (*x)->value.shape[0] : 0;
  int64_t total = kept + fresh, first = kept ? kept - 1 : 0;
  int64_t count = total - (n->last ? 0 : 1) - first;
  attn_tensor all, part;
  n->layout = attn_layout_equal(1, count > 0 ? count : 0);
  if (total == 0) return *x = NULL;
  all = attn_graph_tensor(n->g, n->g->wide, 2, (int64_t[]){total, s->tail[i].shape[1]});
  if (!all.data) return *x = NULL;
  if (kept && attn_tensor_slice(&all, 0, 0, kept, &part) == ATTN_OK) {
    attn_tensor tail = s->tail[i];
    tail.shape[0] = kept;
    attn_add_tensor(n->g, &part, &tail, 1, false);
  }
  if (fresh && attn_tensor_slice(&all, 0, kept, fresh, &part) == ATTN_OK)
    attn_add_tensor(n->g, &part, &(*x)->value, 1, false);
  s->seen[i] += fresh;
  keep_tail(n, i, &all);
  if (count <= 0) return *x = NULL;
  attn_layout layout = attn_layout_equal(1, total);
  attn_var *rows = attn_graph_input(n->g, &all);
  *x = attn_view_slice(n->g, rows, 0, first, count);
  attn_var *convolved = attn_view_slice(n->g, rows, 1, 0, channels);
  return attn_view_slice(n->g, attn_op_unfold(n->g, &layout, convolved, TAPS), 0, first, count);
}

/* Convolution i of *x, which in a stream becomes what belongs to the same frames. */
static attn_var *convolve(network *n, attn_var **x, int i) {
  attn_var *columns = n->stream ? window(n, x, i, n->stream->tail[i].shape[1])
                                : attn_op_unfold(n->g, &n->layout, *x, TAPS);
  return attn_op_linear_wide(n->g, columns, n->c->convolution[i]);
}

/* The network -----------------------------------------------------------------------------------
 * Every function passes on that there are no rows, by NULL. */

static attn_var *embed(network *n, attn_var *x) {
  const attn_classifier *c = n->c;
  attn_graph *g = n->g;
  for (int i = 0; i + 1 < CONVOLUTIONS; ++i) {
    bool spikes = c->spiking && i > 0;
    if (spikes && x)
      x = fire(n, x, &c->convolution_norm[i]);
    else if (spikes)
      ++n->group;
    attn_var *y = convolve(n, &x, i);
    if (!c->spiking && y)
      y = normalised(n, attn_op_activate_wide(g, ATTN_RELU, y), &c->convolution_norm[i]);
    x = y;
  }
  /* In a stream what is added waits for its frame too: the sum's operands go side by side. */
  const int last = CONVOLUTIONS - 1;
  if (!c->spiking) {
    attn_var *y = convolve(n, &x, last);
    return y ? attn_op_add(g, y, x) : NULL;
  }
  attn_var *spikes = x ? fire(n, x, &c->convolution_norm[last]) : NULL;
  if (!x) ++n->group;
  if (!n->stream) return attn_op_add(g, convolve(n, &spikes, last), x);
  attn_var *both = x ? attn_op_concatenate(g, spikes, x, g->wide) : NULL;
  attn_var *columns = window(n, &both, last, c->hidden);
  if (!columns) return NULL;
  attn_var *y = attn_op_linear_wide(g, columns, c->convolution[last]);
  return attn_op_add(g, y, attn_view_slice(g, both, 1, c->hidden, c->hidden));
}

/* x W^T + b, wide */
static attn_var *affine(const network *n, attn_var *x, attn_parameter *const p[2]) {
  return attn_op_add_bias(n->g, attn_op_linear_wide(n->g, x, p[0]),
                          attn_graph_parameter(n->g, p[1]));
}

static attn_var *mix(network *n, const attn_classifier_layer *p, int64_t l, attn_var *x) {
  attn_mixer_call call = {.options = &n->c->options,
                          .parameters = (attn_parameter **)(uintptr_t)p->mixer,
                          .layout = n->layout};
  attn_var *in = attn_op_cast(n->g, x, n->g->compute);
  if (n->stream) {
    call.state = n->stream->states[l];
    call.layout.position = attn_state_position(call.state);
  }
  attn_var *y = attn_mixer_apply(n->g, n->c->mixer, &call, in);
  if (call.state && y) attn_state_advance(call.state, n->layout.rows);
  if (!n->c->spiking) y = normalised(n, y, &p->mixer_norm);
  return attn_op_add(n->g, x, y);
}

static attn_var *feed_forward(network *n, const attn_classifier_layer *p, attn_var *x) {
  attn_graph *g = n->g;
  if (n->c->spiking) {
    attn_var *y = affine(n, fire(n, x, &p->up_norm), p->up);
    return attn_op_add(g, x, affine(n, fire(n, y, &p->down_norm), p->down));
  }
  attn_var *y = normalised(n, affine(n, x, p->up), &p->up_norm);
  y = normalised(n, affine(n, attn_op_activate(g, ATTN_GELU, y), p->down), &p->down_norm);
  return attn_op_add(g, x, attn_op_activate_wide(g, ATTN_RELU, y));
}

static attn_var *features(network *n, attn_var *x) {
  x = embed(n, x);
  for (int64_t l = 0; x && l < n->c->layer_count; ++l) {
    const attn_classifier_layer *p = &n->c->layers[l];
    x = feed_forward(n, p, mix(n, p, l, x));
  }
  return x && n->c->spiking ? fire(n, x, &n->c->head_norm) : x;
}

attn_var *attn_classifier_features(attn_graph *graph, const attn_classifier *c,
                                   const attn_layout *layout, attn_var *x) {
  network n = {.g = graph, .c = c, .layout = *layout};
  return x ? features(&n, x) : NULL;
}

attn_var *attn_classifier_scores(attn_graph *graph, const attn_classifier *c,
                                 const attn_layout *layout, attn_var *x) {
  network n = {.g = graph, .c = c, .layout = *layout};
  x = attn_classifier_features(graph, c, layout, x);
  return affine(&n, attn_op_sequence_mean(graph, layout, x), c->head);
}

/* Batches ---------------------------------------------------------------------------------------
 */

static attn_status check_frames(const attn_frames *f) {
  if (!f || !f->values || f->sequences < 1 || f->rows < f->sequences || f->rows > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "frames: %lld rows of %lld sequences, expected values of at least one each",
                     f ? (long long)f->rows : 0, f ? (long long)f->sequences : 0);
  if (!f->offsets && f->rows % f->sequences != 0)
    return attn_fail(ATTN_INVALID_ARGUMENT,
                     "frames: %lld rows are not %lld sequences of one length, and there are no "
                     "offsets",
                     (long long)f->rows, (long long)f->sequences);
  if (!f->offsets) return ATTN_OK;
  bool right = f->offsets[0] == 0 && f->offsets[f->sequences] == f->rows;
  for (int64_t b = 0; right && b < f->sequences; ++b) right = f->offsets[b + 1] > f->offsets[b];
  return right ? ATTN_OK
               : attn_fail(ATTN_INVALID_ARGUMENT, "frames: offsets do not rise from 0 to %lld",
                           (long long)f->rows);
}

attn_var *attn_classifier_input(attn_graph *graph, const attn_classifier *c,
                                const attn_frames *frames, attn_layout *layout) {
  attn_status status = check_frames(frames);
  if (status != ATTN_OK) return attn_graph_error(graph, status);
  *layout = frames->offsets
                ? attn_layout_packed(frames->sequences, frames->offsets)
                : attn_layout_equal(frames->sequences, frames->rows / frames->sequences);
  return attn_graph_host_rows(graph, frames->values, ATTN_F32, frames->rows, c->input);
}

attn_status attn_classifier_run(attn_classifier *c, const attn_frames *frames, float *scores,
                                double *spike_rate) {
  if (!c || !scores)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_run: classifier or scores is NULL");
  attn_layout layout;
  attn_spike_count count = {0};
  attn_graph_reset(c->graph, false);
  c->graph->spikes = spike_rate ? &count : NULL;
  attn_var *x = attn_classifier_input(c->graph, c, frames, &layout);
  attn_var *y = x ? attn_classifier_scores(c->graph, c, &layout, x) : NULL;
  c->graph->spikes = NULL;
  ATTN_TRY(attn_graph_status(c->graph));
  attn_tensor to;
  ATTN_TRY(attn_tensor_wrap(scores, ATTN_F32, 2, y->value.shape, &to));
  if (spike_rate) *spike_rate = count.steps > 0 ? count.fired / count.steps : 0;
  return attn_tensor_copy(&y->value, &to);
}

/* Streams ---------------------------------------------------------------------------------------
 */

static attn_status make_stream(attn_classifier_stream *s) {
  const attn_classifier *c = s->c;
  attn_state_part parts[ATTN_STATE_PARTS];
  attn_dtype wide = c->compute == ATTN_F64 ? ATTN_F64 : ATTN_F32;
  int64_t groups = attn_classifier_neurons(c);
  int count = c->mixer->state(&c->options, c->compute, parts);
  s->neurons = attn_alloc_array((size_t)groups + 1, sizeof *s->neurons);
  s->states = attn_alloc_array((size_t)c->layer_count, sizeof *s->states);
  s->sums = attn_alloc_array((size_t)c->classes, sizeof *s->sums);
  if (!s->neurons || !s->states || !s->sums) return ATTN_OUT_OF_MEMORY;
  for (int i = 0; i < CONVOLUTIONS; ++i) {
    /* The last one of a spiking classifier keeps what is added to its result too. */
    int64_t width = i == 0 ? c->input : c->hidden;
    if (c->spiking && i == CONVOLUTIONS - 1) width *= 2;
    ATTN_TRY(attn_tensor_create(wide, 2, (int64_t[]){2, width}, &s->tail[i]));
  }
  for (int64_t i = 0; i < groups; ++i) {
    int64_t width = attn_classifier_neuron_width(c, i);
    ATTN_TRY(attn_tensor_create(wide, 1, &width, &s->neurons[i]));
  }
  for (int64_t l = 0; l < c->layer_count; ++l)
    ATTN_TRY(attn_state_create((attn_device){0}, parts, count, ATTN_STATE_CAPACITY, 1, NULL,
                               &s->states[l]));
  return ATTN_OK;
}

attn_status attn_classifier_stream_create(attn_classifier *c, attn_classifier_stream **stream) {
  if (!c || !stream)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier_stream_create: an argument is NULL");
  *stream = NULL;
  attn_classifier_stream *s = attn_alloc_zero(sizeof *s);
  if (!s) return ATTN_OUT_OF_MEMORY;
  s->c = c;
  attn_status status = make_stream(s);
  if (status != ATTN_OK) {
    attn_classifier_stream_destroy(s);
    return status;
  }
  attn_classifier_stream_clear(s);
  *stream = s;
  return ATTN_OK;
}

void attn_classifier_stream_destroy(attn_classifier_stream *s) {
  if (!s) return;
  for (int i = 0; i < CONVOLUTIONS; ++i) attn_tensor_destroy(&s->tail[i]);
  for (int64_t i = 0; s->neurons && i < attn_classifier_neurons(s->c); ++i)
    attn_tensor_destroy(&s->neurons[i]);
  for (int64_t l = 0; s->states && l < s->c->layer_count; ++l) attn_state_destroy(s->states[l]);
  attn_free(s->neurons);
  attn_free(s->states);
  attn_free(s->sums);
  attn_free(s);
}

void attn_classifier_stream_clear(attn_classifier_stream *s) {
  memset(s->seen, 0, sizeof s->seen);
  for (int64_t i = 0; i < attn_classifier_neurons(s->c); ++i)
    (void)attn_tensor_fill(&s->neurons[i], 0);
  for (int64_t l = 0; l < s->c->layer_count; ++l) attn_state_clear(s->states[l]);
  memset(s->sums, 0, (size_t)s->c->classes * sizeof *s->sums);
  s->counted = 0;
  s->ended = s->failed = false;
}

static void count_scores(attn_classifier_stream *s, const attn_tensor *scores) {
  for (int64_t r = 0; r < scores->shape[0]; ++r)
    for (int64_t k = 0; k < s->c->classes; ++k)
      s->sums[k] += attn_tensor_get(scores, (int64_t[]){r, k});
  s->counted += scores->shape[0];
}

static attn_status advance(attn_classifier_stream *s, const float *frames, int64_t count,
                           bool last) {
  if (s->ended || s->failed)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier stream: it has %s and was not cleared",
                     s->ended ? "ended" : "failed");
  attn_graph_reset(s->c->graph, false);
  network n = {.g = s->c->graph, .c = s->c, .stream = s, .last = last};
  n.layout = attn_layout_equal(1, count);
  attn_var *x =
      count ? attn_graph_host_rows(s->c->graph, frames, ATTN_F32, count, s->c->input) : NULL;
  x = count && !x ? NULL : features(&n, x);
  if (x) x = affine(&n, x, s->c->head);
  s->failed = attn_graph_status(s->c->graph) != ATTN_OK;
  if (!s->failed && x) count_scores(s, &x->value);
  s->ended = last;
  return attn_graph_status(s->c->graph);
}

attn_status attn_classifier_stream_feed(attn_classifier_stream *s, const float *frames,
                                        int64_t count) {
  if (!s || !frames || count < 1 || count > INT32_MAX)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier stream: %lld frames", (long long)count);
  return advance(s, frames, count, false);
}

attn_status attn_classifier_stream_finish(attn_classifier_stream *s) {
  if (!s || s->seen[0] == 0)
    return attn_fail(ATTN_INVALID_ARGUMENT, "classifier stream: it ends without a frame");
  return advance(s, NULL, 0, true);
}

int64_t attn_classifier_stream_counted(const attn_classifier_stream *s) {
  return s->counted;
}

void attn_classifier_stream_scores(const attn_classifier_stream *s, float *scores) {
  for (int64_t k = 0; k < s->c->classes; ++k)
    scores[k] = s->counted ? (float)(s->sums[k] / (double)s->counted) : 0;
}

double attn_classifier_stream_confidence(const attn_classifier_stream *s, int64_t *best) {
  int64_t greatest = 0;
  double sum = 0, share = s->counted ? 1 / (double)s->counted : 0;
  for (int64_t k = 1; k < s->c->classes; ++k)
    if (s->sums[k] > s->sums[greatest]) greatest = k;
  for (int64_t k = 0; k < s->c->classes; ++k) sum += exp((s->sums[k] - s->sums[greatest]) * share);
  if (best) *best = greatest;
  return 1 / sum;
}
