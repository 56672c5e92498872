"""The commands for runs that were trained: `evaluate`, `export` and `report`."""

import functools
import signal
from collections.abc import Sequence

from stochastic_depth_lab.cli.options import Evaluate, Export, Report, parse
from stochastic_depth_lab.cli.output import fail, load, note, refuse_unwritable, show
from stochastic_depth_lab.cli.training_commands import show_report


def evaluate(arguments: Sequence[str]) -> int:
    """Evaluate a run's weights, blocks, subnetworks or calibration."""
    options = parse(Evaluate, "evaluate", arguments)
    if options.analyze + options.subnetworks + (options.monte_carlo is not None) > 1:
        return fail("--analyze, --subnetworks and --monte-carlo exclude each other.")
    for_subnetworks = options.against, options.order, options.points, options.finetune_epochs
    if not options.subnetworks and for_subnetworks != (None, "last", 9, None):
        return fail("--against, --order, --points and --finetune-epochs are for --subnetworks.")
    if options.out is not None and not options.subnetworks and options.monte_carlo is None:
        return fail("--out is for --subnetworks and --monte-carlo.")
    refuse_unwritable(options.out)
    if options.analyze:
        return _analyze(options)
    if options.subnetworks:
        return _evaluate_subnetworks(options)
    if options.monte_carlo is not None:
        return _evaluate_monte_carlo(options, options.monte_carlo)
    load("after.evaluation")
    from stochastic_depth_lab.after.evaluation import evaluate_run
    from stochastic_depth_lab.training.setup import find_device

    evaluations = evaluate_run(options.folder, device=find_device(options.device), data_root=options.data_root)
    if "best" not in evaluations:
        note(f"{options.folder / 'checkpoints' / 'best.pt'} is missing: only the last weights were evaluated.")
    for weights, parts in evaluations.items():
        for part, evaluation in parts.items():
            show(f"{weights} weights  {part:<10}  error {evaluation.error:.2f} %  loss {evaluation.loss:.4f}")
    return 0


def _analyze(options: Evaluate) -> int:
    load("after.analysis")
    from stochastic_depth_lab.after.analysis import analyze
    from stochastic_depth_lab.report.evaluations import analysis_text
    from stochastic_depth_lab.training.setup import find_device

    device = find_device(options.device)
    show(analysis_text(analyze(options.folder, device=device, data_root=options.data_root, progress=note)))
    return 0


def _evaluate_subnetworks(options: Evaluate) -> int:
    if options.finetune_epochs is not None and options.finetune_epochs < 1:
        return fail(f"--finetune-epochs must be at least 1, but is {options.finetune_epochs}.")
    load("after.finetuning", "after.subnetworks")
    from stochastic_depth_lab.after.finetuning import finetune
    from stochastic_depth_lab.after.subnetworks import subnetwork_curve
    from stochastic_depth_lab.report.subnetwork_curve import curve_text, write_curve
    from stochastic_depth_lab.training.progress import showing_progress
    from stochastic_depth_lab.training.setup import find_device

    name = options.folder.resolve().name
    twin = options.folder.resolve().with_name(name.removesuffix("-stochastic") + "-constant")
    against = options.against or (twin if twin.name != name and (twin / "config.json").exists() else None)
    device, out = find_device(options.device), options.out or options.folder / "evaluation"
    with showing_progress() as observer:
        train_further = functools.partial(
            finetune,
            epochs=options.finetune_epochs or 0,
            folder=out / "finetuned",
            observers=[observer],
            device=device,
            data_root=options.data_root,
        )
        try:
            points = subnetwork_curve(
                [options.folder] if against is None else [against, options.folder],
                device=device,
                data_root=options.data_root,
                order=options.order,
                num_points=options.points,
                finetune=None if options.finetune_epochs is None else train_further,
                progress=observer.on_remark,
            )
        except KeyboardInterrupt:
            kept = " Trained subnetworks are kept: repeat the command to resume." if options.finetune_epochs else ""
            return fail(f"Stopped.{kept}", code=128 + signal.SIGINT)
    show(curve_text(points))
    show(f"\n{' '.join(map(str, write_curve(points, out)))}")
    return 0


def _evaluate_monte_carlo(options: Evaluate, num_samples: int) -> int:
    load("after.uncertainty")
    from stochastic_depth_lab.after.uncertainty import uncertainty
    from stochastic_depth_lab.report.reliability import reliability_text, write_reliability
    from stochastic_depth_lab.training.setup import find_device

    device = find_device(options.device)
    measured = uncertainty(options.folder, num_samples, device=device, data_root=options.data_root)
    show(reliability_text(measured))
    paths = write_reliability(measured, options.out or options.folder / "evaluation")
    show(f"\n{' '.join(map(str, paths))}")
    return 0


def export(arguments: Sequence[str]) -> int:
    """Export a run's network to a file."""
    options = parse(Export, "export", arguments)
    if options.order != "last" and options.cost is None:
        return fail("--order needs --cost: it says which blocks are removed first.")
    if options.out is not None:
        refuse_unwritable(options.out.parent)
        if options.out.is_dir():
            return fail(f"--out must be a file, but {options.out} is a folder.")
    load("after.export")
    from stochastic_depth_lab.after.export import default_path, export_run

    smaller = (options.keep, options.cost) != (None, None)
    exported = export_run(
        options.folder,
        options.out or default_path(options.folder, options.format, smaller=smaller),
        form=options.format,
        keep=options.keep,
        cost=options.cost,
        order=options.order,
        normalize=options.normalize,
        data_root=options.data_root,
    )
    show(
        f"{exported.path}: {len(exported.keep)} blocks, {exported.num_parameters} parameters, "
        f"{exported.num_bytes / 1e6:.2f} MB; on {exported.num_images} test images it differs by "
        f"{exported.difference:.1e} of the largest output"
    )
    return 0


def report(arguments: Sequence[str]) -> int:
    """Write a report on runs."""
    options = parse(Report, "report", arguments)
    from stochastic_depth_lab.report import run_folders

    folders, left_out = run_folders(options.folders)
    if left_out:
        note(f"Left out {len(left_out)} runs without a finished epoch: {' '.join(map(str, left_out))}.")
    own = options.folders[0] if len(options.folders) == 1 else None
    show_report(folders, options.out or own)
    return 0
