"""The tree of errors: complete in ``__all__``, and drawn as it is."""

from __future__ import annotations

import inspect

import knnlm.errors as errors


def error_classes() -> dict[str, type[Exception]]:
    return {name: kind for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, Exception)}


def test_all_names_every_error_in_order_and_nothing_else() -> None:
    assert errors.__all__ == sorted(error_classes())


def test_the_drawn_tree_is_the_real_tree() -> None:
    assert errors.__doc__ is not None
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        name = line.lstrip(" │├└─").split(" ")[0]
        if name not in error_classes():
            continue
        depth = (len(line) - len(line.lstrip(" │├└─")) - 4) // 4
        path = [*path[:depth], name]
        drawn[name] = path[-2] if depth else "Exception"
    real = {name: kind.__bases__[0].__name__ for name, kind in error_classes().items()}
    assert drawn == real


def test_each_error_has_one_base_and_says_what_it_means() -> None:
    for kind in error_classes().values():
        assert len(kind.__bases__) == 1
        assert kind.__doc__


def test_invalid_input_names_the_field_and_the_problem() -> None:
    error = errors.InvalidInput("--weight", "is 2, but must be from 0 to 1.")
    assert (error.field, error.problem, str(error)) == (
        "--weight",
        "is 2, but must be from 0 to 1.",
        "--weight: is 2, but must be from 0 to 1.",
    )
