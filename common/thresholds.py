"""From which score on an image is called defective by --predict, and a pixel: found on good images only.

Both thresholds are 99 % quantiles: of the image scores, and of the maps' largest values, so that 99 % of good images
have no pixel above the second. The images are training images, or, where there are no test images, good images that
were held out of the training (--holdout), which says more of new ones.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from common import data, runtime
from common.folder import current_commit, write_csv

QUANTILE = 0.99
AT_MOST = 256  # training images


def quantiles(scores, peaks):
    """Image scores and maps' largest values, (N,) each -> what a checkpoint keeps of them."""
    return {
        "normal_score": float(np.quantile(scores, QUANTILE)),
        "pixel_threshold": float(np.quantile(peaks, QUANTILE)),
    }


def of_training_images(run, args, score, samples, images=None):
    """The thresholds from up to 256 training images: {"normal_score", "pixel_threshold"}.

    samples: the training images. images: their pixels, `data.Images`; None if `score` needs none.
    score: (images (B, 3, S, S) uint8 on the run's device, their B samples) -> (maps (B, S, S),
    scores (B,)).
    """
    order = runtime.epoch_order(args.seed, 0, len(samples))[:AT_MOST]
    return quantiles(*scores_of(run, args, score, samples, images, order))


def without_test_images(run, args, dataset, score, state):
    """The end of a training without test images: thresholds from the good images that were not
    trained on (`run.held_out`), scored as --predict does it.

    They go into checkpoint.pt and threshold.json; scores.csv has the scores of these images.

    Args:
        score: as above. state: the finished checkpoint.
    """
    if run.held_out and run.is_rank0:  # one process does it all, as in --predict
        unknown = [data.Sample(sample.image, None, 0, "", "", "") for sample in run.held_out]
        images = data.Images(run.held_out, args.image_size, depths=run.depths)
        scores, peaks = scores_of(run, args, score, unknown, images, range(len(unknown)))
        state |= quantiles(scores, peaks)
        rows = [(s.image, s.cls, s.label, value) for s, value in zip(run.held_out, scores)]
        write_csv(run.out / "scores.csv", ("path", "class", "label", "score"), rows)
    run.save(dict(state))
    run.finish_saving()  # threshold.json says that all is there
    if not run.is_rank0:
        return
    found = {
        "method": run.method,
        "data": args.data,
        "problems": dataset.problems,
        "threshold": state["normal_score"],
        "pixel threshold": state["pixel_threshold"],
        "quantile": QUANTILE,
        "held out": len(run.held_out),
        "seconds": {"train": round(state["seconds"], 1)},
        "versions": run.environment(),
        "seed": args.seed,
        "commit": current_commit(),
    }
    content = json.dumps(found, indent=1) + "\n"
    runtime.write_atomic(run.out / "threshold.json", content.encode())
    value = f"{found['threshold']:.4g}"
    run.say(f"no test images, so no metrics; threshold {value}: {_origin(run, args)}")
    run.say(f"{run.out}: checkpoint.pt, threshold.json")
    script, checkpoint = Path(sys.argv[0]).name, run.out / "checkpoint.pt"
    run.say(f"next: python {script} --eval {checkpoint} --predict PICTURES")


def _origin(run, args):
    """Where the threshold comes from."""
    if not run.held_out:
        return "the 99 % quantile of the scores of training images (none was held out)"
    return (
        "the 99 % quantile of the scores of good images that were not trained on "
        f"({len(run.held_out)}, --holdout {args.holdout:g})"
    )


def scores_of(run, args, score, samples, images, order):
    """Image scores, and the maps' largest values, of the samples with the numbers `order`."""
    scores, peaks = [], []
    for first in run.progress(range(0, len(order), args.batch_size), "threshold"):
        index = order[first : first + args.batch_size]
        batch = None
        if images is not None:
            batch = run.to_device(torch.stack([images[i] for i in index]))  # (B, 3, S, S)
        maps, values = score(batch, [samples[i] for i in index])
        scores += values.float().tolist()
        peaks += maps.float().amax((1, 2)).tolist()
    return scores, peaks
