"""``python -m knnlm`` is the command ``knnlm``."""

from knnlm.cli import main

if __name__ == "__main__":  # not in a worker process, which reads this file again
    main()
