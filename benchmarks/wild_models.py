"""Public model code, one small network of each code base, with its residual branches counted by reading the code.

An entry names the packages it needs, how many residual additions and drop paths a careful engineer would count, and the
modules whose calls end the additions: their output, times whatever is linear after it, is what the shortcut is added
to. `*` stands for one part of a name. The comment says where the branches are. Sizes are tiny, weights random, and
dropout is off where a model has it as a number.
"""

from __future__ import annotations

import fnmatch
import importlib
import sys
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision_schemas  # noqa: F401
from torch import Tensor, nn

Made = tuple[nn.Module, list[Any]]

# Torchaudio's extension asks for CUDA, its models are plain Python; several packages import it.
_EXTENSION = types.ModuleType("torchaudio._extension")
_EXTENSION.fail_if_no_align = lambda function: function
_EXTENSION._IS_TORCHAUDIO_EXT_AVAILABLE = _EXTENSION._IS_ALIGN_AVAILABLE = False
sys.modules[_EXTENSION.__name__] = _EXTENSION


@dataclass(frozen=True)
class Entry:
    """One small network of a public code base.

    Attributes:
        name: package and model.
        packages: what has to be installed; the first is the code base.
        make: makes the model with a drop path rate, and its inputs.
        additions: number of its residual branches.
        ends: patterns of the modules that end them.
        drop_paths: number of uses of drop paths with a rate above 0; 0 where it has none.
        rate: the drop path rate that it is made with.
    """

    name: str
    packages: tuple[str, ...]
    make: Callable[[float], Made]
    additions: int
    ends: tuple[str, ...]
    drop_paths: int
    rate: float


ENTRIES: dict[str, Entry] = {}


def code_base(
    name: str, *packages: str, additions: int = 0, ends: Sequence[str] = (), drop_paths: int = 0, rate: float = 0.5
) -> Callable[[Callable[[float], Made]], Callable[[float], Made]]:
    """Register an entry; without packages, the first word of the name is the package."""

    def register(make: Callable[[float], Made]) -> Callable[[float], Made]:
        assert name not in ENTRIES, name
        needed = packages or (name.split()[0],)
        ENTRIES[name] = Entry(name, needed, make, additions, tuple(ends), drop_paths, rate)
        return make

    return register


