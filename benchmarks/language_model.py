"""Does a language model trained with dropped layers and early exits draft well enough for its own full depth?

    python benchmarks/language_model.py run --out runs/language-model --until 11:00
    python benchmarks/language_model.py report --out runs/language-model     # writes results/language-model

A small Llama, from random weights, on the sources of Python's standard library (PSF License 2.0; a few files have
licenses of their own, named in them). Four kinds: plain; layers dropped (LayerSkip's rates and curriculum); early exits
supervised (LayerSkip's rotation and weights); both. A seed sets the weights, the gates and the order of the sequences,
each of which is seen once per epoch. `run` appends one JSON line per finished run to OUT/runs.jsonl, seed by seed, and
resumes where it was stopped: only an unfinished run is repeated.

The baselines are interpolated Kneser-Ney 5-grams (discount 0.75): of the same tokens, and of the same text as bytes.
Times are process time of one thread, without validation.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import hashlib
import json
import math
import random
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import torchvision_schemas  # noqa: F401
from protocol import processor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import stochastic_depth as sd

KINDS = ("plain", "layer dropout", "early-exit loss", "both")
SEEDS = (0, 1, 2)
VOCABULARY, LENGTH, BATCH, STEPS = 512, 128, 4, 15_400  # two epochs
NUM_LAYERS, WIDTH, HEADS, LEARNING_RATE = 6, 96, 3, 4e-3
LAYERS = "model.layers.*"
MAX_DROP_RATE, EVERY, EXIT_SCALE = 0.2, 3, 1.0
NUM_VALIDATION = 400  # sequences
EXITS = (1, 2, 3, 4)  # number of layers that draft
DRAFT, PROMPT, NEW, NUM_PROMPTS = 4, 64, 64, 6
OTHERS = {"test", "tests", "idle_test", "site-packages", "idlelib", "lib2to3", "encodings", "turtledemo", "ensurepip"}


# ------------------------------------------------------------------------------------------------ data


def sources() -> tuple[list[str], list[str]]:
    """The files of the standard library for training and, by a hash of the name, one in twenty for validation."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not OTHERS & set(path.relative_to(root).parts))
    parts: tuple[list[str], list[str]] = ([], [])
    for file in files:
        is_validation = hashlib.sha256(file.relative_to(root).as_posix().encode()).digest()[0] < 13
        parts[is_validation].append(file.read_text(encoding="utf-8", errors="ignore"))
    return parts


def tokens(folder: Path) -> dict[str, Any]:
    """Tokens of both parts, by a byte-pair encoding of the training files; computed once and kept in `folder`."""
    cached = folder / "tokens.pt"
    if cached.exists():
        return torch.load(cached)
    train, validation = sources()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(train, trainer)
    random.Random(0).shuffle(train)

    def encoded(texts: list[str]) -> Tensor:
        return torch.tensor([token for one in tokenizer.encode_batch(texts) for token in [*one.ids, 0]])

    made: dict[str, Any] = {"train": encoded(train), "validation": encoded(validation)}
    made["tokenizer"] = tokenizer.to_str()
    torch.save(made, cached)
    return made


def baselines(data: dict[str, Any], num_seen: int) -> dict[str, float]:
    """Losses of the 5-grams, in bits per byte of the validation text; and the number of bytes per token in it."""
    tokenizer = Tokenizer.from_str(data["tokenizer"])
    held_out = data["validation"][: NUM_VALIDATION * LENGTH].tolist()
    seen = data["train"][:num_seen].tolist()
    as_bytes, held_out_bytes = (list(tokenizer.decode(one).encode()) for one in (seen, held_out))
    per_token = len(held_out_bytes) / len(held_out)
    return {
        "tokens": five_gram(seen, held_out, VOCABULARY) / math.log(2) / per_token,
        "bytes": five_gram(as_bytes, held_out_bytes, 256) / math.log(2),
        "num_seen": len(seen),
        "bytes_per_token": per_token,
    }


