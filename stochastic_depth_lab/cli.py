"""The command line. Results go to standard output, progress and complaints to standard error; wrong input exits with 2.

PyTorch takes seconds to import: whatever needs it is imported where it is used, so that help and mistakes are instant.
"""

import errno
import functools
import importlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from stochastic_depth_lab.arguments import did_you_mean, options_of, summary
from stochastic_depth_lab.completion import completion
from stochastic_depth_lab.config import Experiment, Study, check, quick, small
from stochastic_depth_lab.experiments import EXPERIMENTS, STUDIES, find, find_pair, find_study
from stochastic_depth_lab.interrupts import EndingAtOnce, Stop, stopping
from stochastic_depth_lab.options import (
    PROGRAM,
    Bench,
    Completion,
    Evaluate,
    Export,
    Inspect,
    ManyOptions,
    Report,
    Reproduce,
    RunOptions,
    Schedule,
    Sweep,
    Train,
    grid,
    parse,
    parse_train,
    with_options,
    with_seeds,
)

if TYPE_CHECKING:
    import torch

    import stochastic_depth as sd
    from stochastic_depth_lab.loop import Observer
    from stochastic_depth_lab.processes import Processes
    from stochastic_depth_lab.sweep import Job

_QUICK = "--quick: five epochs on a few images. The numbers mean nothing."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: those of the command line if None.

    Returns:
        The exit code: 0; 1 if some of many runs failed or a package is missing; 2 for wrong input; 130 and 143 for what
        was stopped.
    """
    command, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    try:
        if command in ("-h", "--help"):
            _print(_overview())
            return 0
        if command == "--version":
            from importlib.metadata import version

            _print(version("stochastic-depth"))
            return 0
        if command not in _COMMANDS:
            kind = "option" if command.startswith("-") else "command"
            hint = did_you_mean(command, [*_COMMANDS, "--help", "--version"])
            return _complain(f"Unknown {kind} {command!r}.{hint} See {PROGRAM} --help.")
        with _warnings_in_one_line():
            return _COMMANDS[command][1](rest)
    except KeyboardInterrupt:
        return _complain("Interrupted.", code=128 + signal.SIGINT)
    except BrokenPipeError:  # whoever read what we print has seen enough; Python would complain again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:  # a full disk, a folder that may not be written
        reason = ": ".join(str(part) for part in (error.strerror or error, error.filename) if part)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        return _complain(f"{reason}. Make room, then resume the run with --resume." if full else f"{reason}.")
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] in ("stochastic_depth", "stochastic_depth_lab"):
            raise
        return _complain(
            f"{PROGRAM} {command} needs the package {error.name}: run pip install '.[lab]' in a clone of the project.",
            code=1,
        )
    except ImportError as error:
        if error.name != "stochastic_depth":  # the library says which PyTorch it needs
            raise
        return _complain(str(error), code=1)
    except (ValueError, ArithmeticError) as error:
        return _complain(str(error))


def _load(*modules: str) -> None:
    """Import modules that need PyTorch, which takes seconds: say so on a terminal."""
    waiting = "Loading PyTorch ..." if sys.stderr.isatty() and "torch" not in sys.modules else ""
    sys.stderr.write(waiting)
    sys.stderr.flush()
    with EndingAtOnce():
        for module in modules:
            importlib.import_module(f"stochastic_depth_lab.{module}")
    if waiting:
        sys.stderr.write(f"\r{' ' * len(waiting)}\r")


def _train(arguments: Sequence[str]) -> int:
    experiment, options = parse_train(arguments)
    check(experiment)
    _load("loop", "observers")
    with stopping() as stop, _observing() as observer:
        _train_all([(experiment, options.out)], options, observer, stop)
    if stop.signal is None and _is_first():
        _print_result(options.out)
    return _exit_code(stop, [options.out], ["train", *arguments])


def _reproduce(arguments: Sequence[str]) -> int:
    options = parse(Reproduce, "reproduce", arguments)
    options.many.check()
    if options.name in STUDIES or options.many != ManyOptions():
        return _reproduce_study(find_study(options.name), options, arguments)
    pair = [with_options(quick(each) if options.run.quick else each, options.run) for each in find_pair(options.name)]
    folders = [options.run.out / experiment.name for experiment in pair]
    for experiment in pair:
        check(experiment)
    _load("loop", "observers", "report")
    with stopping() as stop, _observing() as observer:
        _train_all(list(zip(pair, folders, strict=True)), options.run, observer, stop)
    if stop.signal is None and _is_first():
        _print_report(folders, options.run.out)
    return _exit_code(stop, folders, ["reproduce", *arguments])


def _reproduce_study(study: Study, options: Reproduce, arguments: Sequence[str]) -> int:
    _load("sweep", "report")
    from stochastic_depth_lab import sweep
    from stochastic_depth_lab.report import write_study

    run, many = _with_defaults(study, options.run, options.many)
    runs = with_seeds(_of_study(study, run, many), run, many)
    if options.name not in STUDIES:  # a pair: of the networks that are trained, at either scale
        study = replace(study, title=runs[0].title.removesuffix(", constant depth"))
    jobs = sweep.jobs_for(runs, run.out / "runs")
    code = _run_jobs(jobs, run, many, ["reproduce", *arguments])
    if _is_first() and any(job.state == "done" for job in jobs):
        report = write_study(
            study,
            [(job.experiment, job.folder) for job in jobs],
            run.out,
            _yardsticks(study, runs, run.data_root),
            run_pages=not run.quick,
            width=shutil.get_terminal_size().columns,
        )
        _print(f"{report.text}\n\nreport: {report.page}")
    return code


def _yardsticks(study: Study, runs: Sequence[Experiment], data_root: Path | None) -> dict[str, list[float]] | None:
    """Test errors of other methods on the images of each seed, where the study shows them."""
    if not study.yardsticks:
        return None
    from stochastic_depth_lab.yardsticks import yardsticks

    return yardsticks(runs, data_root)


def _sweep(arguments: Sequence[str]) -> int:
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
    _load("sweep", "report")
    from stochastic_depth_lab import sweep

    runs = with_seeds(experiments, run, many)
    if options.shard is not None:
        runs = sweep.shard(runs, options.shard)
    jobs = sweep.jobs_for(runs, options.run.out)
    code = _run_jobs(jobs, run, many, ["sweep", *arguments])
    done = [job.folder for job in jobs if job.state == "done"]
    if _is_first() and done:
        _print_report(done, options.run.out)
    return code


def _with_defaults(study: Study, run: RunOptions, many: ManyOptions) -> tuple[RunOptions, ManyOptions]:
    """The study's own seeds and number of concurrent runs where none are requested; two seeds are quick."""
    return (
        replace(run, seed=study.first_seed if run.seed is None else run.seed),
        replace(
            many,
            seeds=many.seeds or (min(study.seeds, 2) if run.quick else study.seeds),
            jobs=many.jobs or study.jobs,
        ),
    )