def matching(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Names of the modules that match a pattern, each of which must match one.

    `blocks.*.attn` is a name, `Block:attn` the child `attn` of every module whose class is called `Block`.
    """

    def matches(name: str, pattern: str) -> bool:
        parts, wanted = name.split("."), pattern.split(".")
        return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))

    modules = dict(model.named_modules())
    found: set[str] = set()
    for pattern in patterns:
        kind, _, path = pattern.rpartition(":")
        owners = [name for name, module in modules.items() if kind == type(module).__name__] if kind else [""]
        wanted = [f"{owner}.{path}".removeprefix(".") for owner in owners]
        names = {name for name in modules for each in wanted if matches(name, each)}
        if not names:
            raise AssertionError(f"the pattern {pattern!r} matches no module, there are {', '.join(modules)[:1500]}")
        found |= names
    return [name for name in modules if name in found]


def images(size: int = 32, num: int = 4, channels: int = 3) -> Tensor:
    """Images (N, C, H, W)."""
    return torch.randn(num, channels, size, size)


def tokens(length: int = 12, num: int = 4, vocabulary: int = 50) -> Tensor:
    """Token numbers (N, L) from 5 on: the first ones are special in many vocabularies."""
    return torch.randint(5, vocabulary, (num, length))


def features(length: int = 12, width: int = 32, num: int = 4) -> Tensor:
    """Sequences of vectors (N, L, D)."""
    return torch.randn(num, length, width)


class Named(nn.Module):
    """A model that is called with arguments by name, for callers that give them by position."""

    def __init__(self, model: nn.Module, *names: str, **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self._names, self._fixed = names, fixed

    def forward(self, *values: Any) -> Any:
        return self.model(**dict(zip(self._names, values, strict=True)), **self._fixed)


# --- timm and torchvision ---------------------------------------------------------------------------------------------


# Each of 3 blocks: x + attn, x + mlp.
@code_base("timm ViT", "timm", additions=6, ends=["blocks.*.attn", "blocks.*.mlp"], drop_paths=6)
def timm_vit(rate: float) -> Made:
    import timm

    options = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2, "num_classes": 7}
    model = timm.create_model("vit_tiny_patch16_224", **options, drop_path_rate=rate)
    for block in model.blocks if rate else ():  # the first block's rate is 0: give it one
        for path in ("drop_path1", "drop_path2"):
            setattr(block, path, timm.layers.DropPath(rate))
    return model, [images()]


# Each of 5 blocks: conv, norm, mlp, one sum.
@code_base("timm ConvNeXt", "timm", additions=5, ends=["stages.*.blocks.*.mlp"], drop_paths=4)
def timm_convnext(rate: float) -> Made:
    import timm

    model = timm.create_model("convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), drop_path_rate=rate)
    return model, [images(64)]


# Window attention and MLP in each of 4 blocks.
@code_base("timm Swin V1", "timm", additions=8, ends=["layers.*.blocks.*.attn", "layers.*.blocks.*.mlp"], drop_paths=6)
def timm_swin(rate: float) -> Made:
    import timm

    options = {"img_size": 32, "patch_size": 2, "window_size": 4, "depths": (2, 2), "embed_dim": 16}
    model = timm.create_model("swin_tiny_patch4_window7_224", **options, num_heads=(2, 4), drop_path_rate=rate)
    return model, [images()]


# A BasicBlock each in 4 layers.
@code_base("torchvision ResNet", "torchvision", additions=4, ends=["layer*.0.bn2"])
def torchvision_resnet(_rate: float) -> Made:
    from torchvision.models.resnet import BasicBlock, ResNet

    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), [images(64)]


# Attention and MLP in each of 4 blocks.
@code_base(
    "torchvision Swin V2", "torchvision", additions=8, ends=["features.*.*.norm1", "features.*.*.norm2"], drop_paths=6
)
def torchvision_swin(rate: float) -> Made:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    model = SwinTransformer(
        [2, 2], 16, [2, 2], [2, 4], [4, 4], stochastic_depth_prob=rate, num_classes=7,
        block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2,
    )  # fmt: skip
    return model, [images()]


# Attention and MLP in each of 2 encoder blocks.
@code_base(
    "torchvision ViT", "torchvision", additions=4,
    ends=["encoder.layers.*.self_attention", "encoder.layers.*.mlp"],
)  # fmt: skip
def torchvision_vit(_rate: float) -> Made:
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 8, 2, 2, 32, 48, num_classes=7), [images()]


# --- PyTorch's own layers ---------------------------------------------------------------------------------------------


# Self-attention and feed-forward in 2 encoder layers; those and cross-attention in 2 decoder layers.
@code_base(
    "torch nn.Transformer", "torch", additions=10,
    ends=["*coder.layers.*.dropout1", "*coder.layers.*.dropout2", "decoder.layers.*.dropout3"],
)  # fmt: skip
def torch_transformer(_rate: float) -> Made:
    model = nn.Transformer(32, 2, 2, 2, 48, batch_first=True, dropout=0.0)
    return model, [features(), features(8)]


# --- transformers: text -----------------------------------------------------------------------------------------------


def transformers_model(family: str, model: str = "Model", **options: Any) -> nn.Module:
    """A model of a family, from its configuration."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**options)
    config._attn_implementation = config._experts_implementation = "eager"
    return getattr(transformers, f"{family}{model}")(config)


TEXT = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QUIET_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert_like(family: str) -> Made:
    return transformers_model(family, **TEXT, **QUIET_BERT), [tokens()]


# Post-norm: LayerNorm(x + attention), LayerNorm(x + feed-forward), 2 layers.
BERT_ENDS = ["encoder.layer.*.attention.output.dense", "encoder.layer.*.output.dense"]
for _family in ("Bert", "Roberta", "Electra", "DebertaV2"):
    code_base(f"transformers {_family}", additions=4, ends=BERT_ENDS)(lambda _rate, family=_family: bert_like(family))


# One layer, used twice: two sums in its code, called twice each.
@code_base(
    "transformers Albert", additions=4,
    ends=[
        "encoder.albert_layer_groups.0.albert_layers.0.attention.dense",
        "encoder.albert_layer_groups.0.albert_layers.0.ffn_output",
    ],
)  # fmt: skip
def albert(_rate: float) -> Made:
    return transformers_model("Albert", **TEXT, **QUIET_BERT, embedding_size=16), [tokens()]


# Pre-norm: x + attention, x + mlp, 2 layers.
for _family in ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Granite"):

    @code_base(f"transformers {_family}", additions=4, ends=["layers.*.self_attn.o_proj", "layers.*.mlp.down_proj"])
    def llama_like(_rate: float, family: str = _family) -> Made:
        options = {"residual_multiplier": 0.5} if family == "Granite" else {}
        options |= {"head_dim": 8} if family in ("Gemma", "Qwen3") else {}
        model = transformers_model(family, **TEXT, num_key_value_heads=2, use_cache=False, **options)
        return model, [tokens()]


# x + norm(attention), x + norm(mlp).
@code_base(
    "transformers Gemma2", additions=4,
    ends=["layers.*.post_attention_layernorm", "layers.*.post_feedforward_layernorm"],
)  # fmt: skip
def gemma2(_rate: float) -> Made:
    model = transformers_model("Gemma2", **TEXT, num_key_value_heads=2, head_dim=8, use_cache=False)
    return model, [tokens()]


# Attention and mixture of experts.
@code_base("transformers Mixtral", additions=4, ends=["layers.*.self_attn.o_proj", "layers.*.mlp"])
def mixtral(_rate: float) -> Made:
    model = transformers_model("Mixtral", **TEXT, num_key_value_heads=2, num_local_experts=4, use_cache=False)
    return model, [tokens()]


# Parallel: x + attention + mlp in one sum, 2 layers.
@code_base("transformers GPTNeoX", additions=4, ends=["layers.*.attention.dense", "layers.*.mlp.dense_4h_to_h"])
def gpt_neox(_rate: float) -> Made:
    return transformers_model("GPTNeoX", **TEXT, use_parallel_residual=True, use_cache=False), [tokens()]


# Parallel too.
@code_base("transformers Phi", additions=4, ends=["layers.*.self_attn.dense", "layers.*.mlp.fc2"])
def phi(_rate: float) -> Made:
    return transformers_model("Phi", **TEXT, use_cache=False), [tokens()]


@code_base("transformers GPT2", additions=4, ends=["h.*.attn.c_proj", "h.*.mlp.c_proj"])
def gpt2(_rate: float) -> Made:
    model = transformers_model(
        "GPT2", vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4, attn_pdrop=0.0, use_cache=False,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return model, [tokens()]


@code_base("transformers Opt", additions=4, ends=["decoder.layers.*.self_attn.out_proj", "decoder.layers.*.fc2"])
def opt(_rate: float) -> Made:
    options = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0}
    return transformers_model("OPT", **TEXT, **options, use_cache=False), [tokens()]


@code_base("transformers ModernBert", additions=4, ends=["layers.*.attn", "layers.*.mlp"])
def modern_bert(_rate: float) -> Made:
    model = transformers_model("ModernBert", **TEXT, cls_token_id=1, sep_token_id=2, global_attn_every_n_layers=2)
    return model, [tokens()]


# x + mixer, 2 layers.
@code_base("transformers Mamba", additions=2, ends=["layers.*.mixer"])
def mamba(_rate: float) -> Made:
    model = transformers_model(
        "Mamba", vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, use_cache=False, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, residual_in_fp32=False,
    )  # fmt: skip
    return model, [tokens(6)]


# Encoder: self-attention, feed-forward. Decoder: self-attention, cross-attention, feed-forward. 2 blocks each.
@code_base("transformers T5", additions=10, ends=["encoder.block.*.layer.*.dropout", "decoder.block.*.layer.*.dropout"])
def t5(_rate: float) -> Made:
    model = transformers_model(
        "T5", vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, use_cache=False,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return model, [tokens(), torch.ones(4, 12), tokens(8)]


SEQ2SEQ = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "use_cache": False, "vocab_size": 50, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2,
}  # fmt: skip
SEQ2SEQ_ENDS = [
    "encoder.layers.*.self_attn.out_proj", "encoder.layers.*.fc2", "decoder.layers.*.self_attn.out_proj",
    "decoder.layers.*.encoder_attn.out_proj", "decoder.layers.*.fc2",
]  # fmt: skip


@code_base("transformers Bart", additions=10, ends=SEQ2SEQ_ENDS)
def bart(_rate: float) -> Made:
    model = transformers_model("Bart", **SEQ2SEQ, max_position_embeddings=64, forced_eos_token_id=2)
    return model, [tokens(), torch.ones(4, 12), tokens(8)]


# --- transformers: audio ----------------------------------------------------------------------------------------------


AUDIO = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 20,
    "conv_dim": (16, 16), "conv_stride": (4, 2), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "feat_proj_dropout": 0.0, "final_dropout": 0.0,
    "apply_spec_augment": False, "mask_time_prob": 0.0, "feat_extract_norm": "layer",
}  # fmt: skip
# Convolution of positions, added to the hidden states; attention and feed-forward in 2 layers.
AUDIO_ENDS = ["encoder.pos_conv_embed", "encoder.layers.*.dropout", "encoder.layers.*.feed_forward"]
for _family in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Data2VecAudio"):

    @code_base(f"transformers {_family}", additions=5, ends=AUDIO_ENDS)
    def audio(_rate: float, family: str = _family) -> Made:
        options = {"num_conv_pos_embeddings": 1, "conv_pos_kernel_size": 5} if family == "Data2VecAudio" else {}
        return transformers_model(family, **{**AUDIO, **options}), [torch.randn(4, 400)]


