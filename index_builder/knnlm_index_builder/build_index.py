"""Building an index step by step, so that a killed build goes on from the last finished part.

Knows where the unfinished pieces of one index lie; what they are is the work of ``train_index``, ``fill_index`` and
``merge_index``.
"""

from __future__ import annotations
