"""The calibrated mixture of a datastore: k, temperature and weight, kept beside the manifest with a checksum of its own."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from knnlm.datastore.files import read_json_with_checksum, write_json_with_checksum
from knnlm.errors import InvalidInput, StoreDamaged
from knnlm.mixture import Mixture

PROFILE = "profile.json"


@dataclass(frozen=True)
class Profile:
    """A mixture and where it comes from. ``distance``: ``exact`` or ``index``, the kind it was calibrated with."""

    mixture: Mixture
    distance: str
    source: str

    def write(self, store: Path) -> None:
        """Write ``profile.json`` atomically."""
        write_json_with_checksum(store / PROFILE, {**asdict(self.mixture), "distance": self.distance, "source": self.source})

    @classmethod
    def read(cls, store: Path) -> Profile | None:
        """The store's profile, None if it has none; :class:`StoreDamaged` if it was changed or is incomplete."""
        path = store / PROFILE
        if not path.exists():
            return None
        content = read_json_with_checksum(path)
        try:
            mixture = Mixture(k=int(content["k"]), temperature=float(content["temperature"]), weight=float(content["weight"]))
            return cls(mixture.validate(), str(content["distance"]), str(content["source"]))
        except (KeyError, TypeError, ValueError, InvalidInput) as error:
            raise StoreDamaged(f"{path} is damaged: {error!r}.") from error