def _of_study(study: Study, run: RunOptions, many: ManyOptions) -> list[Experiment]:
    """A study's experiments, at the requested scale."""
    experiments = study.small_experiments if many.scale == "small" else study.experiments
    return [quick(each) if run.quick else each for each in experiments]


def _run_jobs(jobs: "Sequence[Job]", options: RunOptions, many: ManyOptions, arguments: Sequence[str]) -> int:
    """Run what is not done; the exit code: 0, 1 if a run failed, or that of a stop.

    Of several processes that torchrun has started each takes its share.
    """
    from stochastic_depth_lab import processes, sweep
    from stochastic_depth_lab.sweep_display import watching_sweep

    if options.weights is not None or options.tensorboard or options.cuda_graphs:
        raise ValueError("--weights, --tensorboard and --cuda-graphs are for train, and for reproduce of one pair.")
    _refuse_unwritable(options.out)
    if not jobs:
        _print("This share has no run: there are fewer runs than shares.")
    for job in jobs:
        check(job.experiment)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.quick and _is_first():
        _note(_QUICK)
    rank, num_processes = processes.place()
    with stopping() as stop, watching_sweep(alone=num_processes == 1) as observer:
        sweep.run(
            jobs[rank::num_processes],
            observer,
            num_processes=many.jobs or 1,
            device=options.device,
            data_root=options.data_root,
            stop_requested=lambda: stop.signal is not None,
        )
        # torchrun ends them all when one ends with an error: the first one tells, when all have come to their ends.
        processes.wait_for_all(lambda: stop.signal is not None)
    if stop.signal is not None:
        again = f"Stopped; the runs that had begun are saved. Resume with: {shlex.join([PROGRAM, *arguments])}"
        return _complain(again, code=128 + stop.signal) if _is_first() else 128 + stop.signal
    if not _is_first():
        return 0
    sweep.look_again(jobs)
    failed = [job.folder.name for job in jobs if job.state == "failed"]
    return _complain(f"{len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}.", code=1) if failed else 0


