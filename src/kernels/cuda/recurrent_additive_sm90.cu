/* The recurrent engine's additive update on Hopper's matrix units, for no decay, a constant decay
 * per head (Lightning Attention-2, arXiv 2401.04658), a decay per token and head (Mamba-2, arXiv
 * 2405.21060) and one per token and channel (GLA, arXiv 2312.06635):
 *
 *   S_t = alpha_t S_{t-1} + k_t v_t^T,   o_t = scale S_t^T q_t.
 *
 * One kernel, `scan` (recurrent_additive_scan.cuh), does it. The backward pass is runs of it, some
 * of them backwards in time (`reverse`):
 *
 *   dQ: dO for Q, V for K, K for V;   dV: K for Q, Q for K, dO for V, reversed;
 *   dK: V for Q, dO for K, Q for V, reversed.
 *
 * dK and dV share their state and all of their operands, so one launch finds both where dim and
 * value_dim are equal. */
#include "kernels/cuda/recurrent_additive_channel.cuh"
#include "kernels/cuda/recurrent_additive_decay.cuh"
#include "kernels/cuda/recurrent_additive_scan.cuh"

#include <cmath>
#include <cstdio>
#include <cstring>

using namespace additive;

namespace {

/* out[token, head] = the sum over the group of parts[token, head * group + ...]: gradients of
 * queries and keys that several value heads share. */
template <typename T>
__global__ void sum_groups(const void *parts, void *out, int64_t tokens, int64_t length, int heads,
                           int group, int dim, int64_t out_batch, int64_t out_token,
                           int64_t out_head) {
  const int words = dim / 2;
  int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= tokens * heads * words) return;
  int word = (int)(i % words), head = (int)(i / words % heads);
  int64_t token = i / words / heads;
  const uint32_t *part = (const uint32_t *)parts + (token * heads + head) * group * words + word;
  float2 sum = make_float2(0, 0);
  for (int g = 0; g < group; g++) {
    float2 pair = element<T>::unpack(part[g * words]);
    sum.x += pair.x, sum.y += pair.y;
  }
  T *row = (T *)out + token / length * out_batch + token % length * out_token + head * out_head;
  *(uint32_t *)(row + 2 * word) = element<T>::pack(sum.x, sum.y);
}

/* choice->values */
enum { SEGMENTS, SEGMENT_CHUNKS, PARTS, PART_CHUNKS, MULTIPROCESSORS };

/* [batch, length, heads, columns], or [1, total, heads, columns] when ragged. */
struct operand {
  const void *data;
  int64_t batch, token, head; /* strides */
  int64_t heads, columns;
};

operand operand_of(const attn_recurrent_problem *problem, const attn_tensor *t) {
  int first = problem->ragged ? 0 : 1;
  return operand{t->data,
                 problem->ragged ? 0 : t->stride[0],
                 t->stride[first],
                 t->stride[first + 1],
                 t->shape[first + 1],
                 t->shape[first + 2]};
}

bool operand_suits(const attn_recurrent_problem *problem, const attn_tensor *t) {
  if (!t->data) return true;
  if (problem->ragged && !t->shape[0]) return false; /* no tensor map is empty */
  operand x = operand_of(problem, t);
  int64_t tokens = problem->ragged ? t->shape[0] : problem->length;
  return map_possible(x.data, x.heads, tokens, problem->ragged ? 1 : problem->batch, x.head,
                      x.token, x.batch);
}

state_view view_of(const attn_tensor *t, bool transposed, double scale) {
  if (!t->data) return state_view{};
  return state_view{(float *)t->data,
                    t->stride[0],
                    t->stride[1],
                    transposed ? 1 : t->stride[2],
                    transposed ? t->stride[2] : 1,
                    (float)scale};
}

/* Queries, keys, values and results of one run of the scan, in the roles that they play in it; w
 * and d_w where it finds the gradients of keys and values together. */