# Convolutions stacked on the features (no residual); encoder 2 x 2, decoder 2 x 3.
@code_base("transformers Whisper", additions=10, ends=SEQ2SEQ_ENDS)
def transformers_whisper(_rate: float) -> Made:
    model = transformers_model(
        "Whisper", **SEQ2SEQ, num_mel_bins=8, max_source_positions=16, max_target_positions=32,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return model, [torch.randn(4, 8, 32), None, tokens(8)]


# A ViT on spectrograms: attention and MLP in 2 layers.
@code_base("transformers AST", additions=4, ends=["layers.*.attention.o_proj", "layers.*.mlp.fc2"])
def ast(_rate: float) -> Made:
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers_model("AST", **options, **QUIET_BERT, patch_size=8, max_length=32, num_mel_bins=16)
    return model, [torch.randn(4, 32, 16)]


# --- transformers: vision and both ------------------------------------------------------------------------------------


# Attention and MLP in 2 layers of the encoder; masks come with the inputs.
@code_base("transformers ViTMAE", additions=4, ends=["layers.*.attention.o_proj", "layers.*.mlp.fc2"])
def vit_mae(_rate: float) -> Made:
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers_model("ViTMAE", **options, **QUIET_BERT, image_size=32, patch_size=8)
    return model, [images(), torch.rand(4, 16)]


# Attention and MLP in 2 layers of each tower.
@code_base(
    "transformers CLIP", additions=8,
    ends=["*_model.encoder.layers.*.self_attn.out_proj", "*_model.encoder.layers.*.mlp.fc2"],
)  # fmt: skip
def transformers_clip(_rate: float) -> Made:
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = transformers_model(
        "CLIP", projection_dim=16,
        text_config={**tower, "vocab_size": 50, "eos_token_id": 2, "max_position_embeddings": 32},
        vision_config={**tower, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    return model, [tokens(), images()]


# Attention and MLP with a drop path each, 3 layers.
@code_base(
    "transformers Dinov2", additions=6, ends=["encoder.layer.*.layer_scale1", "encoder.layer.*.layer_scale2"],
    drop_paths=6,
)  # fmt: skip
def transformers_dinov2(rate: float) -> Made:
    options = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    return transformers_model("Dinov2", **options, **QUIET_BERT, drop_path_rate=rate), [images()]


# --- Diffusion --------------------------------------------------------------------------------------------------------


# Self-attention, cross-attention, feed-forward.
@code_base("diffusers BasicTransformerBlock", additions=3, ends=["model.attn1", "model.attn2", "model.ff"])
def diffusers_block(_rate: float) -> Made:
    from diffusers.models.attention import BasicTransformerBlock

    model = BasicTransformerBlock(32, 2, 16, cross_attention_dim=16)
    return Named(model, "hidden_states", "encoder_hidden_states"), [features(), features(5, 16)]


# Attention and feed-forward in 2 blocks, scaled by a gate that the condition gives (adaptive LayerNorm).
@code_base("diffusers DiT", additions=4, ends=["transformer_blocks.*.attn1", "transformer_blocks.*.ff"])
def diffusers_dit(_rate: float) -> Made:
    from diffusers import DiTTransformer2DModel
    from diffusers.models.embeddings import LabelEmbedding

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.dropout_prob = 0.0
    return model, [images(8, channels=4), torch.arange(4), torch.arange(4)]


# 8 ResNet blocks (2 down, 2 in the middle, 4 up), 4 attentions whose sum is in their processor.
@code_base("diffusers UNet2D", additions=12, ends=["ResnetBlock2D:conv2", "Attention:to_out.1"])
def diffusers_unet(_rate: float) -> Made:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model, [images(16), torch.arange(4)]


# 11 ResNet blocks (4 down, 2 in the middle, 4 up, 1 last), 5 attentions, whose sums are in the network's own forward.
@code_base(
    "denoising-diffusion-pytorch Unet", additions=16, ends=["ResnetBlock:block2", "downs.*.2", "mid_attn", "ups.*.2"]
)
def ddpm_unet(_rate: float) -> Made:
    from denoising_diffusion_pytorch import Unet

    return Unet(16, dim_mults=(1, 2), attn_heads=2, attn_dim_head=8), [images(16), torch.arange(4.0)]


# --- Medicine ---------------------------------------------------------------------------------------------------------


# 4 blocks of window attention and MLP, which share a drop path (the first has a rate of 0); 10 residual convolutions.
@code_base(
    "monai SwinUNETR", additions=18,
    ends=["SwinTransformerBlock:attn", "SwinTransformerBlock:mlp", "UnetResBlock:norm2"], drop_paths=6,
)  # fmt: skip
def swin_unetr(rate: float) -> Made:
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(
        1, 2, feature_size=12, spatial_dims=2, window_size=4, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2),
        dropout_path_rate=rate,
    )  # fmt: skip
    return model, [images(64, 2, 1)]


@code_base("monai ViT", additions=4, ends=["blocks.*.attn", "blocks.*.mlp"])
def monai_vit(_rate: float) -> Made:
    from monai.networks.nets import ViT

    model = ViT(1, (32, 32), (8, 8), hidden_size=32, mlp_dim=48, num_layers=2, num_heads=2, spatial_dims=2)
    return model, [images(channels=1)]


@code_base("monai ResNet", additions=4, ends=["layer*.0.bn2"])
def monai_resnet(_rate: float) -> Made:
    from monai.networks.nets import ResNet

    model = ResNet("basic", [1, 1, 1, 1], [8, 8, 16, 16], spatial_dims=2, n_input_channels=1, num_classes=3)
    return model, [images(64, channels=1)]


# nnU-Net's residual encoder: 4 blocks.
@code_base("dynamic-network-architectures ResEncUNet", additions=4, ends=["BasicBlockD:conv2"])
def res_enc_unet(_rate: float) -> Made:
    from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

    model = ResidualEncoderUNet(
        1, 3, [8, 16, 16], nn.Conv2d, 3, [1, 2, 2], [1, 2, 1], 2, [1, 1], conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
    )  # fmt: skip
    return model, [images(channels=1)]


# The same blocks with a drop path each.
@code_base("dynamic-network-architectures ResNetD", additions=3, ends=["BasicBlockD:conv2"], drop_paths=3)
def res_net_d(rate: float) -> Made:
    from dynamic_network_architectures.building_blocks.residual import BasicBlockD, StackedResidualBlocks

    model = StackedResidualBlocks(
        3, nn.Conv2d, 1, [8, 8, 8], 3, 1, conv_bias=True, norm_op=nn.InstanceNorm2d,
        norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU, block=BasicBlockD, stochastic_depth_p=rate,
    )  # fmt: skip
    return model, [images(channels=1)]


# --- Vision -----------------------------------------------------------------------------------------------------------


# One MBConv, and 3 blocks of window attention and MLP; rates rise from 0.
@code_base(
    "kornia TinyViT", additions=7,
    ends=["layers.0.*.*.conv3", "TinyViTBlock:attn", "TinyViTBlock:mlp"], drop_paths=6,
)  # fmt: skip
def kornia_tiny_vit(rate: float) -> Made:
    from kornia.models.tiny_vit import TinyViT

    model = TinyViT(
        img_size=64, num_classes=7, embed_dims=[16, 16, 32, 32], depths=[1, 1, 1, 1], num_heads=[1, 2, 2, 2],
        window_sizes=[4, 4, 4, 4], drop_path_rate=rate,
    )  # fmt: skip
    return model, [images(64)]


# ResidualAdd(Sequential(...)): attention and MLP in 2 blocks.
@code_base("kornia ViT", additions=4, ends=["ResidualAdd:fn"])
def kornia_vit(_rate: float) -> Made:
    from kornia.models.vit import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2), [images()]


def dinov2(module: Any, block: Any, rate: float) -> nn.Module:
    """DINOv2's own network, of the module that holds it."""
    return module.DinoVisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, drop_path_rate=rate,
        drop_path_uniform=True, init_values=1.0, block_fn=block, block_chunks=0,
    )  # fmt: skip