def _evaluate(arguments: Sequence[str]) -> int:
    options = parse(Evaluate, "evaluate", arguments)
    if options.analyse:
        return _analyse(options)
    if options.subnetworks:
        return _evaluate_subnetworks(options)
    if (options.against, options.order, options.points, options.finetune_epochs) != (None, "last", 9, None):
        return _complain("--against, --order, --points and --finetune-epochs are for --subnetworks.")
    if options.monte_carlo is not None:
        return _evaluate_monte_carlo(options, options.monte_carlo)
    if options.out is not None:
        return _complain("--out is for --subnetworks and --monte-carlo.")
    _load("evaluation")
    from stochastic_depth_lab.build import find_device
    from stochastic_depth_lab.evaluation import evaluate_run

    evaluations = evaluate_run(options.folder, device=find_device(options.device, "fp32"), data_root=options.data_root)
    if "best" not in evaluations:
        _note(f"{options.folder / 'checkpoints' / 'best.pt'} is missing: only the last weights were evaluated.")
    for weights, parts in evaluations.items():
        for part, evaluation in parts.items():
            _print(f"{weights} weights  {part:<10}  error {evaluation.error:.2f} %  loss {evaluation.loss:.4f}")
    return 0


def _refuse_unwritable(folder: Path | None) -> None:
    """Refuse, before any work, an output folder that is a file, lies under one, or cannot be written."""
    if folder is None:
        return
    if any(path.is_file() for path in (folder, *folder.parents)):
        raise ValueError(f"--out must be a folder, but {folder} is a file or lies under one.")
    try:
        with tempfile.TemporaryFile(dir=next(path for path in (folder, *folder.parents) if path.exists())):
            pass
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written: {error.strerror}.") from None


def _analyse(options: Evaluate) -> int:
    if options.subnetworks or options.monte_carlo is not None:
        return _complain("--analyse, --subnetworks and --monte-carlo exclude each other.")
    if options.out is not None:
        return _complain("--out is for --subnetworks and --monte-carlo: --analyse writes to the run folder.")
    _load("analysis")
    from stochastic_depth_lab.analysis import analyse
    from stochastic_depth_lab.build import find_device
    from stochastic_depth_lab.report.analysis import analysis_text

    analysis = analyse(
        options.folder,
        device=find_device(options.device, "fp32"),
        data_root=options.data_root,
        progress=lambda line: print(line, file=sys.stderr),  # noqa: T201
    )
    _print(analysis_text(analysis))
    return 0