struct scan_operands {
  operand q, k, v, o;
  state_view initial, final;
  bool reverse;
  operand w, d_w;
  operand partner; /* and the products with it, if they are wanted */
  float *products;
  operand weights; /* with a decay per channel, which also overwrites q and k */
  float *factors;
  uint8_t *sizes;
};

size_t align(size_t bytes) {
  return (bytes + 255) / 256 * 256;
}

/* Where the segments' states lie in the workspace, in bytes from its start. */
struct segments_layout {
  size_t added, totals, bytes;
};

segments_layout segments_layout_of(const attn_recurrent_problem *problem,
                                   const attn_cuda_choice *choice) {
  const int64_t slots = problem->batch * problem->value_heads * choice->values[SEGMENTS];
  const int64_t size = problem->dim * problem->value_dim;
  int64_t parts = slots * choice->values[PARTS];
  segments_layout layout = {};
  if (choice->values[SEGMENTS] < 2) return layout;
  layout.added = align((size_t)(slots * size) * sizeof(float));
  layout.totals = layout.added + align((size_t)(parts * size) * sizeof(float));
  if (problem->decay == ATTN_DECAY_CHANNEL) parts *= problem->dim;
  layout.bytes = layout.totals + align((size_t)parts * sizeof(float));
  return layout;
}

template <typename T, scan_kind KIND, int DK, int DV, bool CHANNEL>
attn_status launch(const attn_cuda_choice *choice, const scan_parameters &p, cudaStream_t stream) {
  typedef shape<KIND, DK, DV, CHANNEL> S;
  int items = p.batch * p.heads * (KIND == STATES ? (p.segments - 1) * p.parts : p.segments);
  int most = (int)choice->values[MULTIPROCESSORS] * S::blocks;
  ATTN_CUDA_TRY(cudaFuncSetAttribute(scan<T, KIND, DK, DV, CHANNEL>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes));
  const int grid = items < most ? items : most;
  scan<T, KIND, DK, DV, CHANNEL><<<grid, S::threads, S::bytes, stream>>>(p);
  ATTN_CUDA_TRY_LAUNCH("scan");
  return ATTN_OK;
}

