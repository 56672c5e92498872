"""The commands that need no run: `schedule`, `inspect` and `bench`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stochastic_depth_lab.cli.options import Bench, Inspect, Schedule, ScheduleName, parse
from stochastic_depth_lab.cli.output import load, show

if TYPE_CHECKING:
    import stochastic_depth as sd


def schedule(arguments: Sequence[str]) -> int:
    """Show the survival probabilities of a schedule."""
    options = parse(Schedule, "schedule", arguments)
    load("training.setup", "report")
    import torch

    import stochastic_depth as sd
    from stochastic_depth_lab.report import schedule_figure, schedule_text

    model = sd.models.cifar_resnet(options.num_layers)
    depth = sd.make_stochastic_(model, _named_schedule(options.schedule, options.final_survival_prob))
    blocks = range(1, len(depth.names) + 1)
    show(schedule_text(blocks, depth.survival_probs))
    share = depth.cost(torch.zeros(1, 3, 32, 32)).flops_share
    show(f"training FLOPs, counted on the {options.num_layers} layers for 32x32 images: {share:.1%} of constant depth")
    if options.out is not None:
        show(str(schedule_figure(blocks, depth.survival_probs, options.out)))
    return 0


def _named_schedule(name: ScheduleName, final_survival_prob: float) -> "sd.Schedule":
    from stochastic_depth import SCHEDULES

    return SCHEDULES[name](final_survival_prob)


def inspect(arguments: Sequence[str]) -> int:
    """Show the branches of a published model."""
    options = parse(Inspect, "inspect", arguments)
    load("measure.inspect", "training.setup")
    from stochastic_depth_lab.measure.inspect import inspect_model
    from stochastic_depth_lab.training.setup import find_device

    schedule = None if options.schedule is None else _named_schedule(options.schedule, options.final_survival_prob)
    show(
        inspect_model(
            options.model,
            options.drop_path_rate,
            schedule=schedule,
            measure=options.measure,
            batch_size=options.batch_size,
            image_size=options.image_size,
            device=find_device(options.device),
        )
    )
    return 0


def bench(arguments: Sequence[str]) -> int:
    """Measure what skipping saves on this machine."""
    options = parse(Bench, "bench", arguments)
    load("measure.bench", "training.setup")
    from stochastic_depth_lab.measure.bench import bench, bench_text
    from stochastic_depth_lab.training.setup import find_device

    device = find_device(options.device)
    measured = bench(
        num_layers=options.num_layers,
        batch_size=options.batch_size,
        final_survival_prob=options.final_survival_prob,
        rounds=options.rounds,
        device=device,
    )
    show(bench_text(measured, device, options.rounds))
    return 0
