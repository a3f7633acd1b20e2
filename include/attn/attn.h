/* libattn: efficient attention in C. This header includes all the others. */
#ifndef ATTN_ATTN_H
#define ATTN_ATTN_H

#include "attn/base.h"
#include "attn/classifier.h"
#include "attn/device.h"
#include "attn/mixer.h"
#include "attn/embedding.h"
#include "attn/lora.h"
#include "attn/model.h"
#include "attn/text.h"
#include "attn/plan.h"
#include "attn/prefix_cache.h"
#include "attn/recurrent.h"
#include "attn/reactive.h"
#include "attn/sampling.h"
#include "attn/softmax.h"
#include "attn/speculation.h"
#include "attn/tensor.h"
#include "attn/training.h"

#endif