template <typename T, int DK, int DV, bool CHANNEL>
attn_status scan_launch(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                        const attn_recurrent_args *args, const scan_operands &x, void *workspace,
                        cudaStream_t stream) {
  scan_parameters p;
  memset(&p, 0, sizeof p);
  int64_t tokens = problem->ragged ? args->q.shape[0] : problem->length;
  int64_t batch = problem->ragged ? 1 : problem->batch;
  const struct {
    CUtensorMap *map;
    const operand *tensor;
  } maps[] = {{&p.q, &x.q},
              {&p.k, &x.k},
              {&p.v, &x.v},
              {&p.o, &x.o},
              {&p.w, &x.w},
              {&p.d_w, &x.d_w},
              {&p.weights, &x.weights}};
  for (const auto &entry : maps) {
    const operand *t = entry.tensor;
    if (t->data && !map_encode(entry.map, element<T>::map_type, t->data, t->columns, t->heads,
                               tokens, batch, t->head, t->token, t->batch))
      return attn_cuda_fail(ATTN_INTERNAL,
                            "recurrent: the driver refuses a tensor map of [%lld, %lld, %lld, "
                            "%lld]",
                            (long long)batch, (long long)tokens, (long long)t->heads,
                            (long long)t->columns);
  }
  p.out = scan_output{(void *)x.o.data, x.o.batch, x.o.token, x.o.head};
  p.d_w_out = scan_output{(void *)x.d_w.data, x.d_w.batch, x.d_w.token, x.d_w.head};
  p.q_group = (int)(problem->value_heads / x.q.heads);
  p.k_group = (int)(problem->value_heads / x.k.heads);
  p.v_group = (int)(problem->value_heads / x.v.heads);
  p.offsets = problem->ragged ? args->offsets : NULL;
  p.batch = (int)problem->batch;
  p.heads = (int)problem->value_heads;
  p.length = (int)problem->length;
  p.decay_kind = problem->decay;
  p.decay = (const float *)args->decay.data;
  if (problem->decay == ATTN_DECAY_HEAD) {
    p.decay_head = args->decay.stride[0];
  } else if (problem->decay == ATTN_DECAY_TOKEN) {
    int first = problem->ragged ? 0 : 1;
    p.decay_batch = problem->ragged ? 0 : args->decay.stride[0];
    p.decay_token = args->decay.stride[first];
    p.decay_head = args->decay.stride[first + 1];
  }
  p.initial = x.initial;
  p.final = x.final;
  if (x.products) {
    p.products = x.products;
    p.products_stride = batch * tokens * problem->value_heads;
    p.partner = x.partner.data;
    p.partner_step = strides{x.partner.batch, x.partner.token, x.partner.head};
    p.partner_group = (int)(problem->value_heads / x.partner.heads);
  }
  if (CHANNEL) {
    const int first = problem->ragged ? 0 : 1;
    p.decay_step = strides{problem->ragged ? 0 : args->decay.stride[0], args->decay.stride[first],
                           args->decay.stride[first + 1]};
    p.factors = x.factors;
    p.sizes = x.sizes;
  }
  p.segments = (int)choice->values[SEGMENTS];
  p.segment_chunks = (int)choice->values[SEGMENT_CHUNKS];
  p.reverse = x.reverse;
  p.parts = (int)choice->values[PARTS];
  p.part_chunks = (int)choice->values[PART_CHUNKS];
  p.log2_scale = (float)log2(problem->scale);

  if constexpr (CHANNEL) {
    const operand q = operand_of(problem, &args->q), k = operand_of(problem, &args->k);
    const channel_parameters operands = {q.data,
                                         k.data,
                                         {q.batch, q.token, q.head},
                                         {k.batch, k.token, k.head},
                                         p.decay_step,
                                         (int)(problem->value_heads / q.heads),
                                         p.decay,
                                         (void *)x.q.data,
                                         (void *)x.k.data,
                                         (void *)x.weights.data,
                                         x.factors,
                                         x.sizes};
    const dim3 grid((unsigned)((problem->length + CHUNK - 1) / CHUNK), p.heads, p.batch);
    const int bytes = channel_tiles<DK>::BYTES;
    ATTN_CUDA_TRY(cudaFuncSetAttribute(channel_operands<T, DK>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
    channel_operands<T, DK><<<grid, 256, bytes, stream>>>(p, operands);
    ATTN_CUDA_TRY_LAUNCH("channel_operands");
  }
  int pairs = p.batch * p.heads;
  if (p.segments > 1) {
    const segments_layout layout = segments_layout_of(problem, choice);
    p.states = (float *)workspace;
    p.added = (float *)((char *)workspace + layout.added);
    p.totals = (float *)((char *)workspace + layout.totals);
    attn_status status = launch<T, STATES, DK, DV, CHANNEL>(choice, p, stream);
    if (status != ATTN_OK) return status;
    chain_segments<DK, DV, CHANNEL><<<dim3(DK * DV / 4 / 256, pairs), 256, 0, stream>>>(p);
    ATTN_CUDA_TRY_LAUNCH("chain_segments");
  }
  if constexpr (DK == DV && !CHANNEL)
    if (x.w.data) return launch<T, GRADIENTS, DK, DV, CHANNEL>(choice, p, stream);
  return launch<T, OUTPUTS, DK, DV, CHANNEL>(choice, p, stream);
}

attn_status scan_run(const attn_cuda_choice *choice, const attn_recurrent_problem *problem,
                     const attn_recurrent_args *args, const scan_operands &x, void *workspace,
                     cudaStream_t stream) {
  const bool bf16 = problem->dtype == ATTN_BF16;
  const bool channel = problem->decay == ATTN_DECAY_CHANNEL;
#define CASE(dk, dv)                                                                               \
  if (!channel && x.q.columns == dk && x.v.columns == dv)                                          \
    return bf16 ? scan_launch<__nv_bfloat16, dk, dv, false>(choice, problem, args, x, workspace,   \
                                                            stream)                                \
                : scan_launch<__half, dk, dv, false>(choice, problem, args, x, workspace, stream);
#define CASE_CHANNEL(dk, dv)                                                                       \
  if (channel && x.q.columns == dk && x.v.columns == dv)                                           \
    return scan_launch<__nv_bfloat16, dk, dv, true>(choice, problem, args, x, workspace, stream);
  CASE_CHANNEL(128, 128)
  CASE_CHANNEL(64, 64)
#undef CASE_CHANNEL
  CASE(128, 128)
  CASE(64, 64)
  CASE(128, 64)
  CASE(64, 128)
#undef CASE
  return attn_cuda_fail(ATTN_INTERNAL, "recurrent: no scan of dim %lld and value_dim %lld",
                        (long long)x.q.columns, (long long)x.v.columns);
}

/* Segments of a sequence, from a model in units of one chunk's time in a block. Blocks go round by
 * round over their items, each of which costs some chunks' time to begin; a chunk costs about half
 * as much in the pass that finds the segments' states. With a constant decay few of them count. */
void choose_segments(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                     attn_cuda_choice *choice) {
  const double ITEM = 2, STATE_CHUNK = 0.5, STATE_ITEM = 6, LAUNCHES = 6;
  const int64_t LEAST_CHUNKS = 8, MOST_SEGMENTS = 64, HEAD_CHUNKS = 24, MOST_PARTS = 16;
  int64_t chunks = (problem->length + CHUNK - 1) / CHUNK;
  int64_t pairs = problem->batch * problem->value_heads;
  int64_t slots = device->multiprocessors * (problem->value_dim == 64 ? 2 : 1);
  double best = 0;
  for (int64_t segments = 1; segments <= MOST_SEGMENTS; segments++) {
    int64_t length = (chunks + segments - 1) / segments;
    if (segments > 1 && (length < LEAST_CHUNKS || (chunks + length - 1) / length != segments))
      continue;
    int64_t rounds = (pairs * segments + slots - 1) / slots;
    double cost = (double)rounds * ((double)length + ITEM);
    if (segments > 1) {
      bool few = problem->decay == ATTN_DECAY_HEAD && length > HEAD_CHUNKS;
      int64_t read = pairs * (segments - 1) * (few ? HEAD_CHUNKS : length);
      cost += LAUNCHES + STATE_CHUNK * (double)read / (double)slots;
      cost += (double)(pairs * segments) / (double)slots; /* states written, chained and read */
    }
    if (segments > 1 && cost >= best) continue;
    best = cost;
    choice->values[SEGMENTS] = segments;
    choice->values[SEGMENT_CHUNKS] = length > 0 ? length : 1;
  }
  /* Parts of segments, small where most are skipped; otherwise few, since each writes a state. */
  const int64_t length = choice->values[SEGMENT_CHUNKS];
  int64_t most = (length + LEAST_CHUNKS - 1) / LEAST_CHUNKS;
  if (most > MOST_PARTS) most = MOST_PARTS;
  for (int64_t parts = problem->decay == ATTN_DECAY_HEAD ? most : 1; parts <= most; parts++) {
    int64_t part = (length + parts - 1) / parts;
    int64_t rounds = ((choice->values[SEGMENTS] - 1) * pairs * parts + slots - 1) / slots;
    double cost = (double)rounds * ((double)part + STATE_ITEM);
    if (choice->values[PARTS] && cost >= best) continue;
    best = cost;
    choice->values[PARTS] = (length + part - 1) / part;
    choice->values[PART_CHUNKS] = part;
  }
  choice->values[MULTIPROCESSORS] = device->multiprocessors;
}

bool plan_any(const attn_cuda_device *device, const attn_recurrent_problem *problem) {
  return device->major == 9 && device->minor == 0 && problem->update == ATTN_UPDATE_ADDITIVE &&
         !problem->normalise && (problem->dtype == ATTN_BF16 || problem->dtype == ATTN_F16) &&
         (problem->dim == 64 || problem->dim == 128) &&
         (problem->value_dim == 64 || problem->value_dim == 128) && problem->scale > 0 &&
         problem->length >= 2 * CHUNK && problem->length < (int64_t)1 << 30 &&
         problem->batch * problem->value_heads < (int64_t)1 << 24;
}

/* Where a decay per channel keeps its operands, in bytes from the workspace's start. */
struct channel_layout {
  size_t q, k, weights, factors, sizes, bytes;
};

channel_layout channel_layout_of(const attn_recurrent_problem *problem,
                                 const attn_cuda_choice *choice) {
  const size_t rows = (size_t)(problem->batch * problem->length * problem->value_heads);
  const size_t chunks = (size_t)((problem->batch * problem->length / CHUNK + problem->batch + 1) *
                                 problem->value_heads);
  channel_layout layout;
  layout.q = segments_layout_of(problem, choice).bytes;
  layout.k = layout.q + align(rows * problem->dim * 2);
  layout.weights = layout.k + align(rows * problem->dim * 2);
  layout.factors = layout.weights + align(rows * CHUNK * 2);
  layout.sizes = layout.factors + align(chunks * problem->dim * sizeof(float));
  layout.bytes = layout.sizes + align(chunks);
  return layout;
}

bool plan_forward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                  attn_cuda_choice *choice) {
  if (!plan_any(device, problem)) return false;
  const bool channel = problem->decay == ATTN_DECAY_CHANNEL;
  /* float16 has too few exponents for the operands. */
  if (channel && (problem->dtype != ATTN_BF16 || problem->dim != problem->value_dim)) return false;
  if (channel && (problem->batch > 65535 || problem->value_heads > 65535)) return false;
  choose_segments(device, problem, choice);
  choice->workspace_bytes = channel ? channel_layout_of(problem, choice).bytes
                                    : segments_layout_of(problem, choice).bytes;
  snprintf(choice->description, sizeof choice->description,
           "additive, wgmma, chunks of %d, %lld segments of %lld chunks in %lld parts", CHUNK,
           (long long)choice->values[SEGMENTS], (long long)choice->values[SEGMENT_CHUNKS],
           (long long)choice->values[PARTS]);
  return true;
}

/* Pairs of channels are read at once. */
bool decay_suits(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  if (problem->decay != ATTN_DECAY_CHANNEL) return true;
  bool even = (uintptr_t)args->decay.data % 8 == 0;
  for (int i = 0; i < args->decay.rank - 1; i++)
    even = even && (args->decay.shape[i] == 1 || args->decay.stride[i] % 2 == 0);
  return even;
}

bool suits_forward(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  return operand_suits(problem, &args->q) && operand_suits(problem, &args->k) &&
         operand_suits(problem, &args->v) && operand_suits(problem, &args->o) &&
         decay_suits(problem, args);
}

attn_status run_forward(const attn_cuda_device *, const attn_cuda_choice *choice,
                        const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                        void *workspace, cudaStream_t stream) {
  scan_operands x = {};
  x.q = operand_of(problem, &args->q);
  x.k = operand_of(problem, &args->k);
  x.v = operand_of(problem, &args->v);
  x.o = operand_of(problem, &args->o);
  x.initial = view_of(&args->initial_state, false, 1);
  x.final = view_of(&args->final_state, false, 1);
  if (problem->decay == ATTN_DECAY_CHANNEL) {
    const channel_layout layout = channel_layout_of(problem, choice);
    const int64_t row = problem->value_heads * problem->dim;
    x.q = operand{(char *)workspace + layout.q, problem->length * row, row, problem->dim,
                  problem->value_heads,         problem->dim};
    x.k = x.q;
    x.k.data = (char *)workspace + layout.k;
    x.weights = operand{(char *)workspace + layout.weights,
                        problem->length * problem->value_heads * CHUNK,
                        problem->value_heads * CHUNK,
                        CHUNK,
                        problem->value_heads,
                        CHUNK};
    x.factors = (float *)((char *)workspace + layout.factors);
    x.sizes = (uint8_t *)workspace + layout.sizes;
  }
  return scan_run(choice, problem, args, x, workspace, stream);
}

/* Parts of the backward pass's workspace, in bytes from its start. */
struct backward_layout {
  size_t parts;                  /* d_q, then d_k, of each value head where several share them */
  size_t final_states, products; /* for the decay's gradient */
  size_t bytes;
};

backward_layout backward_layout_of(const attn_recurrent_problem *problem,
                                   const attn_cuda_choice *choice) {
  const int64_t rows = problem->value_heads * problem->batch;
  backward_layout layout;
  layout.parts = segments_layout_of(problem, choice).bytes;
  layout.final_states = layout.parts;
  if (problem->value_heads > problem->heads)
    layout.final_states += align((size_t)(rows * problem->length * problem->dim) * 2);
  layout.products = layout.bytes = layout.final_states;
  if (problem->decay == ATTN_DECAY_TOKEN) {
    layout.products += align((size_t)(rows * problem->dim * problem->value_dim) * sizeof(float));
    layout.bytes = layout.products + align((size_t)(4 * rows * problem->length) * sizeof(float));
  }
  return layout;
}

bool plan_backward(const attn_cuda_device *device, const attn_recurrent_problem *problem,
                   attn_cuda_choice *choice) {
  if (!plan_any(device, problem) || problem->decay == ATTN_DECAY_CHANNEL) return false;
  choose_segments(device, problem, choice);
  choice->workspace_bytes = backward_layout_of(problem, choice).bytes;
  snprintf(choice->description, sizeof choice->description,
           "additive, wgmma, chunks of %d, %lld segments of %lld chunks in %lld parts", CHUNK,
           (long long)choice->values[SEGMENTS], (long long)choice->values[SEGMENT_CHUNKS],
           (long long)choice->values[PARTS]);
  return true;
}

bool suits_backward(const attn_recurrent_problem *problem, const attn_recurrent_args *args) {
  const bool all = args->d_q.data && args->d_k.data && args->d_v.data;
  return operand_suits(problem, &args->q) && operand_suits(problem, &args->k) &&
         operand_suits(problem, &args->v) && operand_suits(problem, &args->d_o) &&
         operand_suits(problem, &args->d_q) && operand_suits(problem, &args->d_k) &&
         operand_suits(problem, &args->d_v) &&
         (!args->d_decay.data || (problem->decay == ATTN_DECAY_TOKEN && all)) &&
         (args->d_v.data || !args->d_initial_state.data);
}

/* The gradient of queries or keys that several value heads share: from `parts`, where each value
 * head has its own, into `target`. */
attn_status sum_parts(const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                      const void *parts, const attn_tensor *target, cudaStream_t stream) {
  operand sum = operand_of(problem, target);
  int group = (int)(problem->value_heads / problem->heads), heads = (int)problem->heads;
  int64_t tokens = problem->ragged ? args->q.shape[0] : problem->batch * problem->length;
  int64_t length = problem->ragged ? tokens : problem->length;
  int64_t words = tokens * heads * problem->dim / 2;
  if (!words) return ATTN_OK;
  const auto kernel = problem->dtype == ATTN_BF16 ? sum_groups<__nv_bfloat16> : sum_groups<__half>;
  kernel<<<(unsigned)((words + 255) / 256), 256, 0, stream>>>(
      parts, (void *)sum.data, tokens, length, heads, group, (int)problem->dim, sum.batch,
      sum.token, sum.head);
  ATTN_CUDA_TRY_LAUNCH("sum_groups");
  return ATTN_OK;
}

attn_status run_backward(const attn_cuda_device *, const attn_cuda_choice *choice,
                         const attn_recurrent_problem *problem, const attn_recurrent_args *args,
                         void *workspace, cudaStream_t stream) {
  const operand q = operand_of(problem, &args->q), k = operand_of(problem, &args->k),
                v = operand_of(problem, &args->v), d_o = operand_of(problem, &args->d_o);
  const double scale = problem->scale;
  const int64_t dim = problem->dim, value_dim = problem->value_dim, heads = problem->value_heads;
  const int64_t tokens = problem->ragged ? args->q.shape[0] : problem->batch * problem->length;
  const bool grouped = heads > problem->heads, wants_decay = args->d_decay.data != NULL;
  const backward_layout layout = backward_layout_of(problem, choice);
  const operand parts = {(char *)workspace + layout.parts,
                         problem->length * heads * dim,
                         heads * dim,
                         dim,
                         heads,
                         dim};
  float *final_states = (float *)((char *)workspace + layout.final_states);
  float *products = (float *)((char *)workspace + layout.products);
  const int q_products = (int)dim / 64;
  int k_products = q_products;
  attn_status status = ATTN_OK;
  if (args->d_q.data) {
    scan_operands x = {};
    x.q = d_o, x.k = v, x.v = k;
    x.o = grouped ? parts : operand_of(problem, &args->d_q);
    x.initial = view_of(&args->initial_state, true, 1);
    if (wants_decay) {
      x.partner = q, x.products = products;
      if (args->d_final_state.data)
        x.final =
            state_view{final_states, heads * dim * value_dim, dim * value_dim, 1, value_dim, 1};
    }
    status = scan_run(choice, problem, args, x, workspace, stream);
    if (status == ATTN_OK && grouped)
      status = sum_parts(problem, args, parts.data, &args->d_q, stream);
    if (status != ATTN_OK) return status;
  }
  /* The reversed scan's state is the gradient's over the scale, which multiplies its outputs. */
  scan_operands values = {};
  values.q = k, values.k = q, values.v = d_o;
  values.initial = view_of(&args->d_final_state, false, 1 / scale);
  values.final = view_of(&args->d_initial_state, false, scale);
  values.reverse = true;
  if (args->d_v.data) values.o = operand_of(problem, &args->d_v);
  if (args->d_k.data) {
    scan_operands keys = {};
    keys.q = v, keys.k = d_o, keys.v = q;
    keys.o = grouped ? parts : operand_of(problem, &args->d_k);
    keys.initial = view_of(&args->d_final_state, true, 1 / scale);
    keys.reverse = true;
    const bool together = args->d_v.data && dim == value_dim;
    if (together) {
      values.w = v, values.d_w = keys.o;
      keys = values;
      k_products = 1;
    }
    if (wants_decay) keys.partner = k, keys.products = products + q_products * tokens * heads;
    status = scan_run(choice, problem, args, keys, workspace, stream);
    if (status == ATTN_OK && grouped)
      status = sum_parts(problem, args, parts.data, &args->d_k, stream);
    if (together) values.o.data = NULL;
    if (status != ATTN_OK) return status;
  }
  if (values.o.data) status = scan_run(choice, problem, args, values, workspace, stream);
  if (status != ATTN_OK || !wants_decay) return status;
  const int first = problem->ragged ? 0 : 1;
  const strides step = {problem->ragged ? 0 : args->d_decay.stride[0], args->d_decay.stride[first],
                        args->d_decay.stride[first + 1]};
  decay_sums<<<(unsigned)(problem->batch * heads), 1024, 0, stream>>>(
      products, q_products, k_products, tokens, (float *)args->d_decay.data, step,
      problem->ragged ? args->offsets : NULL, problem->length, (int)heads, final_states,
      view_of(&args->d_final_state, false, 1), (int)dim, (int)value_dim);
  ATTN_CUDA_TRY_LAUNCH("decay_sums");
  return ATTN_OK;
}

} // namespace

extern const recurrent_algorithm recurrent_additive_sm90_forward;
const recurrent_algorithm recurrent_additive_sm90_forward = {
    "additive_sm90", ATTN_PASS_FORWARD, plan_forward, suits_forward, run_forward,
};
extern const recurrent_algorithm recurrent_additive_sm90_backward;
const recurrent_algorithm recurrent_additive_sm90_backward = {
    "additive_sm90", ATTN_PASS_BACKWARD, plan_backward, suits_backward, run_backward,
};
