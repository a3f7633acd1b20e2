/* Short convolutions inside mixers: taps, the state's part, and the layer with its memory. */
#ifndef ATTN_MIXERS_CONVOLUTION_H
#define ATTN_MIXERS_CONVOLUTION_H

#include "mixers/mixer.h"

/* Fills in the usual number of taps, 4. */
void attn_convolution_configure(attn_mixer_options *options);
/* Taps [channels, taps], by element: no packed form. */
attn_parameter_shape attn_convolution_taps(const char *name, int64_t channels, int64_t taps,
                                           attn_initial initial, double scale);
/* The last inputs, [taps - 1, channels] of the compute dtype. */
attn_state_part attn_convolution_tail(const char *name, attn_dtype compute, int64_t taps,
                                      int64_t channels);
/* attn_layer_short_convolution of x [rows, channels] by parameter i; with a state its memory is
 * part `part`. To be called for each state: from an attn_mixer_part. */
attn_var *attn_convolution_apply(attn_graph *graph, const attn_mixer_call *call, attn_var *x, int i,
                                 int part);

#endif
