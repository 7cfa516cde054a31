"""``knnlm demo``: the whole of knnlm on one machine, with text and a language model that every machine has."""
