"""Speed of the product against bare floors, side by side in one run, printed as ratios. No test depends on a time."""
