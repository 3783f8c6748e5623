"""The evaluation behind evaluate.py, from low to high:

metrics                             formulas, from features alone
class_names                         classes of files and of the comparison, matched by name
npz_sets, saved_statistics          .npz files of images and of statistics
image_sets                          sets to compare: their labels and pixels
samples                             the settings that sample_ddp.py writes
weights, features, named_networks   the networks and their files
networks                            the networks of a comparison
plan, reduction, diversity          parts of the pass over a set of images
image_pass                          the pass
comparison                          the metrics of two sets
notes                               sentences about possible problems
bars, reports                       figure, tables and files
"""
