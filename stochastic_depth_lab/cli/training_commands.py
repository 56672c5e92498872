"""The commands that train: `train` one experiment, `reproduce` a pair, table or figure, `sweep` many runs."""

import shlex
import shutil
import signal
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from stochastic_depth_lab.cli.interrupts import Stop, stopping
from stochastic_depth_lab.cli.options import (
    PROGRAM,
    ManyOptions,
    Reproduce,
    RunOptions,
    Sweep,
    grid,
    parse,
    parse_train,
    with_options,
    with_seeds,
)
from stochastic_depth_lab.cli.output import QUICK, fail, is_first, load, note, refuse_unwritable, show
from stochastic_depth_lab.experiments import EXPERIMENTS, STUDIES, find, find_pair, find_study
from stochastic_depth_lab.experiments.checks import check
from stochastic_depth_lab.experiments.config import Experiment, Study
from stochastic_depth_lab.experiments.scales import quick, small

if TYPE_CHECKING:
    import torch

    from stochastic_depth_lab.training.processes import Processes
    from stochastic_depth_lab.training.progress import Observer
    from stochastic_depth_lab.training.sweep import Job


def train(arguments: Sequence[str]) -> int:
    """Train one experiment."""
    experiment, options = parse_train(arguments)
    stop = _train_all([(experiment, options.out)], options)
    if stop.signal is None and is_first():
        _show_result(options.out)
    return _exit_code(stop, [options.out], ["train", *arguments])


def reproduce(arguments: Sequence[str]) -> int:
    """Train a pair, or the runs of a table or figure, and write the report."""
    options = parse(Reproduce, "reproduce", arguments)
    options.many.check()
    if options.name in STUDIES or options.many != ManyOptions():
        return _reproduce_study(find_study(options.name), options, arguments)
    pair = [with_options(quick(each) if options.run.quick else each, options.run) for each in find_pair(options.name)]
    folders = [options.run.out / experiment.name for experiment in pair]
    load("training.loop", "report")
    stop = _train_all(list(zip(pair, folders, strict=True)), options.run)
    if stop.signal is None and is_first():
        show_report(folders, options.run.out)
    return _exit_code(stop, folders, ["reproduce", *arguments])


def _reproduce_study(study: Study, options: Reproduce, arguments: Sequence[str]) -> int:
    load("training.sweep", "report")
    from stochastic_depth_lab.report import write_study
    from stochastic_depth_lab.training import sweep

    run, many = _with_defaults(study, options.run, options.many)
    runs = with_seeds(_of_study(study, run, many), run, many)
    if options.name not in STUDIES:  # A pair is named after the networks that are trained, at either scale.
        study = replace(study, title=runs[0].title.removesuffix(", constant depth"))
    jobs = sweep.jobs_for(runs, run.out / "runs")
    code = _run_jobs(jobs, run, many, ["reproduce", *arguments])
    if is_first() and any(job.state == "done" for job in jobs):
        report = write_study(
            study,
            [(job.experiment, job.folder) for job in jobs],
            run.out,
            _baselines(study, runs, run.data_root),
            run_pages=not run.quick,
            width=shutil.get_terminal_size().columns,
        )
        show(f"{report.text}\n\nreport: {report.page}")
    return code


def _baselines(study: Study, runs: Sequence[Experiment], data_root: Path | None) -> dict[str, list[float]] | None:
    """Test errors of other methods on the images of each seed, if the study shows them."""
    if not study.baselines:
        return None
    from stochastic_depth_lab.after.baselines import baselines

    return baselines(runs, data_root)


def sweep(arguments: Sequence[str]) -> int:
    """Train many runs: an experiment with a grid of settings, or a share of a table."""
    options = parse(Sweep, "sweep", arguments)
    options.many.check()
    run, many = options.run, options.many
    if options.name in EXPERIMENTS:
        base = small(find(options.name)) if options.many.scale == "small" else find(options.name)
        experiments = grid(quick(base) if options.run.quick else base, options.grid)
    else:
        study = find_study(options.name)
        run, many = _with_defaults(study, run, many)
        experiments = _of_study(study, run, many)
        if options.grid:
            raise ValueError(f"--grid changes one experiment, but {options.name} is a table of several.")
    load("training.sweep", "report")
    from stochastic_depth_lab.training import sweep

    runs = with_seeds(experiments, run, many)
    if options.shard is not None:
        runs = sweep.shard(runs, options.shard)
    jobs = sweep.jobs_for(runs, options.run.out)
    code = _run_jobs(jobs, run, many, ["sweep", *arguments])
    done = [job.folder for job in jobs if job.state == "done"]
    if is_first() and done:
        show_report(done, options.run.out)
    return code


def _with_defaults(study: Study, run: RunOptions, many: ManyOptions) -> tuple[RunOptions, ManyOptions]:
    """Options with the study's own seeds and number of concurrent runs as defaults; --quick takes two seeds."""
    seeds = many.seeds or (min(study.seeds, 2) if run.quick else study.seeds)
    seed = study.first_seed if run.seed is None else run.seed
    return replace(run, seed=seed), replace(many, seeds=seeds, jobs=many.jobs or study.jobs)


def _of_study(study: Study, run: RunOptions, many: ManyOptions) -> list[Experiment]:
    """A study's experiments, at the requested scale."""
    experiments = study.small_experiments if many.scale == "small" else study.experiments
    return [quick(each) if run.quick else each for each in experiments]