def five_gram(
    train: Sequence[int], validation: Sequence[int], vocabulary: int, *, n: int = 5, discount: float = 0.75
) -> float:
    """Loss per token, in nats, of an interpolated Kneser-Ney n-gram: lower orders count in how many contexts."""
    counts: list[collections.Counter[tuple[int, ...]]] = [collections.Counter() for _ in range(n + 1)]
    counts[n].update(zip(*(train[i:] for i in range(n)), strict=False))
    for order in range(n - 1, 0, -1):
        counts[order].update(gram[1:] for gram in counts[order + 1])
    totals: dict[tuple[int, ...], int] = collections.Counter()
    types: dict[tuple[int, ...], int] = collections.Counter()
    for order in range(1, n + 1):  # contexts of different lengths differ
        for gram, count in counts[order].items():
            totals[gram[:-1]] += count
            types[gram[:-1]] += 1
    loss = 0.0
    for end in range(n, len(validation) + 1):
        prob = 1 / vocabulary
        for order in range(1, n + 1):
            gram = tuple(validation[end - order : end])
            total = totals.get(gram[:-1], 0)
            if not total:
                break
            prob = max(counts[order][gram] - discount, 0) / total + discount * types[gram[:-1]] / total * prob
        loss -= math.log(prob)
    return loss / (len(validation) - n + 1)


# ------------------------------------------------------------------------------------------------ training


def small_llama(seed: int) -> LlamaForCausalLM:
    """6 layers of 96 features, 0.8 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=256, use_cache=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def batches(train: Tensor, seed: int, num_steps: int) -> Iterator[Tensor]:
    """Each sequence is seen once per epoch, in random order: neighbors in a batch would be of one file."""
    num_batches = min(num_steps, len(train) // (LENGTH * BATCH))
    sequences = train[: num_batches * BATCH * LENGTH].view(-1, LENGTH)
    generator = torch.Generator().manual_seed(seed)
    for first in range(0, num_steps, num_batches):
        order = torch.randperm(len(sequences), generator=generator).split(BATCH)
        yield from (sequences[rows] for rows in order[: num_steps - first])


def train(kind: str, seed: int, data: Tensor, num_steps: int) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Train one model; returns it with what its training took."""
    model = small_llama(seed).train()
    depth = None
    if kind != "plain":
        rate = MAX_DROP_RATE if kind in ("layer dropout", "both") else 0.0
        schedule = sd.layerskip(rate, over_time="exponential")
        depth = sd.make_stochastic_(model, schedule, layers=[LAYERS], seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warm_up = 0.05 * num_steps
    lr_schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 1 - step / num_steps)
    )
    num_layers_run, losses = 0.0, []
    begin = time.process_time()
    for step, ids in enumerate(batches(data, seed, num_steps)):
        inputs = {"input_ids": ids, "labels": ids}
        if depth is not None:
            depth.set_progress(step / (num_steps - 1))
        if kind in ("early-exit loss", "both"):
            exits = sd.rotating_exits(NUM_LAYERS, every=EVERY, step=step)
            loss = sd.early_exit_loss(model, inputs, exits, scale=EXIT_SCALE)
        else:
            loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        num_layers_run += NUM_LAYERS if depth is None else sum(depth.last_gates or ())
    seconds = time.process_time() - begin
    if depth is not None:
        sd.fold_(model)  # no scaling: stochastic depth is removed, nothing else changes
    return model.eval(), {"train_s": seconds, "layers_per_step": num_layers_run / num_steps, "losses": losses[::20]}


# ------------------------------------------------------------------------------------------------ measures


@torch.no_grad()
def validate(model: LlamaForCausalLM, data: Tensor) -> dict[str, Any]:
    """Loss when leaving after layer 1..L, and how often the best token is that of the whole model."""
    sequences = data[: NUM_VALIDATION * LENGTH].view(-1, LENGTH)
    num_layers = model.config.num_hidden_layers
    losses, agreements = torch.zeros(num_layers), torch.zeros(num_layers)
    parts = sequences.split(20)
    for ids in parts:
        states = model(ids, output_hidden_states=True).hidden_states
        # The last of transformers' hidden states has been through the norm already.
        logits = [model.lm_head(model.model.norm(state)) for state in states[1:-1]] + [model.lm_head(states[-1])]
        best = logits[-1].argmax(-1)
        for layer, own in enumerate(logits):
            flat = own[:, :-1].flatten(0, 1)
            losses[layer] += torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten()) / len(parts)
            agreements[layer] += (own.argmax(-1) == best).float().mean() / len(parts)
    return {"exit_losses": losses.tolist(), "agreements": agreements.tolist()}