# Attention and MLP in 2 blocks; at rates up to 0.1 one drop path for both, called in training only.
@code_base("kornia DINOv2", additions=4, ends=["blocks.*.ls1", "blocks.*.ls2"], drop_paths=4, rate=0.0625)
def kornia_dinov2(rate: float) -> Made:
    from kornia.feature.dedode.transformer import dinov2 as module

    return dinov2(module, module.Block, rate).requires_grad_(True), [images()]  # kornia freezes it


@code_base("dinov2 ViT", additions=4, ends=["blocks.*.ls1", "blocks.*.ls2"], drop_paths=4, rate=0.0625)
def official_dinov2(rate: float) -> Made:
    from dinov2.layers.block import Block
    from dinov2.models import vision_transformer as module

    return dinov2(module, Block, rate), [images()]


@code_base("vjepa ViT", additions=4, ends=["blocks.*.attn", "blocks.*.mlp"])
def vjepa(_rate: float) -> Made:
    from vjepa.models.vision_transformer import VisionTransformer

    model = VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0)
    return model, [images()]


# Windows with padding in the first block, global attention in the second.
@code_base("segment-anything encoder", additions=4, ends=["blocks.*.attn", "blocks.*.mlp"])
def sam_encoder(_rate: float) -> Made:
    from segment_anything.modeling import ImageEncoderViT

    model = ImageEncoderViT(
        img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2, out_chans=16, window_size=3, use_rel_pos=True,
        global_attn_indexes=(1,),
    )  # fmt: skip
    return model, [images(64)]