def _run_jobs(jobs: "Sequence[Job]", options: RunOptions, many: ManyOptions, arguments: Sequence[str]) -> int:
    """Run the jobs that are not done; of several processes that torchrun started, each takes its share.

    Returns:
        The exit code: 0, 1 if a run failed, or that of a stop.
    """
    from stochastic_depth_lab.training import processes, sweep
    from stochastic_depth_lab.training.sweep_display import watching_sweep

    if options.weights is not None or options.tensorboard or options.cuda_graphs:
        raise ValueError("--weights, --tensorboard and --cuda-graphs are for train, and for reproduce of one pair.")
    refuse_unwritable(options.out)
    if not jobs:
        show("This share has no run: there are fewer runs than shares.")
    for job in jobs:
        check(job.experiment)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick and is_first():
        note(QUICK)
    rank, num_processes = processes.rank_and_size()
    with stopping() as stop, watching_sweep(alone=num_processes == 1) as observer:
        sweep.run(
            jobs[rank::num_processes],
            observer,
            num_processes=many.jobs or 1,
            device=options.device,
            data_root=options.data_root,
            stop_requested=lambda: stop.signal is not None,
        )
        # torchrun ends all processes when one ends with an error: rank 0 reports failures when all are done.
        processes.wait_for_all(lambda: stop.signal is not None)
    code = 128 + stop.signal if stop.signal is not None else 0
    if not is_first():
        return code
    if code:
        again = shlex.join([PROGRAM, *arguments])
        return fail(f"Stopped; the unfinished runs are saved. Resume with: {again}", code)
    sweep.update_states(jobs)
    failed = [job.folder.name for job in jobs if job.state == "failed"]
    return fail(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}.", code=1) if failed else 0


def _train_all(runs: Sequence[tuple[Experiment, Path]], options: RunOptions) -> Stop:
    """Train one run after the other, each with all processes that torchrun started, until a stop is requested."""
    for experiment, _ in runs:
        check(experiment)
    load("training.loop")
    from stochastic_depth_lab.runs.records import RunFolder
    from stochastic_depth_lab.training.processes import joined, local_rank
    from stochastic_depth_lab.training.progress import showing_progress
    from stochastic_depth_lab.training.setup import find_device

    with stopping() as stop, showing_progress() as observer:
        devices = [find_device(options.device, experiment.precision, local_rank()) for experiment, _ in runs]
        with joined(devices[0]) as together:
            # Checked for all runs before hours of work.
            folders = [RunFolder(path, experiment) for experiment, path in runs]
            finished = [
                together.on_rank_zero(lambda folder=folder: folder.check(resume=options.resume)) is not None
                for folder in folders
            ]
            if together.is_first:
                for remark in _remarks(runs, options, devices[0]):
                    observer.on_remark(remark)
            for (experiment, path), done in zip(runs, finished, strict=True):
                if together.any(stop.signal is not None):  # another process may have received the signal
                    stop.signal = stop.signal or signal.SIGTERM
                elif not done:
                    _train_one(experiment, path, options, devices[0], observer, stop, together)
                elif together.is_first:
                    observer.on_remark(f"{path} is finished already.")
    return stop


def _remarks(
    runs: Sequence[tuple[Experiment, Path]], options: RunOptions, device: "torch.device"
) -> Generator[str, None, None]:
    """Remarks that may prevent surprises later."""
    if options.quick:
        yield QUICK
    if device.type == "cpu" and any(experiment.precision == "fp16" for experiment, _ in runs):
        yield "fp16 is up to 50 times as slow as fp32 on a CPU. Use --precision bf16."
    if options.resume and not any((folder / "config.json").exists() for _, folder in runs):
        yield f"There is nothing to resume in {options.out}: starting from the beginning."


def _train_one(
    experiment: Experiment,
    folder: Path,
    options: RunOptions,
    device: "torch.device",
    observer: "Observer",
    stop: Stop,
    together: "Processes",
) -> None:
    from stochastic_depth_lab.training import loop
    from stochastic_depth_lab.training.progress import TensorBoard

    observers = [observer] if together.is_first else []
    if options.tensorboard and together.is_first:
        try:
            observers.append(TensorBoard(folder / "tensorboard"))
        except ModuleNotFoundError:
            raise ValueError(
                "--tensorboard needs TensorBoard: run pip install '.[tensorboard]' in a clone of the project."
            ) from None
    try:
        loop.train(
            experiment,
            folder,
            observers,
            device=device,
            data_root=options.data_root,
            weights=options.weights,
            resume=options.resume,
            stop_requested=lambda: stop.signal is not None,
            processes=together,
            cuda_graphs=options.cuda_graphs,
        )
    except loop.Interrupted:
        # The run is saved; the command says how to resume when the progress bar is gone.
        stop.signal = stop.signal or signal.SIGTERM


def _show_result(folder: Path) -> None:
    from stochastic_depth_lab.runs.records import read_json

    result = read_json(folder / "result.json")
    show(
        f"test error {result['test_error']:.2f} % at the lowest validation error "
        f"({result['validation_error']:.2f} %, epoch {result['best_epoch']} of {result['epochs']}), "
        f"{result['train_s']:.1f} s of training; see {folder}"
    )


def show_report(folders: Sequence[Path], out: Path | None) -> None:
    """Write a report, and print its table."""
    from stochastic_depth_lab.report import read_run, text_table, write_report

    page = write_report(folders, out)
    width = shutil.get_terminal_size().columns
    show(text_table([read_run(folder) for folder in folders], width))
    show(f"\nreport: {page}, figures: {page.parent / 'figures'}")


def _exit_code(stop: Stop, folders: Sequence[Path], arguments: Sequence[str]) -> int:
    if stop.signal is None:
        return 0
    code = 128 + stop.signal
    if not is_first():
        return code
    if not any((folder / "checkpoints" / "last.pt").exists() for folder in folders):
        return fail("Stopped before there was anything to save.", code)
    again = shlex.join([PROGRAM, *arguments, *([] if "--resume" in arguments else ["--resume"])])
    return fail(f"Stopped and saved. Resume with: {again}", code)
