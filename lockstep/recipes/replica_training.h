// Training for slow links: every worker has a replica and one of libtorch's own optimizers, and
// train.strategy says how replicas become one (parallel/data_parallel.h, parallel/local_sgd.h). As
// many workers from beginning to end, no checkpoints: a worker that fails ends the job. One thread.
#pragma once

#include "lockstep/job/job.h"
#include "lockstep/train/trainer.h"

namespace lockstep {

// As Trainer::fit(). Collective. Of an epoch's samples, those of a last step that are fewer than
// the workers are left out. Throws Error on a non-finite loss, ConfigError on what it does not do.
FitReport fit_replicas(const World& world, const Job& job, const TrainerOptions& options,
                       const Task& task, const Schedule& schedule, const BatchSource& train,
                       const BatchSource* test);

}  // namespace lockstep