def generate(model: LlamaForCausalLM, data: Tensor) -> list[dict[str, Any]]:
    """Self-speculative decoding by the first k layers against greedy decoding, in interleaved turns."""
    model.config.use_cache = True
    config = model.generation_config
    config.use_cache = True  # False from the configuration of the training
    config.num_assistant_tokens, config.num_assistant_tokens_schedule = DRAFT, "constant"
    config.assistant_confidence_threshold = 0.0  # always DRAFT tokens: acceptance is then a plain share
    calls = collections.Counter[int]()
    hooks = [
        layer.register_forward_hook(lambda *_, index=index: calls.update([index]))
        for index, layer in enumerate(model.model.layers)
    ]
    rows = {k: collections.Counter() for k in (0, *EXITS)}
    prompts = data[len(data) // 2 :][: NUM_PROMPTS * PROMPT].view(NUM_PROMPTS, 1, PROMPT)
    last = len(model.model.layers) - 1
    for prompt in prompts:
        expected = None
        for k, row in rows.items():
            calls.clear()
            begin = time.process_time()
            options: dict[str, Any] = {"assistant_early_exit": k} if k else {}
            output = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, **options
            )
            row["seconds"] += time.process_time() - begin
            row["tokens"] += output.shape[1] - PROMPT
            row["whole"] += calls[last]
            row["drafted"] += calls[0] - calls[last] if k < last else 0
            row["layer_calls"] += sum(calls.values())
            expected = output if expected is None else expected
            row["identical"] += int(torch.equal(output, expected))
    for hook in hooks:
        hook.remove()
    model.config.use_cache = False
    return [{"k": k, **row} for k, row in rows.items()]


