"""AdamW that knows its parameters by name, so that its state can be saved without pickles and without trusting an order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sami_cache.errors import IdentityError

UNDECAYED = ("cls_token", "mask_token", "pos_embed")


class NamedAdamW(torch.optim.AdamW):
    """AdamW on a model's trainable parameters. Matrices decay; biases, norms, tokens and positions do not, as in MAE."""

    def __init__(self, model: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float):
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        groups: list[dict[str, Any]] = []
        self.names: list[str] = []
        for decays in (True, False):
            chosen = [name for name, parameter in trained.items() if decays == _decays(name, parameter)]
            if chosen:
                groups.append({"params": [trained[name] for name in chosen], "weight_decay": weight_decay if decays else 0.0})
            self.names += chosen
        super().__init__(groups, lr=lr, betas=betas, fused=True)

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
