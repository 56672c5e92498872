"""Subnetworks of decoders: plain checkpoints of fewer layers, which transformers loads and generates with."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from decoders import FAMILIES, LEAVE_EARLY, NUM_LAYERS, class_of, decoder, layers_of, mask_layers, token_ids

import stochastic_depth as sd

PROMPT = token_ids(1)
OPTIONS = {"attention_mask": torch.ones_like(PROMPT), "max_new_tokens": 6, "do_sample": False}


def stochastic(family: str, **options: Any) -> Any:
    model = decoder(family, use_cache=True).eval()
    model.generation_config.eos_token_id = None
    sd.make_stochastic_(model, sd.layerskip(0.5), layers=[FAMILIES[family][1]], **options)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("keep", [[0, 1], [0, 2]], ids=["first", "others"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_saves_and_loads_as_a_plain_checkpoint(family: str, keep: list[int], tmp_path: Path) -> None:
    model = stochastic(family)
    before = copy.deepcopy(model.config.to_dict())
    plain = decoder(family, use_cache=True).eval()
    mask_layers(layers_of(family, plain), [[index in keep] for index in range(NUM_LAYERS)])
    small = sd.subnetwork(model, keep, inputs={"input_ids": token_ids()})
    assert type(small) is class_of(family)
    assert len(layers_of(family, small)) == small.config.num_hidden_layers == 2
    assert model.config.to_dict() == before
    small.save_pretrained(tmp_path)
    loaded = class_of(family).from_pretrained(tmp_path, dtype=torch.float64, attn_implementation="eager").eval()
    assert loaded.config.num_hidden_layers == 2
    expected = plain(token_ids(), use_cache=False).logits
    for made in (small, loaded):
        torch.testing.assert_close(made(token_ids()).logits, expected, rtol=1e-6, atol=1e-6)
        # With a cache, in which each layer has its own entry.
        made.generation_config.eos_token_id = None
        generated = made.generate(PROMPT, **OPTIONS)
        assert generated.shape[1] == 13
        for length in range(PROMPT.shape[1], 13):
            best = plain(generated[:, :length], use_cache=False).logits[:, -1].argmax(-1)
            assert torch.equal(best, generated[:, length])


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in LEAVE_EARLY])
def test_as_the_assistant_of_a_model_that_cannot_leave_early(family: str) -> None:
    model = stochastic(family)
    small = sd.subnetwork(model, [0, 1], inputs={"input_ids": token_ids()})
    sd.fold_(model, inputs={"input_ids": token_ids()})
    assert torch.equal(model.generate(PROMPT, assistant_model=small, **OPTIONS), model.generate(PROMPT, **OPTIONS))


def test_entries_of_the_configuration_for_each_layer_go_along() -> None:
    model = stochastic("Gemma2")
    assert model.config.layer_types == ["sliding_attention", "full_attention", "sliding_attention"]
    small = sd.subnetwork(model, [1, 2], inputs={"input_ids": token_ids()})
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


def test_with_the_papers_factor_a_warning_says_that_the_checkpoint_lacks_it() -> None:
    model = stochastic("Llama", rescale="eval")
    expected = model(token_ids()).logits
    with pytest.warns(UserWarning, match=r"cannot go into weights[^\n]*its state_dict does not contain"):
        small = sd.subnetwork(model, range(NUM_LAYERS), inputs={"input_ids": token_ids()})
    torch.testing.assert_close(small(token_ids()).logits, expected)


def test_by_a_number_of_blocks_the_first_are_kept() -> None:
    small = sd.subnetwork(stochastic("Llama"), num_blocks=1, inputs={"input_ids": token_ids()})
    assert small.config.num_hidden_layers == len(small.model.layers) == 1
    assert torch.equal(small.model.layers[0].mlp.up_proj.weight, decoder().model.layers[0].mlp.up_proj.weight)


HALVES = {"d_model": 16, "use_cache": False, "pad_token_id": 0, "decoder_start_token_id": 1}
ATTENTION = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
ENCODER_DECODERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "Bart": (
        {**HALVES, **ATTENTION, "encoder_layers": 3, "decoder_layers": 3, "forced_eos_token_id": None},
        "model.encoder.layers.*",
        "model.decoder.layers.*",
    ),
    "T5": ({**HALVES, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_heads": 2}, "encoder.block.*", "decoder.block.*"),
}


def saved_and_loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=torch.float64, attn_implementation="eager").eval()


def random_model(name: str, **config: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)(
        getattr(transformers, f"{name.partition('For')[0].partition('LM')[0]}Config")(
            vocab_size=40, attn_implementation="eager", **config
        )
    )
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("half", [1, 2], ids=["encoder", "decoder"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_one_half_of_an_encoder_and_decoder(family: str, half: int, tmp_path: Path) -> None:
    """Both halves have as many layers, so that only the model's class tells whose number is whose."""
    model = random_model(f"{family}ForConditionalGeneration", **ENCODER_DECODERS[family][0])
    plain = copy.deepcopy(model)
    pattern = ENCODER_DECODERS[family][half]
    sd.make_stochastic_(model, sd.layerskip(0.5), layers=[pattern])
    inputs = {"input_ids": token_ids(), "decoder_input_ids": token_ids()[:, :5]}
    small = sd.subnetwork(model, [0, 2], inputs=inputs)
    path = pattern.removesuffix(".*")
    assert len(small.get_submodule(path)) == 2
    layer = plain.get_submodule(path)[1]
    layer.register_forward_hook(
        lambda _layer, args, output: (args[0], *output[1:]) if isinstance(output, tuple) else args[0]
    )
    expected = plain(**inputs).logits
    for made in (small, saved_and_loaded(small, tmp_path)):
        torch.testing.assert_close(made(**inputs).logits, expected, rtol=1e-6, atol=1e-6)
        made.generation_config.eos_token_id = None
        # transformers 5.23 gives the decoder of a T5 a cache with as many entries as the encoder has layers.
        made.generate(input_ids=token_ids(1), max_new_tokens=4, do_sample=False, use_cache=family != "T5")


