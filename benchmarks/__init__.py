"""What the product costs, side by side with bare floors in one run, printed as ratios; docs/benchmarks.md says what each is.

No test depends on a time.
"""
