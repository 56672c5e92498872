"""Compares learning rates on 10,000 images of CIFAR-10 that none of their runs has seen.

    python benchmarks/further_validation.py

The 1,000 validation images of a trial tell rates apart to about 1.6 points. Here the networks of finished trials, with
their last weights, are evaluated on 10,000 of the other training images of CIFAR-10, which the trials neither train nor
validate with. Trials are those of `benchmarks/evidence.py` in `runs/evidence`, which keeps their weights. Errors in
percent, by run, go into results/learning-rates-cifar10/further-images.json; runs that are there are not repeated. To
repeat one, remove it there and train it (`benchmarks/evidence.py run`, without its line in runs.jsonl).
"""

import json

import torch
from evidence import RESULTS, RUNS, experiments

from stochastic_depth_lab.data import Split, batches, load
from stochastic_depth_lab.experiments.config import as_json
from stochastic_depth_lab.files import write_whole
from stochastic_depth_lab.runs import checkpoint, records
from stochastic_depth_lab.training import sweep
from stochastic_depth_lab.training.setup import build_network, load_images

STUDY, PATTERN, NUM_SEEDS = "learning-rates-cifar10", "cifar10-32-3000-*", 2
NUM_IMAGES = 10_000


def unseen(seeds: set[int]) -> Split:
    """The last training images of CIFAR-10 that are neither validation images nor drawn by these seeds."""
    data = load("cifar10", validation=1000)
    seen = {image.numpy().tobytes() for seed in seeds for image in data.few(100, seed).train.images}
    rows = [row for row, image in enumerate(data.train.images) if image.numpy().tobytes() not in seen]
    return data.train[torch.tensor(rows[-NUM_IMAGES:])]


def main() -> None:
    """Evaluate what is not evaluated yet."""
    path = RESULTS / STUDY / "further-images.json"
    errors: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    trials = sweep.jobs_for(experiments(STUDY, NUM_SEEDS, PATTERN), RUNS)
    missing = [job for job in trials if job.folder.name not in errors]
    ready = [job for job in missing if job.state == "done"]
    print(
        f"{len(trials) - len(missing)} of {len(trials)} trials are in {path.name}, {len(ready)} more are trained here"
    )
    if not ready:
        return
    images = unseen({job.experiment.seed for job in trials})
    for job in ready:
        state, _ = checkpoint.load(job.folder / "checkpoints", as_json(job.experiment))
        if state is None:
            print(f"{job.folder.name}: its weights are gone", flush=True)
            continue
        own = load_images(job.experiment, torch.device("cpu"), records.data_root_of(job.folder))
        model, _ = build_network(job.experiment, own.data)
        model.load_state_dict(state["model"])
        model.eval()
        with torch.no_grad():
            wrong = [
                (model(x).argmax(1) != labels).sum()
                for x, labels in batches(images, 500, normalization=own.normalization)
            ]
        errors[job.folder.name] = 100 * int(sum(wrong)) / len(images)
        print(f"{job.folder.name}: {errors[job.folder.name]:.2f} %", flush=True)
        write_whole(path, json.dumps(dict(sorted(errors.items())), indent=2).encode() + b"\n")


if __name__ == "__main__":
    main()