# Two blocks: self-attention (which replaces its input in the first), attention to the image, MLP, attention to the
# tokens; and a last attention.
@code_base(
    "segment-anything decoder", additions=8,
    ends=[
        "layers.1.self_attn", "layers.*.cross_attn_token_to_image", "layers.*.mlp",
        "layers.*.cross_attn_image_to_token", "final_attn_token_to_image",
    ],
)  # fmt: skip
def sam_decoder(_rate: float) -> Made:
    from segment_anything.modeling import TwoWayTransformer

    model = TwoWayTransformer(depth=2, embedding_dim=32, num_heads=2, mlp_dim=48)
    return model, [images(4, channels=32), images(4, channels=32), features(3)]


# 5 blocks with one drop path each, used twice (the first has a rate of 0); queries are pooled between stages.
@code_base("sam2 Hiera", additions=10, ends=["blocks.*.attn", "blocks.*.mlp"], drop_paths=8)
def sam2_hiera(rate: float) -> Made:
    from sam2.modeling.backbones.hieradet import Hiera

    model = Hiera(
        embed_dim=16, num_heads=1, stages=(1, 1, 2, 1), window_spec=(4, 4, 4, 2), global_att_blocks=(3,),
        drop_path_rate=rate,
    )  # fmt: skip
    return model, [images(64)]


# Bottlenecks with a shortcut, in the backbone: 1, 2, 2, 1.
@code_base(
    "ultralytics YOLOv8n", additions=6,
    ends=["model.2.m.*.cv2", "model.4.m.*.cv2", "model.6.m.*.cv2", "model.8.m.*.cv2"],
)  # fmt: skip
def yolo(_rate: float) -> Made:
    from ultralytics.nn.tasks import DetectionModel

    return DetectionModel("yolov8n.yaml", ch=3, nc=4, verbose=False), [images(64, 2)]


# Attention and MLP with layer scale (here the identity) in 2 blocks.
@code_base("open-clip-torch vision", additions=4, ends=["transformer.resblocks.*.ls_1", "transformer.resblocks.*.ls_2"])
def open_clip_vision(_rate: float) -> Made:
    from open_clip.transformer import VisionTransformer

    model = VisionTransformer(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, output_dim=16)
    return model, [images()]


# 8 BasicBlocks of the encoder.
@code_base("segmentation-models-pytorch Unet", additions=8, ends=["encoder.layer*.*.bn2"])
def smp_unet(_rate: float) -> Made:
    import segmentation_models_pytorch as smp

    return smp.Unet("resnet18", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8)), [images(32, 2)]


# SegFormer's encoder: 8 blocks of attention and MLP with one drop path, used twice; rates rise from 0 to 0.1.
@code_base("segmentation-models-pytorch MiT", additions=16, ends=["Block:attn", "Block:mlp"], drop_paths=14, rate=0.1)
def smp_mit(rate: float) -> Made:
    import segmentation_models_pytorch as smp

    model = smp.Unet("mit_b0", encoder_weights=None, decoder_channels=(32, 16, 16, 8, 8))
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = min(module.drop_prob, rate)
    return model, [images(32, 2)]


# Attention and MLP in 2 blocks, one drop path each, used twice; the first has a rate of 0.
@code_base("pytorchvideo MViT", additions=4, ends=["blocks.*.attn", "blocks.*.mlp"], drop_paths=2)
def mvit(rate: float) -> Made:
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers

    model = create_multiscale_vision_transformers(
        spatial_size=32, temporal_size=4, depth=2, patch_embed_dim=16, num_heads=2, droppath_rate_block=rate,
        head_num_classes=7, pool_kv_stride_adaptive=None, pool_kvq_kernel=None,
    )  # fmt: skip
    return model, [torch.randn(2, 3, 4, 32, 32)]


# 9 of 16 inverted bottlenecks have a shortcut.
@code_base("efficientnet-pytorch B0", additions=9, ends=[f"_blocks.{i}._bn2" for i in (2, 4, 6, 7, 9, 10, 12, 13, 14)])
def efficientnet(_rate: float) -> Made:
    from efficientnet_pytorch import EfficientNet

    model = EfficientNet.from_name(
        "efficientnet-b0", image_size=32, num_classes=7, drop_connect_rate=0.0, width_coefficient=0.25
    )
    return model, [images(32, 2)]


def spandrel_arch(name: str, module: str = "") -> Any:
    """The module of one of spandrel's architectures."""
    return importlib.import_module(f"spandrel.architectures.{name}.__arch.{module or name}")


# 2 groups around 2 blocks of window attention and MLP each, one drop path per block, used twice; and the whole body.
@code_base(
    "spandrel SwinIR", additions=11,
    ends=["SwinTransformerBlock:attn", "SwinTransformerBlock:mlp", "RSTB:conv", "conv_after_body"], drop_paths=6,
)  # fmt: skip
def swin_ir(rate: float) -> Made:
    model = spandrel_arch("SwinIR").SwinIR(
        img_size=16, window_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], mlp_ratio=2, drop_path_rate=rate,
    )  # fmt: skip
    return model, [images(16)]