def _evaluate_subnetworks(options: Evaluate) -> int:
    if options.monte_carlo is not None:
        return _complain("--subnetworks and --monte-carlo exclude each other.")
    if options.finetune_epochs is not None and options.finetune_epochs < 1:
        return _complain(f"--finetune-epochs must be at least 1, but is {options.finetune_epochs}.")
    _refuse_unwritable(options.out)
    _load("finetuning", "subnetworks", "observers")
    from stochastic_depth_lab.build import find_device
    from stochastic_depth_lab.finetuning import finetune
    from stochastic_depth_lab.report.subnetwork_curve import curve_text, write_curve
    from stochastic_depth_lab.subnetworks import subnetwork_curve

    name = options.folder.resolve().name
    twin = options.folder.resolve().with_name(name.removesuffix("-stochastic") + "-constant")
    against = options.against or (twin if twin.name != name and (twin / "config.json").exists() else None)
    device, out = find_device(options.device, "fp32"), options.out or options.folder / "evaluation"
    with _observing() as observer:
        train_on = functools.partial(
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
                finetune=None if options.finetune_epochs is None else train_on,
                progress=observer.on_remark,
            )
        except KeyboardInterrupt:
            kept = (
                ""
                if options.finetune_epochs is None
                else " Trained sub-networks are kept: repeat the command to resume."
            )
            return _complain(f"Stopped.{kept}", code=128 + signal.SIGINT)
    _print(curve_text(points))
    paths = write_curve(points, out)
    _print(f"\n{' '.join(map(str, paths))}")
    return 0


def _evaluate_monte_carlo(options: Evaluate, num_samples: int) -> int:
    _refuse_unwritable(options.out)
    _load("uncertainty")
    from stochastic_depth_lab.build import find_device
    from stochastic_depth_lab.report.reliability import reliability_text, write_reliability
    from stochastic_depth_lab.uncertainty import uncertainty

    device = find_device(options.device, "fp32")
    measured = uncertainty(options.folder, num_samples, device=device, data_root=options.data_root)
    _print(reliability_text(measured))
    paths = write_reliability(measured, options.out or options.folder / "evaluation")
    _print(f"\n{' '.join(map(str, paths))}")
    return 0


def _export(arguments: Sequence[str]) -> int:
    options = parse(Export, "export", arguments)
    if options.order != "last" and options.cost is None:
        return _complain("--order needs --cost: it says which blocks are removed first.")
    if options.out is not None:
        _refuse_unwritable(options.out.parent)
        if options.out.is_dir():
            return _complain(f"--out must be a file, but {options.out} is a folder.")
    _load("export")
    from stochastic_depth_lab.export import default_path, export_run

    made = export_run(
        options.folder,
        options.out
        or default_path(options.folder, options.format, smaller=(options.keep, options.cost) != (None, None)),
        form=options.format,
        keep=options.keep,
        cost=options.cost,
        order=options.order,
        normalise=options.normalise,
        data_root=options.data_root,
    )
    _print(
        f"{made.path}: {len(made.keep)} blocks, {made.num_parameters} parameters, {made.num_bytes / 1e6:.2f} MB; "
        f"on {made.num_images} test images it differs by {made.difference:.1e} of the largest output"
    )
    return 0


def _report(arguments: Sequence[str]) -> int:
    options = parse(Report, "report", arguments)
    from stochastic_depth_lab.report import run_folders

    folders, left_out = run_folders(options.folders)
    if left_out:
        _note(f"Left out {len(left_out)} runs without a finished epoch: {' '.join(map(str, left_out))}.")
    own = options.folders[0] if len(options.folders) == 1 else None
    _print_report(folders, options.out or own)
    return 0


def _schedule(arguments: Sequence[str]) -> int:
    options = parse(Schedule, "schedule", arguments)
    _load("build", "report")
    import torch

    import stochastic_depth as sd
    from stochastic_depth_lab.report import schedule_figure, schedule_text

    schedule = _named_schedule(options.schedule, options.final_survival_prob)
    model = sd.models.cifar_resnet(options.num_layers)
    depth = sd.make_stochastic_(model, schedule)
    blocks = range(1, len(depth.names) + 1)
    _print(schedule_text(blocks, depth.survival_probs))
    share = depth.cost(torch.zeros(1, 3, 32, 32)).training_flops
    _print(
        f"training FLOPs, counted on the {options.num_layers} layers for 32x32 images: {share:.1%} of constant depth"
    )
    if options.out is not None:
        _print(str(schedule_figure(blocks, depth.survival_probs, options.out)))
    return 0


