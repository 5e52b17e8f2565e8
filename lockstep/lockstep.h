// The public header of lockstep::lockstep. What it includes, directly or not, is the public
// interface; other headers are installed because these need them, and may change.
#pragma once

#include "lockstep/core.h"
#include "lockstep/parallel/clip_grad_norm.h"
#include "lockstep/parallel/data_loader.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/distributed_sampler.h"
#include "lockstep/parallel/elastic.h"
#include "lockstep/parallel/local_sgd.h"
#include "lockstep/parallel/shared_weights.h"
#include "lockstep/parallel/torchrun.h"
#include "lockstep/train/losses.h"
#include "lockstep/train/trainer.h"
