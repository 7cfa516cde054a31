"""``python -m knnlm`` is the command ``knnlm``."""

from knnlm.cli import main

main()
