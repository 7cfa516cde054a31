"""The calibrated mixture of a datastore: k, temperature and weight, kept beside the manifest with a checksum of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from knnlm.datastore.files import read_json_with_checksum, write_json_with_checksum
from knnlm.errors import InvalidInput, StoreDamaged
from knnlm.gate import Gate
from knnlm.mixture import Mixture

PROFILE = "profile.json"


@dataclass(frozen=True)
class Profile:
    """A mixture and where it comes from.

    ``distance``: ``exact`` or ``index``, the kind it was calibrated with. ``belongs``: what else it belongs to, by name (index,
    model, key layer, dtype); what is not named is not asked for. ``measured``: for people, what the calibration saw.
    ``gate``: λ for each token (None: the mixture's weight for all); it belongs to the mixture's k and temperature.
    """

    mixture: Mixture
    distance: str
    source: str
    belongs: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    gate: Gate | None = None

    def write(self, store: Path) -> None:
        """Write ``profile.json`` atomically."""
        content = {**asdict(self.mixture), "distance": self.distance, "source": self.source}
        gate = {} if self.gate is None else self.gate.content()
        further = {"belongs": dict(self.belongs), "measured": dict(self.measured), "gate": gate}
        write_json_with_checksum(store / PROFILE, {**content, **{name: value for name, value in further.items() if value}})

    @classmethod
    def read(cls, store: Path) -> Profile | None:
        """The store's profile, None if it has none; :class:`StoreDamaged` if it was changed or is incomplete."""
        path = store / PROFILE
        if not path.exists():
            return None
        content = read_json_with_checksum(path)
        try:
            mixture = Mixture(k=int(content["k"]), temperature=float(content["temperature"]), weight=float(content["weight"]))
            belongs = {str(name): str(value) for name, value in dict(content.get("belongs", {})).items()}
            gate = Gate.of(content["gate"]) if "gate" in content else None
            return cls(
                mixture.validate(), str(content["distance"]), str(content["source"]), belongs, dict(content.get("measured", {})), gate
            )
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise StoreDamaged(f"{path} is damaged: {error!r}.") from error
