"""The evaluation behind evaluate.py, from low to high:

metrics, neighbours                 formulas, from features alone
class_names                         classes of files and of the comparison, matched by name
npz_sets, saved_statistics          .npz files of images and of statistics
image_sets                          sets to compare: their labels and pixels
samples                             the settings that sample_ddp.py writes
options                             the flags
training_set, ranks, inputs         the folder of --train, the ranks of the hierarchy, all sets of a command line
weights, features, named_networks   the networks and their files
class_embeddings                    a vision-language model as the classifier
networks                            the networks of a comparison
plan, reduction, diversity          parts of the pass over a set of images
image_pass                          the pass
training_features                   the pass over the training images, whose features are kept in a folder
comparison, per_class               the metrics of two sets, also of every class
memorisation, closest_pairs         copies of training images
notes                               sentences about possible problems
report_content                      the content of a report
bars, reports                       figure, tables and files
"""
