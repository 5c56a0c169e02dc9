"""Write what layers and models of flash-linear-attention make of tokens: ``python -m tests.goldens.make_fla FOLDER``.

FOLDER is where ``pip install --no-deps --target FOLDER flash-linear-attention fla-core triton einops`` put them. Their Triton
kernels run under Triton's interpreter, which needs no GPU. The file holds configurations, weights, inputs and outputs, and
says with which versions it was made.
"""

import importlib
import json
import os
import sys
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = Path(__file__).with_name("fla.safetensors")
TOKENS, READ = 68, 66  # read and then decoded; up to 64, recurrent kernels stand in for those in chunks
PADDING = 5  # before the second text
WIDTH = 16
Config = dict[str, Any]

LAYERS: dict[str, Config] = {
    "GLA": {"model_type": "gla", "num_heads": 2},
    "GLA, shared keys and convolutions": {
        "model_type": "gla", "num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 2.0, "use_short_conv": True,
        "conv_bias": True, "conv_size": 3,
    },
    "GLA without output gate": {"model_type": "gla", "num_heads": 2, "use_output_gate": False},
    "DeltaNet": {"model_type": "delta_net", "num_heads": 2, "expand_k": 1.0, "expand_v": 1.0},
    "DeltaNet, gated": {
        "model_type": "delta_net", "num_heads": 1, "expand_k": 0.5, "expand_v": 1.0, "use_gate": True, "conv_size": 2,
        "conv_bias": True, "allow_neg_eigval": True,
    },
    "DeltaNet, normed by sums": {
        "model_type": "delta_net", "num_heads": 2, "expand_k": 1.0, "expand_v": 1.0, "qk_norm": "sum",
        "qk_activation": "elu", "use_beta": False,
    },
    "DeltaNet without convolutions": {
        "model_type": "delta_net", "num_heads": 2, "expand_k": 1.0, "expand_v": 1.0, "use_short_conv": False,
    },
    "Gated DeltaNet": {"model_type": "gated_deltanet", "num_heads": 2, "head_dim": 8, "expand_v": 2.0},
    "Gated DeltaNet, more values": {
        "model_type": "gated_deltanet", "num_heads": 2, "num_v_heads": 4, "head_dim": 8, "expand_v": 1.0,
        "use_gate": False, "allow_neg_eigval": True,
    },
}  # fmt: skip
MODELS: dict[str, Config] = {
    "GLA": {"model_type": "gla", "num_heads": 2, "intermediate_size": 24},
    "DeltaNet": {"model_type": "delta_net", "num_heads": 2, "intermediate_size": 24, "tie_word_embeddings": True},
    "Gated DeltaNet": {
        "model_type": "gated_deltanet", "num_heads": 2, "head_dim": 8, "expand_v": 1.0, "hidden_ratio": 2,
    },
}  # fmt: skip
MODES = {"delta_net": "fused_recurrent"}  # whose kernel in chunks is of half precision alone
CLASSES = {"gla": "GLA", "delta_net": "DeltaNet", "gated_deltanet": "GatedDeltaNet"}


class Count(int):
    """A loop's number, which the interpreter has as Python's and their kernels call as Triton's."""

    def to(self, _: Any) -> "Count":
        return self


def interpret(folder: str) -> None:
    """Have Triton's interpreter run what is in the folder, as it is."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, folder)
    autotuner = importlib.import_module("triton.runtime.autotuner").Autotuner
    autotuner._bench = lambda self, *arguments, config, **others: 1.0  # there is no GPU to time on
    importlib.import_module("fla.models")
    for name, module in list(sys.modules.items()):
        if name.startswith("fla."):
            vars(module).setdefault("range", lambda *borders: map(Count, range(*map(int, borders))))


def shaken(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """With parameters of which none is as it begins."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def of_layer(config: Config, x: Tensor, mask: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights, and outputs: all at once, beside padding, and the last tokens one by one."""
    layers, utils = importlib.import_module("fla.layers"), importlib.import_module("fla.models.utils")
    arguments = {name: value for name, value in config.items() if name != "model_type"}
    kind = "GatedLinearAttention" if config["model_type"] == "gla" else CLASSES[config["model_type"]]
    mode = MODES.get(config["model_type"], "chunk")
    layer = shaken(getattr(layers, kind)(mode=mode, layer_idx=0, **arguments), generator)
    cache = utils.Cache()
    read, _, _ = layer(x[:, :READ], past_key_values=cache, use_cache=True)
    steps = [layer(x[:, i : i + 1], past_key_values=cache, use_cache=True)[0] for i in range(READ, TOKENS)]
    found = {"whole": layer(x)[0], "padded": layer(x, attention_mask=mask)[0], "pieces": torch.cat([read, *steps], 1)}
    return found | {f"weights.{name}": tensor for name, tensor in layer.state_dict().items()}


def of_model(config: Config, ids: Tensor, generator: torch.Generator) -> tuple[Config, dict[str, Tensor]]:
    """Its configuration as it is saved, weights, and logits."""
    models = importlib.import_module("fla.models")
    name = CLASSES[config["model_type"]]
    mode = MODES.get(config["model_type"], "chunk")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "vocab_size": 20, "attn_mode": mode}
    made = getattr(models, f"{name}Config")(**sizes, **{key: config[key] for key in config if key != "model_type"})
    model = shaken(getattr(models, f"{name}ForCausalLM")(made), generator)
    tied = {"lm_head.weight"} if made.tie_word_embeddings else set()
    weights = {f"weights.{key}": tensor for key, tensor in model.state_dict().items() if key not in tied}
    return json.loads(made.to_json_string()), weights | {"logits": model(ids).logits}


@torch.no_grad()
def main() -> None:
    """Run every layer and model, and write what they make."""
    folder = sys.argv[1]
    interpret(folder)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH, generator=generator)
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :PADDING] = 0
    ids = torch.randint(20, (2, TOKENS), generator=generator)
    tensors, configs = {"x": x, "mask": mask, "ids": ids}, {}
    for name, config in LAYERS.items():
        configs[f"layer {name}"] = {"hidden_size": WIDTH, "norm_eps": 1e-5} | config
        found = of_layer({"hidden_size": WIDTH, "norm_eps": 1e-5} | config, x, mask, generator)
        tensors |= {f"layer {name}/{key}": tensor for key, tensor in found.items()}
    for name, config in MODELS.items():
        configs[f"model {name}"], found = of_model(config, ids, generator)
        tensors |= {f"model {name}/{key}": tensor for key, tensor in found.items()}
    versions = {found.name: found.version for found in distributions(path=[folder])}
    made = versions | {"transformers": hf.__version__, "torch": torch.__version__}
    metadata = {"made_with": json.dumps(made), "configs": json.dumps(configs)}
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, FILE, metadata)


if __name__ == "__main__":
    main()
