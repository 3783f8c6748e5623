"""The evaluation behind evaluate.py. From low to high: `features` (networks), `npz_sets` and `image_sets` (images to
compare), `measure` (one pass over them), `comparison` (the figures of two sets), `reports` (tables and files).
The formulas are in metrics.py."""
