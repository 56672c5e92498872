"""LayerSkip with Hugging Face Trainer: python examples/layerskip.py --out runs/layerskip --epochs 40.

A byte-level Llama learns a file of Python's standard library with dropped layers and early exits; its first layers then
draft for the whole model. Run it again with more epochs: it resumes from its last checkpoint, with the same gates.
"""

import argparse
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

import stochastic_depth as sd

CURRICULUM = 200  # steps until the drop rates have their full strength
LENGTH = 64


class LayerSkipTrainer(Trainer):
    """Drops layers by the schedule at this step, and adds the losses of early exits."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if return_outputs or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        depth = sd.controller(model)
        depth.set_progress(min(self.state.global_step / CURRICULUM, 1.0))
        exits = sd.rotating_exits(len(depth.names), every=2, step=self.state.global_step)
        return sd.early_exit_loss(model, {**inputs, "num_items_in_batch": num_items_in_batch}, exits, scale=0.5)


class SaveGates(TrainerCallback):
    """Puts the gates into Trainer's checkpoints, and takes them out again."""

    def __init__(self, depth: sd.Controller) -> None:
        self.depth = depth

    def _path(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "gates.json")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._path(args, state).write_text(json.dumps(self.depth.state_dict()))

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step:
            self.depth.load_state_dict(json.loads(self._path(args, state).read_text()))


def small_llama() -> LlamaForCausalLM:
    """4 layers over bytes. A checkpoint of yours: LlamaForCausalLM.from_pretrained(...)."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, bos_token_id=None, eos_token_id=None))


def sequences() -> torch.Tensor:
    """64 sequences of bytes of argparse.py (PSF License 2.0)."""
    text = inspect.getsource(argparse).encode()[: 64 * LENGTH]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, LENGTH)


def train_model(out: Path, epochs: int) -> LlamaForCausalLM:
    """Train to that many epochs; the model is still stochastic."""
    model = small_llama()
    schedule = sd.layerskip(0.2, over_time="exponential")
    depth = sd.make_stochastic_(model, schedule, layers=["model.layers.*"], granularity="sample")
    data = [{"input_ids": ids, "labels": ids} for ids in sequences()]
    arguments = TrainingArguments(
        str(out), num_train_epochs=epochs, per_device_train_batch_size=8, save_strategy="epoch", save_total_limit=1,
        learning_rate=3e-3, lr_scheduler_type="constant", use_cpu=True, seed=0, report_to="none", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    trainer = LayerSkipTrainer(model, arguments, train_dataset=data, callbacks=[SaveGates(depth)])
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if out.is_dir() else None)
    return model


def train(out: Path, epochs: int) -> dict[str, torch.Tensor]:
    """Train, save plain checkpoints of the model and of its first half, and compare two ways to generate."""
    model = train_model(out, epochs).eval()
    ids = sequences()
    with torch.no_grad():
        losses = sd.early_exit_losses(model, {"input_ids": ids, "labels": ids}, range(4))
    print("loss when leaving after a layer:", *(f"{layer + 1}: {loss:.2f}" for layer, loss in losses.items()))
    sd.subnetwork(model, keep=[0, 1], inputs={"input_ids": ids}).save_pretrained(out / "first-half")
    sd.fold_(model)  # plain transformers again; LayerSkip does not scale, so no weight changes
    model.generation_config.use_cache = True  # Trainer switched it off
    model.save_pretrained(out / "folded")
    # The first two layers draft up to 5 tokens, always the same number, and the whole model checks them.
    draft = {"num_assistant_tokens": 5, "num_assistant_tokens_schedule": "constant"}
    model.generation_config.update(**draft, assistant_confidence_threshold=0.0)
    calls: list[int] = []
    hook = model.model.layers[-1].register_forward_hook(lambda *_: calls.append(1))
    prompt = {"input_ids": ids[3:4, :32], "attention_mask": torch.ones(1, 32), "max_new_tokens": 48}
    greedy = model.generate(**prompt, do_sample=False)
    num_greedy = len(calls)
    drafted = model.generate(**prompt, do_sample=False, assistant_early_exit=2)
    hook.remove()
    assert torch.equal(greedy, drafted), "self-speculative decoding is lossless"
    print(f"runs of the last layer for 48 tokens: {num_greedy} greedy, {len(calls) - num_greedy} with drafts")
    print(repr(bytes(drafted[0].tolist()).decode(errors="replace")))
    return model.state_dict()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=40)
    train(**vars(parser.parse_args()))
