"""Reading input: finding files, opening them, and what each format's text and fields are. :mod:`knnlm.corpus` joins them."""
