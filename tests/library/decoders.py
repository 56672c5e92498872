"""Decoder families of transformers, tiny and in float64."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

NUM_LAYERS, VOCABULARY = 3, 40
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Llama": (GROUPED, "model.layers.*"),
    "Qwen2": (GROUPED, "model.layers.*"),
    "Gemma": ({**GROUPED, "head_dim": 8}, "model.layers.*"),
    "Gemma2": ({**GROUPED, "head_dim": 8, "sliding_window": 4}, "model.layers.*"),
    "Mistral": ({**GROUPED, "sliding_window": 4}, "model.layers.*"),
    "GPT2": ({**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, "transformer.h.*"),
    "GPTNeoX": ({**SIZES, "intermediate_size": 24}, "gpt_neox.layers.*"),
    "OPT": (
        {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8, "dropout": 0.0, "max_position_embeddings": 32},
        "model.decoder.layers.*",
    ),
}
LEAVE_EARLY = ("Llama", "Qwen2", "Gemma", "Gemma2", "Mistral")
"""Families whose forward stops at `config.num_hidden_layers`, which transformers' early exits need."""


def class_of(family: str) -> type[Any]:
    return transformers.GPT2LMHeadModel if family == "GPT2" else getattr(transformers, f"{family}ForCausalLM")


def decoder(family: str = "Llama", *, attention: str = "eager", use_cache: bool = False) -> Any:
    torch.manual_seed(0)
    # The loss is named, since transformers does not find it by the names of all of these classes.
    config = getattr(transformers, f"{family}Config")(
        **FAMILIES[family][0], use_cache=use_cache, loss_type="ForCausalLM", attn_implementation=attention
    )
    model = class_of(family)(config).double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)  # so that layers and their order matter
    return model


def layers_of(family: str, model: Any) -> nn.ModuleList:
    return model.get_submodule(FAMILIES[family][1].removesuffix(".*"))


def token_ids(num: int = 3, length: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(1))


def mask_layers(layers: nn.ModuleList, masks: Any) -> None:
    """The plain version: each layer computes everything, and a sample with a closed gate keeps its hidden states."""
    for layer, mask in zip(layers, masks, strict=True):

        def keep(_layer: nn.Module, args: Any, kwargs: Any, output: Any, mask: Any = mask) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            own = output[0] if isinstance(output, tuple) else output
            kept = torch.where(torch.as_tensor(mask).view(-1, 1, 1), own, hidden)
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        layer.register_forward_hook(keep, with_kwargs=True)
