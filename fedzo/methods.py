"""The named methods of the literature, each made of parts: an estimator, a direction structure and an update rule.

A configuration takes one by ``method.name``, or combines parts of its own. A new method is one entry of `METHODS`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedzo.limits import Value
from fedzo.registry import lookup


@dataclass(frozen=True)
class Method:
    """What makes a method.

    Attributes:
        title: what it does, in one line.
        estimator, structure, optimizer: its parts, by their names in the registries.
        fixed: further keys of the configuration that are part of it, with their values.
        open: keys that it needs and cannot give, because they name what is in a model.
        paper: where it comes from, if not from what its parts name as their source.
    """

    title: str
    estimator: str = "two-point"
    structure: str = "isotropic"
    optimizer: str = "sgd"
    fixed: Mapping[str, Value] = field(default_factory=dict)
    open: tuple[str, ...] = ()
    paper: str = ""

    @property
    def keys(self) -> dict[str, Value]:
        """The keys of the configuration that make the method, dotted, with their values."""
        parts = {f"method.{name}": getattr(self, name) for name in ("estimator", "structure", "optimizer")}
        rest = {} if "method.first_order" in self.open else {"method.first_order": ""}
        return {**parts, **rest, **self.fixed}


METHODS: dict[str, Method] = {
    "zo-sgd": Method("gradient descent along random directions (MeZO)"),
    "zo-sgd-sign": Method("every entry moves equally far, by the sign of the estimate", optimizer="sign"),
    "zo-sgd-momentum": Method("a decaying sum of past estimates", optimizer="momentum"),
    "zo-adam": Method("estimates divided by the root mean square of past ones", optimizer="adam"),
    "zo-adamw": Method("the same, with weight decay apart from the estimate", optimizer="adamw"),
    "zo-sgd-cons": Method("a step that is only taken, or reversed, where the loss says so", optimizer="conservative"),
    "forward-gradient": Method("exact directional derivatives by forward-mode differentiation", "forward-gradient"),
    "one-point": Method("forward differences with one loss at theta for all queries", "one-point"),
    "p-rge": Method("two-point queries, all of them and both signs in one forward pass", "p-rge"),
    "fzoo": Method("forward differences over the spread of their losses: steps of normalised length", "fzoo"),
    "block-wise": Method("each query moves one block of layers alone", structure="block-wise"),
    "lezo": Method("each query leaves most of the layers alone", structure="layer-wise"),
    "lozo": Method(
        "directions of low rank, one of whose factors is kept for a while",
        structure="low-rank",
        fixed={"method.directions": "gaussian"},
    ),
    "subzero": Method(
        "small directions between orthonormal bases that are kept for a while",
        structure="subspace",
        fixed={"method.directions": "gaussian"},
    ),
    "deepzero": Method(
        "forward differences entry by entry, for small spaces", "coordinate-wise", structure="coordinate"
    ),
    "dizo": Method("now and then, steps along how far each parameter has drifted", optimizer="dizo"),
    "fedkseed": Method(
        "a fixed pool of seeds: theta is a sum over it, and no history needs to be kept",
        fixed={"federation.seeds": "pool"},
        paper="FedKSeed, arXiv 2312.06353",
    ),
    "fedkseed-pro": Method(
        "a fixed pool whose seeds are drawn by the magnitude of their scalars so far",
        fixed={"federation.seeds": "weighted-pool"},
        paper="FedKSeed-Pro, arXiv 2312.06353",
    ),
    "hybrid": Method(
        "a named part of theta by back-propagated gradients, the rest by zo-sgd", open=("method.first_order",)
    ),
    "hizoo": Method(
        "directions scaled by the curvature that a third loss tells",
        "hizoo",
        optimizer="hizoo",
        fixed={"method.directions": "gaussian"},
    ),
    "hiso": Method("directions scaled by a global second moment of past steps", optimizer="hiso"),
    "mezo-svrg": Method("batches correct a gradient estimate made on all data at an anchor", "svrg", optimizer="svrg"),
    "qzo": Method("two-point steps on the scales of a quantised base", optimizer="qzo"),
    "quzo": Method("whole steps on the int8 codes of a quantised base", optimizer="quzo"),
}


def with_method(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's dotted keys, and those of the method that it names where it does not give them itself."""
    name = flat.get("method.name")
    method = METHODS.get(name) if isinstance(name, str) else None
    return {**(method.keys if method else {}), **flat}


def difference(name: str, values: Mapping[str, Value]) -> str | None:
    """How a flat configuration differs from the method that it names, and what to do; None: it does not.

    Raises:
        ConfigError: the method is unknown; the message offers the nearest one.
    """
    method = lookup(METHODS, name, "method.name")
    for key in method.open:
        if not values[key]:
            return f'method.name = "{name}" needs {key}, which is empty: set it; `fedzo config` says what to'
    for key, wanted in method.keys.items():
        if values[key] != wanted:
            return (
                f'method.name = "{name}" is {key} = {json.dumps(wanted)}, found {json.dumps(values[key])}: leave {key} '
                "out, or method.name, to combine parts of your own"
            )
    return None
