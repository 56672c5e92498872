"""Counts the models of timm and torchvision in which every active drop path is skipped, on the meta device.

    python benchmarks/coverage.py [timm|torchvision] [--names NAME ...]

Each model is created with a drop path rate and made stochastic. A drop path counts as skipped if its branch was
separated from its block; one that the model never calls, or whose result it does not use, is not a branch. No model
runs.
"""

from __future__ import annotations

import torchvision_schemas  # noqa: F401

# isort: split
import argparse
import collections
import sys
import time
import warnings

import timm
import torch
import torchvision

import stochastic_depth as sd


def timm_names() -> list[str]:
    """All names that timm creates models by, deprecated ones too."""
    from timm.models import _registry

    return sorted({*timm.list_models(), *_registry._deprecated_models})


def timm_model(name: str) -> torch.nn.Module | None:
    """The model with a drop path rate; None if it takes none."""
    try:
        return timm.create_model(name, drop_path_rate=0.3)
    except TypeError as error:
        if "drop_path_rate" in str(error):
            return None
        raise


def torchvision_names() -> list[str]:
    """All classification models."""
    return sorted(torchvision.models.list_models(module=torchvision.models))


def torchvision_depth(name: str) -> sd.Controller | None:
    """The controller of a model: of its drop paths, or of its residual additions; None if it has neither."""
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # RegNets compute their widths with tensors, which have no values on the meta device.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        model = torchvision.models.get_model(name, **options)
    try:
        return sd.make_stochastic_(model)
    except ValueError:
        pass
    try:
        return sd.make_stochastic_(model, sd.linear_decay(0.5))
    except ValueError:
        return None


def timm_depth(name: str) -> sd.Controller | None:
    """The controller of a model; None if it takes no rate."""
    model = timm_model(name)
    return None if model is None else sd.make_stochastic_(model)


def main() -> None:
    """Count, and list missed drop paths with their cause."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=["timm", "torchvision"], nargs="?", default="timm")
    parser.add_argument("--names", nargs="+")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    names = arguments.names or (timm_names() if arguments.library == "timm" else torchvision_names())
    depth_of = timm_depth if arguments.library == "timm" else torchvision_depth
    begin, num_models, num_branches = time.perf_counter(), 0, 0
    without: list[str] = []
    idle: list[str] = []
    causes: dict[str, list[str]] = collections.defaultdict(list)
    for name in names:
        try:
            with torch.device("meta"):
                depth = depth_of(name)
        except Exception as error:
            if "Invalid pretrained tag" in str(error):
                continue  # A deprecated name that timm itself can no longer create.
            num_models += 1
            if "No residual branch" in str(error) and "never executed" in str(error):
                idle.append(name)
                continue
            causes[f"{type(error).__name__}: {error}".splitlines()[0]].append(name)
            continue
        if depth is None:
            without.append(name)
            continue
        num_models += 1
        num_branches += len(depth.names)
        for cause in {cause for _, cause in depth.masked}:
            causes[cause].append(name)
    missed = {name for affected in causes.values() for name in affected}
    share = (num_models - len(missed)) / max(num_models, 1)
    for cause, affected in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(f"{len(affected):4d}  {cause}\n      {', '.join(affected)}")
    what = "take no drop path rate" if arguments.library == "timm" else "have neither drop paths nor residual additions"
    print(f"{len(idle)} models hold drop paths of which none is ever called: {', '.join(idle)}")
    print(f"{len(without)} models {what}, and are not counted: {', '.join(without)}")
    print(
        f"{arguments.library}: in {num_models - len(missed)} of {num_models} models ({share:.1%}) every drop path that "
        f"acts is skipped; {num_branches} branches; {time.perf_counter() - begin:.0f} s"
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
