"""What a method is valid under: conditions on keys of the configuration, checked before anything is loaded."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Value = bool | int | float | str

# Everything private that may be asked of a run; a method names those under which its scalars stay covered.
PrivacyMode = Literal["example-local", "client-central", "client-local", "client-secagg"]
PRIVACY_MODES: tuple[str, ...] = get_args(PrivacyMode)
# Of clients' data as a whole: their scalars are clipped and noised together, whatever one example does to them.
CLIENT_MODES: tuple[str, ...] = PRIVACY_MODES[1:]


@dataclass(frozen=True)
class Limit:
    """A key must have one of some values.

    Attributes:
        key: dotted key of the configuration.
        allowed: its values under which the method is valid.
        because: the reason, as the end of a sentence.
    """

    key: str
    allowed: tuple[Value, ...]
    because: str

    @property
    def wanted(self) -> str:
        """The condition in words."""
        return f"{self.key} = {' or '.join(json.dumps(value) for value in self.allowed)}"

    def fault(self, values: Mapping[str, Value]) -> str | None:
        """What to change and why, or None when the flat configuration keeps the limit."""
        if values[self.key] in self.allowed:
            return None
        return f"needs {self.wanted}, found {json.dumps(values[self.key])}: {self.because}"


@dataclass(frozen=True)
class AtLeast:
    """A key must have at least a value."""

    key: str
    least: int
    because: str

    @property
    def wanted(self) -> str:
        """The condition in words."""
        return f"{self.key} of at least {self.least}"

    def fault(self, values: Mapping[str, Value]) -> str | None:
        """As `Limit.fault`."""
        found = values[self.key]
        if isinstance(found, int | float) and found >= self.least:
            return None
        return f"needs {self.wanted}, found {json.dumps(found)}: {self.because}"


Condition = Limit | AtLeast

# The limits that many methods share.
ONE_LOCAL_STEP = Limit("federation.local_steps", (1,), "what it does next depends on the clients' aggregated scalars")
NO_POOL = Limit(
    "federation.seeds",
    ("shared", "independent"),
    "a pool's theta is a sum over its seeds, which this method's theta is not",
)
FLOAT32_THETA = Limit("space.theta_dtype", ("float32",), "only plain SGD rounds a bfloat16 theta so that it replays")
NO_CODES = Limit(
    "space.kind", ("full", "sparse", "adapter", "scales"), "codes of a quantised base are whole numbers, moved by quzo"
)
ISOTROPIC_BFLOAT16 = Limit(
    "space.theta_dtype", ("float32",), "a bfloat16 theta is moved along isotropic directions only"
)
SHARED_OUT = Limit(
    "federation.seeds",
    ("shared", "independent"),
    "a step's queries share their work out by seeds of their own, and a pool's are fixed",
)
CHANGING = Limit(
    "federation.seeds",
    ("shared", "independent"),
    "what a seed stands for changes with the step, and a pool keeps one coefficient a seed for the whole run",
)