# 0.2 * RDB + x three times in each of 2 blocks, 0.2 * block + x, and the whole body.
@code_base("spandrel ESRGAN", additions=9, ends=["ResidualDenseBlock_5C:conv5.0", "RRDB:RDB3", "model.1.sub.2"])
def esrgan(_rate: float) -> Made:
    return spandrel_arch("ESRGAN", "RRDB").RRDBNet(num_filters=8, num_blocks=2, scale=1), [images(8, 2)]


# Two sums in each of 3 blocks, scaled by learned vectors, the skip around the deeper level, and the whole network.
@code_base("spandrel NAFNet", additions=8, ends=["NAFBlock:conv3", "NAFBlock:conv5", "ups.*", "ending"])
def nafnet(_rate: float) -> Made:
    model = spandrel_arch("NAFNet", "NAFNet_arch").NAFNet(
        img_channel=3, width=8, middle_blk_num=1, enc_blk_nums=[1], dec_blk_nums=[1]
    )
    return model, [images(16)]


# --- Small packages of Transformers -----------------------------------------------------------------------------------


@code_base("vit-pytorch ViT", additions=4, ends=["transformer.layers.*.*"])
def vit_pytorch_vit(_rate: float) -> Made:
    from vit_pytorch import ViT

    model = ViT(image_size=32, patch_size=8, num_classes=7, dim=32, depth=2, heads=2, mlp_dim=48, dim_head=8)
    return model, [images()]


# Two attentions side by side, whose sum is added to their input; the same for the MLPs.
@code_base("vit-pytorch ParallelViT", additions=4, ends=["transformer.layers.*.*"])
def parallel_vit(_rate: float) -> Made:
    from vit_pytorch.parallel_vit import ViT

    model = ViT(image_size=32, patch_size=8, num_classes=7, dim=32, depth=2, heads=2, mlp_dim=48, dim_head=8)
    return model, [images()]


# Attention and MLP in windows and on a grid, in each of 2 stages (whose first convolution changes the size).
@code_base("vit-pytorch MaxViT", additions=8, ends=["Residual:fn"])
def max_vit(_rate: float) -> Made:
    from vit_pytorch.max_vit import MaxViT

    model = MaxViT(num_classes=7, dim=16, depth=(1, 1), dim_head=8, dim_conv_stem=8, window_size=4)
    return model, [images(64, 2)]


# Convolutional projections: attention and MLP in one block of each of 3 stages.
@code_base("vit-pytorch CvT", additions=6, ends=["Transformer:layers.*.*"])
def cvt(_rate: float) -> Made:
    from vit_pytorch.cvt import CvT

    options = {f"s{stage}_{name}": value for stage in (1, 2, 3) for name, value in {
        "emb_dim": 16, "heads": 2, "depth": 1, "mlp_mult": 2}.items()}  # fmt: skip
    return CvT(num_classes=7, **options), [images(64)]


# Attention and feed-forward in 2 layers; the sum is in a module that is given both operands.
@code_base("x-transformers Decoder", additions=4, ends=["attn_layers.layers.*.1"])
def x_transformers(_rate: float) -> Made:
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=32, depth=2, heads=2, attn_dim_head=8)
    return TransformerWrapper(num_tokens=50, max_seq_len=16, attn_layers=layers), [tokens()]


@code_base("performer-pytorch Performer", additions=4, ends=["net.layers.*.*"])
def performer(_rate: float) -> Made:
    from performer_pytorch import Performer

    return Performer(dim=32, depth=2, heads=2, dim_head=16, feature_redraw_interval=None), [features()]


@code_base("linformer Linformer", additions=4, ends=["net.layers.*.*"])
def linformer(_rate: float) -> Made:
    from linformer import Linformer

    return Linformer(dim=32, seq_len=12, depth=2, heads=2, k=8), [features()]


# Attention to the image, feed-forward, self-attention, feed-forward, 2 blocks.
@code_base(
    "perceiver-pytorch Perceiver", additions=8,
    ends=["PerceiverBlock:cross_attn", "PerceiverBlock:cross_ff", "PerceiverBlock:self_attns.*.*"],
)  # fmt: skip
def perceiver(_rate: float) -> Made:
    from perceiver_pytorch import Perceiver

    model = Perceiver(
        num_freq_bands=2, depth=2, max_freq=4.0, num_latents=8, latent_dim=16, latent_heads=2, cross_dim_head=8,
        latent_dim_head=8, num_classes=7, input_channels=3, input_axis=2,
    )  # fmt: skip
    return model, [torch.randn(4, 8, 8, 3)]


# Half-step feed-forward, attention, convolution, half-step feed-forward, 2 blocks.
@code_base(
    "conformer Conformer", additions=8,
    ends=["ConformerBlock:ff1", "ConformerBlock:attn", "ConformerBlock:conv", "ConformerBlock:ff2"],
)  # fmt: skip
def conformer(_rate: float) -> Made:
    from conformer import Conformer

    model = Conformer(32, depth=2, dim_head=8, heads=2, ff_mult=2, conv_expansion_factor=2, conv_kernel_size=5)
    return model, [features()]


# The pseudo-inverse takes a maximum over the whole batch.
@code_base("nystrom-attention Nystromformer", additions=4, ends=["layers.*.*"])
def nystromformer(_rate: float) -> Made:
    from nystrom_attention import Nystromformer

    model = Nystromformer(dim=32, dim_head=8, heads=2, depth=2, num_landmarks=4, pinv_iterations=2)
    return model, [features()]


