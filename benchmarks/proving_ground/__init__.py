"""Which clip should one use? Every method in closed loop on the same small tasks.

A paper compares its rule with one fixed threshold on a task of its own. Here all of them train the
same networks with the same seeds, which see the same batches and the same noise, at seven learning
rates a factor of about 3 apart around the best one without a clip. A method without a default is
tried with a grid of thresholds, and takes the best: that is what choosing a threshold can give at
the most, and a rule without one is compared with it. `clip_by_global_norm(1.0)` is the same without
choosing.

loss: the mean over the seeds of the mean loss of the last tenth of the steps (the quadratic: the
    median of the last quarter), at the learning rate and threshold where it is lowest; "+-" is the
    standard error over the seeds. Infinite, "-", where a run diverged: a loss there that is not
    finite, or a mean above 1.1 times the loss of the initial network. A run that is stuck at chance
    has not diverged; its loss tells.
over fixed: that loss over the one of `clip_by_global_norm` with the best threshold.
held out: the loss on data not trained on, of the same runs.
rates: the largest over the smallest of the learning rates around the best one whose loss is within
    5% of it, at that threshold: how far wrong a learning rate may be.
sensitivity: the mean over the learning rates of how much more than the best loss is left there, at
    that threshold; a run that ends above the loss it began with counts as that.
diverged: the share of the runs at that threshold.
clip rate: the mean share of the steps (of the tensors or entries, where a method treats them one by
    one) that were clipped or skipped.
transferred: the loss with the learning rate and threshold that were best in the plain setting: what
    happens to someone who did not expect what this setting adds.
lost: the steps until the mean loss of ten steps is at most 1.01 times that of the same run without
    spikes; where it is not before the next spike, or the end, the steps until then.
cost: the loss over that of the plain setting, each with its own best learning rate and threshold.
time: the processor's in training, over that without a clip: on networks as small as these, where
    a clip costs far more of a step than elsewhere.
*: the best threshold or rate is the smallest or the largest that was tried; a wider grid might do
    better.
"""
