"""Whole layers as branches: transformers' encoders and decoders, with their keyword arguments and tuples."""

import copy

import pytest
import torch
import transformers

import stochastic_depth as sd

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
MODELS = {
    "Bert": ({**SMALL, "vocab_size": 40}, "encoder.layer.*"),
    "Llama": ({**SMALL, "vocab_size": 40, "num_key_value_heads": 2, "use_cache": False}, "layers.?"),
    "ViT": ({**SMALL, "image_size": 16, "patch_size": 8}, None),
    "Wav2Vec2": (
        {**SMALL, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
         "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0,
         "hidden_dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0,
         "feat_proj_dropout": 0.0, "apply_spec_augment": False},
        "encoder.layers.?",
    ),
}  # fmt: skip


def model_of(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**MODELS[name][0])
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{name}Model")(config).double()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def layers_of(name: str, model: torch.nn.Module) -> str:
    pattern = MODELS[name][1]
    if pattern is None:
        first = next(n for n, m in model.named_modules() if type(m).__name__ == "ViTLayer")
        pattern = first.rpartition(".")[0] + ".?"
    return pattern


def inputs_of(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if name == "ViT":
        return torch.randn(3, 3, 16, 16, generator=generator, dtype=torch.float64)
    if name == "Wav2Vec2":
        return torch.randn(3, 200, generator=generator, dtype=torch.float64)
    return torch.randint(40, (3, 7), generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_closed_layers_hand_their_input_on_sample_by_sample(name: str) -> None:
    model = model_of(name)
    pattern = layers_of(name, model)
    plain = copy.deepcopy(model)
    depth = sd.make_stochastic_(model, sd.uniform(0.5), layers=[pattern], granularity="sample")
    inputs = inputs_of(name)
    masks = [torch.tensor(mask) for mask in ([True, False, True], [False, False, True], [True, True, False])]

    def masked(index: int):
        def hook(_module, args, kwargs, output):
            hidden = args[0] if args else kwargs["hidden_states"]
            own = output[0] if isinstance(output, tuple) else output
            kept = torch.where(masks[index].view(-1, 1, 1), own, hidden)
            return (kept, *output[1:]) if isinstance(output, tuple) else kept

        return hook

    for index, layer in enumerate(depth.names):
        plain.get_submodule(layer).register_forward_hook(masked(index), with_kwargs=True)
    expected = plain(inputs).last_hidden_state
    expected.square().sum().backward()
    with depth.gates(masks):
        output = model(inputs).last_hidden_state
    output.square().sum().backward()
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    for (n, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert ours.grad is not None, n
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8, msg=n)


@pytest.mark.parametrize("name", MODELS)
def test_all_open_is_the_plain_model_and_all_closed_calls_no_layer(name: str) -> None:
    model = model_of(name)
    inputs, pattern = inputs_of(name), layers_of(name, model)
    expected = model(inputs).last_hidden_state
    depth = sd.make_stochastic_(model, sd.uniform(0.5), layers=pattern)
    called: list[str] = []
    for layer in depth.names:
        for child in model.get_submodule(layer).children():
            child.register_forward_pre_hook(lambda *_, layer=layer: called.append(layer))
    with depth.gates([True] * 3):
        assert torch.equal(model(inputs).last_hidden_state, expected)
    assert set(called) == set(depth.names)
    called.clear()
    with depth.gates([False] * 3):
        model(inputs).last_hidden_state.sum().backward()
    assert called == []


def test_bad_layers() -> None:
    with pytest.raises(ValueError, match="matches no module"):
        sd.make_stochastic_(model_of("Bert"), sd.uniform(0.5), layers=["decoder.*"])
    with pytest.raises(ValueError, match="needs a schedule"):
        sd.make_stochastic_(model_of("Bert"), layers=["encoder.layer.*"])
    with pytest.raises(ValueError, match="is a ModuleList"):
        sd.make_stochastic_(model_of("Bert"), sd.uniform(0.5), layers=["encoder.layer"])
    model = model_of("Wav2Vec2")
    model.config.layerdrop = 0.1
    with pytest.raises(ValueError, match="skips layers itself"):
        sd.make_stochastic_(model, sd.uniform(0.5), layers=["encoder.layers.?"])