def run(out: Path, until: datetime.datetime | None, num_steps: int) -> None:
    """Train and measure what is not done yet."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    data, rows = tokens(out), out / "runs.jsonl"
    validation = data["validation"][: NUM_VALIDATION * LENGTH]
    baseline = out / "baseline.json"
    if not baseline.exists():
        baseline.write_text(json.dumps(baselines(data, num_steps * BATCH * LENGTH)))
    finished = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {(row["kind"], row["seed"]) for row in finished}
    for seed in SEEDS:
        for kind in KINDS:
            if (kind, seed) in done:
                continue
            if until is not None and datetime.datetime.now() >= until:
                return
            model, row = train(kind, seed, data["train"], num_steps)
            model.save_pretrained(out / f"{kind.replace(' ', '-')}-{seed}")
            row = {
                "kind": kind, "seed": seed, "num_steps": num_steps, **row, **validate(model, validation),
                "generation": generate(model, validation), "processor": processor(), "torch": torch.__version__,
            }  # fmt: skip
            with rows.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(kind, seed, f"{row['train_s']:.0f} s", [f"{loss:.3f}" for loss in row["exit_losses"]], flush=True)


# ------------------------------------------------------------------------------------------------ report


def expected_tokens(acceptance: float, draft: int) -> float:
    """Tokens per round, if each drafted token fits with this probability: 1 + a + ... + a^draft."""
    return sum(acceptance**count for count in range(draft + 1))


def break_even(cost_of_draft: float, draft: int) -> float:
    """The acceptance rate at which a round of `draft` drafts and one check costs what its tokens cost one by one.

    `cost_of_draft` is that of a draft in forwards of the whole model, a check counts 1; above 1 there is no such rate.
    """
    low, high = 0.0, 1.0
    if expected_tokens(high, draft) < 1 + draft * cost_of_draft:
        return math.inf
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if expected_tokens(middle, draft) > 1 + draft * cost_of_draft else (middle, high)
    return high


def acceptance_of(row: dict[str, Any]) -> float:
    """The probability with which a drafted token fits, from the number of tokens per round: the a of 1 + a + ...

    It counts each token once that was checked after tokens that fit; the plain share of those drafted would count the
    tokens behind a wrong one too.
    """
    per_round = row["tokens"] / row["whole"]
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, DRAFT) < per_round else (low, middle)
    return high


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several, the standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def report(out: Path) -> None:
    """Write runs, baselines and the figure to results/language-model, and the tables into the page of the results."""
    results = Path(__file__).parents[1] / "results" / "language-model"
    results.mkdir(parents=True, exist_ok=True)
    for name in ("runs.jsonl", "baseline.json"):
        if out != results:
            (results / name).write_bytes((out / name).read_bytes())
    rows = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    baseline = json.loads((out / "baseline.json").read_text())
    by_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in KINDS}
    by_kind = {kind: of_kind for kind, of_kind in by_kind.items() if of_kind}
    to_bits = 1 / math.log(2) / baseline["bytes_per_token"]
    lines = [
        "| | n | loss, nats per token | bits per byte | training, process s | layers per step |",
        "|---|---|---|---|---|---|",
    ]
    for kind, of_kind in by_kind.items():
        losses = [row["exit_losses"][-1] for row in of_kind]
        lines.append(
            f"| {kind} | {len(of_kind)} | {spread(losses, 3)} | {spread([loss * to_bits for loss in losses], 3)} | "
            f"{spread([row['train_s'] for row in of_kind], 1)} | "
            f"{spread([row['layers_per_step'] for row in of_kind], 2)} |"
        )
    for name, text in (("tokens", "same tokens"), ("bytes", "same text, bytes")):
        lines.append(f"| 5-gram, {text} | | | {baseline[name]:.3f} | | |")
    lines += [
        "",
        "| loss after layer | " + " | ".join(map(str, range(1, NUM_LAYERS + 1))) + " |",
        "|" + "---|" * (NUM_LAYERS + 1),
    ]
    for kind, of_kind in by_kind.items():
        exits = zip(*(row["exit_losses"] for row in of_kind), strict=True)
        lines.append(f"| {kind} | " + " | ".join(spread(losses, 3) for losses in exits) + " |")
    columns = [f"drafts by k of {NUM_LAYERS} layers", "k", "acceptance", "break-even by layers", "best token agrees"]
    columns += ["layers per token", "tokens per s / greedy", "identical"]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for kind, of_kind in by_kind.items():
        for index, k in enumerate(EXITS, 1):
            drafted = [row["generation"][index] for row in of_kind]
            greedy = [row["generation"][0] for row in of_kind]
            speeds = [
                one["tokens"] / one["seconds"] / (other["tokens"] / other["seconds"])
                for one, other in zip(drafted, greedy, strict=True)
            ]
            lines.append(
                f"| {kind} | {k} | {spread([acceptance_of(row) for row in drafted], 2)} | "
                f"{break_even(k / NUM_LAYERS, DRAFT):.2f} | "
                f"{spread([row['agreements'][k - 1] for row in of_kind], 2)} | "
                f"{spread([row['layer_calls'] / row['tokens'] for row in drafted], 2)} | {spread(speeds, 2)} | "
                f"{sum(row['identical'] for row in drafted)} of {NUM_PROMPTS * len(drafted)} |"
            )
    text = "\n".join(lines) + "\n"
    print(text)
    page = results.parents[1] / "docs" / "results" / "language-model.md"
    begin, end = "<!-- tables: benchmarks/language_model.py report -->\n\n", "\n<!-- end of tables -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(before + begin + text + end + rest.partition(end)[2])
    plt.rcParams["svg.hashsalt"] = "language-model"  # the same runs, the same file
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    for kind, of_kind in by_kind.items():
        curve = [statistics.mean(losses) for losses in zip(*(row["exit_losses"] for row in of_kind), strict=True)]
        left.plot(range(1, NUM_LAYERS + 1), curve, marker="o", label=f"{kind} (n = {len(of_kind)})")
        rates = [
            statistics.mean(acceptance_of(row["generation"][index]) for row in of_kind)
            for index in range(1, len(EXITS) + 1)
        ]
        right.plot(EXITS, rates, marker="o", label=kind)
    right.plot(
        EXITS, [break_even(k / NUM_LAYERS, DRAFT) for k in EXITS], color="black", linestyle=":", label="break-even"
    )
    left.set(xlabel="layers run", ylabel="validation loss, nats per token")
    right.set(xlabel="layers that draft", ylabel="acceptance rate", ylim=(0, 1), xticks=EXITS)
    for axes in (left, right):  # below the axes, where no line is
        axes.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
    figure.savefig(results / "language-model.svg", metadata={"Date": None})


def main() -> None:
    """Run or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "report"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--until", help="start no further run after this time of day, HH:MM")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"training steps per run (default {STEPS})")
    options = parser.parse_args()
    until = None
    if options.until:
        until = datetime.datetime.combine(datetime.date.today(), datetime.time.fromisoformat(options.until))
    if options.command == "run":
        run(options.out, until, options.steps)
    else:
        report(options.out)


if __name__ == "__main__":
    main()
