"""AdamW that knows its parameters by name, so that its state can be saved without pickles and without trusting an order."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sami_cache.errors import IdentityError

UNDECAYED = ("cls_token", "mask_token", "pos_embed", "rel_pos_h", "rel_pos_w")


class NamedAdamW(torch.optim.AdamW):
    """AdamW on a model's trainable parameters. Matrices decay; biases, norms, tokens and positions do not, as in MAE.

    `lr_scale(name)`: what a parameter's learning rate is multiplied with.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
    ):
        tokens = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        chosen: dict[tuple[bool, float], list[str]] = {}
        for name, parameter in trained.items():
            spared = id(parameter) in tokens or not _decays(name, parameter)
            chosen.setdefault((spared, lr_scale(name)), []).append(name)
        groups: list[dict[str, Any]] = [
            {"params": [trained[name] for name in names], "weight_decay": 0.0 if spared else weight_decay, "lr_scale": scale}
            for (spared, scale), names in sorted(chosen.items())
        ]
        self.names = [name for _, names in sorted(chosen.items()) for name in names]
        super().__init__(groups, lr=lr, betas=betas, fused=True)

    def set_lr(self, lr: float) -> None:
        """Before its scale."""
        for group in self.param_groups:
            group["lr"] = lr * group["lr_scale"]

    def named_state(self) -> dict[str, Tensor]:
        """`exp_avg`, `exp_avg_sq` and `step` of every parameter, as "<parameter>/<key>"."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        named = zip(self.names, parameters, strict=True)
        return {f"{name}/{key}": value for name, parameter in named for key, value in self.state.get(parameter, {}).items()}

    def load_named_state(self, saved: Mapping[str, Tensor]) -> None:
        """The inverse. Raises `IdentityError` where the state is that of other parameters."""
        state: dict[int, dict[str, Tensor]] = {}
        places = {name: place for place, name in enumerate(self.names)}
        for key, tensor in saved.items():
            name, _, slot = key.rpartition("/")
            if name not in places:
                raise IdentityError(f"the checkpoint's optimizer knows {name}, which this model does not train")
            state.setdefault(places[name], {})[slot] = tensor
        self.load_state_dict({"state": state, "param_groups": self.state_dict()["param_groups"]})


def _decays(name: str, parameter: Tensor) -> bool:
    return parameter.ndim > 1 and name.rpartition(".")[2] not in UNDECAYED