# Pairs f, g in sequence: x + f(x), x + g(x); attention over rows and columns, and two convolutions, 2 layers.
@code_base("axial-attention AxialImageTransformer", additions=8, ends=["layers.blocks.*.*"])
def axial(_rate: float) -> Made:
    from axial_attention import AxialImageTransformer

    model = AxialImageTransformer(dim=16, depth=2, heads=2, reversible=False, axial_pos_emb_shape=(8, 8))
    return model, [images(8, channels=16)]


# Attention over time, over space, feed-forward, 2 layers; the sums are in the network's own forward.
@code_base("timesformer-pytorch TimeSformer", additions=6, ends=["layers.*.*"])
def timesformer(_rate: float) -> Made:
    from timesformer_pytorch import TimeSformer

    model = TimeSformer(dim=32, num_frames=2, num_classes=7, image_size=16, patch_size=8, depth=2, heads=2, dim_head=8)
    return model, [torch.randn(4, 2, 3, 16, 16)]


@code_base("mambapy Mamba", additions=2, ends=["layers.*.mixer"])
def mamba_py(_rate: float) -> Made:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=16, n_layers=2, d_state=4)), [features(8, 16)]


@code_base("g-mlp-pytorch gMLPVision", additions=2, ends=["Residual:fn"])
def g_mlp(_rate: float) -> Made:
    from g_mlp_pytorch import gMLPVision

    return gMLPVision(image_size=16, patch_size=4, num_classes=7, dim=16, depth=2), [images(16)]


# Token mixing and channel mixing, 2 layers.
@code_base("mlp-mixer-pytorch MLPMixer", additions=4, ends=["PreNormResidual:fn"])
def mlp_mixer(_rate: float) -> Made:
    from mlp_mixer_pytorch import MLPMixer

    return MLPMixer(image_size=32, channels=3, patch_size=8, dim=32, depth=2, num_classes=7), [images()]


# A convolution in the stem, two in the tower, attention and feed-forward in one layer.
@code_base("enformer-pytorch Enformer", additions=5, ends=["Residual:fn"])
def enformer(_rate: float) -> Made:
    from enformer_pytorch import Enformer

    model = Enformer.from_hparams(
        dim=24, depth=1, heads=2, num_downsamples=3, dim_divisible_by=4, attn_dim_key=8, target_length=8,
        output_heads={"human": 3}, dropout_rate=0.0, attn_dropout=0.0, pos_dropout=0.0,
    )  # fmt: skip
    return model, [torch.rand(4, 64, 4)]


@code_base("local-attention LocalTransformer", additions=4, ends=["layers.*.*.branch"])
def local_transformer(_rate: float) -> Made:
    from local_attention import LocalTransformer

    model = LocalTransformer(
        num_tokens=50, max_seq_len=16, dim=32, depth=2, heads=2, dim_head=8, local_attn_window_size=4,
        use_dynamic_pos_bias=False, num_residual_streams=1,
    )  # fmt: skip
    return model, [tokens()]


# Parallel residual, as in Pythia: x + attention + mlp.
@code_base("litgpt GPT", additions=4, ends=["transformer.h.*.attn", "transformer.h.*.mlp"])
def litgpt(_rate: float) -> Made:
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        block_size=16,
        padded_vocab_size=50,
        parallel_residual=True,
        rotary_percentage=1.0,
    )
    return GPT(config), [tokens()]


# LoRA adapters on a Llama: attention and MLP in 2 layers.
@code_base(
    "peft LoRA", "peft", "transformers", additions=4,
    ends=["base_model.model.layers.*.self_attn.o_proj", "base_model.model.layers.*.mlp.down_proj"],
)  # fmt: skip
def lora(_rate: float) -> Made:
    from peft import LoraConfig, get_peft_model

    llama = transformers_model("Llama", **TEXT, num_key_value_heads=2, use_cache=False)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(llama, config), [tokens()]


# --- Tables, graphs, proteins -----------------------------------------------------------------------------------------