@pytest.mark.parametrize(
    ("name", "layers", "config"),
    [
        (
            "GPT2LMHeadModel", "transformer.h.*",
            {"n_embd": 16, "n_layer": 3, "n_head": 2, "scale_attn_by_inverse_layer_idx": True},
        ),
        (
            "ModernBertForMaskedLM", "model.layers.*",
            {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
             "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        ),
    ],
)  # fmt: skip
def test_a_warning_if_the_checkpoint_is_another_network(
    name: str, layers: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """GPT-2's attention divides by a layer's number; ModernBERT's first layer has one norm less."""
    model = random_model(name, **config)
    sd.make_stochastic_(model, sd.layerskip(0.5), layers=[layers])
    inputs = {"input_ids": token_ids()}
    with pytest.warns(UserWarning, match=r"save_pretrained would write another network: the code of \w+ depends on"):
        small = sd.subnetwork(model, [1, 2], inputs=inputs)
    difference = small(**inputs).logits - saved_and_loaded(small, tmp_path)(**inputs).logits
    assert difference.abs().max() > 1e-4
    first = sd.subnetwork(model, [0, 1], inputs=inputs)  # the same numbers, and no warning
    torch.testing.assert_close(
        saved_and_loaded(first, tmp_path / "first")(**inputs).logits, first(**inputs).logits, rtol=1e-6, atol=1e-6
    )


def test_numbers_of_layers_by_another_name() -> None:
    """GPT-Neo calls the number of a layer, which is an index of the cache, `layer_id`."""
    model = random_model(
        "GPTNeoForCausalLM", hidden_size=16, num_layers=3, num_heads=2, attention_types=[[["global"], 3]],
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model.generation_config.eos_token_id = None
    sd.make_stochastic_(model, sd.layerskip(0.5), layers=["transformer.h.*"])
    small = sd.subnetwork(model, [0, 2], inputs={"input_ids": token_ids()})
    generated = small.generate(PROMPT, use_cache=True, **OPTIONS)
    assert torch.equal(generated, small.generate(PROMPT, use_cache=False, **OPTIONS))


def test_the_loss_of_the_removed_routers_is_not_compared() -> None:
    model = random_model(
        "MixtralForCausalLM", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24,
        num_key_value_heads=1, num_local_experts=3, output_router_logits=True, experts_implementation="eager",
    )  # fmt: skip
    sd.make_stochastic_(model, sd.layerskip(0.5), layers=["model.layers.*"])
    small = sd.subnetwork(model, [0, 2], inputs={"input_ids": token_ids()})
    assert len(small.model.layers) == 2
