"""What a client may ask for, and the request messages made of it. Imports no torch.

A value that no field can hold is refused before anything is sent (:class:`~knnlm.errors.InvalidInput`, which names the
field by its path in the request); ranges are the server's to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar

from google.protobuf.message import Message

from knnlm.errors import InvalidInput
from knnlm_server.pb import generation_pb2 as pb

Prompt = str | Sequence[int]
"""Text, or token ids as they are."""

Datastores = str | Sequence[str] | Mapping[str, float]
"""A datastore by its name, several, or several with their weights in the mix."""

GenerationT = TypeVar("GenerationT", pb.GenerateRequest, pb.StreamGenerateRequest)


class RetrievalOptions(TypedDict, total=False):
    """The mixture; None or absent: the server's default. ``retrieval=False``: the base model alone."""

    weight: float | None
    k: int | None
    knn_temperature: float | None
    datastores: Datastores | None
    retrieval: bool


class GenerationOptions(RetrievalOptions, total=False):
    """What a completion may be asked for; None or absent: the server's default, as ``generation.proto`` documents it."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    bad_words: Iterable[Prompt] | None
    seed: int | None
    max_new_tokens: int | None
    min_new_tokens: int | None
    stop_strings: Iterable[str] | None
    stop_token_ids: Iterable[int] | None
    ignore_eos: bool
    max_seconds: float | None
    log_probs: bool
    alternatives: int
    neighbors: int
    evidence: bool
    truncate_prompt: bool


class RetrieveOptions(TypedDict, total=False):
    """Whose neighbours are wanted and how many; None or absent: the server's default."""

    k: int | None
    knn_temperature: float | None
    datastores: Datastores | None
    neighbors: int | None
    truncate_context: bool


_RETRIEVAL_FIELDS = {"weight": "interpolation_weight", "k": "k", "knn_temperature": "knn_temperature"}
_PARTS: dict[str, Any] = {"sampling": pb.SamplingOptions, "stopping": pb.StoppingOptions, "detail": pb.DetailOptions}
_PLACES = {field.name: part for part, message in _PARTS.items() for field in message.DESCRIPTOR.fields}


def generation_request(
    request: GenerationT, prompt: Prompt, options: GenerationOptions, *, num_samples: int | None = None, best_of: int | None = None
) -> GenerationT:
    """Fill a Generate or StreamGenerate request, which have the same fields."""
    values: dict[str, Any] = dict(options)
    _put_input(request.prompt, "prompt", prompt)
    retrieval = {name: values.pop(name) for name in RetrievalOptions.__annotations__ if name in values}
    _put_retrieval(request.options.retrieval, "options.retrieval", retrieval)
    whole = {"truncate_prompt": values.pop("truncate_prompt", None), "num_samples": num_samples, "best_of": best_of}
    for name, value in whole.items():
        _put(request.options, "options", name, value)
    _put_bad_words(request.options.sampling.bad_words, "options.sampling.bad_words", values.pop("bad_words", None))
    for name, value in values.items():
        _require_known(name, GenerationOptions.__annotations__)
        _put(getattr(request.options, _PLACES[name]), f"options.{_PLACES[name]}", name, value)
    return request


def score_request(tokens: Prompt, options: RetrievalOptions) -> pb.ScoreRequest:
    """A request to score a text or token ids."""
    request = pb.ScoreRequest()
    _put_input(request.input, "input", tokens)
    _put_retrieval(request.retrieval, "retrieval", dict(options))
    return request


def retrieve_request(context: Prompt, options: RetrieveOptions) -> pb.RetrieveRequest:
    """A request for the neighbours of a context."""
    request, values = pb.RetrieveRequest(), dict[str, Any](options)
    _put_input(request.context, "context", context)
    _put_datastores(request.datastores, "datastores", values.pop("datastores", None))
    for name, value in values.items():
        _require_known(name, RetrieveOptions.__annotations__)
        _put(request, "", name, value)
    return request


def tokenize_request(text: str) -> pb.TokenizeRequest:
    """A request for the tokens of a text."""
    return put_fields(pb.TokenizeRequest(), text=text)


def detokenize_request(token_ids: Iterable[int]) -> pb.DetokenizeRequest:
    """A request for the text of token ids."""
    return put_fields(pb.DetokenizeRequest(), token_ids=token_ids)


MessageT = TypeVar("MessageT", bound=Message)


def put_fields(message: MessageT, **values: Any) -> MessageT:
    """Set fields of a request by name, those that are None left unset; returns the message."""
    for name, value in values.items():
        _put(message, "", name, value)
    return message


def _put_input(message: pb.Input, path: str, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _put(message, path, "text", prompt)
    else:
        message.token_ids.SetInParent()
        _put(message.token_ids, f"{path}.token_ids", "ids", prompt)


def _put_bad_words(messages: Any, path: str, words: Iterable[Prompt] | None) -> None:
    _require_several(words, path)
    for at, word in enumerate(words or ()):
        _put_input(messages.add(), f"{path}[{at}]", word)


def _put_retrieval(message: pb.RetrievalOptions, path: str, options: dict[str, Any]) -> None:
    _put(message, path, "off", None if options.pop("retrieval", True) else True)
    _put_datastores(message.datastores, f"{path}.datastores", options.pop("datastores", None))
    for name, value in options.items():
        _require_known(name, RetrievalOptions.__annotations__)
        _put(message, path, _RETRIEVAL_FIELDS[name], value)


def _put_datastores(messages: Any, path: str, datastores: Datastores | None) -> None:
    if datastores is None:
        return
    if isinstance(datastores, str):
        datastores = [datastores]
    weights = datastores if isinstance(datastores, Mapping) else dict.fromkeys(datastores)
    if len(weights) < len(datastores):
        raise InvalidInput(path, "names a datastore twice.")
    for at, (name, weight) in enumerate(weights.items()):
        message = messages.add()
        _put(message, f"{path}[{at}]", "name", name)
        _put(message, f"{path}[{at}]", "weight", weight)


def _put(message: Message, path: str, name: str, value: Any) -> None:
    """Set a field unless ``value`` is None; raise :class:`InvalidInput` where its type can't hold the value."""
    if value is None:
        return
    field = message.DESCRIPTOR.fields_by_name[name]
    place = f"{path}.{name}".lstrip(".")
    if field.is_repeated:
        _require_several(value, place)
    try:
        if field.is_repeated and isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif field.is_repeated:
            getattr(message, name).extend(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError) as error:
        problem = f"is {value}, which is negative or too large" if isinstance(value, int) else f"can't be sent: {error}"
        raise InvalidInput(place, f"{problem}.") from error


def _require_several(values: Any, place: str) -> None:
    """Refuse a string where a list is meant: its characters would be taken for the values."""
    if isinstance(values, str):
        raise InvalidInput(place, "is one string; give a list of them.")


def _require_known(name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise TypeError(f"unexpected option {name!r}; known are {', '.join(sorted(known))}")