# Attention and feed-forward in 2 blocks; the last attention has one query, broadcast over its shortcut.
@code_base(
    "rtdl-revisiting-models FTTransformer", additions=4, ends=["backbone.blocks.*.attention", "backbone.blocks.*.ffn"]
)
def ft_transformer(_rate: float) -> Made:
    from rtdl_revisiting_models import FTTransformer

    model = FTTransformer(
        n_cont_features=3, cat_cardinalities=[4, 5], d_out=2, n_blocks=2, d_block=16, attention_n_heads=2,
        attention_dropout=0.0, ffn_d_hidden=None, ffn_d_hidden_multiplier=2.0, ffn_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip
    return model, [torch.randn(4, 3), torch.randint(0, 4, (4, 2))]


# x + block(x) in the network's own forward.
@code_base("rtdl-revisiting-models ResNet", additions=3, ends=["blocks.*"])
def rtdl_resnet(_rate: float) -> Made:
    from rtdl_revisiting_models import ResNet

    model = ResNet(
        d_in=6, d_out=2, n_blocks=3, d_block=16, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.0, dropout2=0.0
    )
    return model, [torch.randn(4, 6)]


class Graph(nn.Module):
    """Layers of a graph network in sequence."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, edges: Tensor, *batch: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, edges, *batch)
        return x


def graph(width: int) -> list[Tensor]:
    """Two graphs of 6 nodes: features, edges."""
    edges = torch.randint(0, 6, (2, 20))
    return [torch.randn(12, width), torch.cat([edges, edges + 6], 1)]


# x + convolution(act(norm(x))), 3 layers.
@code_base("torch-geometric DeepGCN", additions=3, ends=["layers.*.conv"])
def deep_gcn(_rate: float) -> Made:
    from torch_geometric.nn import DeepGCNLayer, GCNConv, LayerNorm

    layers = [DeepGCNLayer(GCNConv(16, 16), LayerNorm(16), nn.ReLU(), block="res+", dropout=0.0) for _ in range(3)]
    return Graph(*layers), graph(16)


# Convolution, attention, MLP, 2 layers.
@code_base("torch-geometric GPS", additions=6, ends=["layers.*.conv", "layers.*.attn", "layers.*.mlp"])
def gps(_rate: float) -> Made:
    from torch_geometric.nn import GCNConv, GPSConv

    layers = [GPSConv(16, GCNConv(16, 16), heads=2, norm="layer_norm") for _ in range(2)]
    return Graph(*layers), [*graph(16), torch.arange(12) // 6]


# Features and coordinates, 2 layers; the last coordinates are an output.
@code_base("egnn-pytorch EGNN", additions=4, ends=["EGNN:node_mlp", "EGNN:coors_mlp"])
def egnn(_rate: float) -> Made:
    from egnn_pytorch import EGNN_Network

    return EGNN_Network(depth=2, dim=16, m_dim=8), [features(6, 16), features(6, 3)]


# Attention and feed-forward in 2 layers; dimension 0 is that of the tokens.
@code_base("fair-esm ESM2", additions=4, ends=["layers.*.self_attn", "layers.*.fc2"])
def esm2(_rate: float) -> Made:
    from esm.model.esm2 import ESM2

    return ESM2(num_layers=2, embed_dim=32, attention_heads=2, token_dropout=False), [tokens(vocabulary=20)]


# --- Audio ------------------------------------------------------------------------------------------------------------


# Half-step feed-forward, attention, convolution, half-step feed-forward, 2 layers.
@code_base(
    "torchaudio Conformer", additions=8,
    ends=["ConformerLayer:ffn1", "ConformerLayer:self_attn", "ConformerLayer:conv_module", "ConformerLayer:ffn2"],
)  # fmt: skip
def torchaudio_conformer(_rate: float) -> Made:
    import torchaudio

    model = torchaudio.models.Conformer(32, 2, 48, 2, 5)
    return model, [features(), torch.tensor([12, 10, 12, 8])]


# Convolution of positions; attention and feed-forward in 2 layers.
@code_base(
    "torchaudio wav2vec2", additions=5,
    ends=["EncoderLayer:attention", "EncoderLayer:feed_forward", "encoder.transformer.pos_conv_embed"],
)  # fmt: skip
def torchaudio_wav2vec2(_rate: float) -> Made:
    import torchaudio

    model = torchaudio.models.wav2vec2_model(
        extractor_mode="layer_norm", extractor_conv_layer_config=[(16, 8, 4), (16, 4, 2)], extractor_conv_bias=False,
        encoder_embed_dim=32, encoder_projection_dropout=0.0, encoder_pos_conv_kernel=4, encoder_pos_conv_groups=2,
        encoder_num_layers=2, encoder_num_heads=2, encoder_attention_dropout=0.0, encoder_ff_interm_features=48,
        encoder_ff_interm_dropout=0.0, encoder_dropout=0.0, encoder_layer_norm_first=False, encoder_layer_drop=0.0,
        aux_num_out=None,
    )  # fmt: skip
    return model, [torch.randn(4, 400)]


# The same four in each of 2 layers.
@code_base(
    "speechbrain Conformer", "speechbrain", "torchaudio", additions=8,
    ends=[
        "layers.*.ffn_module1", "layers.*.mha_layer", "layers.*.convolution_module", "layers.*.ffn_module2",
    ],
)  # fmt: skip
def speechbrain_conformer(_rate: float) -> Made:
    from speechbrain.lobes.models.transformer.Conformer import ConformerEncoder

    model = ConformerEncoder(
        num_layers=2, d_model=32, d_ffn=48, nhead=2, kernel_size=5, dropout=0.0, attention_type="regularMHA"
    )
    return model, [features()]


# Encoder: attention, MLP; decoder: attention, cross-attention, MLP; 2 blocks each.
@code_base(
    "openai-whisper Whisper", additions=10,
    ends=["ResidualAttentionBlock:attn", "ResidualAttentionBlock:cross_attn", "ResidualAttentionBlock:mlp"],
)  # fmt: skip
def openai_whisper(_rate: float) -> Made:
    from whisper import model as module

    # Its LayerNorm computes in float32 whatever it is given; here everything is in float64.
    module.LayerNorm.forward = nn.LayerNorm.forward
    dimensions = module.ModelDimensions(8, 16, 32, 2, 2, 50, 16, 32, 2, 2)
    model = module.Whisper(dimensions)
    nn.init.normal_(model.decoder.positional_embedding)  # Whatever was in memory.
    return model, [torch.randn(4, 8, 32), tokens(8)]


# A residual unit per ratio, and an LSTM with a shortcut.
@code_base("encodec SEANet", additions=3, ends=["SEANetResnetBlock:block", "SLSTM:lstm"])
def seanet(_rate: float) -> Made:
    from encodec.modules import SEANetEncoder

    return SEANetEncoder(dimension=16, n_filters=4, ratios=[4, 2], lstm=1, norm="none"), [torch.randn(4, 1, 128)]


@code_base("vocos backbone", additions=2, ends=["convnext.*.pwconv2"])
def vocos(_rate: float) -> Made:
    from vocos.models import VocosBackbone

    return VocosBackbone(8, 16, 32, 2), [torch.randn(4, 8, 20)]


# DConv in 2 encoder layers: two residual units each.
@code_base("demucs Demucs", additions=4, ends=["DConv:layers.*"])
def demucs(_rate: float) -> Made:
    from demucs.demucs import Demucs

    model = Demucs(["a", "b"], channels=8, depth=2, lstm_layers=0, resample=False, dconv_mode=1, dconv_lstm=9)
    return model, [torch.randn(2, 2, 1024)]
