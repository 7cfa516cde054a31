"""Where a model comes from and how it is to be loaded: small, and the same in every process that needs the model."""

from __future__ import annotations

from dataclasses import dataclass

from knnlm.datastore.manifest import Manifest
from knnlm.model import HFLanguageModel


@dataclass(frozen=True)
class ModelSource:
    """Arguments of :meth:`HFLanguageModel.load`, kept; ``expected`` are the facts that the model must have."""

    name: str
    device: str = "cpu"
    dtype: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    key_layer: str = "last_ffn_input"
    key_module: str | None = None
    expected: Manifest | None = None

    @classmethod
    def of(cls, manifest: Manifest, *, model: str | None, device: str, dtype: str | None, trust_remote_code: bool) -> ModelSource:
        """The model that a store was built with. ``model``: where it lies now, if it was moved.

        Facts that the manifest holds (revision, dtype, key layer) are not asked for; code from a hub runs only with
        ``trust_remote_code``.
        """
        facts, layer = manifest.model, manifest.key.layer
        named_module = layer.kind == "module_input"
        return cls(
            name=model or facts.name,
            device=device,
            dtype=dtype or facts.dtype,
            revision=None if model else facts.revision,
            trust_remote_code=trust_remote_code,
            key_layer="last_ffn_input" if named_module else layer.kind,
            key_module=layer.module if named_module else None,
            expected=manifest,
        )

    def load(self) -> HFLanguageModel:
        """Load it. Raises :class:`ModelError`, and :class:`StoreMismatch` if it is not what was expected."""
        loaded = HFLanguageModel.load(
            self.name,
            device=self.device,
            dtype=self.dtype,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            key_layer=self.key_layer,
            key_module=self.key_module,
        )
        if self.expected is not None:
            self.expected.require_model(loaded)
        return loaded
