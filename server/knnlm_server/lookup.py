"""A context whose neighbours are wanted: read like a prompt, by the same scheduler, and answered once. Knows no model and no batch."""

from __future__ import annotations

from knnlm_server.scheduler import Sequence
from knnlm_server.sequence import RetrieveRequest
from knnlm_server.served_stores import ChosenStores


class Lookup(Sequence):
    """A context on its way through the model. ``stores``: the datastores of its request, held until it is answered."""

    def __init__(self, request: RetrieveRequest, stores: ChosenStores) -> None:
        super().__init__(request.request_id, request.tokens, request.tenant)
        self.request, self.stores = request, stores
