"""What a node's owner says of it: Flower's node-config."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedzo.errors import ProtocolError

# partition-id and num-partitions are Flower's own names, and what its simulation gives every node.
KEYS: dict[str, type | tuple[type, ...]] = {
    "partition-id": int,
    "num-partitions": int,
    "max-epsilon": (int, float),
    "max-delta": (int, float),
    "privacy-modes": str,
    "data": str,
    "model": str,
    "device": str,
}


@dataclass(frozen=True)
class Party:
    """A client, as the machine it is on knows it.

    Attributes:
        client: its number in the run.
        node: Flower's id of its node.
        config: the node-config, checked.
    """

    client: int
    node: str
    config: Mapping[str, Any]

    @staticmethod
    def of(node_config: Mapping[str, Any], node: str) -> "Party":
        """Checked.

        Raises:
            ProtocolError: a key is unknown or has another type, or the node has no number. A misspelt limit must not
                pass for none.
        """
        for name, value in node_config.items():
            if name not in KEYS:
                raise ProtocolError(f'refused: a node\'s config has the unknown key "{name}"; known: {", ".join(KEYS)}')
            if isinstance(value, bool) or not isinstance(value, KEYS[name]):
                raise ProtocolError(f'refused: a node\'s config has "{name}" of type {type(value).__name__}')
        if "partition-id" not in node_config:
            raise ProtocolError("a node has no client number; give it one with --node-config 'partition-id=0'")
        return Party(node_config["partition-id"], node, dict(node_config))

    @property
    def device(self) -> str:
        """Of this node's worker; "": the run-config's."""
        return str(self.config.get("device", ""))

    @property
    def model(self) -> str:
        """Where this machine has the base model; "": where the run-config says."""
        return self._path("model")

    @property
    def data(self) -> str:
        """The file with this client's own examples; "": its part of the run-config's."""
        return self._path("data")

    def _path(self, name: str) -> str:
        given = str(self.config.get(name, ""))
        return str(Path(given).expanduser()) if given else ""

    def check(self, mode: str, epsilon: float, delta: float) -> None:
        """Checks that a run promises what the owner asks for.

        Args:
            mode, epsilon, delta: the run's; mode "": it is not private.

        Raises:
            ProtocolError: it does not.
        """
        most, modes, rarely = (self.config.get(name) for name in ("max-epsilon", "privacy-modes", "max-delta"))
        if most is None and modes is None and rarely is None:
            return
        if not mode:
            raise ProtocolError("refused: this node takes part in private runs only, and the run is not one")
        if most is not None and not epsilon <= most:
            raise ProtocolError(f"refused: this node's max-epsilon is {most}, the run's epsilon is {epsilon:g}")
        if rarely is not None and not delta <= rarely:
            raise ProtocolError(f"refused: this node's max-delta is {rarely}, the run's delta is {delta:g}")
        if modes is not None and mode not in [name.strip() for name in modes.split(",")]:
            raise ProtocolError(f"refused: this node's privacy-modes are {modes}, the run's is {mode}")
