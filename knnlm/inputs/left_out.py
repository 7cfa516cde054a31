"""What a command says about input that it did not take. On standard error; nothing is left out in silence."""

from __future__ import annotations

from knnlm.console import counted, messages
from knnlm.corpus import Corpus

NAMED = 5


def say_left_out(corpus: Corpus) -> None:
    """Print what the latest iteration of ``corpus`` left out, by reason, and the problems that it skipped."""
    for reason, names in corpus.left_out.items():
        more = ", …" if len(names) > NAMED else ""
        messages.print(f"left out {len(names):,} {reason}: {', '.join(names[:NAMED])}{more}", soft_wrap=True)
    problems = corpus.problems
    if problems.total:
        messages.print(f"skipped {counted(problems.total, 'problem')} of the input, the first of them:", soft_wrap=True)
        for sentence in problems.first:
            messages.print(f"  {sentence}", soft_wrap=True)