def _named_schedule(name: str, final_survival_prob: float) -> "sd.Schedule":
    from stochastic_depth import SCHEDULES

    return SCHEDULES[name](final_survival_prob)


def _inspect(arguments: Sequence[str]) -> int:
    options = parse(Inspect, "inspect", arguments)
    _load("inspect", "build")
    from stochastic_depth_lab.build import find_device
    from stochastic_depth_lab.inspect import inspect_model

    schedule = None if options.schedule is None else _named_schedule(options.schedule, options.final_survival_prob)
    with EndingAtOnce():  # it imports the model's package
        text = inspect_model(
            options.model,
            options.drop_path_rate,
            schedule=schedule,
            measure=options.measure,
            batch_size=options.batch_size,
            image_size=options.image_size,
            device=find_device(options.device, "fp32"),
        )
    _print(text)
    return 0


def _bench(arguments: Sequence[str]) -> int:
    options = parse(Bench, "bench", arguments)
    _load("bench", "build")
    from stochastic_depth_lab.bench import bench, bench_text
    from stochastic_depth_lab.build import find_device

    device = find_device(options.device, "fp32")
    measured = bench(
        num_layers=options.num_layers,
        batch_size=options.batch_size,
        final_survival_prob=options.final_survival_prob,
        rounds=options.rounds,
        device=device,
    )
    _print(bench_text(measured, device, options.rounds))
    return 0


def _complete(arguments: Sequence[str]) -> int:
    options = parse(Completion, "completion", arguments)
    names = {
        "train": [*EXPERIMENTS],
        "reproduce": [*STUDIES, *dict.fromkeys(name.rpartition("-")[0] for name in EXPERIMENTS)],
        "sweep": [*EXPERIMENTS, *STUDIES],
    }
    words = {
        command: [*names.get(command, ()), *(each.flag for each in options_of(kind) if not each.positional), "--help"]
        for command, (kind, _) in _COMMANDS.items()
    }
    _print(completion(options.shell, PROGRAM, words))
    return 0


_COMMANDS: dict[str, tuple[type, Callable[[Sequence[str]], int]]] = {
    "train": (Train, _train),
    "reproduce": (Reproduce, _reproduce),
    "sweep": (Sweep, _sweep),
    "evaluate": (Evaluate, _evaluate),
    "export": (Export, _export),
    "report": (Report, _report),
    "schedule": (Schedule, _schedule),
    "inspect": (Inspect, _inspect),
    "bench": (Bench, _bench),
    "completion": (Completion, _complete),
}


def _overview() -> str:
    width = min(shutil.get_terminal_size().columns, 100) - 1
    lines = [
        textwrap.fill(f"  {name:<12}{summary(kind)}", width, subsequent_indent=" " * 14)
        for name, (kind, _) in _COMMANDS.items()
    ]
    return "\n".join(
        [
            f"Usage: {PROGRAM} COMMAND ...",
            "",
            "Train networks with stochastic depth, and compare them with constant depth.",
            "",
            "Commands:",
            *lines,
            "",
            "Options:",
            "  -h, --help  Show this help; COMMAND --help explains a command.",
            "  --version   Show the version.",
            "",
            "Examples:",
            f"  {PROGRAM} reproduce digits --out runs/digits",
            f"  {PROGRAM} train digits-stochastic --out runs/one",
            f"  {PROGRAM} report runs/one",
        ]
    )


@contextmanager
def _warnings_in_one_line() -> Generator[None]:
    """Within, a warning is shown without the place in the code that it comes from."""

    def in_one_line(message: Warning | str, *_: object) -> str:
        return f"{message}\n"

    before = warnings.formatwarning
    warnings.formatwarning = in_one_line
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _observing() -> "Generator[Observer]":
    """Who shows progress: a bar on a terminal, plain lines elsewhere."""
    from stochastic_depth_lab.observers import Lines, Terminal, terminal_progress

    if sys.stderr.isatty():
        with terminal_progress() as progress:
            yield Terminal(progress)
    else:
        yield Lines(sys.stderr)


def _train_all(runs: Sequence[tuple[Experiment, Path]], options: RunOptions, observer: "Observer", stop: Stop) -> None:
    """Train one after the other, each with all the processes that torchrun has started, until a stop is requested."""
    from stochastic_depth_lab import processes, records
    from stochastic_depth_lab.build import find_device

    devices = [find_device(options.device, experiment.precision, processes.local_rank()) for experiment, _ in runs]
    with processes.joined(devices[0]) as together:
        # Refuse before hours of work, not after.
        look = {folder: partial(records.look, folder, each, resume=options.resume) for each, folder in runs}
        finished = {folder: together.from_first(result) is not None for folder, result in look.items()}
        if together.is_first:
            for remark in _remarks(runs, options, devices[0]):
                observer.on_remark(remark)
        for experiment, folder in runs:
            if together.any(stop.signal is not None):  # of several processes another one may have been told
                stop.signal = stop.signal or signal.SIGTERM
            elif not finished[folder]:
                _train_one(experiment, folder, options, devices[0], observer, stop, together)
            elif together.is_first:
                observer.on_remark(f"{folder} is finished already.")


def _remarks(
    runs: Sequence[tuple[Experiment, Path]], options: RunOptions, device: "torch.device"
) -> Generator[str, None, None]:
    """What may surprise later."""
    if options.quick:
        yield _QUICK
    if device.type == "cpu" and any(experiment.precision == "fp16" for experiment, _ in runs):
        yield "fp16 is very slow on a CPU, up to 50 times as slow as fp32. Use --precision bf16."
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
    from stochastic_depth_lab import loop
    from stochastic_depth_lab.observers import TensorBoard

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
        # It has saved itself; the command says how to resume once the progress bar is gone.
        stop.signal = stop.signal or signal.SIGTERM


def _print_result(folder: Path) -> None:
    from stochastic_depth_lab import records

    result = records.read_json(folder / "result.json")
    _print(
        f"test error {result['test_error']:.2f} % at the lowest validation error "
        f"({result['validation_error']:.2f} %, epoch {result['best_epoch']} of {result['epochs']}), "
        f"{result['train_s']:.1f} s of training; see {folder}"
    )


def _print_report(folders: Sequence[Path], out: Path | None) -> None:
    from stochastic_depth_lab.report import read_run, text_table, write_report

    page = write_report(folders, out)
    width = shutil.get_terminal_size().columns
    _print(text_table([read_run(folder) for folder in folders], width))
    _print(f"\nreport: {page}, figures: {page.parent / 'figures'}")


def _exit_code(stop: Stop, folders: Sequence[Path], arguments: Sequence[str]) -> int:
    if stop.signal is None:
        return 0
    if not _is_first():
        return 128 + stop.signal
    if not any((folder / "checkpoints" / "last.pt").exists() for folder in folders):
        return _complain("Stopped before there was anything to save.", code=128 + stop.signal)
    again = shlex.join([PROGRAM, *arguments, *([] if "--resume" in arguments else ["--resume"])])
    return _complain(f"Stopped and saved. Resume with: {again}", code=128 + stop.signal)


def _is_first() -> bool:
    """Whether this process is the only one, or the first of those that torchrun has started."""
    return os.environ.get("RANK", "0") == "0"


def _complain(message: str, code: int = 2) -> int:
    _note(message)
    return code


def _note(message: str) -> None:
    print(" ".join(message.split()), file=sys.stderr, flush=True)  # noqa: T201 -- one line, whatever it holds


def _print(text: str) -> None:
    print(text, flush=True)  # noqa: T201 -- results are what the command is for
